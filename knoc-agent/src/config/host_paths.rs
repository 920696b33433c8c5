//! `policy.host_paths` of the site file: which paths of the compute nodes pods may mount.

use std::path::{Path, PathBuf};

use knoc_contract::host_paths::{HostPaths, Prefix, SHIM_FOLDERS};
use knoc_proto::paths;
use serde::Deserialize;

use super::{Config, Policy};

/// The maximum number of entries: every mount is compared with each of them.
const MOST: usize = 100;

/// The folders in the home directory that no pod may see: the keys of SSH, and those of KNoC.
const PRIVATE: [&str; 2] = [".ssh", ".config/knoc"];
/// What the kernel tells about processes. Links in it lead anywhere.
const PROCESSES: &str = "/proc";

/// Where shims have their folders on a compute node: on disk, unless `job.scratch` names another place, and in memory.
const SCRATCH: &str = "/tmp";
const MEMORY: &str = "/dev/shm";

/// A path of the compute nodes, with everything below it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostPath {
    /// The absolute path.
    pub path: PathBuf,
    /// Whether containers may write there.
    #[serde(default)]
    pub writable: bool,
}

impl Config {
    /// What pods may mount of the compute nodes by this policy. `own` are further files of this agent, such as its socket.
    #[must_use]
    pub fn host_paths(&self, policy: &Policy, own: &[PathBuf]) -> HostPaths {
        let source = self.source.as_ref();
        let mut paths = self.host_paths_at(policy, source.map(|source| &*source.home.home));
        paths.guarded.extend(own.iter().cloned());
        paths
            .guarded
            .extend(source.map(|source| source.path.clone()));
        paths
    }

    fn host_paths_at(&self, policy: &Policy, home: Option<&Path>) -> HostPaths {
        let prefixes = policy.host_paths.iter().map(|entry| Prefix {
            path: entry.path.clone(),
            writable: entry.writable,
        });
        let tls = self.tls.iter();
        let keys = tls.flat_map(|tls| {
            [
                tls.key.clone(),
                tls.ca_key(),
                tls.cert.clone(),
                tls.ca.clone(),
            ]
        });
        let credentials = self.dial_out.iter();
        let credentials = credentials.filter_map(|entry| entry.proxy_credentials.clone());
        let private = home.into_iter();
        let private = private.flat_map(|home| PRIVATE.map(|name| home.join(name)));
        // Their names begin so; what contains these contains those of all jobs on the node.
        let scratch = self.job.scratch.as_deref().unwrap_or(SCRATCH);
        let shims = [scratch, MEMORY].map(|folder| Path::new(folder).join(SHIM_FOLDERS));
        HostPaths {
            prefixes: prefixes.collect(),
            guarded: [self.state_dir.clone(), PROCESSES.into()]
                .into_iter()
                .chain(shims)
                .chain(keys)
                .chain(credentials)
                .chain(self.images.library_token.clone())
                .chain(self.listen.socket.clone())
                .chain(private)
                .collect(),
            home: home.map(Path::to_owned),
        }
    }

    /// What is wrong with the volumes that the site maps, and with its binds, each with its key.
    pub(super) fn mount_mistakes(&self, home: &Path) -> Vec<(&'static str, String)> {
        let allowed = self.host_paths_at(&self.policy, Some(home));
        let mut mistakes = self.policy.mapping_mistakes(&allowed);
        mistakes.extend(self.bind_mistakes(&allowed));
        mistakes
    }

    /// PURE: what is wrong with `host_paths`, one sentence for each mistake.
    pub(super) fn host_path_mistakes(&self, home: &Path) -> Vec<String> {
        let entries = &self.policy.host_paths;
        let count = entries.len();
        if count > MOST {
            return vec![format!("has {count} entries; the limit is {MOST}")];
        }
        let all = self.host_paths_at(&self.policy, Some(home));
        let mut mistakes = Vec::new();
        for (index, entry) in entries.iter().enumerate() {
            let text = entry.path.to_string_lossy();
            if let Err(error) = paths::in_container(&text) {
                mistakes.push(format!("{text:?} {error}"));
                continue;
            }
            let mut earlier = entries.iter().take(index);
            if earlier.any(|other| other.path == entry.path) {
                mistakes.push(format!("{text:?} is listed twice"));
            }
            if entry.writable && home.starts_with(&entry.path) {
                mistakes.push(format!(
                    "{text:?} must not be writable, because it contains the home directory {}: a container could replace what a \
                     login executes; name a folder in it",
                    home.display()
                ));
            }
            if let Some(guarded) = all.guarded.iter().find(|path| entry.path.starts_with(path)) {
                mistakes.push(format!(
                    "{text:?} lies in {}, which is never mounted because it can hold keys or KNoC's own files",
                    guarded.display()
                ));
            }
        }
        mistakes
    }
}
