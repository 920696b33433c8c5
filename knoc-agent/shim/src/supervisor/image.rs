//! The supervisor's part in another image for a container, and in an image that the runtime could not mount.

use knoc_proto::pb;

use super::{
    super::{
        container::Unmounted,
        role::{Role, SlotId},
    },
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

    /// Reports that the runtime could not mount an image that the agent has converted because of its compression, so that the
    /// agent converts the next one otherwise. An Event says once that such images are unpacked.
    pub(super) fn image_unmounted(&mut self, unmounted: Unmounted) {
        let Unmounted {
            compression,
            at_fault,
            by_agent,
            unpacked,
        } = unmounted;
        if by_agent && at_fault {
            self.publisher.update(|report| {
                let all = &mut report.unmounted_compressions;
                if all.iter().all(|known| known != compression) {
                    all.push(compression.to_owned());
                }
            });
        }
        if unpacked && self.unpacked.insert(compression) {
            let message = if at_fault {
                format!(
                    "the container runtime of this node cannot mount images that are compressed with {compression}, so it unpacks \
                     them at each start of a container, which takes longer; the site's administrators can install the version of \
                     the login node on it, or set compression = \"gzip\" under [images] of the site file"
                )
            } else {
                format!(
                    "the container runtime of this node could not mount the image, which is compressed with {compression}, so it \
                     unpacks it at each start of a container, which takes longer; batch.out of the job says why"
                )
            };
            self.publisher.note("ImageUnpacked", message, "");
        }
    }
}
