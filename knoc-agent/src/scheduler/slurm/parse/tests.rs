//! Tests with recorded output of the real programs of three versions:
//! `tests/testbed/record-slurm.sh`.

use std::{collections::BTreeMap, path::PathBuf};

use proptest::prelude::*;

use super::*;

const VERSIONS: [&str; 3] = ["22.05", "24.11", "26.05"];

fn fixture(version: &str, name: &str) -> String {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let path = root.join(format!("slurm-{version}")).join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|err| unreachable!("{}: {err}", path.display()))
}

/// Jobs by case, which is the part of the UID after `rec-`.
fn by_case(rows: Result<Vec<Row>, String>) -> BTreeMap<String, JobView> {
    let pods = Path::new("/pods");
    let named = rows.unwrap().into_iter().filter_map(|row| {
        let uid = row.names(pods)?;
        let case = uid.as_str().strip_prefix("rec-")?.to_owned();
        let marks = row.marks(&uid, pods);
        Some((case, row.view(uid, marks)))
    });
    named.collect()
}

#[test]
fn the_recording_script_asks_as_the_agent_does() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/testbed/record-slurm.sh");
    let script = std::fs::read_to_string(path).unwrap();
    for format in [
        SQUEUE_FORMAT,
        SACCT_FORMAT,
        super::super::nodes::SINFO_FORMAT,
    ] {
        assert!(script.contains(format), "{format}");
    }
}

#[test]
fn pending_jobs_and_why() {
    for version in VERSIONS {
        let jobs = by_case(squeue(&fixture(version, "squeue-start.txt")));
        for (case, reason, never) in [
            ("pending-begin", "BeginTime", false),
            ("pending-held", "JobHeldUser", false),
            ("pending-dependency", "Dependency", false),
            ("pending-never", "DependencyNeverSatisfied", true),
            ("pending-time-limit", "PartitionTimeLimit", true),
            ("pending-resources", "Resources", false),
            ("pending-priority", "Priority", false),
        ] {
            let job = &jobs[case];
            assert_eq!(job.state, JobState::Pending, "{version} {case}");
            assert_eq!(job.reason, reason, "{version} {case}");
            assert_eq!(job.never_starts(), never, "{version} {case}");
            assert_eq!(
                (job.started_at, job.ended_at),
                (None, None),
                "{version} {case}"
            );
        }
        let guess = &jobs["pending-resources"];
        assert!(
            guess.estimated_start > guess.submitted_at,
            "{version} {guess:?}"
        );
        assert_eq!(jobs["pending-never"].estimated_start, None, "{version}");
    }
}

#[test]
fn running_jobs_and_where() {
    for version in VERSIONS {
        let jobs = by_case(squeue(&fixture(version, "squeue-start.txt")));
        let job = &jobs["running"];
        assert_eq!(job.state, JobState::Running, "{version}");
        assert_eq!(
            (job.nodes.as_str(), job.partition.as_str()),
            ("c1", "main"),
            "{version}"
        );
        assert_eq!(
            (job.cluster_id.as_str(), job.attempt),
            ("cluster", 1),
            "{version}"
        );
        assert_eq!(job.time_limit_minutes, Some(60), "{version}");
        assert!(
            job.started_at.is_some() && job.ended_at.is_none(),
            "{version} {job:?}"
        );
        assert_eq!(jobs["timeout"].time_limit_minutes, Some(1), "{version}");
    }
}

#[test]
fn a_name_or_a_comment_alone_names_the_pod() {
    let pods = Path::new("/pods");
    for version in VERSIONS {
        let text = fixture(version, "squeue-start.txt");
        assert!(
            text.contains("knoc-rec-forged") && text.contains("a|b|knoc-x"),
            "{version}"
        );
        let jobs = by_case(squeue(&text));
        let marks = Marks {
            name: true,
            ..Marks::default()
        };
        assert_eq!(jobs["forged"].marks, marks, "{version}");
        assert!(jobs["running"].marks.sure(), "{version}");
        let renamed = text.replace("|knoc-rec-running|", "|mine|");
        let marks = by_case(squeue(&renamed))["running"].marks;
        assert!(marks.comment && !marks.name, "{version} {marks:?}");
        let strangers = squeue(&text).unwrap().into_iter();
        let strangers = strangers.filter(|row| row.names(pods).is_none());
        assert!(
            strangers.into_iter().any(|row| row.name == "a"),
            "{version}"
        );
    }
}

