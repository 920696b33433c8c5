//! PURE: the `PodStatus` fields that the kubelet owns, from the Pod and what the agent observed of it.
//!
//! A terminal phase comes only from a rejection or from the agent's `Finished`, and is never left again. While the link
//! is down the last observation stays and only `Ready` becomes False. Fields of other controllers (their conditions,
//! qosClass, resourceClaimStatuses and so on) are not in the result, so a merge leaves them alone.

mod conditions;
mod containers;
mod phase;

use std::net::Ipv4Addr;

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{ContainerStatus, HostIP, Pod, PodIP, PodStatus},
    apimachinery::pkg::apis::meta::v1::Time,
};
use knoc_proto::{
    pb::{self, OutcomeKind, PodPhase},
    text,
};
use knoc_translate::Lacking;

use crate::{node::PodIp, pods::resize};
use phase::Phase;

/// The longest message in bytes. Messages come from the agent, Slurm and registries.
const MESSAGE: usize = 8 << 10;
/// How much the messages with which containers have ended take in all, in bytes, as in Kubernetes.
const TERMINATION_MESSAGES: usize = 12 << 10;

/// What a status is computed from.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// The pod as the API server has it.
    pub pod: &'a Pod,
    /// The pod as the agent last reported it.
    pub observed: Option<&'a pb::PodObserved>,
    /// Why the agent does not have the pod yet.
    pub hold: Option<&'a Hold>,
    /// The ephemeral containers that the agent does not get yet, because their variables refer to what does not exist.
    pub lacking: &'a [Lacking],
    /// Why the pod will never run.
    pub rejection: Option<&'a Rejection>,
    /// The fields that its verdicts reject, as `path: why`. Those of an ephemeral container of a running pod reject that
    /// container only.
    pub refused: &'a [String],
    /// Whether the link has been down for longer than a restart of the agent takes.
    pub unreachable: bool,
    /// What pods have as their address.
    pub pod_ip: PodIp,
    /// The pod's generation if it was judged; if None, `observedGeneration` stays as the API server has it.
    pub judged: Option<i64>,
    /// The current time, for conditions that change.
    pub now: Timestamp,
}

/// Why a pod waits before the agent has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    /// The reason of the waiting containers, for example `CreateContainerConfigError`.
    pub reason: String,
    /// The message of the pod and of its waiting containers.
    pub message: String,
}

/// Why a pod will never run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// The reason, for example `UnsupportedPodSpec` or `OutOfcpu`.
    pub reason: String,
    /// Everything that is wrong, after Kubernetes' prefix.
    pub message: String,
}

/// The prefix that Kubernetes puts before each reason.
const REJECTED: &str = "Pod was rejected: ";

impl Rejection {
    /// A rejection whose message is Kubernetes' prefix and `why`.
    #[must_use]
    pub fn new(reason: &str, why: &str) -> Self {
        Self {
            reason: reason.to_owned(),
            message: format!("{REJECTED}{why}"),
        }
    }

    /// The message without the prefix.
    #[must_use]
    pub fn why(&self) -> &str {
        self.message.strip_prefix(REJECTED).unwrap_or(&self.message)
    }
}

/// Why the ephemeral container of this name is rejected, if one of these rejections is about it.
#[must_use]
pub fn refused(rejected: &[String], container: &str) -> Option<String> {
    let path = format!("spec.ephemeralContainers[{container}]");
    let about = rejected.iter().filter(|why| why.starts_with(&path));
    let all: Vec<&str> = about.map(String::as_str).collect();
    Some(all.join("; ")).filter(|all| !all.is_empty())
}

