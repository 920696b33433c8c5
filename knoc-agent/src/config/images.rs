//! PURE: the table `[images]` of the site file.

use serde::Deserialize;

/// How images from registries are kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageSettings {
    /// How their files are compressed.
    pub compression: Compression,
}

/// How the files of images from registries are compressed. Images that are in the cache stay as they are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// zstd if the runtime can write it and no compute node has been unable to read it, else gzip.
    #[default]
    Auto,
    /// What every runtime can write and read.
    Gzip,
    /// Written ten times as fast as gzip, and read faster.
    Zstd,
    /// Read fastest of all; the files are larger.
    Lz4,
}
