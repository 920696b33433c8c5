//! The configuration: a YAML file and the environment, read through one source trait.
//!
//! Every setting stands in [`SETTINGS`] with its default and its environment variable. All mistakes
//! are named at once, each with its place (file and line, or variable) and the values allowed, before
//! anything starts. The environment goes before the file.

mod settings;
mod source;

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, str::FromStr};

use knoc_proto::{ids::SiteName, names};
use serde_json::{Map, Value};

pub use settings::{SETTINGS, Setting};
pub use source::{Environment, Found, Origin, Source, YamlFile};

/// The most characters of a node's name: it is also the value of its label `kubernetes.io/hostname`.
const NODE_NAME: usize = 63;

/// One mistake in the configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{origin}: {what}")]
pub struct Problem {
    /// Where it stands.
    pub origin: Origin,
    /// What is wrong and what would be right.
    pub what: String,
}

/// All mistakes of a configuration.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
pub struct InvalidConfig(pub Vec<Problem>);

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
    /// `host:port`, `tcp:host:port` or `unix:/path`.
    pub address: String,
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
    /// Reads all settings; the first source that has one wins.
    pub fn load(sources: &[&dyn Source]) -> Result<Self, InvalidConfig> {
        let mut reader = Reader {
            sources,
            problems: Vec::new(),
        };
        for source in sources {
            reader.problems.extend(source.problems());
        }
        let config = reader.config();
        if reader.problems.is_empty()
            && let Some(config) = config
        {
            return Ok(config);
        }
        Err(InvalidConfig(reader.problems))
    }
}

struct Reader<'a> {
    sources: &'a [&'a dyn Source],
    problems: Vec<Problem>,
}

