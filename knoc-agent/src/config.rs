//! The site file: all that differs between sites, in one TOML text that `init` writes with comments.
//!
//! Pure but for [`Config::load`], which reads the file once, at start. All mistakes are named at once, each with its
//! line and what is allowed, so that a typing error is found before anything starts. Nothing here can be widened by
//! the cluster: [`Policy`] is the HPC user's own word.

mod check;
pub mod text;

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use knoc_proto::settings::{Document, Mistakes};
use serde::Deserialize;

/// It is read again every few seconds.
const MAX_SIZE: u64 = 1 << 20;

/// Why the site file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("read the site file {} (`knoc-agent init --site SITE` makes one)", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's words.
        #[source]
        source: std::io::Error,
    },
    /// All that is wrong with it, a line each.
    #[error(transparent)]
    Mistakes(#[from] Mistakes),
}

/// The site file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name of the site: the agent's identity is `spiffe://knoc/agent/<site>`. It has no default.
    #[serde(default)]
    pub site: String,
    /// On the file system that login and compute nodes share.
    #[serde(default = "text::state_dir")]
    pub state_dir: PathBuf,
    /// Who owns the jobs.
    #[serde(default)]
    pub scheduler: SchedulerKind,
    /// What starts containers.
    #[serde(default)]
    pub runtime: RuntimeKind,
    /// Shell text of the site at the head of every batch script (`module load …`). Never pod data.
    #[serde(default)]
    pub prelude: String,
    /// Folders under which pods may name image files and sandboxes.
    #[serde(default)]
    pub image_roots: Vec<PathBuf>,
    /// Others may own and write what lies under `image_roots`: whoever can, chooses what this account runs.
    #[serde(default)]
    pub trust_shared_roots: bool,
    /// Folders under which pods may mount host paths: none yet, since every `hostPath` is rejected.
    #[serde(default)]
    pub host_paths: Vec<PathBuf>,
    /// Where the agent listens.
    #[serde(default)]
    pub listen: Listen,
    /// The agent's certificate and the CA that kubelets must be of. Without it only the unix socket is served.
    #[serde(default)]
    pub tls: Option<Tls>,
    /// Paths of the tools; empty ones are looked up in `env.PATH`.
    #[serde(default)]
    pub tools: Tools,
    /// The environment of every tool, and the whole of it.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Mirrors, first match wins.
    #[serde(default, rename = "registry")]
    pub registries: Vec<Registry>,
    /// Who is served, and what pods may ask for.
    #[serde(default)]
    pub policy: Policy,
    /// Extended resource of pods → Slurm's gres, such as `"amd.com/gpu" = "gpu"`; it takes the place of the default.
    #[serde(default = "text::gres")]
    pub gres: BTreeMap<String, String>,
    /// What a job gets that says nothing.
    #[serde(default)]
    pub job: JobDefaults,
    /// Rates, bounds and patience.
    #[serde(default)]
    pub limits: Limits,
    /// Containers' logs.
    #[serde(default)]
    pub logs: Logs,
    /// Restarts of containers, and image pulls.
    #[serde(default)]
    pub backoff: Backoff,
    /// What lies with the values of pods on disk.
    #[serde(default)]
    pub values: Values,
    /// An agent that `serve --stdio` starts.
    #[serde(default)]
    pub serve: Serve,
    /// The file that this was read from.
    #[serde(skip)]
    pub source: Option<Source>,
}

/// Where a site file lies, so that its `[policy]` can be read again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The file.
    pub path: PathBuf,
    /// What `~/` stands for in it.
    pub home: Home,
}

/// Who owns the jobs.
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
    /// As in the site file and `AgentInfo`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Slurm => "slurm",
            Self::Local => "local",
        }
    }
}

/// What starts containers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RuntimeKind {
    /// Apptainer, else Singularity, whichever is found.
    #[default]
    Auto,
    /// Apptainer.
    Apptainer,
    /// SingularityCE.
    Singularity,
    /// No container: programs of the host. For tests and sites that forbid runtimes.
    Process,
}

impl RuntimeKind {
    /// As in the site file and `AgentInfo`.
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

/// Where the agent listens.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Listen {
    /// For kubelets and knocctl: mutual TLS.
    #[serde(deserialize_with = "text::address_or_none")]
    pub kubelet: Option<SocketAddr>,
    /// For shims: pinned keys.
    #[serde(deserialize_with = "text::address")]
    pub shim: SocketAddr,
    /// What shims are told to dial, `host:port`; empty: this host's addresses with the port of `shim`.
    pub shim_addresses: Vec<String>,
    /// The unix socket; unset: `$XDG_RUNTIME_DIR/knoc/agent.sock`, else `STATE_DIR/socket/agent.sock`.
    pub socket: Option<PathBuf>,
}

