//! What the Slurm commands need from the site file. The defaults suit a plain Slurm.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    command::login_environment,
    config::{Config, Policy, text},
    policy::Live,
};

/// How this site's Slurm is called, and the defaults for jobs.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Path of sbatch; a bare name is looked up in `path`.
    pub sbatch: PathBuf,
    /// Path of squeue, like `sbatch`.
    pub squeue: PathBuf,
    /// Path of sacct, like `sbatch`.
    pub sacct: PathBuf,
    /// Path of scancel, like `sbatch`.
    pub scancel: PathBuf,
    /// Path of sinfo, like `sbatch`.
    pub sinfo: PathBuf,
    /// Path of scontrol, like `sbatch`.
    pub scontrol: PathBuf,
    /// Path of srun, like `sbatch`.
    pub srun: PathBuf,
    /// PATH of the commands.
    pub path: String,
    /// `SLURM_CONF` of the commands, if it is not Slurm's built-in path.
    pub conf: Option<PathBuf>,
    /// Further environment of the commands and of the jobs: a batch script gets only this in
    /// addition to Slurm's own variables.
    pub env: BTreeMap<String, String>,
    /// Lines of the batch script before the shim (`module load …`). They come from the site file,
    /// never from a pod.
    pub prelude: String,
    /// Partition of pods that name none.
    pub partition: Option<String>,
    /// Account of pods that name none.
    pub account: Option<String>,
    /// QOS of pods that name none.
    pub qos: Option<String>,
    /// The current policy: which partitions, accounts, QOS and flags pods may name.
    pub policy: Live,
    /// Time limit of pods that name none; if unset, the partition's.
    pub default_time_minutes: Option<i64>,
    /// Extended resource → Slurm's gres name, such as `"amd.com/gpu" = "gpu"`.
    pub gres: BTreeMap<String, String>,
    /// Memory for the shim, which is added to the pod's memory.
    pub shim_memory_mib: i64,
    /// How many submissions may come in a burst.
    pub submit_burst: u32,
    /// How many submissions per second are allowed after a burst.
    pub submit_per_second: f64,
    /// How many `sbatch` processes may run at the same time.
    pub submit_concurrency: usize,
    /// Deadline of each command.
    pub deadline: Duration,
    /// The shortest interval between two rounds.
    pub round_interval: Duration,
    /// Directory of the job directories, one per pod; a job's working directory is that of its pod.
    pub pods: PathBuf,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            sbatch: PathBuf::from("sbatch"),
            squeue: PathBuf::from("squeue"),
            sacct: PathBuf::from("sacct"),
            scancel: PathBuf::from("scancel"),
            sinfo: PathBuf::from("sinfo"),
            scontrol: PathBuf::from("scontrol"),
            srun: PathBuf::from("srun"),
            path: "/usr/local/bin:/usr/bin:/bin".to_owned(),
            conf: None,
            env: BTreeMap::new(),
            prelude: String::new(),
            partition: None,
            account: None,
            qos: None,
            policy: Live::fixed(Policy {
                flags: Vec::new(),
                ..Policy::default()
            }),
            default_time_minutes: None,
            gres: text::gres(),
            shim_memory_mib: 64,
            submit_burst: 100,
            submit_per_second: 50.0,
            submit_concurrency: 4,
            deadline: Duration::from_mins(1),
            round_interval: Duration::from_secs(1),
            pods: PathBuf::from("/nonexistent"),
        }
    }
}

impl From<&Config> for Settings {
    fn from(site: &Config) -> Self {
        let default = Self::default();
        let tool = |path: &Option<PathBuf>, name: PathBuf| path.clone().unwrap_or(name);
        let mut env = login_environment();
        env.extend(site.env.clone());
        Self {
            sbatch: tool(&site.tools.sbatch, default.sbatch),
            squeue: tool(&site.tools.squeue, default.squeue),
            sacct: tool(&site.tools.sacct, default.sacct),
            scancel: tool(&site.tools.scancel, default.scancel),
            sinfo: tool(&site.tools.sinfo, default.sinfo),
            scontrol: tool(&site.tools.scontrol, default.scontrol),
            srun: tool(&site.tools.srun, default.srun),
            path: env.remove("PATH").unwrap_or(default.path),
            conf: env.remove("SLURM_CONF").map(PathBuf::from),
            env,
            prelude: site.prelude.clone(),
            partition: site.job.partition.clone(),
            account: site.job.account.clone(),
            qos: site.job.qos.clone(),
            policy: Live::fixed(site.policy.clone()),
            default_time_minutes: site.job.time_minutes.map(i64::from),
            gres: site.gres.clone(),
            submit_burst: site.limits.sbatch_burst,
            submit_per_second: site.limits.sbatch_rate,
            submit_concurrency: site.limits.sbatch_concurrency,
            round_interval: site.limits.poll_min,
            ..Self::default()
        }
    }
}

impl Settings {
    /// The settings of the site file; `pods` is the directory of the job directories.
    #[must_use]
    pub fn of_site(site: &Config, pods: PathBuf) -> Self {
        Self {
            pods,
            ..Self::from(site)
        }
    }

    /// The program as an absolute path. A bare name is looked up in the site's PATH, not in the
    /// agent's; if it is not found, the result is a path that does not exist.
    #[must_use]
    pub fn find(&self, program: &Path) -> PathBuf {
        if program.components().count() > 1 {
            return program.to_owned();
        }
        let mut dirs = self.path.split(':').filter(|dir| dir.starts_with('/'));
        let found = dirs.find(|dir| Path::new(dir).join(program).is_file());
        found.map_or_else(
            || Path::new("/nonexistent").join(program),
            |dir| Path::new(dir).join(program),
        )
    }
}
