//! Tests of rounds with programs that print recorded output.

mod identity;

use std::{
    future::ready,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use knoc_proto::ids::PodUid;

use super::*;
use crate::scheduler::{
    Cancel, JobExit, JobState, Scheduler, SubmitError, SubmitErrorKind, SubmitRequest,
    slurm::Settings,
};

/// A directory with scripts in place of Slurm's commands.
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

    /// Prints a recorded output with a column for the working directory.
    fn with_directory(&self, name: &str, file: &str) -> &Self {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/slurm-24.11");
        let file = root.join(file).display().to_string();
        self.program(name, &format!("sed 's:$:|/home/hpcuser:' '{file}'"))
    }

    /// Prints a recorded output with `changes` applied.
    fn changed(&self, name: &str, file: &str, changes: &[(&str, &str)]) -> &Self {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/slurm-24.11");
        let mut text = std::fs::read_to_string(root.join(file)).unwrap();
        for (from, to) in changes {
            assert!(text.contains(from), "{from}");
            text = text.replace(from, to);
        }
        let answer = self.dir.path().join(format!("{name}.txt"));
        std::io::Write::write_all(
            &mut std::fs::File::create(&answer).unwrap(),
            text.as_bytes(),
        )
        .unwrap();
        self.program(name, &format!("cat '{}'", answer.display()))
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

/// The same job, if it was last seen with the name we gave it.
fn named(id: &str, case: &str) -> JobRef {
    JobRef {
        named: true,
        ..job(id, case)
    }
}

/// A time before the recordings.
const SINCE: Timestamp = Timestamp::UNIX_EPOCH;
/// When the recorded job 7 was submitted.
const SUBMITTED: i64 = 1_795_373_120;
/// The name and the comment of the recorded job 7.
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
        "squeue's, if sacct has none"
    );
    assert_eq!(find(&round, &running).state, JobState::Running);
    assert_eq!(
        round.missing,
        [gone, reused],
        "an ID that belongs to another job by now is missing"
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
    assert!(matches!(&round.accounting, Accounting::Away(message) if message.contains("refused")));
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

fn shape(spec: knoc_proto::pb::PodSpec) -> std::sync::Arc<knoc_proto::pod::PodSpec> {
    let uid = PodUid::try_from("p").unwrap();
    std::sync::Arc::new(knoc_proto::pod::PodSpec::accepted_before(uid, spec))
}

fn request(dir: &Path) -> SubmitRequest {
    SubmitRequest {
        uid: PodUid::try_from("p").unwrap(),
        spec: shape(knoc_proto::pb::PodSpec::default()),
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
        // A wrapper that prints a number of its own: the job's number is not guessed.
        ("echo 4711; echo 12", "4711 12"),
        (
            "echo 'Valid gres options are:'; echo gpu >&2",
            "Valid gres options are: gpu",
        ),
    ] {
        let fake = Fake::new();
        fake.program("sinfo", "true");
        fake.program("sbatch", &format!("cat >/dev/null; {answer}"));
        let error = fake
            .slurm()
            .submit(&request(fake.dir.path()), ready(Ok(())))
            .await
            .unwrap_err();
        assert_eq!(error.kind, SubmitErrorKind::NoJobId, "{answer}");
        assert!(error.message.ends_with(printed), "{error}");
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
    let error = slurm
        .submit(&request(fake.dir.path()), ready(Ok(())))
        .await
        .unwrap_err();
    assert_eq!(error.kind, SubmitErrorKind::ControllerAway);
    assert!(!fake.calls().contains("--parsable"), "{}", fake.calls());
    fake.program("sinfo", "true");
    slurm
        .submit(&request(fake.dir.path()), ready(Ok(())))
        .await
        .unwrap();
}

#[tokio::test]
async fn nothing_is_submitted_if_it_is_no_longer_allowed_after_the_wait() {
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
        Err(SubmitError::permanent(format!(
            "asked after {} ms",
            waited.as_millis() / 200 * 200
        )))
    };
    let error = slurm.submit(&request, too_late).await.unwrap_err();
    assert!(!error.message.ends_with("after 0 ms"), "{}", error.message);
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
async fn local_disk_is_requested_if_slurm_knows_it() {
    for (tmp, passed) in [("0", false), ("2048", true)] {
        let fake = Fake::new();
        fake.changed(
            "sinfo",
            "sinfo.txt",
            &[("|64000|0|", &format!("|64000|{tmp}|"))],
        );
        fake.program("sbatch", "cat >/dev/null; echo 1");
        let mut request = request(fake.dir.path());
        request.spec = shape(knoc_proto::pb::PodSpec {
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
