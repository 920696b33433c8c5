//! Tests of the table of outcomes.

use knoc_proto::ids::{JobId, PodUid};

use super::*;
use crate::scheduler::{JobExit, Marks};

fn view(state: JobState, exit: Option<(i32, i32)>) -> JobView {
    JobView {
        id: JobId::try_from("1").unwrap(),
        uid: PodUid::try_from("u").unwrap(),
        marks: Marks::ALL,
        cluster_id: String::new(),
        attempt: 1,
        state,
        reason: String::new(),
        exit: exit.map(|(code, signal)| JobExit { code, signal }),
        nodes: "c1".to_owned(),
        partition: "batch".to_owned(),
        submitted_at: None,
        started_at: Some(1),
        ended_at: Some(100),
        estimated_start: None,
        time_limit_minutes: Some(2),
        restarts: 0,
    }
}

fn report(ended_by: pb::EndedBy, outcome: pb::OutcomeKind) -> pb::Report {
    let (ended_by, outcome) = (ended_by.into(), outcome.into());
    pb::Report {
        r#final: true,
        ended_by,
        outcome,
        ..pb::Report::default()
    }
}

fn judge(
    view: Option<&JobView>,
    report: Option<&pb::Report>,
    cause: Option<&Cause>,
    deadline: Option<u64>,
) -> Outcome {
    let evidence = Evidence {
        view,
        report,
        cause,
        deadline: deadline.map(Duration::from_secs),
        grace: Duration::from_secs(30),
        batch_tail: "module: command not found",
        unclaimed: false,
    };
    decide(&evidence, Timestamp::from_second(200).unwrap())
}

#[test]
fn a_final_report_beats_every_state() {
    use pb::{EndedBy::Themselves, OutcomeKind::Succeeded};
    let well = report(Themselves, Succeeded);
    for state in [
        JobState::OutOfMemory,
        JobState::Failed,
        JobState::Completed,
        JobState::NodeFail,
    ] {
        let outcome = judge(Some(&view(state, None)), Some(&well), None, None);
        assert!(
            outcome.succeeded && outcome.reason.is_empty(),
            "{outcome:?}"
        );
    }
}

#[test]
fn after_a_signal_the_reason_is_slurms() {
    use pb::{EndedBy::Signal, OutcomeKind};
    let ended = report(Signal, OutcomeKind::Failed);
    for (state, reason, disruption) in [
        (JobState::Timeout, "SlurmTimeLimit", false),
        (JobState::OutOfMemory, "OOMKilled", false),
        (JobState::Preempted, "Preempted", true),
        (JobState::NodeFail, "NodeFailed", true),
        (JobState::Cancelled { by: Some(1001) }, "Cancelled", false),
    ] {
        let outcome = judge(Some(&view(state, None)), Some(&ended), None, None);
        assert_eq!(
            (outcome.reason.as_str(), outcome.disruption),
            (reason, disruption)
        );
        assert!(!outcome.succeeded);
    }
    let who = judge(
        Some(&view(JobState::Cancelled { by: Some(1001) }, None)),
        Some(&ended),
        None,
        None,
    );
    assert!(who.message.contains("1001"), "{}", who.message);
    let fine = judge(
        Some(&view(JobState::Completed, None)),
        Some(&ended),
        None,
        None,
    );
    assert_eq!(fine.reason, "");
}

/// Else a Job that ignores disruptions would create pods that exceed the same limit without end.
#[test]
fn an_eviction_for_the_pods_own_limits_is_no_disruption() {
    let mut evicted = report(pb::EndedBy::Evicted, pb::OutcomeKind::Failed);
    "Evicted".clone_into(&mut evicted.reason);
    let outcome = judge(None, Some(&evicted), None, None);
    assert_eq!(
        (outcome.reason.as_str(), outcome.disruption),
        ("Evicted", false)
    );
}

