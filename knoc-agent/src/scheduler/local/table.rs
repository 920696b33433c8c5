//! The table of local jobs, and what each of them does next. Blocking; one caller at a time.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::Arc,
};

use knoc_contract::jobdir::{
    JobDirError,
    atomic::{self, FileError},
    read_json, write_json,
};
use knoc_proto::ids::JobId;
use nix::sys::signal::Signal;

use super::{
    Settings, process,
    record::{Ending, EndingKind, Identity, Progress, Record, WRAPPER, ended_state, view},
};
use crate::{
    command::{Command, CommandError},
    scheduler::{Cancel, JobRef, JobState, JobView, SchedulerError, SubmitRequest},
};

#[derive(Debug)]
struct Job {
    record: Record,
    progress: Progress,
    /// TERM was requested before the batch script's process existed.
    term_due: bool,
}

#[derive(Debug)]
pub(super) struct Table {
    settings: Arc<Settings>,
    boot: String,
    host: String,
    /// `None` until the job directories have been read.
    jobs: Option<BTreeMap<u64, Job>>,
}

impl Table {
    pub(super) fn new(settings: Arc<Settings>) -> Self {
        let (boot, host) = (process::boot_id(), process::hostname());
        Self {
            settings,
            boot,
            host,
            jobs: None,
        }
    }

    /// Adds a job, and starts it if there is room.
    pub(super) fn submit(
        &mut self,
        request: &SubmitRequest,
        script: &str,
        now: i64,
    ) -> Result<JobId, SchedulerError> {
        self.load()?;
        let number = self.next_number()?;
        let id = JobId::try_from(number.to_string());
        let id = id.map_err(|_never| SchedulerError::Stopping)?;
        let record = Record {
            id: id.clone(),
            uid: request.uid.clone(),
            cluster_id: request.cluster_id.clone(),
            attempt: request.attempt,
            jobdir: request.jobdir.clone(),
            submitted_at: now,
            time_limit_minutes: time_limit(request, &self.settings),
            ending: None,
        };
        atomic::replace(&record.script(), script.as_bytes(), 0o600).map_err(JobDirError::from)?;
        write_json(&record.path(), &record)?;
        self.jobs
            .get_or_insert_default()
            .insert(number, Job::new(record));
        self.tick(now);
        Ok(id)
    }

    /// All jobs, oldest first, after everything that was due has been done.
    pub(super) fn views(&mut self, now: i64) -> Result<Vec<JobView>, SchedulerError> {
        self.load()?;
        self.tick(now);
        let host = &self.host;
        let jobs = self.jobs.get_or_insert_default().values();
        Ok(jobs
            .map(|job| view(&job.record, &job.progress, host))
            .collect())
    }

    pub(super) fn cancel(
        &mut self,
        job: &JobRef,
        how: Cancel,
        now: i64,
    ) -> Result<(), SchedulerError> {
        self.load()?;
        self.tick(now);
        let jobs = self.jobs.get_or_insert_default();
        let Some(job) = jobs.values_mut().find(|known| known.record.is_of(job)) else {
            return Ok(());
        };
        match (&job.progress, how) {
            (Progress::Queued, Cancel::Queued | Cancel::Kill) => {
                job.end(EndingKind::Cancelled, now)?;
                job.over(None, "", None, now);
            }
            (Progress::Running { identity, .. }, Cancel::Stop) => {
                // A job without a process is about to end anyway.
                process::signal_batch(identity, Signal::SIGUSR1);
            }
            (Progress::Running { identity, .. }, Cancel::Terminate) => {
                job.term_due = !process::signal_batch(identity, Signal::SIGTERM);
            }
            (Progress::Starting { .. }, Cancel::Stop | Cancel::Terminate) => job.term_due = true,
            (Progress::Running { .. } | Progress::Starting { .. }, Cancel::Kill) => {
                job.end(EndingKind::Cancelled, now)?;
            }
            (Progress::Running { .. } | Progress::Starting { .. }, Cancel::Queued)
            | (Progress::Queued, Cancel::Stop | Cancel::Terminate)
            | (Progress::Ended { .. }, _) => {}
        }
        Ok(())
    }