/// Is the pod's phase in the API server Succeeded or Failed?
#[must_use]
pub fn is_terminal(pod: &Pod) -> bool {
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// The fields of the status that the kubelet owns; None if the phase in the API server is terminal.
#[must_use]
pub fn status(input: &Input<'_>) -> Option<PodStatus> {
    if is_terminal(input.pod) {
        return None;
    }
    if let Some(rejection) = input.rejection {
        return Some(sanitized(rejected(input, rejection)));
    }
    let statuses = containers::statuses(input);
    let phase = overall_phase(input, &statuses);
    let (reason, message) = reason_and_message(input);
    let host_ip = input.observed.map(|observed| observed.host_ip.clone());
    let host_ip = host_ip.filter(|ip| !ip.is_empty());
    // The address stays while it is not known, for example after a restart.
    let host_ip = host_ip.or_else(|| input.pod.status.as_ref()?.host_ip.clone());
    let pod_ip = pod_ip(input, host_ip.as_deref());
    let resources = resize::shown_whole(input.pod);
    let mut status = sanitized(PodStatus {
        phase: Some(phase.as_str().to_owned()),
        reason,
        message,
        conditions: Some(conditions::conditions(input, phase, &statuses)),
        pod_ips: pod_ip.clone().map(|ip| vec![PodIP { ip }]),
        pod_ip,
        host_ips: host_ip.clone().map(|ip| vec![HostIP { ip }]),
        host_ip,
        start_time: start_time(input),
        observed_generation: observed_generation(input, published_generation(input)),
        init_container_statuses: Some(statuses.init).filter(|list| !list.is_empty()),
        container_statuses: Some(by_name(statuses.regular)),
        ephemeral_container_statuses: containers::ephemeral(input).map(by_name),
        allocated_resources: resources.as_ref().and_then(|own| own.requests.clone()),
        resources,
        ..PodStatus::default()
    });
    share_messages(&mut status);
    Some(status)
}

/// As in Kubernetes, init containers are in the order of the spec, and others in that of their names.
fn by_name(mut statuses: Vec<ContainerStatus>) -> Vec<ContainerStatus> {
    statuses.sort_by(|one, other| one.name.cmp(&other.name));
    statuses
}

/// The address of the pod, by the policy.
fn pod_ip(input: &Input<'_>, host_ip: Option<&str>) -> Option<String> {
    let network = || input.observed?.network.as_ref();
    match input.pod_ip {
        PodIp::None => None,
        PodIp::Node => host_ip.map(str::to_owned),
        PodIp::Own => match network() {
            Some(network) if network.mode() == pb::NetworkMode::Host => host_ip.map(str::to_owned),
            Some(network) if network.address.parse::<Ipv4Addr>().is_ok() => {
                Some(network.address.clone())
            }
            // It stays while it is not known, unless it was that of the node before the policy changed.
            Some(_) | None => {
                let known = input.pod.status.as_ref()?.pod_ip.clone();
                known.filter(|known| Some(known.as_str()) != host_ip)
            }
        },
    }
}

/// The status with its messages bounded and without control characters. The message of a terminated container comes
/// from the program itself and is left as it was written.
fn sanitized(mut status: PodStatus) -> PodStatus {
    let containers = status
        .init_container_statuses
        .iter_mut()
        .chain(&mut status.container_statuses)
        .chain(&mut status.ephemeral_container_statuses)
        .flatten();
    let waiting = containers
        .filter_map(|container| container.state.as_mut()?.waiting.as_mut())
        .map(|waiting| &mut waiting.message);
    let conditions = status.conditions.iter_mut().flatten();
    let conditions = conditions.map(|condition| &mut condition.message);
    for message in waiting
        .chain(conditions)
        .chain([&mut status.message])
        .flatten()
    {
        *message = text::message(message, MESSAGE);
    }
    status
}

/// Cuts the messages with which containers have ended. As in Kubernetes, each container of the pod has the same part of what
/// they may take, whether it has a message or not.
fn share_messages(status: &mut PodStatus) {
    let lists = [
        &mut status.init_container_statuses,
        &mut status.container_statuses,
        &mut status.ephemeral_container_statuses,
    ];
    let all: Vec<&mut ContainerStatus> = lists.into_iter().flatten().flatten().collect();
    let share = TERMINATION_MESSAGES / all.len().max(1);
    for one in all {
        let both = [&mut one.state, &mut one.last_state];
        let ended = both.into_iter().flatten();
        let ended = ended.filter_map(|state| state.terminated.as_mut());
        for message in ended.filter_map(|ended| ended.message.as_mut()) {
            let end = message.floor_char_boundary(share);
            message.truncate(end);
        }
    }
}

fn rejected(input: &Input<'_>, rejection: &Rejection) -> PodStatus {
    PodStatus {
        phase: Some(Phase::Failed.as_str().to_owned()),
        reason: Some(rejection.reason.clone()),
        message: Some(rejection.message.clone()),
        start_time: Some(seconds(input.now)),
        observed_generation: observed_generation(input, published_generation(input)),
        ..PodStatus::default()
    }
}

fn overall_phase(input: &Input<'_>, statuses: &containers::Statuses) -> Phase {
    let Some(observed) = input.observed else {
        return earlier(input.pod);
    };
    match observed.phase() {
        PodPhase::Unspecified
        | PodPhase::Accepted
        | PodPhase::Staging
        | PodPhase::Throttled
        | PodPhase::Submitting => Phase::Pending,
        // If the job was requeued, the pod has been running and stays Running.
        PodPhase::Queued | PodPhase::Lost => earlier(input.pod),
        PodPhase::Running | PodPhase::Stopping => {
            match phase::of(restart_policy(input.pod), statuses) {
                // The containers have ended, but the pod ends only when the agent reports it.
                Phase::Succeeded | Phase::Failed => Phase::Running,
                phase @ (Phase::Pending | Phase::Running) => later(earlier(input.pod), phase),
            }
        }
        PodPhase::Finished => {
            let kind = observed.outcome.as_ref().map(pb::Outcome::kind);
            match kind {
                Some(OutcomeKind::Succeeded) => Phase::Succeeded,
                Some(OutcomeKind::Failed | OutcomeKind::Unspecified) | None => Phase::Failed,
            }
        }
    }
}

/// The phase in the API server.
fn earlier(pod: &Pod) -> Phase {
    match pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref())
    {
        Some("Running") => Phase::Running,
        _ => Phase::Pending,
    }
}

