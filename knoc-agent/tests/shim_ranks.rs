//! Pods of several ranks: the real shim and the real helpers, with a script in place of srun that starts all ranks on
//! this host.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod harness;

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf};

use harness::{Job, running, sh, terminated};
use knoc_proto::pb::{self, OutcomeKind};
use nix::sys::signal::Signal;

/// A job whose container has so many ranks, and the folder of its srun.
async fn job(ranks: i32, script: &str) -> (Job, PathBuf) {
    let mut job = Job::new(vec![sh("main", script)]);
    let folder = job.state.root().join("bin");
    fs::create_dir(&folder).unwrap();
    let srun = folder.join("srun");
    fs::copy(
        concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/srun.sh"),
        &srun,
    )
    .unwrap();
    fs::set_permissions(&srun, fs::Permissions::from_mode(0o755)).unwrap();
    job.file.srun = srun.to_str().unwrap().to_owned();
    job.spec().job = Some(pb::JobRequest {
        nodes: 1,
        ntasks: ranks,
        mpi: Some(pb::Mpi::default()),
        ..pb::JobRequest::default()
    });
    // It writes the pod's keys, which the helpers need. No agent answers, and none is needed.
    drop(job.agent().await);
    fs::remove_file(job.state.endpoint()).unwrap();
    (job, folder)
}

fn sorted(log: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = log.lines().collect();
    lines.sort_unstable();
    lines
}

#[tokio::test]
async fn every_rank_runs_with_its_number_and_writes_labelled_lines() {
    let (mut job, folder) = job(
        3,
        "echo \"rank $SLURM_PROCID of $SLURM_NTASKS has $MARK, jwt '$SLURM_JWT'\"",
    )
    .await;
    job.set_env("main", vec![("MARK", b"k3y of the pod".to_vec())]);
    job.start();
    assert_eq!(job.code().await, 0, "{}", job.state_words());
    assert_eq!(job.report().outcome(), OutcomeKind::Succeeded);
    let log = job.log("main", 0);
    let wanted: Vec<String> = (0..3)
        .map(|rank| format!("{rank}: rank {rank} of 3 has k3y of the pod, jwt ''"))
        .collect();
    assert_eq!(sorted(&log), wanted);
    // Neither argv nor the environment of srun has anything of the pod.
    let seen = fs::read_to_string(folder.join("seen")).unwrap();
    assert!(seen.contains("--ntasks=3"), "{seen}");
    for secret in ["k3y of the pod", "MARK", "LEAKED", "echo"] {
        assert!(!seen.contains(secret), "{secret} in {seen}");
    }
}

#[tokio::test]
async fn the_first_rank_that_fails_ends_the_others_and_decides() {
    let script = "if test \"$SLURM_PROCID\" = 1; then exit 3; fi; sleep 600 & wait";
    let (mut job, _folder) = job(3, script).await;
    job.start();
    assert_eq!(job.code().await, 64, "{}", job.state_words());
    let ended = terminated(&job.report().containers[0]);
    assert_eq!((ended.exit_code, ended.reason.as_str()), (3, "Error"));
    assert!(ended.message.contains("rank 1 on"), "{}", ended.message);
}

#[tokio::test]
async fn a_stop_reaches_every_rank_within_the_grace_period() {
    let script = "trap 'echo stopped; exit 0' TERM; echo ready; while :; do sleep 0.05; done";
    let (mut job, _folder) = job(2, script).await;
    job.start();
    job.until(running).await;
    // Both programs have their handlers.
    let began = std::time::Instant::now();
    while job.log("main", 0).matches("ready").count() < 2 {
        assert!(began.elapsed() < harness::DEADLINE, "{}", job.state_words());
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    job.signal(Signal::SIGTERM);
    job.wait().await;
    let log = job.log("main", 0);
    assert_eq!(
        sorted(&log),
        ["0: ready", "0: stopped", "1: ready", "1: stopped"]
    );
    assert_eq!(terminated(&job.report().containers[0]).exit_code, 0);
}

#[tokio::test]
async fn ranks_that_ignore_the_stop_are_killed() {
    let (mut job, _folder) = job(2, "trap '' TERM; while :; do sleep 0.05; done").await;
    job.spec().termination_grace_period_seconds = 1;
    job.start();
    job.until(running).await;
    job.signal(Signal::SIGTERM);
    job.wait().await;
    assert_eq!(terminated(&job.report().containers[0]).exit_code, 137);
}

#[tokio::test]
async fn what_srun_says_is_why_the_container_cannot_run() {
    let (mut job, folder) = job(2, "true").await;
    fs::File::create(folder.join("fails")).unwrap();
    job.start();
    assert_eq!(job.code().await, 64, "{}", job.state_words());
    let ended = terminated(&job.report().containers[0]);
    assert_eq!(ended.reason, "ContainerCannotRun");
    assert!(
        ended.message.contains("no such plugin"),
        "{}",
        ended.message
    );
}

#[tokio::test]
async fn a_program_that_is_missing_is_named_with_its_rank() {
    let (mut job, _folder) = job(2, "").await;
    job.spec().containers[0].command = vec!["/no/such/program".to_owned()];
    job.start();
    assert_eq!(job.code().await, 64, "{}", job.state_words());
    let ended = terminated(&job.report().containers[0]);
    assert_eq!(
        (ended.exit_code, ended.reason.as_str()),
        (128, "StartError")
    );
    assert!(ended.message.starts_with("rank "), "{}", ended.message);
    assert!(
        ended.message.contains("/no/such/program"),
        "{}",
        ended.message
    );
}

#[tokio::test]
async fn the_descriptor_of_pmi_reaches_the_program() {
    let (mut job, _folder) = job(1, "cat \"/proc/self/fd/$PMI_FD\"; echo $PMI_RANK").await;
    job.start();
    assert_eq!(job.code().await, 0, "{}", job.state_words());
    assert_eq!(job.log("main", 0), "0: from the process manager\n0: 0\n");
}

#[tokio::test]
async fn a_site_without_srun_is_named() {
    let (mut job, _folder) = job(2, "true").await;
    job.file.srun.clear();
    job.start();
    assert_eq!(job.code().await, 64, "{}", job.state_words());
    let ended = terminated(&job.report().containers[0]);
    assert!(ended.message.contains("names no srun"), "{}", ended.message);
}
