//! PURE: the state of a pod as the API shows it.

use jiff::Timestamp;
use knoc_proto::{
    ids::JobId,
    pb::{self, container_status::State as Status},
};

use super::{
    outcome::Outcome,
    state::{BeforeJob, JobStage, Pod, State, nanos},
};

/// The exit code of a container if nobody knows how it ended, as in Kubernetes.
const EXIT_UNKNOWN: i32 = 137;

/// Everything the agent knows about the pod. The board sets `generation`.
#[must_use]
pub fn observed(pod: &Pod, spec: &pb::PodSpec, cluster_id: &str) -> pb::PodObserved {
    let (phase, reason, message) = phase(pod);
    let containers = |of_spec: &[pb::Container],
                      reported: fn(&pb::Report) -> &[pb::ContainerStatus]| {
        let reported = pod.report.as_ref().map_or(&[][..], reported);
        of_spec
            .iter()
            .map(|container| status(pod, container, reported, &message))
            .collect::<Vec<_>>()
    };
    let mut init = containers(&spec.init_containers, |report| &report.init_containers);
    let mut regular = containers(&spec.containers, |report| &report.containers);
    if let Some(outcome) = pod.outcome()
        && (pod.report.is_some() || was_started(pod))
    {
        let last = spec.init_containers.last();
        let last_is_sidecar = last.is_some_and(pb::Container::is_sidecar);
        let initialized = is_initialized(&init, last_is_sidecar) || regular.iter().any(was_begun);
        settle(
            &mut init,
            if initialized { &mut regular } else { &mut [] },
            outcome,
            pod.since,
        );
    }
    pb::PodObserved {
        uid: spec.uid.clone(),
        namespace: spec.namespace.clone(),
        name: spec.name.clone(),
        spec_generation: spec.generation.max(1),
        phase: phase.into(),
        since: nanos(pod.since),
        job: job(pod),
        init_containers: init,
        containers: regular,
        outcome: pod.outcome().map(encode),
        deleting: pod.deletion.is_some(),
        host_ip: pod
            .report
            .as_ref()
            .map_or_else(String::new, |report| report.host_ip.clone()),
        network: network(pod),
        notes: pod.notes.clone(),
        shim_connected: pod.link,
        values_wanted: pod
            .report
            .as_ref()
            .is_some_and(|report| report.waits_for_values),
        cluster_id: cluster_id.to_owned(),
        node_name: spec.node_name.clone(),
        reason,
        message,
        generation: 0,
        last_usage: pod.report.as_ref().and_then(|report| report.usage),
        // The actor knows, as well as the ephemeral containers that the shim does not have yet.
        images_are_fixed: false,
        ephemeral_containers: Vec::new(),
    }
}

/// The network as the shim reports it. That the pod has its address, the shim says; which one that is, the agent does.
fn network(pod: &Pod) -> Option<pb::PodNetwork> {
    let mut network = pod.report.as_ref()?.network.clone()?;
    let given = pod.address.map(|address| address.to_string());
    if given.as_deref() != Some(&*network.address) {
        network.address.clear();
    }
    Some(network)
}

fn encode(outcome: &Outcome) -> pb::Outcome {
    let kind = if outcome.succeeded {
        pb::OutcomeKind::Succeeded
    } else {
        pb::OutcomeKind::Failed
    };
    pb::Outcome {
        kind: kind.into(),
        reason: outcome.reason.clone(),
        message: outcome.message.clone(),
        disruption: outcome.disruption,
        finished_at: nanos(outcome.finished_at),
    }
}

/// The pod's phase, reason and message.
fn phase(pod: &Pod) -> (pb::PodPhase, String, String) {
    use pb::PodPhase as Phase;
    match &pod.state {
        State::BeforeJob(before) => phase_before_job(before),
        State::WithJob { placement, stage } => phase_with_job(pod, placement.job(), stage),
        State::Finished { outcome, .. } => {
            let (reason, message) = (outcome.reason.clone(), outcome.message.clone());
            (Phase::Finished, reason, message)
        }
        State::Forgotten => (Phase::Finished, String::new(), String::new()),
    }
}