#[test]
fn the_working_directory_names_the_pod_too() {
    let pods = Path::new("/home/u/pods");
    let uid = PodUid::try_from("rec-failed").unwrap();
    let text = "4|FAILED|None|main|c1|2026-11-22T18:45:20|Unknown|Unknown|1:00:00|a|b|c|/home/u/pods/rec-failed\n";
    let rows = squeue_with_directory(text).unwrap();
    assert_eq!(
        (rows[0].name.as_str(), rows[0].comment.as_str()),
        ("a", "b|c")
    );
    assert_eq!(rows[0].names(pods), Some(uid.clone()));
    let marks = rows[0].marks(&uid, pods);
    assert!(marks.directory && !marks.name && !marks.comment);
    let elsewhere = Path::new("/home/v/pods");
    assert!(!rows[0].marks(&uid, elsewhere).any());
    assert_eq!(rows[0].names(elsewhere), None);
}

/// `scontrol update JobName=` and `Comment=` take any text, and squeue and sacct print it as it is.
#[test]
fn a_job_whose_name_or_comment_has_line_breaks_is_still_seen() {
    let pods = Path::new("/pods");
    let uid = PodUid::try_from("u-1").unwrap();
    let queued = |name: &str, comment: &str| {
        format!(
            "7|RUNNING|None|main|c1|2026-11-22T18:45:20|2026-11-22T18:45:21|N/A|1:00:00|{name}|{comment}"
        )
    };
    let ended = |name: &str, comment: &str| {
        format!(
            "7|FAILED|None|64:0|main|c1|2026-11-22T18:45:20|2026-11-22T18:45:21|2026-11-22T18:45:22|60|{name}|{comment}"
        )
    };
    let other = queued("other", "");
    for (name, comment) in [
        ("mine\ntoo", "x"),
        ("\nmine", "knoc/1 c ns/p u-1 0"),
        ("mine\n\n|\n", "x"),
        ("knoc-u-1", "a\nb"),
        ("a\nb", "d\n"),
    ] {
        let (queued_job, ended_job) = (queued(name, comment), ended(name, comment));
        for (rows, text) in [
            (squeue(&queued_job).unwrap(), queued_job),
            (sacct(&ended_job).unwrap(), ended_job),
        ] {
            assert_eq!(rows.len(), 1, "{text:?}");
            assert_eq!(rows[0].id.as_str(), "7", "{text:?}");
            assert!(rows[0].submitted_at.is_some(), "{text:?}");
        }
        let text = format!(
            "{}|/pods/u-1\n{other}|/home\n",
            queued(name, comment).replacen('7', "8", 1)
        );
        let rows = squeue_with_directory(&text).unwrap();
        assert_eq!(rows.len(), 2, "{text:?}");
        assert_eq!(rows[0].id.as_str(), "8", "{text:?}");
        let marks = rows[0].marks(&uid, pods);
        assert!(marks.name || marks.directory, "{text:?} {marks:?}");
        assert_eq!(rows[1].name, "other", "{text:?}");
    }
    // A job that never becomes complete hides none of the others.
    let cut = format!("8|RUNNING|None\n{}{other}\n", "x\n".repeat(2 * JOB_LINES));
    let rows = squeue(&cut).unwrap();
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].name, "other");
}

/// An exit code of 0 without the expected output is an error.
#[test]
fn output_of_another_form_is_an_error() {
    let help = "Usage: squeue [-A account] [--clusters names]\n              [--help] [--hide]\n";
    for read in [squeue, squeue_with_directory, sacct, sacct_with_directory] {
        let problem = read(help).unwrap_err();
        assert!(problem.contains("Usage: squeue"), "{problem}");
        assert_eq!(read("\n").unwrap(), [], "no job at all");
    }
    // A strange comment is no reason to reject the other lines.
    let good = fixture("24.11", "squeue-start.txt");
    assert!(good.lines().any(|line| line == "z"));
    squeue(&good).unwrap();
}

