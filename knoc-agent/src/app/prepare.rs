//! Prepares everything that must exist before the agent serves: directories, lease, keys, container
//! runtime, limits and the installed version.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use jiff::Timestamp;
use knoc_contract::{
    jobdir::{JobDirError, StateDir, atomic::FileError},
    setuid,
};
use knoc_link::{
    Credentials, CredentialsError, LinkError, carrier::unix, pinned::KeyPair, socket::tls_beside,
};
use knoc_proto::{error::chain, ids::PodUid};
use tokio::sync::{Notify, Semaphore, mpsc};

use super::hop::{self, PairError};
use crate::{
    config::{Config, RuntimeKind, SchedulerKind},
    egress::Egress,
    image::{self, Images},
    lease::{Holder, LeaseError, Process},
    mesh::Mesh,
    open_files, own_limits, policy,
    registry::board::Board,
    scheduler::{Scheduler, local, slurm},
    shim_links::ShimLinks,
    shim_route::{ShimRoute, Told},
    shim_steps::{self, ShimSteps},
    site::{ACCEPTING, RuntimeInfo, Site},
    versions::Versions,
};

/// Open files per pod in the worst case: the shim's socket, a record being written, and a stream or two.
const FILES_A_POD: u64 = 4;
/// Open files that the agent needs for itself, the connections among them that it opens to kubelets.
const FILES_OWN: u64 = 128 + 64;
/// Listeners whose connections are counted here: the ports of kubelets and of shims. Those of the unix sockets, and of
/// logins over SSH through them, take the place of kubelets at the port. Links of shims are counted with their pods, which
/// leaves enough connections on their port.
const LISTENERS: u64 = 2;
/// More pods than any agent was tested with.
const PODS: u64 = 20_000;

/// Why the agent cannot start.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The state directory's files cannot be prepared.
    #[error("prepare the state directory")]
    Files(#[from] JobDirError),
    /// Another agent is alive, or the lease cannot be written.
    #[error("acquire the lease")]
    Lease(#[from] LeaseError),
    /// Other users can access the state directory.
    #[error("{} must be a directory of our own with mode 0700, but it has mode {mode:o} and belongs to uid {uid}", path.display())]
    Open {
        /// The state directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// Its owner.
        uid: u32,
    },
    /// A socket cannot be served.
    #[error("listen")]
    Listen(#[source] Box<LinkError>),
    /// The certificates or keys cannot be loaded.
    #[error("load keys")]
    Keys(#[from] CredentialsError),
    /// A variable names no usable proxy.
    #[error(
        "find the way to the kubelets of [[dial_out]]; `proxy = \"none\"` leaves the environment's proxy out"
    )]
    Proxy(#[from] knoc_link::proxy::InvalidEnvironment),
    /// No container runtime was found.
    #[error(
        "no apptainer or singularity in {path:?}; name one in `tools`, or set runtime = \"process\""
    )]
    NoRuntime {
        /// The `PATH` that was searched.
        path: String,
    },
}

impl From<FileError> for PrepareError {
    fn from(error: FileError) -> Self {
        Self::Files(error.into())
    }
}

impl From<PairError> for PrepareError {
    fn from(error: PairError) -> Self {
        match error {
            PairError::File(error) => error.into(),
            PairError::Keys(error) => error.into(),
        }
    }
}

pub(super) fn listen(error: LinkError) -> PrepareError {
    PrepareError::Listen(Box::new(error))
}

/// What `serve` starts from.
pub(super) struct Prepared {
    pub(super) site: Arc<Site>,
    pub(super) pod_limit: usize,
    pub(super) pair: KeyPair,
    pub(super) policy: policy::Publisher,
    pub(super) step_requests: mpsc::Receiver<shim_steps::Request>,
}

/// Creates the state directory and takes its lease.
pub(super) fn take(config: &Config) -> Result<(StateDir, Holder), PrepareError> {
    let state = StateDir::new(&config.state_dir);
    state.create()?;
    check_private(state.root())?;
    let lease = Holder::take(&state, &Process::own(), Timestamp::now())?;
    Ok((state, lease))
}