fn phase_before_job(before: &BeforeJob) -> (pb::PodPhase, String, String) {
    use pb::PodPhase as Phase;
    let plain = |phase| (phase, String::new(), String::new());
    match before {
        BeforeJob::Accepted => plain(Phase::Accepted),
        BeforeJob::Staging { trouble: None, .. } => plain(Phase::Staging),
        BeforeJob::Staging {
            trouble: Some(trouble),
            ..
        } => {
            let failure = &trouble.failure;
            let (reason, message) = (failure.reason.clone(), failure.message.clone());
            (Phase::Staging, reason, message)
        }
        BeforeJob::Throttled {
            reason, message, ..
        } => (Phase::Throttled, reason.clone(), message.clone()),
        BeforeJob::Submitting { look: None } => plain(Phase::Submitting),
        BeforeJob::Submitting { look: Some(look) } => {
            let reason = "SubmissionUncertain".to_owned();
            (Phase::Submitting, reason, look.message.clone())
        }
    }
}

fn phase_with_job(pod: &Pod, job: &JobId, stage: &JobStage) -> (pb::PodPhase, String, String) {
    use pb::PodPhase as Phase;
    match stage {
        JobStage::Queued { .. } => {
            let view = pod.view.as_ref();
            let reason = view.map_or_else(String::new, |view| view.reason.clone());
            let why = if reason.is_empty() {
                String::new()
            } else {
                format!(": {reason}")
            };
            (Phase::Queued, reason, format!("job {job} waits{why}"))
        }
        JobStage::Running => running(pod),
        JobStage::Stopping { .. } => {
            let message = format!("job {job} is being ended");
            (Phase::Stopping, String::new(), message)
        }
        JobStage::Lost { .. } => {
            let message = format!("the scheduler does not know job {job}");
            (Phase::Lost, "SlurmJobLost".to_owned(), message)
        }
        JobStage::Settling { .. } => {
            let phase = if pod.deletion.is_some() {
                Phase::Stopping
            } else {
                Phase::Running
            };
            let message = format!("job {job} has ended; its report is awaited");
            (phase, String::new(), message)
        }
    }
}

fn running(pod: &Pod) -> (pb::PodPhase, String, String) {
    use crate::scheduler::JobState as Job;
    let state = pod.view.as_ref().map(|view| &view.state);
    let reason = match state {
        Some(Job::Suspended | Job::Stopped) => "SlurmJobSuspended",
        Some(Job::Pending | Job::Requeued | Job::RequeueHold | Job::Configuring) => {
            "SlurmJobRequeued"
        }
        _ => "",
    };
    let message = match (reason, state) {
        ("", _) | (_, None) => String::new(),
        (_, Some(state)) => format!("the job is {state}"),
    };
    (pb::PodPhase::Running, reason.to_owned(), message)
}

fn job(pod: &Pod) -> Option<pb::Job> {
    let (began, ended) = pod
        .sbatch
        .map_or((0, 0), |(began, ended)| (nanos(began), nanos(ended)));
    let id = pod
        .view
        .as_ref()
        .map(|view| view.id.clone())
        .or_else(|| pod.placement().map(|placement| placement.job().clone()));
    let known = pb::Job {
        sbatch_began: began,
        sbatch_ended: ended,
        ..pb::Job::default()
    };
    let started = pod
        .report
        .as_ref()
        .map_or(0, |report| report.started_at / 1_000_000_000);
    let Some(view) = &pod.view else {
        return id.map(|id| pb::Job {
            id: id.to_string(),
            submitted_at: pod.sbatch.map_or(0, |(_, ended)| ended.as_second()),
            started_at: started,
            ..known
        });
    };
    Some(pb::Job {
        id: view.id.to_string(),
        state: view.state.to_string(),
        reason: view.reason.clone(),
        nodes: view.nodes.clone(),
        partition: view.partition.clone(),
        submitted_at: view.submitted_at.unwrap_or(0),
        started_at: view.started_at.unwrap_or(started),
        ended_at: view.ended_at.unwrap_or(0),
        estimated_start: view.estimated_start.unwrap_or(0),
        restarts: view.restarts.try_into().unwrap_or(i32::MAX),
        ..known
    })
}

