//! The directory of pulled images and their configs.
//!
//! ```text
//! images/sha256-<hex>.sif    renamed into place when complete
//! images/sha256-<hex>.json   the image's config, and who may use it; written before the SIF
//! images/tags.json           name → digest, as last seen; IfNotPresent uses it
//! images/.tmp/               pulls in progress
//! ```
//!
//! The modification time of a config is the time when its image was last used. The SIF itself is
//! never touched, because jobs check that it is the file they were submitted with. [`super::room`]
//! bounds the total size, that of pulls in progress included.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use knoc_contract::{
    jobdir::{JobDirError, StateDir, read_json, write_json},
    tree,
};
use knoc_proto::{error::chain, pb};
use serde::{Deserialize, Serialize};

use super::{
    access::Access,
    claims::{Claims, Kept},
    file::ImageFile,
    login::Credential,
    survivors,
};

/// How many names have their digest recorded; if there are more, some cost another request to the
/// registry.
const MAX_TAGS: usize = 20_000;
/// The modification time is updated at most this often.
const USE_NOTED: Duration = Duration::from_mins(10);

impl From<ImageFile> for pb::ImageConfig {
    fn from(file: ImageFile) -> Self {
        Self {
            volumes: file.volume_paths(),
            stop_signal: file.stop_signal.unwrap_or_default(),
            entrypoint: file.entrypoint.unwrap_or_default(),
            cmd: file.cmd.unwrap_or_default(),
            env: file.env.unwrap_or_default(),
            working_dir: file.working_dir.unwrap_or_default(),
            user: file.user.unwrap_or_default(),
        }
    }
}

/// What is recorded about an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    #[serde(flatten)]
    pub(super) file: ImageFile,
    #[serde(flatten)]
    pub(super) access: Access,
    /// Whether it was pushed as this SIF file, and not converted by the agent.
    #[serde(rename = "Pushed", default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) pushed: bool,
}

/// The cache directory.
#[derive(Debug)]
pub(super) struct Cache {
    pub(super) state: StateDir,
    root: PathBuf,
    /// `None` until `tags.json` has been read.
    tags: Mutex<Option<BTreeMap<String, String>>>,
    /// Held while an image's record is changed.
    recording: Mutex<()>,
    pub(super) claims: Mutex<Claims>,
    /// Held while images are removed.
    pub(super) making: Mutex<()>,
}

impl Cache {
    pub(super) fn new(state: StateDir) -> Self {
        Self {
            root: state.images(),
            state,
            tags: Mutex::new(None),
            recording: Mutex::default(),
            claims: Mutex::default(),
            making: Mutex::default(),
        }
    }

    pub(super) fn sif(&self, digest: &str) -> PathBuf {
        self.root.join(format!("{}.sif", file_stem(digest)))
    }

    pub(super) fn config(&self, digest: &str) -> PathBuf {
        self.root.join(format!("{}.json", file_stem(digest)))
    }

    /// The directory for pulls in progress, on the same file system.
    pub(super) fn temporary(&self) -> PathBuf {
        self.root.join(".tmp")
    }

    /// The record of an image that is cached completely and is about to be used; the caller holds
    /// it. Blocking.
    pub(super) fn get(&self, digest: &str) -> Option<Entry> {
        let entry = self.entry(digest);
        if entry.is_some() {
            note_use(&self.config(digest), jiff::Timestamp::now().into());
        }
        entry
    }

    fn entry(&self, digest: &str) -> Option<Entry> {
        if !self.sif(digest).is_file() {
            return None;
        }
        read_json(&self.config(digest)).ok().flatten()
    }

    /// Records in a cached image that the repository gave it for this credential. Blocking.
    pub(super) fn grant(
        &self,
        digest: &str,
        repository: &str,
        credential: &Credential,
    ) -> Result<(), JobDirError> {
        let _one = self.record();
        let Some(mut entry) = self.entry(digest) else {
            return Ok(());
        };
        if entry.access.grant(repository, credential) {
            write_json(&self.config(digest), &entry)?;
        }
        Ok(())
    }

    /// Records in a cached image what another pull of it found out. Returns `false` if the image is not cached.
    /// Blocking.
    pub(super) fn join(&self, digest: &str, access: Access) -> Result<bool, JobDirError> {
        let _one = self.record();
        self.join_recorded(digest, access)
    }

    fn join_recorded(&self, digest: &str, access: Access) -> Result<bool, JobDirError> {
        let Some(mut entry) = self.entry(digest) else {
            return Ok(false);
        };
        let before = entry.access.clone();
        entry.access.join(access);
        if entry.access != before {
            write_json(&self.config(digest), &entry)?;
        }
        Ok(true)
    }

    fn record(&self) -> MutexGuard<'_, ()> {
        self.recording
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// All cached images. Blocking.
    pub(super) fn images(&self) -> Vec<Kept> {
        let Ok(entries) = fs::read_dir(&self.root) else {
            return Vec::new();
        };
        let image = |entry: fs::DirEntry| {
            let name = entry.file_name().into_string().ok()?;
            let digest = name.strip_suffix(".sif")?.replacen('-', ":", 1);
            let about = entry.metadata().ok()?;
            let used = fs::metadata(self.config(&digest)).and_then(|about| about.modified());
            Some(Kept {
                sif: entry.path(),
                bytes: about.len(),
                used: used.or_else(|_| about.modified()).ok()?,
                digest,
            })
        };
        entries.filter_map(|entry| image(entry.ok()?)).collect()
    }

    /// The names of the directories of pulls that an earlier agent left unfinished. Blocking.
    pub(super) fn pulls(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.temporary()) else {
            return Vec::new();
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        names.collect()
    }

