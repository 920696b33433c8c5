//! The configuration: a YAML file and the environment, read through one source trait.
//!
//! Every setting stands in [`SETTINGS`] with its default and its environment variable. All mistakes
//! are named at once, each with its place (file and line, or variable) and the values allowed, before
//! anything starts. The environment goes before the file.

mod source;

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, str::FromStr};

use serde_json::{Map, Value};

pub use source::{Environment, Found, Origin, Source, YamlFile};

/// One setting.
#[derive(Debug)]
pub struct Setting {
    /// The path in the YAML file.
    pub key: &'static str,
    /// The environment variable.
    pub variable: &'static str,
    /// The default, in words where it is computed; empty where there is none.
    pub default: &'static str,
    /// What it is and which values it takes.
    pub help: &'static str,
}

const fn setting(
    key: &'static str,
    variable: &'static str,
    default: &'static str,
    help: &'static str,
) -> Setting {
    Setting {
        key,
        variable,
        default,
        help,
    }
}

/// Every setting there is.
pub const SETTINGS: &[Setting] = &[
    setting(
        "agent.address",
        "KNOC_AGENT_ADDRESS",
        "",
        "the agent: `host:port`, `tcp:host:port` or `unix:/path`",
    ),
    setting(
        "agent.ca",
        "KNOC_AGENT_CA",
        "",
        "PEM file: the CA of the link's certificates",
    ),
    setting(
        "agent.cert",
        "KNOC_AGENT_CERT",
        "",
        "PEM file: our certificate on the link",
    ),
    setting("agent.key", "KNOC_AGENT_KEY", "", "PEM file: its key"),
    setting(
        "agent.site",
        "KNOC_AGENT_SITE",
        "",
        "the agent's site name: its certificate must say `spiffe://knoc/agent/<site>`",
    ),
    setting(
        "kubernetes.kubeconfig",
        "KNOC_KUBERNETES_KUBECONFIG",
        "in-cluster, else $KUBECONFIG",
        "path of a kubeconfig",
    ),
    setting(
        "kubernetes.namespace",
        "KNOC_KUBERNETES_NAMESPACE",
        "the pod's own, else default",
        "namespace of the leadership Lease",
    ),
    setting(
        "kubernetes.identity",
        "KNOC_KUBERNETES_IDENTITY",
        "the host name",
        "holder of the leadership Lease",
    ),
    setting("log.format", "KNOC_LOG_FORMAT", "text", "`text` or `json`"),
    setting(
        "log.level",
        "KNOC_LOG_LEVEL",
        "info",
        "a tracing filter, such as `info` or `knoc_kubelet=debug,info`",
    ),
    setting(
        "node.internalIP",
        "KNOC_NODE_INTERNAL_IP",
        "the address towards the API server",
        "where the API server reaches our port",
    ),
    setting(
        "node.labels",
        "KNOC_NODE_LABELS",
        "",
        "further labels: a map, or `a=b,c=d`",
    ),
    setting(
        "node.name",
        "KNOC_NODE_NAME",
        "knoc-<site>",
        "name of the virtual node",
    ),
    setting(
        "node.pods",
        "KNOC_NODE_PODS",
        "1000",
        "how many pods the node takes, 1 to 100000",
    ),
    setting(
        "node.queueFactor",
        "KNOC_NODE_QUEUE_FACTOR",
        "10",
        "allocatable = total × this, 1 to 10000: Slurm owns the queue",
    ),
    setting(
        "node.taint",
        "KNOC_NODE_TAINT",
        "true",
        "`true` or `false`: the taint virtual-kubelet.io/provider=knoc:NoSchedule",
    ),
    setting(
        "server.cert",
        "KNOC_SERVER_CERT",
        "",
        "PEM file: the serving certificate of the kubelet API",
    ),
    setting(
        "server.clientCA",
        "KNOC_SERVER_CLIENT_CA",
        "ConfigMap kube-system/extension-apiserver-authentication",
        "PEM file: the CA of client certificates",
    ),
    setting(
        "server.key",
        "KNOC_SERVER_KEY",
        "",
        "PEM file: the key of the serving certificate",
    ),
    setting(
        "server.listen",
        "KNOC_SERVER_LISTEN",
        "0.0.0.0:10250",
        "address and port of the kubelet API",
    ),
];

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
    /// Serving certificate and key; none: the API is not served, and the node says so.
    pub cert: Option<(PathBuf, PathBuf)>,
    /// CA file of client certificates; none: the ConfigMap of the cluster.
    pub client_ca: Option<PathBuf>,
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
        Some(Config {
            agent: agent?,
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
        let site = self.text("agent.site");
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
        if name.is_none() {
            self.missing("node.name", "set it, or agent.site, from which it follows");
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
        let cert = match (self.path("server.cert"), self.path("server.key")) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            _ => {
                self.missing("server.cert and server.key", "both or neither");
                None
            }
        };
        let client_ca = self.path("server.clientCA");
        Some(ServerConfig {
            listen: listen?,
            cert,
            client_ca,
        })
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
            match pair.split_once('=') {
                Some((key, value)) => {
                    labels.insert(key.trim().to_owned(), value.trim().to_owned());
                }
                None => self.problems.push(Problem {
                    origin: found.origin.clone(),
                    what: format!("node.labels: `{pair}` is not `key=value`"),
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

#[cfg(test)]
mod tests;