pub(super) async fn prepare(
    config: Config,
    (state, lease): (StateDir, Holder),
    ended: mpsc::Sender<PodUid>,
) -> Result<Prepared, PrepareError> {
    let pair = hop::pair(&state)?;
    let versions = Versions::install(&state)?;
    let (publisher, live) = policy::Live::new(config.policy.clone());
    let scheduler = scheduler(&config, &state, &live);
    for tool in config.tools.unused() {
        tracing::warn!("tools.{tool} of the site file is not used: remove its line");
    }
    let (runtime, images) = containers(&config, &state, &live).await?;
    let limit = pod_limit(&config);
    let limits = &config.limits;
    let shim_route = ShimRoute::load(&state, limits.srun_links > 0, Timestamp::now());
    let (shim_steps, step_requests) =
        ShimSteps::new(shim_route.clone(), limits.srun_links, limits.srun_idle);
    let egress = Egress::default();
    let mesh = Mesh::new(live.clone(), rand::random());
    let site = Arc::new(Site {
        sockets: socket_places(&config).candidates(),
        board: Board::new(lease.epoch()),
        runtime,
        dial_out: crate::dial_out::DialStates::default(),
        shim_links: ShimLinks::new(egress.clone(), mesh.clone()),
        egress,
        mesh,
        shim_route,
        shim_steps,
        poll_soon: Arc::new(Notify::new()),
        accepting: Semaphore::new(ACCEPTING),
        config,
        policy: live,
        state,
        scheduler,
        images,
        lease,
        shim: versions.own_program(),
        versions,
        ended,
    });
    Ok(Prepared {
        site,
        pod_limit: limit,
        pair,
        policy: publisher,
        step_requests,
    })
}

/// What the jobs' containers are made with, and their images, without what an earlier process left half done.
async fn containers(
    config: &Config,
    state: &StateDir,
    live: &policy::Live,
) -> Result<(RuntimeInfo, Images), PrepareError> {
    let (name, path) = runtime(config)?;
    let program = (name != "process").then(|| path.clone());
    let settings = image::Settings::of_site(config, program, state.clone(), live.clone());
    let info = RuntimeInfo {
        name: name.to_owned(),
        exec: setuid::starter(name, &path).is_none(),
        path,
        version: runtime_version(&settings).await,
    };
    let images = Images::new(settings);
    images.sweep();
    Ok((info, images))
}

async fn runtime_version(settings: &image::Settings) -> String {
    let version = image::runtime_version(settings).await;
    version.unwrap_or_else(|error| {
        tracing::warn!(
            error = chain(&error),
            "the container runtime does not report its version"
        );
        "unknown".to_owned()
    })
}

/// The scheduler of the site file, which follows the current policy.
fn scheduler(config: &Config, state: &StateDir, live: &policy::Live) -> Scheduler {
    match config.scheduler {
        SchedulerKind::Slurm => {
            let mut settings: slurm::Settings = config.into();
            settings.policy = live.clone();
            Scheduler::Slurm(Box::new(slurm::Slurm::new(settings)))
        }
        SchedulerKind::Local => {
            let settings = local::Settings::of_site(config, state.pods());
            Scheduler::Local(local::Local::new(settings))
        }
    }
}

fn check_private(path: &Path) -> Result<(), PrepareError> {
    let meta = fs::metadata(path).map_err(FileError::on("stat", path))?;
    let mode = meta.permissions().mode() & 0o777;
    if meta.uid() == nix::unistd::geteuid().as_raw() && mode.trailing_zeros() >= 6 {
        return Ok(());
    }
    Err(PrepareError::Open {
        path: path.to_owned(),
        mode,
        uid: meta.uid(),
    })
}

/// The name and the path of the container runtime.
fn runtime(config: &Config) -> Result<(&'static str, PathBuf), PrepareError> {
    let path = config
        .env
        .get("PATH")
        .map_or("/usr/local/bin:/usr/bin:/bin", String::as_str);
    let find = |name: &str, named: &Option<PathBuf>| {
        named.clone().or_else(|| {
            let mut folders = path.split(':').filter(|folder| folder.starts_with('/'));
            folders.find_map(|f| Some(Path::new(f).join(name)).filter(|p| p.is_file()))
        })
    };
    let apptainer = || Some(("apptainer", find("apptainer", &config.tools.apptainer)?));
    let singularity = || {
        Some((
            "singularity",
            find("singularity", &config.tools.singularity)?,
        ))
    };
    let found = match config.runtime {
        RuntimeKind::Process => Some(("process", PathBuf::new())),
        RuntimeKind::Apptainer => apptainer(),
        RuntimeKind::Singularity => singularity(),
        RuntimeKind::Auto => apptainer().or_else(singularity),
    };
    found.ok_or_else(|| PrepareError::NoRuntime {
        path: path.to_owned(),
    })
}

/// How many pods this process can carry.
pub(crate) fn pod_limit(config: &Config) -> usize {
    own_limits::raise();
    let files = open_files::raise();
    let connections = knoc_link::admission::Bounds::of(files).descriptors();
    let own = FILES_OWN + LISTENERS * u64::try_from(connections).unwrap_or(u64::MAX);
    let carried = (files.saturating_sub(own) / FILES_A_POD).clamp(1, PODS);
    let wanted = config.limits.pods.map_or(carried, u64::from);
    if wanted > carried {
        tracing::warn!(
            wanted,
            carried,
            files,
            "the limit of open files allows fewer pods"
        );
    }
    tracing::info!(
        pods = wanted.min(carried),
        open_files = files,
        "process limits"
    );
    usize::try_from(wanted.min(carried)).unwrap_or(usize::MAX)
}

