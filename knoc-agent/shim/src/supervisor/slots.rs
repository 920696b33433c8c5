//! All containers of the pod, by their ids. Containers are never removed, and can be added while others run.

use std::{collections::BTreeMap, sync::Arc};

use knoc_proto::pb;

use super::{
    super::{
        directory::Directory,
        plan::{Backoff, Container},
        role::{ContainerSpec, RestartRule, Role, SlotId},
    },
    slot::Slot,
};

/// The containers of the pod.
#[derive(Debug)]
pub(super) struct Slots {
    by_id: BTreeMap<SlotId, Slot>,
    policy: pb::RestartPolicy,
    backoff: Backoff,
}

/// All containers of a pod, whatever their roles, have different names.
#[derive(Debug, thiserror::Error)]
#[error("the pod already has a container \"{name}\"")]
pub(crate) struct DuplicateName {
    name: String,
}

impl Slots {
    /// For a pod with this restart policy; `backoff` is the initial back-off of each container.
    pub(super) fn new(policy: pb::RestartPolicy, backoff: Backoff) -> Self {
        Self {
            by_id: BTreeMap::new(),
            policy,
            backoff,
        }
    }

    /// What the servers of exec, attach and logs see of the containers.
    pub(super) fn directory(&self) -> Arc<Directory> {
        let entries = self
            .iter()
            .map(|slot| (slot.spec.name().to_owned(), slot.entry()));
        Arc::new(Directory::new(entries))
    }

    /// Adds a container, at the pod's start or later: it starts when its role lets it. `before` is what an earlier run of
    /// the job reported about it.
    pub(super) fn add(
        &mut self,
        role: Role,
        container: pb::Container,
        image: pb::ResolvedImage,
        before: Option<&pb::ContainerStatus>,
    ) -> Result<SlotId, DuplicateName> {
        if self.iter().any(|slot| slot.spec.name() == container.name) {
            let name = container.name;
            return Err(DuplicateName { name });
        }
        let id = SlotId::after(self.by_id.len());
        let spec = ContainerSpec {
            id,
            role,
            restart: RestartRule::of(role, own_policy(&container).unwrap_or(self.policy)),
            container,
            image,
        };
        self.by_id.insert(id, Slot::new(spec, self.backoff, before));
        Ok(id)
    }

    pub(super) fn get_mut(&mut self, id: SlotId) -> Option<&mut Slot> {
        self.by_id.get_mut(&id)
    }

    /// All containers, in the order in which they were added.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.by_id.values()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Slot> {
        self.by_id.values_mut()
    }

    /// All containers but the ephemeral ones have ended, and begin anew.
    pub(super) fn start_over(&mut self) {
        let all = self.iter_mut();
        all.filter(|slot| slot.spec.role != Role::Ephemeral)
            .for_each(Slot::start_over);
    }

    pub(super) fn view(&self) -> Vec<Container> {
        self.iter().map(Slot::view).collect()
    }
}

/// The restart policy that the container itself has.
fn own_policy(container: &pb::Container) -> Option<pb::RestartPolicy> {
    Some(container.restart_policy()).filter(|own| *own != pb::RestartPolicy::Unspecified)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{
        super::super::plan::{self, Action, Health, Phase, Progress, View},
        *,
    };

    fn slots(policy: pb::RestartPolicy) -> Slots {
        Slots::new(policy, Backoff::new(Duration::ZERO, Duration::ZERO))
    }

    fn add(slots: &mut Slots, role: Role, name: &str) -> Result<SlotId, DuplicateName> {
        let container = pb::Container {
            name: name.to_owned(),
            ..Default::default()
        };
        slots.add(role, container, pb::ResolvedImage::default(), None)
    }

    fn view(slots: &Slots) -> View {
        View {
            containers: slots.view(),
            values: true,
            kill_at: None,
            last: None,
            now: Duration::ZERO,
        }
    }

    fn set(slots: &mut Slots, id: SlotId, phase: Phase) {
        let slot = slots.get_mut(id).unwrap();
        slot.phase = phase;
        slot.health = if phase == Phase::Running {
            Health::unprobed()
        } else {
            Health::down()
        };
    }

    #[test]
    fn a_container_that_is_added_while_the_pod_runs_has_a_slot_like_any_other() {
        let mut slots = slots(pb::RestartPolicy::Always);
        let init = add(&mut slots, Role::Init, "init").unwrap();
        let main = add(&mut slots, Role::Main, "main").unwrap();
        let done = Phase::Exited {
            code: 0,
            unhealthy: false,
            restart_at: Duration::ZERO,
        };
        set(&mut slots, init, done);
        set(&mut slots, main, Phase::Running);
        assert_eq!(plan::decide(&view(&slots)).actions, []);

        let debug = add(&mut slots, Role::Ephemeral, "debug").unwrap();
        assert_eq!(
            plan::decide(&view(&slots)).actions,
            [Action::Start(debug)],
            "the others stay as they are"
        );
        let names: Vec<_> = slots
            .iter()
            .map(|slot| slot.spec.name().to_owned())
            .collect();
        assert_eq!(names, ["init", "main", "debug"]);
        // It runs once, even if the pod's containers are restarted always.
        set(&mut slots, debug, done);
        let plan = plan::decide(&view(&slots));
        assert_eq!((plan.actions, plan.progress), (vec![], Progress::Running));
    }

    #[test]
    fn the_containers_own_policy_comes_before_the_pods() {
        let mut slots = slots(pb::RestartPolicy::Always);
        let container = pb::Container {
            name: "once".to_owned(),
            restart_policy: pb::RestartPolicy::Never.into(),
            ..Default::default()
        };
        let image = pb::ResolvedImage::default();
        let once = slots.add(Role::Main, container, image, None).unwrap();
        let failed = Phase::Exited {
            code: 1,
            unhealthy: false,
            restart_at: Duration::ZERO,
        };
        set(&mut slots, once, failed);
        let plan = plan::decide(&view(&slots));
        assert_eq!((plan.actions, plan.progress), (vec![], Progress::Finished));
    }

    #[test]
    fn no_two_containers_have_one_name() {
        let mut slots = slots(pb::RestartPolicy::Never);
        add(&mut slots, Role::Main, "main").unwrap();
        let error = add(&mut slots, Role::Ephemeral, "main").unwrap_err();
        assert_eq!(
            error.to_string(),
            "the pod already has a container \"main\""
        );
        assert_eq!(slots.iter().count(), 1);
    }
}
