//! The only user of the `Agent` client: sets deadlines, and adds the cluster id and the leadership epoch.
//!
//! Two connections lead to the agent. Control carries the controller's calls and the watches, bulk carries logs and
//! exec, so that 100 MB of log never delay an `EnsurePod`, unless the login node allows one session only ([`streams`]). This module never retries: the callers know what a failure
//! means and when to try again.

use std::{
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use knoc_link::bulk::RawClient;
use knoc_proto::{
    ids::PodUid,
    pb::{self, agent_client::AgentClient},
};
use knoc_translate::Grace;
use tokio::time::Instant;
use tonic::transport::Channel;

pub mod renew;
pub mod report;
mod streams;
pub mod watch;

/// The value in `DeletePodRequest` for the pod's own grace period.
const OWN_GRACE: i64 = -1;
/// The deadline of every unary call. The agent answers from memory or after one fsync'd write; staging and `sbatch`
/// happen after the answer.
const CALL_DEADLINE: Duration = Duration::from_secs(20);

/// The largest message in bytes. A pod with its values is a few MiB at most (`ConfigMaps` and Secrets are 1 MiB each).
pub const MESSAGE_LIMIT: usize = knoc_link::MAX_MESSAGE;

/// Does this include the site's capacity? An agent that was just started, or that has not reached Slurm yet, does not
/// know it.
#[must_use]
pub fn tells_capacity(node: &pb::NodeInfo) -> bool {
    node.nodes_total > 0 || node.cpu > 0
}

/// The state of the link to the agent.
#[derive(Clone, Debug)]
pub enum Link {
    /// The snapshot of pods was read, and the watch is running.
    Up {
        /// What the agent said about itself.
        info: Arc<pb::AgentInfo>,
        /// When the link came up.
        since: Timestamp,
    },
    /// There is no link.
    Down {
        /// When the link went down.
        since: Timestamp,
        /// The same as a monotonic time, to measure how long.
        at: Instant,
        /// The last error.
        message: String,
    },
}

impl Link {
    /// The message before the first attempt.
    const NOT_YET: &str = "not connected yet";

    /// The state before the first attempt.
    #[must_use]
    pub fn never() -> Self {
        Self::Down {
            since: Timestamp::now(),
            at: Instant::now(),
            message: Self::NOT_YET.to_owned(),
        }
    }

    /// Is the link up?
    #[must_use]
    pub fn is_up(&self) -> bool {
        matches!(self, Self::Up { .. })
    }

    /// Is there a link to an agent that announces this capability?
    #[must_use]
    pub fn serves(&self, capability: &str) -> bool {
        match self {
            Self::Up { info, .. } => info.capabilities.iter().any(|name| name == capability),
            Self::Down { .. } => false,
        }
    }

    /// How long the link has been down; zero while it is up.
    #[must_use]
    pub fn down_for(&self) -> Duration {
        match self {
            Self::Up { .. } => Duration::ZERO,
            Self::Down { at, .. } => at.elapsed(),
        }
    }

    /// The last error; empty while it is up.
    #[must_use]
    pub fn message(&self) -> &str {
        match self {
            Self::Up { .. } => "",
            Self::Down { message, .. } => message,
        }
    }
}

/// What a pod is sent with, apart from its shape.
#[derive(Clone, Debug, Default)]
pub struct Sent {
    /// Its values.
    pub values: pb::PodValues,
    /// The credentials for its images, as long as they are needed.
    pub pull_credentials: Option<pb::PullCredentials>,
}

/// A handle to the agent; clones share the connections.
#[derive(Clone, Debug)]
pub struct Agent {
    /// Replaced as a whole after the link's certificate was renewed. The lock is held only to clone it.
    channels: Arc<RwLock<Channels>>,
    streams: streams::Streams,
    cluster_id: Arc<str>,
    /// The name of the node that this kubelet leads; empty if it leads none.
    node: Arc<str>,
    leadership: Arc<AtomicI64>,
}

/// The two connections to the agent.
#[derive(Clone, Debug)]
pub struct Channels {
    /// For the controller's calls and the watches.
    pub control: Channel,
    /// For logs, exec and the other streams of bytes.
    pub bulk: Channel,
}

impl Agent {
    /// A handle to the agent over two lazy connections. `cluster_id` is the UID of the namespace `kube-system`.
    #[must_use]
    pub fn new(control: Channel, bulk: Channel, cluster_id: &str) -> Self {
        Self {
            channels: Arc::new(RwLock::new(Channels { control, bulk })),
            streams: streams::Streams::default(),
            cluster_id: cluster_id.into(),
            node: "".into(),
            leadership: Arc::default(),
        }
    }

    /// The handle for the kubelet of this node.
    #[must_use]
    pub fn of_node(self, node: &str) -> Self {
        Self {
            node: node.into(),
            ..self
        }
    }

    /// The handle for connections that are logins, of which the login node may allow only one.
    #[must_use]
    pub fn over_logins(self) -> Self {
        Self {
            streams: streams::Streams::over_logins(),
            ..self
        }
    }

    /// Uses these connections for new requests and streams; those that are running end on the old connections.
    pub fn redial(&self, channels: Channels) {
        *self
            .channels
            .write()
            .unwrap_or_else(PoisonError::into_inner) = channels;
        self.streams.forget();
    }

    /// The same handle over other connections. This one keeps its own.
    fn with(&self, channels: Channels) -> Self {
        Self {
            channels: Arc::new(RwLock::new(channels)),
            ..self.clone()
        }
    }

    fn channels(&self) -> Channels {
        self.channels
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The cluster id that every mutating request names.
    #[must_use]
    pub fn cluster_id(&self) -> &str {
        &self.cluster_id
    }

    /// Sets the leadership epoch (`leaseTransitions`) that every mutating request carries from now on.
    pub fn lead(&self, epoch: i64) {
        self.leadership.store(epoch, Ordering::Release);
    }

    /// The client for streams of bytes, such as logs and exec. The caller sets deadlines, and tells [`Agent::noticed`] if a stream could
    /// not be opened.
    pub async fn bulk(&self) -> AgentClient<RawClient<Channel>> {
        let channels = self.channels();
        let channel = if self.shares_control(&channels).await {
            channels.control
        } else {
            channels.bulk
        };
        AgentClient::new(RawClient::new(channel))
            .max_decoding_message_size(MESSAGE_LIMIT)
            .max_encoding_message_size(MESSAGE_LIMIT)
    }

    /// The client for watches and single calls. The caller sets deadlines.
    #[must_use]
    pub fn control(&self) -> AgentClient<Channel> {
        sized(self.channels().control)
    }

    /// Creates the pod, or updates its spec and values; idempotent by UID.
    pub async fn ensure_pod(
        &self,
        spec: pb::PodSpec,
        sent: Sent,
    ) -> Result<pb::EnsurePodResponse, tonic::Status> {
        let request = pb::EnsurePodRequest {
            leadership_epoch: self.epoch(),
            cluster_id: self.cluster_id.to_string(),
            spec: Some(spec),
            values: Some(sent.values),
            pull_credentials: sent.pull_credentials,
        };
        let answer = self.control().ensure_pod(deadline(request)).await?;
        Ok(answer.into_inner())
    }

    /// Replaces the pod's values.
    pub async fn update_values(&self, uid: &PodUid, sent: Sent) -> Result<(), tonic::Status> {
        let request = pb::UpdateValuesRequest {
            leadership_epoch: self.epoch(),
            cluster_id: self.cluster_id.to_string(),
            uid: uid.to_string(),
            values: Some(sent.values),
            pull_credentials: sent.pull_credentials,
        };
        self.control().update_values(deadline(request)).await?;
        Ok(())
    }

    /// Starts to stop the pod, with its own grace period unless another is given. A shorter grace than before replaces
    /// it, a longer one does not.
    pub async fn delete_pod(
        &self,
        uid: &PodUid,
        grace: Option<Grace>,
        reason: &str,
    ) -> Result<pb::DeletePodResponse, tonic::Status> {
        let request = pb::DeletePodRequest {
            leadership_epoch: self.epoch(),
            cluster_id: self.cluster_id.to_string(),
            uid: uid.to_string(),
            grace_seconds: grace.map_or(OWN_GRACE, Grace::in_seconds),
            reason: reason.to_owned(),
        };
        let answer = self.control().delete_pod(deadline(request)).await?;
        Ok(answer.into_inner())
    }

    /// Deletes a finished pod from the agent's records.
    pub async fn forget_pod(&self, uid: &PodUid) -> Result<(), tonic::Status> {
        let request = pb::ForgetPodRequest {
            leadership_epoch: self.epoch(),
            cluster_id: self.cluster_id.to_string(),
            uid: uid.to_string(),
        };
        self.control().forget_pod(deadline(request)).await?;
        Ok(())
    }

    /// The resource usage of the running pods. The caller sets the deadline. Cancel safe.
    pub async fn stats(&self) -> Result<Vec<pb::PodStats>, tonic::Status> {
        let answer = self
            .bulk()
            .await
            .get_stats(pb::GetStatsRequest::default())
            .await?;
        futures::TryStreamExt::try_collect(answer.into_inner()).await
    }

    /// Exchanges versions, capabilities and identities with the agent.
    pub async fn get_info(&self) -> Result<pb::AgentInfo, tonic::Status> {
        let request = pb::GetInfoRequest {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            capabilities: Vec::new(),
            cluster_id: self.cluster_id.to_string(),
            node_name: self.node.to_string(),
        };
        let answer = self.control().get_info(deadline(request)).await?;
        Ok(answer.into_inner())
    }

    /// Requests a new certificate for our own identity, which is returned as PEM.
    pub async fn renew_certificate(&self, request: Vec<u8>) -> Result<String, tonic::Status> {
        let request = request.into();
        let request = pb::RenewCertificateRequest { request };
        let answer = self.control().renew_certificate(deadline(request)).await?;
        Ok(answer.into_inner().certificate)
    }

    /// Who calls `WatchEgress`.
    #[must_use]
    pub fn egress_caller(&self) -> pb::EgressCaller {
        pb::EgressCaller {
            cluster_id: self.cluster_id.to_string(),
            leadership_epoch: self.epoch(),
            node_name: self.node.to_string(),
        }
    }

    fn epoch(&self) -> i64 {
        self.leadership.load(Ordering::Acquire)
    }
}

/// The client with messages as large as a pod's values may be.
fn sized(channel: Channel) -> AgentClient<Channel> {
    AgentClient::new(channel)
        .max_decoding_message_size(MESSAGE_LIMIT)
        .max_encoding_message_size(MESSAGE_LIMIT)
}

fn deadline<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(CALL_DEADLINE);
    request
}
