//! PURE: formats the agent's messages as JSON and as text.
//!
//! The JSON is a stable interface for programs: names are those of `agent.proto` in camelCase, times are RFC 3339, and
//! unknown values are left out.

use jiff::Timestamp;
use knoc_proto::pb::{self, OutcomeKind, PodPhase, container_status::State};
use serde_json::{Map, Value, json};

/// The phase in one word.
#[must_use]
pub(crate) fn phase(pod: &pb::PodObserved) -> &'static str {
    match pod.phase() {
        PodPhase::Unspecified => "Unknown",
        PodPhase::Accepted => "Accepted",
        PodPhase::Staging => "Staging",
        PodPhase::Throttled => "Throttled",
        PodPhase::Submitting => "Submitting",
        PodPhase::Queued => "Queued",
        PodPhase::Running => "Running",
        PodPhase::Stopping => "Stopping",
        PodPhase::Lost => "Lost",
        PodPhase::Finished => outcome(pod).unwrap_or("Finished"),
    }
}

/// `Succeeded` or `Failed`, or `None` if the outcome is not decided yet.
#[must_use]
pub(crate) fn outcome(pod: &pb::PodObserved) -> Option<&'static str> {
    match pod.outcome.as_ref()?.kind() {
        OutcomeKind::Succeeded => Some("Succeeded"),
        OutcomeKind::Failed => Some("Failed"),
        OutcomeKind::Unspecified => None,
    }
}

/// A time from Unix nanoseconds; `None` for 0.
#[must_use]
pub(crate) fn nanos(at: i64) -> Option<Timestamp> {
    (at > 0)
        .then(|| Timestamp::from_nanosecond(i128::from(at)).ok())
        .flatten()
}

/// A time from Unix seconds; `None` for 0.
#[must_use]
pub(crate) fn seconds(at: i64) -> Option<Timestamp> {
    (at > 0).then(|| Timestamp::from_second(at).ok()).flatten()
}

/// How many of the containers are ready, such as `1/2`.
#[must_use]
pub(crate) fn ready(pod: &pb::PodObserved) -> String {
    let ready = pod
        .containers
        .iter()
        .filter(|container| container.ready)
        .count();
    format!("{ready}/{}", pod.containers.len())
}

/// A container's state: its name, and its details.
#[must_use]
pub(crate) fn state(container: &pb::ContainerStatus) -> (&'static str, String) {
    match &container.state {
        Some(State::Waiting(waiting)) => ("Waiting", joined(&waiting.reason, &waiting.message)),
        Some(State::Running(running)) => {
            let since = nanos(running.started_at).map(|at| format!("since {}", whole(at)));
            ("Running", since.unwrap_or_default())
        }
        Some(State::Terminated(ended)) => ("Terminated", termination(ended)),
        None => ("Waiting", String::new()),
    }
}

/// How a container ended, such as `exit code 1 (Error): message`.
#[must_use]
pub(crate) fn termination(ended: &pb::Terminated) -> String {
    let signal = match ended.signal {
        0 => String::new(),
        signal => format!(", signal {signal}"),
    };
    let reason = match ended.reason.as_str() {
        "" => String::new(),
        reason => format!(" ({reason})"),
    };
    joined(
        &format!("exit code {}{signal}{reason}", ended.exit_code),
        ended.message.trim_end(),
    )
}

/// `reason: message`, or one of them if the other is empty.
#[must_use]
pub(crate) fn joined(reason: &str, message: &str) -> String {
    match (reason.is_empty(), message.is_empty()) {
        (false, false) => format!("{reason}: {message}"),
        (true, _) => message.to_owned(),
        (false, true) => reason.to_owned(),
    }
}

/// A time for people, to the second.
#[must_use]
pub(crate) fn whole(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M:%SZ").to_string()
}

/// A pod as JSON.
#[must_use]
pub(crate) fn pod(pod: &pb::PodObserved) -> Value {
    let job = pod.job.as_ref().map_or(Value::Null, job);
    let outcome = pod.outcome.as_ref().map_or(Value::Null, |outcome| {
        compact(json!({
            "kind": self::outcome(pod),
            "reason": outcome.reason,
            "message": outcome.message,
            "disruption": outcome.disruption,
            "finishedAt": nanos(outcome.finished_at),
        }))
    });
    compact(json!({
        "uid": pod.uid,
        "namespace": pod.namespace,
        "name": pod.name,
        "clusterId": pod.cluster_id,
        "specGeneration": pod.spec_generation,
        "generation": pod.generation,
        "phase": raw_phase(pod),
        "reason": pod.reason,
        "message": pod.message,
        "since": nanos(pod.since),
        "deleting": pod.deleting,
        "shimConnected": pod.shim_connected,
        "hostIP": pod.host_ip,
        "job": job,
        "outcome": outcome,
        "initContainers": pod.init_containers.iter().map(container).collect::<Vec<_>>(),
        "containers": pod.containers.iter().map(container).collect::<Vec<_>>(),
        "ephemeralContainers": pod.ephemeral_containers.iter().map(container).collect::<Vec<_>>(),
        "notes": pod.notes.iter().map(note).collect::<Vec<_>>(),
    }))
}

