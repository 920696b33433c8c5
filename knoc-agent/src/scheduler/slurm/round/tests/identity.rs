//! Tests of whose a job is: renamed jobs, reused IDs, partial answers.

use super::*;

/// Job 7 as sbatch reported it.
fn submitted(call: i64) -> JobRef {
    JobRef {
        call: Some((call, call)),
        ..job("7", "running")
    }
}

/// Changes that `scontrol update`, a submit plugin or a wrapper of sbatch may make to a job.
#[tokio::test]
async fn a_job_is_ours_by_its_id_whatever_it_is_called() {
    let (name, comment) = ((NAME, "mine"), (COMMENT, "my comment"));
    let broken = [(NAME, "mine\ntoo"), (COMMENT, "my\n\ncomment")];
    for changes in [
        vec![name],
        vec![comment],
        vec![name, comment],
        vec![broken[0]],
        broken.to_vec(),
    ] {
        let fake = Fake::new();
        fake.changed("squeue", "squeue-start.txt", &changes)
            .program("sacct", "exit 1");
        let own = submitted(SUBMITTED);
        let round = round(&fake.slurm(), std::slice::from_ref(&own))
            .await
            .unwrap();
        assert_eq!(find(&round, &own).state, JobState::Running, "{changes:?}");
        assert_eq!(round.missing, [], "{changes:?}");
        assert_eq!(fake.calls().lines().count(), 1, "{}", fake.calls());
    }
}

fn scontrol(directory: &str, restarts: u32, submitted: &str) -> String {
    format!(
        "case \"$*\" in
         *config) echo 'Configuration data as of 2026-11-22T19:45:20';;
         *) echo 'JobId=7 JobName=mine JobState=RUNNING Restarts={restarts} ExitCode=0:0 SubmitTime={submitted} Command=(null) WorkDir={directory} Comment=x';;
         esac"
    )
}

/// Compares the ID and the time of the sbatch call with the controller's answer about the job.
#[tokio::test]
async fn a_reused_id_is_another_job() {
    let both = [(NAME, "mine"), (COMMENT, "my comment")];
    let pinned = JobRef {
        submitted_at: Some(SUBMITTED - 9),
        ..submitted(SUBMITTED - 9)
    };
    let cases = [
        // Submitted ten minutes earlier: another job, unless its directory is the pod's.
        (submitted(SUBMITTED - 600), "/home/hpcuser", 0, false),
        (submitted(SUBMITTED - 600), "/pods/rec-running", 0, true),
        // Slurm showed the job earlier with another submit time.
        (pinned.clone(), "/home/hpcuser", 0, false),
        (pinned, "/home/hpcuser", 1, true),
        // The record of an older agent contains no times.
        (job("7", "running"), "/home/hpcuser", 0, false),
        (job("7", "running"), "/pods/rec-running", 0, true),
    ];
    for (own, directory, restarts, ours) in cases {
        let fake = Fake::new();
        fake.changed("squeue", "squeue-start.txt", &both)
            .program("sacct", "true")
            .program(
                "scontrol",
                &scontrol(directory, restarts, "2026-11-22T18:45:20"),
            );
        let slurm = fake.slurm_with_pods("/pods");
        let round = round(&slurm, std::slice::from_ref(&own)).await.unwrap();
        let case = format!("{own:?} {directory} {restarts}");
        assert_eq!(round.jobs.iter().any(|view| own.is(view)), ours, "{case}");
        let missing = if ours { vec![] } else { vec![own.clone()] };
        assert_eq!(round.missing, missing, "{case}");
    }
}

/// Without an answer nothing is decided: the job is neither the pod's nor missing.
#[tokio::test]
async fn a_doubt_stays_until_the_controller_answers() {
    let both = [(NAME, "mine"), (COMMENT, "my comment")];
    let fake = Fake::new();
    fake.changed("squeue", "squeue-start.txt", &both)
        .program("sacct", "true")
        .program(
            "scontrol",
            "echo 'Unable to contact slurm controller' >&2; exit 1",
        );
    let own = submitted(SUBMITTED - 600);
    let round = round(&fake.slurm(), std::slice::from_ref(&own))
        .await
        .unwrap();
    assert!(!round.jobs.iter().any(|view| own.is(view)));
    assert_eq!(round.missing, []);
}

