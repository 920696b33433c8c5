//! The configuration of the kubelet: a YAML file, and environment variables, which take precedence.
//!
//! [`settings`] has every setting as it is written, with its default; [`resolve`] makes the effective configuration
//! from them. All mistakes are reported at once before anything starts, each with its file and line, or its variable,
//! and the allowed values.

mod resolve;
pub mod settings;

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use knoc_link::{Carrier, Route, proxy::Via};
use knoc_proto::{
    egress::{AllowList, Range},
    mesh::PodRange,
    settings::{Document, Mistakes},
};

use settings::{PodIpPolicy, Settings};

/// The prefix of our environment variables.
pub const PREFIX: &str = "KNOC_";

/// Variables that have the prefix but are not settings.
const NOT_SETTINGS: &[&str] = &["KNOC_CONFIG", "KNOC_CRASH_AT"];

/// The effective configuration of one kubelet.
#[derive(Clone, Debug)]
pub struct Config {
    /// The agent and the link to it.
    pub agent: AgentConfig,
    /// What pods reach of the cluster; None if they reach nothing.
    pub egress: Option<EgressConfig>,
    /// Who the kubelet is towards the API server.
    pub identity: IdentityConfig,
    /// Where its own keys are stored.
    pub keys: KeysConfig,
    /// How to reach the API server, and who the kubelet is in the leadership Lease.
    pub kubernetes: KubernetesConfig,
    /// Format and level of the log.
    pub log: LogConfig,
    /// The Node object.
    pub node: NodeConfig,
    /// Which Services lead to pods of the node; None if none does.
    pub relay: Option<RelayConfig>,
    /// The kubelet's HTTPS API.
    pub server: ServerConfig,
    /// Every setting with its effective value, for `/configz`. Settings hold no secrets: they name the files that do.
    pub effective: serde_json::Value,
}

/// The link to the agent.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// Which side dials, and where.
    pub way: AgentWay,
    /// CA, certificate and key; None on a unix socket.
    pub credentials: Option<CredentialFiles>,
    /// The site that the agent's certificate must name; None accepts any agent of our CA.
    pub site: Option<String>,
}

/// Which side of the link to the agent dials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AgentWay {
    /// The kubelet dials the agent.
    Dial(Route, Via),
    /// The agent dials this address of the kubelet.
    Accept(SocketAddr),
}

impl AgentWay {
    /// Whether the only address is a unix socket, which takes no certificates.
    pub(super) fn is_unix(&self) -> bool {
        match self {
            Self::Dial(route, _) => matches!(route.carriers(), [Carrier::Unix(_)]),
            Self::Accept(_) => false,
        }
    }
}

/// What pods reach of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EgressConfig {
    /// The Services that they may reach.
    pub allow: AllowList,
    /// The address ranges of Services, if the cluster's API does not have them.
    pub service_ranges: Vec<Range>,
    /// The address ranges of the cluster's pods.
    pub pod_ranges: Vec<Range>,
    /// The address of the cluster's DNS; None for that of `kube-system/kube-dns`.
    pub dns: Option<IpAddr>,
}

/// Which Services of the cluster lead to pods of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelayConfig {
    /// The Services.
    pub allow: AllowList,
    /// The ports of the kubelet for it.
    pub ports: RangeInclusive<u16>,
    /// The address on which the kubelet listens, that of its API.
    pub listen: IpAddr,
    /// The address at which the cluster reaches these ports; None for the node's.
    pub address: Option<IpAddr>,
}

/// The PEM files of one side of a TLS connection.
#[derive(Clone, Debug)]
pub struct CredentialFiles {
    /// The CA of the peer's certificate.
    pub ca: PathBuf,
    /// Our own certificate.
    pub cert: PathBuf,
    /// The key of our own certificate.
    pub key: PathBuf,
}

/// Who the kubelet is towards the API server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IdentityConfig {
    /// The user of the kubeconfig, which is a ServiceAccount.
    ServiceAccount,
    /// `system:node:NAME`; the ServiceAccount does what a node may not do.
    Node {
        /// The kubeconfig that requests the first client certificate; None for the ServiceAccount.
        bootstrap: Option<PathBuf>,
    },
}

/// Where the kubelet's own keys and certificates are stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeysConfig {
    /// In a Secret in the kubelet's namespace.
    Secret(String),
    /// In files in this folder.
    Folder(PathBuf),
}

/// Where the serving certificate comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServingConfig {
    /// From two PEM files, certificate and key.
    Files(PathBuf, PathBuf),
    /// The kubelet signs it itself.
    SelfSigned,
    /// The cluster's signer `kubernetes.io/kubelet-serving` signs it.
    Csr,
}

/// How to reach the API server.
#[derive(Clone, Debug)]
pub struct KubernetesConfig {
    /// A kubeconfig; None for the in-cluster configuration, else $KUBECONFIG.
    pub kubeconfig: Option<PathBuf>,
    /// The namespace of the leadership Lease; None for the client's default namespace.
    pub namespace: Option<String>,
    /// The holder in the leadership Lease; None for the host name.
    pub identity: Option<String>,
}

/// Format and level of the log.
#[derive(Clone, Debug)]
pub struct LogConfig {
    /// Whether lines are JSON instead of text.
    pub json: bool,
    /// The filter of `tracing`, for example `info`.
    pub level: String,
}

/// The Node object.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// The name of the Node.
    pub name: String,
    /// The address that the API server connects to; None to find it from the route to the API server.
    pub internal_ip: Option<IpAddr>,
    /// Labels that the operator adds.
    pub labels: BTreeMap<String, String>,
    /// The most pods that the node accepts.
    pub pods: u32,
    /// Allocatable is the total times this factor.
    pub queue_factor: u32,
    /// Whether the node carries the provider's taint.
    pub taint: bool,
    /// The DNS domain of the cluster.
    pub cluster_domain: String,
    /// What pods have as `status.podIP`.
    pub pod_ip: PodIpPolicy,
    /// From which range pods get addresses of their own, if the Node has no `spec.podCIDR`.
    pub pod_range: Option<PodRange>,
    /// Whether the kubelet listens at these addresses.
    pub pod_listeners: bool,
}

/// The kubelet's HTTPS API.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// The address and port to listen on.
    pub listen: SocketAddr,
    /// Where the serving certificate comes from.
    pub serving: ServingConfig,
    /// The CA file of client certificates; None for the cluster's ConfigMap.
    pub client_ca: Option<PathBuf>,
    /// Whether the node declares that the API server may pass WebSockets on to it.
    pub websockets: bool,
}

impl Config {
    /// Reads all settings: those of the environment, and those of the file with this path and text.
    ///
    /// # Errors
    /// Returns all mistakes.
    pub fn load(
        file: Option<(&Path, &str)>,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, Mistakes> {
        let mut document = match file {
            Some((path, text)) => Document::parse_yaml(text, path)?,
            None => Document::empty("configuration"),
        };
        let ours = environment.into_iter().filter(|(name, _)| {
            name.starts_with(PREFIX)
                && !NOT_SETTINGS.contains(&name.as_str())
                && !is_service_link(name)
        });
        document.overlay(PREFIX, &Settings::keys(), ours);
        let settings = document.read::<Settings>();
        let config = settings.and_then(|settings| resolve::resolve(settings, &mut document));
        document.finish(config)
    }
}

/// Is this a variable that Kubernetes adds for a Service whose name begins with `knoc-`?
fn is_service_link(name: &str) -> bool {
    name.ends_with("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || name.ends_with("_PORT")
        || name.contains("_PORT_")
}

#[cfg(test)]
mod tests;
