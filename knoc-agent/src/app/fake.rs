//! A site in a temporary directory, for tests within one process: everything that `serve` builds
//! except listeners.

use std::{path::Path, sync::Arc, time::Duration};

use knoc_proto::{
    ids::PodUid,
    pb,
    pod::{PodSpec, PodValues},
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::prepare;
use crate::{
    config::{Config, Home},
    pod::input::RequestError,
    registry::Registry,
    site::Site,
};

/// The longest time that a test waits for a state.
pub(crate) const SOON: Duration = Duration::from_mins(2);

/// The spec of a pod with one container.
pub(crate) fn spec(uid: &PodUid) -> pb::PodSpec {
    let container = pb::Container {
        name: "main".to_owned(),
        image: "none".to_owned(),
        command: vec!["true".to_owned()],
        ..pb::Container::default()
    };
    pb::PodSpec {
        uid: uid.to_string(),
        namespace: "default".to_owned(),
        name: uid.to_string(),
        containers: vec![container],
        ..pb::PodSpec::default()
    }
}

/// The values of that pod.
pub(crate) fn values() -> pb::PodValues {
    pb::PodValues {
        revision: 1,
        ..pb::PodValues::default()
    }
}

/// The site and its registry. Jobs end on their own.
pub(crate) struct Fake {
    dir: tempfile::TempDir,
    pub(crate) site: Arc<Site>,
    pub(crate) registry: Arc<Registry>,
    #[expect(dead_code, reason = "kept open: actors send when they end")]
    pub(crate) ended: mpsc::Receiver<PodUid>,
}

impl Fake {
    /// A site without containers; `text` is the rest of its site file, in which `{dir}` stands for
    /// the directory.
    pub(crate) async fn new(text: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let text =
            format!("site = \"t\"\nstate_dir = \"{{dir}}/state\"\nruntime = \"process\"\n{text}");
        let text = text.replace("{dir}", &dir.path().display().to_string());
        let home = Home {
            home: dir.path().to_owned(),
        };
        let config = Config::parse(&text, Path::new("agent.toml"), &home).unwrap();
        let (ended_by, ended) = mpsc::channel(crate::registry::ENDED);
        let taken = prepare::take(&config).unwrap();
        let prepared = prepare::prepare(config, taken, ended_by).await;
        let site = prepared.unwrap().site;
        let registry = Registry::new(Arc::clone(&site), 100, CancellationToken::new());
        Self {
            dir,
            site,
            registry,
            ended,
        }
    }

    /// The site's directory.
    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Sends `EnsurePod` for a pod with one container.
    pub(crate) async fn ensure(&self, uid: &PodUid) {
        self.ensure_as(spec(uid)).await.unwrap();
    }

    /// Sends `EnsurePod` for this spec.
    pub(crate) async fn ensure_as(&self, spec: pb::PodSpec) -> Result<(), RequestError> {
        let spec = PodSpec::try_from(spec).unwrap();
        let values = PodValues::check(values(), &spec).unwrap();
        let ensured = self.registry.ensure(spec, values, None, String::new());
        ensured.await.map(drop)
    }

    /// Waits until the pod's observed state satisfies `wanted`.
    pub(crate) async fn seen(&self, uid: &PodUid, wanted: impl Fn(&pb::PodObserved) -> bool) {
        let mut changes = self.site.board.subscribe();
        let mut last = None;
        let waiting = async {
            loop {
                last = self.site.board.get(uid.as_str());
                if last.as_ref().is_some_and(|seen| wanted(seen)) {
                    return;
                }
                changes.changed().await.unwrap();
            }
        };
        let outcome = tokio::time::timeout(SOON, waiting).await;
        outcome.unwrap_or_else(|_| panic!("last seen: {last:?}"));
    }

    /// Waits until the pod is no longer observed.
    pub(crate) async fn gone(&self, uid: &PodUid) {
        let mut changes = self.site.board.subscribe();
        let waiting = async {
            while self.site.board.get(uid.as_str()).is_some() {
                changes.changed().await.unwrap();
            }
        };
        let outcome = tokio::time::timeout(SOON, waiting).await;
        outcome.unwrap_or_else(|_| panic!("{uid} is still seen"));
    }
}
