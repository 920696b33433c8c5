//! The site file: a TOML file, which `init` writes with comments, with everything that differs between sites.
//!
//! PURE, except for [`Config::load`], which reads the file once, at start. All mistakes are reported together, each
//! with its line and the allowed values, before anything starts. The cluster cannot extend any of these limits: only
//! the HPC user decides about [`Policy`].

mod binds;
mod check;
pub mod dial_out;
mod egress;
mod host_paths;
mod host_ports;
mod images;
mod limits;
mod listen;
mod mapped;
mod mesh;
mod network;
mod privileged;
mod serve;
pub mod text;

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
    time::Duration,
};

pub use self::{
    binds::SiteBind,
    host_paths::HostPath,
    images::{Compression, Convert, ImageSettings},
    limits::Limits,
    mapped::{Csi, Nfs},
};
use knoc_proto::settings::{Document, Mistakes};
use serde::Deserialize;

pub use listen::Listen;
pub use network::NetworkSetting;
pub use privileged::Privileged;
pub use serve::Serve;

/// The maximum size in bytes; the file is read again every few seconds.
const MAX_SIZE: u64 = 1 << 20;

/// Why the site file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The site file cannot be read.
    #[error("read the site file {} (`knoc-agent init --site SITE` makes one)", path.display())]
    Read {
        /// The path of the file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// Everything that is wrong with the site file, one mistake for each line.
    #[error(transparent)]
    Mistakes(#[from] Mistakes),
}

/// The site file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The site's name. The agent's identity is `spiffe://knoc/agent/<site>`. There is no default.
    #[serde(default)]
    pub site: String,
    /// The state directory, on the file system that login and compute nodes share.
    #[serde(default = "text::state_dir")]
    pub state_dir: PathBuf,
    /// What runs the jobs.
    #[serde(default)]
    pub scheduler: SchedulerKind,
    /// What runs the containers.
    #[serde(default)]
    pub runtime: RuntimeKind,
    /// The site's shell commands at the beginning of every batch script (`module load …`). They never contain data of a
    /// pod.
    #[serde(default)]
    pub prelude: String,
    /// Folders under which pods may name image files and sandboxes.
    #[serde(default)]
    pub image_roots: Vec<PathBuf>,
    /// Whether others may own and write files under `image_roots`. Whoever can write them chooses what this account
    /// runs.
    #[serde(default)]
    pub trust_shared_roots: bool,
    /// The addresses that the agent listens on.
    #[serde(default)]
    pub listen: Listen,
    /// The agent's certificate, and the CA of the kubelets' certificates. Without it, only the unix socket is served.
    #[serde(default)]
    pub tls: Option<Tls>,
    /// The kubelets that the agent dials.
    #[serde(default)]
    pub dial_out: Vec<dial_out::DialOut>,
    /// The paths of the tools; those that are not set are looked up in `env.PATH`.
    #[serde(default)]
    pub tools: Tools,
    /// The complete environment of every tool.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Mirrors of registries; the first match applies.
    #[serde(default, rename = "registry")]
    pub registries: Vec<Registry>,
    /// Which clients are served, and what pods may request.
    #[serde(default)]
    pub policy: Policy,
    /// Maps extended resources of pods to Slurm's gres, such as `"amd.com/gpu" = "gpu"`. It replaces the default.
    #[serde(default = "text::gres")]
    pub gres: BTreeMap<String, String>,
    /// What every container has of the compute node.
    #[serde(default, rename = "bind")]
    pub binds: Vec<SiteBind>,
    /// The defaults for jobs whose pod requests nothing else.
    #[serde(default)]
    pub job: JobDefaults,
    /// Where images of a library come from, and how images from registries are kept.
    #[serde(default)]
    pub images: ImageSettings,
    /// Rates, limits and timeouts.
    #[serde(default)]
    pub limits: Limits,
    /// The containers' logs.
    #[serde(default)]
    pub logs: Logs,
    /// Restarts of containers, and image pulls.
    #[serde(default)]
    pub backoff: Backoff,
    /// How the values of pods are stored.
    #[serde(default)]
    pub values: Values,
    /// An agent that `serve --stdio` starts.
    #[serde(default)]
    pub serve: Serve,
    /// The file that this was read from.
    #[serde(skip)]
    pub source: Option<Source>,
}

