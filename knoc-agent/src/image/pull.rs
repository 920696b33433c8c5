//! Pulls an image from a registry into the cache: the agent downloads and checks it, and the
//! runtime converts it to a SIF file.
//!
//! ```text
//! size by the manifest ─► slot ─► room ─► layers ─► digests, unpacked size ─► room ─► conversion ─► cache
//!                                           └─────► digest of a SIF file ─────────────────────────────┘
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
    blocking::blocking,
    cache::{Cache, Entry},
    compression::Compressor,
    download::{Download, Layout},
    file::ImageFile,
    guard, local,
    manifest::Image,
    progress::{Progress, Step},
    reference::Source,
    registry::{Config, Found, RegistryClient, describe},
    room::Reserved,
    sif,
    slots::FairSlots,
    turn::Turn,
    unpacked::{self, Budget, LayerError},
    untrusted::why,
};

/// How many images are pulled at the same time: their layers and their unpacked files are on disk
/// meanwhile.
pub(super) const PULLS: usize = 8;
/// How many of them are from one host.
pub(super) const PULLS_EACH: usize = 2;
/// How often the layers, or what has about their size, are on disk during a conversion: the layers, the runtime's copy of
/// them, the file system that it packs, and the SIF file that it puts that into.
const COPIES: u64 = 4;
/// The layout's name in the directory of its pull. The runtime is given only this relative name,
/// because it would parse a colon in the state directory's path as the start of a tag.
pub(super) const LAYOUT: &str = "layout";
/// The name there of the file that the runtime makes.
pub(super) const SIF: &str = "image.sif";

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
    /// Slots for checks and conversions, which use the login node's processors.
    pub(super) conversions: Arc<FairSlots>,
    /// One slot for each image: repositories that have the same one lead to one conversion.
    pub(super) claims: Arc<FairSlots>,
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
        let host = guard::host_of(source.reference.registry());
        let _slot = self.pulls.acquire(&host).await;
        self.progress.enter(Step::Downloads);
        let begin = tokio::time::Instant::now();
        let (cache, room) = (Arc::clone(&self.cache), self.settings.limits.cache);
        let mut reserved = blocking(move || cache.reserve(size, room)).await?;
        let temporary = Temporary::new(&self.cache)?;
        let folder = temporary.0.join(LAYOUT);
        let layout = blocking(move || Layout::create(folder).map_err(|err| chain(&err))).await?;
        let full = reserved.follow(&self.progress, size, room);
        let config = self.fetch(&source, &found.image, &layout, full).await?;
        let fetched = begin.elapsed();
        self.progress.enter(Step::Checks);
        let digest = found.digest.to_string();
        let _claim = self.claims.acquire(&digest).await;
        let converting = self.conversions.acquire(&host).await;
        let slots = [&self.pulls, &self.conversions];
        let turn = Turn::begin((size, host.as_str()), slots, &self.cache);
        let checked = turn.limit(self.checked(layout, &found, config, &temporary));
        let (file, unpacked) = checked.await.map_err(|text| describe(&source, &text))?;
        // What was downloaded proves that the source has the image, if it is cached already.
        let (cache, cached, also) = (Arc::clone(&self.cache), digest.clone(), access.clone());
        if blocking(move || cache.join(&cached, also).map_err(|err| chain(&err))).await? {
            return Ok(());
        }
        if !found.image.sif {
            let needed = while_converted(size, unpacked);
            reserved.set(needed);
            let cache = Arc::clone(&self.cache);
            blocking(move || cache.make_room((needed, 0), room)).await?;
            self.convert(&temporary.0, converting, &turn).await?;
        }
        let image = source.reference.at(&found.digest);
        tracing::info!(%image, bytes = size, ?fetched, elapsed = ?begin.elapsed(), "pulled");
        let entry = Entry {
            file,
            access,
            pushed: found.image.sif,
        };
        self.keep(temporary, reserved, digest, entry).await
    }

    /// Downloads the layers, and the config of an image that has one. `full` ends if there is no room, and says why. Both are fetched
    /// only by a pull that has its slot, so that one that waits holds little memory.
    async fn fetch(
        &self,
        source: &Source,
        image: &Image,
        layout: &Layout,
        full: impl Future<Output = String>,
    ) -> Result<Option<Config>, String> {
        let config = if image.sif {
            None
        } else {
            Some(self.registry.config(source, image).await?)
        };
        let download = Download {
            registry: &self.registry,
            source,
            layout,
            slots: &self.pulls,
            stall: self.settings.limits.stall,
            progress: &self.progress,
        };
        download.layers(image, full).await?;
        Ok(config)
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
            let about = std::fs::metadata(&sif);
            let about = about.map_err(|error| format!("{}: {error}", sif.display()))?;
            // Nothing else is needed from here on.
            remove_folder(&temporary.0.join(LAYOUT));
            reserved.set(about.len());
            cache.make_room((about.len(), 0), room)?;
            let put = cache.put(&digest, &entry, &sif);
            put.map_err(|err| chain(&err))?;
            temporary.remove();
            Ok(())
        })
        .await
    }

    /// Checks what was downloaded. Returns the image's config, and the unpacked size of what is to be converted.
    async fn checked(
        &self,
        layout: Layout,
        found: &Found,
        config: Option<Config>,
        temporary: &Temporary,
    ) -> Result<(ImageFile, u64), String> {
        match config {
            None => Ok((self.take(layout, found, temporary).await?, 0)),
            Some(config) => self.check(layout, found, config).await,
        }
    }

    /// Checks the digests and the unpacked size of all layers, and completes the layout.
    async fn check(
        &self,
        layout: Layout,
        found: &Found,
        config: Config,
    ) -> Result<(ImageFile, u64), String> {
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
            layout.complete(&image, &config.text, &packings)?;
            Ok((config.file, limit.saturating_sub(budget.bytes)))
        })
        .await
    }

    /// Takes an image that was pushed as a SIF file as it is, if its digest is right. Returns the config in it.
    async fn take(
        &self,
        layout: Layout,
        found: &Found,
        temporary: &Temporary,
    ) -> Result<ImageFile, String> {
        let stop = CancellationToken::new();
        let _stops = stop.clone().drop_guard();
        let (image, target) = (Arc::clone(&found.image), temporary.0.join(SIF));
        let open = blocking(move || {
            let digest = image.layers.first().map(|layer| &layer.digest);
            let digest = digest.ok_or("the image has no layer")?;
            let path = layout.blob(digest);
            unpacked::verify(&path, digest, &|| stop.is_cancelled())?;
            let failed = |error: std::io::Error| format!("{}: {error}", path.display());
            std::fs::rename(&path, &target).map_err(failed)?;
            let open = local::open(&target).map_err(failed)?;
            let open = open.map(|(_, file)| file);
            let whole = open.filter(|file| local::is_whole(file));
            whole.ok_or_else(|| format!("layer {digest} is not a SIF file, or not a whole one"))
        });
        let file = open.await?;
        let config = sif::read(&self.settings, file).await;
        config.map_err(|error| why(&error))?.bounded()
    }
}

/// PURE: what an image takes on disk while it is converted.
fn while_converted(size: u64, unpacked: u64) -> u64 {
    unpacked.saturating_add(size.saturating_mul(COPIES))
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
