//! Pods of several ranks: the real shim and the real helpers, with a script in place of srun that starts all ranks on
//! this host.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod harness;

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use harness::{
    Agent, DEADLINE, Job, running, sh,
    streams::{command, exec, message, stop},
    terminated,
};
use knoc_link::{
    bulk::{self, RawClient},
    pinned::{self, KeyPair},
};
use knoc_proto::{
    pb::{self, ExecStart, OutcomeKind, exec_input::Input, shim_client::ShimClient},
    reason::ErrorReason,
};
use nix::{sys::signal::Signal, unistd::Pid};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;

/// A job whose container has so many ranks, and the folder of its srun. No agent answers, and none is needed.
async fn job(ranks: i32, script: &str) -> (Job, PathBuf) {
    let (job, folder, agent) = linked(ranks, script).await;
    drop(agent);
    fs::remove_file(job.state.endpoint()).unwrap();
    (job, folder)
}

/// The same with an agent.
async fn linked(ranks: i32, script: &str) -> (Job, PathBuf, Agent) {
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
    // It writes the pod's keys, which the helpers need.
    let agent = job.agent().await;
    (job, folder, agent)
}

/// Waits until the log contains `text` so many times.
async fn logged(job: &Job, text: &str, times: usize) {
    let began = Instant::now();
    while job.log("main", 0).matches(text).count() < times {
        assert!(began.elapsed() < DEADLINE, "{}", job.state_words());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Reads a file once it has a whole line.
async fn line(path: &Path) -> String {
    let began = Instant::now();
    loop {
        let text = fs::read_to_string(path).unwrap_or_default();
        if let Some(line) = text.strip_suffix('\n') {
            return line.to_owned();
        }
        assert!(began.elapsed() < DEADLINE, "{} is empty", path.display());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn wait_until_gone(pid: i32) {
    let began = Instant::now();
    while nix::sys::signal::kill(Pid::from_raw(pid), None).is_ok() {
        assert!(began.elapsed() < DEADLINE, "process {pid} runs");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn in_rank(rank: u32, words: &[&str]) -> ExecStart {
    ExecStart {
        rank,
        ..command(words)
    }
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
    logged(&job, "ready", 2).await;
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
    let script = "trap '' TERM; echo ready; while :; do sleep 0.05; done";
    let (mut job, _folder) = job(2, script).await;
    job.spec().termination_grace_period_seconds = 1;
    job.start();
    job.until(running).await;
    logged(&job, "ready", 2).await;
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

const SLEEPER: &str = "trap 'exit 0' TERM; echo ready; while :; do sleep 0.05; done";

#[tokio::test]
async fn commands_run_in_every_rank_with_their_input_and_exit_code() {
    let (mut job, folder, mut agent) = linked(2, SLEEPER).await;
    job.start();
    let mut shim = agent.shim().await;
    job.until(running).await;
    logged(&job, "ready", 2).await;
    let data: Vec<u8> = (0..5_u32 << 20).map(|n| n.to_le_bytes()[0]).collect();
    let start = ExecStart {
        stdin: true,
        ..in_rank(1, &["cat"])
    };
    let ran = exec(&mut shim, start, &data).await;
    assert!(ran.code() == 0 && ran.stdout == data);
    let script = "echo in $SLURM_PROCID; echo err >&2; exit 5";
    let ran = exec(&mut shim, in_rank(1, &["sh", "-c", script]), b"").await;
    assert_eq!(
        (ran.text(), ran.stderr.as_slice(), ran.code()),
        ("in 1\n", &b"err\n"[..], 5)
    );
    // Rank 0, as for kubectl exec: it has its own variables, too.
    let script = "echo in $SLURM_PROCID";
    let ran = exec(&mut shim, in_rank(0, &["sh", "-c", script]), b"").await;
    assert_eq!((ran.text(), ran.code()), ("in 0\n", 0));
    let missing = exec(&mut shim, in_rank(1, &["no-such-program"]), b"").await;
    assert_eq!(missing.code(), 127);
    let start = message(Input::Start(in_rank(2, &["true"])));
    let refused = shim.exec(tokio_stream::iter([start])).await.unwrap_err();
    assert_eq!(ErrorReason::of(&refused), Some(ErrorReason::NotRunning));
    assert!(
        refused
            .message()
            .contains("the ranks of this container are 0 to 1"),
        "{refused}"
    );
    // What runs beside a rank ends with the container.
    let file = folder.join("command");
    let script = format!("echo $$ >{}; exec sleep 600", file.display());
    let start = in_rank(1, &["sh", "-c", &script]);
    let mut other = shim.clone();
    let stopping = async {
        line(&file).await;
        stop(&mut shim).await;
    };
    let (ended, ()) = tokio::join!(exec(&mut other, start, b""), stopping);
    assert_eq!(ended.code(), 137);
    assert_eq!(job.code().await, 0, "{}", job.state_words());
}

#[tokio::test]
async fn a_client_that_disconnects_ends_its_command_in_another_rank() {
    let (mut job, folder, mut agent) = linked(2, SLEEPER).await;
    job.start();
    let channel = agent.channel().await;
    // As the agent calls a shim: dropping the answer cancels the call.
    let mut shim = ShimClient::new(RawClient::new(channel.clone()));
    job.until(running).await;
    logged(&job, "ready", 2).await;
    let (sender, inputs) = mpsc::channel(1);
    let file = folder.join("command");
    // It reads none of its input, which is more than all buffers on its way take.
    let script = format!("echo $$ >{}; exec sleep 600", file.display());
    let start = ExecStart {
        stdin: true,
        ..in_rank(1, &["sh", "-c", &script])
    };
    sender.send(message(Input::Start(start))).await.unwrap();
    let inputs = bulk::request(ReceiverStream::new(inputs));
    let output = shim.exec(inputs).await.unwrap();
    let pid = line(&file).await.parse().unwrap();
    let flood = async {
        loop {
            let piece = message(Input::Stdin(vec![0; 60_000].into()));
            if sender.send(piece).await.is_err() {
                return;
            }
        }
    };
    let full = tokio::time::timeout(Duration::from_secs(2), flood).await;
    assert!(
        full.is_err(),
        "the command has read all of it, or has ended"
    );
    drop((output, sender));
    wait_until_gone(pid).await;
    stop(&mut ShimClient::new(channel)).await;
    assert_eq!(job.code().await, 0, "{}", job.state_words());
}

#[tokio::test]
async fn whoever_lacks_the_pods_key_gets_nothing_and_the_ranks_go_on() {
    let (mut job, folder) = job(
        2,
        "echo ready; while ! test -e \"$GO\"; do sleep 0.05; done",
    )
    .await;
    let go = folder.join("go");
    job.set_env("main", vec![("GO", go.to_str().unwrap().into())]);
    job.start();
    job.until(running).await;
    logged(&job, "ready", 2).await;
    let seen = fs::read_to_string(folder.join("seen")).unwrap();
    let argv = seen.lines().skip_while(|line| *line != "rank");
    let port = argv
        .skip(3)
        .find_map(|line| line.rsplit_once(':')?.1.parse::<u16>().ok());
    let address = format!("127.0.0.1:{}", port.unwrap());
    // No TLS at all.
    let mut plain = TcpStream::connect(&address).await.unwrap();
    plain.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    plain.read_to_end(&mut answer).await.ok();
    assert!(answer.len() <= 7, "{answer:?}");
    // A key of its own, by somebody who knows the pod's public key.
    let (cert, key) = job.dir.link_pair();
    let pin = KeyPair::from_files(&cert, &key).unwrap();
    let stranger = KeyPair::generate("stranger").unwrap();
    let mut dialled = pinned::dial(&address, &stranger, pin.spki()).await.unwrap();
    let hello = [0, 0, 0, 0];
    dialled.write_all(&hello).await.ok();
    let mut answer = Vec::new();
    dialled.read_to_end(&mut answer).await.ok();
    assert!(answer.is_empty(), "{answer:?}");
    fs::File::create(go).unwrap();
    assert_eq!(job.code().await, 0, "{}", job.state_words());
}

#[tokio::test]
async fn a_helper_that_is_killed_ends_its_program_and_the_other_ranks() {
    let (mut job, folder) = job(
        2,
        "echo $$$$ >\"$HERE/program-$SLURM_PROCID\"; exec sleep 600",
    )
    .await;
    job.set_env("main", vec![("HERE", folder.to_str().unwrap().into())]);
    job.start();
    let program = line(&folder.join("program-1")).await.parse().unwrap();
    let other = line(&folder.join("program-0")).await.parse().unwrap();
    job.until(running).await;
    let helper: i32 = line(&folder.join("pid-1")).await.parse().unwrap();
    nix::sys::signal::kill(Pid::from_raw(helper), Signal::SIGKILL).unwrap();
    wait_until_gone(program).await;
    wait_until_gone(other).await;
    assert_eq!(job.code().await, 64, "{}", job.state_words());
    assert_eq!(job.report().ended_by(), pb::EndedBy::LostRank);
    let ended = terminated(&job.report().containers[0]);
    assert_eq!(ended.exit_code, 137);
    assert!(
        ended.message.contains("the connection to rank 1 on") && ended.message.contains("was lost"),
        "{}",
        ended.message
    );
}

#[tokio::test]
async fn a_rank_that_was_never_started_is_no_success() {
    let (mut job, folder) = job(2, "true").await;
    fs::File::create(folder.join("lacks")).unwrap();
    job.start();
    assert_eq!(job.code().await, 64, "{}", job.state_words());
    let ended = terminated(&job.report().containers[0]);
    assert_eq!(ended.reason, "ContainerCannotRun");
    assert!(
        ended.message.contains("rank 1 was not started"),
        "{}",
        ended.message
    );
}

#[tokio::test]
async fn srun_that_does_not_end_after_its_ranks_is_ended() {
    let (mut job, folder) = job(1, "echo all done").await;
    fs::File::create(folder.join("stays")).unwrap();
    job.start();
    assert_eq!(job.code().await, 0, "{}", job.state_words());
    let log = job.log("main", 0);
    assert!(log.contains("0: all done\n"), "{log}");
}