    /// Removes what an earlier agent left unfinished. Blocking; called once, at start.
    pub(super) fn sweep(&self) {
        let temporary = self.temporary();
        survivors::end(&temporary);
        if let Err(error) = tree::remove(&temporary) {
            tracing::warn!(folder = %temporary.display(), %error, "cannot remove what pulls left");
        }
        let Ok(entries) = fs::read_dir(&self.root) else {
            return;
        };
        for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
            let name = path.file_name().and_then(|name| name.to_str());
            let half = match name.map(|name| name.rsplit_once('.').unwrap_or(("", name))) {
                Some((stem, "json")) => stem != "tags" && !path.with_extension("sif").exists(),
                Some((_, "sif")) => !path.with_extension("json").exists(),
                // Files that were being written begin with a dot.
                Some(_) => name.is_some_and(|name| name.starts_with('.') && name != ".tmp"),
                None => false,
            };
            if half {
                fs::remove_file(&path).ok();
            }
        }
    }

    /// Moves a pulled file into the cache. An image that is there already stays, because jobs check
    /// that it is the file that they were submitted with. Blocking.
    pub(super) fn put(&self, digest: &str, entry: &Entry, sif: &Path) -> Result<(), JobDirError> {
        use knoc_contract::jobdir::atomic::{FileError, sync_parent};
        let _one = self.record();
        if self.join_recorded(digest, entry.access.clone())? {
            return Ok(());
        }
        write_json(&self.config(digest), entry)?;
        let sync = std::fs::File::open(sif).and_then(|sif| sif.sync_all());
        sync.map_err(FileError::on("sync", sif))?;
        let target = self.sif(digest);
        std::fs::rename(sif, &target).map_err(FileError::on("rename over", &target))?;
        sync_parent(&target)?;
        Ok(())
    }

    /// The digest that a name had when it was last resolved. The first call blocks.
    pub(super) fn digest(&self, name: &str) -> Option<String> {
        let mut tags = self.tags.lock().unwrap_or_else(PoisonError::into_inner);
        self.loaded(&mut tags).get(name).cloned()
    }

    /// Records the digest of a name. Blocking.
    pub(super) fn remember(&self, name: &str, digest: &str) -> Result<(), JobDirError> {
        let mut tags = self.tags.lock().unwrap_or_else(PoisonError::into_inner);
        let known = self.loaded(&mut tags);
        if known.get(name).is_some_and(|known| known == digest) {
            return Ok(());
        }
        if known.len() >= MAX_TAGS {
            known.retain(|_, digest| self.sif(digest).is_file());
            while known.len() >= MAX_TAGS {
                known.pop_first();
            }
        }
        known.insert(name.to_owned(), digest.to_owned());
        write_json(&self.root.join("tags.json"), known)
    }

    /// Removes the names of images that are no longer cached. Blocking.
    pub(super) fn forget(&self, gone: &[String]) {
        let mut tags = self.tags.lock().unwrap_or_else(PoisonError::into_inner);
        let known = self.loaded(&mut tags);
        let before = known.len();
        known.retain(|_, digest| !gone.contains(digest));
        if known.len() == before {
            return;
        }
        if let Err(error) = write_json(&self.root.join("tags.json"), known) {
            // A name without its image costs one request to the registry.
            tracing::warn!(error = chain(&error), "cannot write tags.json");
        }
    }

    fn loaded<'a>(
        &self,
        tags: &'a mut Option<BTreeMap<String, String>>,
    ) -> &'a mut BTreeMap<String, String> {
        // If the file is broken, each name costs one request to the registry.
        tags.get_or_insert_with(|| {
            read_json(&self.root.join("tags.json"))
                .ok()
                .flatten()
                .unwrap_or_default()
        })
    }
}

/// Sets a config's modification time to the time of a use.
fn note_use(config: &Path, now: SystemTime) {
    let noted = File::open(config).and_then(|file| {
        let last = file.metadata()?.modified()?;
        if now
            .duration_since(last)
            .is_ok_and(|since| since >= USE_NOTED)
        {
            file.set_modified(now)?;
        }
        Ok(())
    });
    if let Err(error) = noted {
        tracing::debug!(config = %config.display(), %error, "cannot record that an image was used");
    }
}

/// A digest as a file name, without the colon, which the runtime would parse as a separator.
fn file_stem(digest: &str) -> String {
    digest.replace([':', '/'], "-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_there_when_both_files_are() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path());
        state.create().unwrap();
        let cache = Cache::new(state.clone());
        assert_eq!(cache.get("sha256:ab"), None);
        let pulled = dir.path().join("pulled");
        std::fs::File::create(&pulled).unwrap();
        let entry = Entry {
            file: ImageFile {
                cmd: Some(vec!["/bin/sh".to_owned()]),
                ..ImageFile::default()
            },
            access: Access::pulled("a/b", true),
            pushed: true,
        };
        cache.put("sha256:ab", &entry, &pulled).unwrap();
        assert_eq!(cache.get("sha256:ab"), Some(entry));
        // What agents wrote that sent no credentials and knew no SIF files of registries.
        let older = state.images().join("sha256-cd");
        std::fs::File::create(older.with_extension("sif")).unwrap();
        write_json(&older.with_extension("json"), &ImageFile::default()).unwrap();
        let older = cache.get("sha256:cd").unwrap();
        assert_eq!(older.access, Access::pulled("a/b", false));
        assert!(!older.pushed);
        assert!(state.images().join("sha256-ab.sif").is_file());
        cache.remember("busybox", "sha256:ab").unwrap();
        let again = Cache::new(state);
        assert_eq!(again.digest("busybox").as_deref(), Some("sha256:ab"));
    }
}
