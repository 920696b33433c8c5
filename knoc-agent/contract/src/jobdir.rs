//! The state directory and each pod's job directory: the contract between the agent, which writes
//! what to run, and the shim, which writes what happened. Only this module knows their file
//! names and modes.
//!
//! ```text
//! state_dir/                  0700
//!   agent.lease               who may submit (schema::Lease)
//!   agent.after.<epoch>.<n>   who follows the lease of that epoch, while it takes it (schema::Lease)
//!   endpoint.json             where shims find the agent (schema::Endpoint)
//!   shim-route.json           how shims are reached (schema::FoundRoute)
//!   cluster.json              the pinned cluster id and leadership epoch (schema::Cluster)
//!   shim-hop.crt, .key        the agent's self-signed certificate and key for shims
//!   images/<digest>.sif|.json
//!   versions/<X.Y.Z>/knoc-agent   the binary that jobs exec; the agent removes it once no job.pb names it
//!   pods/<uid>/               JobDir, 0700
//!     record.json             the agent's intent and state
//!     job.pb                  JobFile: what the shim runs
//!     values/<revision>       PodValues, 0600
//!     stop                    the grace period of a stop that a signal tells, in seconds
//!     link.crt, link.key      the shim's pinned certificate and key
//!     claim.<n>               which job may run the containers (claim)
//!     report.pb               Report, written by the shim
//!     batch.out               what the batch script printed
//!     logs/<container>/<attempt>.log    CRI format; rotated: .log.1 …
//! ```
//!
//! The shim writes `claim.*`, `report.pb` and `logs/`, the batch script's output goes to `batch.out`,
//! and the agent writes everything else. All functions block on file I/O: async callers use
//! `spawn_blocking`. This module makes no decisions.

pub mod atomic;
pub mod claim;
pub mod decode;
#[cfg(any(test, feature = "fuzzed"))]
pub mod fuzzed;
pub mod schema;

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
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

/// How often the newest values are looked up again if a newer revision replaces them while they are
/// read.
const LOOKS: u32 = 3;

/// No number of seconds has more digits.
const MAX_STOP: usize = 19;

/// How the files that [`StateDir::follower`] names begin.
const FOLLOWER: &str = "agent.after.";

/// Why a file of the contract could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum JobDirError {
    /// A file operation failed.
    #[error("access the job directory")]
    File(#[from] FileError),
    /// The bytes are not a message of the expected kind.
    #[error("{} is not a valid {kind}", path.display())]
    Decode {
        /// The file.
        path: PathBuf,
        /// The kind of file that was expected.
        kind: &'static str,
        /// The decoder's error.
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
    /// The text is not JSON of the expected kind.
    #[error("{} is not valid", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The parser's error.
        #[source]
        source: serde_json::Error,
    },
    /// The folder's name is not a pod UID.
    #[error("{uid:?} is not a pod uid")]
    Uid {
        /// The name.
        uid: String,
    },
}

/// The agent's state directory. It holds paths only, no open files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateDir {
    root: PathBuf,
}

impl StateDir {
    /// Names `root` as the state directory. Nothing is read or created.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Creates the folders that an agent needs, with mode 0700.
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

    /// The path of the state directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The path of the lease file.
    #[must_use]
    pub fn lease(&self) -> PathBuf {
        self.root.join("agent.lease")
    }

    /// The path of the file that names who follows the lease of `epoch`. A higher `n` follows an agent that died before
    /// it had the lease.
    #[must_use]
    pub fn follower(&self, epoch: i64, n: u32) -> PathBuf {
        self.root.join(format!("{FOLLOWER}{epoch}.{n}"))
    }

