//! [`Images`]: a name and a policy in, a file and its config out.

use std::sync::Arc;

use knoc_proto::pb::{self, PullPolicy};
use oci_client::Reference as OciReference;
use tokio::sync::Semaphore;

use super::cache::{Cache, ImageFile};
use super::flight::Flights;
use super::local::{self, Local};
use super::pull::Puller;
use super::reference::{self, Reference, Source};
use super::registry::RegistryClient;
use super::sif::Sifs;
use super::{ImageError, ImageErrorKind, ResolvedImage, Settings};
use crate::tree;

/// What the registry says of a name.
type Resolution = Result<(String, ImageFile), String>;

/// The images of this site.
#[derive(Debug)]
pub struct Images {
    settings: Arc<Settings>,
    cache: Arc<Cache>,
    registry: RegistryClient,
    places: Arc<Semaphore>,
    resolutions: Flights<Resolution>,
    pulls: Flights<Result<(), String>>,
    sifs: Sifs,
}

impl Images {
    /// Asks nothing yet.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let settings = Arc::new(settings);
        Self {
            cache: Arc::new(Cache::new(settings.cache.clone())),
            registry: RegistryClient::new(&settings),
            places: Arc::new(Semaphore::new(settings.concurrency.max(1))),
            resolutions: Flights::default(),
            pulls: Flights::default(),
            sifs: Sifs::default(),
            settings,
        }
    }

    /// What it was made with.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(super) fn registry(&self) -> &RegistryClient {
        &self.registry
    }

    /// Removes what pulls of an earlier agent left behind. Blocking; once, at the start.
    pub fn sweep(&self) {
        tree::remove(&self.cache.temporary()).ok();
    }

    /// Only whether its source is one: for admission and `script`, without registry or disk. A name that cannot be one
    /// is let in, and waits with `InvalidImageName`, as on any node: where the pod failed, a Deployment would make the
    /// next one at once.
    pub fn check(&self, image: &str) -> Result<(), ImageError> {
        match reference::parse(image) {
            Err(error)
                if error.kind == ImageErrorKind::Unsupported && self.settings.program.is_some() =>
            {
                Err(error)
            }
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// The image of a container, pulled where the policy says so.
    ///
    /// Cancel safety: a dropped call leaves nothing; a pull that others wait for goes on.
    pub async fn resolve(
        &self,
        image: &str,
        policy: PullPolicy,
    ) -> Result<ResolvedImage, ImageError> {
        if self.settings.program.is_none() {
            let path = image.into();
            return Ok(ResolvedImage {
                path,
                image_id: image.to_owned(),
                config: pb::ImageConfig::default(),
            });
        }
        match reference::parse(image)? {
            Reference::Path(path) => self.local(image, path).await,
            Reference::Registry(name) => self.remote(image, &name, policy).await,
        }
    }

    async fn local(
        &self,
        image: &str,
        path: std::path::PathBuf,
    ) -> Result<ResolvedImage, ImageError> {
        let (text, roots) = (image.to_owned(), self.settings.roots.clone());
        let find = move || local::find(&text, &path, &roots);
        let found = tokio::task::spawn_blocking(find).await;
        let stopping = |_| ImageError::new(image, ImageErrorKind::Pull, "the agent stops");
        let (path, file) = match found.map_err(stopping)?? {
            Local::Sandbox(path) => (path, ImageFile::default()),
            Local::Sif(path, id) => {
                let file = self.sifs.config(&self.settings, &path, id).await;
                let failed = |words| ImageError::new(image, ImageErrorKind::Pull, words);
                (path, file.map_err(failed)?)
            }
        };
        let image_id = path.display().to_string();
        Ok(ResolvedImage {
            path,
            image_id,
            config: file.into(),
        })
    }

    async fn remote(
        &self,
        image: &str,
        name: &OciReference,
        policy: PullPolicy,
    ) -> Result<ResolvedImage, ImageError> {
        if policy != PullPolicy::Always
            && let Some((digest, file)) = self.cached(name).await
        {
            return Ok(self.resolved(name, &digest, file));
        }
        if policy == PullPolicy::Never {
            let words = "it is not in the cache, and imagePullPolicy is Never";
            return Err(ImageError::new(image, ImageErrorKind::NeverPull, words));
        }
        let failed = |words: String| ImageError::new(image, ImageErrorKind::Pull, words);
        let source = reference::source(name, &self.settings.registries).map_err(failed)?;
        let (digest, file) = self.ask_registry(&source).await.map_err(failed)?;
        if self.in_cache(&digest).await.is_none() {
            self.pull(source, &digest, &file).await.map_err(failed)?;
        }
        self.remember(name, &digest).await;
        Ok(self.resolved(name, &digest, file))
    }

    fn resolved(&self, name: &OciReference, digest: &str, file: ImageFile) -> ResolvedImage {
        ResolvedImage {
            path: self.cache.sif(digest),
            image_id: reference::image_id(name, digest),
            config: file.into(),
        }
    }

    /// By what the name was when it was last asked for.
    async fn cached(&self, name: &OciReference) -> Option<(String, ImageFile)> {
        let (cache, name) = (Arc::clone(&self.cache), name.clone());
        let look = move || {
            let known = cache.digest(&name.whole());
            let digest = known.or_else(|| name.digest().map(str::to_owned))?;
            let file = cache.get(&digest)?;
            Some((digest, file))
        };
        tokio::task::spawn_blocking(look).await.ok().flatten()
    }

    async fn in_cache(&self, digest: &str) -> Option<ImageFile> {
        let (cache, digest) = (Arc::clone(&self.cache), digest.to_owned());
        tokio::task::spawn_blocking(move || cache.get(&digest))
            .await
            .ok()
            .flatten()
    }

    async fn ask_registry(&self, source: &Source) -> Resolution {
        let (registry, asked) = (self.registry.clone(), source.clone());
        let ask = || async move { registry.resolve(&asked).await };
        self.resolutions.join(&source.reference.whole(), ask).await
    }

    async fn pull(&self, source: Source, digest: &str, file: &ImageFile) -> Result<(), String> {
        let puller = Puller {
            settings: Arc::clone(&self.settings),
            cache: Arc::clone(&self.cache),
            places: Arc::clone(&self.places),
        };
        let (key, file) = (digest.to_owned(), file.clone());
        self.pulls
            .join(digest, || puller.pull(source, key, file))
            .await
    }

    async fn remember(&self, name: &OciReference, digest: &str) {
        let (cache, name, digest) = (Arc::clone(&self.cache), name.whole(), digest.to_owned());
        let done = tokio::task::spawn_blocking(move || cache.remember(&name, &digest)).await;
        if let Ok(Err(err)) = done {
            // Costs a question to the registry next time, nothing else.
            tracing::warn!(
                error = knoc_proto::error::chain(&err),
                "cannot remember a digest"
            );
        }
    }
}

#[cfg(test)]
mod tests;
