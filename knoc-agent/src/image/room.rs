//! Limits the size of the cache: the images that have not been used for longest are removed first.
//!
//! An image is in use, and stays, if a job directory of a pod that has not finished names it
//! ([`super::in_use`]), or if this process holds it: from the moment its digest is known until a
//! job directory names it. The bytes that pulls in progress have on disk, or will have soon, are
//! reserved: layers a little before they arrive, so that a registry gets no room for what it only
//! announces, and what a conversion needs once it is known (ADR 0137).

use std::{
    collections::BTreeSet,
    sync::{Arc, MutexGuard, PoisonError},
    time::Duration,
};

use knoc_proto::error::chain;
use tokio::time::Instant;

use super::{
    cache::Cache,
    claims::{Claims, Kept},
    in_use,
    progress::Progress,
};

/// Room for a download is reserved in steps of this size.
const STEP: u64 = 1 << 30;
/// How often it is looked how far a download has come.
const LOOK: Duration = Duration::from_secs(1);

/// Keeps an image from being removed until it is dropped.
#[derive(Debug)]
pub struct Hold {
    cache: Arc<Cache>,
    digest: String,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut claims = self.cache.claims();
        if let Some(count) = claims.held.get_mut(&self.digest) {
            *count -= 1;
            if *count == 0 {
                claims.held.remove(&self.digest);
            }
        }
    }
}

/// Bytes that count as used until this is dropped.
#[derive(Debug)]
pub(super) struct Reserved {
    cache: Arc<Cache>,
    bytes: u64,
}

impl Reserved {
    /// Reserves so many bytes instead; the caller makes room for them.
    pub(super) fn set(&mut self, bytes: u64) {
        let mut claims = self.cache.claims();
        let others = claims.reserved.saturating_sub(self.bytes);
        claims.reserved = others.saturating_add(bytes);
        drop(claims);
        self.bytes = bytes;
    }

    /// Reserves what a pull of an image of this size downloads, a little before it arrives. Ends only if there is no room,
    /// and returns why. Cancel safe.
    pub(super) async fn follow(&mut self, progress: &Progress, size: u64, limit: u64) -> String {
        loop {
            tokio::time::sleep(LOOK).await;
            let wanted = ahead(progress.received(), size);
            if wanted <= self.bytes {
                continue;
            }
            self.set(wanted);
            let cache = Arc::clone(&self.cache);
            let job = move || cache.make_room((wanted, 0), limit);
            let made = tokio::task::spawn_blocking(job).await;
            if let Err(why) = made.map_err(|error| chain(&error)).flatten() {
                return why;
            }
        }
    }
}

/// PURE: the bytes that are reserved for an image of this size once so many have been received.
fn ahead(received: u64, size: u64) -> u64 {
    let steps = (received / STEP).saturating_add(2);
    steps.saturating_mul(STEP).min(size)
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut claims = self.cache.claims();
        claims.reserved = claims.reserved.saturating_sub(self.bytes);
    }
}

