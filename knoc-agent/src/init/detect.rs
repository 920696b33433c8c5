//! Detects what `init` needs to know about the login node: tools in PATH, Slurm's configuration and
//! the host's name.

use std::path::{Path, PathBuf};

/// The part of the environment that matters. It is passed as an argument, so that tests need not
/// change the process's own.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// `$PATH`
    pub path: String,
    /// `$SLURM_CONF`
    pub slurm_conf: Option<String>,
    /// `$APPTAINER_TMPDIR` and similar variables, which are copied to the site file if they are
    /// set.
    pub extra: Vec<(String, String)>,
}

/// Variables that a site's tools may need.
const PASSED_ON: &[&str] = &[
    "APPTAINER_TMPDIR",
    "APPTAINER_CACHEDIR",
    "SINGULARITY_TMPDIR",
    "SINGULARITY_CACHEDIR",
];

impl Environment {
    /// Reads the environment of this process.
    #[must_use]
    pub fn own() -> Self {
        let get = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let extra = PASSED_ON
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), get(name)?)));
        Self {
            path: get("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".to_owned()),
            slurm_conf: get("SLURM_CONF"),
            extra: extra.collect(),
        }
    }
}

/// What was detected.
#[derive(Debug, Clone, Default)]
pub struct Found {
    /// The environment that was searched.
    pub environment: Environment,
    /// The host's name.
    pub hostname: String,
    /// The tools that were found, with their paths.
    pub tools: Vec<(&'static str, PathBuf)>,
}

/// The tools that a site file can name.
const TOOLS: &[&str] = &[
    "sbatch",
    "squeue",
    "sacct",
    "scancel",
    "sinfo",
    "scontrol",
    "apptainer",
    "singularity",
];

impl Found {
    /// Searches the directories of PATH.
    #[must_use]
    pub fn look(environment: Environment) -> Self {
        let folders: Vec<_> = environment
            .path
            .split(':')
            .filter(|folder| folder.starts_with('/'))
            .collect();
        let find = |name: &&'static str| {
            let mut paths = folders.iter().map(|folder| Path::new(folder).join(name));
            Some((*name, paths.find(|path| path.is_file())?))
        };
        let tools = TOOLS.iter().filter_map(find).collect();
        let hostname = nix::unistd::gethostname().unwrap_or_default();
        Self {
            tools,
            hostname: hostname.to_string_lossy().into_owned(),
            environment,
        }
    }

    /// Whether this tool was found.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.tools.iter().any(|(tool, _)| *tool == name)
    }
}
