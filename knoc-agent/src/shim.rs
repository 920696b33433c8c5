//! The shim inside a job: claims the job directory and runs the containers of one pod.

pub(crate) mod proc;

use std::{path::Path, process::ExitCode};

/// Entry point of `knoc-agent shim JOBDIR`.
#[must_use]
pub fn main(_jobdir: &Path) -> ExitCode {
    ExitCode::from(67)
}
