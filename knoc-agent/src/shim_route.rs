//! How the shims of this site are reached, as it was found out and is remembered in
//! `STATE_DIR/shim-route.json`.
//!
//! [`decide`] decides, purely. Reports of shims, links and refused steps change what is known at
//! once; the task [`keep`] writes the changes to disk and tells the shims through `endpoint.json`.

mod decide;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use knoc_contract::jobdir::{
    self, JobDirError, StateDir,
    schema::{Endpoint, FoundRoute},
};
use knoc_proto::{error::chain, pb};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use self::decide::Route;
pub(crate) use self::decide::Way;

/// The pause after files could not be written.
const AGAIN: std::time::Duration = std::time::Duration::from_secs(30);

/// What is known about the way to this site's shims.
#[derive(Debug, Clone)]
pub struct ShimRoute(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    route: Mutex<Route>,
    changed: Notify,
    /// Whether the site file permits steps that enter jobs.
    steps: bool,
}

impl ShimRoute {
    /// Begins a new trial with what the agent before this one has found. `steps`: whether the site
    /// file permits steps that enter jobs. A file that cannot be read counts as missing.
    #[must_use]
    pub fn load(state: &StateDir, steps: bool, now: Timestamp) -> Self {
        let found = jobdir::read_json::<FoundRoute>(&state.shim_route());
        let found = found.unwrap_or_else(|error| {
            tracing::warn!(
                error = chain(&error),
                "how shims are reached is found out anew"
            );
            None
        });
        Self(Arc::new(Shared {
            route: Mutex::new(Route::begin(found.unwrap_or_default(), now)),
            changed: Notify::new(),
            steps,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Route> {
        let route = self.0.route.lock();
        route.unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what is known, and wakes the task if that differs from what is on disk.
    fn change(&self, change: impl FnOnce(&mut Route)) {
        let mut route = self.lock();
        let before = route.found.clone();
        change(&mut route);
        if route.found == before {
            return;
        }
        let (text, works) = route.describe(self.0.steps);
        drop(route);
        if works {
            tracing::info!("{text}");
        } else {
            tracing::warn!("{text}");
        }
        self.0.changed.notify_one();
    }

    /// A shim has dialled the agent and proved its key.
    pub(crate) fn linked(&self) {
        self.change(Route::linked);
    }

    /// A shim has reported its route.
    pub(crate) fn reported(&self, reported: &pb::ShimRoute) {
        self.change(|route| route.reported(reported, Timestamp::now()));
    }

    /// The scheduler has refused a step that was to enter a job.
    pub(crate) fn refused(&self, detail: &str) {
        self.change(|route| route.refused(detail, Timestamp::now()));
    }

    /// A step has entered a job.
    pub(crate) fn entered(&self) {
        self.change(Route::entered);
    }

    /// How to reach a shim that last reported `route` and has no link.
    pub(crate) fn way(&self, route: &pb::ShimRoute) -> Way {
        match self.lock().way(route) {
            Way::Step if !self.0.steps => Way::Wait,
            way => way,
        }
    }

    /// How shims are reached, in one sentence, and whether that works.
    pub(crate) fn describe(&self) -> (String, bool) {
        self.lock().describe(self.0.steps)
    }

    /// Whether compute nodes are known not to reach the agent.
    pub(crate) fn is_isolated(&self) -> bool {
        self.lock().found.isolated.is_some()
    }
}

/// Where shims find the agent.
#[derive(Debug, Clone)]
pub struct Told {
    /// The state directory.
    pub state: StateDir,
    /// The agent's addresses for shims.
    pub addresses: Vec<String>,
    /// The pin of the agent's key.
    pub spki: String,
}

impl Told {
    /// Writes `endpoint.json` and `shim-route.json`. Blocking.
    pub fn write(&self, route: &ShimRoute) -> Result<(), JobDirError> {
        let (found, endpoint) = {
            let route = route.lock();
            let endpoint = Endpoint {
                addresses: route.order(self.addresses.clone()),
                spki: self.spki.clone(),
                trial: route.found.trial,
                isolated: route.found.isolated.is_some(),
            };
            (route.found.clone(), endpoint)
        };
        jobdir::write_json(&self.state.shim_route(), &found)?;
        jobdir::write_json(&self.state.endpoint(), &endpoint)
    }
}

/// Task: keeps the files up to date, and begins a new trial daily. `may_write` fails if the files
/// belong to a newer agent.
pub async fn keep(
    route: ShimRoute,
    told: Told,
    may_write: impl Fn() -> bool + Clone + Send + 'static,
    stop: CancellationToken,
) {
    loop {
        let wake = route.lock().wake();
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = route.0.changed.notified() => {}
            () = until(wake) => route.change(|route| route.tick(Timestamp::now())),
        }
        let (told, known, may_write) = (told.clone(), route.clone(), may_write.clone());
        let written = tokio::task::spawn_blocking(move || match may_write() {
            true => told.write(&known).map_err(|error| chain(&error)),
            false => Ok(()),
        });
        let error = match written.await {
            Ok(Ok(())) => continue,
            Ok(Err(error)) => error,
            Err(error) => chain(&error),
        };
        tracing::warn!(error, "cannot write how shims are reached");
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = tokio::time::sleep(AGAIN) => route.0.changed.notify_one(),
        }
    }
}

async fn until(wake: Option<Timestamp>) {
    let Some(wake) = wake else {
        return std::future::pending().await;
    };
    let left = wake.duration_since(Timestamp::now());
    // The clock may be set in the meantime, so it is looked at every hour.
    let left = std::time::Duration::try_from(left).unwrap_or_default();
    tokio::time::sleep(left.min(std::time::Duration::from_hours(1))).await;
}
