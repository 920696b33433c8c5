//! The supervisor's part in another image for a container.

use knoc_proto::pb;

use super::{
    super::role::{Role, SlotId},
    Supervisor,
};

impl Supervisor {
    /// Gives a container another image, in the words and with the consequences of a kubelet: a container that runs is
    /// restarted whatever its restart policy says, and its back-off begins anew.
    pub(super) fn update_image(&mut self, image: pb::ResolvedImage) -> Result<(), String> {
        let known = {
            let mut all = self.slots.iter();
            let slot = all.find(|slot| {
                slot.spec.role != Role::Ephemeral && slot.spec.name() == image.container
            });
            slot.map(|slot| (slot.spec.id, slot.spec.container.image.clone()))
        };
        let Some((id, current)) = known else {
            return Err(format!(
                "the pod has no container {:?} whose image can change",
                image.container
            ));
        };
        if current == image.image {
            return Ok(());
        }
        if self.stop.is_some() {
            return Err(
                "the pod is being ended, and no container is restarted any more".to_owned(),
            );
        }
        self.give_image(id, image);
        Ok(())
    }

    fn give_image(&mut self, id: SlotId, image: pb::ResolvedImage) {
        let kill_at = self.now() + self.pod.spec().grace();
        let Some(slot) = self.slots.get_mut(id) else {
            return;
        };
        let name = slot.spec.name().to_owned();
        if slot.renew(image, kill_at) {
            self.publisher.add_note(pb::PodNote {
                reason: "Killing".to_owned(),
                message: format!("Container {name} definition changed, will be restarted"),
                container: name,
                ..pb::PodNote::default()
            });
        }
    }
}