    /// Removes who followed leases of other epochs than `newest`.
    pub fn sweep_followers(&self, newest: i64) -> Result<(), FileError> {
        let kept = format!("{FOLLOWER}{newest}.");
        let read = FileError::on("list", &self.root);
        for entry in fs::read_dir(&self.root).map_err(read)?.flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(FOLLOWER) && !name.starts_with(&kept) {
                // One that stays costs a name in the folder, and the next agent tries again.
                drop(fs::remove_file(entry.path()));
            }
        }
        Ok(())
    }

    /// The path of the file that tells shims where the agent is.
    #[must_use]
    pub fn endpoint(&self) -> PathBuf {
        self.root.join("endpoint.json")
    }

    /// The path of the file that remembers how shims are reached.
    #[must_use]
    pub fn shim_route(&self) -> PathBuf {
        self.root.join("shim-route.json")
    }

    /// The path of the file with the pinned cluster and its leadership epoch.
    #[must_use]
    pub fn cluster(&self) -> PathBuf {
        self.root.join("cluster.json")
    }

    /// The paths of the certificate and the key that the agent uses with shims.
    #[must_use]
    pub fn shim_hop(&self) -> (PathBuf, PathBuf) {
        (
            self.root.join("shim-hop.crt"),
            self.root.join("shim-hop.key"),
        )
    }

    /// The folder of the image cache.
    #[must_use]
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    /// The folder of the installed agent binaries that jobs exec.
    #[must_use]
    pub fn versions(&self) -> PathBuf {
        self.root.join("versions")
    }

    /// The folder of job directories.
    #[must_use]
    pub fn pods(&self) -> PathBuf {
        self.root.join("pods")
    }

    /// The job directory of `uid`. It need not exist.
    #[must_use]
    pub fn pod(&self, uid: &PodUid) -> JobDir {
        JobDir {
            path: self.pods().join(uid.as_str()),
        }
    }

    /// The job directories that exist. Names that are not UIDs are skipped.
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

/// The job directory of one pod. It holds paths only, no open files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobDir {
    path: PathBuf,
}

impl JobDir {
    /// Opens an existing job directory. The last component of its path is the pod's UID.
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

    /// Creates the folder and its fixed sub-folders, with mode 0700.
    pub fn create(&self) -> Result<(), FileError> {
        for folder in [&self.path, &self.values_dir(), &self.logs_dir()] {
            atomic::create_dir(folder)?;
        }
        Ok(())
    }

