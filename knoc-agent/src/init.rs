//! `knoc-agent init`: certificates, the kubelet's bundle, and a commented site file.

use std::path::Path;

/// The command line of `init`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Name of the site.
    #[arg(long)]
    pub site: Option<String>,
}

/// Why nothing, or not all, was written.
#[derive(Debug, thiserror::Error)]
pub enum InitError {}

/// Writes what is not there yet. Returns what to tell the user.
pub fn run(_options: &Options, _home: &Path) -> Result<String, InitError> {
    Ok(String::new())
}
