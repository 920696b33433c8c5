//! PURE: containerStatuses and initContainerStatuses. The first status already has every container of the spec.

use k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStateRunning, ContainerStateTerminated,
    ContainerStateWaiting, ContainerStatus, ContainerUser, EphemeralContainer, LinuxContainerUser,
    Pod, VolumeMount, VolumeMountStatus,
};
use knoc_proto::pb::{self, PodPhase, container_status::State};

use super::{Input, nanoseconds, refused, seconds, waiting_message};
use crate::pods::resize;

/// The statuses of a pod's containers, in the order of the spec.
pub(super) struct Statuses {
    pub(super) init: Vec<ContainerStatus>,
    pub(super) regular: Vec<ContainerStatus>,
    /// The names of the init containers that are sidecars.
    sidecars: Vec<String>,
}

impl Statuses {
    /// Whether it is the status of a sidecar: an init container that runs beside the others.
    pub(super) fn is_sidecar(&self, status: &ContainerStatus) -> bool {
        self.sidecars.contains(&status.name)
    }

    /// Whether what comes after this init container may start.
    pub(super) fn has_opened(&self, status: &ContainerStatus) -> bool {
        if self.is_sidecar(status) {
            status.started == Some(true)
        } else {
            ended_well(status)
        }
    }

    /// Whether a regular container was ever started.
    pub(super) fn any_regular_started(&self) -> bool {
        !self.regular.iter().all(never_ran)
    }
}

/// Whether an init container of the spec is a sidecar.
fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// Reasons of a pod that become reasons of its waiting containers.
const WAITING_REASONS: &[&str] = &[
    "CreateContainerConfigError",
    "CreateContainerError",
    "ErrImageNeverPull",
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
];

/// Exit code of a container whose end was not observed.
const UNKNOWN_EXIT_CODE: i32 = 137;

/// Exit code of a container that was never started, as container runtimes report it.
const NEVER_STARTED_EXIT_CODE: i32 = 128;

pub(super) fn statuses(input: &Input<'_>) -> Statuses {
    let spec = input.pod.spec.as_ref();
    let init = spec
        .and_then(|spec| spec.init_containers.as_deref())
        .unwrap_or_default();
    let regular = spec
        .map(|spec| spec.containers.as_slice())
        .unwrap_or_default();
    let before = input.pod.status.as_ref();
    let (init_before, regular_before) = (
        before.and_then(|status| status.init_container_statuses.as_deref()),
        before.and_then(|status| status.container_statuses.as_deref()),
    );
    let (init_seen, regular_seen) = input.observed.map_or_else(Default::default, |observed| {
        (
            observed.init_containers.as_slice(),
            observed.containers.as_slice(),
        )
    });
    let list = |containers: &[Container], before: Option<&[ContainerStatus]>, seen: &[_]| {
        let one = |container: &Container| {
            let before = before.and_then(|list| list.iter().find(|one| one.name == container.name));
            let seen = seen
                .iter()
                .find(|one: &&pb::ContainerStatus| one.name == container.name);
            status(input, container, before, seen)
        };
        containers.iter().map(one).collect()
    };
    let mut statuses = Statuses {
        init: list(init, init_before, init_seen),
        regular: list(regular, regular_before, regular_seen),
        sidecars: init
            .iter()
            .filter(|one| is_sidecar(one))
            .map(|one| one.name.clone())
            .collect(),
    };
    for (containers, statuses) in [(init, &mut statuses.init), (regular, &mut statuses.regular)] {
        for (container, status) in containers.iter().zip(statuses) {
            show_spec(input.pod, container, status);
        }
    }
    if input
        .observed
        .is_some_and(|observed| observed.phase() == PodPhase::Finished)
    {
        settle_all(input, &mut statuses);
    }
    if !init.is_empty() {
        let all = statuses.init.iter_mut().chain(&mut statuses.regular);
        all.for_each(initializing);
    }
    restrict_readiness(&mut statuses);
    statuses
}

