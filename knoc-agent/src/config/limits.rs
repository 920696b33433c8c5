//! `[limits]` of the site file.

use std::time::Duration;

use serde::Deserialize;

use super::text;

/// Rates, limits and timeouts.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// The sustained number of submissions per second.
    pub sbatch_rate: f64,
    /// The number of submissions in a burst after an idle period.
    pub sbatch_burst: u32,
    /// The number of concurrent `sbatch` processes.
    pub sbatch_concurrency: usize,
    /// The number of concurrent image conversions.
    pub image_concurrency: usize,
    /// The maximum size of an image according to its manifest, in bytes.
    #[serde(deserialize_with = "text::size")]
    pub image_size: u64,
    /// The maximum size of an unpacked image, in bytes.
    #[serde(deserialize_with = "text::size")]
    pub image_unpacked: u64,
    /// The maximum size of all cached images, and of what pulls in progress have on disk, in bytes. The least recently
    /// used images are removed first.
    #[serde(deserialize_with = "text::size")]
    pub image_cache: u64,
    /// How long a layer may deliver less than 64 KiB, or less than 1 MiB while other images wait, before its pull
    /// fails.
    #[serde(deserialize_with = "text::duration")]
    pub image_stall: Duration,
    /// The shortest interval between two rounds of `squeue`.
    #[serde(deserialize_with = "text::duration")]
    pub poll_min: Duration,
    /// The longest interval between two rounds while there are pods.
    #[serde(deserialize_with = "text::duration")]
    pub poll_max: Duration,
    /// How long the report of an ended job may take to appear on the shared file system.
    #[serde(deserialize_with = "text::duration")]
    pub report_grace: Duration,
    /// How long a job may be pending for a reason that never goes away (PartitionTimeLimit …) before its pod fails.
    #[serde(deserialize_with = "text::duration")]
    pub never_ends_after: Duration,
    /// How long a job that the scheduler does not know may stay undecided.
    #[serde(deserialize_with = "text::duration")]
    pub lost_after: Duration,
    /// How long to wait after a pod's grace period before its job is cancelled.
    #[serde(deserialize_with = "text::duration")]
    pub stop_slack: Duration,
    /// If compute nodes cannot reach the agent: how many job steps (`srun --overlap`, one process on the login node
    /// each) may carry links to pods at the same time. 0 permits none.
    pub srun_links: usize,
    /// How long such a step goes on after its last use.
    #[serde(deserialize_with = "text::duration")]
    pub srun_idle: Duration,
    /// The maximum number of pods. If unset: as many as the process limits allow.
    pub pods: Option<u32>,
    /// The number of threads that move the bytes of streams. One moves several hundred MB/s; several pass the same
    /// bytes between each other.
    pub threads: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            sbatch_rate: 50.0,
            sbatch_burst: 100,
            sbatch_concurrency: 4,
            image_concurrency: 2,
            image_size: 64 << 30,
            image_unpacked: 128 << 30,
            image_cache: 256 << 30,
            image_stall: Duration::from_mins(1),
            poll_min: Duration::from_secs(1),
            poll_max: Duration::from_secs(30),
            report_grace: Duration::from_secs(90),
            never_ends_after: Duration::from_mins(10),
            lost_after: Duration::from_mins(5),
            stop_slack: Duration::from_secs(15),
            srun_links: 16,
            srun_idle: Duration::from_mins(1),
            pods: None,
            threads: 1,
        }
    }
}
