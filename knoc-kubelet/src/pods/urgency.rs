//! PURE: how long a change of a pod's status may wait, so that one patch carries what changes within a few seconds.
//!
//! ```text
//!  at once   the phase, the pod's reason, Ready and the conditions like it, a container that starts, ends, turns
//!            ready or fails, the first id of a container with a postStart hook, a newer observedGeneration
//!  1–4 s     the first status of a pod
//!  1–8 s     the end of the last container of a pod that was published as Running, which the terminal phase follows
//!  3–20 s    the start of the job (hostIP, startTime, PodReadyToStartContainers) and ids of containers, which the
//!            start of a container follows
//!  10–60 s   messages alone: what Slurm says of the queue
//! ```
//!
//! The time runs from the first change that was not sent. A change that is sent at once takes along all that waited. The
//! more pods a node has, the longer they wait ([`Patience`]): otherwise what nobody waits for would delay what somebody
//! waits for.

use std::time::Duration;

use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, Pod, PodCondition, PodStatus};

/// How long changes may wait for which nobody waits. The figures grow with the number of pods on the node, so that all
/// of them together cause no more than ten patches about messages in a second, and a hundred about a pod's first status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Patience {
    /// The first status of a pod, which says only that the pod waits, and nobody doubts that.
    first: Duration,
    /// The end of the last container, which the terminal phase follows.
    ending: Duration,
    /// The start of the job, which the start of a container follows.
    details: Duration,
    /// A message. Slurm's reasons and estimates change often while a job is queued.
    pub(super) messages: Duration,
}

impl Patience {
    /// That of a node with this many pods.
    pub(super) fn with(pods: usize) -> Self {
        let pods = u64::try_from(pods).unwrap_or(u64::MAX);
        let seconds =
            |each: u64, least, most| Duration::from_secs((pods / each).clamp(least, most));
        Self {
            first: seconds(100, 1, 4),
            ending: seconds(50, 1, 8),
            details: seconds(20, 3, 20),
            messages: seconds(10, 10, 60),
        }
    }
}

/// Reasons of a waiting container that are no news.
const USUAL: [&str; 2] = ["ContainerCreating", "PodInitializing"];

/// Conditions for whose status somebody may wait.
const AWAITED: [&str; 6] = [
    "AllContainersRestarting",
    "ContainersReady",
    "DisruptionTarget",
    "Initialized",
    "PodScheduled",
    "Ready",
];

/// How long the change from the published status to `wanted`, which differ, may wait for further changes.
#[must_use]
pub(super) fn delay(pod: &Pod, wanted: &PodStatus, patience: Patience) -> Duration {
    let none = PodStatus::default();
    let have = pod.status.as_ref().unwrap_or(&none);
    let first = have.container_statuses.is_none();
    if awaited(have, wanted) || hook_begins(pod, have, wanted) {
        if !first && has_ended(pod, have, wanted) {
            patience.ending
        } else {
            Duration::ZERO
        }
    } else if first {
        patience.first
    } else if only_messages(have, wanted) {
        patience.messages
    } else {
        patience.details
    }
}

/// May somebody wait for what has changed?
fn awaited(have: &PodStatus, wanted: &PodStatus) -> bool {
    phase(have) != phase(wanted)
        || have.reason.as_deref().unwrap_or_default()
            != wanted.reason.as_deref().unwrap_or_default()
        || newer(have.observed_generation, wanted.observed_generation)
        || wanted.conditions.iter().flatten().any(|condition| {
            let mut before = have.conditions.iter().flatten();
            let before = before.find(|one| one.type_ == condition.type_);
            before.is_some_and(|before| condition_awaited(before, condition))
        })
        || containers_awaited(
            have.init_container_statuses.as_deref(),
            wanted.init_container_statuses.as_deref(),
        )
        || containers_awaited(
            have.container_statuses.as_deref(),
            wanted.container_statuses.as_deref(),
        )
        || containers_awaited(
            have.ephemeral_container_statuses.as_deref(),
            wanted.ephemeral_container_statuses.as_deref(),
        )
}

