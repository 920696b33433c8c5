//! Maps pod UIDs to their actors: finds or creates the actor that a request is for, and restores
//! all pods at start.
//!
//! The registry holds the actors' tasks and joins them. Its map is locked only for look-ups, never
//! across an await. It decides nothing about a pod.

pub mod board;
pub mod cluster;
pub mod poll;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use knoc_contract::jobdir::JobDirError;
use knoc_proto::{
    error::chain,
    ids::PodUid,
    pb,
    pod::{PodSpec, PodValues},
    reason::ErrorReason,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    image::Credentials,
    pod::{
        actor::{self, NewActor, Restored},
        input::{INPUTS, Input, Reply, RequestError, Wanted},
    },
    site::Site,
};

/// The queue's length for actors that have ended and are to be removed from the map.
pub const ENDED: usize = 1024;
/// An actor answers once its record is written; a healthy file system never takes this long.
const ANSWER: Duration = Duration::from_secs(30);

/// A handle to a pod's actor.
#[derive(Debug, Clone)]
pub struct Handle {
    input: mpsc::Sender<Input>,
    wanted: watch::Receiver<Wanted>,
}

impl Handle {
    /// What the poller needs to know about the pod.
    #[must_use]
    pub fn wanted(&self) -> Wanted {
        self.wanted.borrow().clone()
    }

    /// Sends an input without waiting. False if the queue is full or the actor has ended.
    #[must_use]
    pub fn offer(&self, input: Input) -> bool {
        self.input.try_send(input).is_ok()
    }
}

/// All pods.
#[derive(Debug)]
pub struct Registry {
    site: Arc<Site>,
    pods: Mutex<HashMap<PodUid, Handle>>,
    tasks: TaskTracker,
    stop: CancellationToken,
    limit: usize,
}

impl Registry {
    /// Creates a registry without pods, for at most `limit` pods at the same time.
    #[must_use]
    pub fn new(site: Arc<Site>, limit: usize, stop: CancellationToken) -> Arc<Self> {
        let (pods, tasks) = (Mutex::default(), TaskTracker::new());
        Arc::new(Self {
            site,
            pods,
            tasks,
            stop,
            limit,
        })
    }

    /// Restores the pods that are on disk, and returns once each of them is on the board: a
    /// snapshot that lacked one would mean that this agent does not know it. A pod that cannot be
    /// read is logged and left as it is.
    pub async fn recover(&self) -> Result<usize, JobDirError> {
        let state = self.site.state.clone();
        let site = Arc::clone(&self.site);
        let read = tokio::task::spawn_blocking(move || {
            let mut found = Vec::new();
            for dir in state.list()? {
                match actor::restore(&dir, &site.config) {
                    Ok(Some(restored)) => {
                        site.versions.hold(&restored.version);
                        found.push((dir, restored));
                    }
                    // The request that was creating this pod got no answer, so nothing was
                    // promised.
                    Ok(None) => {
                        if let Err(error) = dir.remove() {
                            // Another process still writes there, or the file system is busy: the
                            // next start tries again.
                            let path = dir.path().display();
                            tracing::warn!(%path, error = chain(&error), "a pod directory without a record cannot be removed");
                        }
                    }
                    Err(error) => {
                        site.versions.hold("");
                        let path = dir.path().display();
                        tracing::error!(%path, error = chain(&error), "a pod's record cannot be read");
                    }
                }
            }
            site.versions.prune();
            Ok::<_, JobDirError>(found)
        });
        let Ok(found) = read.await else { return Ok(0) };
        let found = found?;
        let count = found.len();
        let mut awaited = Vec::with_capacity(count);
        for (dir, restored) in found {
            if let Ok(uid) = PodUid::try_from(dir.uid()) {
                let (publishes, on_board) = oneshot::channel();
                let handle = self.start(&uid, Some((restored, publishes)));
                self.lock().insert(uid, handle);
                awaited.push(on_board);
            }
        }
        for on_board in awaited {
            // Fails only if the actor's task has ended, and its pod with it.
            on_board.await.ok();
        }
        Ok(count)
    }

