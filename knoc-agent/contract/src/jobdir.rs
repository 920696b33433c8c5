//! The state directory, and the job directory of each pod: the contract between the agent, which writes the intent,
//! and the shim, which writes what became of it. The sole owner of file names and modes.
//!
//! ```text
//! state_dir/                  0700
//!   agent.lease               who may submit (schema::Lease)
//!   endpoint.json             where shims find the agent (schema::Endpoint)
//!   cluster.json              the pinned cluster id and leadership epoch (schema::Cluster)
//!   shim-hop.crt, .key        the agent's self-signed pair of the shim hop
//!   images/<digest>.sif|.json
//!   versions/<X.Y.Z>/knoc-agent   what jobs exec; kept while a job.pb names it (the agent removes the others)
//!   pods/<uid>/               JobDir, 0700
//!     record.json             the agent's intent and state
//!     job.pb                  JobFile: what the shim runs
//!     values/<revision>       PodValues, 0600
//!     link.crt, link.key      the shim's pinned pair
//!     claim.<n>               which job may run the containers (claim)
//!     report.pb               Report, written by the shim
//!     batch.out               what the batch script printed
//!     logs/<container>/<attempt>.log    CRI format; rotated: .log.1 …
//! ```
//!
//! Written by: the agent all but `claim.*`, `report.pb`, `logs/`, which are the shim's. Blocking file work: callers
//! on a runtime use `spawn_blocking`. Never decides anything.

pub mod atomic;
pub mod claim;
pub mod decode;
#[cfg(any(test, feature = "fuzzed"))]
pub mod fuzzed;
pub mod schema;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use knoc_proto::{ids::PodUid, pb};
use prost::Message as _;
use serde::{Serialize, de::DeserializeOwned};

use self::{
    atomic::FileError,
    claim::{Claim, ClaimError},
    decode::DecodeError,
};
use crate::tree;

/// How often staged values are looked for that a newer revision takes the place of.
const LOOKS: u32 = 3;

/// Why a file of the contract could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum JobDirError {
    /// The file system refused.
    #[error("job directory")]
    File(#[from] FileError),
    /// The bytes are no message of the expected kind.
    #[error("{} is not a valid {kind}", path.display())]
    Decode {
        /// The file.
        path: PathBuf,
        /// What was expected there.
        kind: &'static str,
        /// The decoder's words.
        #[source]
        source: prost::DecodeError,
    },
    /// The report cannot be read.
    #[error("{} is not a valid report", path.display())]
    Report {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: DecodeError,
    },
    /// The text is no JSON of the expected kind.
    #[error("{} is not valid", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The parser's words.
        #[source]
        source: serde_json::Error,
    },
    /// The name cannot be a folder's.
    #[error("{uid:?} is not a pod uid")]
    Uid {
        /// As given.
        uid: String,
    },
}

/// The agent's state directory: names only, no handle is held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateDir {
    root: PathBuf,
}

impl StateDir {
    /// Takes `root` as the state directory without touching it.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Makes the folders that an agent needs, 0700.
    pub fn create(&self) -> Result<(), FileError> {
        for folder in [
            self.root.clone(),
            self.images(),
            self.versions(),
            self.pods(),
        ] {
            atomic::create_dir(&folder)?;
        }
        Ok(())
    }

    /// The folder itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The lease file.
    #[must_use]
    pub fn lease(&self) -> PathBuf {
        self.root.join("agent.lease")
    }

    /// Where shims find the agent.
    #[must_use]
    pub fn endpoint(&self) -> PathBuf {
        self.root.join("endpoint.json")
    }

    /// The pinned cluster and its leadership epoch.
    #[must_use]
    pub fn cluster(&self) -> PathBuf {
        self.root.join("cluster.json")
    }

    /// Certificate and key of the agent on the shim hop.
    #[must_use]
    pub fn shim_hop(&self) -> (PathBuf, PathBuf) {
        (
            self.root.join("shim-hop.crt"),
            self.root.join("shim-hop.key"),
        )
    }

    /// The image cache.
    #[must_use]
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    /// The installed agents that jobs exec.
    #[must_use]
    pub fn versions(&self) -> PathBuf {
        self.root.join("versions")
    }

