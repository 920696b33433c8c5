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
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use knoc_proto::settings::{Document, Mistakes};
use serde::Deserialize;

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
    /// Folders under which pods may mount host paths: none yet, since every `hostPath` is refused.
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
    #[serde(deserialize_with = "text::address")]
    pub kubelet: SocketAddr,
    /// For shims: pinned keys.
    #[serde(deserialize_with = "text::address")]
    pub shim: SocketAddr,
    /// What shims are told to dial, `host:port`; empty: this host's addresses with the port of `shim`.
    pub shim_addresses: Vec<String>,
    /// The unix socket; unset: `$XDG_RUNTIME_DIR/knoc/agent.sock`, else `/tmp/knoc-<uid>/agent.sock`.
    pub socket: Option<PathBuf>,
}

impl Default for Listen {
    fn default() -> Self {
        Self {
            kubelet: SocketAddr::from(([0, 0, 0, 0], 10350)),
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

/// Who is served, and what pods may ask for.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// UID of the namespace `kube-system` of the only cluster served; unset: pinned at first use.
    pub cluster_id: Option<String>,
    /// Identities served, such as `kubelet/knoc`; `*` at the end matches any rest. Empty: all that the CA vouches for.
    pub clients: Vec<String>,
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
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            cluster_id: None,
            clients: Vec::new(),
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
}

impl Default for Logs {
    fn default() -> Self {
        Self {
            max_bytes: 100 << 20,
            max_files: 20,
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
    /// How long a job whose pod was never started waits for values that are not there, or have expired, before the pod
    /// fails (`ValuesMissing`, `ValuesExpired`).
    #[serde(deserialize_with = "text::duration")]
    pub wait: Duration,
}

impl Default for Values {
    fn default() -> Self {
        Self {
            at_rest: AtRest::default(),
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

/// The environment the file is read in: an argument, so that tests need no global.
#[derive(Debug, Clone)]
pub struct Home {
    /// `$HOME`.
    pub home: PathBuf,
}

impl Config {
    /// Reads and checks the site file.
    pub fn load(path: &Path, home: &Home) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path, home)
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
        let tls = self
            .tls
            .iter_mut()
            .flat_map(|tls| [&mut tls.ca, &mut tls.cert, &mut tls.key]);
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

#[cfg(test)]
mod tests;
