//! Downloads the blobs of one image into an OCI image layout, and writes the layout's other files.
//!
//! ```text
//! layout/oci-layout, index.json
//! layout/blobs/<algorithm>/<hex>    manifest, config, layers
//! ```
//!
//! Every layer is read with two limits: it ends at the size that its manifest announced, and it
//! must make progress. How much progress is required depends on whether other pulls wait for its
//! slot.
//!
//! While a registry that has no slot waits, the layers together must bring [`least`] bytes in each
//! minute, and that doubles with every minute until somebody is given a slot. So the slowest pull
//! fails first, to be tried again later; then the count begins anew, and the other pulls stay. A
//! registry waits for two minutes if the slowest pull brings less than 2 MiB a minute, and for twelve
//! if it brings 1 GiB, times the number of registries whose turn is before.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    time::Duration,
};

use futures::{StreamExt as _, TryStreamExt as _};
use knoc_contract::jobdir::atomic::{self, FileError};
use tokio::{fs::File, io::AsyncWriteExt as _, time::Instant};

use super::{
    digest::Digest,
    manifest::{self, Descriptor, Image, Packing},
    progress::Progress,
    reference::Source,
    registry::{RegistryClient, describe},
    slots::FairSlots,
};

/// How many layers of one image are downloaded at the same time, as in other container runtimes.
const LAYERS_AT_ONCE: usize = 3;
/// Bytes that a layer must receive in each period of `stall`.
const TRICKLE: u64 = 64 * 1024;
/// The same limit while other pulls wait for its slot.
const TRICKLE_WANTED: u64 = 1024 * 1024;
/// How often a pull as a whole is compared with [`least`].
const PACE: Duration = Duration::from_mins(1);
/// The longest time that a download may take, however steady it is.
pub(super) const LONGEST: Duration = Duration::from_hours(6);

/// The OCI image layout of one image, in a directory of its own.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    folder: PathBuf,
}

impl Layout {
    /// Creates the directories. Blocking, but short.
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

    /// Writes the files that complete the layout. Blocking.
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
            // Not synced: the file is read at once and removed with this process.
            let written = std::fs::File::create(&path).and_then(|mut file| file.write_all(bytes));
            written.map_err(|error| format!("{}: {error}", path.display()))?;
        }
        Ok(())
    }
}

/// Where and how the layers of one image are downloaded.
#[derive(Debug)]
pub(super) struct Download<'a> {
    pub(super) registry: &'a RegistryClient,
    pub(super) source: &'a Source,
    pub(super) layout: &'a Layout,
    /// The slots, one of which this download holds.
    pub(super) slots: &'a FairSlots,
    pub(super) stall: Duration,
    pub(super) progress: &'a Progress,
}

impl Download<'_> {
    /// Downloads all layers; their digests are checked later. `full` ends if there is no room for them, and says why.
    pub(super) async fn layers(
        &self,
        image: &Image,
        full: impl Future<Output = String>,
    ) -> Result<(), String> {
        // An image may contain the same layer several times.
        let mut layers: Vec<Descriptor> = Vec::new();
        for layer in &image.layers {
            if !layers.iter().any(|known| known.digest == layer.digest) {
                layers.push(layer.clone());
            }
        }
        let fetches = layers.into_iter().map(|layer| self.layer(layer));
        let all = futures::stream::iter(fetches).buffer_unordered(LAYERS_AT_ONCE);
        let all = all.try_collect::<Vec<()>>();
        let all = tokio::time::timeout(LONGEST, all);
        let late = |_elapsed| {
            describe(
                self.source,
                &format!("the layers were not downloaded within {LONGEST:?}"),
            )
        };
        tokio::select! {
            biased;
            done = all => done.map_err(late).flatten().map(drop),
            why = outpaced(self.progress, self.slots) => Err(describe(self.source, &why)),
            why = full => Err(why),
        }
    }

    async fn layer(&self, layer: Descriptor) -> Result<(), String> {
        let path = self.layout.blob(&layer.digest);
        let fetched = self.fetch(&layer, &path).await;
        fetched.map_err(|text| describe(self.source, &text))
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
                    "layer {} is longer than the {} bytes that its manifest announces",
                    layer.digest, layer.size
                ));
            }
            self.progress.receive(length);
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

/// What a layer has received since `begin`.
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

    /// The next period, if this one has received enough.
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

/// Waits until a pull is to make place, and returns why. Never ends if it is fast enough.
async fn outpaced(progress: &Progress, slots: &FairSlots) -> String {
    let mut before = progress.received();
    loop {
        tokio::time::sleep(PACE).await;
        let received = progress.received();
        let (bytes, waits) = (received.saturating_sub(before), slots.starved());
        if bytes < least(waits) {
            let waits = waits.as_secs();
            return format!(
                "the layers make too little progress: {bytes} bytes within {PACE:?} while another registry has waited for {waits} s"
            );
        }
        before = received;
    }
}

/// PURE: the bytes that a pull must bring in a minute when a registry without a slot has waited for
/// so long.
fn least(waits: Duration) -> u64 {
    match waits.as_secs() / 60 {
        0 => 0,
        minutes => (1 << 20) << minutes.min(20),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn what_a_pull_must_bring_doubles_with_each_minute_of_waiting() {
        for (seconds, expected) in [
            (0, 0),
            (59, 0),
            (60, 2 * MIB),
            (119, 2 * MIB),
            (120, 4 * MIB),
            (600, 1024 * MIB),
            (u64::MAX, MIB << 20),
        ] {
            assert_eq!(least(Duration::from_secs(seconds)), expected, "{seconds}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_slowest_pull_makes_place_for_a_registry_without_a_slot() {
        let slots = FairSlots::new(2, 1);
        let (a, _b) = (slots.acquire("a").await, slots.acquire("b").await);
        let (slow, quick) = (Progress::new(1 << 40), Progress::new(1 << 40));
        let mut slow_ends = Box::pin(outpaced(&slow, &slots));
        let mut quick_ends = Box::pin(outpaced(&quick, &slots));
        // A little more than a minute, because timers are rounded up.
        let minute = PACE + Duration::from_millis(2);
        assert!(futures::poll!(&mut slow_ends).is_pending());
        assert!(futures::poll!(&mut quick_ends).is_pending());
        tokio::time::advance(minute).await;
        assert!(futures::poll!(&mut slow_ends).is_pending(), "nobody waits");
        assert!(futures::poll!(&mut quick_ends).is_pending());
        let mut waits = Box::pin(slots.acquire("c"));
        assert!(futures::poll!(&mut waits).is_pending());
        for ends in [false, true] {
            slow.receive(3 * MIB);
            quick.receive(100 * MIB);
            tokio::time::advance(minute).await;
            assert_eq!(futures::poll!(&mut slow_ends).is_ready(), ends);
            assert!(futures::poll!(&mut quick_ends).is_pending());
        }
        drop(a);
        assert!(futures::poll!(&mut waits).is_ready());
        tokio::time::advance(minute).await;
        assert!(futures::poll!(&mut quick_ends).is_pending(), "it stays");
    }
}
