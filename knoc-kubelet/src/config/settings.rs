//! Every setting of the kubelet as it is written, with its default. Each default is stated only here: the table in the
//! guide, the chart's values and `/configz` are checked against these types or made from them.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use knoc_link::Addresses;
use knoc_proto::egress::DEFAULT_ALLOW;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, MapAccess, SeqAccess, Visitor},
};
use serde_json::Value;

/// The largest `node.pods`.
pub const MOST_PODS: u32 = 100_000;

/// The largest `node.queueFactor`.
pub const MOST_QUEUE_FACTOR: u32 = 10_000;

/// Every setting. A section or value that is not given has its default.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The agent and the link to it.
    pub agent: Agent,
    /// What pods reach of the cluster.
    pub egress: Egress,
    /// Who the kubelet is towards the API server.
    pub identity: Identity,
    /// Where the kubelet stores its own keys.
    pub keys: Keys,
    /// How to reach the API server, and the leadership Lease.
    pub kubernetes: Kubernetes,
    /// Format and level of the log.
    pub log: Log,
    /// The Node object.
    pub node: Node,
    /// Which Services of the cluster lead to pods of the node.
    pub relay: Relay,
    /// The kubelet's HTTPS API.
    pub server: Server,
}

/// The agent and the link to it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Agent {
    /// `host:port`, `ssh:user@host:port`, `exec:command` or `unix:/path`, or a list that is tried in order; `accept` or
    /// `accept:address:port` if the agent dials out. Required.
    pub address: Option<Addresses>,
    /// PEM file: the CA of the link's certificates.
    pub ca: Option<PathBuf>,
    /// PEM file: our certificate on the link.
    pub cert: Option<PathBuf>,
    /// PEM file: its key.
    pub key: Option<PathBuf>,
    /// The proxy to the agent, `http://host:port`, or `none`; unset: that of `HTTPS_PROXY`, except for `NO_PROXY`.
    pub proxy: Option<String>,
    /// File with `user:password` for that proxy.
    pub proxy_credentials: Option<PathBuf>,
    /// The site that the agent's certificate must name; unset: any agent of our CA.
    pub site: Option<String>,
    /// For `ssh:` addresses: a folder, usually of a mounted Secret, with `ssh-privatekey` and `known_hosts`, and optionally
    /// `remote_user`, `host`, `port`, `proxy_jump` and `ssh-certificate`.
    pub ssh_folder: Option<PathBuf>,
    /// For `ssh:` addresses: the path of `knoc-agent` on the login node; unset: it is looked up in PATH,
    /// `~/.local/bin` and `~/bin`.
    pub ssh_program: Option<String>,
    /// For `ssh:` addresses: whether an agent is started if none runs.
    pub ssh_on_demand: bool,
}

/// What pods reach of the cluster.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Egress {
    /// The Services that pods may reach, a list of `NAMESPACE/SERVICE` in which `*` stands for any characters; `off`: none,
    /// and nothing is watched for it. The site has a list of its own, and a Service has to be in both.
    pub allow: ServiceList,
    /// The address ranges of Services, for clusters whose API has no `ServiceCIDR` (before 1.33), such as `10.96.0.0/12`.
    #[serde(deserialize_with = "list")]
    pub service_ranges: Vec<String>,
    /// The address ranges of the cluster's pods, which are the addresses behind headless Services; unset: pods do not reach
    /// headless Services.
    #[serde(deserialize_with = "list")]
    pub pod_ranges: Vec<String>,
    /// The address of the Service that is the cluster's DNS; unset: that of `kube-system/kube-dns`.
    #[serde(deserialize_with = "ip_address")]
    pub dns: Option<IpAddr>,
}

impl Default for Egress {
    fn default() -> Self {
        Self {
            allow: ServiceList::Listed(DEFAULT_ALLOW.map(str::to_owned).into()),
            service_ranges: Vec::new(),
            pod_ranges: Vec::new(),
            dns: None,
        }
    }
}

/// A list of Services.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServiceList {
    /// None, and nothing is watched for it.
    Off,
    /// Those that these patterns match.
    Listed(Vec<String>),
}

/// Who the kubelet is towards the API server.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Identity {
    /// Whether the kubelet is the user of the kubeconfig or the node.
    pub kind: IdentityKind,
    /// A kubeconfig that requests the node's first client certificate; unset: the `ServiceAccount` requests it.
    pub bootstrap_kubeconfig: Option<PathBuf>,
}

/// The user that the API server sees.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IdentityKind {
    /// The user of the kubeconfig: a `ServiceAccount`.
    #[default]
    ServiceAccount,
    /// `system:node:NAME`, by a client certificate.
    Node,
}

/// Where the kubelet stores its own keys and certificates. At most one of the two is set.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Keys {
    /// A folder, instead of the Secret.
    pub folder: Option<PathBuf>,
    /// A Secret in `kubernetes.namespace`; unset: `knoc-kubelet-NODE-keys`.
    pub secret: Option<String>,
}

