//! Rounds against programs that print recorded answers.

use std::future::ready;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use knoc_proto::ids::PodUid;

use super::*;
use crate::scheduler::slurm::Settings;
use crate::scheduler::{Cancel, JobExit, JobState, Refusal, RefusalKind, Scheduler, SubmitRequest};

/// A folder with Slurm's commands as scripts.
struct Fake {
    dir: tempfile::TempDir,
}

impl Fake {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn program(&self, name: &str, script: &str) -> &Self {
        let path = self.dir.path().join(name);
        let script = format!(
            "#!/bin/sh\necho \"$*\" >>'{}/calls'\n{script}\n",
            self.dir.path().display()
        );
        std::io::Write::write_all(
            &mut std::fs::File::create(&path).unwrap(),
            script.as_bytes(),
        )
        .unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        self
    }

    fn recorded(&self, name: &str, file: &str) -> &Self {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/slurm-24.11");
        self.program(name, &format!("cat '{}'", root.join(file).display()))
    }

    /// Prints a recorded answer with a column for the working directory.
    fn with_directory(&self, name: &str, file: &str) -> &Self {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/slurm-24.11");
        let file = root.join(file).display().to_string();
        self.program(name, &format!("sed 's:$:|/home/hpcuser:' '{file}'"))
    }

    /// Prints a recorded answer with `changes` made to it.
    fn changed(&self, name: &str, file: &str, changes: &[(&str, &str)]) -> &Self {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/slurm-24.11");
        let mut text = std::fs::read_to_string(root.join(file)).unwrap();
        for (from, to) in changes {
            assert!(text.contains(from), "{from}");
            text = text.replace(from, to);
        }
        let changed = self.dir.path().join(format!("{name}.txt"));
        std::io::Write::write_all(
            &mut std::fs::File::create(&changed).unwrap(),
            text.as_bytes(),
        )
        .unwrap();
        self.program(name, &format!("cat '{}'", changed.display()))
    }

    fn slurm(&self) -> Slurm {
        let path = format!("{}:/usr/bin:/bin", self.dir.path().display());
        Slurm::new(Settings {
            path,
            ..Settings::default()
        })
    }

    fn slurm_with_pods(&self, pods: &str) -> Slurm {
        let path = format!("{}:/usr/bin:/bin", self.dir.path().display());
        Slurm::new(Settings {
            path,
            pods: PathBuf::from(pods),
            ..Settings::default()
        })
    }

    fn calls(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("calls")).unwrap_or_default()
    }
}

fn job(id: &str, case: &str) -> JobRef {
    let uid = PodUid::try_from(format!("rec-{case}")).unwrap();
    JobRef::new(JobId::try_from(id).unwrap(), uid)
}

/// The same, as it was last seen with our name.
fn named(id: &str, case: &str) -> JobRef {
    JobRef {
        named: true,
        ..job(id, case)
    }
}

/// Some time before the recordings.
const SINCE: Timestamp = Timestamp::UNIX_EPOCH;
/// When the recorded job 7 was submitted.
const SUBMITTED: i64 = 1_795_373_120;
/// What the recorded queue calls job 7, and how it commented it.
const NAME: &str = "knoc-rec-running";
const COMMENT: &str = "knoc/1 cluster ns/pod rec-running 1";

fn find<'a>(round: &'a Round, job: &JobRef) -> &'a JobView {
    round.jobs.iter().find(|view| job.is(view)).unwrap()
}

#[tokio::test]
async fn ended_jobs_get_their_exit_from_the_accounting() {
    let fake = Fake::new();
    fake.recorded("squeue", "squeue-end.txt")
        .recorded("sacct", "sacct-end.txt");
    let (failed, running, gone) = (job("4", "failed"), job("7", "running"), job("99", "gone"));
    let reused = job("3", "somebody-else");
    let known = [
        failed.clone(),
        running.clone(),
        gone.clone(),
        reused.clone(),
    ];
    let round = round(&fake.slurm(), &known).await.unwrap();
    assert_eq!(
        find(&round, &failed).exit,
        Some(JobExit {
            code: 64,
            signal: 0
        })
    );
    assert_eq!(
        find(&round, &failed).reason,
        "NonZeroExitCode",
        "squeue's, where sacct has none"
    );
    assert_eq!(find(&round, &running).state, JobState::Running);
    assert_eq!(
        round.missing,
        [gone, reused],
        "an id that is another's by now is missing"
    );
    assert_eq!(round.accounting, Accounting::Answered);
    assert!(fake.calls().contains("-j 4,99,3"), "{}", fake.calls());
}

