//! Tests of what the API shows of a pod, state by state.

use std::time::Duration;

use knoc_proto::ids::{JobId, PodUid};

use super::*;
use crate::pod::{
    placement::Placement,
    state::{Facts, Failure, Timeouts, Trouble},
};

fn spec() -> pb::PodSpec {
    let container = |name: &str| pb::Container {
        name: name.to_owned(),
        image: "busybox".to_owned(),
        ..pb::Container::default()
    };
    pb::PodSpec {
        uid: "u".to_owned(),
        init_containers: vec![container("first")],
        containers: vec![container("main"), container("side")],
        ..pb::PodSpec::default()
    }
}

fn pod(state: State) -> Pod {
    let second = Duration::from_secs(1);
    let timeouts = Timeouts {
        report_grace: second,
        never_ends_after: second,
        lost_after: second,
        stop_slack: second,
        backoff_initial: second,
        backoff_max: second,
    };
    let uid = PodUid::try_from("u").unwrap();
    let facts = Facts {
        uid,
        grace: second,
        deadline: None,
        timeouts,
    };
    let mut pod = Pod::new(facts, Timestamp::UNIX_EPOCH);
    pod.state = state;
    pod
}

fn queued(job: JobId) -> State {
    State::WithJob {
        placement: Placement::own_job(job),
        stage: JobStage::Queued { never: None },
    }
}

fn waiting(status: &pb::ContainerStatus) -> (&str, &str) {
    match &status.state {
        Some(Status::Waiting(waiting)) => (&waiting.reason, &waiting.message),
        other => panic!("{other:?}"),
    }
}

#[test]
fn before_the_first_report_all_containers_wait() {
    let job = JobId::try_from("7").unwrap();
    let shown = observed(&pod(queued(job)), &spec(), "c");
    assert_eq!(shown.phase(), pb::PodPhase::Queued);
    assert_eq!(shown.job.unwrap().id, "7");
    assert_eq!(
        (shown.init_containers.len(), shown.containers.len()),
        (1, 2)
    );
    assert_eq!(
        waiting(&shown.containers[0]),
        ("ContainerCreating", "job 7 waits")
    );
}

#[test]
fn a_failed_pull_shows_on_its_container() {
    let trouble = Trouble {
        failure: Failure {
            container: "side".to_owned(),
            image: "x".to_owned(),
            reason: "ErrImagePull".to_owned(),
            message: "no such image".to_owned(),
        },
        since: Timestamp::UNIX_EPOCH,
        retry_at: Timestamp::UNIX_EPOCH,
    };
    let shown = observed(
        &pod(State::BeforeJob(BeforeJob::Staging {
            tries: 1,
            trouble: Some(trouble),
        })),
        &spec(),
        "c",
    );
    assert_eq!(
        (shown.phase(), shown.reason.as_str()),
        (pb::PodPhase::Staging, "ErrImagePull")
    );
    assert_eq!(waiting(&shown.containers[0]).0, "ContainerCreating");
    assert_eq!(
        waiting(&shown.containers[1]),
        ("ErrImagePull", "no such image")
    );
}

#[test]
fn containers_last_seen_alive_end_unknown() {
    let outcome = Outcome {
        succeeded: false,
        reason: "NodeFailed".to_owned(),
        message: "the node failed".to_owned(),
        disruption: true,
        finished_at: Timestamp::UNIX_EPOCH,
    };
    let mut pod = pod(State::Finished {
        outcome,
        lingering: None,
    });
    let status = |name: &str, state| pb::ContainerStatus {
        name: name.to_owned(),
        state: Some(state),
        ..pb::ContainerStatus::default()
    };
    let ended = pb::Terminated {
        exit_code: 3,
        ..pb::Terminated::default()
    };
    pod.report = Some(pb::Report {
        init_containers: vec![status("first", Status::Terminated(ended.clone()))],
        containers: vec![status(
            "main",
            Status::Running(pb::Running { started_at: 5 }),
        )],
        ..pb::Report::default()
    });
    let shown = observed(&pod, &spec(), "c");
    assert_eq!(
        shown.init_containers[0].state,
        Some(Status::Terminated(ended))
    );
    for status in &shown.containers {
        let Some(Status::Terminated(end)) = &status.state else {
            panic!("{status:?}")
        };
        assert_eq!(
            (end.exit_code, end.reason.as_str()),
            (137, "ContainerStatusUnknown")
        );
    }
    assert!(shown.outcome.unwrap().disruption);
}

