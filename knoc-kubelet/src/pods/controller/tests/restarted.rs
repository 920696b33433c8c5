//! A new process, which finds what an earlier one has recorded.

use super::*;
use pb::container_status::State;

/// The id of the second attempt of the container, which the agent reports.
const ATTEMPT: &str = "apptainer://12.main.1";

fn seconds_ago(seconds: i64) -> i64 {
    let now = i64::try_from(Timestamp::now().as_nanosecond()).unwrap();
    now - seconds * 1_000_000_000
}

impl Kubelet {
    /// A kubelet that starts while the container, which was restarted before, has this state. `published`: that of the status in
    /// the API server, and the id of its attempt.
    async fn starts_late(state: State, published: Value, id: &str) -> Self {
        let mut kubelet = Self::start().await;
        let ended = pb::Terminated {
            exit_code: 3,
            started_at: seconds_ago(50),
            finished_at: seconds_ago(40),
            container_id: ATTEMPT.to_owned(),
            ..pb::Terminated::default()
        };
        let waits = matches!(state, State::Waiting(_));
        kubelet.agent.put(pb::PodObserved {
            uid: UID.to_owned(),
            phase: PodPhase::Running.into(),
            spec_generation: 1,
            containers: vec![pb::ContainerStatus {
                name: "main".to_owned(),
                restart_count: 1,
                container_id: ATTEMPT.to_owned(),
                state: Some(state),
                last_termination: waits.then_some(ended),
                ..pb::ContainerStatus::default()
            }],
            ..pb::PodObserved::default()
        });
        kubelet
            .wait("the agent's pod", |kubelet| {
                kubelet.store.observed(&uid()).is_some()
            })
            .await;
        // The attempt that is over: the same if it waits, an earlier one if it runs.
        let last = if waits { id } else { "apptainer://11.main.0" };
        kubelet.apply(|pod| {
            pod["status"] = json!({"phase": "Running", "containerStatuses": [{
                "name": "main", "image": "busybox", "imageID": "x", "ready": false, "restartCount": 1,
                "containerID": id, "state": published,
                "lastState": {"terminated": {"exitCode": 3, "containerID": last}},
            }]});
        });
        // Notes come before containers in a round, so that the second round follows what the first one recorded.
        kubelet.round("First").await;
        kubelet.round("Second").await;
        kubelet
    }
}

#[tokio::test]
async fn the_start_of_a_later_attempt_is_counted_once_whoever_saw_it() {
    let started_at = seconds_ago(60);
    for (id, times) in [(ATTEMPT, 0), ("apptainer://12.main.0", 1)] {
        let state = State::Running(pb::Running { started_at });
        let kubelet = Kubelet::starts_late(state, json!({"running": {}}), id).await;
        let started = ["/events", "Started container main"];
        kubelet
            .wait("the Events", |kubelet| kubelet.said(&started) == times)
            .await;
        let created = ["/events", "Created container main"];
        assert_eq!(kubelet.said(&created), times, "{id}");
        kubelet.stop().await;
    }
}

#[tokio::test]
async fn a_container_that_waited_before_has_no_further_event() {
    let state = || {
        State::Waiting(pb::Waiting {
            reason: "CrashLoopBackOff".to_owned(),
            message: "back-off 20s".to_owned(),
        })
    };
    let waits = json!({"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 20s"}});
    let kubelet = Kubelet::starts_late(state(), waits, ATTEMPT).await;
    for text in ["Back-off restarting", "Started container"] {
        assert_eq!(kubelet.said(&["/events", text]), 0, "{text}");
    }
    kubelet.stop().await;
    // It began to wait while there was no kubelet.
    let runs = json!({"running": {}});
    let kubelet = Kubelet::starts_late(state(), runs, "apptainer://12.main.0").await;
    kubelet
        .wait("the Event", |kubelet| {
            kubelet.said(&["/events", "Back-off restarting"]) == 1
        })
        .await;
    kubelet.stop().await;
}
