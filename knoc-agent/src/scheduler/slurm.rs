//! Slurm through its own commands, with options that every supported version has and that a plain
//! user may use.
//!
//! Owner task: none. Calls of `sbatch` are limited by a token bucket and by a number of concurrent
//! processes. All jobs are queried in one `squeue`, and those that have left the queue in one
//! `sacct`. The only state is what the last `sinfo` reported about the partitions' limits. No
//! string of a pod is ever passed to a shell, and a job ID alone never identifies a pod's job
//! ([`ownership`]).

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use knoc_proto::{
    ids::{JobId, PodUid},
    pb,
};
use tokio::{sync::Semaphore, time::Instant};

use super::{
    Cancel, JobRef, JobView, Rendered, Round, SchedulerError, SubmitError, SubmitErrorKind,
    SubmitRequest, Submitted,
};
use crate::command::{Command, CommandError, Output};

mod bucket;
mod checks;
mod enter;
mod flags;
mod nodes;
mod own_job;
mod ownership;
mod parse;
mod round;
pub(super) mod script;
mod settings;
mod shape;
mod submit_error;

pub(crate) use own_job::{OwnJobs, Size};
use ownership::Ownership;
pub use settings::Settings;

/// The largest output of squeue and sacct: 100,000 jobs with 300 bytes each.
const ANSWER_LIMIT: usize = 32 << 20;
/// How many `squeue`, `sacct` and `scancel` processes for single pods may run at the same time:
/// thousands of pods may be deleted at once.
const QUESTIONS: usize = 4;
/// How far back the accounting database is searched for a pod's jobs.
const FIND_WINDOW: &str = "now-7days";
/// How many characters of sbatch's output are shown if it contains no job ID.
const PRINTED: usize = 400;
/// How far the controller's clock may be behind ours; munge tolerates no more.
const CLOCKS_APART: Duration = Duration::from_mins(5);

/// The Slurm of this site.
#[derive(Debug)]
pub struct Slurm {
    settings: Settings,
    bucket: Mutex<bucket::Bucket>,
    submissions: Semaphore,
    /// Limits all other commands that are run for one pod.
    questions: Semaphore,
    /// `None` until `sinfo` has answered once.
    limits: Mutex<Option<Arc<[shape::PartitionLimits]>>>,
}

