//! The supervisor's part in ephemeral containers: adds them, and looks for their targets.

use knoc_proto::{pb, pod::MAX_EPHEMERAL};

use super::{
    super::{
        role::{Role, SlotId},
        signals::Identity,
    },
    Supervisor,
    slot::Slot,
};

impl Supervisor {
    /// Adds an ephemeral container. One that was added before stays as it is.
    pub(super) fn add_ephemeral(
        &mut self,
        container: pb::Container,
        image: pb::ResolvedImage,
    ) -> Result<(), String> {
        if self
            .ephemeral()
            .any(|slot| slot.spec.name() == container.name)
        {
            return Ok(());
        }
        if self.stop.is_some() {
            return Err(
                "the pod is being ended, and no container is started in it any more".to_owned(),
            );
        }
        let count = self.ephemeral().count();
        if count >= MAX_EPHEMERAL {
            return Err(format!(
                "the pod has {count} ephemeral containers, which is the most: create the pod again"
            ));
        }
        let added = self.slots.add(Role::Ephemeral, container, image, None);
        added.map(drop).map_err(|error| error.to_string())
    }

    fn ephemeral(&self) -> impl Iterator<Item = &Slot> {
        let all = self.slots.iter();
        all.filter(|slot| slot.spec.role == Role::Ephemeral)
    }

    /// The program whose processes the container is to share, if it has a target. The error says that the target does not
    /// run, in the words of a kubelet.
    pub(super) fn target_of(&self, id: SlotId) -> Result<Option<Identity>, String> {
        let mut all = self.slots.iter();
        let target = all.find(|slot| slot.spec.id == id);
        let target = target.map_or("", |slot| &slot.spec.container.target);
        if target.is_empty() {
            return Ok(None);
        }
        let mut all = self.slots.iter();
        let slot = all.find(|slot| slot.spec.name() == target);
        let program = slot.and_then(|slot| slot.program.as_ref());
        // Its end may not have been told yet.
        let program = program.filter(|program| program.identity.runs());
        let program =
            program.ok_or_else(|| format!("unable to find target container {target:?}"))?;
        Ok(Some(program.identity))
    }
}
