//! The rules of exec, attach and port-forward through the API server, with unmodified kubectl and the Rust client: what happens to a
//! command whose client disconnects, which ports can be reached, who can send input, and which requests fail with which message.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use futures::future::try_join_all;
use k8s_openapi::api::core::v1::Pod;
use knoc_tests::{
    Background, Forward, PodBuilder, World,
    ports::some_port,
    wait_for,
    world::{SOON, exit_code},
};
use kube::api::AttachParams;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::Barrier,
};

const MINUTES: Duration = Duration::from_mins(6);

/// The process of the pod's shim on its node, and all children of it, as `STATE ARGUMENTS` each.
async fn children_of_shim(world: &World, node: &str, uid: &str) -> anyhow::Result<Vec<String>> {
    let shim = format!("knoc-agent shim .*{uid}");
    let shim = world.on(node, ["pgrep", "-f", &shim]).ok().await?.text();
    let children = world.on(
        node,
        ["ps", "-o", "stat,args", "--no-headers", "--ppid", &shim],
    );
    let children = children.ok().await?.text();
    Ok(children.lines().map(str::to_owned).collect())
}

/// Starts a command that reads no input, lets its client send this much, kills the client, and waits for the command's end.
async fn leave(name: &str, input: Option<usize>) -> anyhow::Result<()> {
    let world = World::new(name).await?;
    let uid = world
        .running(&PodBuilder::new("target").command(["sleep", "600"]))
        .await?;
    let node = world.compute_node(&uid).await?;
    let before = children_of_shim(&world, &node, &uid).await?;
    let script = "trap 'echo HUP >>/tmp/heard' HUP; trap 'echo TERM >>/tmp/heard; exit' TERM; \
                  echo ready; while :; do sleep 0.1; done";
    let exec = |flags| ["exec", flags, "target", "--", "sh", "-c", script];
    let mut client = match input {
        None => Background::start(world.kubectl(exec("-i=false")))?,
        Some(bytes) => Background::start(world.kubectl(exec("-i")).stdin(vec![7; bytes]))?,
    };
    client.expect("ready\n").await?;
    client.has_read(input.unwrap_or_default()).await?;
    client.kill().await?;
    let inside = async |command: &str| {
        let run = world.kubectl(["exec", "target", "--", "sh", "-c", command]);
        anyhow::Ok(run.ok().await?.text())
    };
    wait_for("HUP, then TERM", SOON, async || {
        let heard = inside("cat /tmp/heard").await?;
        ensure!(heard == "HUP\nTERM", heard);
        Ok(())
    })
    .await?;
    wait_for("the command is no more", SOON, async || {
        let all = inside("ps -o stat,args").await?;
        let left = |line: &&str| line.starts_with('Z') || line.contains("ready; while");
        let left: Vec<&str> = all.lines().filter(left).collect();
        ensure!(left.is_empty(), "in the container: {left:?}");
        // The helper that entered the container is gone too.
        let after = children_of_shim(&world, &node, &uid).await?;
        ensure!(after.len() <= before.len(), "of the shim: {after:?}");
        Ok(())
    })
    .await?;
    world.finish().await
}

#[tokio::test]
async fn a_command_gets_hup_then_term_when_its_client_disconnects_and_is_reaped()
-> anyhow::Result<()> {
    leave("api-gone", None).await
}

#[tokio::test]
async fn a_command_whose_input_waits_gets_hup_then_term_when_its_client_disconnects()
-> anyhow::Result<()> {
    // More than the pipe and the link to the shim hold (2 MiB), but less than these and the link to the agent hold. With more
    // than that, the API server must deliver the rest before its own end becomes visible.
    leave("api-gone-input", Some(3 << 20)).await
}