/// The certificates of the site file.
pub(super) fn credentials(config: &Config) -> Result<Option<Credentials>, PrepareError> {
    let files = config.tls.as_ref();
    let read = files.map(|tls| Credentials::from_files(&tls.ca, &tls.cert, &tls.key));
    Ok(read.transpose()?)
}

/// Binds the unix socket, and TCP if there are certificates.
pub(super) async fn near_listeners(
    config: &Config,
    credentials: Option<Credentials>,
) -> Result<Vec<knoc_link::Incoming>, PrepareError> {
    let socket = socket_path(config);
    let mut near = vec![knoc_link::listen::unix(&socket).map_err(listen)?];
    tracing::info!(socket = %socket.display(), "serving knocctl");
    if let Some(credentials) = credentials {
        // For `knoc-agent connect`: clients over SSH show the same certificates as those over TCP.
        let tls_socket = tls_beside(&socket);
        let listener = unix::Listener::bind(&tls_socket).map_err(listen)?;
        near.push(knoc_link::listen::over_tls(listener, credentials.clone()));
        if let Some(address) = config.listen.kubelet {
            let incoming = knoc_link::listen::tcp(address, credentials).await;
            near.push(incoming.map_err(listen)?);
            tracing::info!(%address, socket = %tls_socket.display(), "serving kubelets");
        } else {
            tracing::info!(socket = %tls_socket.display(), "serving kubelets over SSH only");
        }
    } else {
        tracing::warn!("no [tls] in the site file: only the unix socket is served");
    }
    Ok(near)
}

/// The agent's unix socket: as configured, else `$XDG_RUNTIME_DIR/knoc/agent.sock`, else in the
/// state directory. Logs a warning if `XDG_RUNTIME_DIR` is set but cannot be used.
fn socket_path(config: &Config) -> PathBuf {
    let places = socket_places(config);
    let (path, fault) = places.choose();
    if let Some(fault) = fault {
        tracing::warn!(socket = %path.display(), "{fault}: using a socket in the state directory instead");
    }
    path
}

/// What decides where the socket is placed.
#[must_use]
pub fn socket_places(config: &Config) -> knoc_link::socket::SocketLocations {
    let runtime_dir = std::env::var_os("XDG_RUNTIME_DIR").filter(|value| !value.is_empty());
    knoc_link::socket::SocketLocations {
        configured: config.listen.socket.clone(),
        runtime_dir: runtime_dir.map(PathBuf::from),
        state_dir: config.state_dir.clone(),
    }
}

/// Writes the addresses at which shims find the agent.
pub(super) fn tell_shims(
    site: &Site,
    shim_hop: &knoc_link::Incoming,
    pair: &KeyPair,
) -> Result<Told, PrepareError> {
    let port = shim_hop
        .local_addr()
        .map_or_else(|| site.config.listen.shim.port(), |a| a.port());
    let told = Told {
        state: site.state.clone(),
        addresses: advertised(&site.config, port),
        spki: pair.spki().to_owned(),
    };
    tracing::info!(addresses = ?told.addresses, "shims will connect to these addresses");
    // If this process was suspended meanwhile, the shims of a newer agent look for that one here.
    if let Some(fenced) = site.lease.fenced() {
        return Err(fenced.into());
    }
    told.write(&site.shim_route)?;
    Ok(told)
}

/// The addresses that shims connect to: as configured, else every address of this host except
/// loopback, else its host name.
fn advertised(config: &Config, port: u16) -> Vec<String> {
    let listen = config.listen.shim;
    if !config.listen.shim_addresses.is_empty() {
        return config.listen.shim_addresses.clone();
    }
    if !listen.ip().is_unspecified() {
        return vec![SocketAddr::new(listen.ip(), port).to_string()];
    }
    let mut addresses: Vec<_> = own_addresses()
        .into_iter()
        .filter(|address| !address.is_loopback())
        .map(|address| SocketAddr::new(address, port).to_string())
        .collect();
    if addresses.is_empty() || config.scheduler == SchedulerKind::Local {
        addresses.insert(0, format!("127.0.0.1:{port}"));
    }
    addresses
}

/// The IPv4 addresses of this host's interfaces, from the kernel's table of local routes.
fn own_addresses() -> Vec<std::net::IpAddr> {
    let trie = fs::read_to_string("/proc/net/fib_trie").unwrap_or_default();
    let mut found = Vec::new();
    let mut last = None;
    for line in trie.lines() {
        let word = line.trim_start_matches([' ', '|', '+', '-']);
        if line.contains("/32 host LOCAL") {
            if let Some(address) = last.take()
                && !found.contains(&address)
            {
                found.push(address);
            }
        } else if let Ok(address) = word.trim().parse() {
            last = Some(address);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_has_loopback() {
        assert!(own_addresses().iter().any(std::net::IpAddr::is_loopback));
    }
}
