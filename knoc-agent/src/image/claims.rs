//! The account of the image cache: the images on disk, and what this process holds and reserves.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    time::SystemTime,
};

use tokio::time::Instant;

/// An image on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kept {
    pub(super) digest: String,
    pub(super) sif: PathBuf,
    pub(super) bytes: u64,
    pub(super) used: SystemTime,
}

/// What this process holds and reserves in the cache.
#[derive(Debug, Default)]
pub(super) struct Claims {
    pub(super) held: HashMap<String, usize>,
    /// Images that were held at some time since the last search for room began.
    pub(super) since: HashSet<String>,
    /// Bytes reserved by pulls in progress.
    pub(super) reserved: u64,
    /// When a pull last found no room that it could have had without the others.
    pub(super) refused: Option<Instant>,
}

impl Claims {
    pub(super) fn is_held(&self, digest: &str) -> bool {
        self.held.contains_key(digest) || self.since.contains(digest)
    }
}
