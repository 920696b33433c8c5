//! Task: watches the `ConfigMaps`, Secrets and `ClusterTrustBundles` to which pods refer, one watch for each object or selection
//! of trust bundles, and queues the pods of an object that changes.
//!
//! A watch brings metadata only, so no Secret is kept here: the worker of a pod GETs its objects again. What is kept is
//! a level for each object, which grows with each change; a worker compares it with the level at which it last read.
//!
//! Objects that nothing watches are read again from time to time (see [`super::resolve::look_at`]): those beyond
//! [`WATCHES`], and all of them if the API server denies the watch or does not have the kind.

mod bundles;

pub(crate) use bundles::list_params;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::StreamExt as _;
use k8s_openapi::{
    NamespaceResourceScope,
    api::core::v1::{ConfigMap, Secret},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use knoc_proto::ids::PodUid;
use knoc_translate::TrustBundleKey;
use kube::{
    Api, Client, Resource,
    api::{PartialObjectMeta, WatchEvent, WatchParams},
};
use serde::de::DeserializeOwned;
use tokio::{
    sync::Notify,
    task::{AbortHandle, JoinSet},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::queue::Queue;

/// Watches at a time. Each is a connection to the API server, and about 50 KiB of memory.
const WATCHES: usize = 256;
/// The pause before a watch that failed is opened again; each further one is twice as long.
const BACKOFF: Duration = Duration::from_secs(1);
const BACKOFF_MOST: Duration = Duration::from_mins(1);
/// How long a session lasts at most. The API server ends it earlier, unless the connection is dead.
const SESSION: Duration = Duration::from_mins(6);
/// A session that ended sooner than this has failed.
const SHORT: Duration = Duration::from_secs(1);
/// How long the first event of a new watch may take before the object is asked for, which may have been deleted before.
const FIRST_EVENT: Duration = Duration::from_secs(2);
/// The deadline of that question.
const ASK: Duration = Duration::from_secs(10);
/// The pause after the API server denied a watch.
const DENIED: Duration = Duration::from_mins(5);
/// How much later each further pod of a changed object may be refreshed, so that many do not ask at the same time.
const SPREAD: Duration = Duration::from_millis(5);
const SPREAD_MOST: Duration = Duration::from_millis(1500);

/// What kind of object a pod refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Kind {
    ConfigMap,
    Secret,
    TrustBundle,
}

/// What has one watch: something to which a pod refers.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Key {
    ConfigMap(Name),
    Secret(Name),
    /// What a projection selects: any number of objects, which are watched together.
    TrustBundles(TrustBundleKey),
}

/// The name of an object in a namespace.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Name {
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl Key {
    fn kind(&self) -> Kind {
        match self {
            Self::ConfigMap(_) => Kind::ConfigMap,
            Self::Secret(_) => Kind::Secret,
            Self::TrustBundles(_) => Kind::TrustBundle,
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, of) = match self {
            Self::ConfigMap(of) => ("configmap", of),
            Self::Secret(of) => ("secret", of),
            Self::TrustBundles(selected) => return selected.fmt(f),
        };
        write!(f, "{kind} \"{}/{}\"", of.namespace, of.name)
    }
}

/// The resourceVersion of an object, or what stands for those of several ([`version_of_all`]); None if nothing exists.
pub(crate) type Version = Option<String>;

/// PURE: what stands for the versions of all these objects, whatever their order.
pub(crate) fn version_of_all<'a>(objects: impl Iterator<Item = &'a ObjectMeta>) -> Version {
    let mut versions: Vec<_> = objects
        .map(|object| (&object.name, &object.resource_version))
        .collect();
    versions.sort_unstable();
    let mut hasher = DefaultHasher::new();
    versions.hash(&mut hasher);
    (!versions.is_empty()).then(|| format!("{:x}", hasher.finish()))
}

/// The objects of all pods; clones are handles on the same ones.
#[derive(Clone, Default, Debug)]
pub struct References(Arc<Shared>);

#[derive(Default, Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default, Debug)]
struct State {
    objects: HashMap<Key, Object>,
    pods: HashMap<PodUid, Vec<Key>>,
    /// The number of changes so far.
    level: u64,
    /// How many objects were followed so far.
    followed: u64,
    /// The kinds of objects whose watch was denied, which is logged once for each.
    denied: HashSet<Kind>,
}