impl Default for Listen {
    fn default() -> Self {
        Self {
            kubelet: Some(SocketAddr::from(([0, 0, 0, 0], 10350))),
            shim: SocketAddr::from(([0, 0, 0, 0], 10351)),
            shim_addresses: Vec::new(),
            socket: None,
        }
    }
}

/// PEM files; they are read again when they change.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// The CA of kubelets.
    pub ca: PathBuf,
    /// The agent's certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The CA's key, which renews certificates; unset: `ca` with the ending `.key`. It need not be there.
    #[serde(default)]
    pub ca_key: Option<PathBuf>,
}

impl Tls {
    /// Where the CA's key is looked for.
    #[must_use]
    pub fn ca_key(&self) -> PathBuf {
        let beside = || self.ca.with_extension("key");
        self.ca_key.clone().unwrap_or_else(beside)
    }
}

/// Absolute paths of tools; unset ones are looked up in `env.PATH`.
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
    pub apptainer: Option<PathBuf>,
    pub singularity: Option<PathBuf>,
    /// Not used: earlier versions' `init` named it.
    sacctmgr: Option<PathBuf>,
    /// See `sacctmgr`.
    srun: Option<PathBuf>,
}

impl Tools {
    /// Each with its name.
    fn named(&self) -> [(&'static str, &Option<PathBuf>); 8] {
        [
            ("sbatch", &self.sbatch),
            ("squeue", &self.squeue),
            ("sacct", &self.sacct),
            ("scancel", &self.scancel),
            ("sinfo", &self.sinfo),
            ("scontrol", &self.scontrol),
            ("apptainer", &self.apptainer),
            ("singularity", &self.singularity),
        ]
    }

    /// Those that are named, and that nothing uses.
    pub(crate) fn unused(&self) -> impl Iterator<Item = &'static str> {
        let unused = [("sacctmgr", &self.sacctmgr), ("srun", &self.srun)];
        let named = unused.into_iter().filter(|(_, path)| path.is_some());
        named.map(|(name, _)| name)
    }
}

/// `[[registry]]`: images whose name begins with `prefix` come from `mirror`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registry {
    /// Such as `docker.io` or `docker.io/library`.
    pub prefix: String,
    /// What stands in its place; unset: the prefix itself.
    #[serde(default)]
    pub mirror: Option<String>,
    /// Plain HTTP.
    #[serde(default)]
    pub insecure: bool,
}

/// Who is served, and what pods may ask for. The whole table is read again while the agent runs.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// UID of the namespace `kube-system` of the only cluster served; unset: pinned at first use.
    pub cluster_id: Option<String>,
    /// Identities served, such as `kubelet/knoc`; `*` at the end matches any rest. Empty: all that the CA vouches for.
    pub clients: Vec<String>,
    /// Certificates that are not served, with all that were renewed from them: `sha256/…` of a public key, `serial/…`, or
    /// an identity such as `ctl/ann`.
    pub denied: Vec<String>,
    /// Nodes that a kubelet with another name leads: node → `kubelet/NAME`. A kubelet always leads the node of its name.
    pub nodes: BTreeMap<String, String>,
    /// Namespaces whose pods are accepted; empty: all.
    pub namespaces: Vec<String>,
    /// Names of further sbatch flags that pods may give, such as `--mail-type`.
    pub flags: Vec<String>,
    /// Partitions that pods may name; empty: all.
    pub partitions: Vec<String>,
    /// Accounts that pods may name; empty: all.
    pub accounts: Vec<String>,
    /// QOS that pods may name; empty: all.
    pub qos: Vec<String>,
    /// Beginnings of the names of images that pods may name, such as `docker.io/library`; empty: all.
    pub registries: Vec<String>,
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
        }
    }
}

/// What a job gets that says nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct JobDefaults {
    /// `--partition`; unset: Slurm's default.
    pub partition: Option<String>,
    /// `--account`; unset: the user's default.
    pub account: Option<String>,
    /// `--qos`; unset: the association's.
    pub qos: Option<String>,
    /// `--time` in minutes; unset: the partition's DefaultTime, else its MaxTime.
    pub time_minutes: Option<u32>,
    /// Node-local folder of the shim.
    pub scratch: Option<String>,
}

