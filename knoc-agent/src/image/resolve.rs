//! [`Images`]: resolves an image name and a pull policy to a file and its config.

use std::sync::Arc;

use knoc_contract::host::node_name;
use knoc_proto::pb::{self, PullPolicy};

use super::{
    Hold, ImageError, ImageErrorKind, Name, ResolvedImage, Settings,
    cache::Cache,
    file::ImageFile,
    flight::Flights,
    local::{self, Roots},
    pull::{PULLS, PULLS_EACH, Puller},
    reference::{self, Reference, Source},
    registry::{Found, RegistryClient},
    sif::Sifs,
    slots::FairSlots,
};

/// The registry's answer about a name.
#[derive(Debug, Clone)]
enum Resolution {
    /// The image has this digest and is in the cache.
    Here(String),
    /// The image must be pulled from here.
    There(Found),
}

/// The images of this site.
#[derive(Debug)]
pub struct Images {
    settings: Arc<Settings>,
    cache: Arc<Cache>,
    registry: Arc<RegistryClient>,
    pull_slots: Arc<FairSlots>,
    conversions: Arc<FairSlots>,
    resolutions: Flights<Result<Resolution, String>>,
    pulls: Flights<Result<(), String>>,
    sifs: Sifs,
}

impl Images {
    /// Creates the resolver. Makes no request yet.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let settings = Arc::new(settings);
        Self {
            cache: Arc::new(Cache::new(settings.state.clone())),
            registry: Arc::new(RegistryClient::new(&settings)),
            pull_slots: FairSlots::new(PULLS, PULLS_EACH),
            // Conversions use processors and are short: those of one registry may have all slots.
            conversions: FairSlots::new(settings.concurrency, settings.concurrency),
            resolutions: Flights::default(),
            pulls: Flights::default(),
            sifs: Sifs::default(),
            settings,
        }
    }

    /// The settings that it was created with.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(super) fn registry(&self) -> &RegistryClient {
        &self.registry
    }

    pub(super) fn cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    /// Removes what pulls of an earlier agent left behind. Blocking; called once, at start.
    pub fn sweep(&self) {
        self.cache.sweep();
    }

    /// Checks only whether the site allows the image's source, for admission and `script`, without
    /// a registry or the disk. An invalid name is accepted here and waits with `InvalidImageName`,
    /// as on any node: if the pod failed, a Deployment would create the next one at once.
    pub fn check(&self, image: &str) -> Result<(), ImageError> {
        if self.settings.program.is_none() {
            return Ok(());
        }
        match reference::parse(image) {
            Err(error) if error.kind == ImageErrorKind::Unsupported => Err(error),
            Ok(Reference::Registry(name)) => self.allowed(image, &name),
            Ok(Reference::Path(_)) | Err(_) => Ok(()),
        }
    }

    fn allowed(&self, image: &str, name: &Name) -> Result<(), ImageError> {
        let allowed = reference::allowed(name, &self.settings.policy.now().registries);
        allowed.map_err(|message| ImageError::new(image, ImageErrorKind::Denied, message))
    }

    /// Resolves the image of a container, and pulls it if the pull policy says so.
    ///
    /// Cancel safety: a dropped call leaves nothing behind; a pull that others wait for continues.
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
                hold: None,
                file: None,
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
        let (text, roots) = (image.to_owned(), self.roots());
        let find = move || local::find(&text, &path, &roots);
        let found = tokio::task::spawn_blocking(find).await;
        let stopping = |_| ImageError::new(image, ImageErrorKind::Pull, "the agent is stopping");
        let local = found.map_err(stopping)??;
        let config = match local.sif {
            None => ImageFile::default(),
            Some((id, sif)) => {
                let file = self.sifs.config(&self.settings, id, sif).await;
                file.map_err(|message| ImageError::new(image, ImageErrorKind::Pull, message))?
            }
        };
        Ok(ResolvedImage {
            image_id: local.path.display().to_string(),
            path: local.path,
            config: config.into(),
            file: Some(local.id.to_job(&node_name())),
            hold: None,
        })
    }

    fn roots(&self) -> Roots {
        Roots {
            folders: self.settings.roots.clone(),
            shared: self.settings.trust_shared_roots,
        }
    }

    async fn remote(
        &self,
        image: &str,
        name: &Name,
        policy: PullPolicy,
    ) -> Result<ResolvedImage, ImageError> {
        // Checked again here, because the site's policy may have changed since admission.
        self.allowed(image, name)?;
        if policy != PullPolicy::Always
            && let Some(known) = known(&self.cache, name).await
        {
            return Ok(self.resolved(name, known));
        }
        if policy == PullPolicy::Never {
            let message = "it is not cached, and imagePullPolicy is Never";
            return Err(ImageError::new(image, ImageErrorKind::NeverPull, message));
        }
        let failed = |message: String| ImageError::new(image, ImageErrorKind::Pull, message);
        let source = reference::source(name, &self.settings.registries).map_err(failed)?;
        let found = match self.ask_registry(name, &source).await.map_err(failed)? {
            Resolution::Here(digest) => {
                if let Some(known) = here(&self.cache, digest).await {
                    return Ok(self.resolved(name, known));
                }
                // The image was removed from the cache in this moment.
                self.registry.resolve(&source).await.map_err(failed)?
            }
            Resolution::There(found) => found,
        };
        let digest = found.digest.to_string();
        let _hold = self.cache.hold(&digest);
        if here(&self.cache, digest.clone()).await.is_none() {
            self.pull(source, found).await.map_err(failed)?;
        }
        self.remember(name.whole(), &digest).await;
        let known = here(&self.cache, digest).await;
        let known = known
            .ok_or_else(|| failed("it was removed from the cache while it was pulled".to_owned()));
        Ok(self.resolved(name, known?))
    }

    fn resolved(&self, name: &Name, known: Known) -> ResolvedImage {
        ResolvedImage {
            path: self.cache.sif(&known.digest),
            image_id: reference::image_id(name, &known.digest),
            config: known.file.into(),
            file: None,
            hold: Some(known.hold),
        }
    }

    /// Asks the registry about a name; the digest alone is enough if its image is cached.
    async fn ask_registry(&self, name: &Name, source: &Source) -> Result<Resolution, String> {
        let (registry, cache) = (Arc::clone(&self.registry), Arc::clone(&self.cache));
        let (name, asked) = (name.clone(), source.clone());
        let ask = || async move {
            let Some(digest) = registry.digest(&asked).await? else {
                return registry.resolve(&asked).await.map(Resolution::There);
            };
            // If the digest is that of an index, the cache knows the image that it stands for.
            let at = name.at(&digest);
            if let Some(known) = known(&cache, &at).await {
                remember(cache, name.whole(), known.digest.clone()).await;
                return Ok(Resolution::Here(known.digest));
            }
            let found = registry.resolve(&asked.at(&digest)).await?;
            if found.digest != digest {
                remember(cache, at.whole(), found.digest.to_string()).await;
            }
            Ok(Resolution::There(found))
        };
        self.resolutions.join(&source.reference.whole(), ask).await
    }

    async fn pull(&self, source: Source, found: Found) -> Result<(), String> {
        let puller = Puller {
            settings: Arc::clone(&self.settings),
            cache: Arc::clone(&self.cache),
            registry: Arc::clone(&self.registry),
            pulls: Arc::clone(&self.pull_slots),
            conversions: Arc::clone(&self.conversions),
        };
        let key = found.digest.to_string();
        self.pulls.join(&key, || puller.pull(source, found)).await
    }

    async fn remember(&self, name: String, digest: &str) {
        remember(Arc::clone(&self.cache), name, digest.to_owned()).await;
    }
}

