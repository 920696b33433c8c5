//! Jobs of the agent's own, which belong to no pod: each runs one program in a folder, and is waited for.
//!
//! Such a job is known by its name, which the name of the folder is part of: a folder that is still there is the record of a job
//! that may be too. The names begin otherwise than those of pods' jobs, so no round takes one for a pod's. Cancel safety: the
//! jobs of a wait that is dropped are cancelled.

use std::{fs::File, path::Path, time::Duration};

use super::{
    Settings, Slurm,
    script::{batch, quote},
    submit_error::classify,
};
use crate::{
    command::{Command, CommandError, CommandErrorKind},
    scheduler::SubmitErrorKind,
};

/// What such a job may use.
#[derive(Debug, Clone)]
pub(crate) struct Size {
    /// The partition; if unset, that of pods that name none.
    pub(crate) partition: Option<String>,
    pub(crate) cpus: u32,
    /// In bytes.
    pub(crate) memory: u64,
    pub(crate) time: Duration,
}

/// Submits the agent's own jobs.
#[derive(Debug)]
pub(crate) struct OwnJobs {
    slurm: Slurm,
    /// The arguments of sbatch that all of them have.
    options: Vec<String>,
}

impl OwnJobs {
    /// The name of the file in the folder with what the job has written.
    pub(crate) const OUTPUT: &str = "job.out";

    /// Submits jobs of that size. Runs no command yet.
    pub(crate) fn new(settings: Settings, size: Size) -> Self {
        let same = [
            "--wait",
            "--nodes=1",
            "--ntasks=1",
            "--no-requeue",
            // As for the jobs of pods.
            "--export=ALL",
            "--propagate=NONE",
        ];
        let mut options = Vec::from(same.map(str::to_owned));
        options.extend([
            format!("--output={}", Self::OUTPUT),
            format!("--cpus-per-task={}", size.cpus),
            format!("--mem={}M", size.memory.div_ceil(1 << 20)),
            format!("--time={}", size.time.as_secs().div_ceil(60)),
        ]);
        let named = [
            (
                "partition",
                size.partition.or_else(|| settings.partition.clone()),
            ),
            ("account", settings.account.clone()),
            ("qos", settings.qos.clone()),
        ];
        let named = named.into_iter();
        options.extend(named.filter_map(|(name, value)| Some(format!("--{name}={}", value?))));
        Self {
            slurm: Slurm::new(settings),
            options,
        }
    }

    /// The name of the job of the folder `name`.
    pub(crate) fn job_name(name: &str) -> String {
        format!("knoc_image_{name}")
    }

    /// The command that submits the job of a folder, and waits for it: the job runs the program there.
    pub(crate) fn command(
        &self,
        name: &str,
        folder: &Path,
        program: &Path,
        args: &[&str],
    ) -> Command {
        let settings = self.slurm.settings();
        let words = std::iter::once(program.to_string_lossy().into_owned());
        let words = words.chain(args.iter().map(|&arg| arg.to_owned()));
        let words: Vec<String> = words.map(|word| quote(&word)).collect();
        let command = self.slurm.command(&settings.sbatch);
        command
            .args(&self.options)
            .arg(format!("--job-name={}", Self::job_name(name)))
            .arg(format!("--chdir={}", folder.display()))
            .stdin(batch(&settings.prelude, "", &words))
    }

    /// Runs such a command until the job has ended. An error if it was not accepted, or has failed. Success says only that the exit
    /// code was 0, which Slurm also says of jobs that it has ended.
    pub(crate) async fn wait(&self, name: &str, command: Command) -> Result<(), CommandError> {
        let mut job = Waiting {
            jobs: self,
            name,
            over: false,
        };
        let done = command.run().await.map(drop);
        if done.as_ref().is_err_and(may_go_on) {
            // Awaited, because the next job of the folder has the same name.
            self.scancel(name).run().await.ok();
        }
        job.over = true;
        done
    }

    /// What ends the job of the folder `name`, if there is one.
    fn scancel(&self, name: &str) -> Command {
        let name = Self::job_name(name);
        let command = self.slurm.command(&self.slurm.settings().scancel);
        command.arg(format!("--name={name}"))
    }

    /// Cancels the job of the folder `name`, if there is one, without waiting for that.
    pub(crate) fn cancel(&self, name: &str) {
        // Without a runtime this process is about to end, and the next one cancels it.
        if tokio::runtime::Handle::try_current().is_err() {
            return;
        }
        let command = self.scancel(name);
        let output = File::options().write(true).open("/dev/null");
        if !matches!(
            output.map(|output| command.spawn_detached(output)),
            Ok(Ok(_))
        ) {
            tracing::warn!(name, "cannot cancel a job of our own; it ends by itself");
        }
    }
}

/// PURE: whether the job may be there, although nobody waits for it any more: sbatch took too long, was killed, or got no answer when
/// it submitted.
fn may_go_on(error: &CommandError) -> bool {
    match error.kind {
        CommandErrorKind::NotFound | CommandErrorKind::Spawn(_) => false,
        CommandErrorKind::Timeout { .. } | CommandErrorKind::Exit { code: None, .. } => true,
        CommandErrorKind::Exit { code: Some(_), .. } => {
            let message = error.message().unwrap_or_default();
            classify(message, &[]) == SubmitErrorKind::Ambiguous
        }
    }
}

/// A job that is waited for, and cancelled when this is dropped before it is over.
struct Waiting<'a> {
    jobs: &'a OwnJobs,
    name: &'a str,
    over: bool,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if !self.over {
            self.jobs.cancel(self.name);
        }
    }
}

#[cfg(test)]
mod tests;