/// A pod that was Running never becomes Pending again.
fn later(earlier: Phase, phase: Phase) -> Phase {
    if earlier == Phase::Running {
        Phase::Running
    } else {
        phase
    }
}

fn restart_policy(pod: &Pod) -> &str {
    let policy = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.restart_policy.as_deref());
    policy.unwrap_or("Always")
}

/// The pod's own reason and message.
fn reason_and_message(input: &Input<'_>) -> (Option<String>, Option<String>) {
    let some = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
    if let Some(hold) = input.hold.filter(|_| input.observed.is_none()) {
        return (None, some(&hold.message));
    }
    let Some(observed) = input.observed else {
        // Nothing is known (yet), for example after a restart: what was published stays.
        let published = input.pod.status.as_ref();
        return (None, published.and_then(|status| status.message.clone()));
    };
    match observed.phase() {
        PodPhase::Finished => {
            let Some(outcome) = &observed.outcome else {
                return (some("ContainerStatusUnknown"), some(&observed.message));
            };
            // The reason "Deleted" repeats what the deletion itself says.
            let reason = some(&outcome.reason).filter(|reason| reason != "Deleted");
            (reason, some(&outcome.message))
        }
        PodPhase::Unspecified
        | PodPhase::Accepted
        | PodPhase::Staging
        | PodPhase::Throttled
        | PodPhase::Submitting
        | PodPhase::Queued
        | PodPhase::Running
        | PodPhase::Stopping
        | PodPhase::Lost => (None, some(&waiting_message(observed))),
    }
}

/// Why the pod waits, for example `Slurm job 12 pending: Priority, estimated start 2026-11-22T10:00Z`.
fn waiting_message(observed: &pb::PodObserved) -> String {
    let default = pb::Job::default();
    let job = observed.job.as_ref().unwrap_or(&default);
    match observed.phase() {
        PodPhase::Queued => queue_message(job, &observed.message),
        PodPhase::Lost => join(
            &format!("Slurm job {} is not known to Slurm", job.id),
            &observed.message,
        ),
        PodPhase::Throttled => join(
            "submission is held back",
            &join(&observed.reason, &observed.message),
        ),
        PodPhase::Accepted | PodPhase::Staging | PodPhase::Submitting => observed.message.clone(),
        PodPhase::Running if job.state == "SUSPENDED" => {
            format!("Slurm job {} is suspended", job.id)
        }
        PodPhase::Unspecified | PodPhase::Running | PodPhase::Stopping | PodPhase::Finished => {
            String::new()
        }
    }
}

fn queue_message(job: &pb::Job, more: &str) -> String {
    let state = if job.state.is_empty() {
        "pending".to_owned()
    } else {
        job.state.to_lowercase()
    };
    let mut text = format!("Slurm job {} {state}", job.id);
    if !job.reason.is_empty() && job.reason != "None" {
        text = format!("{text}: {}", job.reason);
    }
    if let Ok(start) = Timestamp::from_second(job.estimated_start)
        && job.estimated_start > 0
    {
        text = format!(
            "{text}, estimated start {}",
            start.strftime("%Y-%m-%dT%H:%MZ")
        );
    }
    if more.is_empty() || more.contains(&job.reason) {
        text
    } else {
        join(&text, more)
    }
}

fn join(one: &str, other: &str) -> String {
    match (one.is_empty(), other.is_empty()) {
        (true, _) => other.to_owned(),
        (_, true) => one.to_owned(),
        (false, false) => format!("{one}: {other}"),
    }
}

/// The start of the allocation, so that time in Slurm's queue does not count towards `activeDeadlineSeconds`.
fn start_time(input: &Input<'_>) -> Option<Time> {
    let before = input
        .pod
        .status
        .as_ref()
        .and_then(|status| status.start_time.clone());
    let started = input
        .observed
        .and_then(|observed| observed.job.as_ref())
        .map(|job| job.started_at);
    let started = started
        .filter(|at| *at > 0)
        .and_then(|at| Timestamp::from_second(at).ok());
    before.or_else(|| started.map(Time))
}

/// The newest generation that was judged, else the published one. As in Kubernetes it means seen, not carried out: a
/// change that is not applied counts too.
fn observed_generation(input: &Input<'_>, before: Option<i64>) -> Option<i64> {
    input.judged.or(before)
}

fn published_generation(input: &Input<'_>) -> Option<i64> {
    input.pod.status.as_ref()?.observed_generation
}

/// The time in whole seconds, as Kubernetes keeps it.
fn seconds(at: Timestamp) -> Time {
    Time(Timestamp::from_second(at.as_second()).unwrap_or(at))
}

/// A time of the agent, in Unix nanoseconds; None if it is 0.
fn nanoseconds(at: i64) -> Option<Time> {
    let at = Timestamp::from_nanosecond(i128::from(at))
        .ok()
        .filter(|_| at > 0)?;
    Some(seconds(at))
}

#[cfg(test)]
mod tests;