#[test]
fn a_rank_that_was_lost_is_slurms_doing_or_a_failure_and_a_lost_node_is_a_disruption() {
    use pb::EndedBy::{LostNode, LostRank};
    for (by, state, reason, disruption) in [
        (LostRank, Some(JobState::NodeFail), "NodeFailed", true),
        (LostRank, Some(JobState::Preempted), "Preempted", true),
        (LostRank, Some(JobState::OutOfMemory), "OOMKilled", false),
        (LostRank, Some(JobState::Failed), "", false),
        (LostRank, None, "", false),
        (LostNode, Some(JobState::NodeFail), "NodeFailed", true),
        (LostNode, Some(JobState::Timeout), "SlurmTimeLimit", false),
        (LostNode, Some(JobState::Failed), "NodeFailed", true),
        (LostNode, Some(JobState::Running), "NodeFailed", true),
        (LostNode, None, "NodeFailed", true),
    ] {
        let ended = report(by, pb::OutcomeKind::Failed);
        let view = state.map(|state| view(state, None));
        let outcome = judge(view.as_ref(), Some(&ended), None, None);
        let told = (outcome.reason.as_str(), outcome.disruption);
        assert_eq!(told, (reason, disruption), "{by:?} {view:?}");
        assert!(!outcome.succeeded);
    }
    let deleted = Cause::Deleted("deleted".to_owned());
    let ended = report(LostNode, pb::OutcomeKind::Failed);
    let outcome = judge(None, Some(&ended), Some(&deleted), None);
    assert_eq!(
        (outcome.reason.as_str(), outcome.disruption),
        ("Deleted", false)
    );
}

/// The site's prelude runs before the shim in the batch script.
#[test]
fn a_prelude_that_fails_is_cannot_start() {
    for (state, exit, unclaimed) in [
        (JobState::Failed, (1, 0), false),
        (JobState::Failed, (127, 0), false),
        (JobState::Failed, (3, 0), true),
        (JobState::Completed, (0, 0), true),
        (JobState::Failed, (64, 0), true),
    ] {
        let outcome = without_shim(&view(state, Some(exit)), None, unclaimed);
        assert!(!outcome.succeeded);
        assert_eq!(outcome.reason, "CannotStart", "{exit:?}");
        let message = outcome.message;
        assert!(message.contains("prelude"), "{message}");
        assert!(message.contains("module: command not found"), "{message}");
    }
}

#[test]
fn a_job_that_ended_in_another_way_has_another_reason() {
    let begun = pb::Report::default();
    let cancelled = JobState::Cancelled { by: None };
    for (state, exit, report, unclaimed, reason) in [
        // A shim has claimed the directory and left no report.
        (
            JobState::Completed,
            (0, 0),
            None,
            false,
            "ContainerStatusUnknown",
        ),
        (
            JobState::Failed,
            (64, 0),
            None,
            false,
            "ContainerStatusUnknown",
        ),
        (
            JobState::Failed,
            (101, 0),
            Some(&begun),
            false,
            "ContainerStatusUnknown",
        ),
        (
            JobState::Failed,
            (0, 9),
            None,
            true,
            "ContainerStatusUnknown",
        ),
        (JobState::OutOfMemory, (1, 0), None, true, "OOMKilled"),
        (cancelled, (1, 0), None, true, "Cancelled"),
    ] {
        let outcome = without_shim(&view(state, Some(exit)), report, unclaimed);
        assert_eq!(outcome.reason, reason, "{exit:?} {unclaimed}");
    }
}

fn without_shim(view: &JobView, report: Option<&pb::Report>, unclaimed: bool) -> Outcome {
    let evidence = Evidence {
        view: Some(view),
        report,
        cause: None,
        deadline: None,
        grace: Duration::from_secs(30),
        batch_tail: "module: command not found",
        unclaimed,
    };
    decide(&evidence, Timestamp::from_second(200).unwrap())
}

