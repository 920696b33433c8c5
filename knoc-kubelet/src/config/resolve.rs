//! PURE: from the settings as they are written to the effective configuration. Settings that are missing or contradict
//! each other are noted as mistakes in the document from which the settings were read.

use std::{
    fmt::Display,
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4},
    ops::RangeInclusive,
};

use knoc_link::{
    Addresses, Carrier, Route,
    carrier::ssh::{self, Login},
    proxy::{InvalidProxy, Via},
};
use knoc_proto::{
    egress::{AllowList, Range},
    ids::SiteName,
    mesh::PodRange,
    names,
    settings::Document,
};

use super::{
    AgentConfig, AgentWay, Config, CredentialFiles, EgressConfig, IdentityConfig, KeysConfig,
    KubernetesConfig, LogConfig, NodeConfig, RelayConfig, ServerConfig, ServingConfig,
    settings::{CertificateSource, IdentityKind, LogFormat, PodIpPolicy, ServiceList, Settings},
};

/// The address of the agent if the agent dials; an address to listen on may follow.
const ACCEPT: &str = "accept";

/// Where the kubelet listens for its agent by default.
const ACCEPT_AT: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 10350));

/// The longest name of a node, which is also the value of its label `kubernetes.io/hostname`.
const NODE_NAME: usize = 63;

/// The effective configuration; `None` if a required setting is missing or wrong, which is noted in the document.
pub(super) fn resolve(mut settings: Settings, document: &mut Document) -> Option<Config> {
    let name = node_name(&settings, document);
    settings.node.name.clone_from(&name);
    let mut resolver = Resolver {
        settings: &settings,
        document,
    };
    let agent = resolver.agent();
    let egress = resolver.egress();
    let node = resolver.node();
    let relay = resolver.relay(agent.as_ref());
    let server = resolver.server();
    let identity = resolver.identity();
    let keys = resolver.keys(name.as_deref().unwrap_or_default());
    let kubernetes = settings.kubernetes.clone();
    let log = settings.log.clone();
    if let KeysConfig::Secret(secret) = &keys {
        settings.keys.secret = Some(secret.clone());
    }
    Some(Config {
        agent: agent?,
        egress,
        identity,
        keys,
        kubernetes: KubernetesConfig {
            kubeconfig: kubernetes.kubeconfig,
            namespace: kubernetes.namespace,
            identity: kubernetes.identity,
        },
        log: LogConfig {
            json: log.format == LogFormat::Json,
            level: log.level,
        },
        node: node?,
        relay,
        server: server?,
        effective: settings.to_json(),
    })
}

fn node_name(settings: &Settings, document: &mut Document) -> Option<String> {
    let of_site = || {
        settings
            .agent
            .site
            .as_ref()
            .map(|site| format!("knoc-{site}"))
    };
    let name = settings.node.name.clone().or_else(of_site);
    match &name {
        None => document.wrong(
            &["node", "name"],
            "is missing: set it, or set agent.site to get the name `knoc-SITE`",
        ),
        Some(name) if names::dns_subdomain(name).is_err() || name.len() > NODE_NAME => {
            let what = format!(
                "`{name}` is not a node's name: lower-case letters, digits, `-` and `.`, at most {NODE_NAME} characters"
            );
            document.wrong(&["node", "name"], what);
        }
        Some(_) => {}
    }
    name
}

/// The most ports for relayed connections: each is a listener.
const MOST_RELAYED: usize = 4096;
/// The first port that needs no rights.
const UNPRIVILEGED: u16 = 1024;

/// The most ranges of Services, and of pods; both together are what an agent accepts.
const MOST_RANGES: usize = knoc_proto::egress::MAX_RANGES / 2;

struct Resolver<'a> {
    settings: &'a Settings,
    document: &'a mut Document,
}

