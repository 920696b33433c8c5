//! Converts the layout of an image to a SIF file: on the login node, or in a short Slurm job if the site says so (ADR 0128).
//!
//! The caller holds the claim on the image, so it is converted once at a time. Cancel safety: a dropped conversion stops the
//! runtime, or cancels its job.

use std::{
    fs::File,
    io::{Read as _, Seek as _, SeekFrom},
    path::Path,
};

use super::{
    blocking::blocking,
    compression::Method,
    download::LONGEST,
    local,
    progress::Step,
    pull::{LAYOUT, Puller, SIF},
    slots::Slot,
    turn::Turn,
    untrusted::{fatal, shown, why},
};
use crate::{
    command::{Command, CommandError, CommandErrorKind},
    scheduler::slurm::OwnJobs,
};

/// How much of the runtime's output is kept.
const MAX_OUTPUT: usize = 64 * 1024;
/// What Slurm writes into the output of a job that it stops.
const STOPPED: &str = " CANCELLED AT ";
/// How sbatch's output begins once it has submitted a job.
const SUBMITTED: &str = "Submitted batch job";

/// A conversion that failed.
struct Failed {
    message: String,
    /// Whether the runtime failed, and was not stopped: another compression may help.
    by_itself: bool,
}

impl Puller {
    /// Converts the layout in the pull's folder, in its turn at the slot.
    pub(super) async fn convert(
        &self,
        folder: &Path,
        slot: Slot,
        turn: &Turn,
    ) -> Result<(), String> {
        self.progress.enter(Step::Converts);
        let converted = self.converted(folder);
        // A job takes no processor of the login node, and may wait for long.
        if self.settings.jobs.is_some() {
            drop(slot);
            return converted.await;
        }
        let _slot = slot;
        turn.limit(converted).await
    }

    /// Converts the layout. An image that cannot be compressed as it should be is compressed with gzip.
    async fn converted(&self, folder: &Path) -> Result<(), String> {
        let method = self.compressor.method(&self.settings).await;
        let Err(failed) = self.conversion(method, folder).await else {
            return Ok(());
        };
        if method == Method::Gzip || !failed.by_itself {
            return Err(failed.message);
        }
        // Only if this succeeds was it the compression.
        let again = self.conversion(Method::Gzip, folder).await;
        again.map_err(|failed| failed.message)?;
        self.compressor.failed(method, failed.message);
        Ok(())
    }

    async fn conversion(&self, method: Method, folder: &Path) -> Result<(), Failed> {
        let source = format!("oci:{LAYOUT}");
        let argv = method.argv(SIF, &source);
        if let Some(jobs) = &self.settings.jobs {
            return self.by_job(jobs, &argv, folder).await;
        }
        let command = self.settings.command().ok_or_else(|| Failed {
            message: "this site has no container runtime".to_owned(),
            by_itself: false,
        })?;
        let command = in_folder(command, folder)
            .args(argv)
            .current_dir(folder)
            .deadline(self.settings.pull_timeout)
            .capture(MAX_OUTPUT);
        command.run().await.map(drop).map_err(|error| Failed {
            message: why(&error),
            by_itself: has_exited(&error),
        })
    }

    async fn by_job(&self, jobs: &OwnJobs, argv: &[&str], folder: &Path) -> Result<(), Failed> {
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        self.progress.by_job(&OwnJobs::job_name(&name));
        let program = self.settings.program.clone().unwrap_or_default();
        let command = jobs.command(&name, folder, &program, argv);
        let command = in_folder(command, folder).deadline(LONGEST);
        let ended = jobs.wait(&name, command).await;
        // Slurm has no exit code but 0 for a job that was cancelled in the queue, that reached its limit, or that is forgotten.
        let well = ended.is_ok();
        let (sif, output) = (folder.join(SIF), folder.join(OwnJobs::OUTPUT));
        let look = move || Ok((well && is_whole(&sif), read(&output)));
        let (done, output) = blocking(look).await.unwrap_or_default();
        if done {
            return Ok(());
        }
        let message = explain(&ended, output.trim());
        Err(Failed {
            message: format!("the Slurm job that is to convert the image: {message}"),
            by_itself: ended.is_err_and(|error| has_exited(&error))
                && output.contains("FATAL")
                && !output.contains(STOPPED),
        })
    }
}

/// PURE: why a job has made no image, by how it ended and what it has written.
fn explain(ended: &Result<(), CommandError>, output: &str) -> String {
    let said = fatal(output);
    match ended {
        // Nothing of what it has written says why.
        Ok(()) if said == output => {
            "it ended before it had made the image: it may have been cancelled, or its node has failed"
                .to_owned()
        }
        // It was not accepted, or it could not even write.
        Err(error) if output.is_empty() => match error.message() {
            Some(text) if text.starts_with(SUBMITTED) => format!(
                "{}, and it has written nothing: it may have been cancelled, or the nodes of its partition cannot write to the agent's \
                 state directory",
                shown(text)
            ),
            Some(_) | None => why(error),
        },
        Ok(()) | Err(_) => shown(&said),
    }
}

/// Whether it has ended by itself, and was not stopped.
fn has_exited(error: &CommandError) -> bool {
    matches!(error.kind, CommandErrorKind::Exit { code: Some(_), .. })
}

/// Whether the runtime has made the file, and was not stopped before it was complete. Blocking.
fn is_whole(sif: &Path) -> bool {
    matches!(local::open(sif), Ok(Some((_, file))) if local::is_whole(&file))
}

/// Lets the runtime keep its temporary files in the folder of the pull, which has room for them.
fn in_folder(command: Command, folder: &Path) -> Command {
    let folders = ["TMPDIR", "CACHEDIR"];
    folders.into_iter().fold(command, |command, name| {
        command
            .env(format!("APPTAINER_{name}"), folder)
            .env(format!("SINGULARITY_{name}"), folder)
    })
}

/// The end of what a job has written, which says why it failed; empty if it has not started. Blocking.
fn read(path: &Path) -> String {
    let mut bytes = Vec::new();
    if let Ok(mut file) = File::open(path) {
        let most = u64::try_from(MAX_OUTPUT).unwrap_or_default();
        let length = file.metadata().map_or(0, |about| about.len());
        file.seek(SeekFrom::Start(length.saturating_sub(most))).ok();
        file.take(most).read_to_end(&mut bytes).ok();
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
