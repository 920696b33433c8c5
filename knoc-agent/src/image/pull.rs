//! Pulls an image from a registry into the cache: the agent downloads and checks it, and the
//! runtime converts it to a SIF file.
//!
//! ```text
//! size by the manifest ─► slot ─► room in the cache ─► layers ─► digests, unpacked size ─► conversion ─► cache
//! ```
//!
//! The runtime makes no request of its own: it is given an OCI image layout in which every blob was
//! checked. The caller makes pulls single-flight. Cancel safety: a dropped pull stops its
//! downloads, its checks and the runtime, and removes what it wrote.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use knoc_contract::{jobdir::atomic, tree};
use knoc_proto::error::chain;
use tokio_util::sync::CancellationToken;

use super::{
    Settings,
    access::Access,
    cache::{Cache, Entry},
    compression::{Compressor, Method},
    download::{Download, Layout},
    progress::{Progress, Step},
    reference::Source,
    registry::{Found, RegistryClient, describe},
    room::Reserved,
    slots::FairSlots,
    unpacked::{self, Budget, LayerError},
    untrusted::shown,
};
use crate::command::{Command, CommandError, CommandErrorKind};

/// How much of the runtime's output is kept.
const MAX_OUTPUT: usize = 64 * 1024;
/// How many images are pulled at the same time: their layers and their unpacked files are on disk
/// meanwhile.
pub(super) const PULLS: usize = 8;
/// How many of them are from one registry.
pub(super) const PULLS_EACH: usize = 2;
/// The layout's name in the directory of its pull. The runtime is given only this relative name,
/// because it would parse a colon in the state directory's path as the start of a tag.
const LAYOUT: &str = "layout";
/// The name there of the file that the runtime makes.
const SIF: &str = "image.sif";

/// Pulls an image that is not cached.
#[derive(Debug, Clone)]
pub(super) struct Puller {
    pub(super) settings: Arc<Settings>,
    pub(super) cache: Arc<Cache>,
    pub(super) registry: Arc<RegistryClient>,
    /// Tells those who wait how far it is.
    pub(super) progress: Arc<Progress>,
    /// Slots for whole pulls.
    pub(super) pulls: Arc<FairSlots>,
    /// Slots for conversions, which use the login node's processors.
    pub(super) conversions: Arc<FairSlots>,
    /// Decides how the image's files are compressed.
    pub(super) compressor: Arc<Compressor>,
}

impl Puller {
    /// Pulls the image that was found at `source`, for pods that may use it by `access`.
    pub(super) async fn pull(
        self,
        source: Source,
        found: Found,
        access: Access,
    ) -> Result<(), String> {
        let size = self.admissible(&source, &found)?;
        let registry = source.reference.registry();
        let _slot = self.pulls.acquire(registry).await;
        self.progress.enter(Step::Downloads);
        let begin = tokio::time::Instant::now();
        let (cache, room) = (Arc::clone(&self.cache), self.settings.limits.cache);
        let reserved = blocking(move || cache.reserve(size, room)).await?;
        let temporary = Temporary::new(&self.cache)?;
        let folder = temporary.0.join(LAYOUT);
        let layout = blocking(move || Layout::create(folder).map_err(|err| chain(&err))).await?;
        let download = Download {
            registry: &self.registry,
            source: &source,
            layout: &layout,
            slots: &self.pulls,
            stall: self.settings.limits.stall,
            progress: &self.progress,
        };
        // Fetched only now, so that a pull that waits for a slot holds little memory.
        let config = self.registry.config(&source, &found.image).await?;
        download.layers(&found.image).await?;
        let fetched = begin.elapsed();
        self.progress.enter(Step::Checks);
        let _converting = self.conversions.acquire(registry).await;
        let checked = self.check(layout, &found, config.text).await;
        checked.map_err(|text| describe(&source, &text))?;
        let digest = found.digest.to_string();
        // What was downloaded proves that the source has the image, if it is cached already.
        let (cache, cached, also) = (Arc::clone(&self.cache), digest.clone(), access.clone());
        if blocking(move || cache.join(&cached, also).map_err(|err| chain(&err))).await? {
            return Ok(());
        }
        self.progress.enter(Step::Converts);
        self.convert(&temporary).await?;
        let image = source.reference.at(&found.digest);
        tracing::info!(%image, bytes = size, ?fetched, elapsed = ?begin.elapsed(), "pulled");
        let entry = Entry {
            file: config.file,
            access,
        };
        self.keep(temporary, reserved, digest, entry).await
    }

    /// The size of the image by its manifest, if the site lets images have it.
    fn admissible(&self, source: &Source, found: &Found) -> Result<u64, String> {
        let size = found.image.size();
        let limit = self.settings.limits.size;
        if size <= limit {
            return Ok(size);
        }
        let text = format!(
            "the image has {size} bytes by its manifest, but limits.image_size of the site file is {limit}"
        );
        Err(describe(source, &text))
    }