/// Shows in the status what follows from the spec alone. A stop signal of the image is not known here.
fn show_spec(pod: &Pod, container: &Container, status: &mut ContainerStatus) {
    let resources = resize::shown(pod, container);
    status.allocated_resources.clone_from(&resources.requests);
    status.resources = Some(resources);
    status.volume_mounts = mounted(container.volume_mounts.as_deref());
    let lifecycle = container.lifecycle.as_ref();
    status.stop_signal = lifecycle.and_then(|lifecycle| lifecycle.stop_signal.clone());
}

/// The mounts of a container as its status shows them; None if it has none. No mount is read-only by a mode of its own.
fn mounted(mounts: Option<&[VolumeMount]>) -> Option<Vec<VolumeMountStatus>> {
    let status = |mount: &VolumeMount| {
        let read_only = mount.read_only.filter(|read_only| *read_only);
        VolumeMountStatus {
            name: mount.name.clone(),
            mount_path: mount.mount_path.clone(),
            read_only,
            recursive_read_only: read_only.map(|_| "Disabled".to_owned()),
            ..VolumeMountStatus::default()
        }
    };
    let mounts = mounts.filter(|mounts| !mounts.is_empty())?;
    Some(mounts.iter().map(status).collect())
}

/// A container is ready only while it runs, but an init container that is no sidecar is ready once it has ended well.
fn restrict_readiness(statuses: &mut Statuses) {
    for status in &mut statuses.init {
        if statuses.sidecars.contains(&status.name) {
            status.ready &= is_running(status);
        } else {
            status.ready = ended_well(status);
        }
    }
    for status in &mut statuses.regular {
        status.ready &= is_running(status);
    }
}

/// As in Kubernetes, a pod with init containers is initializing until each of its containers has been started once.
fn initializing(status: &mut ContainerStatus) {
    let never_started = status.restart_count == 0 && status.last_state.is_none();
    let waiting = status
        .state
        .as_mut()
        .and_then(|state| state.waiting.as_mut());
    if let Some(waiting) = waiting.filter(|_| never_started)
        && matches!(waiting.reason.as_deref(), None | Some("ContainerCreating"))
    {
        waiting.reason = Some("PodInitializing".to_owned());
    }
}

/// The statuses of the ephemeral containers; None if there are none.
pub(super) fn ephemeral(input: &Input<'_>) -> Option<Vec<ContainerStatus>> {
    let containers = input.pod.spec.as_ref()?.ephemeral_containers.as_deref()?;
    let status = |container: &EphemeralContainer| ContainerStatus {
        volume_mounts: mounted(container.volume_mounts.as_deref()),
        ..ephemeral_status(input, container)
    };
    Some(containers.iter().map(status).collect::<Vec<_>>()).filter(|list| !list.is_empty())
}

fn ephemeral_status(input: &Input<'_>, ephemeral: &EphemeralContainer) -> ContainerStatus {
    let container = Container {
        name: ephemeral.name.clone(),
        image: ephemeral.image.clone(),
        ..Container::default()
    };
    let before = input
        .pod
        .status
        .iter()
        .flat_map(|status| status.ephemeral_container_statuses.iter().flatten())
        .find(|one| one.name == ephemeral.name);
    let mut seen = input
        .observed
        .into_iter()
        .flat_map(|observed| &observed.ephemeral_containers);
    let seen = seen.find(|one| one.name == ephemeral.name);
    if let Some(why) = refused(input.refused, &ephemeral.name)
        && seen.is_none()
    {
        return never_started(&container, why);
    }
    let mut status = status(input, &container, before, seen);
    // Nobody waits for it to be ready.
    status.ready = false;
    let waiting = status
        .state
        .as_mut()
        .and_then(|state| state.waiting.as_mut());
    let Some(waiting) = waiting.filter(|_| seen.is_none()) else {
        return status;
    };
    let mut lacking = input.lacking.iter();
    if let Some(lacking) = lacking.find(|one| one.container == ephemeral.name) {
        // The pod runs, and only the container is held up.
        waiting.reason = Some("CreateContainerConfigError".to_owned());
        waiting.message = text(&lacking.messages.join("; "));
    } else if let Some(hold) = input.hold {
        waiting.reason = text(&hold.reason).or_else(|| waiting.reason.take());
        waiting.message = text(&hold.message);
    }
    status
}

