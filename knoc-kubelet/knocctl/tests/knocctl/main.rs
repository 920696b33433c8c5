//! Runs the real `knocctl` against a fake agent, over the agent's unix socket.
#![expect(
    clippy::unwrap_used,
    reason = "a test: clippy exempts only #[test] functions and their modules"
)]
mod fake;
mod streams;

use std::{
    io::{Read as _, Write as _},
    os::fd::OwnedFd,
    path::Path,
    process::{Child, Output, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    process::{Pid, Signal},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize},
};
use tempfile::TempDir;
use tokio::task::JoinSet;

/// More bytes than all buffers on the way hold.
static INPUT: [u8; 300_000] = {
    let mut bytes = [0; 300_000];
    let mut value = 0u8;
    let mut at = 0;
    while at < bytes.len() {
        bytes[at] = value;
        value = if value == 250 { 0 } else { value + 1 };
        at += 1;
    }
    bytes
};

const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: demo}
spec:
  containers: [{name: main, image: busybox, command: [sleep, '1']}]
";

/// A fake agent, and the folder in which `knoc/agent.sock` is its socket.
struct World {
    folder: TempDir,
    asked: fake::Asked,
    _agent: JoinSet<()>,
}

fn world() -> World {
    let folder = tempfile::tempdir().unwrap();
    let (agent, asked) = fake::serve(&folder.path().join("knoc/agent.sock"));
    World {
        folder,
        asked,
        _agent: agent,
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "a test starts the program it tests"
)]
fn command(folder: &Path, arguments: &[&str]) -> std::process::Command {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_knocctl"));
    command
        .args(arguments)
        .env_remove("KNOCCTL_CONFIG")
        .env("HOME", folder)
        .env_remove("XDG_CONFIG_HOME")
        .env("XDG_RUNTIME_DIR", folder)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

struct Ran {
    code: i32,
    stdout: Vec<u8>,
    stderr: String,
}

impl Ran {
    fn text(&self) -> String {
        String::from_utf8(self.stdout.clone()).unwrap()
    }
}

fn ran(output: Output) -> Ran {
    Ran {
        code: output.status.code().unwrap_or(-1),
        stdout: output.stdout,
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

impl World {
    async fn run(&self, arguments: &[&str]) -> Ran {
        self.run_with(arguments, b"").await
    }

    async fn run_with(&self, arguments: &[&str], input: &'static [u8]) -> Ran {
        let mut command = command(self.folder.path(), arguments);
        let output = tokio::task::spawn_blocking(move || {
            let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
            let mut stdin = child.stdin.take().unwrap();
            // Write and read at once. If the program reads no input, it closes its end.
            std::thread::scope(|threads| {
                threads.spawn(move || stdin.write_all(input).unwrap_or_default());
                child.wait_with_output().unwrap()
            })
        });
        ran(output.await.unwrap())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_are_listed_and_described() {
    let world = world();
    let got = world.run(&["pods", "-n", "default"]).await;
    assert_eq!(got.code, 0, "{}", got.stderr);
    let text = got.text();
    assert!(
        text.starts_with("NAMESPACE") && text.lines().count() == 3,
        "{text}"
    );
    let got = world.run(&["pods", "-o", "json"]).await;
    let list: serde_json::Value = serde_json::from_slice(&got.stdout).unwrap();
    assert_eq!(list.as_array().unwrap().len(), 3);
    let got = world.run(&["describe", "team/web"]).await;
    assert!(got.text().contains("Phase:      Queued"), "{}", got.text());
    let got = world.run(&["describe", "web"]).await;
    assert_eq!(got.code, 1);
    assert!(
        got.stderr
            .contains("ambiguous: default/web (u1), team/web (u2)"),
        "{}",
        got.stderr
    );
    assert!(got.stderr.contains("hint: "), "{}", got.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn top_measures_twice_for_a_rate() {
    let world = world();
    let got = world.run(&["top", "--interval", "1", "-o", "json"]).await;
    assert_eq!(got.code, 0, "{}", got.stderr);
    let pods: serde_json::Value = serde_json::from_slice(&got.stdout).unwrap();
    assert_eq!(pods[0]["name"], "web");
    assert_eq!(pods[0]["cpu"]["nanoCores"], 1_000_000_000_u64);
    assert_eq!(
        pods[0]["containers"][1]["cpu"]["nanoCores"],
        250_000_000_u64
    );
    let got = world
        .run(&["top", "default/web", "--containers", "--interval", "1"])
        .await;
    let text = got.text();
    let main = text.lines().nth(1).unwrap_or_default();
    let cells: Vec<&str> = main.split_whitespace().collect();
    assert_eq!(
        cells[..5],
        ["default", "web", "main", "500m", "300Mi"],
        "{text}"
    );
    let asked = world.asked.all();
    assert_eq!(asked[2..], ["stats [\"u1\"]", "stats [\"u1\"]"]);
    let got = world.run(&["top", "-n", "team"]).await;
    assert!(
        got.stderr.contains("no running pod has been measured"),
        "{}",
        got.stderr
    );
    let got = world.run(&["top", "--interval", "0"]).await;
    assert_eq!(got.code, 2, "{}", got.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn info_script_and_completions() {
    let world = world();
    assert!(
        world
            .run(&["info"])
            .await
            .text()
            .contains("Site:       fake")
    );
    let got = world.run_with(&["script", "-f", "-"], POD.as_bytes()).await;
    assert_eq!(got.text(), "#!/bin/sh\nexec x\n");
    assert!(
        got.stderr.contains("submitted as: sbatch '--comment=a b'"),
        "{}",
        got.stderr
    );
    assert!(
        world
            .run(&["completions", "bash"])
            .await
            .text()
            .contains("knocctl")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_are_run_and_deleted() {
    let world = world();
    let got = world
        .run_with(&["run", "-f", "-", "--uid", "u9"], POD.as_bytes())
        .await;
    assert_eq!(
        (got.code, got.text().as_str()),
        (0, "pod default/demo accepted (uid u9)\n")
    );
    let got = world
        .run_with(&["run", "-f", "-", "--name", "web"], POD.as_bytes())
        .await;
    assert_eq!(got.code, 1);
    assert!(
        got.stderr.contains("default/web is there already"),
        "{}",
        got.stderr
    );
    let got = world.run(&["delete", "done"]).await;
    assert_eq!(got.code, 0, "{}", got.stderr);
    world.run(&["delete", "u1", "--no-wait", "--now"]).await;
    let asked = world.asked.all();
    assert_eq!(
        asked,
        ["ensure u9 default/demo", "forget u3", "delete u1 grace 1"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bytes_of_a_log_are_printed_unchanged() {
    let world = world();
    let got = world.run(&["logs", "default/web", "--tail", "3"]).await;
    assert_eq!(got.stdout, b"u1 main tail=3\n\x00\xff\x1b[31m no newline");
    assert!(
        got.stderr.contains("container main of: main, side"),
        "{}",
        got.stderr
    );
    let got = world.run(&["logs", "u1", "-c", "nix"]).await;
    assert_eq!(got.code, 1);
    assert!(
        got.stderr.contains("the pod has no container nix\nhint: "),
        "{}",
        got.stderr
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_passes_bytes_streams_and_codes() {
    let world = world();
    let got = world
        .run(&["exec", "u1", "-c", "main", "--", "exit", "42"])
        .await;
    assert_eq!(
        (got.code, got.stdout.as_slice(), got.stderr.as_str()),
        (42, &b""[..], "bye\n")
    );
    let got = world
        .run_with(&["exec", "-i", "u1", "-c", "main", "--", "cat"], &INPUT)
        .await;
    assert_eq!(got.code, 0, "{}", got.stderr);
    assert!(got.stdout == INPUT, "{} bytes came back", got.stdout.len());
    assert!(world.asked.all().contains(&"stdin closed".to_owned()));
    let got = world.run(&["exec", "u1", "--", "nix"]).await;
    assert_eq!(got.code, 127);
    assert!(
        got.stderr.contains("error: start the command"),
        "{}",
        got.stderr
    );
    let got = world
        .run_with(&["exec", "-it", "u1", "--", "exit", "0"], b"x")
        .await;
    assert!(got.stderr.contains("is not a terminal"), "{}", got.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_says_what_is_broken() {
    let world = world();
    let got = world.run(&["doctor"]).await;
    assert_eq!(got.code, 0, "{}{}", got.text(), got.stderr);
    assert_eq!(got.text().matches('✓').count(), 4, "{}", got.text());
    let got = world.run(&["doctor", "--probe"]).await;
    assert_eq!(got.code, 1);
    assert!(
        got.text()
            .ends_with("✗ probe job: no partition\n  → set one\n"),
        "{}",
        got.text()
    );
    let nobody = tempfile::tempdir().unwrap();
    let mut command = command(nobody.path(), &["doctor"]);
    let got = ran(
        tokio::task::spawn_blocking(move || command.output().unwrap())
            .await
            .unwrap(),
    );
    assert_eq!(got.code, 1);
    assert!(
        got.text().contains("✗ link: ") && got.text().contains("  → start the agent"),
        "{}",
        got.text()
    );
}

/// A pseudo-terminal, and its output so far.
struct Pty {
    master: std::fs::File,
    slave: OwnedFd,
    seen: Vec<u8>,
}

impl Pty {
    fn open() -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let path = std::path::PathBuf::from(name.into_string().unwrap());
        let slave = std::fs::File::options()
            .read(true)
            .write(true)
            .open(path)
            .unwrap()
            .into();
        Self {
            master: master.into(),
            slave,
            seen: Vec::new(),
        }
    }

    fn resize(&self, width: u16, height: u16) {
        let size = Winsize {
            ws_col: width,
            ws_row: height,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&self.master, size).unwrap();
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.slave)
            .unwrap()
            .local_modes
            .contains(LocalModes::ECHO | LocalModes::ISIG)
    }

    /// Reads until `wanted` was seen. At the deadline it fails with the output so far.
    fn expect(&mut self, wanted: &[u8]) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.seen.windows(wanted.len()).any(|part| part == wanted) {
            assert!(
                Instant::now() < deadline,
                "{:?}",
                String::from_utf8_lossy(&self.seen)
            );
            let mut ready = [rustix::event::PollFd::new(
                &self.master,
                rustix::event::PollFlags::IN,
            )];
            let tenth = rustix::event::Timespec {
                tv_sec: 0,
                tv_nsec: 100_000_000,
            };
            if rustix::event::poll(&mut ready, Some(&tenth)).unwrap() == 1 {
                let mut buffer = [0; 4096];
                let count = self.master.read(&mut buffer).unwrap();
                self.seen.extend_from_slice(&buffer[..count]);
            }
        }
    }

    fn type_in(&mut self, keys: &[u8]) {
        self.master.write_all(keys).unwrap();
    }

    fn start(&self, folder: &Path, arguments: &[&str]) -> Child {
        let end = || self.slave.try_clone().unwrap();
        command(folder, arguments)
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap()
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_child(child)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_is_raw_resized_and_restored() {
    let world = world();
    let folder = world.folder.path().to_owned();
    let shown = tokio::task::spawn_blocking(move || {
        let mut pty = Pty::open();
        pty.resize(80, 24);
        assert!(!pty.is_raw());
        let mut child = pty.start(&folder, &["exec", "-it", "u1", "-c", "main", "--", "size"]);
        pty.expect(b"80x24");
        // `^C` is a byte for the program, not a signal for knocctl.
        pty.type_in(b"\x03\x1a");
        pty.expect(b"\x03\x1a");
        assert!(pty.is_raw());
        pty.resize(100, 30);
        rustix::process::kill_process(pid(&child), Signal::WINCH).unwrap();
        pty.expect(b"100x30");
        pty.type_in(b"q");
        let code = child.wait().unwrap().code();
        (code, pty.is_raw())
    });
    assert_eq!(shown.await.unwrap(), (Some(0), false));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_exec_restores_the_terminal() {
    let world = world();
    let folder = world.folder.path().to_owned();
    let shown = tokio::task::spawn_blocking(move || {
        let mut pty = Pty::open();
        pty.resize(80, 24);
        let mut child = pty.start(&folder, &["exec", "-it", "u1", "-c", "main", "--", "size"]);
        pty.expect(b"80x24");
        pty.type_in(b"x");
        pty.expect(b"x");
        rustix::process::kill_process(pid(&child), Signal::TERM).unwrap();
        let code = child.wait().unwrap().code();
        pty.expect(b"ended by SIGTERM");
        (code, pty.is_raw())
    });
    assert_eq!(shown.await.unwrap(), (Some(1), false));
}