impl Slurm {
    /// Creates the scheduler. Runs no command yet.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let bucket = bucket::Bucket::new(settings.submit_burst, settings.submit_per_second);
        Self {
            bucket: Mutex::new(bucket),
            submissions: Semaphore::new(settings.submit_concurrency.max(1)),
            questions: Semaphore::new(QUESTIONS),
            limits: Mutex::new(None),
            settings,
        }
    }

    /// The settings that it was created with.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// A Slurm command with exactly the site's environment, which sbatch passes on to the job.
    fn command(&self, program: &std::path::Path) -> Command {
        let site = &self.settings;
        let command = Command::new(site.find(program))
            .envs(&site.env)
            .env("PATH", &site.path)
            .capture(ANSWER_LIMIT)
            .deadline(site.deadline);
        match &site.conf {
            Some(conf) => command.env("SLURM_CONF", conf),
            None => command,
        }
    }

    /// A command whose output is parsed: fixed locale, time zone and time format.
    fn question(&self, program: &std::path::Path) -> Command {
        let command = self.command(program).env("TZ", "UTC").env("LC_ALL", "C");
        command.env("SLURM_TIME_FORMAT", "standard")
    }

    async fn answer(
        &self,
        program: &'static str,
        command: Command,
    ) -> Result<String, SchedulerError> {
        let output = command.run().await?;
        if output.truncated {
            let problem = format!("it is longer than {ANSWER_LIMIT} bytes");
            return Err(SchedulerError::Answer { program, problem });
        }
        Ok(output.text())
    }

    pub(super) async fn version(&self) -> Result<String, SchedulerError> {
        let command = self.command(&self.settings.sbatch).arg("--version");
        let text = self.answer("sbatch", command).await?;
        let version = text
            .split_whitespace()
            .last()
            .filter(|word| word.contains('.'));
        let version = version.ok_or_else(|| SchedulerError::Answer {
            program: "sbatch",
            problem: format!("no version in {:?}", text.trim()),
        })?;
        Ok(format!("slurm {version}"))
    }

    pub(super) fn render(&self, request: &SubmitRequest) -> Result<Rendered, SubmitError> {
        script::render(
            request,
            &self.settings,
            &self.known_limits().unwrap_or_default(),
        )
    }

    fn known_limits(&self) -> Option<Arc<[shape::PartitionLimits]>> {
        let limits = self.limits.lock().unwrap_or_else(PoisonError::into_inner);
        limits.clone()
    }

    pub(super) async fn submit(
        &self,
        request: &SubmitRequest,
        allowed: impl Future<Output = Result<(), SubmitError>>,
    ) -> Result<Submitted, SubmitError> {
        if self.known_limits().is_none() {
            // The time limit may come from the partition: if it is unknown, a job might be
            // submitted that can never start.
            self.node_info().await.map_err(|error| SubmitError {
                kind: SubmitErrorKind::ControllerAway,
                message: knoc_proto::error::chain(&error),
                command: None,
            })?;
        }
        let Rendered {
            argv,
            script,
            notes,
        } = self.render(request)?;
        let wait = {
            let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
            bucket.take(Instant::now())
        };
        tokio::time::sleep(wait).await;
        let _place = self
            .submissions
            .acquire()
            .await
            .map_err(|_closed| SubmitError {
                kind: SubmitErrorKind::ControllerAway,
                message: "the agent is stopping".to_owned(),
                command: None,
            })?;
        let command = self.command(&self.settings.sbatch);
        let command = command.args(argv.iter().skip(1)).stdin(script);
        // The policy may have changed during the waits.
        allowed.await?;
        let began = Timestamp::now();
        let output = command.run().await.map_err(|error| {
            let error = submit_error::of_command(error, &argv);
            submit_error::explain(error, &argv)
        })?;
        let ended = Timestamp::now();
        let job = parsable(&output)?;
        Ok(Submitted {
            job,
            began,
            ended,
            notes,
        })
    }

    pub(super) async fn find(
        &self,
        uid: &PodUid,
        since: Timestamp,
    ) -> Result<Vec<JobView>, SchedulerError> {
        let _place = self.place().await?;
        let command = self.squeue(parse::SQUEUE_FORMAT_DIRECTORY);
        let rows = parse::squeue_with_directory(&self.answer("squeue", command).await?)
            .map_err(|problem| round::unreadable("squeue", problem))?;
        let mut jobs = self.of_pod(&rows, uid);
        let by_name = ["-S", FIND_WINDOW, "--name", &script::job_name(uid)].map(str::to_owned);
        // Jobs are matched under any name: all jobs of this user, but only those of the last
        // minutes.
        let since = (since - CLOCKS_APART).strftime("%Y-%m-%dT%H:%M:%S");
        let by_time = ["-S".to_owned(), since.to_string()];
        for filter in [&by_name[..], &by_time[..]] {
            if !jobs.is_empty() && filter.len() == by_time.len() {
                break;
            }
            for job in self.find_ended(uid, filter).await? {
                if !jobs.iter().any(|known| known.id == job.id) {
                    jobs.push(job);
                }
            }
        }
        jobs.sort_by_key(|job| std::cmp::Reverse(job.submitted_at));
        Ok(jobs)
    }

    /// The pod's jobs in the accounting database, the newest run of each first.
    async fn find_ended(
        &self,
        uid: &PodUid,
        filter: &[String],
    ) -> Result<Vec<JobView>, SchedulerError> {
        let command = self.sacct(parse::SACCT_FORMAT_DIRECTORY).args(filter);
        match self.answer("sacct", command).await {
            Ok(text) => {
                let mut rows = parse::sacct_with_directory(&text)
                    .map_err(|problem| round::unreadable("sacct", problem))?;
                rows.reverse();
                Ok(self.of_pod(&rows, uid))
            }
            Err(SchedulerError::Command(err)) if round::accounting_disabled(&err) => Ok(Vec::new()),
            Err(err) => Err(err),
        }
    }

    fn of_pod(&self, rows: &[parse::Row], uid: &PodUid) -> Vec<JobView> {
        let marked = rows.iter().filter_map(|row| {
            let marks = row.marks(uid, self.pods());
            marks.any().then(|| row.view(uid.clone(), marks))
        });
        marked.collect()
    }

    pub(super) async fn cancel(&self, job: &JobRef, how: Cancel) -> Result<(), SchedulerError> {
        let _place = self.place().await?;
        let command = self.command(&self.settings.scancel);
        let known = if job.named {
            None
        } else {
            self.look_at(job).await.unwrap_or_else(|error| {
                // Filtering by name is always safe and usually sufficient; the caller retries if
                // the job stays.
                let (job, uid, error) = (&job.id, &job.uid, knoc_proto::error::chain(&error));
                tracing::warn!(%job, %uid, error, "cannot check whose job it is before cancelling it");
                None
            })
        };
        let command = match known {
            // If the name is a filter, another job with the same ID cannot be cancelled.
            None => command.arg(format!("--name={}", script::job_name(&job.uid))),
            Some(Ownership::Ours(_)) => command,
            Some(Ownership::Stranger | Ownership::Doubt) => {
                let (job, uid) = (&job.id, &job.uid);
                tracing::info!(%job, %uid, "not cancelled: the ID belongs to another job by now");
                return Ok(());
            }
        };
        let command = match how {
            Cancel::Queued => command.arg("--state=PENDING"),
            Cancel::Stop => command.args(["--batch", "--signal=USR1"]),
            Cancel::Terminate => command.args(["--batch", "--signal=TERM"]),
            Cancel::Kill => command,
        };
        match command.arg(job.id.as_str()).run().await {
            Ok(_) => Ok(()),
            Err(err) if is_gone(&err) => Ok(()),
            Err(err) => Err(err.into()),
        }
    }

    /// Checks whose job has the ID now. Called right before cancelling a job that was last seen
    /// without the name we gave it. `None` if squeue does not show the job.
    async fn look_at(&self, job: &JobRef) -> Result<Option<Ownership>, SchedulerError> {
        let command = self.squeue(parse::SQUEUE_FORMAT_DIRECTORY);
        let command = command.args(["-j", job.id.as_str()]);
        let text = match self.answer("squeue", command).await {
            Ok(text) => text,
            Err(SchedulerError::Command(err)) if is_gone(&err) => return Ok(None),
            Err(err) => return Err(err),
        };
        let rows = parse::squeue_with_directory(&text)
            .map_err(|problem| round::unreadable("squeue", problem))?;
        let Some(row) = rows.into_iter().find(|row| row.id == job.id) else {
            return Ok(None);
        };
        match ownership::judge(&row, job, self.pods()) {
            Ownership::Doubt => {
                let decided = round::resolve_doubt(self, &row, job, &mut None).await;
                let problem = || format!("it does not tell whose job {} is", job.id);
                let decided = decided.ok_or_else(|| round::unreadable("scontrol", problem()));
                decided.map(Some)
            }
            sure @ (Ownership::Ours(_) | Ownership::Stranger) => Ok(Some(sure)),
        }
    }

    pub(super) async fn round(&self, known: &[JobRef]) -> Result<Round, SchedulerError> {
        round::round(self, known).await
    }

    pub(super) async fn node_info(&self) -> Result<pb::NodeInfo, SchedulerError> {
        let command = self.question(&self.settings.sinfo);
        let command = command.args(["--noheader", "--Node", "-o", nodes::SINFO_FORMAT]);
        let text = self.answer("sinfo", command).await?;
        nodes::check(&text).map_err(|problem| round::unreadable("sinfo", problem))?;
        let info = nodes::node_info(&text, &self.settings);
        let limits = Arc::from(nodes::limits(&text, &self.settings));
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner) = Some(limits);
        Ok(info)
    }

    async fn place(&self) -> Result<tokio::sync::SemaphorePermit<'_>, SchedulerError> {
        let place = self.questions.acquire().await;
        place.map_err(|_closed| SchedulerError::Stopping)
    }

    /// The directory of the job directories.
    fn pods(&self) -> &std::path::Path {
        &self.settings.pods
    }

    fn squeue(&self, format: &str) -> Command {
        let command = self.question(&self.settings.squeue);
        command.args([
            "--noheader",
            "--states=all",
            // Includes hidden partitions: a job that is not shown would count as gone.
            "--all",
            "--me",
            "-o",
            format,
        ])
    }

    fn sacct(&self, format: &str) -> Command {
        let command = self.question(&self.settings.sacct);
        command.args(["-P", "-n", "-X", "-D", "-o", format])
    }
}