fn raw_phase(pod: &pb::PodObserved) -> &'static str {
    if pod.phase() == PodPhase::Finished {
        "Finished"
    } else {
        phase(pod)
    }
}

fn job(job: &pb::Job) -> Value {
    compact(json!({
        "id": job.id,
        "state": job.state,
        "reason": job.reason,
        "nodes": job.nodes,
        "partition": job.partition,
        "restarts": job.restarts,
        "submittedAt": seconds(job.submitted_at),
        "startedAt": seconds(job.started_at),
        "endedAt": seconds(job.ended_at),
        "estimatedStart": seconds(job.estimated_start),
        "sbatchBegan": nanos(job.sbatch_began),
        "sbatchEnded": nanos(job.sbatch_ended),
    }))
}

fn container(container: &pb::ContainerStatus) -> Value {
    let state = match &container.state {
        Some(State::Waiting(waiting)) => {
            json!({"waiting": compact(json!({"reason": waiting.reason, "message": waiting.message}))})
        }
        Some(State::Running(running)) => {
            json!({"running": compact(json!({"startedAt": nanos(running.started_at)}))})
        }
        Some(State::Terminated(ended)) => json!({"terminated": terminated(ended)}),
        None => Value::Null,
    };
    compact(json!({
        "name": container.name,
        "image": container.image,
        "imageID": container.image_id,
        "containerID": container.container_id,
        "state": state,
        "lastTermination": container.last_termination.as_ref().map(terminated),
        "restartCount": container.restart_count,
        "ready": container.ready,
        "started": container.started,
    }))
}

fn terminated(ended: &pb::Terminated) -> Value {
    compact(json!({
        "exitCode": ended.exit_code,
        "signal": (ended.signal != 0).then_some(ended.signal),
        "reason": ended.reason,
        "message": ended.message,
        "startedAt": nanos(ended.started_at),
        "finishedAt": nanos(ended.finished_at),
        "containerID": ended.container_id,
    }))
}

fn note(note: &pb::PodNote) -> Value {
    compact(json!({
        "sequence": note.sequence,
        "type": if note.warning { "Warning" } else { "Normal" },
        "reason": note.reason,
        "message": note.message,
        "container": note.container,
        "at": nanos(note.at),
    }))
}

/// The agent as JSON.
#[must_use]
pub(crate) fn info(info: &pb::AgentInfo) -> Value {
    compact(json!({
        "version": info.version,
        "site": info.site,
        "capabilities": info.capabilities,
        "scheduler": info.scheduler,
        "schedulerVersion": info.scheduler_version,
        "runtime": info.runtime,
        "runtimeVersion": info.runtime_version,
        "hostname": info.hostname,
        "user": info.user,
        "epoch": info.epoch,
        "clusterId": info.cluster_id,
        "startedAt": nanos(info.started_at),
        "stateDir": info.state_dir,
        "pidIsolation": info.pid_isolation,
        "podLimit": info.pod_limit,
        "policyProblem": info.policy_problem,
        "shimRoute": info.shim_route,
    }))
}

/// The site's resources as JSON.
#[must_use]
pub(crate) fn node(node: &pb::NodeInfo) -> Value {
    let scheduler = node.scheduler.as_ref().map(|scheduler| {
        compact(json!({
            "reachable": scheduler.reachable,
            "since": nanos(scheduler.since),
            "message": scheduler.message,
            "lastRound": nanos(scheduler.last_round),
        }))
    });
    let partition = |partition: &pb::Partition| {
        compact(json!({
            "name": partition.name,
            "default": partition.is_default,
            "state": partition.state,
            "maxTimeMinutes": partition.max_time_minutes,
            "defaultTimeMinutes": partition.default_time_minutes,
            "cpu": partition.cpu,
            "memoryBytes": partition.memory_bytes,
            "nodes": partition.nodes,
            "features": partition.features,
            "gres": sorted(&partition.gres),
        }))
    };
    compact(json!({
        "cpu": node.cpu,
        "memoryBytes": node.memory_bytes,
        "ephemeralStorageBytes": node.ephemeral_storage_bytes,
        "extended": sorted(&node.extended),
        "nodesTotal": node.nodes_total,
        "nodesAvailable": node.nodes_available,
        "pidIsolation": node.pid_isolation,
        "podLimit": node.pod_limit,
        "scheduler": scheduler,
        "connections": node.egress.as_ref().map(connections),
        "partitions": node.partitions.iter().map(partition).collect::<Vec<_>>(),
    }))
}

