//! Slurm by its own commands: the ones that every version has, and nothing that a plain user may not.
//!
//! Owner task: none. `sbatch` is behind a token bucket and a bound on processes; all jobs are asked
//! for in one `squeue`, and in one `sacct` where some left the queue. It keeps no state but what the
//! last `sinfo` said of the partitions' limits. What it never does: it gives no pod string to a shell,
//! and it believes no job id whose name is not the pod's.

use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use knoc_proto::ids::{JobId, PodUid};
use knoc_proto::pb;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::{
    Cancel, JobRef, JobView, Refusal, RefusalKind, Rendered, Round, SchedulerError, SubmitRequest,
    Submitted,
};
use crate::command::{Command, CommandError, Output};

mod bucket;
mod checks;
mod flags;
mod nodes;
mod parse;
mod refusal;
mod round;
pub(super) mod script;
mod settings;
mod shape;

pub use settings::Settings;
pub(crate) use shape::requeue;

/// Answers of squeue and sacct: 100,000 jobs of 300 bytes.
const ANSWER_LIMIT: usize = 32 << 20;
/// `squeue`, `sacct` and `scancel` for single pods at the same time: a namespace of thousands may be deleted at once.
const QUESTIONS: usize = 4;
/// How far back the accounting is searched for a job that is known by its pod only.
const FIND_WINDOW: &str = "now-7days";

/// The Slurm of this site.
#[derive(Debug)]
pub struct Slurm {
    settings: Settings,
    bucket: Mutex<bucket::Bucket>,
    submissions: Semaphore,
    /// All other commands that are started for one pod.
    questions: Semaphore,
    /// `None` until `sinfo` has answered once.
    limits: Mutex<Option<Arc<[shape::PartitionLimits]>>>,
}

impl Slurm {
    /// Asks nothing yet.
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

    /// What it was made with.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// A Slurm command with the site's environment, and nothing else: sbatch hands it to the job.
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

    /// A command whose answer is parsed: one language, one time zone, one form of times.
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

    pub(super) fn render(&self, request: &SubmitRequest) -> Result<Rendered, Refusal> {
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
        allowed: impl Future<Output = Result<(), Refusal>>,
    ) -> Result<Submitted, Refusal> {
        if self.known_limits().is_none() {
            // The time limit comes from the partition: without it a job would be submitted that can never start.
            self.node_info().await.map_err(|error| Refusal {
                kind: RefusalKind::ControllerAway,
                words: knoc_proto::error::chain(&error),
                command: None,
            })?;
        }
        let rendered = self.render(request)?;
        let wait = {
            let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
            bucket.take(Instant::now())
        };
        tokio::time::sleep(wait).await;
        let _place = self
            .submissions
            .acquire()
            .await
            .map_err(|_closed| Refusal {
                kind: RefusalKind::ControllerAway,
                words: "the agent stops".to_owned(),
                command: None,
            })?;
        let command = self.command(&self.settings.sbatch);
        let command = command
            .args(rendered.argv.iter().skip(1))
            .stdin(rendered.script);
        // What was so before the waits may not be so any more.
        allowed.await?;
        let began = Timestamp::now();
        let output = command.run().await.map_err(refusal::of_command)?;
        let ended = Timestamp::now();
        let job = parsable(&output)?;
        Ok(Submitted { job, began, ended })
    }

    pub(super) async fn find(&self, uid: &PodUid) -> Result<Vec<JobView>, SchedulerError> {
        let _place = self.place().await?;
        let name = script::job_name(uid);
        let command = self.squeue().arg("--name").arg(&name);
        let mut jobs = parse::squeue(&self.answer("squeue", command).await?);
        let command = self.sacct().args(["-S", FIND_WINDOW, "--name"]).arg(&name);
        match self.answer("sacct", command).await {
            Ok(text) => {
                for job in parse::sacct(&text).into_iter().rev() {
                    if !jobs.iter().any(|known| known.id == job.id) {
                        jobs.push(job);
                    }
                }
            }
            Err(SchedulerError::Command(err)) if round::accounting_disabled(&err) => {}
            Err(err) => return Err(err),
        }
        jobs.retain(|job| &job.uid == uid);
        jobs.sort_by_key(|job| std::cmp::Reverse(job.submitted_at));
        Ok(jobs)
    }

    pub(super) async fn cancel(&self, job: &JobRef, how: Cancel) -> Result<(), SchedulerError> {
        let _place = self.place().await?;
        // With the name as a filter the id cannot be another job's.
        let name = format!("--name={}", script::job_name(&job.uid));
        let command = self.command(&self.settings.scancel).arg(name);
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

    pub(super) async fn round(&self, known: &[JobRef]) -> Result<Round, SchedulerError> {
        round::round(self, known).await
    }

    pub(super) async fn node_info(&self) -> Result<pb::NodeInfo, SchedulerError> {
        let command = self.question(&self.settings.sinfo);
        let command = command.args(["--noheader", "--Node", "-o", nodes::SINFO_FORMAT]);
        let info = nodes::node_info(&self.answer("sinfo", command).await?, &self.settings);
        let limits = Arc::from(nodes::limits(&info));
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner) = Some(limits);
        Ok(info)
    }

    async fn place(&self) -> Result<tokio::sync::SemaphorePermit<'_>, SchedulerError> {
        let place = self.questions.acquire().await;
        place.map_err(|_closed| SchedulerError::Stopping)
    }

    fn squeue(&self) -> Command {
        let command = self.question(&self.settings.squeue);
        command.args([
            "--noheader",
            "--states=all",
            // Hidden partitions too: a job that is not shown would count as gone.
            "--all",
            "--me",
            "-o",
            parse::SQUEUE_FORMAT,
        ])
    }

    fn sacct(&self) -> Command {
        let command = self.question(&self.settings.sacct);
        command.args(["-P", "-n", "-X", "-D", "-o", parse::SACCT_FORMAT])
    }
}

/// `4711` or `4711;cluster`.
fn parsable(output: &Output) -> Result<JobId, Refusal> {
    let text = output.text();
    let id = text
        .lines()
        .last()
        .and_then(|line| line.split(';').next())
        .unwrap_or_default()
        .trim();
    let number = Some(id).filter(|id| id.bytes().all(|byte| byte.is_ascii_digit()));
    number
        .and_then(|id| JobId::try_from(id).ok())
        .ok_or_else(|| Refusal {
            kind: RefusalKind::Ambiguous,
            words: format!("sbatch succeeded without a job id: {:?}", text.trim()),
            command: None,
        })
}

/// The job ended before the signal came.
fn is_gone(err: &CommandError) -> bool {
    let words = err.words().unwrap_or_default().to_lowercase();
    [
        "invalid job id",
        "already completing or completed",
        "already finished",
    ]
    .iter()
    .any(|text| words.contains(text))
}
