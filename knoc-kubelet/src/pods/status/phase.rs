//! PURE: Kubernetes' phase function, in its exact order.

use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus};

use super::containers::Statuses;

/// The phase of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Pending,
    Running,
    Succeeded,
    Failed,
}

impl Phase {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Running => "Running",
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
        }
    }
}

#[derive(Default)]
struct Count {
    pending_init: usize,
    failed_init: usize,
    running: usize,
    waiting: usize,
    stopped: usize,
    succeeded: usize,
}

/// The phase that follows from the container statuses alone.
pub(super) fn of(restart_policy: &str, statuses: &Statuses) -> Phase {
    let mut count = Count::default();
    for status in &statuses.init {
        if statuses.is_sidecar(status) {
            count.sidecar(status);
        } else {
            count.init(status);
        }
    }
    for status in &statuses.regular {
        count.regular(status);
    }
    count.phase(restart_policy, statuses.regular.iter().any(was_initialized))
}

/// Has a regular container ever started?
fn was_initialized(status: &ContainerStatus) -> bool {
    let started = |state: &Option<ContainerState>| {
        state
            .as_ref()
            .is_some_and(|state| state.running.is_some() || state.terminated.is_some())
    };
    started(&status.state) || started(&status.last_state)
}

fn code(state: Option<&ContainerState>) -> Option<i32> {
    state?
        .terminated
        .as_ref()
        .map(|terminated| terminated.exit_code)
}

impl Count {
    fn init(&mut self, status: &ContainerStatus) {
        let state = status.state.as_ref();
        if let Some(code) = code(state) {
            if code != 0 {
                self.failed_init += 1;
            }
        } else if state.is_some_and(|state| state.running.is_some()) {
            self.pending_init += 1;
        } else {
            // One that failed is restarted, whatever the pod's policy: otherwise it would not wait.
            match code(status.last_state.as_ref()) {
                Some(0) => {}
                Some(_) | None => self.pending_init += 1,
            }
        }
    }

    /// A sidecar that has ended counts neither as stopped nor as failed.
    fn sidecar(&mut self, status: &ContainerStatus) {
        let state = status.state.as_ref();
        if state.is_some_and(|state| state.running.is_some()) {
            self.pending_init += usize::from(status.started != Some(true));
            self.running += 1;
        } else if code(state).is_none() && code(status.last_state.as_ref()).is_none() {
            self.pending_init += 1;
            self.waiting += 1;
        }
    }

    fn regular(&mut self, status: &ContainerStatus) {
        let state = status.state.as_ref();
        if state.is_some_and(|state| state.running.is_some()) {
            self.running += 1;
        } else if let Some(code) = code(state) {
            self.stopped += 1;
            self.succeeded += usize::from(code == 0);
        } else if code(status.last_state.as_ref()).is_some() {
            self.stopped += 1;
        } else {
            self.waiting += 1;
        }
    }

    fn phase(&self, restart_policy: &str, initialized: bool) -> Phase {
        if self.failed_init > 0 && restart_policy == "Never" {
            Phase::Failed
        } else if ((self.pending_init > 0 || self.failed_init > 0) && !initialized)
            || self.waiting > 0
        {
            Phase::Pending
        } else if self.running > 0 {
            Phase::Running
        } else if self.stopped > 0 {
            match restart_policy {
                "Always" => Phase::Running,
                _ if self.stopped == self.succeeded => Phase::Succeeded,
                "Never" => Phase::Failed,
                _ => Phase::Running,
            }
        } else {
            Phase::Pending
        }
    }
}