/// Rates, bounds and patience.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Submissions a second, in the long run.
    pub sbatch_rate: f64,
    /// Submissions at once after a pause.
    pub sbatch_burst: u32,
    /// `sbatch` processes at the same time.
    pub sbatch_concurrency: usize,
    /// Image conversions at the same time.
    pub image_concurrency: usize,
    /// Bytes of an image by its manifest.
    #[serde(deserialize_with = "text::size")]
    pub image_size: u64,
    /// Bytes of an image that is unpacked.
    #[serde(deserialize_with = "text::size")]
    pub image_unpacked: u64,
    /// Bytes of all images in the cache: those that were not used for longest are removed first.
    #[serde(deserialize_with = "text::size")]
    pub image_cache: u64,
    /// How long a layer may bring less than 64 KiB, or less than 1 MiB while other images wait, before its pull fails.
    #[serde(deserialize_with = "text::duration")]
    pub image_stall: Duration,
    /// Shortest time between two rounds of `squeue`.
    #[serde(deserialize_with = "text::duration")]
    pub poll_min: Duration,
    /// Longest time between two rounds while there are pods.
    #[serde(deserialize_with = "text::duration")]
    pub poll_max: Duration,
    /// How long a report of an ended job may take to show on the shared file system.
    #[serde(deserialize_with = "text::duration")]
    pub report_grace: Duration,
    /// How long a job may wait for a reason that never ends (PartitionTimeLimit …) before its pod fails.
    #[serde(deserialize_with = "text::duration")]
    pub never_ends_after: Duration,
    /// How long a job that the scheduler does not know may stay undecided.
    #[serde(deserialize_with = "text::duration")]
    pub lost_after: Duration,
    /// Past a pod's grace period, before its job is cancelled.
    #[serde(deserialize_with = "text::duration")]
    pub stop_slack: Duration,
    /// Pods at the same time; unset: what process limits carry.
    pub pods: Option<u32>,
    /// Threads on which bytes move: one carries several hundred MB/s, and more than one hand the same bytes to and fro.
    pub threads: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            sbatch_rate: 50.0,
            sbatch_burst: 100,
            sbatch_concurrency: 4,
            image_concurrency: 2,
            image_size: 64 << 30,
            image_unpacked: 128 << 30,
            image_cache: 256 << 30,
            image_stall: Duration::from_mins(1),
            poll_min: Duration::from_secs(1),
            poll_max: Duration::from_secs(30),
            report_grace: Duration::from_secs(90),
            never_ends_after: Duration::from_mins(10),
            lost_after: Duration::from_mins(5),
            stop_slack: Duration::from_secs(15),
            pods: None,
            threads: 1,
        }
    }
}

/// Containers' logs.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Logs {
    /// Size at which a log is rotated.
    pub max_bytes: i64,
    /// Files kept of one attempt.
    pub max_files: i32,
    /// All logs of one pod. Each attempt that is kept of each container (two of them) has an equal share.
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

/// First and longest pause; it doubles between.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Backoff {
    /// First pause.
    #[serde(deserialize_with = "text::duration")]
    pub initial: Duration,
    /// Longest pause.
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

/// The values of pods: Secrets, tokens, environment.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Values {
    /// Where they wait for the job.
    pub at_rest: AtRest,
    /// Where they lie beside a running pod on a node without a usable `/dev/shm`.
    pub memory_fallback: MemoryFallback,
    /// How long a job whose pod was never started waits for values that are not there, or have expired, before the pod
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
    /// In `JOBDIR/values`, 0600 in a 0700 folder, until the shim takes them.
    #[default]
    File,
    /// In the agent's memory only: the pod waits for the link.
    None,
}

/// What becomes of values, and of volumes of the medium Memory, on a node without a usable `/dev/shm`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemoryFallback {
    /// The pod fails there.
    #[default]
    Error,
    /// They lie on the node's disk, and the pod says so.
    Disk,
}

/// An agent that is started on demand.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Serve {
    /// How long it goes on without any link.
    #[serde(deserialize_with = "text::duration")]
    pub linger: Duration,
}

impl Default for Serve {
    fn default() -> Self {
        Self {
            linger: Duration::from_mins(10),
        }
    }
}

/// The environment the file is read in: an argument, so that tests need no global.
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
            check::check(&config, &mut document);
            config
        });
        Ok(document.finish(config)?)
    }

    fn expand(&mut self, home: &Path) {
        let tls = self.tls.iter_mut().flat_map(|tls| {
            let named = [&mut tls.ca, &mut tls.cert, &mut tls.key];
            named.into_iter().chain(&mut tls.ca_key)
        });
        for path in tls
            .chain([&mut self.state_dir])
            .chain(&mut self.image_roots)
            .chain(&mut self.host_paths)
            .chain(&mut self.listen.socket)
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
        let words = format!("it is larger than {MAX_SIZE} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, words));
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
