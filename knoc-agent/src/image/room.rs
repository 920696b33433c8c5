//! Limits the size of the cache: the images that have not been used for longest are removed first.
//!
//! An image is in use, and stays, if a job directory of a pod that has not finished names it
//! ([`super::in_use`]), or if this process holds it: from the moment its digest is known until a
//! job directory names it. The bytes that pulls in progress will need are reserved in advance.

use std::{
    collections::BTreeSet,
    sync::{Arc, MutexGuard, PoisonError},
};

use knoc_proto::error::chain;

use super::{
    cache::Cache,
    claims::{Claims, Kept},
    in_use,
};

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
    /// Raises the reservation once more is known about the size.
    pub(super) fn at_least(&mut self, bytes: u64) {
        let more = bytes.saturating_sub(self.bytes);
        self.bytes += more;
        self.cache.claims().reserved += more;
    }
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

    /// Reserves bytes for a pull, and removes images until they fit. Blocking.
    pub(super) fn reserve(self: &Arc<Self>, bytes: u64, limit: u64) -> Result<Reserved, String> {
        self.claims().reserved += bytes;
        let reserved = Reserved {
            cache: Arc::clone(self),
            bytes,
        };
        self.make_room(limit)?;
        Ok(reserved)
    }

    /// Removes images until at most `limit` bytes are used, or only images in use are left.
    /// Blocking.
    pub(super) fn make_room(&self, limit: u64) -> Result<(), String> {
        // One caller at a time: two at once would remove twice as much.
        let _one = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        let mut images = self.images();
        let all = images.iter().map(|image| image.bytes);
        let mut used = all.fold(self.claims().reserved, u64::saturating_add);
        if used <= limit {
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
        images.sort_by_key(|image| image.used);
        let mut gone = Vec::new();
        for image in images {
            if used <= limit {
                break;
            }
            let file_name = image.sif.file_name().unwrap_or_default();
            if held.contains(&image.digest) || named.contains(file_name) {
                continue;
            }
            if self.evict(&image) {
                used = used.saturating_sub(image.bytes);
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
        if used <= limit {
            return Ok(());
        }
        Err(format!(
            "the image cache would hold {used} bytes that are in use, and limits.image_cache of the site file is {limit}: \
             raise it, or let pods end"
        ))
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
        let bytes = images.iter().map(|image| image.bytes);
        (images.len(), bytes.fold(0, u64::saturating_add))
    }
}
