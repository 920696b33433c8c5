//! From the configuration to an [`App`]: the clients of the API server, our identity, the link.

use std::{
    net::{IpAddr, SocketAddr, ToSocketAddrs as _, UdpSocket},
    path::Path,
    time::Duration,
};

use k8s_openapi::api::core::v1::Namespace;
use knoc_link::{
    Carrier, Credentials, ExpectPeer, LinkError, Route,
    carrier::ssh::SecretError,
    dial_in::{self, PreparedReception},
    proxy::Via,
};
use kube::{
    Api, Client,
    config::{KubeConfigOptions, Kubeconfig},
};

use super::App;
use crate::{
    agent::{
        Agent,
        renew::{self, Dialer, Way},
    },
    api_client,
    certs::{Keep, Pairs},
    config::{AgentConfig, AgentWay, Config, IdentityConfig, KeysConfig, ServingConfig},
    pods::Store,
    server::{ClientCa, Serving, Settings},
};

const DEADLINE: Duration = Duration::from_secs(30);

/// Why no kubelet could be built from the configuration.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The kubeconfig or the in-cluster configuration cannot be used.
    #[error("read the Kubernetes client configuration")]
    Kubeconfig {
        /// What is wrong with it.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The API server denied the request or failed.
    #[error("read namespace kube-system, whose UID is the cluster's id, from {server}")]
    Cluster {
        /// The URL of the API server.
        server: String,
        /// The error of the API server.
        #[source]
        source: kube::Error,
    },
    /// The API server did not answer.
    #[error("no answer from {server} within {} s", DEADLINE.as_secs())]
    Late {
        /// The URL of the API server.
        server: String,
    },
    /// The folder for logins over SSH.
    #[error("agent.sshFolder, for the address {carrier}")]
    Login {
        /// The address.
        carrier: Carrier,
        /// Why not.
        #[source]
        source: Box<SecretError>,
    },
    /// A variable names no usable proxy.
    #[error("find the way to the agent")]
    Proxy {
        /// What is wrong with it.
        #[source]
        source: knoc_link::proxy::InvalidEnvironment,
    },
    /// The certificates of the link cannot be used.
    #[error("read agent.ca, agent.cert and agent.key")]
    Credentials {
        /// What is wrong with them.
        #[source]
        source: knoc_link::CredentialsError,
    },
    /// The link cannot be prepared.
    #[error("prepare the link to the agent")]
    Link {
        /// What is wrong.
        #[source]
        source: LinkError,
    },
}

impl App {
    /// Reads all files, asks the API server for the cluster's id and prepares the link. Does not connect to the agent
    /// yet.
    pub async fn build(config: Config) -> Result<Self, BuildError> {
        let kube_config = kube_config(config.kubernetes.kubeconfig.as_deref()).await?;
        let server = kube_config.cluster_url.to_string();
        let default_namespace = kube_config.default_namespace.clone();
        let internal_ip = config
            .node
            .internal_ip
            .or_else(|| our_address(kube_config.cluster_url.host()?, &server))
            .unwrap_or(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST));
        let account = client(kube_config.clone())?;
        let bootstrap = match &config.identity {
            IdentityConfig::Node {
                bootstrap: Some(path),
            } => Some(client(self::kube_config(Some(path)).await?)?),
            IdentityConfig::Node { bootstrap: None } => Some(account.clone()),
            IdentityConfig::ServiceAccount => None,
        };
        let cluster_id = cluster_id(&account, &server).await?;
        let (dialer, reception) = dialer(&config.agent)?;
        let link = |source| BuildError::Link { source };
        let channels = dialer.dial().map_err(link)?;
        let mut agent = Agent::new(channels.control, channels.bulk, &cluster_id);
        if dialer.way.costs_logins() {
            agent = agent.over_logins();
        }
        let agent = agent.of_node(&config.node.name);
        let host = nix::unistd::gethostname()
            .ok()
            .and_then(|name| name.into_string().ok());
        let identity = config.kubernetes.identity.clone().or(host);
        let namespace = config.kubernetes.namespace.clone();
        let app = Self {
            namespace: namespace.unwrap_or(default_namespace),
            identity: identity.unwrap_or_else(|| "knoc-kubelet".to_owned()),
            internal_ip: internal_ip.to_string(),
            store: Store::default(),
            kube_config,
            account,
            bootstrap,
            agent,
            dialer,
            reception,
            config,
        };
        if let Some(credentials) = &app.dialer.credentials {
            renew::restore(credentials, &app.keep()).await;
            warn_of_leadership(credentials, &app.config.node.name);
        }
        Ok(app)
    }

    /// Where our own keys are stored.
    pub(super) fn keep(&self) -> Keep {
        match &self.config.keys {
            KeysConfig::Folder(folder) => Keep::Folder(folder.clone()),
            KeysConfig::Secret(name) => Keep::secret(self.account.clone(), &self.namespace, name),
        }
    }
}

fn client(config: kube::Config) -> Result<Client, BuildError> {
    api_client::connect(config).map_err(|source| BuildError::Kubeconfig {
        source: source.into(),
    })
}

