//! What `doctor` checks about images: the runtime, their compression, the cache, the image roots and the mirrors.

use std::path::Path;

use knoc_contract::{
    setuid,
    walk::{self, WalkError},
};
use knoc_proto::{error, pb};

use super::{Images, Name, library::Library, reference, runtime_version};

impl Images {
    /// The findings, in the order in which an image is processed.
    pub async fn checks(&self) -> Vec<pb::Finding> {
        let settings = self.settings();
        let mut all = vec![self.runtime().await];
        let Some(program) = &settings.program else {
            return all;
        };
        all.push(exec(program));
        let (compression, cure) = self.compressor().describe(settings).await;
        all.push(finding("images: compression", compression, &cure));
        all.push(self.kept().await);
        for root in &settings.roots {
            all.push(folder(
                "images: image_roots",
                root,
                "create the directory, or remove it from image_roots",
            ));
            if !settings.trust_shared_roots {
                all.push(trusted(root));
            }
        }
        for entry in settings
            .registries
            .iter()
            .filter(|entry| entry.mirror.is_some())
        {
            all.push(self.mirror(&entry.prefix).await);
        }
        if let Some(library) = &settings.library {
            all.push(self.library(library).await);
        }
        all
    }

    /// Checks that the cache exists, and how full it is.
    async fn kept(&self) -> pb::Finding {
        let cure = "check the quota and the permissions of state_dir";
        let path = self.settings().state.images();
        let limit = self.settings().limits.cache;
        let cache = std::sync::Arc::clone(self.cache());
        let usage = tokio::task::spawn_blocking(move || cache.usage()).await;
        let mut found = folder("images: cache", &path, cure);
        if let (true, Ok((images, bytes))) = (found.ok, usage) {
            let text = format!(": {images} images, {bytes} of {limit} bytes");
            found.detail.push_str(&text);
        }
        found
    }

    async fn runtime(&self) -> pb::Finding {
        let settings = self.settings();
        match runtime_version(settings).await {
            Ok(version) => {
                let path = settings.program.as_deref().unwrap_or_else(|| Path::new(""));
                finding(
                    "images: runtime",
                    Ok(format!("{version} {}", path.display())),
                    "",
                )
            }
            Err(err) => {
                let cure = "set tools.apptainer in the site file, or load its module before the agent starts";
                finding("images: runtime", Err(error::chain(&err)), cure)
            }
        }
    }

    /// Checks that the site's library answers at all, and that the token for it can be read.
    async fn library(&self, library: &Library) -> pb::Finding {
        let asked = async {
            library.authorization().await?;
            let name = Name::of_library("knoc/doctor/none", &library.host);
            let name = name.map_err(|error| error.to_string())?;
            self.registry().answers(&library.source(&name)).await?;
            Ok(format!("{} answers", library.address))
        };
        let cure = "check library and library_token under [images] of the site file";
        finding("images: library", asked.await, cure)
    }

    /// Checks that a mirror answers at all: an answer that it does not have the image is enough.
    async fn mirror(&self, prefix: &str) -> pb::Finding {
        let check = format!("images: mirror of {prefix}");
        let cure = "check mirror and insecure of this [[registry]] in the site file";
        let name: Result<Name, _> = format!("{prefix}/knoc/doctor:none").parse();
        let Ok(name) = name else {
            return finding(
                &check,
                Err("the prefix is not a registry name".to_owned()),
                cure,
            );
        };
        let source = match reference::source(&name, &self.settings().registries, None) {
            Ok(source) => source,
            Err(message) => return finding(&check, Err(message), cure),
        };
        let registry = source.reference.registry().to_owned();
        let result = self.registry().answers(&source).await;
        finding(&check, result.map(|()| format!("{registry} answers")), cure)
    }
}

/// Checks whether a process can join a running container.
fn exec(program: &Path) -> pb::Finding {
    let name = program
        .file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let result = match setuid::starter(&name, program) {
        None => Ok("by joining the container's namespaces (userns)".to_owned()),
        Some(starter) => Err(format!(
            "not possible: {} sets containers up as root, and other users may not join them",
            starter.display()
        )),
    };
    let cure = "install Apptainer without its setuid part, or set `allow setuid = no` in the runtime's configuration";
    finding("runtime: exec", result, cure)
}

/// Checks whether other users could choose what runs as this account.
fn trusted(root: &Path) -> pb::Finding {
    let walked = walk::owned_way(root);
    let cure = "make sure that it and all directories above it belong to root or to you and that nobody else can write to them, or set \
                trust_shared_roots in the site file";
    let result = match walked {
        // Another finding reports if the root does not exist.
        Ok(_) | Err(WalkError::Io { .. }) => {
            Ok(format!("nobody else can change {}", root.display()))
        }
        Err(error) => Err(error::chain(&error)),
    };
    finding("images: who can change image_roots", result, cure)
}

fn folder(check: &str, path: &Path, cure: &str) -> pb::Finding {
    let read = std::fs::read_dir(path).map(drop);
    let result = read.map(|()| path.display().to_string());
    finding(
        check,
        result.map_err(|err| format!("{}: {err}", path.display())),
        cure,
    )
}

fn finding(check: &str, result: Result<String, String>, cure: &str) -> pb::Finding {
    let ok = result.is_ok();
    let detail = result.unwrap_or_else(|message| message);
    let cure = if ok { String::new() } else { cure.to_owned() };
    pb::Finding {
        check: check.to_owned(),
        ok,
        detail,
        cure,
    }
}