#[test]
fn a_requeued_job_whose_containers_had_begun_is_named() {
    let ended = report(pb::EndedBy::Signal, pb::OutcomeKind::Failed);
    let begun = pb::Report::default();
    let back = view(JobState::Pending, None);
    let first = view(JobState::Failed, Some((66, 0)));
    let second = JobView {
        restarts: 1,
        ..first.clone()
    };
    for (view, report, reason) in [
        (&back, &ended, "SlurmJobRequeued"),
        (&back, &begun, "SlurmJobRequeued"),
        (&second, &ended, "SlurmJobRequeued"),
        (&second, &begun, "SlurmJobRequeued"),
        (&first, &begun, "ContainerStatusUnknown"),
    ] {
        let outcome = judge(Some(view), Some(report), None, None);
        assert_eq!(
            (outcome.succeeded, outcome.reason.as_str()),
            (false, reason)
        );
    }
}

#[test]
fn a_time_limit_is_the_pods_deadline_only_if_that_was_the_limit() {
    let ended = report(pb::EndedBy::Signal, pb::OutcomeKind::Failed);
    let timeout = view(JobState::Timeout, None);
    for (deadline, reason) in [
        (Some(60), "DeadlineExceeded"),
        (Some(90), "DeadlineExceeded"),
        (Some(7200), "SlurmTimeLimit"),
        (None, "SlurmTimeLimit"),
    ] {
        let outcome = judge(Some(&timeout), Some(&ended), None, deadline);
        assert_eq!(outcome.reason, reason);
        assert_eq!(outcome.message == OVERDUE, reason == "DeadlineExceeded");
    }
    let by_shim = report(pb::EndedBy::Deadline, pb::OutcomeKind::Failed);
    assert_eq!(
        judge(None, Some(&by_shim), None, Some(5)).reason,
        "DeadlineExceeded"
    );
}

#[test]
fn a_job_whose_reservation_ends_has_not_reached_the_deadline_of_its_pod() {
    let signal = report(pb::EndedBy::Signal, pb::OutcomeKind::Failed);
    let warned = report(pb::EndedBy::TimeLimit, pb::OutcomeKind::Failed);
    let lasted = |seconds: i64| JobView {
        ended_at: Some(1 + seconds),
        time_limit_minutes: Some(60),
        ..view(JobState::Timeout, None)
    };
    for (seconds, report, reason, early) in [
        (1200, Some(&signal), "SlurmTimeLimit", true),
        (1200, None, "SlurmTimeLimit", true),
        (3590, Some(&signal), "DeadlineExceeded", false),
        // Long grace periods begin long before the limit.
        (1200, Some(&warned), "DeadlineExceeded", false),
    ] {
        let outcome = judge(Some(&lasted(seconds)), report, None, Some(3540));
        assert_eq!(outcome.reason, reason, "{seconds}");
        assert_eq!(outcome.message.contains("reservation"), early, "{seconds}");
    }
}

#[test]
fn the_warning_of_a_time_limit_says_why_whatever_slurm_says_then() {
    let ended = report(pb::EndedBy::TimeLimit, pb::OutcomeKind::Failed);
    // The shim's exit code makes the job FAILED.
    let failed = view(JobState::Failed, Some((64, 0)));
    for (view, deadline, reason) in [
        (Some(&failed), None, "SlurmTimeLimit"),
        (Some(&failed), Some(60), "DeadlineExceeded"),
        (Some(&failed), Some(7200), "SlurmTimeLimit"),
        (None, None, "SlurmTimeLimit"),
    ] {
        let outcome = judge(view, Some(&ended), None, deadline);
        assert_eq!(
            (outcome.succeeded, outcome.reason.as_str()),
            (false, reason)
        );
    }
    let deleted = Cause::Deleted("by Kubernetes".to_owned());
    let both = judge(Some(&failed), Some(&ended), Some(&deleted), None);
    assert_eq!(both.reason, "Deleted");
}

