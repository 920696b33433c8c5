//! What the kubelet API sees of the other parts: pods from the [`Store`], streams from the agent.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::{StreamExt as _, future::BoxFuture, stream};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use knoc_link::{
    bulk::{self, Messages},
    log_reader,
};
use knoc_proto::{error::chain, ids::PodUid, pb};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tracing::info;

use crate::{
    agent::{Agent, Link, renew::LinkCertificate},
    metrics::{Gauges, Metrics, process},
    pods::{LoopHealth, Store},
    server::{Backend, ByteStream, ExecStream, PodView, PortForwardStream},
    stats::{Snapshot, Stats},
};

/// The phases of Kubernetes. Each has a sample, even if no pod is in it.
const PHASES: [&str; 5] = ["Pending", "Running", "Succeeded", "Failed", "Unknown"];

/// The kubelet as the API server sees it.
#[derive(Debug)]
pub(super) struct KubeletBackend {
    pub(super) store: Store,
    pub(super) agent: Agent,
    pub(super) link: watch::Receiver<Link>,
    pub(super) health: LoopHealth,
    /// What the site has, as the agent last reported.
    pub(super) capacity: watch::Receiver<Option<Arc<pb::NodeInfo>>>,
    /// The state of our certificate on the link.
    pub(super) certificate: watch::Receiver<LinkCertificate>,
    pub(super) metrics: Metrics,
    pub(super) stats: Stats,
    /// The configuration that `/configz` shows.
    pub(super) config: serde_json::Value,
}

impl KubeletBackend {
    /// Fails with a clear message if an older agent lacks the capability, instead of a missing method. While the link
    /// is down the call itself fails.
    fn needs(&self, capability: &str) -> Result<(), tonic::Status> {
        match &*self.link.borrow() {
            Link::Up { info, .. } if !info.capabilities.iter().any(|it| it == capability) => {
                let text = format!(
                    "the agent on the login node ({}) does not support {capability}, upgrade it",
                    info.version
                );
                Err(tonic::Status::unimplemented(text))
            }
            Link::Up { .. } | Link::Down { .. } => Ok(()),
        }
    }
}

/// The client's messages as a stream to the agent.
fn sent<T: prost::Message + 'static>(input: mpsc::Receiver<T>) -> tonic::Request<stream::Empty<T>> {
    bulk::request(ReceiverStream::new(input))
}

/// The log of a container, which continues after the link to the agent was lost.
struct PodLog {
    agent: Agent,
    store: Store,
    uid: PodUid,
    container: String,
}

impl log_reader::Source for PodLog {
    type Chunks = Messages<pb::LogChunk>;

    async fn open(&self, request: pb::ReadLogsRequest) -> Result<Self::Chunks, tonic::Status> {
        let answer = self.agent.bulk().await.read_logs(request).await;
        let answer = answer.inspect_err(|status| self.agent.noticed(status))?;
        Ok(bulk::output(&answer))
    }

    fn wanted(&self) -> Result<(), tonic::Status> {
        match self.store.by_uid(&self.uid) {
            Some(_) => Ok(()),
            None => Err(tonic::Status::not_found(
                "the link to the agent was lost, and the pod was deleted before it came back",
            )),
        }
    }

    fn interrupted(&self, status: &tonic::Status) {
        let (uid, container) = (&self.uid, &self.container);
        info!(%uid, container, error = chain(status), "a log stream was interrupted; continuing it where it stopped");
    }
}

impl Backend for KubeletBackend {
    fn pods(&self) -> Vec<Arc<Pod>> {
        self.store.pods().into_iter().map(|view| view.pod).collect()
    }

    fn pod(&self, namespace: &str, name: &str) -> Option<PodView> {
        let view = self.store.find(namespace, name)?;
        let findings = self.store.findings(&view.uid);
        Some(PodView {
            pod: view.pod,
            observed: view.observed,
            rejected: findings.map_or_else(Vec::new, |findings| findings.rejected.clone()),
        })
    }