/// The path of a site file, so that its `[policy]` can be read again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The path of the file.
    pub path: PathBuf,
    /// What `~/` means in it.
    pub home: Home,
}

/// What runs the jobs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SchedulerKind {
    /// The cluster's Slurm.
    #[default]
    Slurm,
    /// Process groups on the agent's own host.
    Local,
}

impl SchedulerKind {
    /// The name in the site file and in `AgentInfo`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Slurm => "slurm",
            Self::Local => "local",
        }
    }
}

/// What runs the containers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RuntimeKind {
    /// Apptainer if it is found, else Singularity.
    #[default]
    Auto,
    /// Apptainer.
    Apptainer,
    /// SingularityCE.
    Singularity,
    /// No container runtime: containers are processes of the host. For tests, and for sites that forbid container
    /// runtimes.
    Process,
}

impl RuntimeKind {
    /// The name in the site file and in `AgentInfo`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Apptainer => "apptainer",
            Self::Singularity => "singularity",
            Self::Process => "process",
        }
    }
}

/// PEM files, which are read again when they change.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// The CA of the kubelets' certificates.
    pub ca: PathBuf,
    /// The agent's certificate.
    pub cert: PathBuf,
    /// The key of that certificate.
    pub key: PathBuf,
    /// The CA's key, with which certificates are renewed. If unset: `ca` with the extension `.key`. The file may be
    /// missing.
    #[serde(default)]
    pub ca_key: Option<PathBuf>,
}

impl Tls {
    /// The path at which the CA's key is expected.
    #[must_use]
    pub fn ca_key(&self) -> PathBuf {
        let beside = || self.ca.with_extension("key");
        self.ca_key.clone().unwrap_or_else(beside)
    }
}

/// Absolute paths of tools; those that are not set are looked up in `env.PATH`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "each field is named as its tool")]
pub struct Tools {
    pub sbatch: Option<PathBuf>,
    pub squeue: Option<PathBuf>,
    pub sacct: Option<PathBuf>,
    pub scancel: Option<PathBuf>,
    pub sinfo: Option<PathBuf>,
    pub scontrol: Option<PathBuf>,
    pub srun: Option<PathBuf>,
    pub apptainer: Option<PathBuf>,
    pub singularity: Option<PathBuf>,
    /// Not used, but `init` of earlier versions wrote it.
    sacctmgr: Option<PathBuf>,
}

impl Tools {
    /// The tools that are used, with their names.
    fn named(&self) -> [(&'static str, &Option<PathBuf>); 9] {
        [
            ("sbatch", &self.sbatch),
            ("squeue", &self.squeue),
            ("sacct", &self.sacct),
            ("scancel", &self.scancel),
            ("sinfo", &self.sinfo),
            ("scontrol", &self.scontrol),
            ("srun", &self.srun),
            ("apptainer", &self.apptainer),
            ("singularity", &self.singularity),
        ]
    }

    /// The names of tools that are set but not used.
    pub(crate) fn unused(&self) -> impl Iterator<Item = &'static str> {
        let unused = [("sacctmgr", &self.sacctmgr)];
        let named = unused.into_iter().filter(|(_, path)| path.is_some());
        named.map(|(name, _)| name)
    }
}

/// `[[registry]]`: images whose name begins with `prefix` are fetched from `mirror`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registry {
    /// The prefix, such as `docker.io` or `docker.io/library`.
    pub prefix: String,
    /// What replaces the prefix; if unset, the prefix itself.
    #[serde(default)]
    pub mirror: Option<String>,
    /// Whether to use plain HTTP.
    #[serde(default)]
    pub insecure: bool,
    /// Whether the mirror gets the credentials that pods have for images under `prefix`.
    #[serde(default)]
    pub credentials: bool,
}