#[derive(Debug)]
struct Object {
    /// Which watch is this object's: one that was opened before the object was released and followed again may have
    /// missed events.
    incarnation: u64,
    pods: HashSet<PodUid>,
    version: Version,
    /// The level of its last change.
    level: u64,
    /// Whether its watch is open.
    watched: bool,
    /// Whether the API server denied its watch when that was last opened.
    denied: bool,
}

impl References {
    /// The current level, to be read before objects are read.
    pub(crate) fn level(&self) -> u64 {
        self.state().level
    }

    /// The pod refers to these objects, which were just read, and to no others.
    pub(crate) fn follow(&self, uid: &PodUid, objects: BTreeMap<Key, Version>) {
        self.state().follow(uid, objects);
        self.0.changed.notify_one();
    }

    /// The pod refers to nothing any more.
    pub(crate) fn forget(&self, uid: &PodUid) {
        if self.state().forget(uid) {
            self.0.changed.notify_one();
        }
    }

    /// If an object of the pod has changed since `level`: after which pause the pod reads its objects again.
    pub(crate) fn changed_since(&self, uid: &PodUid, level: u64) -> Option<Duration> {
        let state = self.state();
        let objects = state.objects_of(uid).filter(|object| object.level > level);
        let pods = objects.map(|object| object.pods.len()).max()?;
        let most = SPREAD.saturating_mul(pods.try_into().unwrap_or(u32::MAX));
        let most = most.min(SPREAD_MOST);
        Some(most.mul_f64(rand::random_range(0.0..1.0)))
    }

    /// Is each object of the pod watched?
    pub(crate) fn all_watched(&self, uid: &PodUid) -> bool {
        self.state().objects_of(uid).all(|object| object.watched)
    }

    /// Watches until `shutdown`.
    pub async fn run(self, client: Client, queue: Queue, shutdown: CancellationToken) {
        let mut watches = JoinSet::new();
        let mut running: HashMap<Key, Running> = HashMap::new();
        loop {
            let wanted = self.wanted(&running);
            running.retain(|key, watch| {
                let keep = wanted.get(key) == Some(&watch.incarnation);
                if !keep {
                    watch.task.abort();
                }
                keep
            });
            for (key, incarnation) in wanted {
                running.entry(key.clone()).or_insert_with(|| {
                    let watch = Watch {
                        references: self.clone(),
                        client: client.clone(),
                        queue: queue.clone(),
                        key,
                        incarnation,
                    };
                    Running {
                        incarnation,
                        task: watches.spawn(watch.run()),
                    }
                });
            }
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                Some(_) = watches.join_next() => {}
                () = self.0.changed.notified() => {}
            }
            running.retain(|_, watch| !watch.task.is_finished());
        }
    }

    /// The objects to watch: those that are watched stay so, others fill up to [`WATCHES`]. Those whose watch is denied come
    /// last: they would wait for minutes in the place of one that is not.
    fn wanted(&self, running: &HashMap<Key, Running>) -> HashMap<Key, u64> {
        let state = self.state();
        let mut all: Vec<_> = state.objects.iter().collect();
        all.sort_by_cached_key(|(key, object)| (object.denied, !running.contains_key(*key)));
        let first = all.into_iter().take(WATCHES);
        first
            .map(|(key, object)| (key.clone(), object.incarnation))
            .collect()
    }

    /// The API server denies this watch: others are opened before it.
    fn denied(&self, which: (&Key, u64)) {
        if let Some(object) = self.state().object(which) {
            object.denied = true;
        }
        self.0.changed.notify_one();
    }

    /// Whether no pod refers to any object.
    #[cfg(test)]
    pub(crate) fn follows_nothing(&self) -> bool {
        self.state().objects.is_empty()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn objects_of(&self, uid: &PodUid) -> impl Iterator<Item = &Object> {
        let keys = self.pods.get(uid).into_iter().flatten();
        keys.filter_map(|key| self.objects.get(key))
    }

    fn follow(&mut self, uid: &PodUid, objects: BTreeMap<Key, Version>) {
        let before = self.pods.remove(uid).unwrap_or_default();
        for key in before.iter().filter(|key| !objects.contains_key(*key)) {
            self.release(key, uid);
        }
        let mut keys = Vec::with_capacity(objects.len());
        for (key, version) in objects {
            let followed = &mut self.followed;
            let object = self.objects.entry(key.clone()).or_insert_with(|| {
                *followed += 1;
                Object {
                    incarnation: *followed,
                    pods: HashSet::new(),
                    version,
                    level: 0,
                    watched: false,
                    denied: false,
                }
            });
            object.pods.insert(uid.clone());
            keys.push(key);
        }
        if !keys.is_empty() {
            self.pods.insert(uid.clone(), keys);
        }
    }

    fn forget(&mut self, uid: &PodUid) -> bool {
        let Some(keys) = self.pods.remove(uid) else {
            return false;
        };
        for key in &keys {
            self.release(key, uid);
        }
        true
    }

    fn release(&mut self, key: &Key, uid: &PodUid) {
        if let Some(object) = self.objects.get_mut(key) {
            object.pods.remove(uid);
            if object.pods.is_empty() {
                self.objects.remove(key);
            }
        }
    }

    /// The object, if this incarnation of it is still followed.
    fn object(&mut self, (key, incarnation): (&Key, u64)) -> Option<&mut Object> {
        let object = self.objects.get_mut(key);
        object.filter(|object| object.incarnation == incarnation)
    }

    /// The object has this version. Returns its pods if that is news.
    fn observe(&mut self, which: (&Key, u64), version: Version) -> Vec<PodUid> {
        let level = self.level + 1;
        let Some(object) = self.object(which) else {
            return Vec::new();
        };
        if object.version == version {
            return Vec::new();
        }
        object.version = version;
        object.level = level;
        let pods = object.pods.iter().cloned().collect();
        self.level = level;
        pods
    }

    /// The object may have changed unseen. Returns its pods.
    fn doubt(&mut self, which: (&Key, u64)) -> Vec<PodUid> {
        let level = self.level + 1;
        let Some(object) = self.object(which) else {
            return Vec::new();
        };
        object.level = level;
        let pods = object.pods.iter().cloned().collect();
        self.level = level;
        pods
    }

    fn set_watched(&mut self, which: (&Key, u64), watched: bool) {
        if let Some(object) = self.object(which) {
            object.watched = watched;
            object.denied &= !watched;
        }
    }
}