/// Has a container with a postStart hook an id for the first time? While the hook runs, only the id says that the pod may have
/// run, which decides whether it may run again.
fn hook_begins(pod: &Pod, have: &PodStatus, wanted: &PodStatus) -> bool {
    let all = pod.spec.iter().flat_map(|spec| {
        let init = spec.init_containers.iter().flatten();
        init.chain(&spec.containers)
    });
    let mut hooked = all.filter(|one| {
        let lifecycle = one.lifecycle.as_ref();
        lifecycle.is_some_and(|lifecycle| lifecycle.post_start.is_some())
    });
    phase(have) == "Pending"
        && hooked.any(|one| !has_id(have, &one.name) && has_id(wanted, &one.name))
}

/// Has the container of this name an id?
fn has_id(status: &PodStatus, container: &str) -> bool {
    let lists = [&status.init_container_statuses, &status.container_statuses];
    let mut all = lists.into_iter().flatten().flatten();
    all.any(|one| one.name == container && one.container_id.is_some())
}

/// The API server gives each new pod the phase Pending.
fn phase(status: &PodStatus) -> &str {
    status.phase.as_deref().unwrap_or("Pending")
}

/// Was a later generation seen than the published one?
fn newer(have: Option<i64>, wanted: Option<i64>) -> bool {
    have.is_some() && have != wanted
}

fn condition_awaited(before: &PodCondition, condition: &PodCondition) -> bool {
    AWAITED.contains(&condition.type_.as_str()) && before.status != condition.status
}

fn containers_awaited(
    have: Option<&[ContainerStatus]>,
    wanted: Option<&[ContainerStatus]>,
) -> bool {
    let mut wanted = wanted.unwrap_or_default().iter();
    wanted.any(|container| {
        let mut before = have.unwrap_or_default().iter();
        match before.find(|one| one.name == container.name) {
            Some(before) => container_awaited(before, container),
            None => container.state.as_ref().is_some_and(news),
        }
    })
}

fn container_awaited(before: &ContainerStatus, container: &ContainerStatus) -> bool {
    before.restart_count != container.restart_count
        || before.ready != container.ready
        || before.started.unwrap_or_default() != container.started.unwrap_or_default()
        || kind(before.last_state.as_ref()) != kind(container.last_state.as_ref())
        || kind(before.state.as_ref()) != kind(container.state.as_ref())
}

/// Is it more than that the container waits for its start?
fn news(state: &ContainerState) -> bool {
    kind(Some(state)) != Kind::Waits("")
}

/// What somebody may wait for in the state of a container.
#[derive(PartialEq, Eq)]
enum Kind<'a> {
    /// It waits, for a reason that is a failure; empty if it just waits for its start.
    Waits(&'a str),
    Runs,
    Ended(i32),
}

fn kind(state: Option<&ContainerState>) -> Kind<'_> {
    let Some(state) = state else {
        return Kind::Waits("");
    };
    if let Some(ended) = &state.terminated {
        return Kind::Ended(ended.exit_code);
    }
    if state.running.is_some() {
        return Kind::Runs;
    }
    let waiting = state.waiting.as_ref();
    let reason = waiting.and_then(|waiting| waiting.reason.as_deref());
    Kind::Waits(
        reason
            .filter(|reason| !USUAL.contains(reason))
            .unwrap_or_default(),
    )
}

/// Have all containers of a pod that stays Running ended, so that its terminal phase is to be expected? Containers that
/// are restarted are not meant, nor a pod that was never published as Running: whether it ran decides whether it may
/// run again.
fn has_ended(pod: &Pod, have: &PodStatus, wanted: &PodStatus) -> bool {
    let spec = pod.spec.as_ref();
    let policy = spec.and_then(|spec| spec.restart_policy.as_deref());
    let deleted = pod.metadata.deletion_timestamp.is_some();
    let stays = |code: i32| match policy {
        Some("Never") => true,
        Some("OnFailure") => code == 0 || deleted,
        _ => deleted,
    };
    let mut containers = wanted.container_statuses.iter().flatten();
    phase(have) == "Running"
        && phase(wanted) == "Running"
        && containers.all(|container| match kind(container.state.as_ref()) {
            Kind::Ended(code) => stays(code),
            Kind::Waits(_) | Kind::Runs => false,
        })
}