async fn kube_config(path: Option<&Path>) -> Result<kube::Config, BuildError> {
    let kubeconfig = |source: kube::config::KubeconfigError| BuildError::Kubeconfig {
        source: Box::new(source),
    };
    match path {
        Some(path) => {
            let file = Kubeconfig::read_from(path).map_err(kubeconfig)?;
            let options = KubeConfigOptions::default();
            kube::Config::from_custom_kubeconfig(file, &options)
                .await
                .map_err(kubeconfig)
        }
        None => kube::Config::infer()
            .await
            .map_err(|source| BuildError::Kubeconfig {
                source: Box::new(source),
            }),
    }
}

async fn cluster_id(client: &Client, server: &str) -> Result<String, BuildError> {
    let api: Api<Namespace> = Api::all(client.clone());
    let answer = tokio::time::timeout(DEADLINE, api.get("kube-system")).await;
    let server = server.to_owned();
    match answer {
        Err(_) => Err(BuildError::Late { server }),
        Ok(Err(source)) => Err(BuildError::Cluster { server, source }),
        Ok(Ok(namespace)) => Ok(namespace.metadata.uid.unwrap_or_default()),
    }
}

/// How to connect to the agent; with what listens for it, if it dials.
fn dialer(config: &AgentConfig) -> Result<(Dialer, Option<PreparedReception>), BuildError> {
    let credentials = match &config.credentials {
        None => None,
        Some(files) => Some(
            Credentials::from_files(&files.ca, &files.cert, &files.key)
                .map_err(|source| BuildError::Credentials { source })?,
        ),
    };
    let expect = match &config.site {
        Some(site) => ExpectPeer::Exactly(knoc_link::Identity::Agent { site: site.clone() }),
        None => ExpectPeer::AnyAgent,
    };
    let (way, reception) = match (&config.way, &credentials) {
        (AgentWay::Dial(route, via), _) => {
            let route = dialled(route, via)?;
            tracing::info!(agent = %route, "the kubelet dials the agent");
            (Way::Dial(route), None)
        }
        (AgentWay::Accept(listen), Some(credentials)) => {
            let expect = expect.clone();
            let (dial_in, reception) = dial_in::prepare(*listen, credentials.clone(), expect);
            (Way::DialIn(dial_in), Some(reception))
        }
        (AgentWay::Accept(listen), None) => {
            let carrier = Carrier::Tcp(listen.to_string());
            let source = LinkError::NoCredentials { carrier };
            return Err(BuildError::Link { source });
        }
    };
    let dialer = Dialer {
        way,
        credentials,
        expect,
    };
    Ok((dialer, reception))
}

/// The addresses through the proxy that the settings or the environment name, with the folder for logins checked.
fn dialled(route: &Route, via: &Via) -> Result<Route, BuildError> {
    let variable = |name: &str| std::env::var(name).ok();
    let mut carriers = Vec::new();
    for carrier in route.carriers() {
        if let Carrier::Ssh(ssh) = carrier {
            ssh.check().map_err(|source| BuildError::Login {
                carrier: carrier.clone(),
                source: Box::new(source),
            })?;
        }
        let carrier = carrier.clone().via(via, variable);
        carriers.push(carrier.map_err(|source| BuildError::Proxy { source })?);
    }
    Ok(Route::new(carriers).unwrap_or_else(|| route.clone()))
}

/// An agent lets a kubelet lead the node of its certificate's name; other nodes must be allowed in the site file.
fn warn_of_leadership(credentials: &Credentials, node: &str) {
    if let Ok(identity) = credentials.info().identity
        && identity.name() != node
    {
        tracing::warn!(%identity, node, "the link's certificate names another node, so the agent will reject changes \
            unless [policy.nodes] of its site file has the line \"{node}\" = \"kubelet/{}\"", identity.name());
    }
}

/// The local address of the route to the API server. Sends nothing.
fn our_address(host: &str, server: &str) -> Option<IpAddr> {
    let port = if server.starts_with("http:") { 80 } else { 443 };
    let target: SocketAddr = (host.trim_matches(['[', ']']), port)
        .to_socket_addrs()
        .ok()?
        .next()?;
    let any: SocketAddr = if target.is_ipv4() {
        ([0, 0, 0, 0], 0).into()
    } else {
        ([0u16; 8], 0).into()
    };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(target).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

pub(super) fn server_settings(config: &Config, own: Option<Pairs>) -> Settings {
    let serving = match (&config.server.serving, own) {
        (_, Some(pairs)) => Serving::Own(pairs),
        (ServingConfig::Files(certificate, key), None) => Serving::Files {
            certificate: certificate.clone(),
            key: key.clone(),
        },
        // There is no certificate of our own, so the receiver never gets one and the server reports an error at start.
        (ServingConfig::SelfSigned | ServingConfig::Csr, None) => {
            Serving::Own(tokio::sync::watch::channel(None).1)
        }
    };
    Settings {
        bind: config.server.listen,
        node: config.node.name.clone(),
        serving,
        client_ca: config
            .server
            .client_ca
            .clone()
            .map_or(ClientCa::Cluster, ClientCa::File),
    }
}
