//! The address of the pod's own: given when its shim asks for it, on disk before the shim is told, and taken back when nothing of the
//! pod runs any more.

use std::net::Ipv4Addr;

use knoc_proto::{mesh::PodRange, reason::ErrorReason};

use super::Actor;
use crate::pod::{
    input::{Reply, RequestError},
    state::Pod,
};

impl Actor {
    /// Answers the shim's question for the address.
    pub(super) async fn tell_address(&self, pod: Pod, reply: Reply<Ipv4Addr>) -> Pod {
        let (pod, given) = self.give_address(pod).await;
        // The link may have ended meanwhile.
        drop(reply.send(given));
        pod
    }

    /// The address of a pod whose job runs. One that has ended has none, although its record still names it: whoever has got its key
    /// would otherwise take the place of the pod that has the address next.
    async fn give_address(&self, mut pod: Pod) -> (Pod, Result<Ipv4Addr, RequestError>) {
        if let Some(address) = pod.address.filter(|_| !pod.is_over()) {
            return (pod, Ok(address));
        }
        let address = match self.free_address(&pod) {
            Ok(address) => address,
            Err(error) => return (pod, Err(error)),
        };
        pod.address = Some(address);
        if let Err(why) = self.persist(&pod).await {
            // The mesh keeps it for this pod until the next try.
            pod.address = None;
            let message = format!("the pod's record could not be written: {why}");
            return (pod, Err(RequestError::new(ErrorReason::Internal, message)));
        }
        (pod, Ok(address))
    }

    fn free_address(&self, pod: &Pod) -> Result<Ipv4Addr, RequestError> {
        let refused = |reason, message: String| Err(RequestError::new(reason, message));
        // The shim may be there before sbatch has answered.
        if pod.is_over() {
            let message = format!("pod {} has ended", self.uid);
            return refused(ErrorReason::NotRunning, message);
        }
        // The shape of a pod that was accepted is right.
        let Ok(range) = self.spec.pod_range.parse::<PodRange>() else {
            let message = format!("pod {} is to have no address of its own", self.uid);
            return refused(ErrorReason::InvalidRequest, message);
        };
        let given = self.site.mesh.give(&self.uid, range);
        given.or_else(|full| refused(ErrorReason::Overloaded, full.to_string()))
    }

    /// Takes up the address in the record of a pod that was restored.
    pub(super) fn take_up_address(&self, pod: &mut Pod) {
        let Some(address) = pod.address else { return };
        let range = self.spec.pod_range.parse().ok();
        let is_free = self.site.mesh.restore(&self.uid, address, range);
        if pod.is_over() {
            // If it was free, it rests from now on. Otherwise another pod has had it since.
            self.site.mesh.take_back(&self.uid);
        } else if !is_free {
            tracing::error!(uid = %self.uid, %address, "the records name the same address for two pods: this one gets another");
            pod.address = None;
        }
    }

