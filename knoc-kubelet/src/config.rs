//! The configuration of the kubelet: a YAML file, and environment variables, which go before it.
//!
//! [`settings`] has every setting as it is written, with its default; [`resolve`] makes the configuration in effect of
//! them. All mistakes are reported at once, each with its file and line, or its variable, and the values that are allowed,
//! before anything starts.

mod resolve;
pub mod settings;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use knoc_link::Route;
use knoc_proto::settings::{Document, Mistakes};

use settings::Settings;

/// How the names of our environment variables begin.
pub const PREFIX: &str = "KNOC_";

/// Variables that begin like settings and are none.
const NOT_SETTINGS: &[&str] = &["KNOC_CONFIG", "KNOC_CRASH_AT"];

/// The configuration of one kubelet.
#[derive(Clone, Debug)]
pub struct Config {
    /// The agent and the link to it.
    pub agent: AgentConfig,
    /// Who we are towards the API server.
    pub identity: IdentityConfig,
    /// Where our own keys lie.
    pub keys: KeysConfig,
    /// How to reach the API server, and who we are in the leadership Lease.
    pub kubernetes: KubernetesConfig,
    /// Logging.
    pub log: LogConfig,
    /// The Node object.
    pub node: NodeConfig,
    /// The kubelet's HTTPS API.
    pub server: ServerConfig,
    /// Every setting as it is in effect, for `/configz`. Settings hold no secrets: they name the files that do.
    pub effective: serde_json::Value,
}

/// The link to the agent.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// The addresses, in the order in which they are tried.
    pub route: Route,
    /// CA, certificate and key; none on a unix socket.
    pub credentials: Option<CredentialFiles>,
    /// The site that the agent's certificate must name; none: any agent of our CA.
    pub site: Option<String>,
}

/// Three PEM files.
#[derive(Clone, Debug)]
pub struct CredentialFiles {
    /// The CA of the peer's certificate.
    pub ca: PathBuf,
    /// Our certificate.
    pub cert: PathBuf,
    /// Our key.
    pub key: PathBuf,
}

/// Who we are towards the API server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IdentityConfig {
    /// The user of the kubeconfig: a ServiceAccount.
    ServiceAccount,
    /// `system:node:NAME`; what a node may not do, the ServiceAccount does.
    Node {
        /// Asks for the first client certificate; none: the ServiceAccount.
        bootstrap: Option<PathBuf>,
    },
}

/// Where the kubelet's own keys and certificates lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeysConfig {
    /// A Secret of the kubelet's namespace.
    Secret(String),
    /// A folder.
    Folder(PathBuf),
}

/// Where the serving certificate is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServingConfig {
    /// PEM files: certificate and key.
    Files(PathBuf, PathBuf),
    /// It vouches for itself.
    SelfSigned,
    /// The cluster's signer `kubernetes.io/kubelet-serving`.
    Csr,
}

/// How to reach the API server.
#[derive(Clone, Debug)]
pub struct KubernetesConfig {
    /// A kubeconfig; none: in-cluster, else $KUBECONFIG.
    pub kubeconfig: Option<PathBuf>,
    /// Where the leadership Lease lies; none: the client's default namespace.
    pub namespace: Option<String>,
    /// The holder in the leadership Lease; none: the host name.
    pub identity: Option<String>,
}

/// Logging.
#[derive(Clone, Debug)]
pub struct LogConfig {
    /// JSON lines instead of text.
    pub json: bool,
    /// A tracing filter.
    pub level: String,
}

/// The Node object.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Its name.
    pub name: String,
    /// The address the API server dials; none: found from the route to the API server.
    pub internal_ip: Option<std::net::IpAddr>,
    /// Further labels.
    pub labels: BTreeMap<String, String>,
    /// The most pods.
    pub pods: u32,
    /// allocatable = total × this.
    pub queue_factor: u32,
    /// Does the node carry the provider's taint?
    pub taint: bool,
}

/// The kubelet's HTTPS API.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Where it listens.
    pub listen: SocketAddr,
    /// The serving certificate.
    pub serving: ServingConfig,
    /// CA file of client certificates; none: the ConfigMap of the cluster.
    pub client_ca: Option<PathBuf>,
    /// Does the node declare that WebSockets may come as they are?
    pub websockets: bool,
}

impl Config {
    /// Reads all settings: those of the environment, and those of the file, which lies at the path and has the text.
    ///
    /// # Errors
    /// All mistakes.
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

/// Is this a variable that Kubernetes adds for a Service named `knoc-…`?
fn is_service_link(name: &str) -> bool {
    name.ends_with("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || name.ends_with("_PORT")
        || name.contains("_PORT_")
}

#[cfg(test)]
mod tests;