impl Resolver<'_> {
    fn wrong(&mut self, key: &str, what: impl Display) {
        let names: Vec<_> = key.split('.').collect();
        self.document.wrong(&names, what);
    }

    fn agent(&mut self) -> Option<AgentConfig> {
        let agent = &self.settings.agent;
        if let Some(site) = &agent.site
            && SiteName::try_from(site.as_str()).is_err()
        {
            let what = format!("`{site}` is not a DNS label of at most 58 characters");
            self.wrong("agent.site", what);
        }
        let way = self.way()?;
        let agent = &self.settings.agent;
        let credentials = match (&agent.ca, &agent.cert, &agent.key) {
            (Some(ca), Some(cert), Some(key)) => Some(CredentialFiles {
                ca: ca.clone(),
                cert: cert.clone(),
                key: key.clone(),
            }),
            (None, None, None) if way.is_unix() => None,
            (ca, cert, key) => {
                let files = [
                    ("agent.ca", ca.is_none()),
                    ("agent.cert", cert.is_none()),
                    ("agent.key", key.is_none()),
                ];
                for (file, _) in files.iter().filter(|(_, missing)| *missing) {
                    let what = "is missing: agent.ca, agent.cert and agent.key are all needed, except for a `unix:` address";
                    self.wrong(file, what);
                }
                return None;
            }
        };
        Some(AgentConfig {
            way,
            credentials,
            site: agent.site.clone(),
        })
    }

    /// The carriers of `agent.address`, with what the other settings say about logins.
    fn carriers(&mut self, addresses: &Addresses) -> Option<Vec<Carrier>> {
        let agent = &self.settings.agent;
        let carriers = match addresses.carriers() {
            Ok(carriers) => carriers,
            Err(error) => {
                self.wrong("agent.address", error);
                return None;
            }
        };
        let over_ssh = carriers.iter().any(|one| matches!(one, Carrier::Ssh(_)));
        if !over_ssh {
            self.no_login();
        }
        if over_ssh && agent.ssh_folder.is_none() {
            let what = "is missing: an `ssh:` address needs a folder with `ssh-privatekey` and `known_hosts`, usually of a \
                        mounted Secret";
            self.wrong("agent.sshFolder", what);
        }
        let program = agent.ssh_program.as_deref();
        if program.is_some_and(|text| !ssh::is_program(text)) {
            let what = "is not a path of letters, digits and `_./+-`, which may begin with `~/`";
            self.wrong("agent.sshProgram", what);
        }
        let login = Login {
            folder: agent.ssh_folder.clone(),
            program: agent.ssh_program.clone(),
            on_demand: agent.ssh_on_demand,
        };
        let with_login = carriers.into_iter();
        Some(
            with_login
                .map(|one| one.with_login(login.clone()))
                .collect(),
        )
    }

    /// No address is reached over SSH: the settings for logins would have no effect.
    fn no_login(&mut self) {
        let agent = &self.settings.agent;
        let given = [
            ("agent.sshFolder", agent.ssh_folder.is_some()),
            ("agent.sshProgram", agent.ssh_program.is_some()),
            ("agent.sshOnDemand", agent.ssh_on_demand),
        ];
        for (key, _) in given.iter().filter(|(_, given)| *given) {
            self.wrong(key, "belongs to an `ssh:` address, and there is none");
        }
    }

    /// Which side dials, and where.
    fn way(&mut self) -> Option<AgentWay> {
        let agent = &self.settings.agent;
        let credentials = agent.proxy_credentials.as_deref();
        let via = Via::of_settings(agent.proxy.as_deref(), credentials);
        let Some(addresses) = agent.address.clone() else {
            self.wrong(
                "agent.address",
                "is missing and has no default: set it to `host:port`, `ssh:user@host`, `exec:command`, `unix:/path`, or `accept` if the \
                 agent dials out",
            );
            return None;
        };
        let via = match via {
            Ok(via) => via,
            Err(error @ InvalidProxy::NeedlessCredentials) => {
                self.wrong("agent.proxyCredentials", error);
                return None;
            }
            Err(error) => {
                self.wrong("agent.proxy", error);
                return None;
            }
        };
        if let Some(address) = addresses.only()
            && let Some(listen) = address.strip_prefix(ACCEPT)
            // A host may have a name that begins like this.
            && (listen.is_empty() || listen.starts_with(':'))
        {
            return self.accept(address, listen);
        }
        let carriers = self.carriers(&addresses)?;
        let unix = carriers.iter().any(|one| matches!(one, Carrier::Unix(_)));
        if unix && carriers.len() > 1 {
            let what = "a `unix:` address is the only one: it takes no certificate, and the others need one";
            self.wrong("agent.address", what);
            return None;
        }
        let proxied = carriers.iter().any(|one| one.address().is_some());
        if self.settings.agent.proxy.is_some() && !proxied {
            self.wrong(
                "agent.proxy",
                "does not lead to any address of agent.address",
            );
            return None;
        }
        Some(AgentWay::Dial(Route::new(carriers)?, via))
    }

    /// The agent dials. `listen` is what follows the word `accept` in `address`.
    fn accept(&mut self, address: &str, listen: &str) -> Option<AgentWay> {
        if self.settings.agent.site.is_none() {
            let what =
                "is missing: with `agent.address: accept` it decides which agent is expected";
            self.wrong("agent.site", what);
        }
        if self.settings.agent.proxy.is_some() {
            let what = "is of no use with `agent.address: accept`: the agent dials, and its site file names its proxy";
            self.wrong("agent.proxy", what);
        }
        self.no_login();
        if listen.is_empty() {
            return Some(AgentWay::Accept(ACCEPT_AT));
        }
        let listen = listen.strip_prefix(':').and_then(|text| text.parse().ok());
        if listen.is_none() {
            let what = format!("`{address}` is not `accept`, or like `accept:0.0.0.0:10350`");
            self.wrong("agent.address", what);
        }
        listen.map(AgentWay::Accept)
    }

    fn egress(&mut self) -> Option<EgressConfig> {
        let egress = &self.settings.egress;
        let service_ranges = self.ranges("egress.serviceRanges", &egress.service_ranges);
        let pod_ranges = self.ranges("egress.podRanges", &egress.pod_ranges);
        let ServiceList::Listed(patterns) = &egress.allow else {
            return None;
        };
        let allow = AllowList::parse(patterns);
        let allow = allow.map_err(|wrong| self.wrong("egress.allow", wrong.join("; ")));
        Some(EgressConfig {
            allow: allow.ok()?,
            service_ranges,
            pod_ranges,
            dns: egress.dns,
        })
    }

    fn ranges(&mut self, key: &str, texts: &[String]) -> Vec<Range> {
        if texts.len() > MOST_RANGES {
            let what = format!("has {} entries; the limit is {MOST_RANGES}", texts.len());
            self.wrong(key, what);
        }
        let mut ranges = Vec::new();
        for text in texts.iter().take(MOST_RANGES) {
            match text.parse() {
                Ok(range) => ranges.push(range),
                Err(error) => self.wrong(key, error),
            }
        }
        ranges
    }

    fn relay(&mut self, agent: Option<&AgentConfig>) -> Option<RelayConfig> {
        let relay = &self.settings.relay;
        let ServiceList::Listed(patterns) = &relay.allow else {
            return None;
        };
        let allow = AllowList::parse(patterns);
        let address = relay.address;
        if self.settings.node.pod_ip != PodIpPolicy::None {
            let what = "needs `node.podIP: none`: otherwise Kubernetes' own controllers publish the pods' addresses as endpoints, too; set \
                        node.podIP to `none`, or relay.allow to `off` (with `own`, node.podListeners lets Services lead to pods)";
            self.wrong("relay.allow", what);
        }
        let listens = self.settings.server.listen.ip();
        // The API server rejects EndpointSlices with such addresses.
        let is_of_no_host = |address: &IpAddr| {
            let link_local = match address {
                IpAddr::V4(address) => address.is_link_local() || address.is_broadcast(),
                IpAddr::V6(address) => address.is_unicast_link_local(),
            };
            let nobody = address.is_unspecified() || address.is_multicast();
            nobody || link_local || address.is_loopback()
        };
        if let Some(address) = address.filter(is_of_no_host) {
            let what = format!(
                "`{address}` cannot be the address of an endpoint: set it to one at which the cluster's nodes reach the kubelet"
            );
            self.wrong("relay.address", what);
        } else if let Some(address) = address.filter(|it| it.is_ipv6() && listens.is_ipv4()) {
            let what = format!(
                "`{address}` is an IPv6 address, and the kubelet listens on IPv4 only: set server.listen to `[::]:PORT`, or relay.address to \
                 an IPv4 address"
            );
            self.wrong("relay.address", what);
        }
        let allow = allow.map_err(|wrong| self.wrong("relay.allow", wrong.join("; ")));
        let ports = self.relayed_ports(agent);
        Some(RelayConfig {
            allow: allow.ok()?,
            ports: ports?,
            listen: listens,
            address,
        })
    }

    /// The ports for relayed connections, none of which another listener of the kubelet has.
    fn relayed_ports(&mut self, agent: Option<&AgentConfig>) -> Option<RangeInclusive<u16>> {
        let text = &self.settings.relay.ports;
        let parsed = text.split_once('-').and_then(|(first, last)| {
            let first: u16 = first.trim().parse().ok()?;
            let last: u16 = last.trim().parse().ok()?;
            Some(first..=last)
        });
        let is_right = |ports: &RangeInclusive<u16>| {
            *ports.start() >= UNPRIVILEGED && (1..=MOST_RELAYED).contains(&ports.len())
        };
        let Some(ports) = parsed.filter(is_right) else {
            let what = format!(
                "`{text}` is not a range of ports such as `11000-12023`, from {UNPRIVILEGED} on and of at most {MOST_RELAYED} ports"
            );
            self.wrong("relay.ports", what);
            return None;
        };
        let accepts = agent.and_then(|agent| match &agent.way {
            AgentWay::Accept(listen) => Some(("agent.address", listen.port())),
            AgentWay::Dial(..) => None,
        });
        let serves = Some(("server.listen", self.settings.server.listen.port()));
        for (key, port) in serves.into_iter().chain(accepts) {
            if ports.contains(&port) {
                let what = format!(
                    "contains port {port}, on which the kubelet listens already ({key}): choose other ports"
                );
                self.wrong("relay.ports", what);
            }
        }
        Some(ports)
    }

    fn node(&mut self) -> Option<NodeConfig> {
        let node = &self.settings.node;
        for (key, value) in &node.labels {
            if let Err(why) = names::qualified_name(key) {
                self.wrong("node.labels", format!("the key `{key}`: {why}"));
            } else if let Err(why) = names::label_value(value) {
                let what = format!("the value `{value}` of {key}: {why}");
                self.wrong("node.labels", what);
            }
        }
        if let Err(why) = names::dns_subdomain(&node.cluster_domain) {
            let what = format!("`{}`: {why}", node.cluster_domain);
            self.wrong("node.clusterDomain", what);
        }
        let pod_range = self.pod_range();
        if node.pod_listeners && node.pod_ip != PodIpPolicy::Own {
            let what = "needs `node.podIP: own`: other pods have no address of their own";
            self.wrong("node.podListeners", what);
        }
        Some(NodeConfig {
            name: node.name.clone()?,
            internal_ip: node.internal_ip,
            labels: node.labels.clone(),
            pods: node.pods,
            queue_factor: node.queue_factor,
            taint: node.taint,
            cluster_domain: node.cluster_domain.clone(),
            pod_ip: node.pod_ip,
            pod_range,
            pod_listeners: node.pod_listeners,
        })
    }

    /// The range of the pods' own addresses, if there is one and it is right.
    fn pod_range(&mut self) -> Option<PodRange> {
        let node = &self.settings.node;
        let range = node.pod_range.as_ref()?.parse::<PodRange>();
        if node.pod_ip != PodIpPolicy::Own {
            let what = "is of use with `node.podIP: own` only";
            self.wrong("node.podRange", what);
        }
        range
            .map_err(|error| self.wrong("node.podRange", error))
            .ok()
    }

    fn server(&mut self) -> Option<ServerConfig> {
        let serving = self.serving();
        let server = &self.settings.server;
        Some(ServerConfig {
            listen: server.listen,
            serving: serving?,
            client_ca: server.client_ca.clone(),
            websockets: server.websockets,
        })
    }

    fn serving(&mut self) -> Option<ServingConfig> {
        use CertificateSource::{Csr, Files, SelfSigned};
        let server = &self.settings.server;
        match (server.certificate, &server.cert, &server.key) {
            (Some(Files) | None, Some(cert), Some(key)) => {
                Some(ServingConfig::Files(cert.clone(), key.clone()))
            }
            (Some(Csr), None, None) => Some(ServingConfig::Csr),
            (Some(SelfSigned) | None, None, None) => Some(ServingConfig::SelfSigned),
            (Some(Files), None, None) => {
                let what = "is `files`, but server.cert and server.key are missing";
                self.wrong("server.certificate", what);
                None
            }
            (Some(source), Some(_), Some(_)) => {
                let what = format!(
                    "is `{}`, but server.cert and server.key need `files`",
                    source.name()
                );
                self.wrong("server.certificate", what);
                None
            }
            (_, None, Some(_)) => {
                let what = "is missing: set both server.cert and server.key, or neither";
                self.wrong("server.cert", what);
                None
            }
            (_, Some(_), None) => {
                let what = "is missing: set both server.cert and server.key, or neither";
                self.wrong("server.key", what);
                None
            }
        }
    }

    fn identity(&mut self) -> IdentityConfig {
        let identity = &self.settings.identity;
        let bootstrap = identity.bootstrap_kubeconfig.clone();
        match (identity.kind, bootstrap) {
            (IdentityKind::Node, bootstrap) => IdentityConfig::Node { bootstrap },
            (IdentityKind::ServiceAccount, None) => IdentityConfig::ServiceAccount,
            (IdentityKind::ServiceAccount, Some(path)) => {
                let what = format!(
                    "`{}` has no effect unless identity.kind is `node`",
                    path.display()
                );
                self.wrong("identity.bootstrapKubeconfig", what);
                IdentityConfig::ServiceAccount
            }
        }
    }

    fn keys(&mut self, node: &str) -> KeysConfig {
        let keys = &self.settings.keys;
        match (keys.folder.clone(), keys.secret.clone()) {
            (Some(folder), secret) => {
                if secret.is_some() {
                    let what = format!(
                        "`{}` cannot be set together with keys.secret",
                        folder.display()
                    );
                    self.wrong("keys.folder", what);
                }
                KeysConfig::Folder(folder)
            }
            (None, Some(secret)) => KeysConfig::Secret(secret),
            (None, None) => KeysConfig::Secret(format!("knoc-kubelet-{node}-keys")),
        }
    }
}