impl Cache {
    pub(super) fn claims(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds an image, whether it is cached yet or not. An image that is looked up after this call
    /// is not removed.
    pub(super) fn hold(self: &Arc<Self>, digest: &str) -> Hold {
        let mut claims = self.claims();
        *claims.held.entry(digest.to_owned()).or_default() += 1;
        claims.since.insert(digest.to_owned());
        Hold {
            cache: Arc::clone(self),
            digest: digest.to_owned(),
        }
    }

    /// Reserves room for the first layers of an image of this size, and removes images until they fit. Fails if there could
    /// not be room for all of them. Blocking.
    pub(super) fn reserve(self: &Arc<Self>, size: u64, limit: u64) -> Result<Reserved, String> {
        let mut reserved = Reserved {
            cache: Arc::clone(self),
            bytes: 0,
        };
        let first = ahead(0, size);
        reserved.set(first);
        self.make_room((first, size - first), limit)?;
        Ok(reserved)
    }

    /// Removes images until at most `limit` bytes are used. Fails, without removing any, if the images in use, what pulls
    /// in progress have reserved and `more` are beyond it. `own` is what the pull that asks has reserved of that. Blocking.
    pub(super) fn make_room(&self, (own, more): (u64, u64), limit: u64) -> Result<(), String> {
        // One caller at a time: two at once would remove twice as much.
        let _one = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        let mut images = self.images();
        let reserved = self.claims().reserved;
        let mut used = reserved.saturating_add(size_of(&images));
        if used.saturating_add(more) <= limit {
            return Ok(());
        }
        // Images that are held from here on are checked below, even if they are released in
        // between.
        let held: BTreeSet<String> = {
            let mut claims = self.claims();
            claims.since.clear();
            claims.held.keys().cloned().collect()
        };
        let named = in_use::names(&self.state);
        let named = named.map_err(|error| format!("the image cache is full: {}", chain(&error)))?;
        images.retain(|image| {
            let file_name = image.sif.file_name().unwrap_or_default();
            !held.contains(&image.digest) && !named.contains(file_name)
        });
        let needed = used.saturating_sub(size_of(&images));
        if needed.saturating_add(more) <= limit {
            let free = self.evict_until(images, used.saturating_sub(limit));
            used = used.saturating_sub(free);
        }
        if needed.saturating_add(more) <= limit && used <= limit {
            return Ok(());
        }
        // Nobody need make place for an image that does not fit into an empty cache.
        if own.saturating_add(more) <= limit {
            self.claims().refused = Some(Instant::now());
        }
        let needed = needed.saturating_add(more);
        Err(format!(
            "the image cache would hold {needed} bytes that are in use or that pulls in progress need, and limits.image_cache of the \
             site file is {limit}: raise it, or let pods end"
        ))
    }

    /// Whether a pull found no room lately that it could have had without the others.
    pub(super) fn refused_within(&self, time: Duration) -> bool {
        let refused = self.claims().refused;
        refused.is_some_and(|refused| refused.elapsed() <= time)
    }

    /// Removes those of the images that were not used for longest, until so many bytes are free or none is left. Returns
    /// how many bytes they had.
    fn evict_until(&self, mut images: Vec<Kept>, wanted: u64) -> u64 {
        images.sort_by_key(|image| image.used);
        let (mut free, mut gone) = (0_u64, Vec::new());
        for image in images {
            if free >= wanted {
                break;
            }
            if self.evict(&image) {
                free = free.saturating_add(image.bytes);
                gone.push(image.digest);
            }
        }
        if !gone.is_empty() {
            tracing::info!(
                images = gone.len(),
                "removed images from the cache to make room"
            );
            self.forget(&gone);
        }
        free
    }

    fn evict(&self, image: &Kept) -> bool {
        let claims = self.claims();
        if claims.is_held(&image.digest) {
            return false;
        }
        // Under the lock: a caller that holds the image from now on finds that it is gone.
        let removed = std::fs::remove_file(&image.sif);
        drop(claims);
        if let Err(error) = removed {
            tracing::warn!(image = %image.sif.display(), %error, "cannot remove an image from the cache");
            return false;
        }
        std::fs::remove_file(self.config(&image.digest)).ok();
        true
    }

    /// The number of cached images, and their size in bytes. Blocking.
    pub(super) fn usage(&self) -> (usize, u64) {
        let images = self.images();
        (images.len(), size_of(&images))
    }
}

fn size_of(images: &[Kept]) -> u64 {
    let all = images.iter().map(|image| image.bytes);
    all.fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_reserved_a_little_before_it_is_used() {
        let mib = 1 << 20;
        for (received, size, expected) in [
            (0, 5 * mib, 5 * mib),
            (0, 64 * STEP, 2 * STEP),
            (STEP - 1, 64 * STEP, 2 * STEP),
            (STEP, 64 * STEP, 3 * STEP),
            (64 * STEP, 64 * STEP, 64 * STEP),
            (u64::MAX, u64::MAX, u64::MAX),
        ] {
            assert_eq!(ahead(received, size), expected, "{received} of {size}");
        }
    }
}