    fn tick(&mut self, now: i64) {
        let (boot, kill_wait) = (&self.boot, self.settings.kill_wait.as_secs().cast_signed());
        let jobs = self.jobs.get_or_insert_default();
        jobs.retain(|_, job| !job.is_forgotten());
        for job in jobs.values_mut() {
            job.look(boot, now);
            job.enforce(kill_wait, now);
        }
        let busy = |job: &&Job| {
            matches!(
                job.progress,
                Progress::Starting { .. } | Progress::Running { .. }
            )
        };
        let running = jobs.values().filter(busy).count();
        let limit = self.settings.max_running;
        let room = if limit == 0 {
            usize::MAX
        } else {
            limit.saturating_sub(running)
        };
        let queued = jobs
            .values_mut()
            .filter(|job| job.progress == Progress::Queued);
        for job in queued.take(room) {
            job.start(&self.settings, now);
        }
    }

    /// IDs grow over the lifetime of the state directory, so that none is used twice.
    fn next_number(&self) -> Result<u64, SchedulerError> {
        let root = self
            .settings
            .pods
            .parent()
            .unwrap_or_else(|| Path::new("/"));
        let path = root.join("local.seq");
        let text = atomic::read_optional(&path)
            .map_err(JobDirError::from)?
            .unwrap_or_default();
        let last = String::from_utf8_lossy(&text)
            .trim()
            .parse::<u64>()
            .unwrap_or(0);
        let known = self
            .jobs
            .iter()
            .flat_map(BTreeMap::keys)
            .max()
            .copied()
            .unwrap_or(0);
        let next = last.max(known) + 1;
        atomic::write(&path, format!("{next}\n").as_bytes(), 0o600).map_err(JobDirError::from)?;
        Ok(next)
    }

    fn load(&mut self) -> Result<(), SchedulerError> {
        if self.jobs.is_some() {
            return Ok(());
        }
        let mut jobs = BTreeMap::new();
        for dir in entries(&self.settings.pods)? {
            let Ok(files) = entries(&dir) else { continue };
            for path in files.into_iter().filter(|path| Record::is_record(path)) {
                let Some(record) = read_json::<Record>(&path)? else {
                    continue;
                };
                let Ok(number) = record.id.as_str().parse() else {
                    continue;
                };
                jobs.insert(number, Job::new(record));
            }
        }
        self.jobs = Some(jobs);
        Ok(())
    }
}

impl Job {
    fn new(record: Record) -> Self {
        Self {
            record,
            progress: Progress::Queued,
            term_due: false,
        }
    }

    /// Whether its job directory was removed, which means that the pod was forgotten.
    fn is_forgotten(&self) -> bool {
        matches!(self.progress, Progress::Ended { .. }) && !self.record.jobdir.exists()
    }

    /// Updates the progress from the job's files and processes.
    fn look(&mut self, boot: &str, now: i64) {
        match &self.progress {
            Progress::Ended { .. } => {}
            Progress::Queued | Progress::Starting { .. } => self.look_for_start(boot, now),
            Progress::Running { identity, at } => {
                let (lives, at) = (process::lives(identity, boot), *at);
                let rebooted = identity.boot != boot;
                if !lives {
                    self.look_for_exit(Some(at), rebooted, now);
                }
            }
        }
    }

    fn look_for_start(&mut self, boot: &str, now: i64) {
        let run = self.record.run();
        let file = run.join("id");
        if let Some(identity) = read_text(&file).as_deref().and_then(Identity::parse) {
            let at = modified(&file).unwrap_or(now);
            self.progress = Progress::Running { identity, at };
            self.look(boot, now);
        } else if let Progress::Starting { pid, at } = self.progress {
            // If the directory has no id, the wrapper died between its first two commands.
            if !process::is_there(pid) && !run.join("id").exists() {
                self.over(Some(at), "JobLaunchFailure", None, now);
            }
        } else if self.progress == Progress::Queued && self.record.ending.is_some() {
            self.over(None, "", None, now);
        } else if self.progress == Progress::Queued && run.exists() {
            // Another agent started the job, and the job has not written its id yet, or never will.
            let at = modified(&run).unwrap_or(now);
            if now - at > START_TIMEOUT_SECONDS {
                self.over(Some(at), "JobLaunchFailure", None, now);
            }
        }
    }