#[test]
fn what_the_controller_says_of_itself() {
    let text = "Configuration data as of 2026-11-22T18:45:20\nAccountingStorageEnforce = none\nPrivateData             = jobs,nodes\n";
    assert_eq!(controller_time(text), Some(1_795_373_120));
    assert_eq!(controller_time("slurm_load_ctl_conf error"), None);
    assert_eq!(private_data(text).unwrap(), ["jobs", "nodes"]);
    assert_eq!(private_data("PrivateData = none\n").unwrap(), ["none"]);
    assert_eq!(private_data(""), None);
}

#[test]
fn jobs_on_their_way_out() {
    for version in VERSIONS {
        let jobs = by_case(squeue(&fixture(version, "squeue-middle.txt")));
        assert_eq!(jobs["suspended"].state, JobState::Suspended, "{version}");
        assert_eq!(jobs["completing"].state, JobState::Completing, "{version}");
        assert_eq!(
            jobs["completing"].state.phase(),
            JobPhase::Running,
            "{version}"
        );
        assert_eq!(
            jobs["cancelled-pending"].state,
            JobState::Cancelled { by: None },
            "{version}"
        );
    }
}

#[test]
fn ended_jobs_in_the_queue() {
    for version in VERSIONS {
        let jobs = by_case(squeue(&fixture(version, "squeue-end.txt")));
        for (case, state) in [
            ("completed", JobState::Completed),
            ("failed", JobState::Failed),
            ("signalled", JobState::Failed),
            ("oom", JobState::OutOfMemory),
            ("timeout", JobState::Timeout),
            ("nodefail", JobState::NodeFail),
            ("stopped-gracefully", JobState::Failed),
            ("cancelled-by-user", JobState::Cancelled { by: None }),
            ("cancelled-by-admin", JobState::Cancelled { by: None }),
        ] {
            let job = &jobs[case];
            assert_eq!(job.state, state, "{version} {case}");
            assert!(
                job.ended_at >= job.started_at && job.started_at.is_some(),
                "{version} {job:?}"
            );
            assert_eq!(job.estimated_start, None, "{version} {case}");
        }
    }
}

#[test]
fn ended_jobs_in_the_accounting() {
    let exit = |code, signal| Some(JobExit { code, signal });
    for version in VERSIONS {
        let jobs = by_case(sacct(&fixture(version, "sacct-end.txt")));
        for (case, state, expected) in [
            ("completed", JobState::Completed, exit(0, 0)),
            ("failed", JobState::Failed, exit(64, 0)),
            ("oom", JobState::OutOfMemory, exit(0, 125)),
            ("timeout", JobState::Timeout, exit(0, 0)),
            ("stopped-gracefully", JobState::Failed, exit(64, 0)),
            (
                "cancelled-by-user",
                JobState::Cancelled { by: Some(2001) },
                exit(0, 0),
            ),
            (
                "cancelled-by-admin",
                JobState::Cancelled { by: Some(0) },
                exit(0, 0),
            ),
        ] {
            let job = &jobs[case];
            assert_eq!(
                (&job.state, job.exit),
                (&state, expected),
                "{version} {case}"
            );
            assert_eq!(job.attempt, 1, "{version} {case}");
        }
        // Their exit codes differ between versions and have no meaning.
        assert_eq!(jobs["nodefail"].state, JobState::NodeFail, "{version}");
        assert_eq!(jobs["signalled"].state, JobState::Failed, "{version}");
        assert_eq!(
            (jobs["running"].ended_at, jobs["running"].exit),
            (None, None),
            "{version}"
        );
        assert_eq!(jobs["timeout"].time_limit_minutes, Some(1), "{version}");
    }
}

