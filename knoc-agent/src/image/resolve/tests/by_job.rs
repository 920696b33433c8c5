//! Tests of images that Slurm jobs convert, with scripts in place of sbatch and scancel.

use super::*;
use crate::scheduler::slurm::{self, OwnJobs, Size};

/// Runs the script in the folder of the job at once, as a node would.
const SBATCH: &str = r#"echo sbatch >>"$LOG"
test -e "$REFUSE" && { echo 'sbatch: error: Batch job submission failed: Invalid account' >&2; exit 1; }
for arg; do case $arg in --chdir=*) cd "${arg#--chdir=}" ;; esac; done
exec sh >job.out 2>&1
"#;

/// Makes the image as [`APPTAINER`] does, with the header of a SIF file that has nothing else.
const WHOLE: &str = "{ head -c 32 /dev/zero; printf SIF_MAGIC; head -c 87 /dev/zero; } >image.sif";

async fn world() -> World {
    let content = one().with("library/also", &[layer()]);
    let registry = FakeRegistry::start(move |ask| content.answer(ask)).await;
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    write_program(&file("apptainer"), &format!("{APPTAINER}{WHOLE}\n"));
    write_program(&file("sbatch"), SBATCH);
    write_program(
        &file("scancel"),
        r#"echo "$@" >"$LOG.cancel"; mv "$LOG.cancel" "$LOG.cancelled""#,
    );
    let mut settings = settings(dir.path(), &registry.address, file("apptainer"));
    settings
        .env
        .insert("REFUSE".to_owned(), file("refuse").display().to_string());
    let of_slurm = slurm::Settings {
        sbatch: file("sbatch"),
        scancel: file("scancel"),
        env: settings.env.clone(),
        ..slurm::Settings::default()
    };
    let size = Size {
        partition: None,
        cpus: 1,
        memory: 1 << 30,
        time: Duration::from_mins(5),
    };
    settings.jobs = Some(Arc::new(OwnJobs::new(of_slurm, size)));
    let images = Images::new(settings);
    World {
        dir,
        registry,
        off: Arc::default(),
        images,
    }
}

#[tokio::test]
async fn a_job_converts_the_image_once_and_names_itself() {
    let world = world().await;
    let watch = PullWatch::default();
    let (policy, images) = (PullPolicy::Always, &world.images);
    let (first, second) = tokio::join!(
        images.resolve_watched("one", policy, &[], &watch),
        images.resolve("also", policy, &[]),
    );
    let (first, second) = (first.unwrap(), second.unwrap());
    assert!(first.path.is_file());
    // Both repositories have delivered it, and one job has converted it.
    assert_eq!(first.path, second.path);
    let log = std::fs::read_to_string(world.dir.path().join("log")).unwrap();
    assert_eq!(
        log,
        "sbatch\npull --disable-cache --force image.sif oci:layout\n"
    );
    assert!(!world.dir.path().join("log.cancelled").exists());
}

#[tokio::test]
async fn a_job_that_fails_or_is_refused_says_why() {
    let world = world().await;
    let ask = || world.images.resolve("one", PullPolicy::Always, &[]);
    std::fs::File::create(world.dir.path().join("fail")).unwrap();
    let failed = ask().await.unwrap_err().message;
    assert_eq!(
        failed,
        "the Slurm job that is to convert the image: While making image: no space left"
    );
    std::fs::File::create(world.dir.path().join("refuse")).unwrap();
    let refused = ask().await.unwrap_err().message;
    assert!(
        refused.starts_with("the Slurm job that is to convert the image: ")
            && refused.contains("Invalid account"),
        "{refused}"
    );
}

/// A job that was cancelled in the queue, that reached its limit, or that Slurm does not know any more, has the exit code 0.
#[tokio::test]
async fn a_job_that_leaves_no_whole_file_has_failed_whatever_slurm_says() {
    let world = world().await;
    let file = |name: &str| world.dir.path().join(name);
    let ask = || world.images.resolve("one", PullPolicy::Always, &[]);
    let refuse = |sbatch: &str| write_program(&file("sbatch"), sbatch);
    refuse("exit 0");
    let error = ask().await.unwrap_err().message;
    assert!(
        error.contains("ended before it had made the image"),
        "{error}"
    );
    // Its header is written, and promises more than there is.
    let cut = r"{ head -c 32 /dev/zero; printf SIF_MAGIC; head -c 79 /dev/zero; printf '\377\377\0\0\0\0\0\0'; } >image.sif";
    let limit =
        "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-30T01:00:00 DUE TO TIME LIMIT ***";
    refuse(&SBATCH.replace(
        "exec sh >job.out 2>&1",
        &format!(
            "{cut}\necho 'INFO:    Creating SIF file' >job.out\necho '{limit}' >>job.out\nexit 0"
        ),
    ));
    let error = ask().await.unwrap_err().message;
    assert!(error.ends_with("DUE TO TIME LIMIT ***"), "{error}");
    // The controller took it, and its node can write nothing.
    refuse("echo 'Submitted batch job 7'; exit 1");
    let error = ask().await.unwrap_err().message;
    assert!(error.contains("state directory"), "{error}");
    let kept = std::fs::read_dir(file("images")).unwrap();
    let kept = kept.filter_map(|entry| entry.unwrap().file_name().into_string().ok());
    let kept: Vec<String> = kept
        .filter(|name| Path::new(name).extension() == Some("sif".as_ref()))
        .collect();
    assert!(kept.is_empty(), "{kept:?}");
}

#[tokio::test]
async fn the_next_agent_cancels_the_job_of_a_pull_that_was_left() {
    let world = world().await;
    let left = world.dir.path().join("images/.tmp/0123456789abcdef");
    std::fs::create_dir_all(&left).unwrap();
    world.images.sweep();
    assert!(!left.exists());
    let cancelled = world.dir.path().join("log.cancelled");
    let look = async {
        while !cancelled.exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let soon = Duration::from_secs(20);
    tokio::time::timeout(soon, look).await.unwrap();
    let cancelled = std::fs::read_to_string(cancelled).unwrap();
    assert_eq!(cancelled, "--name=knoc_image_0123456789abcdef\n");
}
