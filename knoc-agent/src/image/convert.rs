//! Converts the layout of an image to a SIF file: on the login node, or in a short Slurm job if the site says so (ADR 0128).
//!
//! The caller holds the claim on the image, so it is converted once at a time. Cancel safety: a dropped conversion stops the
//! runtime, or cancels its job.

use std::{fs::File, io::Read as _, path::Path};

use super::{
    compression::Method,
    download::LONGEST,
    progress::Step,
    pull::{LAYOUT, Puller, SIF, blocking},
    slots::Slot,
    untrusted::{fatal, shown, why},
};
use crate::{
    command::{Command, CommandErrorKind},
    scheduler::slurm::OwnJobs,
};

/// How much of the runtime's output is kept.
const MAX_OUTPUT: usize = 64 * 1024;

/// A conversion that failed.
struct Failed {
    message: String,
    /// Whether the runtime failed, and was not stopped: another compression may help.
    by_itself: bool,
}

impl Puller {
    /// Converts the layout in the pull's folder. An image that cannot be compressed as it should be is compressed with gzip.
    pub(super) async fn convert(&self, folder: &Path, slot: Slot) -> Result<(), String> {
        self.progress.enter(Step::Converts);
        // A job takes no processor of the login node, and may wait for long.
        let _slot = self.settings.jobs.is_none().then_some(slot);
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
            by_itself: matches!(error.kind, CommandErrorKind::Exit { code: Some(_), .. }),
        })
    }

    async fn by_job(&self, jobs: &OwnJobs, argv: &[&str], folder: &Path) -> Result<(), Failed> {
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        self.progress.by_job(&OwnJobs::job_name(&name));
        let program = self.settings.program.clone().unwrap_or_default();
        let command = jobs.command(&name, folder, &program, argv);
        let command = in_folder(command, folder).deadline(LONGEST);
        let Err(error) = jobs.wait(&name, command).await else {
            return Ok(());
        };
        let path = folder.join(OwnJobs::OUTPUT);
        let output = blocking(move || Ok(read(&path))).await.unwrap_or_default();
        let message = match output.trim() {
            // It was not accepted, did not start, or Slurm does not say.
            "" => why(&error),
            output => shown(&fatal(output)),
        };
        Err(Failed {
            message: format!("the Slurm job that is to convert the image: {message}"),
            by_itself: output.contains("FATAL"),
        })
    }
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

/// The beginning of what a job has written; empty if it has not started. Blocking.
fn read(path: &Path) -> String {
    let mut bytes = Vec::new();
    if let Ok(file) = File::open(path) {
        let most = u64::try_from(MAX_OUTPUT).unwrap_or_default();
        file.take(most).read_to_end(&mut bytes).ok();
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
