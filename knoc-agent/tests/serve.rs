//! The real program: one agent a state directory, and the relay to its socket.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::{
    path::Path,
    process::{Output, Stdio},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    process::{Child, Command},
};

const PATIENCE: Duration = Duration::from_secs(90);

#[expect(
    clippy::disallowed_methods,
    reason = "the program under test is started as a user starts it"
)]
fn agent(home: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_knoc-agent"));
    command.args(arguments).env_clear().env("HOME", home);
    command.env("PATH", "/usr/bin:/bin").kill_on_drop(true);
    command
}

/// A site whose agent serves its socket only, and shims on any free port.
fn site() -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join(".config/knoc");
    std::fs::create_dir_all(&folder).unwrap();
    let socket = home.path().join("run/agent.sock");
    let text = format!(
        "site = \"t\"\nscheduler = \"local\"\nruntime = \"process\"\n[listen]\n\
         shim = \"127.0.0.1:0\"\nsocket = \"{}\"\n",
        socket.display()
    );
    let path = folder.join("agent.toml");
    knoc_contract::jobdir::atomic::write(&path, text.as_bytes(), 0o600).unwrap();
    home
}

fn serve(home: &Path) -> Child {
    agent(home, &["serve"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

async fn connected(home: &Path) {
    let socket = home.join("run/agent.sock");
    let until = Instant::now() + PATIENCE;
    while tokio::net::UnixStream::connect(&socket).await.is_err() {
        assert!(Instant::now() < until, "no agent at {}", socket.display());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn output(command: &mut Command) -> Output {
    let running = command.output();
    tokio::time::timeout(PATIENCE, running)
        .await
        .unwrap()
        .unwrap()
}

#[tokio::test]
async fn a_second_agent_says_who_serves_and_takes_over_a_dead_one() {
    let home = site();
    let mut first = serve(home.path());
    connected(home.path()).await;
    let second = output(&mut agent(home.path(), &["serve"])).await;
    let words = String::from_utf8_lossy(&second.stderr);
    let pid = first.id().unwrap();
    assert!(!second.status.success());
    assert!(words.contains(&format!("process {pid} on ")), "{words}");
    first.start_kill().unwrap();
    first.wait().await.unwrap();
    let _third = serve(home.path());
    connected(home.path()).await;
}

#[tokio::test]
async fn connect_carries_bytes_both_ways() {
    let home = site();
    let _agent = serve(home.path());
    connected(home.path()).await;
    let mut relay = agent(home.path(), &["connect", "--plain"]);
    let mut relay = relay
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = relay.stdin.take().unwrap();
    // An HTTP/2 client's first bytes, and an empty SETTINGS frame.
    stdin
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        .await
        .unwrap();
    let mut answer = [0; 18 + 9];
    let mut stdout = relay.stdout.take().unwrap();
    let reading = stdout.read_exact(&mut answer);
    tokio::time::timeout(PATIENCE, reading)
        .await
        .unwrap()
        .unwrap();
    let (marker, header) = answer.split_at(18);
    assert_eq!(marker, b"KNOC-LINK/1 plain\n");
    assert_eq!(
        header[3], 4,
        "the agent answers with its SETTINGS: {header:?}"
    );
}

#[tokio::test]
async fn a_mistake_in_the_site_file_stops_before_anything_starts() {
    let home = site();
    let path = home.path().join(".config/knoc/agent.toml");
    let text = std::fs::read_to_string(&path)
        .unwrap()
        .replace("local", "pbs");
    knoc_contract::jobdir::atomic::write(&path, text.as_bytes(), 0o600).unwrap();
    let ended = output(&mut agent(home.path(), &["serve"])).await;
    let words = String::from_utf8_lossy(&ended.stderr);
    assert!(
        words.contains("agent.toml:2: ") && words.contains("`slurm` or `local`"),
        "{words}"
    );
    assert!(!home.path().join(".local").exists());
}
