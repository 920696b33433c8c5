//! `knocctl completions`: for the shell's own folder of completions.

use std::process::ExitCode;

use super::{CtlError, command, output};

/// Arguments of `completions`.
#[derive(Debug, clap::Args)]
pub(super) struct Completions {
    /// The shell to print completions for
    shell: clap_complete::Shell,
}

impl Completions {
    pub(super) fn run(&self) -> Result<ExitCode, CtlError> {
        let mut text = Vec::new();
        clap_complete::generate(self.shell, &mut command(), "knocctl", &mut text);
        output::print_bytes(&text)?;
        Ok(ExitCode::SUCCESS)
    }
}