#[tokio::test]
async fn ports_lead_to_the_pods_own_listeners_with_their_half_closes() -> anyhow::Result<()> {
    let world = World::new("api-ports").await?;
    let port = some_port();
    let server = format!("exec nc -ll -p {port} -e sha256sum");
    world
        .running(
            &PodBuilder::new("server")
                .spec("hostNetwork", json!(true))
                .sh(&server),
        )
        .await?;
    // kubectl's port-forward ends with the first connection that is refused.
    world.wait_listens("server", "main", port).await?;
    let forward = async |port: u16| {
        let port = format!(":{port}");
        Forward::start(world.kubectl(["port-forward", "server", &port])).await
    };
    // The checksum of all bytes is sent after the end of the input.
    let question = vec![7; 5 << 20];
    let expected = format!("{:x}  -\n", Sha256::digest(&question));
    let own = forward(port).await?;
    wait_for("the server answers", SOON, async || {
        let answer = String::from_utf8(own.exchange(&question).await?)?;
        ensure!(answer == expected, answer);
        Ok(())
    })
    .await?;
    let nobodys = "connection refused";
    let slurmds = "belongs to a process outside the pod";
    for (port, expected) in [(port + 1, nobodys), (6818, slurmds)] {
        let mut forward = forward(port).await?;
        let answer = forward.exchange(b"?").await.unwrap_or_default();
        ensure!(answer.is_empty(), "{port} answered {answer:?}");
        forward.program.expect(expected).await?;
    }
    world.finish().await
}

#[tokio::test]
async fn a_forwarded_connection_that_nobody_reads_is_closed_when_its_client_disconnects()
-> anyhow::Result<()> {
    let world = World::new("api-unread").await?;
    let port = some_port();
    let server = format!("exec nc -ll -p {port} -e sleep 600");
    world
        .running(&PodBuilder::new("server").sh(&server))
        .await?;
    // The connections as the program sees them.
    let open = async || {
        let run = world.kubectl(["exec", "server", "--", "netstat", "-tn"]);
        let all = run.ok().await?.text();
        let ours = |line: &&str| {
            let mut columns = line.split_whitespace().skip(3);
            columns
                .next()
                .is_some_and(|local| local.ends_with(&format!(":{port}")))
                && line.contains("ESTABLISHED")
        };
        anyhow::Ok(all.lines().filter(ours).count())
    };
    world.wait_listens("server", "main", port).await?;
    let to = format!(":{port}");
    let forward = Forward::start(world.kubectl(["port-forward", "server", &to])).await?;
    let mut connection = forward.connect().await?;
    // More than the program's socket and the link to the shim hold, but less than these and the link to the agent hold.
    connection.write_all(&vec![7; 5 << 20]).await?;
    wait_for("the program has the connection", SOON, async || {
        let found = open().await?;
        ensure!(found == 1, "{found} connections");
        Ok(())
    })
    .await?;
    forward.program.kill().await?;
    wait_for("the connection is let go", SOON, async || {
        let found = open().await?;
        ensure!(found == 0, "{found} connections");
        Ok(())
    })
    .await?;
    world.finish().await
}

