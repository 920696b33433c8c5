//! From a registry to a SIF file in place: fetched and checked by us, converted by the runtime.
//!
//! ```text
//! size by the manifest ─► place ─► room in the cache ─► layers ─► digests, unpacked size ─► conversion ─► cache
//! ```
//!
//! The runtime makes no request of its own: it is given an OCI layout in which every blob was checked. The caller makes
//! a pull single-flight. Cancel safety: a dropped pull stops its downloads, its checks and the runtime, and removes
//! what it wrote.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use knoc_contract::jobdir::atomic;
use knoc_contract::tree;
use knoc_proto::error::chain;
use tokio_util::sync::CancellationToken;

use super::Settings;
use super::cache::Cache;
use super::download::{Download, Layout};
use super::reference::Source;
use super::registry::{Found, RegistryClient, words};
use super::slots::Slots;
use super::unpacked::{self, Budget, LayerError};
use super::words::shown;
use crate::command::CommandError;

/// How much of the runtime's progress lines is kept.
const WORDS: usize = 64 * 1024;
/// Images that are pulled at the same time: their layers, and what they are unpacked to, lie on disk.
pub(super) const PULLS: usize = 8;
/// Of them, from one registry.
pub(super) const PULLS_EACH: usize = 2;
/// The layout, in the folder of its pull. The runtime is given this name only: a state directory with a colon in its
/// path would be taken for a tag.
const LAYOUT: &str = "layout";

/// Pulls an image that is not here.
#[derive(Debug, Clone)]
pub(super) struct Puller {
    pub(super) settings: Arc<Settings>,
    pub(super) cache: Arc<Cache>,
    pub(super) registry: Arc<RegistryClient>,
    /// Places of whole pulls.
    pub(super) pulls: Arc<Slots>,
    /// Places of conversions, which take the login node's processors.
    pub(super) conversions: Arc<Slots>,
}

impl Puller {
    /// Pulls the image that was found at `source`.
    pub(super) async fn pull(self, source: Source, found: Found) -> Result<(), String> {
        let size = found.image.size();
        let limit = self.settings.limits.size;
        if size > limit {
            let text = format!(
                "the image has {size} bytes by its manifest, and limits.image_size of the site file is {limit}"
            );
            return Err(words(&source, &text));
        }
        let registry = source.reference.registry();
        let _place = self.pulls.acquire(registry).await;
        let begin = tokio::time::Instant::now();
        let (cache, room) = (Arc::clone(&self.cache), self.settings.limits.cache);
        let mut reserved = blocking(move || cache.reserve(size, room)).await?;
        let temporary = Temporary::new(&self.cache)?;
        let folder = temporary.0.join(LAYOUT);
        let layout = blocking(move || Layout::create(folder).map_err(|err| chain(&err))).await?;
        let download = Download {
            registry: &self.registry,
            source: &source,
            layout: &layout,
            slots: &self.pulls,
            stall: self.settings.limits.stall,
        };
        // Only now: whoever waits for a place holds little.
        let config = self.registry.config(&source, &found.image).await?;
        download.layers(&found.image).await?;
        let fetched = begin.elapsed();
        let _converting = self.conversions.acquire(registry).await;
        let checked = self.check(layout, &found, config.text).await;
        checked.map_err(|text| words(&source, &text))?;
        self.convert(&temporary).await?;
        let image = source.reference.at(&found.digest);
        tracing::info!(%image, bytes = size, ?fetched, elapsed = ?begin.elapsed(), "pulled");
        let cache = Arc::clone(&self.cache);
        blocking(move || {
            let sif = temporary.0.join("image.sif");
            // A SIF may be larger than its layers.
            let about = std::fs::metadata(&sif);
            let about = about.map_err(|error| format!("{}: {error}", sif.display()))?;
            reserved.at_least(about.len());
            cache.make_room(room)?;
            let put = cache.put(&found.digest.to_string(), &config.file, &sif);
            put.map_err(|err| chain(&err))?;
            temporary.remove();
            Ok(())
        })
        .await
    }

    /// Digests and unpacked size of all layers; then the layout is whole.
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

    async fn convert(&self, temporary: &Temporary) -> Result<(), String> {
        let command = self
            .settings
            .command()
            .ok_or("this site has no container runtime")?;
        let command = command
            .args(["pull", "--disable-cache", "--force", "image.sif"])
            .arg(format!("oci:{LAYOUT}"))
            .current_dir(&temporary.0)
            .deadline(self.settings.pull_timeout)
            .capture(WORDS);
        let folders = ["TMPDIR", "CACHEDIR"];
        let command = folders.into_iter().fold(command, |command, folder| {
            command
                .env(format!("APPTAINER_{folder}"), &temporary.0)
                .env(format!("SINGULARITY_{folder}"), &temporary.0)
        });
        command.run().await.map(drop).map_err(|err| why(&err))
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| chain(&error)).flatten()
}

/// Why the runtime failed, in its own words where it has some.
pub(super) fn why(error: &CommandError) -> String {
    let words = error.words().map_or_else(|| chain(error), fatal);
    // An image has a hand in them too.
    shown(&words)
}

/// Of Apptainer's many lines the ones that say why.
fn fatal(words: &str) -> String {
    let why: Vec<&str> = words
        .lines()
        .filter(|line| line.starts_with("FATAL") || line.starts_with("ERROR"))
        .filter_map(|line| line.split_once(':').map(|(_, rest)| rest.trim()))
        .collect();
    if why.is_empty() {
        words.to_owned()
    } else {
        why.join("; ")
    }
}

/// A folder of one pull, gone with it.
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

    /// Removes it now. Blocking.
    fn remove(mut self) {
        remove_folder(&std::mem::take(&mut self.0));
    }
}

/// What stays behind is swept at the next start.
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
        // Millions of files take a while, and this may be a thread on which bytes move.
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
    fn the_words_that_matter() {
        let words = "INFO:    Converting OCI blobs to SIF format\nWARNING: x\nFATAL:   While making image from oci registry: error fetching image: manifest unknown\n";
        assert_eq!(
            fatal(words),
            "While making image from oci registry: error fetching image: manifest unknown"
        );
        assert_eq!(fatal("anything"), "anything");
    }
}
