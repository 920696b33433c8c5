//! `knocctl completions`: prints the completion script that a shell loads.

use std::process::ExitCode;

use super::{CtlError, command, output};

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