#[tokio::test]
async fn what_runs_costs_one_question() {
    let fake = Fake::new();
    fake.recorded("squeue", "squeue-start.txt")
        .program("sacct", "exit 1");
    let round = round(&fake.slurm(), &[job("7", "running")]).await.unwrap();
    assert_eq!(round.accounting, Accounting::NotAsked);
    assert_eq!(fake.calls().lines().count(), 1, "{}", fake.calls());
}

#[tokio::test]
async fn without_an_answer_of_the_accounting_nothing_is_missing() {
    let fake = Fake::new();
    let away =
        "echo 'sacct: error: Problem talking to the database: Connection refused' >&2; exit 1";
    fake.recorded("squeue", "squeue-end.txt")
        .program("sacct", away);
    fake.program(
        "scontrol",
        "echo 'JobId=4 JobName=knoc-rec-failed JobState=FAILED Restarts=2 ExitCode=64:0 SubmitTime=2026-11-22T18:45:20 Command=(null)'",
    );
    let failed = job("4", "failed");
    let round = round(&fake.slurm(), &[failed.clone(), job("99", "gone")])
        .await
        .unwrap();
    assert!(matches!(&round.accounting, Accounting::Away(words) if words.contains("refused")));
    assert_eq!(round.missing, []);
    assert_eq!(
        find(&round, &failed).exit,
        Some(JobExit {
            code: 64,
            signal: 0
        })
    );
    assert_eq!(find(&round, &failed).restarts, 2);
}

#[tokio::test]
async fn a_site_without_accounting_knows_what_is_missing() {
    let fake = Fake::new();
    let disabled = "echo 'Slurm accounting storage is disabled' >&2; exit 1";
    fake.recorded("squeue", "squeue-end.txt")
        .program("sacct", disabled)
        .program("scontrol", "exit 1");
    let gone = job("99", "gone");
    let round = round(&fake.slurm(), std::slice::from_ref(&gone))
        .await
        .unwrap();
    assert_eq!(
        (round.accounting, round.missing),
        (Accounting::Disabled, vec![gone])
    );
}

#[tokio::test]
async fn a_queue_that_does_not_answer_is_an_error() {
    let fake = Fake::new();
    fake.program(
        "squeue",
        "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1",
    );
    let err = round(&fake.slurm(), &[]).await.unwrap_err();
    assert!(
        knoc_proto::error::chain(&err).contains("Unable to contact"),
        "{err:?}"
    );
}

fn request(dir: &Path) -> SubmitRequest {
    SubmitRequest {
        uid: PodUid::try_from("p").unwrap(),
        spec: std::sync::Arc::default(),
        cluster_id: String::new(),
        attempt: 1,
        jobdir: dir.to_owned(),
        shim: PathBuf::from("/opt/knoc-agent"),
    }
}

#[tokio::test]
async fn submit_hands_the_script_over_and_reads_the_id() {
    let fake = Fake::new();
    fake.program("sinfo", "true");
    let out = fake.dir.path().join("script");
    fake.program(
        "sbatch",
        &format!(
            "cat >'{}'; echo '4711;cluster'; echo 'Thank you.'",
            out.display()
        ),
    );
    let slurm = Scheduler::Slurm(Box::new(fake.slurm()));
    let submitted = slurm
        .submit(&request(fake.dir.path()), ready(Ok(())))
        .await
        .unwrap();
    assert_eq!(submitted.job.as_str(), "4711");
    assert!(submitted.ended >= submitted.began);
    let script = std::fs::read_to_string(out).unwrap();
    assert!(
        script.starts_with("#!/bin/sh\ntrap '' USR1 USR2\nexec '/opt/knoc-agent' shim '"),
        "{script}"
    );
}

