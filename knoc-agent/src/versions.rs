//! The installed versions of the agent that jobs execute: `versions/<name>/knoc-agent`.
//!
//! An installed version is never overwritten. It is removed once no job directory names it; this is
//! checked at start, after all pods have been restored, and whenever the last pod of an older
//! version is forgotten. Our own version is never removed. If it is not known which version a job
//! directory needs (its record cannot be read, or the agent was older than this rule), no version
//! is removed.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use knoc_contract::{
    jobdir::{
        StateDir,
        atomic::{self, FileError},
    },
    tree,
};
use knoc_proto::error::chain;
use sha2::{Digest as _, Sha256};

/// The executable in each version's directory.
const PROGRAM: &str = "knoc-agent";

/// Which versions are installed, and which pods need them.
#[derive(Debug)]
pub struct Versions {
    folder: PathBuf,
    own: String,
    held: Mutex<Held>,
}

/// Pods that need other versions than ours.
#[derive(Debug, Default)]
struct Held {
    by_name: BTreeMap<String, usize>,
    /// The number of pods whose job directory names no version.
    unknown: usize,
}

impl Versions {
    /// Copies this executable to where jobs execute it. An existing file is never overwritten,
    /// because jobs may be running it.
    pub fn install(state: &StateDir) -> Result<Self, FileError> {
        // Read through /proc, because the file may have been replaced since this process started.
        let bytes = atomic::read(Path::new("/proc/self/exe"))?;
        let folder = state.versions();
        let version = env!("CARGO_PKG_VERSION");
        let target = folder.join(version).join(PROGRAM);
        let own = match atomic::read_optional(&target)? {
            Some(known) if known != bytes => {
                // Another build of the same version.
                let digest = Sha256::digest(&bytes);
                let mut hash = hex(&digest);
                hash.truncate(12);
                format!("{version}+{hash}")
            }
            Some(_) | None => version.to_owned(),
        };
        let target = folder.join(&own).join(PROGRAM);
        if !target.exists() {
            atomic::create_dir(&folder.join(&own))?;
            atomic::write(&target, &bytes, 0o755)?;
        }
        Ok(Self {
            folder,
            own,
            held: Mutex::default(),
        })
    }

    /// The name of our own version, for job directories.
    #[must_use]
    pub fn own(&self) -> &str {
        &self.own
    }

    /// The absolute path of our own executable.
    #[must_use]
    pub fn own_program(&self) -> PathBuf {
        self.program(&self.own)
    }

    /// The program for a job whose directory names `name`; our own if that version is not
    /// installed.
    #[must_use]
    pub fn program_or_own(&self, name: &str) -> PathBuf {
        let named = self.program(name);
        if is_name(name) && named.is_file() {
            named
        } else {
            self.own_program()
        }
    }

    /// Records that a job directory names this version; empty if it names none.
    pub fn hold(&self, name: &str) {
        let mut held = self.held();
        if name.is_empty() {
            held.unknown += 1;
        } else if name != self.own {
            *held.by_name.entry(name.to_owned()).or_default() += 1;
        }
    }

    /// Records that a job directory that named this version is gone. True if [`Versions::prune`]
    /// may find something to remove.
    #[must_use]
    pub fn release(&self, name: &str) -> bool {
        let mut held = self.held();
        if name.is_empty() {
            held.unknown = held.unknown.saturating_sub(1);
            return held.unknown == 0;
        }
        let Some(count) = held.by_name.get_mut(name) else {
            return false;
        };
        *count = count.saturating_sub(1);
        let last = *count == 0;
        if last {
            held.by_name.remove(name);
        }
        last
    }

