//! Tests of records from agents before placements, one for each state, as those agents wrote them.

use super::*;

fn at(time: &str) -> Timestamp {
    format!("2027-01-15T{time}Z").parse().unwrap()
}

fn own_job() -> Placement {
    Placement::own_job(JobId::try_from("1").unwrap())
}

fn with_job(stage: JobStage) -> State {
    let placement = own_job();
    State::WithJob { placement, stage }
}

fn finished(lingering: Option<Placement>) -> State {
    let outcome = Outcome {
        succeeded: true,
        reason: String::new(),
        message: String::new(),
        disruption: false,
        finished_at: at("08:00:04"),
    };
    State::Finished { outcome, lingering }
}

fn stopping(cause: Cause, how: Ending, deadline: &str) -> State {
    with_job(JobStage::Stopping {
        cause,
        how,
        deadline: at(deadline),
    })
}

fn settling(cause: Cause, until: &str, look_at: &str) -> State {
    with_job(JobStage::Settling {
        cause: Some(cause),
        until: at(until),
        look_at: at(look_at),
    })
}

/// Reads an old record, and writes it as this version does.
fn restored(json: &str) -> Pod {
    let record: Record = serde_json::from_str(json).unwrap();
    assert_eq!(
        (record.cluster_id.as_str(), record.values_revision),
        ("c", 3)
    );
    let over = record.is_over();
    let pod = record.restore(Facts::of_u(), None);
    let rewritten = Record::of(&pod, "c", 3);
    assert_eq!(rewritten.is_over(), over);
    let rewritten = serde_json::to_string(&rewritten).unwrap();
    let rewritten: Record = serde_json::from_str(&rewritten).unwrap();
    assert_eq!(rewritten.restore(Facts::of_u(), None), pod);
    pod
}

macro_rules! old {
    ($name:literal) => {
        include_str!(concat!("before_placement/", $name, ".json"))
    };
}

#[test]
fn records_of_the_previous_version_bring_pods_without_a_job_back() {
    let retry_at = at("08:00:11.46875");
    for (json, state) in [
        (old!("accepted"), BeforeJob::Accepted),
        (
            old!("staging"),
            BeforeJob::Staging {
                tries: 0,
                trouble: None,
            },
        ),
        (
            old!("throttled"),
            BeforeJob::Throttled {
                tries: 1,
                reason: "Throttled".to_owned(),
                message: "QOSMaxSubmitJobPerUserLimit".to_owned(),
                retry_at,
            },
        ),
        (old!("submitting"), BeforeJob::Submitting { look: None }),
    ] {
        let pod = restored(json);
        assert_eq!(pod.state, State::BeforeJob(state));
        assert_eq!(pod.placement(), None);
    }
}

#[test]
fn records_of_the_previous_version_bring_pods_with_a_job_back() {
    let deleted = Cause::Deleted("test".to_owned());
    let never_starts = Cause::NeverStarts("PartitionTimeLimit".to_owned());
    let lost_at = at("08:01:04");
    let lost = JobStage::Lost {
        since: lost_at,
        look_at: lost_at,
    };
    for (json, state) in [
        (old!("queued"), with_job(JobStage::Queued { never: None })),
        (old!("running"), with_job(JobStage::Running)),
        (old!("lost"), with_job(lost)),
        (
            old!("stopping"),
            stopping(deleted.clone(), Ending::Told, "08:00:49"),
        ),
        (
            old!("stopping-never-starts"),
            stopping(never_starts, Ending::Dequeued, "08:10:13"),
        ),
        (
            old!("stopping-overdue"),
            stopping(Cause::Deadline, Ending::Told, "08:02:25"),
        ),
        (old!("settling"), settling(deleted, "08:00:15", "08:00:05")),
        (
            old!("settling-overdue"),
            settling(Cause::Deadline, "08:01:51", "08:01:41"),
        ),
    ] {
        let pod = restored(json);
        assert_eq!(pod.state, state);
        assert_eq!(pod.placement(), Some(&own_job()));
        assert_eq!(pod.job().unwrap().id.as_str(), "1");
        assert!(pod.sbatch.is_some());
    }
}

#[test]
fn records_of_the_previous_version_bring_finished_pods_back() {
    assert_eq!(restored(old!("finished")).state, finished(None));
    let lingering = restored(old!("finished-lingering"));
    assert_eq!(lingering.state, finished(Some(own_job())));
    assert!(lingering.poll_soon());
}

/// An agent that is downgraded finds the job in the field that it reads.
#[test]
fn the_previous_version_still_finds_the_job() {
    let pod = restored(old!("running"));
    let json = serde_json::to_value(Record::of(&pod, "c", 3)).unwrap();
    assert_eq!(json["job"], "1");
    assert_eq!(json["placement"]["own-job"]["job"], "1");
    assert_eq!(json["phase"], "running");
}

/// This version never writes such a record: the agent looks for the job by name.
#[test]
fn a_phase_with_a_job_but_without_a_placement_starts_a_search() {
    let json = old!("running").replace("\"job\": \"1\"", "\"job\": null");
    let record: Record = serde_json::from_str(&json).unwrap();
    let pod = record.restore(Facts::of_u(), None);
    let looking = BeforeJob::Submitting { look: None };
    assert_eq!(pod.state, State::BeforeJob(looking));
}

#[test]
fn the_address_of_a_pod_outlives_the_agent() {
    let mut pod = Pod::that_reports(None);
    let without = serde_json::to_string(&Record::of(&pod, "c", 3)).unwrap();
    assert!(!without.contains("address"), "{without}");
    pod.address = Some(Ipv4Addr::new(10, 200, 0, 7));
    let with = serde_json::to_string(&Record::of(&pod, "c", 3)).unwrap();
    let read: Record = serde_json::from_str(&with).unwrap();
    let restored = read.restore(Facts::of_u(), None);
    assert_eq!(restored.address, pod.address);
}