/// A watch that runs.
#[derive(Debug)]
struct Running {
    incarnation: u64,
    task: AbortHandle,
}

/// The watch of one incarnation of an object.
struct Watch {
    references: References,
    client: Client,
    queue: Queue,
    key: Key,
    incarnation: u64,
}

/// Why a session of a watch ended.
enum End {
    /// The API server ended it, as it does every few minutes.
    Closed,
    /// The version from which the watch was to go on is too old.
    TooOld,
    Denied,
    /// The cluster does not have this kind of object.
    Unknown,
    Failed(String),
}

impl Watch {
    /// Watches until it is aborted.
    async fn run(self) {
        let mut backoff = BACKOFF;
        // The version of the last bookmark: from there a new session misses nothing.
        let mut resume = None;
        loop {
            let began = Instant::now();
            let end = tokio::time::timeout(SESSION, self.one_session(&mut resume)).await;
            let end = end.unwrap_or_else(|_| End::Failed("the connection is silent".to_owned()));
            let hopeless = matches!(end, End::Denied | End::Unknown);
            if !hopeless && !matches!(end, End::Failed(_)) && began.elapsed() >= SHORT {
                backoff = BACKOFF;
                if matches!(end, End::TooOld) {
                    resume = None;
                }
                continue;
            }
            let pause = self.report(end).unwrap_or(backoff);
            backoff = (backoff * 2).min(BACKOFF_MOST);
            resume = None;
            self.references.state().set_watched(self.which(), false);
            if hopeless {
                self.references.denied(self.which());
            }
            self.push(self.pods());
            tokio::time::sleep(pause.mul_f64(rand::random_range(0.75..1.25))).await;
        }
    }

