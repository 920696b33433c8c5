//! Unmodified kubectl through API server, kubelet, agent and shim: exec with and without a terminal, cp and debug.

use std::{ffi::OsStr, path::Path, time::Duration};

use anyhow::{Context as _, ensure};
use knoc_tests::{PodBuilder, Run, Terminal, World, wait_for, world::SOON};

const MINUTES: Duration = Duration::from_mins(8);
const SIZE: usize = 20 << 20;

/// A pod with memory for many commands, and for further containers beside its own.
async fn target(test: &str) -> anyhow::Result<World> {
    let world = World::new(test).await?;
    world
        .running(&PodBuilder::new("target").memory("512Mi").sh("sleep 600"))
        .await?;
    Ok(world)
}

fn random(size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&rand::random::<u64>().to_le_bytes());
    }
    bytes
}

#[tokio::test]
async fn exec_keeps_exit_codes_streams_and_arguments() -> anyhow::Result<()> {
    let world = target("kubectl-exec").await?;
    let script = "echo out; echo err >&2; exit 9";
    let output = world
        .kubectl(["exec", "target", "--", "sh", "-c", script])
        .output()
        .await?;
    ensure!(output.code == 9 && output.stdout == b"out\n", "{output}");
    ensure!(output.stderr.starts_with("err\n"), "{output}");
    let killed = world
        .kubectl(["exec", "target", "--", "sh", "-c", "kill -KILL $$"])
        .output()
        .await?;
    ensure!(killed.code == 137, "{killed}");
    let missing = world
        .kubectl(["exec", "target", "--", "/no/such/program"])
        .output()
        .await?;
    ensure!(
        missing.code != 0 && missing.stderr.contains("/no/such/program"),
        "{missing}"
    );
    // Characters with a meaning in a shell or a URL arrive unchanged.
    let nasty = "a b&c=d%41;$HOME \"'\\ \u{e4}\u{1f980}\n--";
    let echoed = world
        .kubectl(["exec", "target", "--", "printf", "%s", nasty])
        .ok()
        .await?;
    ensure!(echoed.stdout == nasty.as_bytes(), "{echoed}");
    world.finish().await
}

#[tokio::test]
async fn exec_and_cp_carry_binary_both_ways() -> anyhow::Result<()> {
    let world = target("kubectl-bytes").await?;
    let bytes = random(SIZE);
    let echo = world
        .kubectl(["exec", "-i", "target", "--", "cat"])
        .stdin(bytes.clone())
        .deadline(MINUTES)
        .ok()
        .await?;
    ensure!(
        echo.stdout == bytes,
        "{} bytes came back",
        echo.stdout.len()
    );
    let folder = tempfile::tempdir()?;
    let (up, down) = (folder.path().join("up"), folder.path().join("down"));
    tokio::fs::write(&up, &bytes).await?;
    for (from, to) in [
        (up.as_os_str(), "target:/tmp/file".as_ref()),
        ("target:/tmp/file".as_ref(), down.as_os_str()),
    ] {
        copy(&world, from, to).await?;
    }
    ensure!(tokio::fs::read(&down).await? == bytes, "cp changed bytes");
    world.finish().await
}

/// `kubectl cp`; one of the two paths is in the pod.
async fn copy(world: &World, from: &OsStr, to: &OsStr) -> anyhow::Result<()> {
    let run = world.kubectl(["cp", "--retries=0"]).arg(from).arg(to);
    run.deadline(MINUTES).ok().await.map(drop)
}

/// The first word of the output of `sha256sum`.
async fn sum(run: Run) -> anyhow::Result<String> {
    let said = run.deadline(MINUTES).ok().await?.text();
    let sum = said.split_whitespace().next();
    Ok(sum.context("sha256sum said nothing")?.to_owned())
}

#[tokio::test]
async fn a_gibibyte_is_copied_both_ways() -> anyhow::Result<()> {
    const MEBIBYTES: u64 = 1024;
    let world = World::new("kubectl-gib").await?;
    let pod = PodBuilder::new("target")
        .memory("512Mi")
        .sh("sleep 3600")
        .empty_dir("/data");
    world.running(&pod).await?;
    let folder = tempfile::tempdir()?;
    let (up, down) = (folder.path().join("up"), folder.path().join("down"));
    let random = Run::new("dd")
        .args(["if=/dev/urandom", "bs=1M"])
        .arg(format!("count={MEBIBYTES}"))
        .arg(format!("of={}", up.display()));
    random.deadline(MINUTES).ok().await?;
    let local = async |file: &Path| sum(Run::new("sha256sum").arg(file)).await;
    let expected = local(&up).await?;
    copy(&world, up.as_os_str(), "target:/data/file".as_ref()).await?;
    let there = world.kubectl(["exec", "target", "--", "sha256sum", "/data/file"]);
    let there = sum(there).await?;
    ensure!(there == expected, "{there} is in the pod, not {expected}");
    copy(&world, "target:/data/file".as_ref(), down.as_os_str()).await?;
    let size = tokio::fs::metadata(&down).await?.len();
    ensure!(size == MEBIBYTES << 20, "{size} bytes came back");
    let back = local(&down).await?;
    ensure!(back == expected, "{back} came back, not {expected}");
    world.finish().await
}