/// How to reach the API server, and the leadership Lease.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Kubernetes {
    /// A kubeconfig; unset: in-cluster, else `$KUBECONFIG`.
    pub kubeconfig: Option<PathBuf>,
    /// The namespace of the leadership Lease; unset: the pod's own, else `default`.
    pub namespace: Option<String>,
    /// The holder of the leadership Lease; unset: the host name.
    pub identity: Option<String>,
}

/// Format and level of the log.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// The format of the lines.
    pub format: LogFormat,
    /// The filter of `tracing`, for example `info`.
    pub level: String,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            format: LogFormat::Text,
            level: "info".to_owned(),
        }
    }
}

/// The format of the log's lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One line of text for each message.
    Text,
    /// One JSON object for each message.
    Json,
}

/// The Node object.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Node {
    /// The name of the Node; unset: `knoc-SITE`.
    pub name: Option<String>,
    /// Where the API server reaches our port; unset: the address of this host towards the API server.
    #[serde(rename = "internalIP", deserialize_with = "ip_address")]
    pub internal_ip: Option<IpAddr>,
    /// Labels that are added to the Node: a map, or `a=b,c=d`.
    #[serde(deserialize_with = "labels")]
    pub labels: BTreeMap<String, String>,
    /// The most pods that the node accepts.
    #[serde(deserialize_with = "within::<_, MOST_PODS>")]
    pub pods: u32,
    /// Allocatable is the cluster's total times this factor, since Slurm does the queueing.
    #[serde(deserialize_with = "within::<_, MOST_QUEUE_FACTOR>")]
    pub queue_factor: u32,
    /// Whether the node has the taint `virtual-kubelet.io/provider=knoc:NoSchedule`.
    pub taint: bool,
    /// The DNS domain of the cluster, which the names of pods with a `subdomain` end with.
    pub cluster_domain: String,
    /// What pods have as `status.podIP`.
    #[serde(rename = "podIP")]
    pub pod_ip: PodIpPolicy,
    /// From which range pods get addresses of their own (`podIP: own`), such as `10.200.0.0/16`, if the Node has no
    /// `spec.podCIDR`.
    pub pod_range: Option<String>,
    /// Whether the kubelet listens at the own addresses of pods (`podIP: own`), on the TCP ports that they declare and those to
    /// which Services lead, or on port 80 if nobody names any, so that the cluster reaches them there.
    pub pod_listeners: bool,
}

/// What pods have as `status.podIP`, which Kubernetes' controllers publish as the endpoint of Services.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PodIpPolicy {
    /// Nothing.
    #[default]
    None,
    /// The address of the compute node.
    Node,
    /// An address of the pod's own, at which the pods of its agent reach it.
    Own,
}

impl Default for Node {
    fn default() -> Self {
        Self {
            name: None,
            internal_ip: None,
            labels: BTreeMap::new(),
            pods: 1000,
            queue_factor: 10,
            taint: true,
            cluster_domain: "cluster.local".to_owned(),
            pod_ip: PodIpPolicy::None,
            pod_range: None,
            pod_listeners: false,
        }
    }
}

/// Which Services of the cluster lead to pods of the node, through ports of the kubelet.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Relay {
    /// The Services that lead to pods, a list of `NAMESPACE/SERVICE` in which `*` stands for any characters; `off`: none, and
    /// nothing is watched and written for it.
    pub allow: ServiceList,
    /// The ports of the kubelet for it, `FIRST-LAST`: each port of a pod to which a Service leads takes one.
    pub ports: String,
    /// The address at which the cluster reaches these ports; unset: `node.internalIP`.
    #[serde(deserialize_with = "ip_address")]
    pub address: Option<IpAddr>,
}

impl Default for Relay {
    fn default() -> Self {
        Self {
            allow: ServiceList::Off,
            ports: "11000-12023".to_owned(),
            address: None,
        }
    }
}

/// The kubelet's HTTPS API.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Server {
    /// The address and port to listen on.
    #[serde(deserialize_with = "listen_address")]
    pub listen: SocketAddr,
    /// Where the serving certificate comes from; unset: `files` if `cert` and `key` are given, else `self-signed`.
    pub certificate: Option<CertificateSource>,
    /// PEM file: the serving certificate.
    pub cert: Option<PathBuf>,
    /// PEM file: its key.
    pub key: Option<PathBuf>,
    /// PEM file: the CA of client certificates; unset: the cluster's own, from a `ConfigMap`.
    #[serde(rename = "clientCA")]
    pub client_ca: Option<PathBuf>,
    /// Whether the node declares that API servers of 1.36 or later may pass WebSockets on as they are
    /// (`ExtendWebSocketsToKubelet`).
    pub websockets: bool,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], 10250)),
            certificate: None,
            cert: None,
            key: None,
            client_ca: None,
            websockets: true,
        }
    }
}

/// Where the serving certificate comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CertificateSource {
    /// The kubelet signs it itself.
    SelfSigned,
    /// The cluster's signer `kubernetes.io/kubelet-serving` signs it.
    Csr,
    /// PEM files.
    Files,
}