/// Forwards connections, one after the other, to a server that listens anew for each, as shell scripts do it.
async fn each_is_answered(world: &World, name: &str, on_host: bool) -> anyhow::Result<()> {
    const CONNECTIONS: usize = 20;
    let port = some_port();
    let server = format!(
        "n=0; while true; do nc -l -p {port} -e sh -c \"cat; echo ' is answer' $n\"; n=$((n+1)); done"
    );
    let pod = PodBuilder::new(name).spec("hostNetwork", json!(on_host));
    world.running(&pod.sh(&server)).await?;
    // kubectl ends with the first connection that is refused, so all are forwarded by one that goes on.
    world.wait_listens(name, "main", port).await?;
    let to = format!(":{port}");
    let forward = Forward::start(world.kubectl(["port-forward", name, &to])).await?;
    for number in 0..CONNECTIONS {
        // Between two servers nobody listens, and any kubelet refuses.
        world.wait_listens(name, "main", port).await?;
        let question = format!("question {number}");
        let answer = forward.exchange(question.as_bytes()).await;
        let answer = answer.with_context(|| format!("{name}: connection {number}"))?;
        let answer = String::from_utf8(answer)?;
        let expected = format!("{question} is answer ");
        ensure!(
            answer.starts_with(&expected),
            "{name}: {answer:?} to {question:?}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn each_connection_to_a_server_that_listens_for_one_at_a_time_is_answered()
-> anyhow::Result<()> {
    let world = World::new("api-nc").await?;
    let own = each_is_answered(&world, "own", false);
    let host = each_is_answered(&world, "host", true);
    tokio::try_join!(own, host)?;
    world.finish().await
}

#[tokio::test]
async fn a_listener_of_the_same_user_outside_the_pod_is_refused_by_name() -> anyhow::Result<()> {
    let world = World::new("api-foreign").await?;
    let uid = world
        .running(
            &PodBuilder::new("quiet")
                .spec("hostNetwork", json!(true))
                .command(["sleep", "600"]),
        )
        .await?;
    let node = world.compute_node(&uid).await?;
    let port = some_port().to_string();
    let busybox = "/images/busybox/bin/busybox";
    // Ends by itself if the test is interrupted.
    let server = [
        "timeout", "600", busybox, "nc", "-ll", "-p", &port, "-e", "cat",
    ];
    let _server = Background::start(world.on(&node, server))?;
    wait_for("it listens", SOON, async || {
        let look = format!("exec 3<>/dev/tcp/127.0.0.1/{port}");
        world.on(&node, ["bash", "-c", &look]).ok().await
    })
    .await?;
    let forward = world.kubectl(["port-forward", "quiet", &format!(":{port}")]);
    let mut forward = Forward::start(forward).await?;
    let answer = forward.exchange(b"?").await.unwrap_or_default();
    ensure!(answer.is_empty(), "{answer:?}");
    let expected = format!("port {port} of the node belongs to a process outside the pod");
    forward.program.expect(&expected).await?;
    world.finish().await
}

fn listener(name: &str, script: &str, once: bool) -> PodBuilder {
    PodBuilder::new(name)
        .sh(script)
        .set("stdin", json!(true))
        .set("stdinOnce", json!(once))
}

#[tokio::test]
async fn stdin_once_ends_with_its_first_client() -> anyhow::Result<()> {
    let world = World::new("api-once").await?;
    world
        .running(&listener("cat", "cat; echo over; exit 3", true))
        .await?;
    let attach = ["attach", "-i", "cat"];
    let attached = world.kubectl(attach).stdin("hello\n").output().await?;
    // The pod's status has the code, as with a real kubelet.
    ensure!(
        attached.code == 0 && attached.text() == "hello\nover",
        "{attached}"
    );
    let ended = world.wait_phase("cat", "Failed", SOON).await?;
    ensure!(exit_code(&ended, "main") == Some(3), "{:?}", ended.status);
    // Another program, which continues without input: the next client cannot send any.
    world
        .running(&listener("deaf", "cat; echo over; exec sleep 600", true))
        .await?;
    let mut first = Background::start(world.kubectl(["attach", "-i", "deaf"]))?;
    first.expect("over\n").await?;
    first.kill().await?;
    let second = world.kubectl(["attach", "-i", "deaf"]).stdin("x\n");
    let second = second.output().await?;
    ensure!(
        second.code != 0 && second.stderr.contains("its standard input"),
        "{second}"
    );
    world.finish().await
}

#[tokio::test]
async fn stdin_without_once_stays_open_for_the_next_client() -> anyhow::Result<()> {
    let world = World::new("api-often").await?;
    let script = "while read line; do echo got $line; [ $line = end ] && exit 5; done";
    world.running(&listener("reader", script, false)).await?;
    // After the end of its input a client stays until the program has been silent for a second, and a busy machine may need longer for
    // an answer: so the input ends after that.
    for (typed, last, expected) in [
        ("one\n", "got one\n", ["got one"].as_slice()),
        ("two\nend\n", "got end\n", ["got two", "got end"].as_slice()),
    ] {
        let mut client = Background::start_piped(world.kubectl(["attach", "-i", "reader"]))?;
        client.say(typed).await?;
        client.expect(last).await?;
        client.end_input();
        let code = client.ends(SOON).await?;
        let shown = client.shown();
        let got: Vec<&str> = shown
            .lines()
            .filter(|line| line.starts_with("got "))
            .collect();
        ensure!(code == 0 && got == expected, "{code}: {shown}");
    }
    let ended = world.wait_phase("reader", "Failed", SOON).await?;
    ensure!(exit_code(&ended, "main") == Some(5), "{:?}", ended.status);
    world.finish().await
}

#[tokio::test]
async fn attach_and_exec_to_a_pod_that_has_ended_are_refused() -> anyhow::Result<()> {
    let world = World::new("api-ended").await?;
    world.run(&PodBuilder::new("over"), "Succeeded").await?;
    let attach = world.kubectl(["attach", "over"]).output().await?;
    let expected = "cannot attach a container in a completed pod";
    ensure!(
        attach.code != 0 && attach.stderr.contains(expected),
        "{attach}"
    );
    // Requests that kubectl never makes.
    let base = format!("{}/over", world.namespace);
    let full = format!("over_{}", world.namespace);
    for (path, status, expected) in [
        (
            format!("attach/{base}/main?output=1"),
            500,
            format!("container main not found in pod {full}"),
        ),
        (
            format!("exec/{base}/main?command=true&output=1"),
            500,
            "container not found (\"main\")".to_owned(),
        ),
        (
            format!("portForward/{base}"),
            500,
            format!("pod not found (\"{full}\")"),
        ),
    ] {
        refused(&world, &path, status, &expected).await?;
    }
    world.finish().await
}

/// Checks that the kubelet denies a GET of that path.
async fn refused(world: &World, path: &str, status: u16, expected: &str) -> anyhow::Result<()> {
    let Err(error) = world.kubelet(path).await else {
        anyhow::bail!("{path} was answered");
    };
    let told = error.downcast_ref::<kube::Error>();
    let Some(kube::Error::Api(told)) = told else {
        anyhow::bail!("{path}: {error:#}");
    };
    // The client quotes an answer that is not JSON.
    let message = told.message.replace("\\\"", "\"");
    ensure!(
        told.code == status && message.contains(expected),
        "{path}: {status} and {expected:?} were expected, not {} and {message:?}",
        told.code
    );
    Ok(())
}

#[tokio::test]
async fn another_uid_in_the_path_is_another_pod() -> anyhow::Result<()> {
    let world = World::new("api-uid").await?;
    let uid = world
        .running(&PodBuilder::new("target").command(["sleep", "600"]))
        .await?;
    let other = "00000000-0000-4000-8000-000000000000";
    let base = format!("{}/target", world.namespace);
    let no_pod = format!("pod target_{} not found", world.namespace);
    for (path, status, expected) in [
        (format!("portForward/{base}/{other}"), 404, "pod not found"),
        (
            format!("exec/{base}/{other}/main?command=true&output=1"),
            500,
            "container not found (\"main\")",
        ),
        (format!("attach/{base}/{other}/main?output=1"), 500, &no_pod),
        // Its own pod is found; only the upgrade is missing.
        (
            format!("portForward/{base}/{uid}"),
            400,
            "unable to upgrade",
        ),
        (
            format!("exec/{base}/{uid}/main?command=true&output=1"),
            400,
            "unable to upgrade",
        ),
    ] {
        refused(&world, &path, status, expected).await?;
    }
    let gone = format!("{}/nobody", world.namespace);
    refused(
        &world,
        &format!("portForward/{gone}"),
        404,
        "pod does not exist",
    )
    .await?;
    world.finish().await
}

#[tokio::test]
async fn two_hundred_execs_at_once_in_one_pod() -> anyhow::Result<()> {
    const AT_ONCE: usize = 200;
    let world = World::new("api-many").await?;
    let pod = PodBuilder::new("target")
        .command(["sleep", "600"])
        .memory("1Gi");
    world.running(&pod).await?;
    let pods = world.api::<Pod>();
    let all_run = Barrier::new(AT_ONCE);
    let execs = (0..AT_ONCE).map(async |number| {
        let script = "echo ready; read line; echo \"got $line\"; exit 3";
        let how = AttachParams::default().stdin(true).stderr(false);
        let mut process = pods.exec("target", ["sh", "-c", script], &how).await?;
        let mut stdout = process.stdout().context("no output")?;
        let mut stdin = process.stdin().context("no input")?;
        let status = process.take_status().context("no status")?;
        let mut ready = [0; 6];
        stdout.read_exact(&mut ready).await?;
        ensure!(&ready == b"ready\n", "{number}: {ready:?}");
        all_run.wait().await;
        stdin.write_all(format!("{number}\n").as_bytes()).await?;
        let mut answer = String::new();
        stdout.read_to_string(&mut answer).await?;
        ensure!(answer == format!("got {number}\n"), "{number}: {answer:?}");
        let status = status.await.context("ended without a status")?;
        let message = status.message.unwrap_or_default();
        ensure!(message.ends_with("exit code 3"), "{number}: {message}");
        Ok(())
    });
    let all = tokio::time::timeout(MINUTES, try_join_all(execs)).await;
    all.context("not all of them came to their end")??;
    world.finish().await
}