/// Reported as terminated, so that a client that waits for it (kubectl debug) stops waiting and shows the reason.
fn never_started(container: &Container, why: String) -> ContainerStatus {
    ContainerStatus {
        name: container.name.clone(),
        image: container.image.clone().unwrap_or_default(),
        started: Some(false),
        state: Some(ContainerState {
            terminated: Some(ContainerStateTerminated {
                exit_code: NEVER_STARTED_EXIT_CODE,
                reason: Some("ContainerCannotRun".to_owned()),
                message: Some(why),
                ..ContainerStateTerminated::default()
            }),
            ..ContainerState::default()
        }),
        ..ContainerStatus::default()
    }
}

fn is_running(status: &ContainerStatus) -> bool {
    let state = status.state.as_ref();
    state.is_some_and(|state| state.running.is_some())
}

fn ended_well(status: &ContainerStatus) -> bool {
    let terminated = status
        .state
        .as_ref()
        .and_then(|state| state.terminated.as_ref());
    terminated.is_some_and(|terminated| terminated.exit_code == 0)
}

fn status(
    input: &Input<'_>,
    container: &Container,
    before: Option<&ContainerStatus>,
    seen: Option<&pb::ContainerStatus>,
) -> ContainerStatus {
    let starting = seen.and_then(|seen| before_hook(input, seen));
    let seen = starting.as_ref().or(seen);
    match (seen, before) {
        (Some(seen), Some(before)) if progress(seen) < published(before, seen) => before.clone(),
        (Some(seen), before) => of(container, seen, before),
        // Nothing new is known, so the published status stays.
        (None, Some(before)) if started(before) || nothing_known(input) => before.clone(),
        // Its id says that it may have run.
        (None, before) => ContainerStatus {
            container_id: before.and_then(|before| before.container_id.clone()),
            ..waiting(input, container)
        },
    }
}

/// As in Kubernetes, a container whose postStart hook runs is shown as it was before its program ran; None for any other. If
/// the pod has ended, it is known to have run.
fn before_hook(input: &Input<'_>, seen: &pb::ContainerStatus) -> Option<pb::ContainerStatus> {
    let over = input.observed?.phase() == PodPhase::Finished;
    (seen.in_post_start && !over).then(|| pb::ContainerStatus {
        state: Some(State::Waiting(pb::Waiting {
            reason: "ContainerCreating".to_owned(),
            message: String::new(),
        })),
        // A restart counts once it is shown.
        restart_count: seen.restart_count.saturating_sub(1).max(0),
        user: Vec::new(),
        ..seen.clone()
    })
}

/// How far an attempt of a container has come. It never goes back: an agent that was restarted may have an older report on disk than the
/// one that came over the link before.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Progress {
    Unknown,
    Runs,
    /// It has ended, and nobody knows how.
    Lost,
    Ended,
}

impl Progress {
    /// That of an attempt which has ended for this reason.
    fn ended(reason: &str) -> Self {
        if reason == "ContainerStatusUnknown" {
            Self::Lost
        } else {
            Self::Ended
        }
    }
}

/// The attempt as the agent reports it.
fn progress(seen: &pb::ContainerStatus) -> Progress {
    let last = seen.last_termination.as_ref();
    let ended = match &seen.state {
        Some(State::Running(_)) => return Progress::Runs,
        Some(State::Terminated(ended)) => Some(ended),
        Some(State::Waiting(_)) | None => {
            last.filter(|last| last.container_id == seen.container_id)
        }
    };
    ended.map_or(Progress::Unknown, |ended| Progress::ended(&ended.reason))
}