/// Which clients are served, and what pods may request. The whole table is read again while the agent runs.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// The UID of the namespace `kube-system` of the only cluster that is served. If unset, it is pinned at first use.
    pub cluster_id: Option<String>,
    /// Identities that are served, such as `kubelet/knoc`; `*` at the end matches any rest. If empty: all that the CA
    /// has certified.
    pub clients: Vec<String>,
    /// Certificates that are denied, and all that were renewed from them: `sha256/…` of a public key, `serial/…`, or an
    /// identity such as `ctl/ann`.
    pub denied: Vec<String>,
    /// Nodes whose kubelet has another name, as node → `kubelet/NAME`. A kubelet always leads the node with its own
    /// name.
    pub nodes: BTreeMap<String, String>,
    /// Namespaces whose pods are accepted. If empty: all.
    pub namespaces: Vec<String>,
    /// Names of additional sbatch flags that pods may give, such as `--mail-type`.
    pub flags: Vec<String>,
    /// Partitions that pods may name. If empty: all.
    pub partitions: Vec<String>,
    /// Accounts that pods may name. If empty: all.
    pub accounts: Vec<String>,
    /// QOS that pods may name. If empty: all.
    pub qos: Vec<String>,
    /// Prefixes of the image names that pods may use, such as `docker.io/library`. If empty: all.
    pub registries: Vec<String>,
    /// What happens to a pod with a container that asks for privileges.
    pub privileged: Privileged,
    /// Ports of compute nodes that may lead to pods, such as `20000-20999`. If empty: none.
    pub host_ports: Vec<String>,
    /// The Services of the cluster that pods may reach, as `NAMESPACE/SERVICE`, where `*` stands for any characters. If empty:
    /// none.
    pub egress: Vec<String>,
    /// Between which namespaces pods reach each other at their own addresses, as `NAMESPACE:NAMESPACE`, where `*` stands for any
    /// characters. Pods of one namespace always do.
    pub pod_traffic: Vec<String>,
    /// The paths of the compute nodes that pods may mount, with everything below them.
    pub host_paths: Vec<HostPath>,
    /// Where the compute nodes have the exports of NFS volumes.
    pub nfs: Vec<Nfs>,
    /// Where the compute nodes have the volumes of CSI drivers.
    pub csi: Vec<Csi>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            cluster_id: None,
            clients: Vec::new(),
            denied: Vec::new(),
            nodes: BTreeMap::new(),
            namespaces: Vec::new(),
            flags: [
                "--mail-type",
                "--mail-user",
                "--mem-per-cpu",
                "--cores-per-socket",
                "--hint",
            ]
            .map(str::to_owned)
            .into(),
            partitions: Vec::new(),
            accounts: Vec::new(),
            qos: Vec::new(),
            registries: Vec::new(),
            privileged: Privileged::Reject,
            host_ports: Vec::new(),
            egress: knoc_proto::egress::DEFAULT_ALLOW.map(str::to_owned).into(),
            pod_traffic: Vec::new(),
            host_paths: Vec::new(),
            nfs: Vec::new(),
            csi: Vec::new(),
        }
    }
}

/// The defaults for jobs whose pod requests nothing else.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct JobDefaults {
    /// `--partition`. If unset: Slurm's default.
    pub partition: Option<String>,
    /// `--account`. If unset: the user's default.
    pub account: Option<String>,
    /// `--qos`. If unset: the association's default.
    pub qos: Option<String>,
    /// `--time` in minutes. If unset: the partition's DefaultTime, else its MaxTime.
    pub time_minutes: Option<u32>,
    /// A node-local folder for the shim.
    pub scratch: Option<String>,
    /// The network that pods are in.
    pub network: NetworkSetting,
    /// Whether a pod's own network reaches the node's IPv6 networks too. It then has the node's IPv6 addresses.
    pub network_ipv6: bool,
    /// Names with one of these suffixes are asked at the compute node's resolvers instead of the cluster's DNS.
    pub node_dns_suffixes: Vec<String>,
    /// As which user and group programs see themselves.
    pub user_ids: UserIds,
}

/// As which user and group programs see themselves. To the kernel, all are the HPC user.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UserIds {
    /// As those that the pod asks for, or else the image unless it is root, where the compute node can do it.
    #[default]
    Requested,
    /// As the HPC user.
    Own,
}

/// The containers' logs.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Logs {
    /// The size in bytes at which a log is rotated.
    pub max_bytes: i64,
    /// The number of files kept for one attempt.
    pub max_files: i32,
    /// The maximum size of all logs of one pod in bytes. An eighth is kept for ephemeral containers, of which each gets a 64th
    /// of that. Each kept attempt of each other container (two of them) gets an equal share of the rest.
    pub max_pod_bytes: i64,
}

