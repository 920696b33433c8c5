//! What the cache of images keeps account of: the images on disk, and what of it is in use or promised.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    time::SystemTime,
};

/// An image on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kept {
    pub(super) digest: String,
    pub(super) sif: PathBuf,
    pub(super) bytes: u64,
    pub(super) used: SystemTime,
}

/// What of the cache is spoken for in this process.
#[derive(Debug, Default)]
pub(super) struct Claims {
    pub(super) held: HashMap<String, usize>,
    /// Held at some time since the last search for room began.
    pub(super) since: HashSet<String>,
    /// Bytes of pulls under way.
    pub(super) reserved: u64,
}

impl Claims {
    pub(super) fn is_held(&self, digest: &str) -> bool {
        self.held.contains_key(digest) || self.since.contains(digest)
    }
}