#[test]
fn every_life_of_a_requeued_job_the_oldest_first() {
    for version in VERSIONS {
        let jobs = sacct(&fixture(version, "sacct-end.txt")).unwrap();
        let lives: Vec<JobState> = jobs
            .into_iter()
            .filter(|job| job.name == "knoc-rec-requeued")
            .map(|job| job.state)
            .collect();
        assert!(lives.len() >= 2, "{version} {lives:?}");
        assert_eq!(lives[0], JobState::Requeued, "{version}");
    }
}

#[test]
fn the_accounting_is_away() {
    for version in VERSIONS {
        sacct(&fixture(version, "sacct-away.txt")).unwrap_err();
    }
}

#[test]
fn exits_from_the_controller() {
    for version in VERSIONS {
        let text = fixture(version, "scontrol-jobs.txt");
        let line = |case: &str| {
            let name = format!(" JobName=knoc-rec-{case} ");
            let line = text.lines().find(|line| line.contains(&name)).unwrap();
            let (head, _) = line.split_once(' ').unwrap();
            let id = JobId::try_from(head.trim_start_matches("JobId=")).unwrap();
            (line.to_owned(), id)
        };
        let (failed, id) = line("failed");
        let detail = scontrol_job(&failed, &id).unwrap();
        assert_eq!(
            (&detail.state, detail.restarts),
            (&JobState::Failed, 0),
            "{version}"
        );
        let exit = Some(JobExit {
            code: 64,
            signal: 0,
        });
        assert_eq!(detail.exit, exit, "{version}");
        assert_eq!(detail.directory, Some("/home/hpcuser".into()), "{version}");
        assert!(detail.submitted_at.is_some(), "{version}");
        let other = JobId::try_from("999").unwrap();
        assert_eq!(scontrol_job(&failed, &other), None, "{version}");
        let unknown = fixture(version, "scontrol-unknown.txt");
        assert_eq!(scontrol_job(&unknown, &id), None, "{version}");
        // A name may contain anything.
        let odd = failed.replace(
            "knoc-rec-failed UserId",
            "x JobState=RUNNING ExitCode=7:0 UserId",
        );
        let odd = scontrol_job(&odd, &id).unwrap();
        assert_eq!((odd.state, odd.exit), (JobState::Failed, exit), "{version}");
        for name in [
            "x Command=/y",
            "x WorkDir=/z Command=/y",
            "x\ny",
            "x\nExitCode=7:0 Command=/y\n",
        ] {
            let odd = failed.replace("knoc-rec-failed UserId", &format!("{name} UserId"));
            assert_eq!(
                scontrol_job(&odd, &id).as_ref(),
                Some(&detail),
                "{version} {name:?}"
            );
        }
    }
}

#[test]
fn time_limits() {
    let cases = [
        ("7-00:00:00", Some(10080)),
        ("1:00:00", Some(60)),
        ("2:00", Some(2)),
        ("0:30", Some(1)),
        ("60", Some(60)),
        ("1-12", Some(2160)),
        ("1-12:30", Some(2190)),
        ("UNLIMITED", None),
        ("infinite", None),
        ("Partition_Limit", None),
        ("n/a", None),
        ("", None),
        ("99999999999999-00:00:00", Some(99_999_999_999_999 * 1440)),
        ("9999999999999999999-0", None),
    ];
    for (text, expected) in cases {
        assert_eq!(minutes(text), expected, "{text}");
    }
}

proptest! {
    #[test]
    fn no_text_panics(text in "(?s).{0,200}", fields in prop::collection::vec("[ -~]{0,12}", 0..16)) {
        for text in [text, fields.join("|"), format!("JobId={}", fields.join("="))] {
            drop(squeue(&text));
            drop(sacct(&text));
            drop(scontrol_job(&text, &JobId::try_from("1").unwrap()));
            drop((squeue_with_directory(&text), sacct_with_directory(&text)));
            drop((controller_time(&text), private_data(&text)));
            minutes(&text).unwrap_or_default();
        }
    }

    #[test]
    fn minutes_never_panic(text in "[0-9]{0,20}-?[0-9]{0,20}:?[0-9]{0,20}:?[0-9]{0,20}") {
        minutes(&text).unwrap_or_default();
    }
}