    /// Takes the address back if nothing of the pod runs any more. Its record still names it.
    pub(super) fn take_address_back(&self, pod: &Pod) {
        if pod.is_over() {
            self.site.mesh.take_back(&self.uid);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use jiff::Timestamp;
    use knoc_proto::{
        ids::{JobId, PodUid},
        pod::PodSpec,
    };
    use tokio::sync::{mpsc, watch};

    use super::*;
    use crate::{
        app::fake::{Fake, spec},
        pod::{
            actor::NewActor,
            input::Wanted,
            placement::Placement,
            state::{Facts, JobStage, State},
        },
    };

    /// The actor of a pod with a job, whose node has this range.
    fn actor(fake: &Fake, name: &str, range: &str) -> (Actor, Pod) {
        let uid = PodUid::try_from(name).unwrap();
        let mut shape = spec(&uid);
        range.clone_into(&mut shape.pod_range);
        let (own, _) = mpsc::channel(1);
        let wants = watch::Sender::new(Wanted::default());
        let site = Arc::clone(&fake.site);
        let new = NewActor::new(site, uid, own.downgrade(), wants);
        let actor = new.of(PodSpec::try_from(shape).unwrap(), "c".to_owned());
        std::fs::create_dir_all(actor.dir.path()).unwrap();
        let mut pod = Pod::new(Facts::of_u(), Timestamp::UNIX_EPOCH);
        pod.state = State::WithJob {
            placement: Placement::own_job(JobId::try_from("1").unwrap()),
            stage: JobStage::Running,
        };
        (actor, pod)
    }

    #[tokio::test]
    async fn an_address_is_on_disk_before_anybody_is_told_and_stays_the_same() {
        let fake = Fake::new("").await;
        let (one, pod) = actor(&fake, "a", "10.200.0.0/30");
        let (pod, given) = one.give_address(pod).await;
        let address = given.unwrap();
        let written = std::fs::read_to_string(one.dir.record_path()).unwrap();
        assert!(written.contains(&address.to_string()), "{written}");
        let (pod, again) = one.give_address(pod).await;
        assert_eq!(again, Ok(address));
        // Of a range with two addresses, a third pod gets none.
        let (two, other) = actor(&fake, "b", "10.200.0.0/30");
        assert_ne!(two.give_address(other).await.1, Ok(address));
        let (three, third) = actor(&fake, "c", "10.200.0.0/30");
        let full = three.give_address(third.clone()).await.1.unwrap_err();
        assert_eq!(full.reason, ErrorReason::Overloaded);
        assert!(full.message.contains("10.200.0.0/30"), "{}", full.message);
        // While the job runs it is not taken back; then it rests.
        one.take_address_back(&pod);
        let mut ended = pod;
        ended.state = State::Forgotten;
        one.take_address_back(&ended);
        let rests = three.give_address(third).await.1.unwrap_err();
        assert!(
            rests.message.contains("1 were given back"),
            "{}",
            rests.message
        );
    }

    #[tokio::test]
    async fn a_pod_that_has_ended_or_has_no_range_gets_none() {
        let fake = Fake::new("").await;
        let (one, mut pod) = actor(&fake, "a", "");
        let none = one.give_address(pod.clone()).await.1.unwrap_err();
        assert_eq!(none.reason, ErrorReason::InvalidRequest);
        let (two, _) = actor(&fake, "b", "10.200.0.0/30");
        pod.state = State::Forgotten;
        let none = two.give_address(pod.clone()).await.1.unwrap_err();
        assert_eq!(none.reason, ErrorReason::NotRunning);
        // Not even the one that it had: another pod may have it by now.
        pod.address = Some(Ipv4Addr::new(10, 200, 0, 1));
        let none = two.give_address(pod).await.1.unwrap_err();
        assert_eq!(none.reason, ErrorReason::NotRunning);
    }

    #[tokio::test]
    async fn a_restored_address_is_nobody_elses() {
        let fake = Fake::new("").await;
        let address = Ipv4Addr::new(10, 200, 0, 1);
        let (one, mut pod) = actor(&fake, "a", "10.200.0.0/30");
        pod.address = Some(address);
        one.take_up_address(&mut pod);
        assert_eq!(pod.address, Some(address));
        let (two, mut other) = actor(&fake, "b", "10.200.0.0/30");
        other.address = Some(address);
        two.take_up_address(&mut other);
        assert_eq!(other.address, None);
        let given = two.give_address(other).await.1.unwrap();
        assert_eq!(given, Ipv4Addr::new(10, 200, 0, 2));
    }

    #[tokio::test]
    async fn a_pod_that_had_ended_before_the_restart_takes_no_address_from_another_one() {
        let fake = Fake::new("").await;
        let address = Ipv4Addr::new(10, 200, 0, 1);
        let (running, mut pod) = actor(&fake, "a", "10.200.0.0/30");
        pod.address = Some(address);
        let (ended, mut old) = actor(&fake, "b", "10.200.0.0/30");
        old.address = Some(address);
        old.state = State::Forgotten;
        running.take_up_address(&mut pod);
        ended.take_up_address(&mut old);
        assert_eq!(running.give_address(pod.clone()).await.1, Ok(address));
        assert_eq!(old.address, Some(address), "it had this one");
        // In the other order too.
        let fake = Fake::new("").await;
        let (running, _) = actor(&fake, "a", "10.200.0.0/30");
        let (ended, _) = actor(&fake, "b", "10.200.0.0/30");
        ended.take_up_address(&mut old);
        running.take_up_address(&mut pod);
        assert_eq!(running.give_address(pod).await.1, Ok(address));
    }
}
