//! Links that the agent carries itself, on demand, if compute nodes cannot reach it: a step of the
//! scheduler enters the pod's job and runs `knoc-agent connect JOBDIR`, which relays the step's
//! standard input and output to the shim's socket. Inside is the same TLS with the same pinned keys
//! as over TCP, so the step is not trusted.
//!
//! Each step is a process on the login node, so their number is bounded (`limits.srun_links`). One
//! is started only when somebody needs the link ([`ShimSteps::reach`]) and ends when nobody has
//! needed it for `limits.srun_idle`, or earlier if another pod needs its place. A pod without one is
//! followed by its report file.
//!
//! Here is who uses which link ([`table`]); [`crate::shim_carry`] runs the steps.

mod table;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use knoc_proto::{
    ids::{JobId, PodUid},
    pb,
    reason::ErrorReason,
};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use self::table::{Entry, Table};
use crate::shim_route::{ShimRoute, Way};

/// How long a caller waits for a step to carry its link.
pub const START: Duration = Duration::from_secs(20);
/// A step that is in use is looked at this often.
const LOOK: Duration = Duration::from_secs(5);
/// The shortest time between two looks.
const SHORTEST: Duration = Duration::from_millis(10);
/// The most requests that wait for the owner task.
const REQUESTS: usize = 64;

/// Whether a step carries its link by now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// Not yet.
    Starting,
    /// The link is open.
    Up,
    /// It will not; says why.
    Failed(String),
}

/// The links that steps carry.
#[derive(Debug, Clone)]
pub struct ShimSteps(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    table: Mutex<Table>,
    requests: mpsc::Sender<Request>,
    route: ShimRoute,
    most: usize,
    idle: Duration,
}

/// The order to start a step.
#[derive(Debug)]
pub struct Request {
    /// The pod.
    pub uid: PodUid,
    /// Its job.
    pub job: JobId,
    /// Distinguishes this step from others of the pod.
    pub number: u64,
    /// To be told how it goes.
    pub phase: watch::Sender<Phase>,
    /// Cancelled when the step is to end, because another pod needs its place.
    pub close: CancellationToken,
}

/// A use of a pod's link. While it lives, the step does not end because it is idle.
#[derive(Debug)]
pub struct Use {
    steps: ShimSteps,
    uid: PodUid,
    number: u64,
}

impl Drop for Use {
    fn drop(&mut self) {
        let mut table = self.steps.table();
        table.release(&self.uid, self.number, Instant::now());
    }
}

impl ShimSteps {
    /// No links yet; the requests are for [`crate::shim_carry`]. At most `most` steps run at a time; each ends
    /// when it was not used for `idle`.
    #[must_use]
    pub fn new(route: ShimRoute, most: usize, idle: Duration) -> (Self, mpsc::Receiver<Request>) {
        let (requests, receiver) = mpsc::channel(REQUESTS);
        let shared = Shared {
            table: Mutex::default(),
            requests,
            route,
            most,
            idle,
        };
        (Self(Arc::new(shared)), receiver)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        let table = self.0.table.lock();
        table.unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of a shim's report.
    pub(crate) fn reported(&self, uid: &PodUid, report: &pb::Report) {
        let Some(route) = &report.route else { return };
        self.0.route.reported(route);
        match JobId::try_from(report.job_id.as_str()) {
            Ok(job) if !report.r#final => self.table().know(uid, job, route),
            Ok(_) | Err(_) => self.forget(uid),
        }
    }

    /// The pod has ended.
    pub(crate) fn forget(&self, uid: &PodUid) {
        self.table().forget(uid);
    }

    /// The number of steps.
    #[must_use]
    pub fn running(&self) -> usize {
        self.table().len()
    }

    /// Has a step carry the link of a pod whose shim has none, and waits until it is up. `None` if
    /// that is not the way to reach this shim: it dials. Cancel safe.
    pub(crate) async fn reach(&self, uid: &PodUid) -> Result<Option<Use>, Status> {
        let Some((used, mut phase)) = self.begin(uid)? else {
            return Ok(None);
        };
        let up = phase.wait_for(|phase| *phase != Phase::Starting);
        let failed = |why: &str| {
            ErrorReason::ShimUnreachable.status(format!(
                "compute nodes cannot reach the agent, and no job step could carry the link to pod {uid}: {why}"
            ))
        };
        match tokio::time::timeout(START, up).await {
            Ok(Ok(phase)) => match &*phase {
                Phase::Failed(why) => Err(failed(why)),
                Phase::Starting | Phase::Up => Ok(Some(used)),
            },
            Ok(Err(_)) => Err(failed("the agent is stopping")),
            Err(_) => Err(failed(&format!("not within {} s", START.as_secs()))),
        }
    }

    /// The use of a link that a step carries already; `None` if none does.
    pub(crate) fn held(&self, uid: &PodUid) -> Option<Use> {
        let (number, _) = self.table().hold(uid)?;
        Some(self.use_of(uid, number))
    }

    /// The step has ended.
    pub(crate) fn ended(&self, uid: &PodUid, number: u64) {
        self.table().remove(uid, number);
    }

    /// Tells all steps to end.
    pub(crate) fn close_all(&self) {
        self.table().close_all();
    }

    /// The most steps at a time.
    pub(crate) fn most(&self) -> usize {
        self.0.most
    }

    /// Returns when the link was not used for long enough; the step then counts no more.
    pub(crate) async fn idle(&self, uid: &PodUid, number: u64) {
        let limit = self.0.idle;
        loop {
            let before = Instant::now().checked_sub(limit);
            let ended = self.table().end_if_idle(uid, number, before);
            let next = match ended {
                Ok(()) => return,
                Err(Some(since)) => since + limit,
                Err(None) => Instant::now() + LOOK.min(limit.max(SHORTEST)),
            };
            tokio::time::sleep_until(next).await;
        }
    }

    fn use_of(&self, uid: &PodUid, number: u64) -> Use {
        Use {
            steps: self.clone(),
            uid: uid.clone(),
            number,
        }
    }

    fn begin(&self, uid: &PodUid) -> Result<Option<(Use, watch::Receiver<Phase>)>, Status> {
        let mut table = self.table();
        if let Some((number, phase)) = table.hold(uid) {
            drop(table);
            return Ok(Some((self.use_of(uid, number), phase)));
        }
        let Some((job, route)) = table.known(uid) else {
            return Ok(None);
        };
        match self.0.route.way(&route) {
            Way::Wait => return Ok(None),
            Way::Step => {}
            Way::Refused(why) => {
                let message = format!(
                    "compute nodes cannot reach the agent, and the scheduler refuses job steps that would carry the \
                     link to pod {uid} ({why}): only its status and logs work"
                );
                return Err(ErrorReason::ShimUnreachable.status(message));
            }
        }
        if !table.make_room(self.0.most) {
            let message = format!(
                "{} job steps carry links to other pods and all are in use; try again later, or raise limits.srun_links",
                self.0.most
            );
            return Err(ErrorReason::Overloaded.status(message));
        }
        let (phase, receiver) = watch::channel(Phase::Starting);
        let close = CancellationToken::new();
        let entry = Entry::new(receiver.clone(), close.clone());
        let number = table.insert(uid, entry);
        drop(table);
        let used = self.use_of(uid, number);
        let request = Request {
            uid: uid.clone(),
            job,
            number,
            phase,
            close,
        };
        if self.0.requests.try_send(request).is_err() {
            self.table().remove(uid, number);
            return Err(ErrorReason::Overloaded.status("too many links are requested at once"));
        }
        Ok(Some((used, receiver)))
    }
}