#[tokio::test]
async fn success_without_an_id_is_said_with_what_sbatch_printed() {
    for (answer, printed) in [
        ("true", "nothing"),
        ("echo hello", "hello"),
        ("echo 1 2", "1 2"),
        (
            "echo 'Valid gres options are:'; echo gpu >&2",
            "Valid gres options are: gpu",
        ),
    ] {
        let fake = Fake::new();
        fake.program("sinfo", "true");
        fake.program("sbatch", &format!("cat >/dev/null; {answer}"));
        let refusal = fake
            .slurm()
            .submit(&request(fake.dir.path()), ready(Ok(())))
            .await
            .unwrap_err();
        assert_eq!(refusal.kind, RefusalKind::NoJobId, "{answer}");
        assert!(refusal.words.ends_with(printed), "{refusal}");
    }
}

#[tokio::test]
async fn nothing_is_submitted_before_the_partitions_limits_are_known() {
    let fake = Fake::new();
    fake.program("sbatch", "cat >/dev/null; echo 1");
    fake.program(
        "sinfo",
        "echo 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1",
    );
    let slurm = fake.slurm();
    let refusal = slurm
        .submit(&request(fake.dir.path()), ready(Ok(())))
        .await
        .unwrap_err();
    assert_eq!(refusal.kind, RefusalKind::ControllerAway);
    assert!(!fake.calls().contains("--parsable"), "{}", fake.calls());
    fake.program("sinfo", "true");
    slurm
        .submit(&request(fake.dir.path()), ready(Ok(())))
        .await
        .unwrap();
}

#[tokio::test]
async fn who_may_not_submit_any_more_after_the_wait_submits_nothing() {
    let fake = Fake::new();
    fake.program("sinfo", "true");
    fake.program("sbatch", "cat >/dev/null; echo 1");
    let slurm = Slurm::new(Settings {
        path: format!("{}:/usr/bin:/bin", fake.dir.path().display()),
        submit_burst: 1,
        submit_per_second: 5.0,
        ..Settings::default()
    });
    let began = tokio::time::Instant::now();
    let request = request(fake.dir.path());
    slurm.submit(&request, ready(Ok(()))).await.unwrap();
    let too_late = async {
        let waited = began.elapsed();
        Err(Refusal::permanent(format!(
            "asked after {} ms",
            waited.as_millis() / 200 * 200
        )))
    };
    let refusal = slurm.submit(&request, too_late).await.unwrap_err();
    assert!(!refusal.words.ends_with("after 0 ms"), "{}", refusal.words);
    assert_eq!(fake.calls().matches("--parsable").count(), 1);
}

#[tokio::test]
async fn cancel_names_the_job_too_and_forgives_what_is_gone() {
    let fake = Fake::new();
    fake.program(
        "scancel",
        "echo 'scancel: error: Kill job error on job id 4: Invalid job id specified' >&2; exit 1",
    );
    let slurm = fake.slurm();
    for how in [
        Cancel::Queued,
        Cancel::Stop,
        Cancel::Terminate,
        Cancel::Kill,
    ] {
        slurm.cancel(&named("4", "x"), how).await.unwrap();
    }
    let expected = "--name=knoc-rec-x --state=PENDING 4\n--name=knoc-rec-x --batch --signal=USR1 4\n--name=knoc-rec-x --batch --signal=TERM 4\n--name=knoc-rec-x 4\n";
    assert_eq!(fake.calls(), expected);
    fake.program(
        "scancel",
        "echo 'Unable to contact slurm controller' >&2; exit 1",
    );
    slurm
        .cancel(&named("4", "x"), Cancel::Kill)
        .await
        .unwrap_err();
}

