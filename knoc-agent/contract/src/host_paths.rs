//! PURE: which paths of the compute nodes pods may mount, by the site file. The agent judges the text of a path when it
//! admits a pod. The shim judges the place to which the path has led on the compute node, before that is mounted.
//!
//! The most specific prefix decides. Paths are compared by component: `/data` does not cover `/database`.

use std::path::{Component, Path, PathBuf};

use knoc_proto::pb;
use serde::{Deserialize, Serialize};

/// What the names of the shims' own folders on a node begin with.
pub const SHIM_FOLDERS: &str = "knoc-shim";

/// How many prefixes an error names.
const NAMED: usize = 10;

/// The paths that pods may mount.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPaths {
    /// Each of them allows everything below it.
    pub prefixes: Vec<Prefix>,
    /// Files and folders that no pod may see: neither they, nor what lies in them, nor a folder that contains them.
    pub guarded: Vec<PathBuf>,
    /// The home directory of the HPC user. What is writable must not contain it.
    pub home: Option<PathBuf>,
}

/// A path below which pods may mount everything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prefix {
    /// The absolute path.
    pub path: PathBuf,
    /// Whether containers may write there.
    pub writable: bool,
}

/// Why a path must not be mounted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No prefix covers the path.
    #[error("{path:?} is not below a path that this site lets pods mount ({allowed})")]
    Outside {
        /// The path.
        path: PathBuf,
        /// What is allowed instead.
        allowed: String,
    },
    /// The prefix is read-only, but a container would write.
    #[error(
        "{path:?} can only be mounted read-only at this site: set `readOnly: true` in all `volumeMounts` of the volume"
    )]
    ReadOnly {
        /// The path.
        path: PathBuf,
    },
    /// The pod would see what belongs to KNoC or to the user alone.
    #[error(
        "{path:?} {how} {guarded:?}, which is never mounted because it can hold keys or KNoC's own files; mount another folder"
    )]
    Guarded {
        /// The path.
        path: PathBuf,
        /// How the two paths relate.
        how: &'static str,
        /// The path that is never mounted.
        guarded: PathBuf,
    },
    /// Containers could replace the files that a login executes.
    #[error(
        "{path:?} lies below {prefix:?}, which the site file makes writable although it contains the home directory {home:?}; \
         the site has to name a folder beside or below it"
    )]
    Home {
        /// The path.
        path: PathBuf,
        /// The prefix that covers it.
        prefix: PathBuf,
        /// The home directory.
        home: PathBuf,
    },
}

impl HostPaths {
    /// The prefix that decides about `path`, which has no `..`. `writes`: whether a container would be able to write.
    pub fn judge(&self, path: &Path, writes: bool) -> Result<&Prefix, Refusal> {
        let covering = self
            .prefixes
            .iter()
            .filter(|prefix| path.starts_with(&prefix.path));
        let Some(prefix) = covering.max_by_key(|prefix| prefix.path.components().count()) else {
            return Err(Refusal::Outside {
                path: path.to_owned(),
                allowed: self.allowed(),
            });
        };
        if let Some((how, guarded)) = self.guard(path) {
            return Err(Refusal::Guarded {
                path: path.to_owned(),
                how,
                guarded,
            });
        }
        if writes && !prefix.writable {
            return Err(Refusal::ReadOnly {
                path: path.to_owned(),
            });
        }
        match &self.home {
            Some(home) if writes && home.starts_with(&prefix.path) => Err(Refusal::Home {
                path: path.to_owned(),
                prefix: prefix.path.clone(),
                home: home.clone(),
            }),
            Some(_) | None => Ok(prefix),
        }
    }

    fn guard(&self, path: &Path) -> Option<(&'static str, PathBuf)> {
        let related = self.guarded.iter().find_map(|guarded| {
            let how = if path == guarded {
                "is"
            } else if path.starts_with(guarded) {
                "lies in"
            } else if guarded.starts_with(path) {
                "contains"
            } else {
                return None;
            };
            Some((how, guarded.clone()))
        });
        related.or_else(|| {
            let mut so_far = PathBuf::new();
            path.components().find_map(|component| {
                so_far.push(component);
                let ours = matches!(component, Component::Normal(name)
                    if name.as_encoded_bytes().starts_with(SHIM_FOLDERS.as_bytes()));
                ours.then(|| ("is or lies in", so_far.clone()))
            })
        })
    }

    /// What an error says about the allowed paths.
    fn allowed(&self) -> String {
        if self.prefixes.is_empty() {
            return "`policy.host_paths` of the site file is empty".to_owned();
        }
        let named: Vec<String> = self
            .prefixes
            .iter()
            .take(NAMED)
            .map(|prefix| prefix.path.display().to_string())
            .collect();
        let more = if self.prefixes.len() > NAMED {
            " …"
        } else {
            ""
        };
        format!(
            "`policy.host_paths` of the site file: {}{more}",
            named.join(", ")
        )
    }
}