#[test]
fn without_a_report_success_is_never_guessed() {
    for (state, exit, reason) in [
        (JobState::Completed, Some((0, 0)), "ContainerStatusUnknown"),
        (JobState::Failed, Some((64, 0)), "ContainerStatusUnknown"),
        (JobState::Failed, Some((65, 0)), "ContainerStatusUnknown"),
        (JobState::Failed, Some((67, 0)), "CannotStart"),
        (JobState::Failed, Some((0, 53)), "CannotStart"),
        (JobState::Failed, Some((127, 0)), "CannotStart"),
        (JobState::Timeout, Some((0, 15)), "SlurmTimeLimit"),
        (JobState::OutOfMemory, Some((0, 125)), "OOMKilled"),
        (JobState::BootFail, None, "NodeFailed"),
        (JobState::Preempted, None, "Preempted"),
        (JobState::Cancelled { by: None }, None, "Cancelled"),
        (JobState::Deadline, None, "SlurmDeadline"),
    ] {
        let outcome = judge(Some(&view(state.clone(), exit)), None, None, None);
        assert_eq!(outcome.reason, reason, "{state} {exit:?}");
        assert!(!outcome.succeeded);
        assert_eq!(outcome.finished_at.as_second(), 100);
    }
    let failed = judge(
        Some(&view(JobState::Failed, Some((127, 0)))),
        None,
        None,
        None,
    );
    assert!(
        failed.message.contains("module: command not found"),
        "{}",
        failed.message
    );
    let lost = judge(None, None, None, None);
    assert_eq!(lost.reason, "ContainerStatusUnknown");
}

#[test]
fn jobs_that_the_agent_ended_say_so() {
    let deleted = Cause::Deleted("by Kubernetes".to_owned());
    let cancelled = view(JobState::Cancelled { by: None }, None);
    assert_eq!(
        judge(Some(&cancelled), None, Some(&deleted), None).reason,
        "Deleted"
    );
    let stopped = report(pb::EndedBy::Stop, pb::OutcomeKind::Failed);
    assert_eq!(
        judge(None, Some(&stopped), Some(&deleted), None).reason,
        "Deleted"
    );
    let well = report(pb::EndedBy::Stop, pb::OutcomeKind::Succeeded);
    assert!(judge(None, Some(&well), Some(&deleted), None).succeeded);
    let never = Cause::NeverStarts("PartitionTimeLimit".to_owned());
    let outcome = judge(None, None, Some(&never), None);
    assert_eq!(outcome.reason, "SlurmJobNeverStarts");
    assert!(outcome.message.contains("PartitionTimeLimit"));
}

#[test]
fn a_deadline_counts_until_the_last_container_has_ended() {
    const SECOND: i64 = 1_000_000_000;
    let ended_at = |seconds: i64| pb::ContainerStatus {
        state: Some(pb::container_status::State::Terminated(pb::Terminated {
            finished_at: seconds * SECOND,
            ..pb::Terminated::default()
        })),
        ..pb::ContainerStatus::default()
    };
    let deleted = Cause::Deleted("by Kubernetes".to_owned());
    for (by, cause) in [
        (pb::EndedBy::Themselves, None),
        (pb::EndedBy::Stop, Some(&deleted)),
    ] {
        for (sidecar, deadline, reason) in [
            (109, Some(10), ""),
            (110, Some(10), "DeadlineExceeded"),
            (130, Some(10), "DeadlineExceeded"),
            (130, Some(60), ""),
            (130, None, ""),
        ] {
            let mut report = report(by, pb::OutcomeKind::Succeeded);
            report.started_at = 100 * SECOND;
            report.containers = vec![ended_at(105)];
            report.init_containers = vec![ended_at(sidecar)];
            let outcome = judge(None, Some(&report), cause, deadline);
            assert_eq!(outcome.reason, reason, "{by:?} {sidecar} {deadline:?}");
            assert_eq!(outcome.succeeded, reason.is_empty());
            assert_eq!(outcome.message == OVERDUE, !reason.is_empty());
            assert_eq!(outcome.finished_at.as_second(), sidecar);
        }
    }
}