/// A cached image that is held, so that it is not removed.
#[derive(Debug)]
struct Known {
    digest: String,
    file: ImageFile,
    hold: Hold,
}

/// The image that the name had when it was last resolved.
async fn known(cache: &Arc<Cache>, name: &Name) -> Option<Known> {
    let (look, name) = (Arc::clone(cache), name.clone());
    let look = move || {
        let known = look.digest(&name.whole());
        known.or_else(|| name.digest().map(ToString::to_string))
    };
    let digest = tokio::task::spawn_blocking(look).await.ok()??;
    here(cache, digest).await
}

/// The image with this digest.
async fn here(cache: &Arc<Cache>, digest: String) -> Option<Known> {
    let cache = Arc::clone(cache);
    let look = move || {
        // Hold it first and look it up then, so that an image that is found stays.
        let hold = cache.hold(&digest);
        let file = cache.get(&digest)?;
        Some(Known { digest, file, hold })
    };
    tokio::task::spawn_blocking(look).await.ok().flatten()
}

async fn remember(cache: Arc<Cache>, name: String, digest: String) {
    let done = tokio::task::spawn_blocking(move || cache.remember(&name, &digest)).await;
    if let Ok(Err(err)) = done {
        // Costs only one more request to the registry next time.
        tracing::warn!(
            error = knoc_proto::error::chain(&err),
            "cannot record a digest"
        );
    }
}

#[cfg(test)]
mod tests;
