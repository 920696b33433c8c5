//! Task: WatchPods and WatchNode, with reconnect and back-off, into the [`Store`], the queue and two watch channels.
//!
//! A snapshot replaces what was known: the agent does not know a pod that is not in it. Then each change follows. While
//! the link is down the last observations stay; [`Link`] says since when. This task changes nothing at the agent.

use std::{collections::HashSet, sync::Arc, time::Duration};

use jiff::Timestamp;
use knoc_proto::{
    ids::PodUid,
    pb::{self, pod_event::Event},
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{Agent, Link, tells_capacity};
use crate::pods::{Store, UNREACHABLE_AFTER, queue::Queue};

/// The pause before the first attempt to reconnect; each further one is twice as long.
const BACKOFF: Duration = Duration::from_millis(100);
const BACKOFF_MOST: Duration = Duration::from_secs(5);
/// From the call to the end of the snapshot: 10,000 pods are a few MiB.
const SNAPSHOT_DEADLINE: Duration = Duration::from_mins(1);

/// The watches of one agent.
#[derive(Debug)]
pub struct AgentWatch {
    agent: Agent,
    store: Store,
    queue: Queue,
    link: watch::Sender<Link>,
    capacity: watch::Sender<Option<Arc<pb::NodeInfo>>>,
}

impl AgentWatch {
    /// Watches that write to `store` and `queue`, and publish link and capacity.
    #[must_use]
    pub fn new(
        agent: Agent,
        store: Store,
        queue: Queue,
        link: watch::Sender<Link>,
        capacity: watch::Sender<Option<Arc<pb::NodeInfo>>>,
    ) -> Self {
        Self {
            agent,
            store,
            queue,
            link,
            capacity,
        }
    }

    /// Watches until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut backoff = BACKOFF;
        loop {
            let status = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                status = self.session() => status,
            };
            if self.link.borrow().is_up() {
                backoff = BACKOFF;
            }
            self.down(&status);
            let wait = backoff.mul_f64(rand::random_range(0.5..1.5));
            backoff = (backoff * 2).min(BACKOFF_MOST);
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Runs the watches over one connection; returns why they ended.
    async fn session(&self) -> tonic::Status {
        let info = match self.agent.get_info().await {
            Ok(info) => Arc::new(info),
            Err(status) => return status,
        };
        let node = self.watch_node();
        let pods = self.watch_pods(&info);
        tokio::select! {
            biased;
            status = pods => status,
            status = node => status,
        }
    }

    async fn watch_node(&self) -> tonic::Status {
        let mut stream = match self
            .agent
            .control()
            .watch_node(pb::WatchNodeRequest {})
            .await
        {
            Ok(answer) => answer.into_inner(),
            Err(status) => return status,
        };
        loop {
            match stream.message().await {
                Ok(Some(node)) => {
                    self.capacity.send_modify(|known| {
                        *known = Some(Arc::new(newest(known.as_deref(), node)));
                    });
                }
                Ok(None) => return tonic::Status::unavailable("the agent ended WatchNode"),
                Err(status) => return status,
            }
        }
    }

    async fn watch_pods(&self, info: &Arc<pb::AgentInfo>) -> tonic::Status {
        let mut stream = match self
            .agent
            .control()
            .watch_pods(pb::WatchPodsRequest {})
            .await
        {
            Ok(answer) => answer.into_inner(),
            Err(status) => return status,
        };
        let snapshot = tokio::time::timeout(SNAPSHOT_DEADLINE, self.snapshot(&mut stream)).await;
        match snapshot {
            Ok(Ok(seen)) => self.up(info, &seen),
            Ok(Err(status)) => return status,
            Err(_) => {
                return tonic::Status::deadline_exceeded("the agent's snapshot is not complete");
            }
        }
        loop {
            match stream.message().await {
                Ok(Some(event)) => self.take(event),
                Ok(None) => return tonic::Status::unavailable("the agent ended WatchPods"),
                Err(status) => return status,
            }
        }
    }

    /// Reads the snapshot, which ends with Synced, and returns its UIDs.
    async fn snapshot(
        &self,
        stream: &mut tonic::Streaming<pb::PodEvent>,
    ) -> Result<HashSet<PodUid>, tonic::Status> {
        let mut seen = HashSet::new();
        loop {
            match stream.message().await?.and_then(|event| event.event) {
                Some(Event::Item(pod)) => {
                    if let Some(uid) = checked(&pod.uid) {
                        self.store.set_observed(&uid, Arc::new(pod));
                        seen.insert(uid);
                    }
                }
                Some(Event::Synced(_)) => return Ok(seen),
                Some(Event::RemovedUid(uid)) => {
                    seen.remove(uid.as_str());
                }
                None => return Err(tonic::Status::unavailable("the agent ended WatchPods")),
            }
        }
    }

    fn up(&self, info: &Arc<pb::AgentInfo>, seen: &HashSet<PodUid>) {
        for uid in self.store.observed_uids() {
            if !seen.contains(&uid) {
                self.store.remove_observed(&uid);
            }
        }
        tracing::info!(
            version = info.version,
            site = info.site,
            scheduler = info.scheduler_version,
            runtime = info.runtime_version,
            pods = seen.len(),
            "connected to the agent"
        );
        self.link.send_replace(Link::Up {
            info: info.clone(),
            since: Timestamp::now(),
        });
        self.push_all(Duration::ZERO);
    }

    fn take(&self, event: pb::PodEvent) {
        match event.event {
            Some(Event::Item(pod)) => {
                if let Some(uid) = checked(&pod.uid) {
                    let ended = pod.phase() == pb::PodPhase::Finished;
                    self.store.set_observed(&uid, Arc::new(pod));
                    if ended {
                        self.queue.push_urgent(&uid);
                    } else {
                        self.queue.push(&uid);
                    }
                }
            }
            Some(Event::RemovedUid(uid)) => {
                if let Some(uid) = checked(&uid) {
                    self.store.remove_observed(&uid);
                    self.queue.push(&uid);
                }
            }
            Some(Event::Synced(_)) | None => {}
        }
    }

    fn down(&self, status: &tonic::Status) {
        let message = knoc_proto::error::chain(status);
        let was_up = self.link.borrow().is_up();
        if was_up || self.link.borrow().message() != message {
            tracing::warn!(error = %message, "lost the link to the agent, or could not connect; trying again");
        }
        self.link.send_modify(|link| match link {
            Link::Down { message: known, .. } => *known = message,
            Link::Up { .. } => {
                *link = Link::Down {
                    since: Timestamp::now(),
                    at: Instant::now(),
                    message,
                };
            }
        });
        if was_up {
            self.push_all(UNREACHABLE_AFTER + Duration::from_millis(100));
        }
    }

    /// Queues all pods.
    fn push_all(&self, after: Duration) {
        let mut uids = self.store.desired_uids();
        uids.extend(self.store.observed_uids());
        // A key that is already in the queue keeps its position.
        for uid in &uids {
            if after.is_zero() {
                self.queue.push(uid);
            } else {
                self.queue.push_after(uid, after);
            }
        }
    }
}

/// PURE: what the agent says of the node, with the last capacity known if this agent does not know it yet: a node must
/// not shrink to nothing because its agent was restarted.
fn newest(known: Option<&pb::NodeInfo>, new: pb::NodeInfo) -> pb::NodeInfo {
    match known {
        Some(known) if !tells_capacity(&new) => pb::NodeInfo {
            cpu: known.cpu,
            memory_bytes: known.memory_bytes,
            ephemeral_storage_bytes: known.ephemeral_storage_bytes,
            extended: known.extended.clone(),
            nodes_total: known.nodes_total,
            nodes_available: known.nodes_available,
            partitions: known.partitions.clone(),
            ..new
        },
        Some(_) | None => new,
    }
}

/// The UID of a pod as the agent sent it. Agents check UIDs before they accept a pod, so an invalid one is a bug of the
/// agent: it is logged and ignored.
fn checked(uid: &str) -> Option<PodUid> {
    PodUid::try_from(uid)
        .inspect_err(|error| tracing::warn!(%error, "the agent reported a pod with an invalid UID, which is ignored"))
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restarted_agent_does_not_shrink_the_node() {
        let known = pb::NodeInfo {
            cpu: 96,
            nodes_total: 3,
            ..pb::NodeInfo::default()
        };
        let away = pb::NodeInfo {
            scheduler: Some(pb::SchedulerHealth::default()),
            pod_limit: 9,
            policy_problem: "x".to_owned(),
            maps_privileged: true,
            ..pb::NodeInfo::default()
        };
        let both = newest(Some(&known), away.clone());
        let expected = pb::NodeInfo {
            cpu: 96,
            nodes_total: 3,
            ..away.clone()
        };
        assert_eq!(both, expected);
        assert_eq!(newest(None, away.clone()), away);
        // A capacity with all nodes down is known too.
        let none = pb::NodeInfo {
            nodes_total: 3,
            ..pb::NodeInfo::default()
        };
        assert_eq!(newest(Some(&known), none.clone()), none);
    }
}