    fn read_logs(
        &self,
        request: pb::ReadLogsRequest,
    ) -> BoxFuture<'_, Result<ByteStream, tonic::Status>> {
        Box::pin(async move {
            let log = PodLog {
                agent: self.agent.clone(),
                store: self.store.clone(),
                uid: PodUid::try_from(request.uid.as_str())
                    .map_err(|error| tonic::Status::invalid_argument(error.to_string()))?,
                container: request.container.clone(),
            };
            let bytes = log_reader::read(log, request).await?;
            Ok(bytes.boxed() as ByteStream)
        })
    }

    fn exec(
        &self,
        input: mpsc::Receiver<pb::ExecInput>,
    ) -> BoxFuture<'_, Result<ExecStream, tonic::Status>> {
        Box::pin(async move {
            let answer = self.agent.bulk().await.exec(sent(input)).await;
            let answer = answer.inspect_err(|status| self.agent.noticed(status))?;
            Ok(bulk::output(&answer).boxed() as ExecStream)
        })
    }

    fn attach(
        &self,
        input: mpsc::Receiver<pb::ExecInput>,
    ) -> BoxFuture<'_, Result<ExecStream, tonic::Status>> {
        Box::pin(async move {
            self.needs("attach")?;
            let answer = self.agent.bulk().await.attach(sent(input)).await;
            let answer = answer.inspect_err(|status| self.agent.noticed(status))?;
            Ok(bulk::output(&answer).boxed() as ExecStream)
        })
    }

    fn port_forward(
        &self,
        input: mpsc::Receiver<pb::PortForwardInput>,
    ) -> BoxFuture<'_, Result<PortForwardStream, tonic::Status>> {
        Box::pin(async move {
            self.needs("port-forward")?;
            let answer = self.agent.bulk().await.port_forward(sent(input)).await;
            let answer = answer.inspect_err(|status| self.agent.noticed(status))?;
            Ok(bulk::output(&answer).boxed() as PortForwardStream)
        })
    }

    fn stats(&self) -> BoxFuture<'_, Arc<Snapshot>> {
        let capacity = self.capacity.borrow().clone();
        let memory = capacity.map_or(0, |node| node.memory_bytes);
        let memory = u64::try_from(memory).unwrap_or_default();
        Box::pin(self.stats.snapshot(memory))
    }

    fn observed(&self) -> Vec<Arc<pb::PodObserved>> {
        let uids = self.store.observed_uids();
        uids.iter()
            .filter_map(|uid| self.store.observed(uid))
            .collect()
    }

    fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    fn gauges(&self) -> Gauges {
        let mut phases: BTreeMap<String, usize> =
            PHASES.iter().map(|&phase| (phase.to_owned(), 0)).collect();
        for view in self.store.pods() {
            let phase = view.pod.status.as_ref().and_then(|s| s.phase.as_deref());
            *phases
                .entry(phase.unwrap_or("Pending").to_owned())
                .or_default() += 1;
        }
        let (agent, since) = match &*self.link.borrow() {
            Link::Up { info, since } => (Some(Arc::clone(info)), *since),
            Link::Down { since, .. } => (None, *since),
        };
        let capacity = self.capacity.borrow().clone();
        let now = Timestamp::now();
        let ours = self.certificate.borrow().validity;
        let ours = ours.map(|validity| validity.until.as_second());
        let agents = capacity.as_ref().map(|node| node.certificate_until);
        let agents = agents.filter(|until| *until != 0);
        let sides = [("agent", agents), ("kubelet", ours)];
        let left = |(side, until): (_, Option<i64>)| Some((side, until? - now.as_second()));
        let agent_egress = capacity.as_ref().and_then(|node| node.egress.clone());
        let scheduler = capacity.and_then(|node| node.scheduler.clone());
        Gauges {
            phases,
            agent,
            agent_egress,
            link_changed: since.as_second(),
            scheduler: scheduler.map(|one| (one.reachable, age(one.last_round, Timestamp::now()))),
            certificates: sides.into_iter().filter_map(left).collect(),
            streams: 0,
            process: process::own(),
        }
    }

    fn config(&self) -> serde_json::Value {
        self.config.clone()
    }

    fn sync_loop(&self) -> Result<(), String> {
        self.health.check()
    }
}

/// PURE: the time since `at` (Unix nanoseconds); None if it is 0, which means never.
fn age(at: i64, now: Timestamp) -> Option<Duration> {
    let at = (at > 0).then(|| Timestamp::from_nanosecond(i128::from(at)).ok())??;
    // The clock of the login node may be ahead of ours.
    Some(Duration::try_from(now.duration_since(at)).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages() {
        let now = Timestamp::from_second(10).unwrap();
        assert_eq!(age(0, now), None);
        assert_eq!(age(8_500_000_000, now), Some(Duration::from_millis(1500)));
        assert_eq!(age(11_000_000_000, now), Some(Duration::ZERO));
    }
}