    /// Puts the SIF file into the cache.
    async fn keep(
        &self,
        temporary: Temporary,
        mut reserved: Reserved,
        digest: String,
        entry: Entry,
    ) -> Result<(), String> {
        let (cache, room) = (Arc::clone(&self.cache), self.settings.limits.cache);
        blocking(move || {
            let sif = temporary.0.join(SIF);
            // A SIF file may be larger than its layers.
            let about = std::fs::metadata(&sif);
            let about = about.map_err(|error| format!("{}: {error}", sif.display()))?;
            reserved.at_least(about.len());
            cache.make_room(room)?;
            let put = cache.put(&digest, &entry, &sif);
            put.map_err(|err| chain(&err))?;
            temporary.remove();
            Ok(())
        })
        .await
    }

    /// Checks the digests and the unpacked size of all layers, and completes the layout.
    async fn check(&self, layout: Layout, found: &Found, config: Vec<u8>) -> Result<(), String> {
        let stop = CancellationToken::new();
        let _stops = stop.clone().drop_guard();
        let mut budget = Budget {
            bytes: self.settings.limits.unpacked,
            entries: unpacked::MAX_ENTRIES,
        };
        let limit = budget.bytes;
        let image = Arc::clone(&found.image);
        blocking(move || {
            let mut packings = Vec::new();
            for layer in &image.layers {
                let path = layout.blob(&layer.digest);
                let stopped = || stop.is_cancelled();
                let packing = unpacked::measure(&path, &layer.digest, &mut budget, &stopped);
                packings.push(packing.map_err(|error| match error {
                    LayerError::TooLarge => {
                        format!("{error} (limits.image_unpacked of the site file is {limit} bytes)")
                    }
                    LayerError::Broken(why) => why,
                })?);
            }
            layout.complete(&image, &config, &packings)
        })
        .await
    }

    /// Converts the layout to a SIF file. An image that cannot be compressed as it should be is compressed with gzip.
    async fn convert(&self, temporary: &Temporary) -> Result<(), String> {
        let method = self.compressor.method(&self.settings).await;
        let converted = self.conversion(method, temporary)?.run().await;
        let Err(error) = converted else {
            return Ok(());
        };
        let by_itself = matches!(error.kind, CommandErrorKind::Exit { code: Some(_), .. });
        if method == Method::Gzip || !by_itself {
            return Err(why(&error));
        }
        // Only if this succeeds was it the compression.
        let again = self.conversion(Method::Gzip, temporary)?.run().await;
        again.map_err(|error| why(&error))?;
        self.compressor.failed(method, why(&error));
        Ok(())
    }

    /// The command that converts the layout.
    fn conversion(&self, method: Method, temporary: &Temporary) -> Result<Command, String> {
        let command = self
            .settings
            .command()
            .ok_or("this site has no container runtime")?;
        let source = format!("oci:{LAYOUT}");
        let command = command
            .args(method.argv(SIF, &source))
            .current_dir(&temporary.0)
            .deadline(self.settings.pull_timeout)
            .capture(MAX_OUTPUT);
        let folders = ["TMPDIR", "CACHEDIR"];
        Ok(folders.into_iter().fold(command, |command, folder| {
            command
                .env(format!("APPTAINER_{folder}"), &temporary.0)
                .env(format!("SINGULARITY_{folder}"), &temporary.0)
        }))
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| chain(&error)).flatten()
}

/// Why the runtime failed, in its own message if it wrote one.
pub(super) fn why(error: &CommandError) -> String {
    let message = error.message().map_or_else(|| chain(error), fatal);
    // The message may contain text from the image.
    shown(&message)
}

/// The lines of Apptainer's output that say why it failed.
fn fatal(message: &str) -> String {
    let why: Vec<&str> = message
        .lines()
        .filter(|line| line.starts_with("FATAL") || line.starts_with("ERROR"))
        .filter_map(|line| line.split_once(':').map(|(_, rest)| rest.trim()))
        .collect();
    if why.is_empty() {
        message.to_owned()
    } else {
        why.join("; ")
    }
}

/// The directory of one pull, which is removed on drop.
#[derive(Debug)]
struct Temporary(PathBuf);

impl Temporary {
    fn new(cache: &Cache) -> Result<Self, String> {
        let path = cache
            .temporary()
            .join(format!("{:016x}", rand::random::<u64>()));
        atomic::create_dir(&path).map_err(|err| chain(&err))?;
        Ok(Self(path))
    }

    /// Removes the directory now. Blocking.
    fn remove(mut self) {
        remove_folder(&std::mem::take(&mut self.0));
    }
}

/// Removes the directory of a pull. If that fails, the next start removes it.
fn remove_folder(folder: &Path) {
    if let Err(error) = tree::remove(folder) {
        tracing::warn!(folder = %folder.display(), %error, "cannot remove what a pull left");
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let folder = std::mem::take(&mut self.0);
        if folder.as_os_str().is_empty() {
            return;
        }
        let remove = move || remove_folder(&folder);
        // Removing millions of files takes a while, and this thread may be one of the runtime's.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(remove)),
            Err(_) => remove(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lines_that_matter_are_kept() {
        let message = "INFO:    Converting OCI blobs to SIF format\nWARNING: x\nFATAL:   While making image from oci registry: error fetching image: manifest unknown\n";
        assert_eq!(
            fatal(message),
            "While making image from oci registry: error fetching image: manifest unknown"
        );
        assert_eq!(fatal("anything"), "anything");
    }
}
