//! Tests with scripts in place of sbatch and scancel.

use std::path::{Path, PathBuf};

use knoc_contract::jobdir::atomic;

use super::*;

/// How long a script may take on a busy machine.
const SOON: Duration = Duration::from_mins(2);

fn program(dir: &Path, name: &str, script: &str) -> PathBuf {
    let path = dir.join(name);
    let text = format!("#!/bin/sh\ncd {}\n{script}\n", dir.display());
    atomic::write(&path, text.as_bytes(), 0o700).unwrap();
    path
}

fn jobs(dir: &Path, sbatch: &str) -> OwnJobs {
    let cancel = r#"echo "$@" >cancelling; mv cancelling cancelled"#;
    let settings = Settings {
        sbatch: program(dir, "sbatch", sbatch),
        scancel: program(dir, "scancel", cancel),
        prelude: "module load apptainer\n".to_owned(),
        partition: Some("main".to_owned()),
        account: Some("physics".to_owned()),
        ..Settings::default()
    };
    let size = Size {
        partition: None,
        cpus: 3,
        memory: (1 << 30) + 1,
        time: Duration::from_secs(61),
    };
    OwnJobs::new(settings, size)
}

fn command(jobs: &OwnJobs, dir: &Path) -> Command {
    let args = ["build", "two words", "image.sif"];
    jobs.command("7f", dir, Path::new("/opt/app'tainer"), &args)
}

/// Waits until a script has written the file, and returns what it has written.
async fn written(path: PathBuf) -> String {
    let look = async {
        loop {
            if let Ok(text) = std::fs::read_to_string(&path) {
                return text;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(SOON, look).await.unwrap()
}

#[tokio::test]
async fn a_job_has_its_limits_and_runs_the_program_after_the_prelude() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = jobs(dir.path(), r#"printf '%s\n' "$@" >args; cat >script"#);
    jobs.wait("7f", command(&jobs, dir.path())).await.unwrap();
    let args = std::fs::read_to_string(dir.path().join("args")).unwrap();
    let expected = format!(
        "--wait\n--nodes=1\n--ntasks=1\n--no-requeue\n--export=ALL\n--propagate=NONE\n--output=job.out\n--cpus-per-task=3\n\
         --mem=1025M\n--time=2\n--partition=main\n--account=physics\n--job-name=knoc_image_7f\n--chdir={}\n",
        dir.path().display()
    );
    assert_eq!(args, expected);
    let script = std::fs::read_to_string(dir.path().join("script")).unwrap();
    assert_eq!(
        script,
        "#!/bin/sh\nmodule load apptainer\nexec '/opt/app'\\''tainer' 'build' 'two words' 'image.sif'\n"
    );
    assert!(!dir.path().join("cancelled").exists());
}

#[tokio::test]
async fn a_job_that_nobody_waits_for_any_more_is_cancelled() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = jobs(dir.path(), ": >submitted; exec sleep 600");
    tokio::select! {
        ended = jobs.wait("7f", command(&jobs, dir.path())) => panic!("{ended:?}"),
        _ = written(dir.path().join("submitted")) => {}
    }
    let args = written(dir.path().join("cancelled")).await;
    assert_eq!(args, "--name=knoc_image_7f\n");
}

#[tokio::test]
async fn a_job_that_takes_too_long_is_cancelled_and_one_that_slurm_refuses_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = jobs(
        dir.path(),
        r#"case "$*" in *late*) exec sleep 600 ;; esac; echo 'sbatch: error: Invalid account' >&2; exit 1"#,
    );
    let refused = jobs.wait("7f", command(&jobs, dir.path())).await;
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("Invalid account"), "{refused}");
    let late = command(&jobs, dir.path()).arg("late");
    let late = late.deadline(Duration::from_millis(200));
    jobs.wait("8a", late).await.unwrap_err();
    let args = written(dir.path().join("cancelled")).await;
    assert_eq!(args, "--name=knoc_image_8a\n");
}

/// Login nodes kill processes, and a controller that is busy does not answer: the job may be there all the same. When the wait has
/// ended it is cancelled, because the next one of this folder has the same name.
#[tokio::test]
async fn a_job_of_which_nothing_is_known_is_cancelled() {
    let unanswered = "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1";
    for script in ["kill -KILL $$", unanswered] {
        let dir = tempfile::tempdir().unwrap();
        let jobs = jobs(dir.path(), script);
        jobs.wait("7f", command(&jobs, dir.path()))
            .await
            .unwrap_err();
        let args = std::fs::read_to_string(dir.path().join("cancelled")).unwrap();
        assert_eq!(args, "--name=knoc_image_7f\n", "{script}");
    }
}