    /// The folder of job directories.
    #[must_use]
    pub fn pods(&self) -> PathBuf {
        self.root.join("pods")
    }

    /// The job directory of `uid`, whether it exists or not.
    #[must_use]
    pub fn pod(&self, uid: &PodUid) -> JobDir {
        JobDir {
            path: self.pods().join(uid.as_str()),
        }
    }

    /// The job directories that exist. Names that are no uid are left out.
    pub fn list(&self) -> Result<Vec<JobDir>, FileError> {
        let pods = self.pods();
        let mut found = Vec::new();
        for entry in fs::read_dir(&pods).map_err(FileError::on("list", &pods))? {
            let entry = entry.map_err(FileError::on("list", &pods))?;
            if entry.file_name().to_str().is_some_and(is_uid) {
                found.push(JobDir { path: entry.path() });
            }
        }
        Ok(found)
    }
}

fn is_uid(name: &str) -> bool {
    PodUid::try_from(name).is_ok()
}

/// The job directory of one pod: names only, no handle is held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobDir {
    path: PathBuf,
}

impl JobDir {
    /// Takes an existing job directory; its last component is the pod's uid.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, JobDirError> {
        let path = path.into();
        let metadata = fs::metadata(&path).map_err(FileError::on("open job directory", &path))?;
        if !metadata.is_dir() {
            let error = io::Error::from(io::ErrorKind::NotADirectory);
            return Err(FileError::on("open job directory", &path)(error).into());
        }
        let dir = Self { path };
        if is_uid(dir.uid()) {
            Ok(dir)
        } else {
            Err(JobDirError::Uid {
                uid: dir.uid().to_owned(),
            })
        }
    }

    /// Makes the folder and its fixed sub-folders, 0700.
    pub fn create(&self) -> Result<(), FileError> {
        for folder in [&self.path, &self.values_dir(), &self.logs_dir()] {
            atomic::create_dir(folder)?;
        }
        Ok(())
    }

    /// Removes all of it. Not being there is success.
    pub fn remove(&self) -> Result<(), FileError> {
        // The record goes first: a folder half removed when the agent dies is then swept, not adopted.
        for remove in [
            fs::remove_file(self.record_path()),
            tree::remove(&self.path),
        ] {
            match remove {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(FileError::on("remove", &self.path)(error));
                }
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }

    /// The folder itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The pod's uid: the folder's name.
    #[must_use]
    pub fn uid(&self) -> &str {
        self.path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default()
    }

    /// The agent's intent and state (`pod::record`).
    #[must_use]
    pub fn record_path(&self) -> PathBuf {
        self.path.join("record.json")
    }

    /// `job.pb`.
    #[must_use]
    pub fn spec_path(&self) -> PathBuf {
        self.path.join("job.pb")
    }

    /// What the shim is to run.
    pub fn spec(&self) -> Result<pb::JobFile, JobDirError> {
        let path = self.spec_path();
        decode(&path, "job file", &atomic::read(&path)?)
    }

    /// Writes what the shim is to run.
    pub fn write_spec(&self, job: &pb::JobFile) -> Result<(), FileError> {
        atomic::replace(&self.spec_path(), &job.encode_to_vec(), 0o600)
    }

    /// The folder of value bundles.
    #[must_use]
    pub fn values_dir(&self) -> PathBuf {
        self.path.join("values")
    }

    /// The newest staged values, `None` where none are on disk (taken by the shim, or never staged).
    pub fn values(&self) -> Result<Option<pb::PodValues>, JobDirError> {
        for _ in 0..LOOKS {
            let Some((_, path)) = self.revisions()?.into_iter().max() else {
                return Ok(None);
            };
            if let Some(bytes) = atomic::read_optional(&path)? {
                return decode(&path, "bundle of values", &bytes).map(Some);
            }
            // A newer one took its place meanwhile.
        }
        Ok(None)
    }

    /// Stages `values`, synced, and removes older revisions.
    pub fn write_values(&self, values: &pb::PodValues) -> Result<(), JobDirError> {
        let path = self.values_dir().join(values.revision.to_string());
        atomic::write(&path, &values.encode_to_vec(), 0o600)?;
        Ok(self.remove_values_up_to(values.revision.saturating_sub(1))?)
    }

    /// Unlinks the staged values up to `revision`: the shim once it has them. What is staged meanwhile stays.
    pub fn remove_values_up_to(&self, revision: i64) -> Result<(), FileError> {
        for (found, path) in self.revisions()? {
            if found <= revision {
                remove_if_there(&path)?;
            }
        }
        Ok(())
    }

    /// Unlinks all staged values, and what a writer that died left of some: the agent at every terminal state.
    pub fn remove_values(&self) -> Result<(), FileError> {
        self.values_files()?
            .iter()
            .try_for_each(|path| remove_if_there(path))
    }

    fn revisions(&self) -> Result<Vec<(i64, PathBuf)>, FileError> {
        // Temporary files begin with a dot and are no number.
        let revision = |path: &Path| path.file_name()?.to_str()?.parse().ok();
        let files = self.values_files()?.into_iter();
        Ok(files
            .filter_map(|path| Some((revision(&path)?, path)))
            .collect())
    }

    fn values_files(&self) -> Result<Vec<PathBuf>, FileError> {
        let folder = self.values_dir();
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(FileError::on("list", &folder)(error)),
        };
        entries
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<Result<_, _>>()
            .map_err(FileError::on("list", &folder))
    }

    /// Certificate and key of the shim on its link.
    #[must_use]
    pub fn link_pair(&self) -> (PathBuf, PathBuf) {
        (self.path.join("link.crt"), self.path.join("link.key"))
    }

    /// Takes the claim for `wanted`: see [`claim::claim`].
    pub fn claim(&self, wanted: &Claim, again: bool) -> Result<u32, ClaimError> {
        claim::claim(&self.path, wanted, again)
    }

    /// Has a shim claimed the directory? Also where that cannot be told.
    #[must_use]
    pub fn is_claimed(&self) -> bool {
        !matches!(claim::newest(&self.path), Ok(None))
    }

    /// `report.pb`.
    #[must_use]
    pub fn report_path(&self) -> PathBuf {
        self.path.join("report.pb")
    }

    /// The shim's newest report on disk.
    pub fn report(&self) -> Result<Option<pb::Report>, JobDirError> {
        let path = self.report_path();
        // A listing makes an NFS client ask the server for the folder anew; a lookup may come from its cache.
        drop(fs::read_dir(&self.path).map(Iterator::count));
        let Some(bytes) = atomic::read_bounded(&path, decode::MAX_REPORT)? else {
            return Ok(None);
        };
        decode::report(&bytes)
            .map(Some)
            .map_err(|source| JobDirError::Report { path, source })
    }

    /// Writes the shim's report, synced.
    pub fn write_report(&self, report: &pb::Report) -> Result<(), FileError> {
        atomic::write(&self.report_path(), &report.encode_to_vec(), 0o600)
    }

    /// What the batch script printed, and the shim's own log.
    #[must_use]
    pub fn batch_out(&self) -> PathBuf {
        self.path.join("batch.out")
    }

    /// The folder of the containers' logs.
    #[must_use]
    pub fn logs_dir(&self) -> PathBuf {
        self.path.join("logs")
    }

    /// The live log of one attempt (restart count) of a container.
    #[must_use]
    pub fn log_path(&self, container: &str, attempt: u32) -> PathBuf {
        self.logs_dir()
            .join(container)
            .join(format!("{attempt}.log"))
    }
}

/// Reads a JSON file, `None` where it is not there.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, JobDirError> {
    let Some(bytes) = atomic::read_optional(path)? else {
        return Ok(None);
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|source| JobDirError::Json {
            path: path.to_owned(),
            source,
        })
}

/// Replaces a JSON file, 0600 and synced.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), JobDirError> {
    let bytes = serde_json::to_vec_pretty(value).map_err(|source| JobDirError::Json {
        path: path.to_owned(),
        source,
    })?;
    Ok(atomic::write(path, &bytes, 0o600)?)
}

fn decode<M: prost::Message + Default>(
    path: &Path,
    kind: &'static str,
    bytes: &[u8],
) -> Result<M, JobDirError> {
    M::decode(bytes).map_err(|source| JobDirError::Decode {
        path: path.to_owned(),
        kind,
        source,
    })
}

fn remove_if_there(path: &Path) -> Result<(), FileError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(FileError::on("remove", path)(error))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests;