/// The same attempt as it was published.
fn published(before: &ContainerStatus, seen: &pb::ContainerStatus) -> Progress {
    let id = seen.container_id.as_str();
    if id.is_empty() || before.container_id.as_deref() != Some(id) {
        return Progress::Unknown;
    }
    let (state, last) = (before.state.as_ref(), before.last_state.as_ref());
    if state.is_some_and(|state| state.running.is_some()) {
        return Progress::Runs;
    }
    let last = last.and_then(|last| last.terminated.as_ref());
    let last = last.filter(|last| last.container_id.as_deref() == Some(id));
    let ended = state.and_then(|state| state.terminated.as_ref()).or(last);
    match (ended, &seen.state) {
        // A job that runs again may give the same id.
        (Some(ended), Some(State::Running(running)))
            if ended.started_at != nanoseconds(running.started_at) =>
        {
            Progress::Unknown
        }
        (Some(ended), _) => Progress::ended(ended.reason.as_deref().unwrap_or_default()),
        (None, _) => Progress::Unknown,
    }
}

/// Is neither known what the agent has of the pod nor why the agent does not have it, as after a restart?
fn nothing_known(input: &Input<'_>) -> bool {
    input.observed.is_none() && input.hold.is_none()
}

fn started(status: &ContainerStatus) -> bool {
    status
        .state
        .as_ref()
        .is_some_and(|state| state.waiting.is_none())
        || status
            .last_state
            .as_ref()
            .is_some_and(|state| state.terminated.is_some())
}

fn of(
    container: &Container,
    seen: &pb::ContainerStatus,
    before: Option<&ContainerStatus>,
) -> ContainerStatus {
    let state = match &seen.state {
        Some(State::Waiting(waiting)) => ContainerState {
            waiting: Some(ContainerStateWaiting {
                reason: text(&waiting.reason),
                message: text(&waiting.message),
            }),
            ..ContainerState::default()
        },
        Some(State::Running(running)) => ContainerState {
            running: Some(ContainerStateRunning {
                started_at: nanoseconds(running.started_at),
            }),
            ..ContainerState::default()
        },
        Some(State::Terminated(terminated)) => terminated_state(terminated),
        None => ContainerState {
            waiting: Some(ContainerStateWaiting::default()),
            ..ContainerState::default()
        },
    };
    let running = state.running.is_some();
    let restarts = before.map_or(0, |before| before.restart_count);
    ContainerStatus {
        name: container.name.clone(),
        ready: seen.ready,
        started: Some(seen.started && running),
        restart_count: seen.restart_count.max(restarts),
        image: text(&seen.image)
            .or_else(|| container.image.clone())
            .unwrap_or_default(),
        image_id: seen.image_id.clone(),
        container_id: text(&seen.container_id),
        last_state: seen.last_termination.as_ref().map(terminated_state),
        state: Some(state),
        // The one before stays until the next program is shown.
        user: user(&seen.user).or_else(|| before.and_then(|before| before.user.clone())),
        ..ContainerStatus::default()
    }
}

/// The user, the group and the groups of a program; None if they are not known, or the API server would reject them.
fn user(ids: &[u32]) -> Option<ContainerUser> {
    let [uid, groups @ ..] = ids else {
        return None;
    };
    let valid = |id: &u32| i32::try_from(*id).ok().map(i64::from);
    let linux = LinuxContainerUser {
        uid: valid(uid)?,
        gid: groups.first().and_then(valid)?,
        supplemental_groups: Some(groups.iter().filter_map(valid).collect()),
    };
    Some(ContainerUser { linux: Some(linux) })
}

fn terminated_state(terminated: &pb::Terminated) -> ContainerState {
    ContainerState {
        terminated: Some(ContainerStateTerminated {
            exit_code: terminated.exit_code,
            signal: Some(terminated.signal).filter(|signal| *signal != 0),
            reason: text(&terminated.reason),
            message: text(&terminated.message),
            started_at: nanoseconds(terminated.started_at),
            finished_at: nanoseconds(terminated.finished_at),
            container_id: text(&terminated.container_id),
        }),
        ..ContainerState::default()
    }
}

fn waiting(input: &Input<'_>, container: &Container) -> ContainerStatus {
    let (reason, message) = waiting_reason(input);
    ContainerStatus {
        name: container.name.clone(),
        ready: false,
        started: Some(false),
        image: container.image.clone().unwrap_or_default(),
        state: Some(ContainerState {
            waiting: Some(ContainerStateWaiting {
                reason: text(&reason),
                message: text(&message),
            }),
            ..ContainerState::default()
        }),
        ..ContainerStatus::default()
    }
}