#[tokio::test]
async fn find_looks_in_both_places_and_does_not_guess() {
    let fake = Fake::new();
    fake.with_directory("squeue", "squeue-end.txt")
        .with_directory("sacct", "sacct-end.txt");
    let uid = PodUid::try_from("rec-failed").unwrap();
    let found = fake.slurm().find(&uid, SINCE).await.unwrap();
    assert_eq!(
        found.iter().map(|job| job.id.as_str()).collect::<Vec<_>>(),
        ["4"]
    );
    fake.program(
        "sacct",
        "echo 'Problem talking to the database' >&2; exit 1",
    );
    fake.slurm().find(&uid, SINCE).await.unwrap_err();
    fake.program(
        "sacct",
        "echo 'Slurm accounting storage is disabled' >&2; exit 1",
    );
    assert_eq!(fake.slurm().find(&uid, SINCE).await.unwrap().len(), 1);
}

/// Job 7 as sbatch named it to us.
fn submitted(call: i64) -> JobRef {
    JobRef {
        call: Some((call, call)),
        ..job("7", "running")
    }
}

/// What `scontrol update`, a submit plugin or a wrapper of sbatch may do to a job.
#[tokio::test]
async fn a_job_is_ours_by_its_id_whatever_it_is_called() {
    let (name, comment) = ((NAME, "mine"), (COMMENT, "my comment"));
    for changes in [vec![name], vec![comment], vec![name, comment]] {
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

/// The id and the time of sbatch's call against the controller's answer about the job.
#[tokio::test]
async fn an_id_that_was_given_again_is_a_strangers() {
    let both = [(NAME, "mine"), (COMMENT, "my comment")];
    let pinned = JobRef {
        submitted_at: Some(SUBMITTED - 9),
        ..submitted(SUBMITTED - 9)
    };
    let cases = [
        // Submitted ten minutes before: a stranger, unless its directory is the pod's.
        (submitted(SUBMITTED - 600), "/home/hpcuser", 0, false),
        (submitted(SUBMITTED - 600), "/pods/rec-running", 0, true),
        // Slurm showed the job before, with another submit time.
        (pinned.clone(), "/home/hpcuser", 0, false),
        (pinned, "/home/hpcuser", 1, true),
        // A record of an older agent knows no times.
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
async fn a_doubt_that_nobody_settles_stays_one() {
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

/// The accounting has a row for every life of a job that was requeued.
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
    // What follows a life that simply ended is a stranger's.
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

/// A job that was renamed is looked at before it is cancelled, and a stranger is left alone.
#[tokio::test]
async fn a_renamed_job_is_cancelled_and_a_stranger_never() {
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
    // What cannot be looked at is cancelled only if it has our name.
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

#[tokio::test]
async fn doctor_names_what_hides_the_nodes() {
    let fake = Fake::new();
    fake.program("sinfo", "true").program("sacct", "true");
    fake.program("scontrol", "echo 'PrivateData             = nodes,usage'");
    let finding = |all: Vec<knoc_proto::pb::Finding>| {
        all.into_iter()
            .find(|one| one.check == "slurm: controller")
            .unwrap()
    };
    let found = finding(fake.slurm().checks().await);
    assert!(
        !found.ok && found.detail.contains("PrivateData=nodes,usage"),
        "{found:?}"
    );
    fake.program("scontrol", "echo 'PrivateData             = none'");
    let found = finding(fake.slurm().checks().await);
    assert!(found.detail.contains("no partition"), "{found:?}");
}

#[tokio::test]
async fn local_disk_is_asked_for_where_the_site_has_told_slurm_of_it() {
    for (tmp, passed) in [("0", false), ("2048", true)] {
        let fake = Fake::new();
        fake.changed(
            "sinfo",
            "sinfo.txt",
            &[("|64000|0|", &format!("|64000|{tmp}|"))],
        );
        fake.program("sbatch", "cat >/dev/null; echo 1");
        let mut request = request(fake.dir.path());
        request.spec = std::sync::Arc::new(knoc_proto::pb::PodSpec {
            job: Some(knoc_proto::pb::JobRequest {
                ephemeral_storage_bytes: 1 << 30,
                ..Default::default()
            }),
            ..Default::default()
        });
        let submitted = fake.slurm().submit(&request, ready(Ok(()))).await.unwrap();
        assert_eq!(
            fake.calls().contains("--tmp=1024M"),
            passed,
            "{}",
            fake.calls()
        );
        assert_eq!(
            submitted.notes.iter().any(|note| note.contains("TmpDisk")),
            !passed
        );
    }
}
