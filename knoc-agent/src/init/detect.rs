//! What `init` finds out about the login node: tools in PATH, Slurm's configuration, the host's name.

use std::path::{Path, PathBuf};

/// The part of the environment that is looked at. An argument, so that tests need no global.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// `$PATH`
    pub path: String,
    /// `$SLURM_CONF`
    pub slurm_conf: Option<String>,
    /// `$APPTAINER_TMPDIR` and the like: passed on where set.
    pub extra: Vec<(String, String)>,
}

/// Variables that the tools of a site may need.
const PASSED_ON: &[&str] = &[
    "APPTAINER_TMPDIR",
    "APPTAINER_CACHEDIR",
    "SINGULARITY_TMPDIR",
    "SINGULARITY_CACHEDIR",
];

impl Environment {
    /// Of this process.
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

/// What was found.
#[derive(Debug, Clone, Default)]
pub struct Found {
    /// As given.
    pub environment: Environment,
    /// Host name.
    pub hostname: String,
    /// Tool → path, those that are there.
    pub tools: Vec<(&'static str, PathBuf)>,
}

/// Tools of the site file.
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
    /// Looks through the folders of PATH.
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

    /// Was this tool found?
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.tools.iter().any(|(tool, _)| *tool == name)
    }
}