fn waiting_reason(input: &Input<'_>) -> (String, String) {
    let usual = "ContainerCreating";
    match (input.observed, input.hold) {
        (Some(observed), _) if WAITING_REASONS.contains(&observed.reason.as_str()) => {
            (observed.reason.clone(), observed.message.clone())
        }
        (Some(observed), _) => (usual.to_owned(), waiting_message(observed)),
        (None, Some(hold)) => {
            let known = WAITING_REASONS.contains(&hold.reason.as_str());
            (
                if known {
                    hold.reason.clone()
                } else {
                    usual.to_owned()
                },
                hold.message.clone(),
            )
        }
        (None, None) => (usual.to_owned(), String::new()),
    }
}

/// Settles the containers that may have been started. As in Kubernetes, the regular containers of a pod that was never
/// initialized stay waiting, and so do the init containers after the one in which the pod ended.
fn settle_all(input: &Input<'_>, statuses: &mut Statuses) {
    if initialized(statuses) {
        let regular = statuses.regular.iter_mut();
        regular.for_each(|status| settle(input, status));
    }
    let begun = statuses.init.iter().rposition(|status| !never_ran(status));
    // If nothing is known, at least the first one was tried.
    let begun = begun.map_or(1, |last| last + 1).min(statuses.init.len());
    for status in &mut statuses.init[..begun] {
        settle(input, status);
    }
}

/// Was a regular container ever started, or did the last init container ever succeed, or start if it is a sidecar?
fn initialized(statuses: &Statuses) -> bool {
    let ended_well_before = |status: &ContainerStatus| {
        let last = status.last_state.as_ref();
        last.and_then(|state| state.terminated.as_ref())
            .is_some_and(|terminated| terminated.exit_code == 0)
    };
    let last = statuses.init.last();
    let opened = |last: &ContainerStatus| {
        if statuses.is_sidecar(last) {
            !never_ran(last)
        } else {
            ended_well(last) || ended_well_before(last)
        }
    };
    last.is_none_or(opened) || statuses.any_regular_started()
}

fn never_ran(status: &ContainerStatus) -> bool {
    !started(status)
}

/// The pod has ended, so no container runs. One that was last seen running ended unobserved; one that waited for its next
/// attempt ended as its last one did; one that never started stays waiting, unless its state is unknown.
fn settle(input: &Input<'_>, status: &mut ContainerStatus) {
    status.started = Some(false);
    let outcome = input
        .observed
        .and_then(|observed| observed.outcome.as_ref());
    let reason = outcome.map_or("ContainerStatusUnknown", |outcome| outcome.reason.as_str());
    let state = status.state.get_or_insert_default();
    if state.waiting.is_some()
        && let Some(ended) = status.last_state.take_if(|last| last.terminated.is_some())
    {
        *state = ended;
        return;
    }
    let unknown = state.waiting.is_some() && reason == "ContainerStatusUnknown";
    if state.running.is_none() && !unknown {
        return;
    }
    let started_at = state.running.take().and_then(|running| running.started_at);
    let oom = reason == "OOMKilled";
    *state = ContainerState {
        terminated: Some(ContainerStateTerminated {
            exit_code: UNKNOWN_EXIT_CODE,
            reason: Some(
                if oom {
                    "OOMKilled"
                } else {
                    "ContainerStatusUnknown"
                }
                .to_owned(),
            ),
            message: Some(
                "The container could not be located when the pod was terminated".to_owned(),
            ),
            started_at,
            finished_at: outcome
                .and_then(|outcome| nanoseconds(outcome.finished_at))
                .or_else(|| Some(seconds(input.now))),
            container_id: status.container_id.clone(),
            ..ContainerStateTerminated::default()
        }),
        ..ContainerState::default()
    };
}

fn text(text: &str) -> Option<String> {
    Some(text.to_owned()).filter(|text| !text.is_empty())
}