impl From<&pb::HostPathPolicy> for HostPaths {
    fn from(policy: &pb::HostPathPolicy) -> Self {
        let prefixes = policy.prefixes.iter().map(|prefix| Prefix {
            path: prefix.path.clone().into(),
            writable: prefix.writable,
        });
        Self {
            prefixes: prefixes.collect(),
            guarded: policy.guarded.iter().map(PathBuf::from).collect(),
            home: Some(&policy.home)
                .filter(|home| !home.is_empty())
                .map(PathBuf::from),
        }
    }
}

impl From<&HostPaths> for pb::HostPathPolicy {
    fn from(paths: &HostPaths) -> Self {
        let text = |path: &PathBuf| path.to_string_lossy().into_owned();
        let prefixes = paths.prefixes.iter().map(|prefix| pb::HostPathPrefix {
            path: text(&prefix.path),
            writable: prefix.writable,
        });
        Self {
            prefixes: prefixes.collect(),
            guarded: paths.guarded.iter().map(text).collect(),
            home: paths.home.as_ref().map(text).unwrap_or_default(),
            mapped: std::collections::HashMap::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(prefixes: &[(&str, bool)]) -> HostPaths {
        let prefix = |(path, writable): &(&str, bool)| Prefix {
            path: path.into(),
            writable: *writable,
        };
        HostPaths {
            prefixes: prefixes.iter().map(prefix).collect(),
            guarded: vec!["/home/u/.ssh".into(), "/scratch/u/knoc".into()],
            home: Some("/home/u".into()),
        }
    }

    fn refused(paths: &HostPaths, path: &str, writes: bool) -> String {
        let judged = paths.judge(Path::new(path), writes);
        judged.map_or_else(|refusal| refusal.to_string(), |_| String::new())
    }

    #[test]
    fn a_prefix_covers_whole_components_and_the_most_specific_one_decides() {
        let paths = paths(&[("/data", false), ("/data/u", true), ("/scratch", true)]);
        for (path, writes, refusal) in [
            ("/data", false, ""),
            ("/data/x", false, ""),
            ("/data/x", true, "read-only"),
            ("/data/u", true, ""),
            ("/data/u/deep/er", true, ""),
            ("/data/us", true, "read-only"),
            ("/database", false, "not below"),
            ("/", false, "not below"),
            ("/scratch/u/other", true, ""),
        ] {
            let text = refused(&paths, path, writes);
            let right = text.contains(refusal) && text.is_empty() == refusal.is_empty();
            assert!(right, "{path}, writes: {writes}: {text:?}");
        }
        let none = refused(&HostPaths::default(), "/data", false);
        assert!(
            none.contains("`policy.host_paths` of the site file is empty"),
            "{none}"
        );
        assert!(refused(&paths, "/etc", false).contains("/data, /data/u, /scratch"));
    }

    #[test]
    fn what_is_guarded_is_seen_by_no_pod() {
        let paths = paths(&[("/", false), ("/scratch", true), ("/tmp", true)]);
        for (path, how) in [
            ("/home/u/.ssh", "is"),
            ("/home/u/.ssh/id_rsa", "lies in"),
            ("/home/u", "contains"),
            ("/home", "contains"),
            ("/", "contains"),
            ("/scratch/u", "contains"),
            ("/scratch/u/knoc/state", "lies in"),
            ("/tmp/knoc-shim-n1-7/x", "is or lies in"),
        ] {
            let judged = paths.judge(Path::new(path), false);
            let is = matches!(&judged, Err(Refusal::Guarded { how: is, .. }) if *is == how);
            assert!(is, "{path}: {judged:?}");
        }
        for path in [
            "/home/u/.sshx",
            "/home/u/data",
            "/scratch/u/knoc2",
            "/tmp/x",
        ] {
            assert_eq!(refused(&paths, path, false), "", "{path}");
        }
    }

    #[test]
    fn nothing_below_a_writable_prefix_with_the_home_is_writable() {
        for prefix in ["/home", "/home/u"] {
            let paths = paths(&[(prefix, true)]);
            let text = refused(&paths, "/home/u/bin", true);
            assert!(text.contains("home directory"), "{prefix}: {text}");
            assert_eq!(refused(&paths, "/home/u/bin", false), "");
        }
        let below = paths(&[("/home/u/data", true)]);
        assert_eq!(refused(&below, "/home/u/data/x", true), "");
    }

    #[test]
    fn the_job_file_has_all_of_it() {
        let paths = paths(&[("/data", false), ("/scratch", true)]);
        assert_eq!(HostPaths::from(&pb::HostPathPolicy::from(&paths)), paths);
    }
}