/// Parses `4711` or `4711;cluster` on a line of its own, because wrappers may print more. If
/// several lines are numbers, none is used, and the job is found by its name.
fn parsable(output: &Output) -> Result<JobId, SubmitError> {
    let text = output.text();
    let mut numbers = text
        .lines()
        .map(|line| line.split(';').next().unwrap_or_default().trim())
        .filter(|word| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit()));
    let id = match (numbers.next(), numbers.next()) {
        (Some(id), None) => JobId::try_from(id).ok(),
        _ => None,
    };
    id.ok_or_else(|| SubmitError {
        kind: SubmitErrorKind::NoJobId,
        message: format!(
            "sbatch reported success without a job id; it printed: {}",
            printed(output)
        ),
        command: None,
    })
}

/// A command's output as one short line.
fn printed(output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    let text = [output.text(), errors.into_owned()].join("\n");
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if text.is_empty() {
        return "nothing".to_owned();
    }
    match text.char_indices().nth(PRINTED) {
        Some((end, _)) => format!("{} …", text.get(..end).unwrap_or_default()),
        None => text,
    }
}

/// Whether the job had ended before the signal arrived.
fn is_gone(err: &CommandError) -> bool {
    let message = err.message().unwrap_or_default().to_lowercase();
    [
        "invalid job id",
        "already completing or completed",
        "already finished",
    ]
    .iter()
    .any(|text| message.contains(text))
}