/// The accounting database has a row for every run of a requeued job.
#[tokio::test]
async fn a_requeued_job_is_followed_through_the_accounting() {
    let fake = Fake::new();
    let first = "15|REQUEUED|None|0:0|main|c1|2026-11-22T18:45:23|2026-11-22T18:45:23|2026-11-22T18:45:26|60|";
    let second = "15|FAILED|None|3:0|main|c1|2026-11-22T18:45:28|2026-11-22T18:45:34|2026-11-22T18:54:29|60|";
    let rows = format!("echo '{first}mine|x'; echo '{second}mine|x'");
    fake.program("squeue", "true").program("sacct", &rows);
    let own = JobRef {
        call: Some((SUBMITTED + 3, SUBMITTED + 3)),
        ..job("15", "requeued")
    };
    let answer = round(&fake.slurm(), std::slice::from_ref(&own))
        .await
        .unwrap();
    let view = find(&answer, &own);
    assert_eq!((&view.state, view.restarts), (&JobState::Failed, 1));
    // A row that follows a run that simply ended belongs to another job.
    let first = first.replace("REQUEUED", "COMPLETED");
    let rows = format!("echo '{first}mine|x'; echo '{second}mine|x'");
    fake.program("sacct", &rows);
    let answer = round(&fake.slurm(), std::slice::from_ref(&own))
        .await
        .unwrap();
    assert_eq!(find(&answer, &own).state, JobState::Completed);
}

#[tokio::test]
async fn answers_of_another_form_decide_nothing() {
    let fake = Fake::new();
    fake.program("squeue", "echo 'Usage: squeue'");
    round(&fake.slurm(), &[job("7", "running")])
        .await
        .unwrap_err();
    fake.program("squeue", "true")
        .program("sacct", "echo 'Usage: sacct'");
    let answer = round(&fake.slurm(), &[job("7", "running")]).await.unwrap();
    assert!(matches!(answer.accounting, Accounting::Away(_)));
    assert_eq!(answer.missing, []);
    fake.program("sinfo", "echo 'Usage: sinfo'");
    fake.slurm().node_info().await.unwrap_err();
}

/// A renamed job is checked before it is cancelled, and another user's or pod's job is left alone.
#[tokio::test]
async fn a_renamed_job_is_cancelled_and_another_job_never() {
    let fake = Fake::new();
    let row =
        "7|PENDING|Priority|main||2026-11-22T18:45:20|Unknown|Unknown|1:00:00|mine|x|/elsewhere";
    fake.program("squeue", &format!("echo '{row}'"))
        .program(
            "scontrol",
            &scontrol("/elsewhere", 0, "2026-11-22T18:45:20"),
        )
        .program("scancel", "true");
    let slurm = fake.slurm_with_pods("/pods");
    let cancelled = || fake.calls().lines().any(|line| line == "--state=PENDING 7");
    let stranger = submitted(SUBMITTED - 600);
    slurm.cancel(&stranger, Cancel::Queued).await.unwrap();
    assert!(!cancelled(), "{}", fake.calls());
    let own = submitted(SUBMITTED);
    slurm.cancel(&own, Cancel::Queued).await.unwrap();
    assert!(cancelled(), "{}", fake.calls());
    // A job that cannot be checked is cancelled only if it has the name we gave it.
    let filtered = || fake.calls().matches("--name=knoc-rec-running 7").count();
    for answer in [
        "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
        "echo 'Unable to contact slurm controller' >&2; exit 1",
    ] {
        let before = filtered();
        fake.program("squeue", answer);
        slurm.cancel(&own, Cancel::Kill).await.unwrap();
        assert_eq!(filtered(), before + 1, "{answer}");
    }
}

#[tokio::test]
async fn a_job_is_found_by_its_directory_alone() {
    let uid = PodUid::try_from("rec-running").unwrap();
    let queue = "7|PENDING|Priority|main||2026-11-22T18:45:20|Unknown|Unknown|1:00:00|mine|x|/pods/rec-running";
    let ended = "7|FAILED|None|1:0|main|c1|2026-11-22T18:45:20|2026-11-22T18:45:20|2026-11-22T18:45:21|60|mine|x|/pods/rec-running";
    for (queue, accounting) in [
        (format!("echo '{queue}'"), "true".to_owned()),
        ("true".to_owned(), format!("echo '{ended}'")),
    ] {
        let fake = Fake::new();
        fake.program("squeue", &queue).program("sacct", &accounting);
        let slurm = fake.slurm_with_pods("/pods");
        let found = slurm.find(&uid, SINCE).await.unwrap();
        assert_eq!(found.len(), 1, "{queue}");
        assert!(found[0].marks.directory && !found[0].marks.name);
    }
}
