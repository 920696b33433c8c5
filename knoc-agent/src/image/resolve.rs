//! [`Images`]: resolves an image name and a pull policy to a file and its config.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use knoc_contract::{host::node_name, image_file::FileId, walk};
use knoc_proto::pb::{self, PullPolicy};

use super::{
    Credential, Hold, ImageError, ImageErrorKind, Name, ResolvedImage, Settings,
    access::{Access, Verdict},
    cache::{Cache, Entry},
    compression::Compressor,
    file::ImageFile,
    flight::Flights,
    local::{self, Roots},
    login::Login,
    progress::{Progress, PullWatch},
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

/// Who shares a pull: the digest, the repository, and the credentials.
type PullKey = (String, String, Option<Login>);

/// The images of this site.
#[derive(Debug)]
pub struct Images {
    settings: Arc<Settings>,
    cache: Arc<Cache>,
    registry: Arc<RegistryClient>,
    pull_slots: Arc<FairSlots>,
    conversions: Arc<FairSlots>,
    claims: Arc<FairSlots>,
    compressor: Arc<Compressor>,
    resolutions: Flights<Source, Result<Resolution, String>>,
    pulls: Flights<PullKey, Result<(), String>>,
    /// The pulls in progress, by what they are shared by.
    progress: Mutex<HashMap<PullKey, Weak<Progress>>>,
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
            // Conversions use processors and have their time (`turn`): those of one registry may have all slots.
            conversions: FairSlots::new(settings.concurrency, settings.concurrency),
            claims: FairSlots::new(usize::MAX, 1),
            compressor: Arc::new(Compressor::new(settings.compression)),
            resolutions: Flights::default(),
            pulls: Flights::default(),
            progress: Mutex::default(),
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

    pub(super) fn compressor(&self) -> &Compressor {
        &self.compressor
    }

    /// Takes note of the compressions of images that the runtime of a compute node could not mount.
    pub(crate) fn unread(&self, node: &str, compressions: &[String]) {
        self.compressor.unread(node, compressions);
    }

    /// Removes what pulls of an earlier agent left behind, and cancels their jobs. Blocking; called once, at start, in the
    /// runtime.
    pub fn sweep(&self) {
        if let Some(jobs) = &self.settings.jobs {
            for name in self.cache.pulls() {
                jobs.cancel(&name);
            }
        }
        self.cache.sweep();
    }

    /// Checks only whether the site allows the image's source, for admission and `script`, without
    /// a registry or the disk. An invalid name is accepted here and waits with `InvalidImageName`,
    /// as on any node: if the pod failed, a Deployment would create the next one at once.
    pub fn check(&self, image: &str) -> Result<(), ImageError> {
        if self.settings.program.is_none() {
            return Ok(());
        }
        match self.parse(image) {
            Err(error) if error.kind == ImageErrorKind::Unsupported => Err(error),
            Ok(Reference::Registry(name)) => self.allowed(image, &name),
            Ok(Reference::Path(_)) | Err(_) => Ok(()),
        }
    }

    fn parse(&self, image: &str) -> Result<Reference, ImageError> {
        let library = self.settings.library.as_ref();
        reference::parse(image, library.map(|library| library.host.as_str()))
    }

    /// Where an image is fetched from, with these credentials.
    fn source(&self, name: &Name, login: Option<&Login>) -> Result<Source, String> {
        let library = self.settings.library.as_ref();
        match library.filter(|_| name.in_library()) {
            Some(library) => Ok(library.source(name)),
            None => reference::source(name, &self.settings.registries, login),
        }
    }

    fn allowed(&self, image: &str, name: &Name) -> Result<(), ImageError> {
        let allowed = reference::allowed(name, &self.settings.policy.now().registries);
        allowed.map_err(|message| ImageError::new(image, ImageErrorKind::Denied, message))
    }

    /// Resolves the image of a container, without telling how far a pull has come.
    pub async fn resolve(
        &self,
        image: &str,
        policy: PullPolicy,
        credentials: &[Credential],
    ) -> Result<ResolvedImage, ImageError> {
        let watch = PullWatch::default();
        self.resolve_watched(image, policy, credentials, &watch)
            .await
    }

    /// Resolves the image of a container, and pulls it if the pull policy says so. The credentials
    /// are tried in their order; without any, the registry is asked without.
    ///
    /// Cancel safety: a dropped call leaves nothing behind; a pull that others wait for continues.
    pub async fn resolve_watched(
        &self,
        image: &str,
        policy: PullPolicy,
        credentials: &[Credential],
        watch: &PullWatch,
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
        match self.parse(image)? {
            Reference::Path(path) => self.local(image, path).await,
            Reference::Registry(name) => {
                let wanted = Wanted {
                    image,
                    name: &name,
                    policy,
                    credentials,
                    watch,
                };
                self.remote(wanted).await
            }
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

    async fn remote(&self, wanted: Wanted<'_>) -> Result<ResolvedImage, ImageError> {
        let Wanted {
            image,
            name,
            policy,
            credentials,
            watch,
        } = wanted;
        // Checked again here, because the site's policy may have changed since admission.
        self.allowed(image, name)?;
        let repository = name.owner();
        let cached = if policy == PullPolicy::Always {
            None
        } else {
            known(&self.cache, name).await
        };
        let present = cached.is_some();
        let usable = |known: &Known| {
            known.entry.access.verdict(&repository, credentials) == Verdict::Granted
        };
        if let Some(known) = cached.filter(usable) {
            return Ok(self.resolved(name, known));
        }
        if policy == PullPolicy::Never {
            return Err(ImageError::never(image, present));
        }
        let failed = |message: String| ImageError::new(image, ImageErrorKind::Pull, message);
        let anonymous = [Credential::default()];
        let tries = if credentials.is_empty() {
            anonymous.as_slice()
        } else {
            credentials
        };
        let mut asked: Vec<Source> = Vec::new();
        let mut errors: Vec<String> = Vec::new();
        for credential in tries {
            let source = self.source(name, credential.login.as_ref());
            let source = source.map_err(failed)?;
            if asked.contains(&source) {
                continue;
            }
            match self.ask_or_pull(name, &source, credential, watch).await {
                Ok(known) => return Ok(self.resolved(name, known)),
                Err(error) if errors.contains(&error) => {}
                Err(error) => errors.push(error),
            }
            asked.push(source);
        }
        Err(failed(errors.join("; ")))
    }

    /// Asks the registry with one of the credentials, and pulls the image unless the pod may use the cached one.
    async fn ask_or_pull(
        &self,
        name: &Name,
        source: &Source,
        credential: &Credential,
        watch: &PullWatch,
    ) -> Result<Known, String> {
        let repository = name.owner();
        // A mirror may not get the credentials.
        let credential = &Credential {
            login: source.login.clone(),
            ..credential.clone()
        };
        let verdict = |known: &Known| {
            let own = std::slice::from_ref(credential);
            known.entry.access.verdict(&repository, own)
        };
        let found = match self.ask_registry(name, source).await? {
            Resolution::There(found) => found,
            Resolution::Here(digest) => {
                let asked = source.reference.digest().is_none();
                match here(&self.cache, digest).await {
                    Some(known) if verdict(&known) == Verdict::Granted => return Ok(known),
                    Some(known) if asked && verdict(&known) == Verdict::Ask => {
                        self.grant(&known.digest, &repository, credential).await;
                        return Ok(known);
                    }
                    // The registry must give the manifest or the whole image, or the image was removed from the cache
                    // in this moment.
                    Some(_) | None => self.registry.resolve(source).await?,
                }
            }
        };
        let digest = found.digest.to_string();
        let _hold = self.cache.hold(&digest);
        let cached = here(&self.cache, digest.clone()).await;
        // A library may name the digest of an image that is no file of it.
        let unproven = |known: Known| {
            verdict(&known) == Verdict::Prove || name.fits(known.entry.pushed).is_err()
        };
        if cached.is_none_or(unproven) {
            self.pull(source.clone(), found, repository.clone(), watch)
                .await?;
        }
        self.grant(&digest, &repository, credential).await;
        self.remember(name.whole(), &digest).await;
        let known = here(&self.cache, digest).await;
        known.ok_or_else(|| "it was removed from the cache while it was pulled".to_owned())
    }

    fn resolved(&self, name: &Name, known: Known) -> ResolvedImage {
        ResolvedImage {
            path: self.cache.sif(&known.digest),
            image_id: reference::image_id(name, &known.digest),
            config: known.entry.file.into(),
            file: known.file,
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
        self.resolutions.join(source.clone(), ask).await
    }

    async fn pull(
        &self,
        source: Source,
        found: Found,
        repository: String,
        watch: &PullWatch,
    ) -> Result<(), String> {
        let access = Access::pulled(&repository, source.login.is_some());
        let key = (found.digest.to_string(), repository, source.login.clone());
        let progress = self.progress_of(&key, found.image.size());
        watch.follow(Arc::clone(&progress));
        let puller = Puller {
            settings: Arc::clone(&self.settings),
            cache: Arc::clone(&self.cache),
            registry: Arc::clone(&self.registry),
            progress,
            pulls: Arc::clone(&self.pull_slots),
            conversions: Arc::clone(&self.conversions),
            claims: Arc::clone(&self.claims),
            compressor: Arc::clone(&self.compressor),
        };
        let pull = || puller.pull(source, found, access);
        self.pulls.join(key, pull).await
    }

    /// The progress of the pull of that key, which may be under way.
    fn progress_of(&self, key: &PullKey, bytes: u64) -> Arc<Progress> {
        let mut all = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, progress| progress.strong_count() > 0);
        if let Some(progress) = all.get(key).and_then(Weak::upgrade) {
            return progress;
        }
        let progress = Arc::new(Progress::new(bytes));
        all.insert(key.clone(), Arc::downgrade(&progress));
        progress
    }

    /// Records that the registry gave a cached image for this credential.
    async fn grant(&self, digest: &str, repository: &str, credential: &Credential) {
        let (cache, digest) = (Arc::clone(&self.cache), digest.to_owned());
        let (repository, credential) = (repository.to_owned(), credential.clone());
        let record = move || cache.grant(&digest, &repository, &credential);
        if let Ok(Err(error)) = tokio::task::spawn_blocking(record).await {
            // Costs another request to the registry next time.
            let error = knoc_proto::error::chain(&error);
            tracing::warn!(error, "cannot record who may use an image");
        }
    }

    async fn remember(&self, name: String, digest: &str) {
        remember(Arc::clone(&self.cache), name, digest.to_owned()).await;
    }
}

/// What a pod wants of a registry.
#[derive(Debug, Clone, Copy)]
struct Wanted<'a> {
    /// The image as the pod names it.
    image: &'a str,
    name: &'a Name,
    policy: PullPolicy,
    credentials: &'a [Credential],
    watch: &'a PullWatch,
}

/// A cached image that is held, so that it is not removed.
#[derive(Debug)]
struct Known {
    digest: String,
    entry: Entry,
    /// The identity of a SIF file that was pushed as it is, which is used like one of the site.
    file: Option<pb::ImageFileId>,
    hold: Hold,
}

/// The image that the name had when it was last resolved. One of the other kind is not it: the registry is asked again, and the
/// error says what to write.
async fn known(cache: &Arc<Cache>, name: &Name) -> Option<Known> {
    let (look, of) = (Arc::clone(cache), name.clone());
    let look = move || {
        let known = look.digest(&of.whole());
        known.or_else(|| of.digest().map(ToString::to_string))
    };
    let digest = tokio::task::spawn_blocking(look).await.ok()??;
    let known = here(cache, digest).await;
    known.filter(|known| name.fits(known.entry.pushed).is_ok())
}

/// The image with this digest.
async fn here(cache: &Arc<Cache>, digest: String) -> Option<Known> {
    let cache = Arc::clone(cache);
    let look = move || {
        // Hold it first and look it up then, so that an image that is found stays.
        let hold = cache.hold(&digest);
        let entry = cache.get(&digest)?;
        let file = if entry.pushed {
            let found = walk::own(&cache.sif(&digest)).ok()?;
            Some(FileId::of(&found).to_job(&node_name()))
        } else {
            None
        };
        Some(Known {
            digest,
            entry,
            file,
            hold,
        })
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
