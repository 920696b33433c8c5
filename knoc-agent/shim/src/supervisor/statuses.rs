//! The statuses of all containers for the pod's report.

use knoc_proto::pb;

use super::{
    super::{
        pod::Pod,
        report::{self, Situation, StatusContext},
        role::Role,
    },
    Supervisor,
    slot::Slot,
};

/// The statuses of containers, by their place in the report.
#[derive(Default)]
pub(super) struct Statuses {
    /// Those of init containers and sidecars.
    init: Vec<pb::ContainerStatus>,
    main: Vec<pb::ContainerStatus>,
    ephemeral: Vec<pb::ContainerStatus>,
}

impl Statuses {
    pub(super) fn put_into(self, report: &mut pb::Report) {
        report.init_containers = self.init;
        report.containers = self.main;
        report.ephemeral_containers = self.ephemeral;
    }
}

impl Supervisor {
    /// The statuses of all containers.
    pub(super) fn statuses(&self) -> Statuses {
        let view = self.view();
        let context = StatusContext {
            pod: self.pod.spec(),
            initialized: view.initialized(),
            stopping: self.stop.is_some(),
            starts_over: view.starts_over(),
            missing: (!view.values).then(|| self.missing()),
            now: view.now,
        };
        let mut all = Statuses::default();
        for slot in self.slots.iter() {
            let statuses = match slot.spec.role {
                Role::Init | Role::Sidecar => &mut all.init,
                Role::Main => &mut all.main,
                Role::Ephemeral => &mut all.ephemeral,
            };
            let missing = self.target_of(slot.spec.id).err();
            let situation = Situation {
                phase: slot.phase,
                health: slot.health,
                history: &slot.history,
                restart: slot.restart(),
                target_missing: missing.as_deref(),
                in_post_start: slot.in_post_start(),
            };
            let id = container_id(&self.pod, slot);
            statuses.push(report::status(&slot.spec, situation, &context, id));
        }
        all
    }
}

/// The id of the running attempt, or of the last one.
pub(super) fn container_id(pod: &Pod, slot: &Slot) -> String {
    let runtime = pod.runtime.name();
    let (job, name, attempt) = (&pod.claim.job_id, slot.spec.name(), slot.history.attempt);
    format!("{runtime}://{job}.{name}.{attempt}")
}