impl Default for Logs {
    fn default() -> Self {
        Self {
            max_bytes: 100 << 20,
            max_files: 20,
            max_pod_bytes: 4 << 30,
        }
    }
}

/// The first and the longest pause; each pause is twice the previous one.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Backoff {
    /// The first pause.
    #[serde(deserialize_with = "text::duration")]
    pub initial: Duration,
    /// The longest pause.
    #[serde(deserialize_with = "text::duration")]
    pub max: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            initial: Duration::from_secs(10),
            max: Duration::from_mins(5),
        }
    }
}

/// The values of pods: Secrets, tokens and environment.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Values {
    /// Where values wait for the job.
    pub at_rest: AtRest,
    /// What happens on a node without a usable `/dev/shm`.
    pub memory_fallback: MemoryFallback,
    /// How long a job whose pod was never started waits for values that are missing or have expired before the pod
    /// fails (`ValuesMissing`, `ValuesExpired`).
    #[serde(deserialize_with = "text::duration")]
    pub wait: Duration,
}

impl Default for Values {
    fn default() -> Self {
        Self {
            at_rest: AtRest::default(),
            memory_fallback: MemoryFallback::default(),
            wait: Duration::from_mins(10),
        }
    }
}

/// Where values wait for the job.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AtRest {
    /// In `JOBDIR/values` (mode 0600, in a folder with mode 0700), until the shim has read them.
    #[default]
    File,
    /// In the agent's memory only: the pod waits for the shim's link.
    None,
}

/// What happens to values, and to volumes with the medium Memory, on a node without a usable `/dev/shm`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemoryFallback {
    /// The pod fails.
    #[default]
    Error,
    /// They are stored on the node's disk, and the pod gets a warning.
    Disk,
}

/// The environment in which the file is read. It is an argument, so that tests need no global state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Home {
    /// `$HOME`.
    pub home: PathBuf,
}

impl Config {
    /// Reads and checks the site file.
    pub fn load(path: &Path, home: &Home) -> Result<Self, ConfigError> {
        let text = read(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        let mut config = Self::parse(&text, path, home)?;
        config.source = Some(Source {
            path: path.to_owned(),
            home: home.clone(),
        });
        Ok(config)
    }

    /// Checks the text of a site file that lies at `path`.
    pub fn parse(text: &str, path: &Path, home: &Home) -> Result<Self, ConfigError> {
        let mut document = Document::parse(text, path)?;
        let config = document.read().map(|mut config: Self| {
            config.expand(&home.home);
            check::check(&config, &home.home, &mut document);
            config
        });
        Ok(document.finish(config)?)
    }

    fn expand(&mut self, home: &Path) {
        for entry in &mut self.dial_out {
            entry.expand(home);
        }
        let tls = self.tls.iter_mut().flat_map(|tls| {
            let named = [&mut tls.ca, &mut tls.cert, &mut tls.key];
            named.into_iter().chain(&mut tls.ca_key)
        });
        for path in tls
            .chain([&mut self.state_dir])
            .chain(&mut self.image_roots)
            .chain(
                self.policy
                    .host_paths
                    .iter_mut()
                    .map(|entry| &mut entry.path),
            )
            .chain(self.binds.iter_mut().map(|entry| &mut entry.path))
            .chain(&mut self.listen.socket)
            .chain(&mut self.images.library_token)
        {
            if let Ok(rest) = path.strip_prefix("~") {
                *path = home.join(rest);
            }
        }
        if let Some(scratch) = &mut self.job.scratch
            && let Some(rest) = scratch.strip_prefix("~/")
        {
            *scratch = home.join(rest).to_string_lossy().into_owned();
        }
    }
}

/// The text of a site file, which is no larger than [`MAX_SIZE`].
fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let read = fs::File::open(path)?
        .take(MAX_SIZE + 1)
        .read_to_string(&mut text)?;
    if u64::try_from(read).unwrap_or(u64::MAX) > MAX_SIZE {
        let message = format!("it is larger than {MAX_SIZE} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
