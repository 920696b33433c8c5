//! Task: watches the pods with `spec.nodeName` = our node, for the [`Store`](super::store::Store) and the queue.
//!
//! Nothing counts as known before the first list is complete. A DELETED event of the watch is believed at once. A pod
//! that a later list lacks is only missing: the API server is asked for it ([`super::presence`]) before the controller
//! removes it. If more than max(5, 10 %) of the jobs would end this way none is ended: an API server that was restored
//! from a backup, or whose cache is behind, must not empty the node. This task never writes to the API server.

use std::{borrow::Cow, collections::HashSet, sync::Arc, time::Duration};

use futures::{Stream, StreamExt as _};
use k8s_openapi::{
    NamespaceResourceScope, api::core::v1::Pod, apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use knoc_proto::{ids::PodUid, pb::PodPhase};
use knoc_translate::verdict::{self, Findings};
use kube::{
    Api, Resource,
    runtime::{WatchStreamExt as _, watcher},
};
use serde::{Deserialize, Deserializer, de::Error as _};
use tokio::{sync::watch, task::JoinSet, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::{
    controller::Context,
    presence::{self, Presence, plausible},
};

/// How often the API server is asked for pods that are still missing.
const ASK_AGAIN: Duration = Duration::from_secs(5);

/// A pod together with the findings of the verdict table about its JSON.
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
        // By far the largest part of a pod, and not needed.
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
#[expect(missing_debug_implementations, reason = "kube::Client has none")]
pub struct PodWatch {
    context: Arc<Context>,
    synced: watch::Sender<bool>,
    /// How many jobs are kept because it is implausible that so many pods vanished at once.
    halted: watch::Sender<usize>,
    /// UIDs of the list that is being read.
    listed: HashSet<PodUid>,
    /// Known pods that the last list lacked.
    missing: HashSet<PodUid>,
    /// Running requests for missing pods.
    questions: JoinSet<(PodUid, Presence)>,
}

impl PodWatch {
    /// A watch that writes to the store and the queue of `context`. It sets `synced` when the first list is complete,
    /// and `halted` to the number of missing pods that wait for the operator.
    #[must_use]
    pub fn new(
        context: Arc<Context>,
        synced: watch::Sender<bool>,
        halted: watch::Sender<usize>,
    ) -> Self {
        Self {
            context,
            synced,
            halted,
            listed: HashSet::new(),
            missing: HashSet::new(),
            questions: JoinSet::new(),
        }
    }

    /// Watches until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let fields = format!("spec.nodeName={}", self.context.node.name());
        let config = watcher::Config::default().fields(&fields);
        let api: Api<Watched> = Api::all(self.context.api.client.clone());
        let events = watcher(api, config).default_backoff();
        self.follow(events, shutdown).await;
    }

    /// Handles these events until `shutdown`.
    pub(in crate::pods) async fn follow(
        mut self,
        events: impl Stream<Item = watcher::Result<watcher::Event<Watched>>>,
        shutdown: CancellationToken,
    ) {
        let mut events = std::pin::pin!(events);
        let mut again = tokio::time::interval(ASK_AGAIN);
        again.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let waits = !self.missing.is_empty() || *self.halted.borrow() > 0;
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                Some(answer) = self.questions.join_next() => {
                    if let Ok((uid, presence)) = answer {
                        self.answered(&uid, presence);
                    }
                }
                _ = again.tick(), if waits => self.ask(),
                event = events.next() => match event {
                    Some(Ok(event)) => self.take(event),
                    Some(Err(error)) => {
                        let error = knoc_proto::error::chain(&error);
                        tracing::warn!(%error, "the watch of pods failed, it is restarted");
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
                if let Some(uid) = self.put(watched, true) {
                    self.listed.insert(uid);
                }
            }
            watcher::Event::InitDone => self.listed(),
            watcher::Event::Apply(watched) => {
                self.put(watched, false);
            }
            watcher::Event::Delete(watched) => {
                if let Some(uid) = uid_of(&watched.pod) {
                    self.gone(&uid);
                }
            }
        }
    }

    /// A pod from a list replaces what was known; one from the watch only replaces an older one.
    fn put(&mut self, watched: Watched, list: bool) -> Option<PodUid> {
        let uid = uid_of(&watched.pod)?;
        let store = &self.context.pods.store;
        let (pod, findings) = (Arc::new(watched.pod), Arc::new(watched.findings));
        if list {
            store.replace_desired(&uid, pod, findings);
        } else {
            store.set_desired(&uid, pod, findings);
        }
        self.missing.remove(&uid);
        self.context.pods.queue.push(&uid);
        Some(uid)
    }

    fn gone(&mut self, uid: &PodUid) {
        self.missing.remove(uid);
        self.context.pods.store.remove_desired(uid);
        self.context.pods.queue.push(uid);
    }

    /// A list is complete: known pods that it lacks are missing.
    fn listed(&mut self) {
        let listed = std::mem::take(&mut self.listed);
        let known = self.context.pods.store.desired_uids().into_iter();
        self.missing = known.filter(|uid| !listed.contains(uid)).collect();
        let pods = listed.len();
        if !self.synced.send_replace(true) {
            tracing::info!(pods, "listed the pods of the node");
            // Only now may the workers act: reconcile each pod again.
            for uid in self.context.pods.store.desired_uids() {
                self.context.pods.queue.push(&uid);
            }
        }
        self.ask();
    }

    /// Asks for each missing pod; if too many jobs would end, only for pods whose jobs have ended.
    fn ask(&mut self) {
        if !self.questions.is_empty() {
            return;
        }
        let missing = self.missing.iter();
        let (living, ended): (Vec<_>, Vec<_>) = missing.cloned().partition(|uid| self.lives(uid));
        let all = self.context.pods.store.desired_uids().len();
        let halted = if plausible(living.len(), all) {
            0
        } else {
            living.len()
        };
        let spared = self
            .halted
            .send_if_modified(|known| std::mem::replace(known, halted) != halted);
        if spared && halted > 0 {
            tracing::error!(
                missing = halted,
                all,
                "a list lacks too many pods at once, none of their jobs is ended; check the API server"
            );
        }
        let believed = if halted > 0 { Vec::new() } else { living };
        for uid in ended.into_iter().chain(believed) {
            self.question(uid);
        }
    }

    /// May the pod have a job that has not ended? While the link is down this is unknown, so it may.
    fn lives(&self, uid: &PodUid) -> bool {
        let observed = self.context.pods.store.observed(uid);
        !self.context.site.link.borrow().is_up()
            || observed.is_some_and(|observed| observed.phase() != PodPhase::Finished)
    }

    fn question(&mut self, uid: PodUid) {
        let Some(view) = self.context.pods.store.by_uid(&uid) else {
            self.missing.remove(&uid);
            return;
        };
        let context = self.context.clone();
        self.questions.spawn(async move {
            let meta = &view.pod.metadata;
            let namespace = meta.namespace.as_deref().unwrap_or_default();
            let name = meta.name.as_deref().unwrap_or_default();
            let which = (namespace, name, &uid);
            let said = presence::presence(
                &context.api.client,
                context.api.pod_lookup,
                context.node.name(),
                which,
            )
            .await;
            (uid, said)
        });
    }

    /// The answer counts only if the pod is still missing.
    fn answered(&mut self, uid: &PodUid, presence: Presence) {
        match presence {
            Presence::Gone if self.missing.contains(uid) => self.gone(uid),
            Presence::There => {
                tracing::warn!(%uid, "a list lacked a pod that exists");
            }
            Presence::Gone | Presence::Unknown => {}
        }
    }
}

/// The UID of a pod; None, with a log line, if it is not a valid one.
fn uid_of(pod: &Pod) -> Option<PodUid> {
    let uid = PodUid::try_from(pod.metadata.uid.as_deref()?);
    uid.inspect_err(|error| tracing::warn!(%error, "a pod with an invalid UID is ignored"))
        .ok()
}
