//! PURE: the table `[images]` of the site file.

use std::{path::PathBuf, time::Duration};

use serde::Deserialize;

use super::text;

/// Where images of a library come from, and how images from registries are kept.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageSettings {
    /// The address of the container library for names with `library://`. If unset, such names are rejected.
    pub library: Option<String>,
    /// A file with the site's token for it. If unset, it is asked without.
    pub library_token: Option<PathBuf>,
    /// How their files are compressed.
    pub compression: Compression,
    /// Where they are converted.
    pub convert: Convert,
    /// The partition of the jobs that convert them. If unset: that of pods that name none.
    pub convert_partition: Option<String>,
    /// The CPUs of such a job.
    pub convert_cpus: u32,
    /// The memory of such a job, in bytes.
    #[serde(deserialize_with = "text::size")]
    pub convert_memory: u64,
    /// The time limit of such a job, which is rounded up to minutes.
    #[serde(deserialize_with = "text::duration")]
    pub convert_time: Duration,
}

impl Default for ImageSettings {
    fn default() -> Self {
        Self {
            library: None,
            library_token: None,
            compression: Compression::Auto,
            convert: Convert::Login,
            convert_partition: None,
            convert_cpus: 2,
            convert_memory: 4 << 30,
            convert_time: Duration::from_hours(1),
        }
    }
}

/// Where images are converted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Convert {
    /// By the agent, on the login node.
    #[default]
    Login,
    /// In Slurm jobs of the account.
    Job,
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
