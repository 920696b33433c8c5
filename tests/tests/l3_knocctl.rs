//! `knocctl attach` and `port-forward` through agent and shim on a real cluster, from another host, over mutual TLS.

use anyhow::ensure;
use knoc_tests::{
    Background, Forward, PodBuilder, Terminal, World,
    ports::some_port,
    wait_for,
    world::{SOON, exit_code},
};
use serde_json::json;

/// What the program has answered to that client.
fn got(client: &Background) -> Vec<String> {
    let shown = client.shown();
    let lines = shown.lines().filter(|line| line.starts_with("got "));
    lines.map(str::to_owned).collect()
}

#[tokio::test]
async fn knocctl_attaches_detaches_and_returns_the_exit_code() -> anyhow::Result<()> {
    let world = World::new("ctl-attach").await?;
    let script =
        "while read line; do echo got $line; echo err $line >&2; [ $line = end ] && exit 5; done";
    let pod = PodBuilder::new("talk").sh(script).set("stdin", json!(true));
    let uid = world.running(&pod).await?;
    let attach = ["attach", "-i", uid.as_str()];
    // After the end of its input a client stays until the program has been silent for a second, and a busy machine may need longer for
    // an answer: so the input ends after that.
    let mut first = Background::start_piped(world.knocctl(attach))?;
    first.say("one\n").await?;
    for answer in ["got one\n", "err one\n"] {
        first.expect(answer).await?;
    }
    first.end_input();
    let code = first.ends(SOON).await?;
    ensure!(
        code == 0 && got(&first) == ["got one"],
        "{code}: {}",
        first.shown()
    );
    // The program keeps its input when a client detaches.
    let mut last = Background::start_piped(world.knocctl(attach))?;
    last.say("two\nend\n").await?;
    let code = last.ends(SOON).await?;
    ensure!(
        code == 5 && got(&last) == ["got two", "got end"],
        "{code}: {}",
        last.shown()
    );
    let ended = world.wait_phase("talk", "Failed", SOON).await?;
    ensure!(exit_code(&ended, "main") == Some(5), "{:?}", ended.status);
    let over = world.knocctl(attach).stdin("").output().await?;
    ensure!(over.code != 0 && !over.stderr.is_empty(), "{over}");
    world.finish().await
}

#[tokio::test]
async fn knocctl_attaches_to_a_terminal() -> anyhow::Result<()> {
    let world = World::new("ctl-terminal").await?;
    let pod = PodBuilder::new("shell")
        .command(["sh"])
        .set("stdin", json!(true))
        .set("tty", json!(true));
    let uid = world.running(&pod).await?;
    let args = ["attach", "-it", uid.as_str()];
    let mut terminal = Terminal::start("knocctl", &args, 33, 101)?;
    wait_for("the terminal's size", SOON, async || {
        terminal.type_text("stty size; tty\n")?;
        let shown = terminal.shown();
        ensure!(shown.contains("33 101") && shown.contains("/dev/"), shown);
        Ok(())
    })
    .await?;
    terminal.type_text("exit 7\n")?;
    ensure!(terminal.exit_code().await? == Some(7));
    world.wait_phase("shell", "Failed", SOON).await?;
    world.finish().await
}

#[tokio::test]
async fn knocctl_forwards_ports_with_their_half_closes_until_the_pod_ends() -> anyhow::Result<()> {
    let world = World::new("ctl-forward").await?;
    let port = some_port();
    // The server answers after the whole request has arrived.
    let server =
        format!("exec nc -ll -p {port} -e sh -c 'cat >/tmp/got; cat /tmp/got; echo -n end'");
    let uid = world
        .running(&PodBuilder::new("server").sh(&server))
        .await?;
    let ports = format!(":{port}");
    let mut forward = Forward::start(world.knocctl(["port-forward", &uid, &ports])).await?;
    let question = vec![7; 5 << 20];
    wait_for("an answer", SOON, async || {
        let answer = forward.exchange(&question).await?;
        ensure!(
            answer.strip_suffix(b"end") == Some(&question),
            "{} bytes; {}",
            answer.len(),
            forward.program.shown()
        );
        Ok(())
    })
    .await?;
    world.delete("server", Some(0)).await?;
    let code = forward.program.exit_code(SOON).await?;
    let said = forward.program.shown();
    ensure!(code == 1 && said.contains("has ended"), "{code} {said}");
    world.finish().await
}

#[tokio::test]
async fn knocctl_forwards_to_no_listener_of_the_node() -> anyhow::Result<()> {
    let world = World::new("ctl-foreign").await?;
    let uid = world
        .running(
            &PodBuilder::new("quiet")
                .spec("hostNetwork", json!(true))
                .command(["sleep", "600"]),
        )
        .await?;
    // The port of slurmd.
    let mut forward = Forward::start(world.knocctl(["port-forward", &uid, ":6818"])).await?;
    let answer = forward.exchange(b"?").await.unwrap_or_default();
    ensure!(answer.is_empty(), "{answer:?}");
    forward
        .program
        .expect("port 6818 of the node belongs to a process outside the pod")
        .await?;
    world.finish().await
}
