//! Tests of the layout and of round trips of the job directory.

use super::*;

fn pod() -> (tempfile::TempDir, JobDir) {
    let root = tempfile::tempdir().unwrap();
    let state = StateDir::new(root.path().join("state"));
    state.create().unwrap();
    let dir = state.pod(&PodUid::try_from("0f1e-uid").unwrap());
    dir.create().unwrap();
    assert_eq!(state.list().unwrap(), std::slice::from_ref(&dir));
    (root, dir)
}

#[test]
fn the_newest_values_are_read_and_all_are_removed() {
    let (_root, dir) = pod();
    assert_eq!(dir.values().unwrap(), None);
    for revision in [1, 10, 9] {
        dir.write_values(&pb::PodValues {
            revision,
            ..Default::default()
        })
        .unwrap();
    }
    assert_eq!(dir.values().unwrap().unwrap().revision, 10);
    dir.remove_values().unwrap();
    assert_eq!(dir.values().unwrap(), None);
}

#[test]
fn a_stop_has_the_newest_grace_period_that_was_written() {
    let (_root, dir) = pod();
    assert_eq!(dir.stop_grace(), None);
    for seconds in [300, 7] {
        dir.write_stop_grace(seconds).unwrap();
        let grace = dir.stop_grace().map(|grace| grace.as_secs());
        assert_eq!(grace.map(i64::try_from), Some(Ok(seconds)));
    }
    dir.write_stop_grace(i64::MAX).unwrap();
    assert_eq!(dir.stop_grace(), Some(knoc_proto::pod::LONGEST));
    for text in ["", "x", "-1", "00000000000000000000000007"] {
        atomic::write(&dir.stop_path(), text.as_bytes(), 0o600).unwrap();
        assert_eq!(dir.stop_grace(), None, "{text:?}");
    }
}

/// Values that a killed agent has half written are as secret as the others.
#[test]
fn half_written_values_are_removed_with_the_others() {
    let (_root, dir) = pod();
    dir.write_values(&pb::PodValues::default()).unwrap();
    let half = atomic::temporary(&dir.values_dir().join("2"));
    atomic::create_synced(&half, b"half of a secret", 0o600).unwrap();
    dir.remove_values().unwrap();
    assert_eq!(fs::read_dir(dir.values_dir()).unwrap().count(), 0);
}

#[test]
fn values_staged_after_the_shim_took_older_ones_stay() {
    let (_root, dir) = pod();
    let values = |revision| pb::PodValues {
        revision,
        ..Default::default()
    };
    dir.write_values(&values(1)).unwrap();
    let taken = dir.values().unwrap().unwrap();
    dir.write_values(&values(2)).unwrap();
    dir.remove_values_up_to(taken.revision).unwrap();
    assert_eq!(dir.values().unwrap().unwrap().revision, 2);
}

#[test]
fn the_report_of_a_lost_node_does_not_replace_that_of_the_later_restart() {
    let (_root, dir) = pod();
    let report = |restart: u32, sequence| pb::Report {
        restart: restart.try_into().unwrap(),
        sequence,
        ..Default::default()
    };
    for restart in [0, 2] {
        let claim = Claim {
            job_id: "7".to_owned(),
            restart,
            host: "c1".to_owned(),
        };
        dir.claim(&claim, true).unwrap();
        dir.write_report(&report(restart, 1)).unwrap();
    }
    let late = pb::Report {
        r#final: true,
        ..report(0, 9)
    };
    dir.write_report(&late).unwrap();
    assert_eq!(dir.report().unwrap(), Some(report(2, 1)));
    dir.write_report(&report(2, 2)).unwrap();
    assert_eq!(dir.report().unwrap(), Some(report(2, 2)));
}

#[test]
fn spec_and_report_come_back() {
    let (_root, dir) = pod();
    assert_eq!(dir.report().unwrap(), None);
    let job = pb::JobFile {
        runtime: "process".to_owned(),
        ..Default::default()
    };
    dir.write_spec(&job).unwrap();
    assert_eq!(dir.spec().unwrap(), job);
    let report = pb::Report {
        sequence: 3,
        r#final: true,
        ..Default::default()
    };
    dir.write_report(&report).unwrap();
    assert_eq!(
        JobDir::open(dir.path()).unwrap().report().unwrap(),
        Some(report)
    );
    atomic::write(&dir.report_path(), b"\xff\xff", 0o600).unwrap();
    assert!(matches!(dir.report(), Err(JobDirError::Report { .. })));
    dir.remove().unwrap();
    dir.remove().unwrap();
    assert!(JobDir::open(dir.path()).is_err());
}