/// Are both the same but for messages of the pod and of its waiting containers?
fn only_messages(have: &PodStatus, wanted: &PodStatus) -> bool {
    let all_silent = |list: Option<&[ContainerStatus]>| {
        let list = list.unwrap_or_default().iter();
        list.map(|one| silent(one.clone())).collect::<Vec<_>>()
    };
    let conditions = wanted.conditions.iter().flatten().all(|condition| {
        let mut before = have.conditions.iter().flatten();
        before.any(|one| one.type_ == condition.type_ && one.status == condition.status)
    });
    conditions
        && have.host_ip == wanted.host_ip
        && have.start_time == wanted.start_time
        && all_silent(have.init_container_statuses.as_deref())
            == all_silent(wanted.init_container_statuses.as_deref())
        && all_silent(have.container_statuses.as_deref())
            == all_silent(wanted.container_statuses.as_deref())
        && all_silent(have.ephemeral_container_statuses.as_deref())
            == all_silent(wanted.ephemeral_container_statuses.as_deref())
}

/// The status without the message of a waiting container.
fn silent(mut container: ContainerStatus) -> ContainerStatus {
    let state = container.state.as_mut();
    if let Some(waiting) = state.and_then(|state| state.waiting.as_mut()) {
        waiting.message = None;
    }
    container
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(policy: &str, status: &Value) -> Pod {
        let spec = json!({"restartPolicy": policy, "containers": [{"name": "a"}]});
        serde_json::from_value(json!({"metadata": {}, "spec": spec, "status": status})).unwrap()
    }

    fn between(policy: &str, have: &Value, wanted: &Value) -> u64 {
        let wanted = serde_json::from_value(wanted.clone()).unwrap();
        delay(&pod(policy, have), &wanted, Patience::with(1)).as_secs()
    }

    fn status(phase: &str, state: &Value, more: &Value) -> Value {
        let runs = state.get("running").is_some();
        let ready = if runs { "True" } else { "False" };
        let mut status = json!({
            "phase": phase,
            "conditions": [{"type": "Ready", "status": ready}],
            "containerStatuses": [{"name": "a", "image": "i", "imageID": "", "restartCount": 0, "ready": runs, "state": state}],
        });
        for (field, value) in more.as_object().into_iter().flatten() {
            status[field] = value.clone();
        }
        status
    }

    fn waits(reason: &str, message: &str) -> Value {
        json!({"waiting": {"reason": reason, "message": message}})
    }

    fn ended(code: i32) -> Value {
        json!({"terminated": {"exitCode": code}})
    }

    #[test]
    fn what_somebody_waits_for_is_sent_at_once() {
        let none = json!({});
        let queued = status("Pending", &waits("ContainerCreating", "pending"), &none);
        let runs = status("Running", &json!({"running": {}}), &none);
        let over = status("Succeeded", &ended(0), &none);
        let fails = status("Pending", &waits("ErrImagePull", "no such image"), &none);
        assert_eq!(between("Never", &queued, &runs), 0);
        assert_eq!(between("Never", &runs, &over), 0);
        assert_eq!(between("Never", &queued, &over), 0);
        assert_eq!(between("Never", &queued, &fails), 0);
        assert_eq!(between("Never", &fails, &queued), 0, "the failure is over");
        assert_eq!(between("Never", &json!({"phase": "Pending"}), &fails), 0);
        let mut unready = runs.clone();
        unready["conditions"][0]["status"] = "False".into();
        assert_eq!(between("Always", &runs, &unready), 0);
        let mut restarted = runs.clone();
        restarted["containerStatuses"][0]["restartCount"] = 1.into();
        assert_eq!(between("Always", &runs, &restarted), 0);
        let [old, new] = [1, 2].map(|generation| {
            let more = json!({"observedGeneration": generation});
            status("Running", &json!({"running": {}}), &more)
        });
        assert_eq!(between("Always", &old, &new), 0, "a client waits for it");
    }

    #[test]
    fn what_nobody_waits_for_is_sent_with_what_follows() {
        let none = json!({});
        let queued = |message| status("Pending", &waits("ContainerCreating", message), &none);
        let new =
            json!({"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "True"}]});
        assert_eq!(between("Never", &new, &queued("")), 1);
        let more = json!({"message": "Slurm job 7 pending: Priority"});
        let says = status(
            "Pending",
            &waits("ContainerCreating", "pending: Priority"),
            &more,
        );
        assert_eq!(between("Never", &queued(""), &says), 10);
        let mut starts = queued("");
        starts["hostIP"] = "10.0.0.1".into();
        assert_eq!(between("Never", &queued("pending"), &starts), 3);
        let mut allocated = queued("");
        allocated["conditions"] = json!([{"type": "PodReadyToStartContainers", "status": "True"}]);
        assert_eq!(between("Never", &queued(""), &allocated), 3);
    }

    #[test]
    fn that_a_container_with_a_hook_has_begun_is_on_record_at_once() {
        let queued = status("Pending", &waits("ContainerCreating", ""), &json!({}));
        let mut begun = queued.clone();
        begun["containerStatuses"][0]["containerID"] = "apptainer://12.a.0".into();
        assert_eq!(between("Never", &queued, &begun), 3, "it has no hook");
        let seconds = |have: &Value, wanted: &Value| {
            let mut pod = pod("Never", have);
            let hook = json!({"exec": {"command": ["true"]}});
            let a = json!({"name": "a", "lifecycle": {"postStart": hook}});
            pod.spec = serde_json::from_value(json!({"containers": [a]})).unwrap();
            let wanted = serde_json::from_value(wanted.clone()).unwrap();
            delay(&pod, &wanted, Patience::with(1)).as_secs()
        };
        assert_eq!(seconds(&queued, &begun), 0);
        let mut host = queued.clone();
        host["hostIP"] = "10.0.0.1".into();
        assert_eq!(seconds(&queued, &host), 3);
        host = begun.clone();
        host["hostIP"] = "10.0.0.1".into();
        assert_eq!(seconds(&begun, &host), 3, "that it has begun is on record");
    }

    #[test]
    fn a_new_ephemeral_container_is_more_than_a_message() {
        let debugged = |message: &str| {
            let mut debug = json!({"name": "d", "image": "i", "imageID": "", "restartCount": 0, "ready": false});
            debug["state"] = waits("ContainerCreating", message);
            let more = json!({"ephemeralContainerStatuses": [debug]});
            status("Running", &json!({"running": {}}), &more)
        };
        let runs = status("Running", &json!({"running": {}}), &json!({}));
        assert_eq!(between("Never", &runs, &debugged("")), 3);
        assert_eq!(between("Never", &debugged(""), &debugged("pulling")), 10);
    }

    #[test]
    fn many_pods_have_more_patience_but_never_for_a_phase() {
        let seconds = |pods| {
            let patience = Patience::with(pods);
            let all = [
                patience.first,
                patience.ending,
                patience.details,
                patience.messages,
            ];
            all.map(|one| one.as_secs())
        };
        assert_eq!(seconds(0), [1, 1, 3, 10]);
        assert_eq!(seconds(100), [1, 2, 5, 10]);
        assert_eq!(seconds(400), [4, 8, 20, 40]);
        assert_eq!(seconds(10_000), [4, 8, 20, 60]);
        let runs = status("Running", &json!({"running": {}}), &json!({}));
        let over = status("Succeeded", &ended(0), &json!({}));
        let over = serde_json::from_value(over).unwrap();
        let delay = delay(&pod("Never", &runs), &over, Patience::with(10_000));
        assert_eq!(delay, Duration::ZERO);
    }

    #[test]
    fn the_end_of_the_last_container_waits_for_the_terminal_phase() {
        let none = json!({});
        let runs = status("Running", &json!({"running": {}}), &none);
        let over = |code| status("Running", &ended(code), &none);
        assert_eq!(between("Never", &runs, &over(1)), 1);
        assert_eq!(between("OnFailure", &runs, &over(0)), 1);
        assert_eq!(between("OnFailure", &runs, &over(1)), 0, "it is restarted");
        assert_eq!(between("Always", &runs, &over(0)), 0, "it is restarted");
        let queued = status("Pending", &waits("ContainerCreating", ""), &none);
        assert_eq!(
            between("Never", &queued, &over(0)),
            0,
            "that it ran is on record"
        );
    }
}