/// What the agent has counted about connections of pods to the cluster.
fn connections(counts: &pb::EgressCounts) -> Value {
    let refused = counts.refused.iter();
    let refused: Map<_, _> = refused
        .map(|(reason, count)| (reason.clone(), Value::from(*count)))
        .collect();
    compact(json!({"waiting": counts.waiting, "refused": refused}))
}

fn sorted(map: &std::collections::HashMap<String, i64>) -> Map<String, Value> {
    map.iter()
        .map(|(name, count)| (name.clone(), Value::from(*count)))
        .collect()
}

/// Removes unknown values: null and empty texts, lists and maps. Zero and false are values.
fn compact(value: Value) -> Value {
    let Value::Object(fields) = value else {
        return value;
    };
    let known = |value: &Value| match value {
        Value::Null => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        Value::Bool(_) | Value::Number(_) => true,
    };
    Value::Object(
        fields
            .into_iter()
            .filter(|(_, value)| known(value))
            .collect(),
    )
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A pod of two containers, one of which has ended.
    pub(in super::super) fn sample() -> pb::PodObserved {
        let ended = pb::Terminated {
            exit_code: 137,
            signal: 9,
            reason: "OOMKilled".into(),
            started_at: 1_700_000_000_000_000_000,
            finished_at: 1_700_000_060_000_000_000,
            ..pb::Terminated::default()
        };
        let running = pb::Running {
            started_at: 1_700_000_000_000_000_000,
        };
        pb::PodObserved {
            uid: "0e9f5ac4".into(),
            namespace: "default".into(),
            name: "demo".into(),
            phase: PodPhase::Running.into(),
            since: 1_700_000_000_000_000_000,
            job: Some(pb::Job {
                id: "4711".into(),
                state: "RUNNING".into(),
                nodes: "c1".into(),
                partition: "main".into(),
                submitted_at: 1_699_999_990,
                ..pb::Job::default()
            }),
            containers: vec![
                pb::ContainerStatus {
                    name: "main".into(),
                    image: "busybox".into(),
                    state: Some(State::Running(running)),
                    ready: true,
                    ..pb::ContainerStatus::default()
                },
                pb::ContainerStatus {
                    name: "side".into(),
                    state: Some(State::Terminated(ended)),
                    restart_count: 2,
                    ..pb::ContainerStatus::default()
                },
            ],
            notes: vec![pb::PodNote {
                sequence: 1,
                warning: true,
                reason: "BackOff".into(),
                message: "restarts in 10 s".into(),
                container: "side".into(),
                at: 1_700_000_061_000_000_000,
                count: 0,
            }],
            ..pb::PodObserved::default()
        }
    }

    #[test]
    fn a_pod_is_complete_in_json() {
        insta::assert_snapshot!(serde_json::to_string_pretty(&pod(&sample())).unwrap());
    }

    #[test]
    fn phases_end_with_their_outcome() {
        let mut pod = sample();
        assert_eq!((phase(&pod), ready(&pod).as_str()), ("Running", "1/2"));
        pod.phase = PodPhase::Finished.into();
        assert_eq!(phase(&pod), "Finished");
        pod.outcome = Some(pb::Outcome {
            kind: OutcomeKind::Failed.into(),
            ..pb::Outcome::default()
        });
        assert_eq!((phase(&pod), raw_phase(&pod)), ("Failed", "Finished"));
    }

    #[test]
    fn states_are_named_with_their_details() {
        let pod = sample();
        assert_eq!(
            state(&pod.containers[0]),
            ("Running", "since 2023-11-14 22:13:20Z".into())
        );
        assert_eq!(
            state(&pod.containers[1]).1,
            "exit code 137, signal 9 (OOMKilled)"
        );
        assert_eq!(joined("A", "b"), "A: b");
        assert_eq!(joined("", "b"), "b");
    }
}