impl CertificateSource {
    /// The name in the configuration.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::SelfSigned => "self-signed",
            Self::Csr => "csr",
            Self::Files => "files",
        }
    }
}

impl Settings {
    /// The dotted name of every setting.
    #[must_use]
    pub fn keys() -> Vec<String> {
        let defaults = serde_json::to_value(Self::default()).unwrap_or_default();
        let mut keys = Vec::new();
        let sections = defaults.as_object().into_iter().flatten();
        for (section, settings) in sections {
            let names = settings
                .as_object()
                .into_iter()
                .flat_map(serde_json::Map::keys);
            keys.extend(names.map(|name| format!("{section}.{name}")));
        }
        keys
    }

    /// Every setting as JSON; null for one that is neither set nor has a default. Settings hold no secrets: they name
    /// the files that do.
    #[must_use]
    pub fn to_json(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }
}

/// Reads a number from 1 to `MOST`.
fn within<'de, D: Deserializer<'de>, const MOST: u32>(input: D) -> Result<u32, D::Error> {
    struct Within(u32);

    impl Visitor<'_> for Within {
        type Value = u32;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a number from 1 to {}", self.0)
        }

        fn visit_u64<E: de::Error>(self, number: u64) -> Result<u32, E> {
            let small = u32::try_from(number).ok();
            let right = small.filter(|number| (1..=self.0).contains(number));
            right.ok_or_else(|| E::invalid_value(de::Unexpected::Unsigned(number), &self))
        }
    }

    input.deserialize_u32(Within(MOST))
}

impl Serialize for ServiceList {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Off => out.serialize_str(OFF),
            Self::Listed(patterns) => patterns.serialize(out),
        }
    }
}

impl<'de> Deserialize<'de> for ServiceList {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        Ok(match input.deserialize_any(Words)? {
            // YAML reads `off` as false, and a chart passes that on.
            Some(words) if words != [OFF] && words != ["false"] => Self::Listed(words),
            Some(_) | None => Self::Off,
        })
    }
}

/// The word for a list that is not there.
const OFF: &str = "off";

/// Reads a list of words, or words that are separated by commas; `None` for `false`, as which YAML may read `off`.
struct Words;

impl<'de> Visitor<'de> for Words {
    type Value = Option<Vec<String>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list, or words separated by commas")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
        let words = text
            .split(',')
            .map(str::trim)
            .filter(|word| !word.is_empty());
        Ok(Some(words.map(str::to_owned).collect()))
    }

    fn visit_bool<E: de::Error>(self, on: bool) -> Result<Self::Value, E> {
        if on {
            return Err(E::invalid_type(de::Unexpected::Bool(on), &self));
        }
        Ok(None)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
        Vec::deserialize(de::value::SeqAccessDeserializer::new(list)).map(Some)
    }
}

fn list<'de, D: Deserializer<'de>>(input: D) -> Result<Vec<String>, D::Error> {
    let words = input.deserialize_any(Words)?;
    words.ok_or_else(|| de::Error::invalid_type(de::Unexpected::Bool(false), &Words))
}

fn ip_address<'de, D: Deserializer<'de>>(input: D) -> Result<Option<IpAddr>, D::Error> {
    let text = String::deserialize(input)?;
    let address = text.parse().map(Some);
    address.map_err(|_| de::Error::custom(format!("`{text}` is not an IP address")))
}

/// Reads `address:port`, or `:port` for every address.
fn listen_address<'de, D: Deserializer<'de>>(input: D) -> Result<SocketAddr, D::Error> {
    let text = String::deserialize(input)?;
    let full = if text.starts_with(':') {
        format!("0.0.0.0{text}")
    } else {
        text.clone()
    };
    let wrong = || {
        de::Error::custom(format!(
            "`{text}` is not an IP address and a port such as `0.0.0.0:10250`"
        ))
    };
    full.parse().map_err(|_| wrong())
}

/// Reads a map, or `a=b,c=d`.
fn labels<'de, D: Deserializer<'de>>(input: D) -> Result<BTreeMap<String, String>, D::Error> {
    struct Labels;

    impl<'de> Visitor<'de> for Labels {
        type Value = BTreeMap<String, String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map of labels, or `key=value,key=value`")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
            let pairs = text
                .split(',')
                .map(str::trim)
                .filter(|pair| !pair.is_empty());
            let split: Vec<_> = pairs.map(|pair| pair.split_once('=').ok_or(pair)).collect();
            let wrong: Vec<_> = split
                .iter()
                .filter_map(|pair| pair.as_ref().err())
                .collect();
            if !wrong.is_empty() {
                let wrong: Vec<_> = wrong
                    .iter()
                    .map(|pair| format!("`{pair}` is not `key=value`"))
                    .collect();
                return Err(E::custom(wrong.join("; ")));
            }
            let right = split.into_iter().flatten();
            let trimmed =
                right.map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned()));
            Ok(trimmed.collect())
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
            BTreeMap::deserialize(de::value::MapAccessDeserializer::new(map))
        }
    }

    input.deserialize_any(Labels)
}