    /// Logs why a session ended; returns the pause after it if it is not the usual one.
    fn report(&self, end: End) -> Option<Duration> {
        let key = &self.key;
        match end {
            End::Denied => {
                if self.references.state().denied.insert(key.kind()) {
                    tracing::warn!(
                        object = %key,
                        "the API server denies the watch of an object to which a pod refers (verb `watch`), such objects are read once a minute instead"
                    );
                }
                Some(DENIED)
            }
            End::Unknown => {
                tracing::debug!(object = %key, "the cluster does not have this kind of object, it is not watched");
                Some(DENIED)
            }
            End::Failed(error) => {
                tracing::debug!(object = %key, error, "the watch of an object failed");
                None
            }
            End::Closed | End::TooOld => None,
        }
    }

    async fn one_session(&self, resume: &mut Option<String>) -> End {
        match &self.key {
            Key::ConfigMap(of) => self.session::<ConfigMap>(of, resume).await,
            Key::Secret(of) => self.session::<Secret>(of, resume).await,
            Key::TrustBundles(selected) => self.bundles(selected, resume).await,
        }
    }

    async fn session<K>(&self, of: &Name, resume: &mut Option<String>) -> End
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + DeserializeOwned
            + std::fmt::Debug,
    {
        let api: Api<K> = Api::namespaced(self.client.clone(), &of.namespace);
        let only = WatchParams::default().fields(&format!("metadata.name={}", of.name));
        let from = resume.clone().unwrap_or_else(|| "0".to_owned());
        let events = match api.watch_metadata(&only, &from).await {
            Ok(events) => events,
            Err(error) => return failed(&error),
        };
        self.references.state().set_watched(self.which(), true);
        let mut events = std::pin::pin!(events);
        // A new watch begins with the object. If that does not come, the object may have been deleted since it was read.
        let mut unproven = resume.is_none() && self.exists();
        loop {
            let event = if unproven {
                let Ok(event) = tokio::time::timeout(FIRST_EVENT, events.next()).await else {
                    unproven = false;
                    self.ask(&api, &of.name).await;
                    continue;
                };
                event
            } else {
                events.next().await
            };
            let Some(event) = event else {
                return End::Closed;
            };
            let version = match event {
                Err(error) => return failed(&error),
                Ok(WatchEvent::Error(status)) if status.code == 410 => return End::TooOld,
                Ok(WatchEvent::Error(status)) => return End::Failed(status.message),
                Ok(WatchEvent::Bookmark(bookmark)) => {
                    *resume = Some(bookmark.metadata.resource_version);
                    continue;
                }
                Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)) => {
                    object.metadata.resource_version
                }
                Ok(WatchEvent::Deleted(_)) => None,
            };
            unproven = false;
            self.observed(version);
        }
    }

    /// Asks for the version of the object.
    async fn ask<K>(&self, api: &Api<K>, name: &str)
    where
        K: Clone + DeserializeOwned + std::fmt::Debug,
    {
        let asked = tokio::time::timeout(ASK, api.get_metadata_opt(name)).await;
        if let Ok(Ok(found)) = asked {
            let version = |object: PartialObjectMeta<K>| object.metadata.resource_version;
            self.observed(found.and_then(version));
        } else {
            // The pods read it themselves.
            self.doubted();
        }
    }

    fn doubted(&self) {
        let pods = self.references.state().doubt(self.which());
        self.push(pods);
    }

    fn observed(&self, version: Version) {
        let pods = self.references.state().observe(self.which(), version);
        self.push(pods);
    }

    fn which(&self) -> (&Key, u64) {
        (&self.key, self.incarnation)
    }

    /// Did the object exist when it was last read or seen?
    fn exists(&self) -> bool {
        let mut state = self.references.state();
        let object = state.object(self.which());
        object.is_some_and(|object| object.version.is_some())
    }

    fn pods(&self) -> Vec<PodUid> {
        let mut state = self.references.state();
        let object = state.object(self.which());
        object.map_or_else(Vec::new, |object| object.pods.iter().cloned().collect())
    }

    fn push(&self, pods: Vec<PodUid>) {
        for uid in pods {
            self.queue.push(&uid);
        }
    }
}

fn failed(error: &kube::Error) -> End {
    let code = if let kube::Error::Api(status) = error {
        status.code
    } else {
        0
    };
    match code {
        410 => End::TooOld,
        401 | 403 => End::Denied,
        _ => End::Failed(knoc_proto::error::chain(error)),
    }
}

#[cfg(test)]
mod tests;
