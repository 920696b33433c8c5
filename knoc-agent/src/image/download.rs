//! The blobs of one image into an OCI layout, and what the layout must hold beside them.
//!
//! ```text
//! layout/oci-layout, index.json
//! layout/blobs/<algorithm>/<hex>    manifest, config, layers
//! ```
//!
//! Every layer is read with two bounds: it ends with the size that its manifest announced, and it makes progress. How
//! much progress is enough depends on whether others wait for the place that it holds.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _};
use knoc_contract::jobdir::atomic::{self, FileError};
use tokio::fs::File;
use tokio::io::AsyncWriteExt as _;
use tokio::time::Instant;

use super::digest::Digest;
use super::manifest::{self, Descriptor, Image, Packing};
use super::reference::Source;
use super::registry::{RegistryClient, words};
use super::slots::Slots;

/// Layers of one image at the same time, as other container runtimes do.
const LAYERS_AT_ONCE: usize = 3;
/// Bytes that a layer must bring in each period of `stall`.
const TRICKLE: u64 = 64 * 1024;
/// The same while others wait for its place.
const TRICKLE_WANTED: u64 = 1024 * 1024;
/// A whole download, however steady it is.
pub(super) const LONGEST: Duration = Duration::from_hours(6);

/// The layout of one image, in a folder of its own.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    folder: PathBuf,
}

impl Layout {
    /// Makes the folders. Blocking, and short.
    pub(super) fn create(folder: PathBuf) -> Result<Self, FileError> {
        for algorithm in ["sha256", "sha512"] {
            atomic::create_dir(&folder.join("blobs").join(algorithm))?;
        }
        Ok(Self { folder })
    }

    pub(super) fn blob(&self, digest: &Digest) -> PathBuf {
        let blobs = self.folder.join("blobs").join(digest.algorithm());
        blobs.join(digest.hex())
    }

    /// Writes what makes it a layout. Blocking.
    pub(super) fn complete(
        &self,
        image: &Image,
        config: &[u8],
        packings: &[Packing],
    ) -> Result<(), String> {
        let failed = |error: serde_json::Error| error.to_string();
        let manifest = manifest::write(image, packings).map_err(failed)?;
        let index = manifest::write_index(&manifest).map_err(failed)?;
        let files: [(PathBuf, &[u8]); 4] = [
            (self.blob(&image.config.digest), config),
            (self.blob(&Digest::of(&manifest)), &manifest),
            (self.folder.join("index.json"), &index),
            (
                self.folder.join("oci-layout"),
                br#"{"imageLayoutVersion":"1.0.0"}"#,
            ),
        ];
        for (path, bytes) in files {
            // Not synced: it is read at once, and gone with this process.
            let written = std::fs::File::create(&path).and_then(|mut file| file.write_all(bytes));
            written.map_err(|error| format!("{}: {error}", path.display()))?;
        }
        Ok(())
    }
}

/// Where and how the layers of one image are fetched.
#[derive(Debug)]
pub(super) struct Download<'a> {
    pub(super) registry: &'a RegistryClient,
    pub(super) source: &'a Source,
    pub(super) layout: &'a Layout,
    /// Whose place this download holds.
    pub(super) slots: &'a Slots,
    pub(super) stall: Duration,
}

impl Download<'_> {
    /// Fetches all layers; their digests are not checked yet.
    pub(super) async fn layers(&self, image: &Image) -> Result<(), String> {
        // An image may have one layer several times.
        let mut layers: Vec<Descriptor> = Vec::new();
        for layer in &image.layers {
            if !layers.iter().any(|known| known.digest == layer.digest) {
                layers.push(layer.clone());
            }
        }
        let fetches = layers.into_iter().map(|layer| self.layer(layer));
        let all = futures::stream::iter(fetches).buffer_unordered(LAYERS_AT_ONCE);
        let all = all.try_collect::<Vec<()>>();
        let done = tokio::time::timeout(LONGEST, all).await;
        let late = |_elapsed| {
            words(
                self.source,
                &format!("the layers were not here after {LONGEST:?}"),
            )
        };
        done.map_err(late).flatten().map(drop)
    }

    async fn layer(&self, layer: Descriptor) -> Result<(), String> {
        let path = self.layout.blob(&layer.digest);
        let fetched = self.fetch(&layer, &path).await;
        fetched.map_err(|text| words(self.source, &text))
    }

    async fn fetch(&self, layer: &Descriptor, path: &Path) -> Result<(), String> {
        let mut answer = self.registry.layer(self.source, layer).await?;
        let failed = |error: std::io::Error| format!("{}: {error}", path.display());
        let mut file = File::create(path).await.map_err(failed)?;
        let mut received: u64 = 0;
        let mut period = Period::begin();
        loop {
            let chunk = tokio::time::timeout_at(period.end(self.stall), answer.chunk());
            let chunk = match chunk.await {
                Ok(chunk) => chunk?,
                Err(_elapsed) => {
                    period = period.next(self, layer)?;
                    continue;
                }
            };
            let Some(chunk) = chunk else { break };
            let length = u64::try_from(chunk.len()).unwrap_or(u64::MAX);
            received = received.saturating_add(length);
            if received > layer.size {
                return Err(format!(
                    "layer {} is longer than the {} bytes of its manifest",
                    layer.digest, layer.size
                ));
            }
            period.bytes += length;
            file.write_all(&chunk).await.map_err(failed)?;
            if received < layer.size && Instant::now() >= period.end(self.stall) {
                period = period.next(self, layer)?;
            }
        }
        file.flush().await.map_err(failed)?;
        if received == layer.size {
            return Ok(());
        }
        Err(format!(
            "layer {} ended after {received} of {} bytes",
            layer.digest, layer.size
        ))
    }
}

/// What a layer brought since `begin`.
#[derive(Debug, Clone, Copy)]
struct Period {
    begin: Instant,
    bytes: u64,
}

impl Period {
    fn begin() -> Self {
        Self {
            begin: Instant::now(),
            bytes: 0,
        }
    }

    fn end(self, stall: Duration) -> Instant {
        self.begin + stall
    }

    /// The next one, if this one has brought enough.
    fn next(self, download: &Download<'_>, layer: &Descriptor) -> Result<Self, String> {
        let wanted = download.slots.wanted();
        if self.bytes >= enough(wanted) {
            return Ok(Self::begin());
        }
        let others = if wanted {
            " while other images wait"
        } else {
            ""
        };
        Err(format!(
            "layer {} makes too little progress: {} bytes within {:?}{others} (limits.image_stall of the site file)",
            layer.digest, self.bytes, download.stall
        ))
    }
}

fn enough(wanted: bool) -> u64 {
    if wanted { TRICKLE_WANTED } else { TRICKLE }
}
