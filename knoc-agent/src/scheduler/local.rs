//! The embedded scheduler: jobs are process sessions on the agent's own host.
//!
//! The quick start and the fast tests use it. It gives the guarantees that pods need from Slurm: a
//! job outlives the agent, is found again with its exit code, is started at most once, waits with
//! the reason `Resources` if the host is full, and ends at its time limit. The state of a job is in
//! its job directory (see [`record`]); this module is the table of all jobs.
//!
//! Owner task: none. Nothing happens between two calls: the next [`Local::round`] starts queued
//! jobs and enforces time limits. The work is blocking file work, so every call runs on a blocking
//! thread.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use knoc_proto::{ids::PodUid, pb};

use super::{
    Accounting, Cancel, JobRef, JobView, Rendered, Round, SchedulerError, SubmitError,
    SubmitErrorKind, SubmitRequest, Submitted, slurm::script::script,
};
use crate::{
    command::{Command, login_environment},
    config::Config,
};
use table::Table;

mod process;
mod record;
mod table;

/// A round costs only a few reads of /proc.
pub const ROUND_INTERVAL: Duration = Duration::from_millis(200);

/// What the scheduler needs from the site file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Directory of the job directories, where jobs of earlier agents are found.
    pub pods: PathBuf,
    /// How many jobs run at once; further jobs wait with the reason `Resources`. 0 means no limit.
    pub max_running: usize,
    /// PATH of the batch script.
    pub path: String,
    /// Further environment of the batch script.
    pub env: Vec<(String, String)>,
    /// Lines of the batch script before the shim. They come from the site file, never from a pod.
    pub prelude: String,
    /// Time limit of pods that request none; `None` means unlimited.
    pub default_time_minutes: Option<i64>,
    /// Time between TERM and KILL, for a job that is cancelled or reaches its time limit.
    pub kill_wait: Duration,
}

impl Settings {
    /// Settings with defaults for everything but the directory.
    #[must_use]
    pub fn new(pods: PathBuf) -> Self {
        Self {
            pods,
            max_running: 0,
            path: "/usr/local/bin:/usr/bin:/bin".to_owned(),
            env: Vec::new(),
            prelude: String::new(),
            default_time_minutes: None,
            kill_wait: Duration::from_secs(5),
        }
    }

    /// The settings of the site file.
    #[must_use]
    pub fn of_site(site: &Config, pods: PathBuf) -> Self {
        let default = Self::new(pods);
        let mut env = login_environment();
        env.extend(site.env.clone());
        Self {
            path: env.remove("PATH").unwrap_or(default.path),
            env: env.into_iter().collect(),
            prelude: site.prelude.clone(),
            default_time_minutes: site.job.time_minutes.map(i64::from),
            ..Self::new(default.pods)
        }
    }
}

/// The embedded scheduler.
#[derive(Debug)]
pub struct Local {
    settings: Arc<Settings>,
    table: Arc<Mutex<Table>>,
}

impl Local {
    /// Creates the scheduler. Nothing is read yet: the first call finds the jobs of earlier agents.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let settings = Arc::new(settings);
        let table = Arc::new(Mutex::new(Table::new(Arc::clone(&settings))));
        Self { settings, table }
    }

    /// Jobs run on this host, so `program` does too.
    pub(super) fn enter(&self, program: &Path, args: [&OsStr; 2]) -> Command {
        let command = Command::new(program).args(args).capture(4096);
        command.env("PATH", &self.settings.path)
    }

    pub(super) fn render(&self, request: &SubmitRequest) -> Result<Rendered, SubmitError> {
        let job = request.spec.job.as_ref();
        if job.is_some_and(|job| job.mpi.is_some()) {
            return Err(SubmitError::permanent(
                "knoc.io/mpi, knoc.io/nodes: the scheduler `local` has one node and no srun, which starts ranks; leave these \
                 annotations out, or use a site with Slurm",
            ));
        }
        let script = script(&self.settings.prelude, &request.shim, &request.jobdir)?;
        let argv = vec![
            "/bin/sh".to_owned(),
            "-c".to_owned(),
            record::WRAPPER.to_owned(),
        ];
        Ok(Rendered {
            argv,
            script,
            notes: Vec::new(),
        })
    }

    pub(super) async fn submit(
        &self,
        request: &SubmitRequest,
        allowed: impl Future<Output = Result<(), SubmitError>>,
    ) -> Result<Submitted, SubmitError> {
        let script = self.render(request)?.script;
        let request = request.clone();
        allowed.await?;
        let began = Timestamp::now();
        let job = self
            .with(move |table| table.submit(&request, &script, began.as_second()))
            .await;
        let job = job.map_err(|err| SubmitError {
            kind: SubmitErrorKind::Ambiguous,
            message: knoc_proto::error::chain(&err),
            command: None,
        })?;
        Ok(Submitted {
            job,
            began,
            ended: Timestamp::now(),
            notes: Vec::new(),
        })
    }

    pub(super) async fn find(&self, uid: &PodUid) -> Result<Vec<JobView>, SchedulerError> {
        let (uid, now) = (uid.clone(), Timestamp::now().as_second());
        let mut jobs = self.with(move |table| table.views(now)).await?;
        jobs.retain(|job| job.uid == uid);
        jobs.reverse();
        Ok(jobs)
    }

    pub(super) async fn cancel(&self, job: &JobRef, how: Cancel) -> Result<(), SchedulerError> {
        let (job, now) = (job.clone(), Timestamp::now().as_second());
        self.with(move |table| table.cancel(&job, how, now)).await
    }

    pub(super) async fn round(&self, known: &[JobRef]) -> Result<Round, SchedulerError> {
        let now = Timestamp::now().as_second();
        let jobs = self.with(move |table| table.views(now)).await?;
        let there = |job: &&JobRef| jobs.iter().any(|view| job.is(view));
        let missing = known.iter().filter(|job| !there(job)).cloned().collect();
        Ok(Round {
            jobs,
            missing,
            accounting: Accounting::Answered,
        })
    }

    /// This host, as one partition.
    pub(super) fn node_info(&self) -> pb::NodeInfo {
        let host = process::host();
        let partition = pb::Partition {
            name: record::PARTITION.to_owned(),
            is_default: true,
            state: "up".to_owned(),
            default_time_minutes: self.settings.default_time_minutes.unwrap_or(0),
            cpu: host.cpu,
            memory_bytes: host.memory_bytes,
            nodes: 1,
            ..Default::default()
        };
        pb::NodeInfo {
            cpu: host.cpu,
            memory_bytes: host.memory_bytes,
            nodes_total: 1,
            nodes_available: 1,
            partitions: vec![partition],
            ..Default::default()
        }
    }

    pub(super) fn check(&self) -> pb::Finding {
        let pods = &self.settings.pods;
        pb::Finding {
            check: "local: job directories".to_owned(),
            ok: pods.is_dir(),
            detail: format!(
                "jobs are processes of this host, kept in {}",
                pods.display()
            ),
            cure: if pods.is_dir() {
                String::new()
            } else {
                "start the agent once".to_owned()
            },
        }
    }

    async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Table) -> Result<T, SchedulerError> + Send + 'static,
    ) -> Result<T, SchedulerError> {
        let table = Arc::clone(&self.table);
        let done = tokio::task::spawn_blocking(move || {
            work(&mut table.lock().unwrap_or_else(PoisonError::into_inner))
        });
        done.await.map_err(|_cancelled| SchedulerError::Stopping)?
    }
}

#[cfg(test)]
mod tests;
