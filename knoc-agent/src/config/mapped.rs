//! `[[policy.nfs]]` and `[[policy.csi]]` of the site file: the paths at which the compute nodes have what persistent volumes
//! name. Nothing is mounted over the network for a pod.
//!
//! PURE. The path of a volume is judged like any host path; what the cluster's objects say cannot lead out of the folder that
//! the site names.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use knoc_contract::host_paths::{HostPaths, Refusal};
use knoc_proto::{
    paths,
    pb::{self, volume::Source},
};
use serde::Deserialize;

use super::Policy;

/// The maximum number of entries of each list.
const MOST: usize = 100;

/// An NFS export that the compute nodes have mounted.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nfs {
    /// The server, as persistent volumes name it.
    pub server: String,
    /// The exported path, as persistent volumes name it; everything below it is mapped too.
    pub export: PathBuf,
    /// Where the compute nodes have it.
    pub path: PathBuf,
}

/// A CSI driver whose volumes are folders of a shared file system.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Csi {
    /// The name of the driver.
    pub driver: String,
    /// Where the compute nodes have a volume: `{handle}` stands for its `volumeHandle`, `{NAME}` for the attribute of that
    /// name.
    pub path: String,
}

/// A piece of [`Csi::path`].
#[derive(Debug, PartialEq, Eq)]
enum Piece<'a> {
    Text(&'a str),
    Value(&'a str),
}

impl Policy {
    /// The path to which the site maps the volume, or why it maps it to none. `None`: it is not a kind that is mapped.
    #[must_use]
    pub fn mapped(&self, source: &Source) -> Option<Result<String, String>> {
        match source {
            Source::Nfs(nfs) => Some(self.mapped_nfs(nfs)),
            Source::Csi(csi) => Some(self.mapped_csi(csi)),
            Source::EmptyDir(_) | Source::Files(_) | Source::HostPath(_) | Source::Image(_) => None,
        }
    }

    /// The paths of all volumes that the site maps, by the volumes' names.
    #[must_use]
    pub fn all_mapped(&self, volumes: &[pb::Volume]) -> HashMap<String, String> {
        let mapped = volumes.iter().filter_map(|volume| {
            let path = self.mapped(volume.source.as_ref()?)?.ok()?;
            Some((volume.name.clone(), path))
        });
        mapped.collect()
    }

    fn mapped_nfs(&self, nfs: &pb::NfsVolume) -> Result<String, String> {
        let path =
            paths::in_container(&nfs.path).map_err(|error| format!("{:?} {error}", nfs.path))?;
        let path = Path::new(&path);
        let covering = self.nfs.iter().filter(|entry| {
            entry.server.eq_ignore_ascii_case(&nfs.server) && path.starts_with(&entry.export)
        });
        let entry = covering.max_by_key(|entry| entry.export.components().count());
        let entry = entry.ok_or_else(|| {
            format!(
                "the site maps the NFS export {}:{} to no path of its nodes (`[[policy.nfs]]` of the site file)",
                nfs.server, nfs.path
            )
        })?;
        let rest = path.strip_prefix(&entry.export).unwrap_or(path);
        Ok(cleaned(&entry.path.join(rest)))
    }

    fn mapped_csi(&self, csi: &pb::CsiVolume) -> Result<String, String> {
        let entry = self.csi.iter().find(|entry| entry.driver == csi.driver);
        let entry = entry.ok_or_else(|| {
            format!(
                "the site maps volumes of the CSI driver {:?} to no path of its nodes (`[[policy.csi]]` of the site file)",
                csi.driver
            )
        })?;
        let mut path = String::new();
        for piece in pieces(&entry.path)? {
            match piece {
                Piece::Text(text) => path.push_str(text),
                Piece::Value(name) => path.push_str(&value(csi, name)?),
            }
        }
        paths::in_container(&path)
            .map_err(|error| format!("the path {path:?} of the volume {error}"))
    }

    /// What is wrong with the entries, each with its key. `allowed`: what pods may mount.
    pub(super) fn mapping_mistakes(&self, allowed: &HostPaths) -> Vec<(&'static str, String)> {
        let mut mistakes = Vec::new();
        for (key, count) in [
            ("policy.nfs", self.nfs.len()),
            ("policy.csi", self.csi.len()),
        ] {
            if count > MOST {
                mistakes.push((key, format!("has {count} entries; the limit is {MOST}")));
            }
        }
        for entry in self.nfs.iter().take(MOST) {
            for (key, path) in [
                ("policy.nfs.export", &entry.export),
                ("policy.nfs.path", &entry.path),
            ] {
                let path = path.to_string_lossy();
                if let Err(error) = paths::in_container(&path) {
                    mistakes.push((key, format!("{path:?} {error}")));
                }
            }
            if entry.server.is_empty() {
                mistakes.push(("policy.nfs.server", "must not be empty".to_owned()));
            }
            mistakes.extend(outside(&entry.path, allowed).map(|why| ("policy.nfs.path", why)));
        }
        for entry in self.csi.iter().take(MOST) {
            if entry.driver.is_empty() {
                mistakes.push(("policy.csi.driver", "must not be empty".to_owned()));
            }
            let key = "policy.csi.path";
            let base = pieces(&entry.path).and_then(|pieces| base(&pieces));
            match base {
                Ok(base) => {
                    mistakes.extend(outside(Path::new(&base), allowed).map(|why| (key, why)));
                }
                Err(why) => mistakes.push((key, why)),
            }
        }
        mistakes
    }
}

/// Why a mapped path can never be mounted. If there is no prefix at all, the site has only not decided yet.
fn outside(path: &Path, allowed: &HostPaths) -> Option<String> {
    if allowed.prefixes.is_empty() {
        return None;
    }
    match allowed.judge(path, false) {
        Err(refusal @ Refusal::Outside { .. }) => Some(refusal.to_string()),
        Ok(_) | Err(_) => None,
    }
}

/// The folder in which all volumes lie: what precedes the first value.
fn base(pieces: &[Piece<'_>]) -> Result<String, String> {
    let text = match pieces {
        [Piece::Text(text), ..] => *text,
        _ => "",
    };
    let folder = match (pieces, text.rsplit_once('/')) {
        ([_], _) => text,
        (_, Some((folder, _))) => folder,
        (_, None) => "",
    };
    let folder = if folder.is_empty() && text.starts_with('/') {
        "/"
    } else {
        folder
    };
    paths::in_container(folder).map_err(|error| format!("{text:?} {error}"))
}

/// The pieces of a template.
fn pieces(template: &str) -> Result<Vec<Piece<'_>>, String> {
    let mut pieces = Vec::new();
    let mut rest = template;
    while let Some((text, after)) = rest.split_once('{') {
        let wrong = || format!("{template:?} has a `{{` without a name and a `}}` after it");
        let (name, after) = after.split_once('}').ok_or_else(wrong)?;
        if name.is_empty() || name.contains('{') {
            return Err(wrong());
        }
        if !text.is_empty() {
            pieces.push(Piece::Text(text));
        }
        pieces.push(Piece::Value(name));
        rest = after;
    }
    if !rest.is_empty() || pieces.is_empty() {
        pieces.push(Piece::Text(rest));
    }
    Ok(pieces)
}

/// The value of `{name}`, as a relative path.
fn value(csi: &pb::CsiVolume, name: &str) -> Result<String, String> {
    let text = match name {
        "handle" => &csi.handle,
        name => csi.attributes.get(name).ok_or_else(|| {
            format!("the CSI volume {:?} has no attribute {name:?}, which `[[policy.csi]]` of the site file uses", csi.handle)
        })?,
    };
    paths::in_volume(text.trim_start_matches('/'))
        .map_err(|error| format!("{name} {text:?} of the CSI volume {error}"))
}

fn cleaned(path: &Path) -> String {
    let text = path.to_string_lossy();
    paths::in_container(&text).unwrap_or_else(|_| text.into_owned())
}

#[cfg(test)]
mod tests {
    use knoc_contract::host_paths::Prefix;

    use super::*;

    fn policy(nfs: &[(&str, &str, &str)], csi: &[(&str, &str)]) -> Policy {
        let nfs = nfs.iter().map(|(server, export, path)| Nfs {
            server: (*server).to_owned(),
            export: export.into(),
            path: path.into(),
        });
        let csi = csi.iter().map(|(driver, path)| Csi {
            driver: (*driver).to_owned(),
            path: (*path).to_owned(),
        });
        Policy {
            nfs: nfs.collect(),
            csi: csi.collect(),
            ..Policy::default()
        }
    }

    #[test]
    fn an_export_is_where_the_most_specific_entry_says() {
        let policy = policy(
            &[
                ("Filer", "/export", "/data"),
                ("filer", "/export/scratch", "/scratch"),
            ],
            &[],
        );
        let mapped = |server: &str, path: &str| {
            policy.mapped_nfs(&pb::NfsVolume {
                server: server.to_owned(),
                path: path.to_owned(),
                ..pb::NfsVolume::default()
            })
        };
        assert_eq!(mapped("filer", "/export"), Ok("/data".to_owned()));
        assert_eq!(mapped("filer", "/export/a//b/"), Ok("/data/a/b".to_owned()));
        assert_eq!(
            mapped("FILER", "/export/scratch/x"),
            Ok("/scratch/x".to_owned())
        );
        for (server, path) in [
            ("other", "/export"),
            ("filer", "/exports"),
            ("filer", "/export/../etc"),
        ] {
            mapped(server, path).unwrap_err();
        }
    }

    #[test]
    fn no_handle_and_no_attribute_leads_out_of_the_folder_of_a_driver() {
        let policy = policy(
            &[],
            &[("d", "/scratch/{handle}"), ("n", "/data/{share}/{subdir}")],
        );
        let mapped = |driver: &str, handle: &str, attributes: &[(&str, &str)]| {
            let attributes = attributes.iter();
            policy.mapped_csi(&pb::CsiVolume {
                driver: driver.to_owned(),
                handle: handle.to_owned(),
                attributes: attributes
                    .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                    .collect(),
                ..pb::CsiVolume::default()
            })
        };
        assert_eq!(mapped("d", "a#b", &[]), Ok("/scratch/a#b".to_owned()));
        assert_eq!(mapped("d", "/a/b/", &[]), Ok("/scratch/a/b".to_owned()));
        assert_eq!(
            mapped("n", "h", &[("share", "/export"), ("subdir", "x")]),
            Ok("/data/export/x".to_owned())
        );
        let lacking = mapped("n", "h", &[("share", "/export")]).unwrap_err();
        assert!(lacking.contains("no attribute \"subdir\""), "{lacking}");
        for handle in ["..", "../etc", "a/../../etc", "/", "a\nb"] {
            mapped("d", handle, &[]).unwrap_err();
        }
        assert!(
            mapped("unknown", "h", &[])
                .unwrap_err()
                .contains("policy.csi")
        );
    }

    #[test]
    fn a_mapping_lies_below_what_pods_may_mount() {
        let allowed = HostPaths {
            prefixes: vec![Prefix {
                path: "/data".into(),
                writable: true,
            }],
            ..HostPaths::default()
        };
        let mistakes = |nfs: &[(&str, &str, &str)], csi: &[(&str, &str)]| {
            let mistakes = policy(nfs, csi).mapping_mistakes(&allowed);
            let texts: Vec<_> = mistakes
                .iter()
                .map(|(key, what)| format!("{key}: {what}"))
                .collect();
            texts.join("\n")
        };
        let right = mistakes(
            &[("h", "/e", "/data/x")],
            &[
                ("a", "/data/{handle}"),
                ("b", "/data/p-{handle}/x"),
                ("c", "/data"),
            ],
        );
        assert_eq!(right, "");
        for (nfs, csi, wanted) in [
            (
                &[("h", "/e", "/etc")][..],
                &[][..],
                "policy.nfs.path: \"/etc\" is not below",
            ),
            (&[("", "/e", "/data")], &[], "policy.nfs.server"),
            (&[("h", "e", "/data")], &[], "policy.nfs.export"),
            (
                &[],
                &[("a", "/{handle}")],
                "policy.csi.path: \"/\" is not below",
            ),
            (&[], &[("a", "{handle}")], "policy.csi.path"),
            (&[], &[("a", "/data/{handle")], "without a name"),
            (&[], &[("a", "/data/../{handle}")], "'..'"),
            (&[], &[("", "/data")], "policy.csi.driver"),
        ] {
            let text = mistakes(nfs, csi);
            assert!(text.contains(wanted), "{wanted}: {text}");
        }
    }
}
