//! `apptainer pull`: from a registry to a SIF file in place. Bounded; the caller makes it single-flight.

use std::path::PathBuf;
use std::sync::Arc;

use knoc_proto::error::chain;
use tokio::sync::Semaphore;

use super::Settings;
use super::cache::{Cache, ImageFile};
use super::reference::Source;
use crate::command::CommandError;
use crate::jobdir::atomic;
use crate::tree;

/// How much of Apptainer's progress lines is kept.
const WORDS: usize = 64 * 1024;

/// Pulls an image that is not here.
#[derive(Debug, Clone)]
pub(super) struct Puller {
    pub(super) settings: Arc<Settings>,
    pub(super) cache: Arc<Cache>,
    pub(super) places: Arc<Semaphore>,
}

impl Puller {
    /// Pulls `source` at `digest`. The error is Apptainer's words.
    pub(super) async fn pull(
        self,
        source: Source,
        digest: String,
        file: ImageFile,
    ) -> Result<(), String> {
        let _place = self
            .places
            .acquire()
            .await
            .map_err(|_closed| "the agent stops".to_owned())?;
        let temporary = Temporary::new(&self.cache)?;
        let command = self
            .settings
            .command()
            .ok_or("this site has no container runtime")?;
        let name = format!(
            "{}/{}",
            source.reference.registry(),
            source.reference.repository()
        );
        let command = command
            .args(["pull", "--disable-cache", "--force"])
            .args(source.insecure.then_some("--no-https"))
            .arg(temporary.0.join("image.sif"))
            .arg(format!("docker://{name}@{digest}"))
            .env("APPTAINER_TMPDIR", &temporary.0)
            .env("SINGULARITY_TMPDIR", &temporary.0)
            .deadline(self.settings.pull_timeout)
            .capture(WORDS);
        let begin = tokio::time::Instant::now();
        command.run().await.map_err(|err| why(&err))?;
        tracing::info!(image = %name, digest, elapsed = ?begin.elapsed(), "pulled");
        let cache = Arc::clone(&self.cache);
        let put = move || cache.put(&digest, &file, &temporary.0.join("image.sif"));
        let put = tokio::task::spawn_blocking(put).await;
        put.map_err(|err| err.to_string())?
            .map_err(|err| chain(&err))
    }
}

/// Why the runtime failed, in its own words where it has some.
pub(super) fn why(error: &CommandError) -> String {
    error.words().map_or_else(|| chain(error), fatal)
}

/// Of Apptainer's many lines the ones that say why.
fn fatal(words: &str) -> String {
    let why: Vec<&str> = words
        .lines()
        .filter(|line| line.starts_with("FATAL") || line.starts_with("ERROR"))
        .filter_map(|line| line.split_once(':').map(|(_, rest)| rest.trim()))
        .collect();
    if why.is_empty() {
        words.to_owned()
    } else {
        why.join("; ")
    }
}

/// A folder of one pull, gone with it.
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
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // What stays behind is swept at the next start.
        tree::remove(&self.0).ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_that_matter() {
        let words = "INFO:    Converting OCI blobs to SIF format\nWARNING: x\nFATAL:   While making image from oci registry: error fetching image: manifest unknown\n";
        assert_eq!(
            fatal(words),
            "While making image from oci registry: error fetching image: manifest unknown"
        );
        assert_eq!(fatal("anything"), "anything");
    }
}