    fn look_for_exit(&mut self, started: Option<i64>, rebooted: bool, now: i64) {
        let file = self.record.run().join("exit");
        let code = read_text(&file).and_then(|text| text.trim().parse().ok());
        let at = modified(&file).unwrap_or(now);
        let reason = match code {
            Some(0) => "",
            Some(_) => "NonZeroExitCode",
            None => "NoExitCode",
        };
        self.over(started, reason, code, at);
        if let (Progress::Ended { state, .. }, true, None) = (&mut self.progress, rebooted, code) {
            *state = JobState::NodeFail;
        }
    }

    fn over(&mut self, started: Option<i64>, reason: &'static str, code: Option<i32>, at: i64) {
        let (state, exit) = ended_state(&self.record, code);
        self.progress = Progress::Ended {
            state,
            reason,
            exit,
            started,
            at,
        };
    }

    /// Marks the job as ending and sends TERM.
    fn end(&mut self, kind: EndingKind, now: i64) -> Result<(), SchedulerError> {
        if self.record.ending.is_none() {
            self.record.ending = Some(Ending { kind, at: now });
            write_json(&self.record.path(), &self.record)?;
            if let Progress::Running { identity, .. } = &self.progress {
                process::signal_all(identity, Signal::SIGTERM);
            }
        }
        Ok(())
    }

    /// Enforces the time limit, and sends KILL if TERM was not enough.
    fn enforce(&mut self, kill_wait: i64, now: i64) {
        let Progress::Running { identity, at } = &self.progress else {
            return;
        };
        if self.term_due {
            self.term_due = !process::signal_batch(identity, Signal::SIGTERM);
        }
        if let Some(ending) = self.record.ending {
            if now - ending.at >= kill_wait {
                process::signal_all(identity, Signal::SIGKILL);
            }
        } else if self
            .record
            .deadline(*at)
            .is_some_and(|deadline| now >= deadline)
            && let Err(err) = self.end(EndingKind::Timeout, now)
        {
            let error = knoc_proto::error::chain(&err);
            tracing::warn!(job = %self.record.id, error, "cannot end a job at its time limit");
        }
    }

    fn start(&mut self, site: &Settings, now: i64) {
        if self.record.run().exists() {
            return;
        }
        match self.spawn(site) {
            Ok(pid) => self.progress = Progress::Starting { pid, at: now },
            Err(err) => {
                let error = knoc_proto::error::chain(&err);
                tracing::warn!(job = %self.record.id, error, "cannot start a job");
                self.over(None, "JobLaunchFailure", None, now);
            }
        }
    }

    fn spawn(&self, site: &Settings) -> Result<i32, SchedulerError> {
        let output = self.record.jobdir.join("batch.out");
        let output = append(&output).map_err(JobDirError::from)?;
        let pid = self.command(site).spawn_detached(output);
        pid.map_err(|err: CommandError| err.into())
    }

    fn command(&self, site: &Settings) -> Command {
        let Record { id, jobdir, .. } = &self.record;
        Command::new("/bin/sh")
            .args(["-c", WRAPPER, "knoc-job"])
            .arg(self.record.script())
            .arg(self.record.run())
            .envs(site.env.iter().map(|(name, value)| (name, value)))
            .env("PATH", &site.path)
            .env("SLURM_JOB_ID", id.as_str())
            .env("SLURM_RESTART_COUNT", "0")
            .env("KNOC_SCHEDULER", "local")
            .current_dir(jobdir)
    }
}

/// The job writes its id microseconds after it creates the run directory; a slow file system may
/// take longer.
const START_TIMEOUT_SECONDS: i64 = 30;

fn time_limit(request: &SubmitRequest, site: &Settings) -> Option<i64> {
    let asked = request.spec.job.as_ref().map_or(0, |job| job.time_minutes);
    Some(asked)
        .filter(|minutes| *minutes > 0)
        .or(site.default_time_minutes)
}

fn append(path: &Path) -> Result<File, FileError> {
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path);
    file.map_err(FileError::on("open", path))
}

fn entries(dir: &Path) -> Result<Vec<std::path::PathBuf>, JobDirError> {
    let list = || {
        fs::read_dir(dir)?
            .map(|entry| Ok(entry?.path()))
            .collect::<std::io::Result<_>>()
    };
    match list() {
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        list => Ok(list.map_err(FileError::on("list", dir))?),
    }
}

fn read_text(path: &Path) -> Option<String> {
    let bytes = atomic::read_optional(path).ok().flatten()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// The file's modification time by the clock of its file system, in Unix seconds.
fn modified(path: &Path) -> Option<i64> {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).ok().map(|meta| meta.mtime())
}