    /// Handles `EnsurePod`.
    pub async fn ensure(
        &self,
        spec: PodSpec,
        values: PodValues,
        credentials: Option<Credentials>,
        cluster_id: String,
    ) -> Result<(pb::PodObserved, bool), RequestError> {
        let uid = spec.uid();
        let handle = {
            let mut pods = self.lock();
            match pods.get(uid).filter(|handle| !handle.input.is_closed()) {
                Some(handle) => handle.clone(),
                None if pods.len() >= self.limit => {
                    let message = format!("this agent runs at most {} pods", self.limit);
                    return Err(RequestError::new(ErrorReason::Overloaded, message));
                }
                None => {
                    let handle = self.start(uid, None);
                    pods.insert(uid.clone(), handle.clone());
                    handle
                }
            }
        };
        let (spec, values) = (Box::new(spec), Box::new(values));
        ask(&handle, |reply| Input::Ensure {
            spec,
            values,
            credentials,
            cluster_id,
            reply,
        })
        .await
    }

    /// Handles `DeletePod`.
    pub async fn delete(
        &self,
        uid: &PodUid,
        grace: Option<Duration>,
        reason: String,
    ) -> Result<pb::PodObserved, RequestError> {
        let handle = self.get(uid)?;
        ask(&handle, |reply| Input::Delete {
            grace,
            reason,
            reply,
        })
        .await
    }

    /// Handles `ForgetPod`.
    pub async fn forget(&self, uid: &PodUid) -> Result<(), RequestError> {
        let handle = self.get(uid)?;
        ask(&handle, |reply| Input::Forget { reply }).await
    }

    /// Handles `UpdateValues`.
    pub async fn update(
        &self,
        uid: &PodUid,
        values: pb::PodValues,
        credentials: Option<Credentials>,
    ) -> Result<(), RequestError> {
        let handle = self.get(uid)?;
        let values = Box::new(values);
        ask(&handle, |reply| Input::Values {
            values,
            credentials,
            reply,
        })
        .await
    }

    /// All pods, for the poller.
    #[must_use]
    pub fn handles(&self) -> Vec<(PodUid, Handle)> {
        self.lock()
            .iter()
            .map(|(uid, handle)| (uid.clone(), handle.clone()))
            .collect()
    }

    /// The number of pods.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether there are no pods.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Removes the handle of an actor that has ended, unless a new actor has replaced it.
    pub fn release(&self, uid: &PodUid) {
        let mut pods = self.lock();
        if pods.get(uid).is_some_and(|handle| handle.input.is_closed()) {
            pods.remove(uid);
        }
    }

    /// After the stop, waits until all actors have ended.
    pub async fn join(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn get(&self, uid: &PodUid) -> Result<Handle, RequestError> {
        let found = self.lock().get(uid).cloned();
        found.ok_or_else(|| RequestError::new(ErrorReason::NotFound, format!("no pod {uid}")))
    }

    fn start(&self, uid: &PodUid, restored: Option<(Restored, oneshot::Sender<()>)>) -> Handle {
        let (input, inputs) = mpsc::channel(INPUTS);
        let (wants, wanted) = watch::channel(Wanted::default());
        let site = Arc::clone(&self.site);
        let actor = NewActor::new(site, uid.clone(), input.downgrade(), wants);
        self.tasks
            .spawn(actor.run(restored, inputs, self.stop.child_token()));
        Handle { input, wanted }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<PodUid, Handle>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends a request to an actor and waits for its answer.
async fn ask<T>(handle: &Handle, input: impl FnOnce(Reply<T>) -> Input) -> Result<T, RequestError> {
    let (reply, answer) = oneshot::channel();
    handle
        .input
        .try_send(input(reply))
        .map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => {
                RequestError::new(ErrorReason::Overloaded, "the pod's queue is full")
            }
            mpsc::error::TrySendError::Closed(_) => {
                RequestError::new(ErrorReason::NotFound, "the pod is being forgotten")
            }
        })?;
    match tokio::time::timeout(ANSWER, answer).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => Err(RequestError::new(
            ErrorReason::ShuttingDown,
            "the agent is stopping",
        )),
        Err(_) => Err(RequestError::new(
            ErrorReason::Internal,
            "the pod's record could not be written in time: is the state directory's file system slow?",
        )),
    }
}

/// Task: removes actors that have ended from the map until `stop` is cancelled.
pub async fn sweep(
    registry: Arc<Registry>,
    mut ended: mpsc::Receiver<PodUid>,
    stop: CancellationToken,
) {
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            uid = ended.recv() => match uid {
                Some(uid) => registry.release(&uid),
                None => return,
            },
        }
    }
}
