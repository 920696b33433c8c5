//! Task: pods with `spec.nodeName` = our node, from the API server into the [`Store`] and the queue.
//!
//! Nothing counts as known before the first list is whole. A pod that a later list lacks has vanished: the
//! controller hears of it as of a DELETED. This task never writes to the API server.

use std::{borrow::Cow, collections::HashSet, sync::Arc};

use futures::StreamExt as _;
use k8s_openapi::{
    NamespaceResourceScope, api::core::v1::Pod, apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, Client, Resource,
    runtime::{WatchStreamExt as _, watcher},
};
use serde::{Deserialize, Deserializer, de::Error as _};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    queue::Queue,
    store::{Store, Uid},
    verdict::{self, Findings},
};

/// A pod together with what the verdict table says of the JSON it came as.
#[derive(Clone, Debug)]
pub(crate) struct Watched {
    pod: Pod,
    findings: Findings,
}

impl<'de> Deserialize<'de> for Watched {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let json = serde_json::Value::deserialize(deserializer)?;
        let findings = verdict::judge(&json);
        let mut pod: Pod = serde_json::from_value(json).map_err(D::Error::custom)?;
        // By far the largest part, and of no use here.
        pod.metadata.managed_fields = None;
        Ok(Self { pod, findings })
    }
}

impl Resource for Watched {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        "Pod".into()
    }
    fn group((): &()) -> Cow<'_, str> {
        "".into()
    }
    fn version((): &()) -> Cow<'_, str> {
        "v1".into()
    }
    fn plural((): &()) -> Cow<'_, str> {
        "pods".into()
    }
    fn meta(&self) -> &ObjectMeta {
        &self.pod.metadata
    }
    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.pod.metadata
    }
}

/// The watch of one node's pods.
#[derive(Debug)]
pub struct PodWatch {
    store: Store,
    queue: Queue,
    synced: watch::Sender<bool>,
    /// UIDs of the list under way.
    listed: HashSet<Uid>,
}

impl PodWatch {
    /// A watch that writes to `store` and `queue`, and says on `synced` when the first list is whole.
    #[must_use]
    pub fn new(store: Store, queue: Queue, synced: watch::Sender<bool>) -> Self {
        Self {
            store,
            queue,
            synced,
            listed: HashSet::new(),
        }
    }

    /// Watches until `shutdown`.
    pub async fn run(mut self, client: Client, node: &str, shutdown: CancellationToken) {
        let config = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
        let api: Api<Watched> = Api::all(client);
        let events = watcher(api, config).default_backoff();
        let mut events = std::pin::pin!(events);
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                event = events.next() => match event {
                    Some(Ok(event)) => self.take(event),
                    Some(Err(error)) => {
                        let error = knoc_proto::error::chain(&error);
                        tracing::warn!(%error, "watch of pods broke off, it begins again");
                    }
                    None => return,
                },
            }
        }
    }

    fn take(&mut self, event: watcher::Event<Watched>) {
        match event {
            watcher::Event::Init => self.listed.clear(),
            watcher::Event::InitApply(watched) => {
                if let Some(uid) = self.put(watched) {
                    self.listed.insert(uid);
                }
            }
            watcher::Event::InitDone => self.listed(),
            watcher::Event::Apply(watched) => {
                self.put(watched);
            }
            watcher::Event::Delete(watched) => {
                if let Some(uid) = watched.pod.metadata.uid.as_deref() {
                    self.gone(&uid.into());
                }
            }
        }
    }

    fn put(&self, watched: Watched) -> Option<Uid> {
        let uid: Uid = watched.pod.metadata.uid.as_deref()?.into();
        self.store
            .set_desired(&uid, Arc::new(watched.pod), Arc::new(watched.findings));
        self.queue.push(&uid);
        Some(uid)
    }

    fn gone(&self, uid: &Uid) {
        self.store.remove_desired(uid);
        self.queue.push(uid);
    }

    /// A list is whole: what it lacks has vanished.
    fn listed(&mut self) {
        let listed = std::mem::take(&mut self.listed);
        for uid in self.store.desired_uids() {
            if !listed.contains(&uid) {
                self.gone(&uid);
            }
        }
        let pods = listed.len();
        if !self.synced.send_replace(true) {
            tracing::info!(pods, "pods of the node listed");
            // Now that it counts: look at each again.
            for uid in self.store.desired_uids() {
                self.queue.push(&uid);
            }
        }
    }
}