/// The container's status as the shim reports it; before the first report, as the state implies it.
fn status(
    pod: &Pod,
    container: &pb::Container,
    reported: &[pb::ContainerStatus],
    message: &str,
) -> pb::ContainerStatus {
    let known = reported.iter().find(|status| status.name == container.name);
    known.cloned().unwrap_or_else(|| pb::ContainerStatus {
        name: container.name.clone(),
        image: container.image.clone(),
        state: Some(Status::Waiting(waiting(pod, container, message))),
        ..pb::ContainerStatus::default()
    })
}

/// Whether the last init container has succeeded, or has started if it is a sidecar.
fn is_initialized(init: &[pb::ContainerStatus], last_is_sidecar: bool) -> bool {
    let done = |status: &pb::ContainerStatus| {
        let ended = match &status.state {
            Some(Status::Terminated(ended)) => Some(ended),
            Some(Status::Waiting(_) | Status::Running(_)) | None => {
                status.last_termination.as_ref()
            }
        };
        ended.is_some_and(|ended| ended.exit_code == 0)
    };
    init.last().is_none_or(|last| {
        if last_is_sidecar {
            was_begun(last)
        } else {
            done(last)
        }
    })
}

/// Whether an attempt of the container was ever begun.
fn was_begun(status: &pb::ContainerStatus) -> bool {
    let waits = matches!(status.state, Some(Status::Waiting(_)) | None);
    !waits || status.last_termination.is_some() || status.restart_count > 0
}

/// No container of a finished pod is shown as running. As in Kubernetes, containers that the pod
/// never reached still wait: the `regular` ones, of which there are none here if the pod was not
/// initialized, and the init containers after the one at which it ended.
fn settle(
    init: &mut [pb::ContainerStatus],
    regular: &mut [pb::ContainerStatus],
    outcome: &Outcome,
    since: Timestamp,
) {
    for status in regular {
        settle_one(status, outcome, since);
    }
    // If nothing is known, at least the first one was tried.
    let tried = init.iter().rposition(was_begun).map_or(1, |last| last + 1);
    for status in init.iter_mut().take(tried) {
        settle_one(status, outcome, since);
    }
}

fn was_started(pod: &Pod) -> bool {
    pod.view
        .as_ref()
        .is_some_and(|view| view.started_at.is_some())
}

fn waiting(pod: &Pod, container: &pb::Container, message: &str) -> pb::Waiting {
    let own = pod
        .trouble()
        .map(|trouble| &trouble.failure)
        .filter(|failure| failure.container == container.name);
    let own = own.map(|failure| (&failure.reason, &failure.message));
    let (reason, message) = own.map_or(("ContainerCreating", message), |(reason, message)| {
        (reason, message)
    });
    pb::Waiting {
        reason: reason.to_owned(),
        message: message.to_owned(),
    }
}

/// A container of a finished pod that was last seen running: nobody knows how it ended. One that waited for its next attempt
/// ended as its last one did.
pub(super) fn settle_one(status: &mut pb::ContainerStatus, outcome: &Outcome, since: Timestamp) {
    if matches!(status.state, Some(Status::Waiting(_)))
        && let Some(ended) = status.last_termination.take()
    {
        status.state = Some(Status::Terminated(ended));
        return;
    }
    let started_at = match &status.state {
        Some(Status::Terminated(_)) => return,
        Some(Status::Running(running)) => running.started_at,
        Some(Status::Waiting(_)) | None => 0,
    };
    if started_at == 0 && (outcome.succeeded || status.restart_count > 0) {
        return;
    }
    status.ready = false;
    status.started = false;
    let known = ["OOMKilled", "ContainerStatusUnknown"].contains(&outcome.reason.as_str());
    status.state = Some(Status::Terminated(pb::Terminated {
        exit_code: EXIT_UNKNOWN,
        reason: if known {
            outcome.reason.clone()
        } else {
            "ContainerStatusUnknown".to_owned()
        },
        message: outcome.message.clone(),
        started_at,
        finished_at: nanos(since),
        container_id: status.container_id.clone(),
        ..pb::Terminated::default()
    }));
}

#[cfg(test)]
mod tests;