impl Reader<'_> {
    fn config(&mut self) -> Option<Config> {
        let agent = self.agent();
        let kubernetes = KubernetesConfig {
            kubeconfig: self.path("kubernetes.kubeconfig"),
            namespace: self.text("kubernetes.namespace"),
            identity: self.text("kubernetes.identity"),
        };
        let json = self.one_of("log.format", &["text", "json"]).as_deref() == Some("json");
        let level = self.text("log.level").unwrap_or_else(|| "info".to_owned());
        let node = self.node(agent.as_ref().and_then(|agent| agent.site.as_deref()));
        let server = self.server();
        let identity = self.identity();
        let keys = self.keys(node.as_ref().map_or("", |node| node.name.as_str()));
        Some(Config {
            agent: agent?,
            identity,
            keys,
            kubernetes,
            log: LogConfig { json, level },
            node: node?,
            server: server?,
            effective: self.effective(),
        })
    }

    /// Each setting's text, or its default in words; one that is neither set nor has a default is null.
    fn effective(&self) -> Value {
        let mut root = Value::Object(Map::new());
        for setting in SETTINGS {
            let default = Some(setting.default.to_owned()).filter(|text| !text.is_empty());
            let text = self.text(setting.key).or(default);
            let mut place = &mut root;
            for part in setting.key.split('.') {
                place = &mut place[part];
            }
            *place = text.into();
        }
        root
    }

    fn agent(&mut self) -> Option<AgentConfig> {
        let address = self.required("agent.address");
        let site = self
            .parse::<SiteName>("agent.site", "a DNS label of at most 58 characters")
            .map(String::from);
        let files = [
            self.path("agent.ca"),
            self.path("agent.cert"),
            self.path("agent.key"),
        ];
        let unix = address
            .as_deref()
            .is_some_and(|address| address.starts_with("unix:"));
        let credentials = match files {
            [Some(ca), Some(cert), Some(key)] => Some(CredentialFiles { ca, cert, key }),
            [None, None, None] if unix => None,
            _ => {
                self.missing(
                    "agent.ca, agent.cert and agent.key",
                    "all three are needed, save for a `unix:` address",
                );
                return None;
            }
        };
        Some(AgentConfig {
            address: address?,
            credentials,
            site,
        })
    }

    fn node(&mut self, site: Option<&str>) -> Option<NodeConfig> {
        let name = self
            .text("node.name")
            .or_else(|| site.map(|site| format!("knoc-{site}")));
        match &name {
            None => self.missing("node.name", "set it, or agent.site, from which it follows"),
            Some(name) if names::dns_subdomain(name).is_err() || name.len() > NODE_NAME => {
                let allowed = format!(
                    "a node's name: lower-case letters, digits, `-` and `.`, at most {NODE_NAME} characters"
                );
                self.wrong("node.name", name, &allowed);
            }
            Some(_) => {}
        }
        let internal_ip = self.parse("node.internalIP", "an IP address");
        let pods = self.number("node.pods", 1, 100_000);
        let queue_factor = self.number("node.queueFactor", 1, 10_000);
        let taint = self.one_of("node.taint", &["true", "false"]).as_deref() != Some("false");
        let labels = self.labels();
        Some(NodeConfig {
            name: name?,
            internal_ip,
            labels,
            pods: pods.unwrap_or(1000),
            queue_factor: queue_factor.unwrap_or(10),
            taint,
        })
    }

    fn server(&mut self) -> Option<ServerConfig> {
        let listen = match self.text("server.listen") {
            None => Some(SocketAddr::from(([0, 0, 0, 0], 10250))),
            Some(text) if text.starts_with(':') => {
                self.parsed("server.listen", &format!("0.0.0.0{text}"), "address:port")
            }
            Some(text) => self.parsed("server.listen", &text, "address:port"),
        };
        let serving = self.serving();
        let client_ca = self.path("server.clientCA");
        let websockets = self.one_of("server.websockets", &["true", "false"]);
        Some(ServerConfig {
            listen: listen?,
            serving: serving?,
            client_ca,
            websockets: websockets.as_deref() != Some("false"),
        })
    }

    fn serving(&mut self) -> Option<ServingConfig> {
        let files = (self.path("server.cert"), self.path("server.key"));
        let source = self.one_of("server.certificate", &["self-signed", "csr", "files"]);
        match (source.as_deref(), files) {
            (Some("files") | None, (Some(cert), Some(key))) => {
                Some(ServingConfig::Files(cert, key))
            }
            (Some("csr"), (None, None)) => Some(ServingConfig::Csr),
            (Some("self-signed") | None, (None, None)) => Some(ServingConfig::SelfSigned),
            (Some("files"), (None, None)) => {
                self.missing(
                    "server.cert and server.key",
                    "server.certificate is `files`",
                );
                None
            }
            (_, (Some(_), Some(_))) => {
                let allowed = "`files`, which server.cert and server.key belong to";
                self.wrong("server.certificate", &source.unwrap_or_default(), allowed);
                None
            }
            (_, (Some(_), None) | (None, Some(_))) => {
                self.missing("server.cert and server.key", "both or neither");
                None
            }
            (Some(_), (None, None)) => None,
        }
    }

    fn identity(&mut self) -> IdentityConfig {
        let bootstrap = self.path("identity.bootstrapKubeconfig");
        let kind = self.one_of("identity.kind", &["serviceaccount", "node"]);
        if kind.as_deref() == Some("node") {
            return IdentityConfig::Node { bootstrap };
        }
        if let Some(path) = bootstrap {
            let allowed = "of any use unless identity.kind is `node`";
            let path = path.display().to_string();
            self.wrong("identity.bootstrapKubeconfig", &path, allowed);
        }
        IdentityConfig::ServiceAccount
    }

    fn keys(&mut self, node: &str) -> KeysConfig {
        let secret = self.text("keys.secret");
        match (self.path("keys.folder"), secret) {
            (Some(folder), Some(_)) => {
                let text = folder.display().to_string();
                self.wrong("keys.folder", &text, "possible together with keys.secret");
                KeysConfig::Folder(folder)
            }
            (Some(folder), None) => KeysConfig::Folder(folder),
            (None, Some(secret)) => KeysConfig::Secret(secret),
            (None, None) => KeysConfig::Secret(format!("knoc-kubelet-{node}-keys")),
        }
    }

    fn labels(&mut self) -> BTreeMap<String, String> {
        let mut labels = BTreeMap::new();
        let Some(found) = self.get("node.labels") else {
            return labels;
        };
        for pair in found
            .text
            .split(',')
            .map(str::trim)
            .filter(|pair| !pair.is_empty())
        {
            let label = match pair.split_once('=') {
                Some((key, value)) => label(key.trim(), value.trim()),
                None => Err(format!("`{pair}` is not `key=value`")),
            };
            match label {
                Ok((key, value)) => drop(labels.insert(key, value)),
                Err(why) => self.problems.push(Problem {
                    origin: found.origin.clone(),
                    what: format!("node.labels: {why}"),
                }),
            }
        }
        labels
    }

    fn get(&self, key: &str) -> Option<Found> {
        self.sources
            .iter()
            .find_map(|source| source.get(key))
            .filter(|found| !found.text.is_empty())
    }

    fn text(&self, key: &str) -> Option<String> {
        self.get(key).map(|found| found.text)
    }

    fn path(&self, key: &str) -> Option<PathBuf> {
        self.text(key).map(PathBuf::from)
    }

    fn required(&mut self, key: &str) -> Option<String> {
        let found = self.text(key);
        if found.is_none() {
            self.missing(key, "it has no default");
        }
        found
    }

    fn parse<T: FromStr>(&mut self, key: &str, allowed: &str) -> Option<T> {
        let text = self.text(key)?;
        self.parsed(key, &text, allowed)
    }

    fn parsed<T: FromStr>(&mut self, key: &str, text: &str, allowed: &str) -> Option<T> {
        let parsed = text.parse().ok();
        if parsed.is_none() {
            self.wrong(key, text, allowed);
        }
        parsed
    }

    fn number(&mut self, key: &str, least: u32, most: u32) -> Option<u32> {
        let text = self.text(key)?;
        let number = text
            .parse()
            .ok()
            .filter(|number| (least..=most).contains(number));
        if number.is_none() {
            self.wrong(key, &text, &format!("a number from {least} to {most}"));
        }
        number
    }

    fn one_of(&mut self, key: &str, allowed: &[&str]) -> Option<String> {
        let text = self.text(key)?;
        if allowed.contains(&text.as_str()) {
            return Some(text);
        }
        self.wrong(key, &text, &format!("one of: {}", allowed.join(", ")));
        None
    }

    fn wrong(&mut self, key: &str, text: &str, allowed: &str) {
        let origin = self.get(key).map_or(Origin::Nowhere, |found| found.origin);
        self.problems.push(Problem {
            origin,
            what: format!("{key}: `{text}` is not {allowed}"),
        });
    }

    fn missing(&mut self, key: &str, hint: &str) {
        let variable = SETTINGS
            .iter()
            .find(|setting| setting.key == key)
            .map_or(String::new(), |setting| {
                format!(" (or {})", setting.variable)
            });
        self.problems.push(Problem {
            origin: Origin::Nowhere,
            what: format!("{key}{variable} is missing: {hint}"),
        });
    }
}

/// A label that the API server takes.
fn label(key: &str, value: &str) -> Result<(String, String), String> {
    names::qualified_name(key).map_err(|why| format!("the key `{key}`: {why}"))?;
    names::label_value(value).map_err(|why| format!("the value `{value}` of {key}: {why}"))?;
    Ok((key.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests;