    /// Removes the folder and its contents. It is not an error if the folder does not exist.
    pub fn remove(&self) -> Result<(), FileError> {
        // The record goes first: if the agent dies midway, its next start removes the rest instead
        // of restoring the pod.
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

    /// The path of the job directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The pod's UID, which is the folder's name.
    #[must_use]
    pub fn uid(&self) -> &str {
        self.path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default()
    }

    /// The path of the agent's record of the pod (`pod::record`).
    #[must_use]
    pub fn record_path(&self) -> PathBuf {
        self.path.join("record.json")
    }

    /// The path of `job.pb`.
    #[must_use]
    pub fn spec_path(&self) -> PathBuf {
        self.path.join("job.pb")
    }

    /// Reads what the shim is to run.
    pub fn spec(&self) -> Result<pb::JobFile, JobDirError> {
        let path = self.spec_path();
        decode(&path, "job file", &atomic::read(&path)?)
    }

    /// Writes what the shim is to run.
    pub fn write_spec(&self, job: &pb::JobFile) -> Result<(), FileError> {
        atomic::replace(&self.spec_path(), &job.encode_to_vec(), 0o600)
    }

    /// The folder of staged values.
    #[must_use]
    pub fn values_dir(&self) -> PathBuf {
        self.path.join("values")
    }

    /// The newest staged values. `None` if there are none, because the shim has read them or none
    /// were staged.
    pub fn values(&self) -> Result<Option<pb::PodValues>, JobDirError> {
        for _ in 0..LOOKS {
            let Some((_, path)) = self.revisions()?.into_iter().max() else {
                return Ok(None);
            };
            if let Some(bytes) = atomic::read_optional(&path)? {
                return decode(&path, "bundle of values", &bytes).map(Some);
            }
            // A newer revision has replaced it in the meantime.
        }
        Ok(None)
    }

    /// Stages `values`, synced, and removes older revisions.
    pub fn write_values(&self, values: &pb::PodValues) -> Result<(), JobDirError> {
        let path = self.values_dir().join(values.revision.to_string());
        atomic::write(&path, &values.encode_to_vec(), 0o600)?;
        Ok(self.remove_values_up_to(values.revision.saturating_sub(1))?)
    }

    /// Removes the staged values up to `revision`. The shim calls this once it has read them; newer
    /// revisions stay.
    pub fn remove_values_up_to(&self, revision: i64) -> Result<(), FileError> {
        for (found, path) in self.revisions()? {
            if found <= revision {
                remove_if_there(&path)?;
            }
        }
        Ok(())
    }

    /// Removes all staged values, including partial files of a writer that died. The agent calls
    /// this at every terminal state.
    pub fn remove_values(&self) -> Result<(), FileError> {
        self.values_files()?
            .iter()
            .try_for_each(|path| remove_if_there(path))
    }

    fn revisions(&self) -> Result<Vec<(i64, PathBuf)>, FileError> {
        // Temporary files begin with a dot, so their names are not numbers.
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

    /// The paths of the certificate and the key that the shim uses on its link.
    #[must_use]
    pub fn link_pair(&self) -> (PathBuf, PathBuf) {
        (self.path.join("link.crt"), self.path.join("link.key"))
    }

    /// Takes the claim for `wanted`; see [`claim::claim`].
    pub fn claim(&self, wanted: &Claim, again: bool) -> Result<u32, ClaimError> {
        claim::claim(&self.path, wanted, again)
    }

    /// Whether a shim has claimed the directory. `true` if that cannot be determined.
    #[must_use]
    pub fn is_claimed(&self) -> bool {
        !matches!(claim::newest(&self.path), Ok(None))
    }

    /// The path of `report.pb`.
    #[must_use]
    pub fn report_path(&self) -> PathBuf {
        self.path.join("report.pb")
    }

    /// Reads the shim's newest report.
    pub fn report(&self) -> Result<Option<pb::Report>, JobDirError> {
        let path = self.report_path();
        // Listing the folder makes an NFS client ask the server again; a lookup may be answered
        // from the client's cache.
        drop(fs::read_dir(&self.path).map(Iterator::count));
        let Some(bytes) = atomic::read_bounded(&path, decode::MAX_REPORT)? else {
            return Ok(None);
        };
        decode::report(&bytes)
            .map(Some)
            .map_err(|source| JobDirError::Report { path, source })
    }

    /// Writes the shim's report, synced; does nothing if a later restart of the job has the claim. Slurm requeues the job of a node
    /// that it has lost, and the shim there may go on: what it says must not replace what the later one says.
    pub fn write_report(&self, report: &pb::Report) -> Result<(), FileError> {
        if let Ok(Some((_, newest))) = claim::newest(&self.path)
            && i64::from(newest.restart) > i64::from(report.restart)
        {
            return Ok(());
        }
        atomic::write(&self.report_path(), &report.encode_to_vec(), 0o600)
    }

    fn stop_path(&self) -> PathBuf {
        self.path.join("stop")
    }

    /// Writes the grace period of a stop, of which a signal is about to tell the shim.
    pub fn write_stop_grace(&self, seconds: i64) -> Result<(), FileError> {
        atomic::write(&self.stop_path(), seconds.to_string().as_bytes(), 0o600)
    }

    /// The grace period of a stop of which a signal tells; `None` if an older agent sends it, or if it cannot be read.
    #[must_use]
    pub fn stop_grace(&self) -> Option<Duration> {
        // As for the report: another one may have been written since.
        drop(fs::read_dir(&self.path).map(Iterator::count));
        let bytes = atomic::read_bounded(&self.stop_path(), MAX_STOP).ok()??;
        let text = std::str::from_utf8(&bytes).ok();
        let text = text.filter(|text| text.len() <= MAX_STOP)?;
        knoc_proto::pod::duration(text.parse().ok()?)
    }

    /// The path of the file with the output of the batch script and the shim's own log.
    #[must_use]
    pub fn batch_out(&self) -> PathBuf {
        self.path.join("batch.out")
    }

    /// The folder of the containers' logs.
    #[must_use]
    pub fn logs_dir(&self) -> PathBuf {
        self.path.join("logs")
    }

    /// The path of the live log of one attempt (restart count) of a container.
    #[must_use]
    pub fn log_path(&self, container: &str, attempt: u32) -> PathBuf {
        self.logs_dir()
            .join(container)
            .join(format!("{attempt}.log"))
    }
}

/// Reads a JSON file; `None` if it does not exist.
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

/// Replaces a JSON file; the new file has mode 0600 and is synced.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), JobDirError> {
    Ok(atomic::write(path, &to_json(path, value)?, 0o600)?)
}

/// Like [`write_json()`], if there is no such file. Returns whether this call created it; of several processes on
/// whichever hosts, one does.
pub fn create_json<T: Serialize>(path: &Path, value: &T) -> Result<bool, JobDirError> {
    Ok(atomic::create_once(path, &to_json(path, value)?, 0o600)?)
}

fn to_json<T: Serialize>(path: &Path, value: &T) -> Result<Vec<u8>, JobDirError> {
    serde_json::to_vec_pretty(value).map_err(|source| JobDirError::Json {
        path: path.to_owned(),
        source,
    })
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
