//! `[[bind]]` of the site file: what every container of the site's jobs has, whatever its pod asks for.

use std::path::{Path, PathBuf};

use knoc_contract::host_paths::{HostPaths, Prefix};
use knoc_proto::{paths, pb, pod::KNOC_FOLDER};
use serde::Deserialize;

use super::Config;

/// The maximum number of entries: each is a mount of each container.
const MOST: usize = 50;

/// What a container's own file systems are mounted at.
const TAKEN: [&str; 3] = ["/proc", "/sys", "/dev"];

/// A path of the compute nodes that every container has.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SiteBind {
    /// The path on the compute node.
    pub path: PathBuf,
    /// The path in the container; if unset, the same.
    #[serde(default)]
    pub target: Option<PathBuf>,
    /// Whether containers may write there.
    #[serde(default)]
    pub writable: bool,
    /// The partitions of the jobs that have it. If empty: all.
    #[serde(default)]
    pub partitions: Vec<String>,
}

impl SiteBind {
    fn target(&self) -> &Path {
        self.target.as_deref().unwrap_or(&self.path)
    }
}

impl Config {
    /// The binds as a job file has them.
    #[must_use]
    pub fn site_binds(&self) -> Vec<pb::SiteBind> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let binds = self.binds.iter().map(|bind| pb::SiteBind {
            path: text(&bind.path),
            target: text(bind.target()),
            writable: bind.writable,
            partitions: bind.partitions.clone(),
        });
        binds.collect()
    }

    /// PURE: what is wrong with the entries, each with its key. `guarded`: what is never mounted.
    pub(super) fn bind_mistakes(&self, guarded: &HostPaths) -> Vec<(&'static str, String)> {
        let count = self.binds.len();
        if count > MOST {
            return vec![("bind", format!("has {count} entries; the limit is {MOST}"))];
        }
        let mut mistakes = Vec::new();
        for (index, bind) in self.binds.iter().enumerate() {
            let (path, target) = (bind.path.to_string_lossy(), bind.target().to_string_lossy());
            if let Err(error) = paths::in_container(&path) {
                mistakes.push(("bind.path", format!("{path:?} {error}")));
                continue;
            }
            match paths::in_container(&target) {
                Err(error) => mistakes.push(("bind.target", format!("{target:?} {error}"))),
                Ok(clean) if clean == "/" => {
                    mistakes.push(("bind.target", "\"/\" is the container's root".to_owned()));
                }
                Ok(_) => {}
            }
            let taken = TAKEN.iter().chain([&KNOC_FOLDER]);
            if let Some(taken) = taken
                .into_iter()
                .find(|taken| bind.target().starts_with(taken))
            {
                let why =
                    format!("{target:?} lies in {taken}, which each container has of its own");
                mistakes.push(("bind.target", why));
            }
            let allowed = HostPaths {
                prefixes: vec![Prefix {
                    path: bind.path.clone(),
                    writable: bind.writable,
                }],
                ..guarded.clone()
            };
            if let Err(refusal) = allowed.judge(&bind.path, bind.writable) {
                mistakes.push(("bind.path", refusal.to_string()));
            }
            let mut earlier = self.binds.iter().take(index);
            if earlier.any(|other| other.target() == bind.target() && meet(other, bind)) {
                mistakes.push((
                    "bind.target",
                    format!("{target:?} is listed twice for one partition"),
                ));
            }
        }
        mistakes
    }
}

/// Whether a partition has both.
fn meet(a: &SiteBind, b: &SiteBind) -> bool {
    let all = a.partitions.is_empty() || b.partitions.is_empty();
    all || a.partitions.iter().any(|name| b.partitions.contains(name))
}