/// Whether kubectl's output is that of a shell that saw the target's program.
const SEES: &str = "ps -o args | grep -c '[s]leep 600'";

#[tokio::test]
async fn debug_runs_a_shell_beside_the_program_and_sees_its_processes() -> anyhow::Result<()> {
    let world = target("kubectl-debug").await?;
    let image = format!("--image={}", PodBuilder::image_name());
    let namespace = world.namespace.clone();
    let name = &["-n", &namespace, "debug", "-it", "target", "-c", "helper"];
    let args = [&name[..], &["--target=main", &image, "--", "sh"]].concat();
    let mut terminal = Terminal::start("kubectl", &args, 24, 80)?;
    terminal.expect_size("24 80").await?;
    // kubectl attaches to the container, and that has no exit code.
    ensure!(terminal.interrupt_and_exit_with_7().await? == Some(0));
    let ended = world
        .wait_for_state("target", "the container's end", SOON, |pod| {
            let statuses = pod.status.as_ref()?.ephemeral_container_statuses.as_ref()?;
            statuses.first()?.state.as_ref()?.terminated.clone()
        })
        .await?;
    ensure!(ended.exit_code == 7, "{ended:?}");

    // The second one has a target, the third one has none.
    for (name, target, seen) in [("sees", Some("--target=main"), "1"), ("alone", None, "0")] {
        let debug = ["debug", "target", "--attach=false", "-c", name];
        let run = world.kubectl(debug).args(target).arg(&image);
        run.args(["--", "sh", "-c", SEES]).output().await?;
        world
            .wait_for_state("target", name, SOON, |pod| {
                let statuses = pod.status.as_ref()?.ephemeral_container_statuses.as_ref()?;
                let own = statuses.iter().find(|one| one.name == name)?;
                own.state.as_ref()?.terminated.clone()
            })
            .await?;
        let log = world.kubectl(["logs", "target", "-c", name]).ok().await?;
        ensure!(log.text().trim() == seen, "{name}: {log}");
    }
    // The pod continues.
    let pod = world.wait_phase("target", "Running", SOON).await?;
    let statuses = pod.status.and_then(|status| status.container_statuses);
    let main = statuses.into_iter().flatten().next().context("no status")?;
    ensure!(main.restart_count == 0 && main.ready, "{main:?}");
    world.finish().await
}

#[tokio::test]
async fn an_ephemeral_container_with_a_rejected_field_is_rejected_alone() -> anyhow::Result<()> {
    let world = target("kubectl-refused").await?;
    let image = format!("--image={}", PodBuilder::image_name());
    let debug = [
        "debug",
        "-i",
        "target",
        "-c",
        "helper",
        "--profile=netadmin",
    ];
    let run = world.kubectl(debug).arg(&image).args(["--", "true"]);
    let refused = run.stdin("").output().await?;
    let message = "spec.ephemeralContainers[helper].securityContext.capabilities.add";
    ensure!(
        refused.code != 0 && refused.stderr.contains(message),
        "{refused}"
    );
    wait_for("an Event", SOON, async || {
        let events = world.events("target").await?;
        let told = |event: &String| event.contains("ephemeralContainers");
        ensure!(events.iter().any(told), events.join("; "));
        Ok(())
    })
    .await?;
    world.wait_phase("target", "Running", SOON).await?;
    world.finish().await
}

#[tokio::test]
async fn many_execs_at_once_do_not_mix() -> anyhow::Result<()> {
    const AT_ONCE: usize = 20;
    let world = target("kubectl-many").await?;
    let runs = (0..AT_ONCE).map(async |number| {
        let script = format!("cat; exit {number}");
        let output = world
            .kubectl(["exec", "-i", "target", "--", "sh", "-c", &script])
            .stdin(format!("input {number}"))
            .deadline(MINUTES)
            .output()
            .await?;
        let expected = (i32::try_from(number)?, format!("input {number}"));
        ensure!(
            (output.code, output.text()) == expected,
            "{number}: {output}"
        );
        Ok(())
    });
    futures::future::try_join_all(runs).await?;
    world.finish().await
}

#[tokio::test]
async fn a_terminal_resizes_interrupts_and_passes_the_exit_code() -> anyhow::Result<()> {
    let world = target("kubectl-tty").await?;
    let args = ["-n", &world.namespace, "exec", "-it", "target", "--", "sh"];
    let mut terminal = Terminal::start("kubectl", &args, 24, 80)?;
    terminal.expect_size("24 80").await?;
    terminal.resize(50, 132)?;
    terminal.expect_size("50 132").await?;
    ensure!(terminal.interrupt_and_exit_with_7().await? == Some(7));
    world.finish().await
}