#[test]
fn containers_that_a_failed_init_container_kept_from_starting_still_wait() {
    let outcome = Outcome {
        succeeded: false,
        reason: "Error".to_owned(),
        message: "init container first failed".to_owned(),
        disruption: false,
        finished_at: Timestamp::UNIX_EPOCH,
    };
    let status = |name: &str, state| pb::ContainerStatus {
        name: name.to_owned(),
        state: Some(state),
        ..pb::ContainerStatus::default()
    };
    let waits = || {
        Status::Waiting(pb::Waiting {
            reason: "PodInitializing".to_owned(),
            ..pb::Waiting::default()
        })
    };
    let ended = |exit_code| {
        Status::Terminated(pb::Terminated {
            exit_code,
            ..pb::Terminated::default()
        })
    };
    for (first, waiting) in [(ended(1), true), (ended(0), false)] {
        let mut pod = pod(State::Finished {
            outcome: outcome.clone(),
            lingering: None,
        });
        pod.report = Some(pb::Report {
            init_containers: vec![status("first", first.clone())],
            containers: vec![status("main", waits()), status("side", waits())],
            ..pb::Report::default()
        });
        let shown = observed(&pod, &spec(), "c");
        assert_eq!(shown.init_containers[0].state, Some(first));
        for container in &shown.containers {
            let still = container.state == Some(waits());
            assert_eq!(still, waiting, "{container:?}");
        }
    }
}

/// As after a node failure during CrashLoopBackOff.
#[test]
fn a_container_that_waited_for_its_next_attempt_ended_as_its_last_one() {
    let outcome = Outcome {
        succeeded: false,
        reason: "NodeFailed".to_owned(),
        message: "Slurm ended the job: NODE_FAIL".to_owned(),
        disruption: true,
        finished_at: Timestamp::UNIX_EPOCH,
    };
    let ended = pb::Terminated {
        exit_code: 3,
        reason: "Error".to_owned(),
        ..pb::Terminated::default()
    };
    for restart_count in [0, 4] {
        let mut status = pb::ContainerStatus {
            state: Some(Status::Waiting(pb::Waiting {
                reason: "CrashLoopBackOff".to_owned(),
                ..pb::Waiting::default()
            })),
            last_termination: Some(ended.clone()),
            restart_count,
            ..pb::ContainerStatus::default()
        };
        settle_one(&mut status, &outcome, Timestamp::UNIX_EPOCH);
        assert_eq!(status.state, Some(Status::Terminated(ended.clone())));
        assert_eq!(status.last_termination, None);
        assert_eq!(status.restart_count, restart_count);
    }
}

#[test]
fn a_shim_cannot_claim_an_address_that_its_pod_does_not_have() {
    let shown = |given: Option<&str>, claimed: &str| {
        let network = pb::PodNetwork {
            mode: pb::NetworkMode::Private.into(),
            address: claimed.to_owned(),
            ..pb::PodNetwork::default()
        };
        let report = pb::Report {
            network: Some(network),
            ..pb::Report::default()
        };
        let mut pod = Pod::that_reports(Some(report));
        pod.address = given.map(|text| text.parse().unwrap());
        observed(&pod, &spec(), "c").network.unwrap().address
    };
    let own = "10.200.0.7";
    assert_eq!(shown(Some(own), own), own);
    assert_eq!(shown(Some(own), ""), "", "its network is not up yet");
    assert_eq!(shown(Some(own), "10.200.0.8"), "");
    assert_eq!(shown(None, own), "");
}
