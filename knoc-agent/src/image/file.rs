//! PURE: the part of an image's config that a container starts from.

use std::{
    collections::BTreeMap,
    path::{Component, Path},
};

use serde::{Deserialize, Serialize};

use super::manifest::{ARCHITECTURE, texts};

/// How many volumes of an image are used.
const MAX_VOLUMES: usize = 100;
/// Folders in which nothing of an image can be mounted.
const RESERVED: [&str; 4] = ["proc", "sys", "dev", ".knoc"];
/// The largest size of all these texts together; images usually have some hundred bytes.
const MAX_TEXTS: usize = 64 * 1024;

/// The part of the OCI image config that a container starts from, with the specification's field
/// names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct ImageFile {
    #[serde(deserialize_with = "texts")]
    pub(super) entrypoint: Option<Vec<String>>,
    #[serde(deserialize_with = "texts")]
    pub(super) cmd: Option<Vec<String>>,
    #[serde(deserialize_with = "texts")]
    pub(super) env: Option<Vec<String>>,
    pub(super) working_dir: Option<String>,
    pub(super) user: Option<String>,
    pub(super) stop_signal: Option<String>,
    pub(super) volumes: Option<BTreeMap<String, Option<Nothing>>>,
}

/// What the specification has as the value of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Nothing {}

impl ImageFile {
    /// Parses a registry's config blob. Every container of a pod has a copy of it, so its size is
    /// bounded.
    pub(super) fn of_oci(text: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Blob {
            #[serde(default)]
            os: String,
            #[serde(default)]
            architecture: String,
            config: Option<ImageFile>,
        }
        let blob: Blob = serde_json::from_slice(text)
            .map_err(|error| format!("the image's config cannot be read: {error}"))?;
        let architecture = match blob.architecture.as_str() {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            architecture => architecture,
        };
        let fits = |own: &str, wanted: &str| own.is_empty() || own == wanted;
        if !fits(&blob.os, "linux") || !fits(architecture, ARCHITECTURE) {
            return Err(format!(
                "the image is for {}/{architecture}, and the nodes are linux/{ARCHITECTURE}",
                blob.os
            ));
        }
        blob.config.unwrap_or_default().bounded()
    }

    /// Checks that it is not too large for every container to have a copy.
    pub(super) fn bounded(self) -> Result<Self, String> {
        let length = self.length();
        if length <= MAX_TEXTS {
            return Ok(self);
        }
        Err(format!(
            "entrypoint, arguments and variables of the image have {length} bytes, and at most {MAX_TEXTS} are allowed"
        ))
    }

    fn length(&self) -> usize {
        let lists = [&self.entrypoint, &self.cmd, &self.env]
            .into_iter()
            .flatten();
        let single = [&self.working_dir, &self.user, &self.stop_signal];
        let single = single.into_iter().flatten();
        let volumes = self.volumes.iter().flat_map(BTreeMap::keys);
        let all = lists.flatten().chain(single).chain(volumes);
        all.map(String::len).sum()
    }

    /// The folders that the image declares as volumes, as absolute paths, as far as a folder can be mounted there. A folder comes
    /// before those in it.
    pub(super) fn volume_paths(&self) -> Vec<String> {
        let named = self.volumes.iter().flat_map(BTreeMap::keys);
        let mut paths: Vec<String> = named.filter_map(|path| volume(path)).collect();
        paths.sort_unstable();
        paths.dedup();
        paths.truncate(MAX_VOLUMES);
        paths
    }

    /// Parses the JSON that Apptainer writes into a SIF; `None` if it is some other JSON.
    pub(super) fn of_sif(text: &str) -> Option<Self> {
        let keys: BTreeMap<String, serde_json::Value> = serde_json::from_str(text).ok()?;
        let known = ["Entrypoint", "Cmd", "Env", "WorkingDir", "User"];
        if !known.iter().any(|key| keys.contains_key(*key)) {
            return None;
        }
        serde_json::from_str(text).ok()
    }
}

/// The path of a volume, without what does not belong there. `None` for a path that leaves the root, for the root itself
/// and for the system's folders.
fn volume(path: &str) -> Option<String> {
    let mut clean = String::new();
    for part in Path::new(path).components() {
        match part {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => {
                clean.push('/');
                clean.push_str(name.to_str()?);
            }
            Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    let first = clean.split('/').nth(1)?;
    let usable = !RESERVED.contains(&first) && !clean.contains('\0');
    usable.then_some(clean)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configs_of_registries_and_of_sifs() {
        let blob = br#"{"config":{"Cmd":["/bin/sh"],"Env":["A=b"],"Entrypoint":null,"WorkingDir":"/w","User":"1000","StopSignal":"SIGQUIT"}}"#;
        let config = ImageFile::of_oci(blob).unwrap();
        assert_eq!(config.cmd.unwrap(), ["/bin/sh"]);
        let rest = (config.working_dir.as_deref(), config.user.as_deref());
        assert_eq!(rest, (Some("/w"), Some("1000")));
        assert_eq!(config.entrypoint, None);
        assert_eq!(config.stop_signal.as_deref(), Some("SIGQUIT"));
        assert_eq!(ImageFile::of_oci(b"{}").unwrap(), ImageFile::default());
        let sif = r#"{"Cmd":["/bin/sh"],"Env":["PATH=/bin"],"WorkingDir":"/"}"#;
        assert_eq!(ImageFile::of_sif(sif).unwrap().cmd.unwrap(), ["/bin/sh"]);
        assert_eq!(ImageFile::of_sif(r#"{"data":{"attributes":{}}}"#), None);
        assert_eq!(ImageFile::of_sif("[]"), None);
        let other = ImageFile::of_oci(br#"{"os":"linux","architecture":"riscv64"}"#).unwrap_err();
        assert!(other.contains("is for linux/riscv64"), "{other}");
        ImageFile::of_oci(br#"{"os":"windows"}"#).unwrap_err();
        let volumes = ImageFile::of_oci(
            br#"{"config":{"Volumes":{"/data":{},"srv//x/":null,"/a/../b":{},"/":{},"/proc/x":{},"/dev":{}}}}"#,
        );
        let volumes = volumes.unwrap();
        assert_eq!(volumes.volume_paths(), ["/data", "/srv/x"]);
        let text = serde_json::to_string(&volumes).unwrap();
        assert_eq!(serde_json::from_str::<ImageFile>(&text).unwrap(), volumes);
        let nested = ImageFile::of_oci(
            br#"{"config":{"Volumes":{"/data/sub":{},"data":{},"/data/":{},"/a":{}}}}"#,
        );
        let nested = nested.unwrap().volume_paths();
        assert_eq!(nested, ["/a", "/data", "/data/sub"]);
        let long = format!(r#"{{"config":{{"Env":["A={}"]}}}}"#, "x".repeat(MAX_TEXTS));
        let why = ImageFile::of_oci(long.as_bytes()).unwrap_err();
        assert!(why.contains("have 65538 bytes"), "{why}");
        let many = format!(
            r#"{{"config":{{"Cmd":[{}]}}}}"#,
            vec!["\"\""; 10_001].join(",")
        );
        assert!(ImageFile::of_oci(many.as_bytes()).is_err());
    }
}