    /// Removes the versions that no job directory names. Blocking. If a removal fails, it is logged
    /// and tried again at the next start.
    pub fn prune(&self) {
        let held = self.held();
        if held.unknown > 0 {
            return;
        }
        let names = match self.installed() {
            Ok(names) => names,
            Err(error) => {
                tracing::warn!(error = chain(&error), "cannot list the installed versions");
                return;
            }
        };
        for name in unneeded(names, &self.own, &held.by_name) {
            let folder = self.folder.join(&name);
            match tree::remove(&folder) {
                Ok(()) => tracing::info!(
                    version = name,
                    "removed an installed version that no job directory names"
                ),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    tracing::warn!(version = name, %error, "cannot remove an installed version");
                }
            }
        }
    }

    fn installed(&self) -> Result<Vec<String>, FileError> {
        let failed = || FileError::on("list", &self.folder);
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(failed())? {
            names.extend(entry.map_err(failed())?.file_name().into_string());
        }
        Ok(names)
    }

    fn program(&self, name: &str) -> PathBuf {
        self.folder.join(name).join(PROGRAM)
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// PURE: the installed versions that no pod needs. A directory whose name is not a version is not
/// ours to remove.
fn unneeded(
    installed: Vec<String>,
    own: &str,
    held: &BTreeMap<String, usize>,
) -> impl Iterator<Item = String> {
    installed
        .into_iter()
        .filter(move |name| is_name(name) && name != own && !held.contains_key(name))
}

/// Whether the name is one that [`Versions::install`] creates, such as `1.2.3` or
/// `1.2.3+0123456789ab`, and never a path.
fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '+' | '-');
    name.starts_with(|c: char| c.is_ascii_digit()) && name.chars().all(allowed)
}

fn hex(bytes: &[u8]) -> String {
    let digits = b"0123456789abcdef";
    let pair = |byte: &u8| {
        [
            digits[usize::from(byte >> 4)],
            digits[usize::from(byte & 15)],
        ]
    };
    bytes.iter().flat_map(pair).map(char::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Installed {
        _root: tempfile::TempDir,
        state: StateDir,
        versions: Versions,
    }

    /// Our own version and these.
    fn installed(others: &[&str]) -> Installed {
        let root = tempfile::tempdir().unwrap();
        let state = StateDir::new(root.path());
        state.create().unwrap();
        let versions = Versions::install(&state).unwrap();
        for name in others {
            let folder = state.versions().join(name);
            atomic::create_dir(&folder).unwrap();
            atomic::write(&folder.join(PROGRAM), b"older", 0o755).unwrap();
        }
        Installed {
            _root: root,
            state,
            versions,
        }
    }

    fn there(site: &Installed) -> Vec<String> {
        let mut names = site.versions.installed().unwrap();
        names.retain(|name| name != site.versions.own());
        names.sort();
        names
    }

    #[test]
    fn an_installed_version_is_never_overwritten() {
        let site = installed(&[]);
        let first = site.versions.own_program();
        let again = Versions::install(&site.state).unwrap();
        assert_eq!(again.own_program(), first);
        atomic::write(&first, b"another build", 0o755).unwrap();
        let second = Versions::install(&site.state).unwrap();
        assert_ne!(second.own_program(), first);
        assert_eq!(atomic::read(&first).unwrap(), b"another build");
        let third = Versions::install(&site.state).unwrap();
        assert_eq!(third.own_program(), second.own_program());
    }

    #[test]
    fn only_what_no_job_directory_names_is_removed() {
        let site = installed(&["0.0.1", "0.0.2", "0.0.2+0123456789ab", "notes"]);
        site.versions.hold("0.0.2");
        site.versions.hold("0.0.2");
        site.versions.hold(site.versions.own());
        site.versions.prune();
        assert_eq!(there(&site), ["0.0.2", "notes"]);
        assert!(site.versions.own_program().is_file());
        assert!(
            !site.versions.release("0.0.2"),
            "another pod still needs it"
        );
        site.versions.prune();
        assert_eq!(there(&site), ["0.0.2", "notes"]);
        assert!(site.versions.release("0.0.2"));
        site.versions.prune();
        assert_eq!(there(&site), ["notes"]);
        assert!(!site.versions.release(site.versions.own()));
    }

    #[test]
    fn a_job_directory_that_does_not_say_keeps_all_of_them() {
        let site = installed(&["0.0.1"]);
        site.versions.hold("");
        site.versions.prune();
        assert_eq!(there(&site), ["0.0.1"]);
        assert!(site.versions.release(""));
        site.versions.prune();
        assert!(there(&site).is_empty());
    }

    #[test]
    fn a_job_executes_the_version_that_its_directory_names_if_installed() {
        let site = installed(&["0.0.1"]);
        let older = site.versions.program_or_own("0.0.1");
        assert!(older.ends_with("versions/0.0.1/knoc-agent"));
        for name in ["", "0.0.9", "../0.0.1", "0.0.1/..", "."] {
            let program = site.versions.program_or_own(name);
            assert_eq!(program, site.versions.own_program(), "{name:?}");
        }
    }
}
