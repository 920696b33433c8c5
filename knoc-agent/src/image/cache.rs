//! The folder of pulled images, and what is known of them.
//!
//! ```text
//! images/sha256-<hex>.sif    renamed into place when whole
//! images/sha256-<hex>.json   the image's config; written before the SIF is
//! images/tags.json           name → digest, as last seen: what IfNotPresent goes by
//! images/.tmp/               pulls under way
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use knoc_proto::pb;
use serde::{Deserialize, Serialize};

use crate::jobdir::{JobDirError, read_json, write_json};

/// The part of the OCI config that a container starts from, in the words of the OCI specification.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct ImageFile {
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    env: Option<Vec<String>>,
    working_dir: Option<String>,
    user: Option<String>,
}

impl ImageFile {
    /// From a registry's config blob.
    pub(super) fn of_oci(text: &str) -> Result<Self, serde_json::Error> {
        #[derive(Deserialize)]
        struct Blob {
            config: Option<ImageFile>,
        }
        let blob: Blob = serde_json::from_str(text)?;
        Ok(blob.config.unwrap_or_default())
    }

    /// From the JSON that Apptainer puts into a SIF; `None` where it is another JSON.
    pub(super) fn of_sif(text: &str) -> Option<Self> {
        let keys: BTreeMap<String, serde_json::Value> = serde_json::from_str(text).ok()?;
        let known = ["Entrypoint", "Cmd", "Env", "WorkingDir", "User"];
        if !known.iter().any(|key| keys.contains_key(*key)) {
            return None;
        }
        serde_json::from_str(text).ok()
    }
}

impl From<ImageFile> for pb::ImageConfig {
    fn from(file: ImageFile) -> Self {
        Self {
            entrypoint: file.entrypoint.unwrap_or_default(),
            cmd: file.cmd.unwrap_or_default(),
            env: file.env.unwrap_or_default(),
            working_dir: file.working_dir.unwrap_or_default(),
            user: file.user.unwrap_or_default(),
        }
    }
}

/// The cache's folder.
#[derive(Debug)]
pub(super) struct Cache {
    root: PathBuf,
    /// `None` until read.
    tags: Mutex<Option<BTreeMap<String, String>>>,
}

impl Cache {
    pub(super) fn new(root: PathBuf) -> Self {
        Self {
            root,
            tags: Mutex::new(None),
        }
    }

    pub(super) fn sif(&self, digest: &str) -> PathBuf {
        self.root.join(format!("{}.sif", file_stem(digest)))
    }

    fn config(&self, digest: &str) -> PathBuf {
        self.root.join(format!("{}.json", file_stem(digest)))
    }

    /// Where pulls are written to; on the same file system.
    pub(super) fn temporary(&self) -> PathBuf {
        self.root.join(".tmp")
    }

    /// The config of an image that is here, whole. Blocking.
    pub(super) fn get(&self, digest: &str) -> Option<ImageFile> {
        if !self.sif(digest).is_file() {
            return None;
        }
        read_json(&self.config(digest)).ok().flatten()
    }

    /// Takes a pulled file in. Blocking.
    pub(super) fn put(
        &self,
        digest: &str,
        file: &ImageFile,
        sif: &Path,
    ) -> Result<(), JobDirError> {
        use crate::jobdir::atomic::{FileError, sync_parent};
        write_json(&self.config(digest), file)?;
        let sync = std::fs::File::open(sif).and_then(|sif| sif.sync_all());
        sync.map_err(FileError::on("sync", sif))?;
        let target = self.sif(digest);
        std::fs::rename(sif, &target).map_err(FileError::on("rename over", &target))?;
        sync_parent(&target)?;
        Ok(())
    }

    /// The digest that a name had when it was last resolved. Blocking at the first call.
    pub(super) fn digest(&self, name: &str) -> Option<String> {
        let mut tags = self.tags.lock().unwrap_or_else(PoisonError::into_inner);
        self.loaded(&mut tags).get(name).cloned()
    }

    /// Remembers the digest of a name. Blocking.
    pub(super) fn remember(&self, name: &str, digest: &str) -> Result<(), JobDirError> {
        let mut tags = self.tags.lock().unwrap_or_else(PoisonError::into_inner);
        let known = self.loaded(&mut tags);
        if known.get(name).is_some_and(|known| known == digest) {
            return Ok(());
        }
        known.insert(name.to_owned(), digest.to_owned());
        write_json(&self.root.join("tags.json"), known)
    }

    fn loaded<'a>(
        &self,
        tags: &'a mut Option<BTreeMap<String, String>>,
    ) -> &'a mut BTreeMap<String, String> {
        // A broken file costs one question to the registry for each name.
        tags.get_or_insert_with(|| {
            read_json(&self.root.join("tags.json"))
                .ok()
                .flatten()
                .unwrap_or_default()
        })
    }
}

/// A digest as a file name: a colon would be a separator to the runtime.
fn file_stem(digest: &str) -> String {
    digest.replace([':', '/'], "-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configs_of_registries_and_of_sifs() {
        let blob = r#"{"architecture":"amd64","config":{"Cmd":["/bin/sh"],"Env":["A=b"],"Entrypoint":null,"WorkingDir":"/w","User":"1000"}}"#;
        let config = pb::ImageConfig::from(ImageFile::of_oci(blob).unwrap());
        assert_eq!(config.cmd, ["/bin/sh"]);
        assert_eq!(
            (config.working_dir.as_str(), config.user.as_str()),
            ("/w", "1000")
        );
        assert!(config.entrypoint.is_empty());
        assert_eq!(ImageFile::of_oci("{}").unwrap(), ImageFile::default());
        let sif = r#"{"Cmd":["/bin/sh"],"Env":["PATH=/bin"],"WorkingDir":"/"}"#;
        assert_eq!(ImageFile::of_sif(sif).unwrap().cmd.unwrap(), ["/bin/sh"]);
        assert_eq!(ImageFile::of_sif(r#"{"data":{"attributes":{}}}"#), None);
        assert_eq!(ImageFile::of_sif("[]"), None);
    }

    #[test]
    fn an_image_is_there_when_both_files_are() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path().to_owned());
        assert_eq!(cache.get("sha256:ab"), None);
        let pulled = dir.path().join("pulled");
        std::fs::File::create(&pulled).unwrap();
        cache
            .put("sha256:ab", &ImageFile::default(), &pulled)
            .unwrap();
        assert_eq!(cache.get("sha256:ab"), Some(ImageFile::default()));
        assert!(dir.path().join("sha256-ab.sif").is_file());
        cache.remember("busybox", "sha256:ab").unwrap();
        let again = Cache::new(dir.path().to_owned());
        assert_eq!(again.digest("busybox").as_deref(), Some("sha256:ab"));
    }
}
