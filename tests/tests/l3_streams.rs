//! Bytes through the real stack: logs and exec, with and without a terminal.

use std::{collections::BTreeSet, fmt::Write as _, time::Duration};

use anyhow::{Context as _, ensure};
use knoc_tests::{
    Background, PodBuilder, Terminal, World, wait_for,
    world::{SOON, exit_code},
};
use sha2::{Digest as _, Sha256};

const MINUTES: Duration = Duration::from_mins(6);

#[tokio::test]
async fn a_hundred_megabytes_of_log_are_intact() -> anyhow::Result<()> {
    const LINES: usize = 1_000_000;
    let world = World::new("log").await?;
    let filler = "x".repeat(90);
    let script = format!(
        "awk 'BEGIN {{ for (i = 0; i < {LINES}; i++) printf \"%08d %s\\n\", i, \"{filler}\" }}'"
    );
    let pod = PodBuilder::new("talker").memory("256Mi").sh(&script);
    world.create(&pod).await?;
    world.wait_phase("talker", "Succeeded", MINUTES).await?;
    let log = world
        .kubectl(["logs", "talker"])
        .deadline(MINUTES)
        .ok()
        .await?
        .stdout;
    let mut expected = Sha256::new();
    let mut line = String::new();
    for number in 0..LINES {
        line.clear();
        writeln!(line, "{number:08} {filler}")?;
        expected.update(line.as_bytes());
    }
    ensure!(log.len() == LINES * 100, "{} bytes", log.len());
    ensure!(
        Sha256::digest(&log) == expected.finalize(),
        "the bytes differ"
    );
    world.finish().await
}

#[tokio::test]
async fn logs_follow_tail_and_limit() -> anyhow::Result<()> {
    let world = World::new("follow").await?;
    let script = "for i in 1 2 3; do echo line $i; done; until [ -e /tmp/go ]; do sleep 0.1; done; \
                  for i in 4 5 6; do echo line $i; sleep 0.5; done";
    let uid = world
        .running(&PodBuilder::new("counter").sh(script))
        .await?;
    let mut follower = Background::start(world.kubectl(["logs", "-f", "counter"]))?;
    follower.expect("line 3\n").await?;
    let go = world.exec(&uid, "main", ["touch", "/tmp/go"]);
    go.ok_or_killed().await?;
    let code = follower.exit_code(SOON).await?;
    let all = follower.shown();
    ensure!(
        code == 0 && all == "line 1\nline 2\nline 3\nline 4\nline 5\nline 6\n",
        "{code}: {all}"
    );
    world.wait_phase("counter", "Succeeded", SOON).await?;
    let tail = world.kubectl(["logs", "--tail=2", "counter"]).ok().await?;
    ensure!(tail.text() == "line 5\nline 6", "{tail}");
    let limited = world
        .kubectl(["logs", "--limit-bytes=8", "counter"])
        .ok()
        .await?;
    ensure!(limited.stdout == b"line 1\nl", "{limited}");
    let stamped = world
        .kubectl(["logs", "--timestamps", "--tail=1", "counter"])
        .ok()
        .await?;
    ensure!(stamped.text().ends_with("Z line 6"), "{stamped}");
    world.finish().await
}

#[tokio::test]
async fn exec_carries_binary_input_both_ways() -> anyhow::Result<()> {
    const SIZE: usize = 20 << 20;
    let world = World::new("exec").await?;
    let uid = world
        .running(&PodBuilder::new("cat").sh("sleep 600"))
        .await?;
    let mut bytes = vec![0; SIZE];
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&rand::random::<u64>().to_le_bytes());
    }
    let echo = world
        .exec(&uid, "main", ["cat"])
        .stdin(bytes.clone())
        .deadline(MINUTES)
        .ok()
        .await?;
    ensure!(
        echo.stdout.len() == SIZE,
        "{} bytes came back",
        echo.stdout.len()
    );
    ensure!(
        Sha256::digest(&echo.stdout) == Sha256::digest(&bytes),
        "the bytes differ"
    );
    let sum = world
        .exec(&uid, "main", ["sha256sum"])
        .stdin(bytes.clone())
        .deadline(MINUTES)
        .ok()
        .await?;
    let expected = format!("{:x}", Sha256::digest(&bytes));
    ensure!(sum.text().starts_with(&expected), "{sum}");
    world.finish().await
}

