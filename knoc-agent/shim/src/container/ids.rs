//! As which user and group a program sees itself: whether the node can do it, and what is said if it cannot.
//!
//! Such a program is in a user namespace below that of its container, in which the HPC user has the wanted number
//! ([`launch::ids`](crate::launch::ids)).

use std::sync::Arc;

use jiff::Timestamp;
use knoc_proto::pb;

use super::{
    super::{environment, pod::Pod},
    Attempt, Event, News, Program, Told,
};

/// What becomes of `runAsUser` and `runAsGroup` on a node that gives a program no user namespace of its own.
const OWN_IDS: &str = "the container runs as the HPC user of the agent: this compute node gives it no user namespace of its own, \
     in which it could be the user and the group that the pod asks for";

/// The ids that the program is to see itself as. That needs user namespaces.
pub(super) fn wanted(
    pod: &Pod,
    container: &pb::Container,
    image: &pb::ImageConfig,
    named: (Option<&[u8]>, Option<u32>),
) -> [Option<u32>; 2] {
    let nests = pod.runtime.isolates() && !pod.mounting.by_name() && !container.fakeroot;
    if nests && !pod.keeps_ids() {
        environment::ids(container, image, named)
    } else {
        [None; 2]
    }
}

/// Says that the program runs; and that it has the ids of this user, if the pod asks for others and the kubelet has not said it
/// already.
pub(super) async fn tell_running(pod: &Pod, attempt: &Attempt, program: Program) -> Arc<Program> {
    let program = Arc::new(program);
    let container = &attempt.spec.container;
    let asks = container.run_as_user.is_some() || container.run_as_group.is_some();
    let running = running(attempt, Arc::clone(&program));
    // The supervisor outlives its attempts.
    attempt.events.send(running).await.ok();
    if program.shown || !asks || pod.keeps_ids() {
        return program;
    }
    tell_mapped(attempt, OWN_IDS.to_owned()).await;
    program
}

/// Says which volumes of the image cannot be mounted.
pub(super) async fn tell_left_out(attempt: &Attempt, volumes: &[String]) {
    if !volumes.is_empty() {
        let places = volumes.join(", ");
        let message = format!(
            "nothing can be mounted at {places}, which the image declares as a volume: left out"
        );
        tell_mapped(attempt, message).await;
    }
}

/// Says what is another than the pod or its image asks for. Its Event counts the attempts.
async fn tell_mapped(attempt: &Attempt, message: String) {
    let told = Told {
        warning: false,
        reason: "Mapped",
        message,
        count: i32::try_from(attempt.number.saturating_add(1)).unwrap_or(i32::MAX),
    };
    let event = Event {
        id: attempt.spec.id,
        attempt: attempt.number,
        news: News::Told(told),
    };
    attempt.events.send(event).await.ok();
}

pub(super) fn running(attempt: &Attempt, program: Arc<Program>) -> Event {
    let news = News::Running {
        program,
        started_at: Timestamp::now(),
    };
    Event {
        id: attempt.spec.id,
        attempt: attempt.number,
        news,
    }
}