#[tokio::test]
async fn exec_keeps_exit_code_and_streams_apart() -> anyhow::Result<()> {
    let world = World::new("exec-code").await?;
    let uid = world
        .running(&PodBuilder::new("target").sh("sleep 600"))
        .await?;
    let output = world
        .exec(&uid, "main", ["sh", "-c", "echo out; echo err >&2; exit 9"])
        .output()
        .await?;
    ensure!(
        output.code == 9 && output.stdout == b"out\n" && output.stderr.contains("err\n"),
        "{output}"
    );
    let missing = world
        .exec(&uid, "main", ["/no/such/program"])
        .output()
        .await?;
    ensure!(
        missing.code != 0 && missing.stderr.contains("/no/such/program"),
        "{missing}"
    );
    world.finish().await
}

#[tokio::test]
async fn exec_on_a_terminal_resizes_interrupts_and_passes_the_exit_code() -> anyhow::Result<()> {
    let world = World::new("terminal").await?;
    let uid = world
        .running(&PodBuilder::new("shell").sh("sleep 600"))
        .await?;
    let args = ["exec", "-it", uid.as_str(), "-c", "main", "--", "sh"];
    let mut terminal = Terminal::start("knocctl", &args, 24, 80)?;
    terminal.type_text("tty; stty size; echo be''gun\n")?;
    terminal.expect("begun").await?;
    terminal.expect("24 80").await?;
    terminal.expect("/dev/pts/").await?;
    terminal.resize(50, 132)?;
    terminal.expect_size("50 132").await?;
    ensure!(terminal.interrupt_and_exit_with_7().await? == Some(7));
    world.finish().await
}

#[tokio::test]
async fn kill_from_inside_stops_a_program_that_handles_term_and_no_other() -> anyhow::Result<()> {
    let world = World::new("kill").await?;
    let script = "trap 'echo told; exit 3' TERM; echo ready; while :; do sleep 0.1; done";
    let polite = world.running(&PodBuilder::new("polite").sh(script)).await?;
    let deaf = world
        .running(&PodBuilder::new("deaf").command(["sleep", "600"]))
        .await?;
    wait_for("ready in the log", SOON, async || {
        let log = world.logs("polite", "main").await?;
        if log.contains("ready") {
            Ok(())
        } else {
            Err(anyhow::anyhow!(log))
        }
    })
    .await?;
    world
        .exec(&polite, "main", ["kill", "-TERM", "1"])
        .ok_or_killed()
        .await?;
    let ended = world.wait_phase("polite", "Failed", SOON).await?;
    ensure!(exit_code(&ended, "main") == Some(3), "{:?}", ended.status);
    ensure!(world.logs("polite", "main").await?.ends_with("told\n"));
    world
        .exec(&deaf, "main", ["kill", "-TERM", "1"])
        .ok()
        .await?;
    let alive = world
        .exec(&deaf, "main", ["cat", "/proc/1/cmdline"])
        .ok()
        .await?;
    ensure!(alive.stdout == b"sleep\x00600\x00", "{alive}");
    world.finish().await
}

#[tokio::test]
async fn exec_is_inside_the_container() -> anyhow::Result<()> {
    let world = World::new("inside").await?;
    let pod = PodBuilder::new("inside")
        .command(["sleep", "600"])
        .set("workingDir", serde_json::json!("/var/tmp"))
        .set(
            "env",
            serde_json::json!([{"name": "COLOUR", "value": "two words"}]),
        );
    let uid = world.running(&pod).await?;
    let read = async |command: &str| -> anyhow::Result<String> {
        Ok(world
            .exec(&uid, "main", ["sh", "-c", command])
            .ok()
            .await?
            .text())
    };
    for namespace in ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"] {
        let both = read(&format!(
            "readlink /proc/1/ns/{namespace}; readlink /proc/self/ns/{namespace}"
        ))
        .await?;
        let (first, own) = both.split_once('\n').with_context(|| both.clone())?;
        ensure!(first == own, "{namespace}: {both}");
    }
    let cgroups = read("cat /proc/1/cgroup; echo; cat /proc/self/cgroup").await?;
    let (first, own) = cgroups
        .split_once("\n\n")
        .with_context(|| cgroups.clone())?;
    ensure!(first == own, "{cgroups}");
    let folders = read("readlink /proc/1/cwd; pwd").await?;
    ensure!(folders == "/var/tmp\n/var/tmp", "{folders}");
    let variables = async |process: &str| -> anyhow::Result<BTreeSet<Vec<u8>>> {
        let path = format!("/proc/{process}/environ");
        let bytes = world.exec(&uid, "main", ["cat", &path]).ok().await?.stdout;
        Ok(bytes.split(|byte| *byte == 0).map(<[u8]>::to_vec).collect())
    };
    let (first, own) = (variables("1").await?, variables("self").await?);
    ensure!(first == own, "{first:?} and {own:?}");
    ensure!(first.contains(b"COLOUR=two words".as_slice()), "{first:?}");
    world.finish().await
}
