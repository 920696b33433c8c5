//! `kubectl logs` with all its options, and the kubelet's own `containerLogs`, on the real stack.

use std::{ops::Range, time::Duration};

use anyhow::{Context as _, ensure};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use futures::{AsyncBufRead, AsyncReadExt as _, StreamExt as _, future::try_join_all};
use http::{StatusCode, header};
use hyper_util::rt::TokioIo;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use knoc_tests::{Background, PodBuilder, World, wait_for, world::SOON};
use kube::{
    Client,
    api::{LogParams, Request},
    client::Body,
};
use serde_json::json;
use tokio::sync::Barrier;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, handshake::client::generate_key, protocol::Role},
};

const MINUTES: Duration = Duration::from_mins(6);

/// The script of a container that continues when [`go`] is called.
const UNTIL_GO: &str = "until [ -e /tmp/go ]; do sleep 0.1; done";

/// Makes a container continue.
async fn go(world: &World, pod: &str, container: &str) -> anyhow::Result<()> {
    let touch = ["exec", pod, "-c", container, "--", "touch", "/tmp/go"];
    world.kubectl(touch).ok_or_killed().await.map(drop)
}

/// Waits until the log has these contents.
async fn log_is(world: &World, pod: &str, expected: &str) -> anyhow::Result<()> {
    wait_for(&format!("the log {expected:?}"), SOON, async || {
        let log = world.kubectl(["logs", pod]).ok().await?.text();
        ensure!(log == expected, log);
        Ok(())
    })
    .await
}

/// The time at which the line with that text was written.
fn written(stamped: &str, text: &str) -> anyhow::Result<Timestamp> {
    let end = format!(" {text}");
    let line = stamped.lines().find(|line| line.ends_with(&end));
    let line = line.with_context(|| format!("no line {text:?} in {stamped:?}"))?;
    Ok(line.trim_end_matches(&end).parse()?)
}

#[tokio::test]
async fn since_and_since_time_start_where_they_say() -> anyhow::Result<()> {
    const GAP: SignedDuration = SignedDuration::from_secs(12);
    let world = World::new("logs-since").await?;
    let script = format!("echo early; {UNTIL_GO}; echo late; sleep 600");
    world
        .running(&PodBuilder::new("teller").sh(&script))
        .await?;
    log_is(&world, "teller", "early").await?;
    let stamped = async || -> anyhow::Result<String> {
        let log = world.kubectl(["logs", "--timestamps", "teller"]);
        Ok(log.ok().await?.text())
    };
    let early = written(&stamped().await?, "early")?;
    wait_for("some seconds after the first line", SOON, async || {
        let passed = Timestamp::now().duration_since(early);
        ensure!(passed >= GAP, "{passed}");
        Ok(())
    })
    .await?;
    go(&world, "teller", "main").await?;
    log_is(&world, "teller", "early\nlate").await?;
    let late = written(&stamped().await?, "late")?;
    let logs = async |option: String| -> anyhow::Result<String> {
        Ok(world
            .kubectl(["logs", &option, "teller"])
            .ok()
            .await?
            .text())
    };
    let at = logs(format!("--since-time={late}")).await?;
    ensure!(at == "late", "since {late}: {at:?}");
    let after = late + SignedDuration::from_secs(2);
    let none = logs(format!("--since-time={after}")).await?;
    ensure!(none.is_empty(), "since {after}: {none:?}");
    let all = logs("--since=1h".to_owned()).await?;
    ensure!(all == "early\nlate", "{all:?}");
    // The time is counted back from the request to the kubelet, so the request is repeated if it took too long.
    wait_for("the line of the last seconds alone", SOON, async || {
        let ago = Timestamp::now().duration_since(late).as_secs() + 10;
        let log = logs(format!("--since={ago}s")).await?;
        ensure!(log == "late", "of the last {ago} s: {log:?}");
        Ok(())
    })
    .await?;
    world.finish().await
}

#[tokio::test]
async fn every_container_of_a_finished_pod_has_its_log() -> anyhow::Result<()> {
    let world = World::new("logs-all").await?;
    let pod = PodBuilder::new("many")
        .sh("echo of main; echo aside >&2")
        .container("second")
        .sh("echo of second")
        .init_container("first")
        .sh("echo of first");
    world.run(&pod, "Succeeded").await?;
    let logs = async |options: &[&str]| -> anyhow::Result<Vec<String>> {
        let run = world.kubectl(["logs", "many"]).args(options);
        let text = run.ok().await?.text();
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort();
        Ok(lines)
    };
    let all = logs(&["--all-containers", "--prefix"]).await?;
    let expected = [
        "[pod/many/first] of first",
        "[pod/many/main] aside",
        "[pod/many/main] of main",
        "[pod/many/second] of second",
    ];
    ensure!(all == expected, "{all:?}");
    for (container, expected) in [
        ("first", ["of first"].as_slice()),
        ("main", &["aside", "of main"]),
        ("second", &["of second"]),
    ] {
        let log = logs(&["-c", container]).await?;
        ensure!(log == expected, "{container}: {log:?}");
        // The container has ended, and so has the follower.
        let followed = logs(&["-f", "-c", container]).await?;
        ensure!(followed == expected, "{container} followed: {followed:?}");
    }
    let unknown = world.kubectl(["logs", "many", "-c", "third"]).output();
    let unknown = unknown.await?;
    ensure!(
        unknown.code != 0 && unknown.stderr.contains("container third is not valid"),
        "{unknown}"
    );
    let previous = world.kubectl(["logs", "many", "-c", "main", "-p"]).output();
    let previous = previous.await?;
    let message = "previous terminated container \"main\" in pod \"many\" not found";
    ensure!(
        previous.code != 0 && previous.stderr.contains(message),
        "{previous}"
    );
    world.finish().await
}

#[tokio::test]
async fn the_streams_of_a_log_can_be_read_separately() -> anyhow::Result<()> {
    let world = World::new("logs-stream").await?;
    let script = "echo out 1; echo err 1 >&2; echo out 2; echo err 2 >&2";
    world
        .run(&PodBuilder::new("both").sh(script), "Succeeded")
        .await?;
    let ask = async |query: &str| {
        let (node, namespace) = (&world.node, &world.namespace);
        let path = format!("/api/v1/nodes/{node}/proxy/containerLogs/{namespace}/both/main{query}");
        world.kubectl(["get", "--raw", &path]).output().await
    };
    for (query, expected) in [
        ("?stream=Stdout", "out 1\nout 2"),
        ("?stream=Stderr", "err 1\nerr 2"),
        ("?stream=Stderr&limitBytes=3", "err"),
    ] {
        let log = ask(query).await?;
        ensure!(log.code == 0 && log.text() == expected, "{query}: {log}");
    }
    for query in ["", "?stream=All"] {
        let log = ask(query).await?;
        let mut lines: Vec<_> = log.stdout.split(|byte| *byte == b'\n').collect();
        lines.sort_unstable();
        let expected: [&[u8]; 5] = [b"", b"err 1", b"err 2", b"out 1", b"out 2"];
        ensure!(lines == expected, "{query}: {log}");
    }
    for query in [
        "?stream=Stdout&tailLines=1",
        "?stream=stdout",
        "?stream=Both",
    ] {
        let refused = ask(query).await?;
        ensure!(
            refused.code != 0 && refused.stderr.contains("Invalid request"),
            "{query}: {refused}"
        );
    }
    world.finish().await
}

/// A line of [`numbered`], and the script of a container that prints such lines.
fn line(number: usize) -> String {
    format!("{number:08} {}", "x".repeat(90))
}

fn print(numbers: Range<usize>) -> String {
    let Range { start, end } = numbers;
    let filler = "x".repeat(90);
    format!(
        "awk 'BEGIN {{ for (i = {start}; i < {end}; i++) printf \"%08d %s\\n\", i, \"{filler}\" }}'"
    )
}

/// That many numbered lines.
fn numbered(numbers: Range<usize>) -> String {
    numbers.fold(String::new(), |all, number| all + &line(number) + "\n")
}

#[tokio::test]
async fn tail_and_follow_go_across_rotated_files() -> anyhow::Result<()> {
    // More than the 100 MiB of one file, including the prefix of each line in the file.
    const LINES: usize = 1_000_000;
    const TAIL: usize = 400_000;
    let world = World::new("logs-rotated").await?;
    let script = format!("{UNTIL_GO}; {}", print(0..LINES));
    let pod = PodBuilder::new("talker").memory("256Mi").sh(&script);
    let uid = world.running(&pod).await?;
    let mut follower = Background::start(world.kubectl(["logs", "-f", "talker"]))?;
    go(&world, "talker", "main").await?;
    world.wait_phase("talker", "Succeeded", MINUTES).await?;
    let files = format!("ls /home/hpcuser/.local/state/knoc/pods/{uid}/logs/main");
    let files = world.on("login", ["sh", "-c", &files]).ok().await?.text();
    ensure!(files.lines().count() > 1, "nothing was rotated: {files}");
    let code = follower.exit_code(MINUTES).await?;
    let shown = follower.shown();
    ensure!(
        code == 0 && shown == numbered(0..LINES),
        "{code}; {} of {} bytes; the last: {:?}",
        shown.len(),
        LINES * 100,
        shown.lines().last()
    );
    let tail = format!("--tail={TAIL}");
    let tail = world.kubectl(["logs", &tail, "talker"]).deadline(MINUTES);
    let tail = tail.ok().await?.stdout;
    ensure!(
        tail == numbered(LINES - TAIL..LINES).into_bytes(),
        "{} bytes for {TAIL} lines",
        tail.len()
    );
    world.finish().await
}

/// A log that is followed from its beginning.
async fn follow(
    world: &World,
    pod: &str,
    container: &str,
) -> anyhow::Result<impl AsyncBufRead + Unpin> {
    let what = LogParams {
        container: Some(container.to_owned()),
        follow: true,
        ..LogParams::default()
    };
    let log = world.api::<Pod>().log_stream(pod, &what).await;
    log.with_context(|| format!("follow {container}"))
}

/// Checks the rest of each log.
async fn all_end_with(
    logs: impl Iterator<Item = impl AsyncBufRead + Unpin>,
    expected: &str,
) -> anyhow::Result<()> {
    let all = try_join_all(logs.map(async |mut log| {
        let mut text = Vec::new();
        log.read_to_end(&mut text).await?;
        ensure!(text == expected.as_bytes(), "{} bytes", text.len());
        Ok(())
    }));
    let all = tokio::time::timeout(MINUTES, all).await;
    all.context("a late reader does not come to the end")?
        .map(drop)
}

/// Waits until the flood's last line is there.
async fn flooded(world: &World, last: &str) -> anyhow::Result<()> {
    wait_for("the flood is written", MINUTES, async || {
        let tail = ["logs", "talker", "-c", "flood", "--tail=1"];
        let tail = world.kubectl(tail).ok().await?;
        ensure!(tail.text() == last, "{tail}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_hundred_followers_get_all_lines_while_others_never_read() -> anyhow::Result<()> {
    const FOLLOWERS: usize = 100;
    const STUCK: usize = 20;
    const LATE: usize = 5;
    const LINES: usize = 10_000;
    // More than all buffers on the way hold, so that a stalled reader blocks at the source.
    const FLOOD: usize = 320_000;
    let world = World::new("logs-followers").await?;
    let talk = format!(
        "{}; {UNTIL_GO}; {}",
        print(0..LINES),
        print(LINES..2 * LINES)
    );
    let pod = PodBuilder::new("talker")
        .sh(&talk)
        .container("flood")
        .sh(&format!("{}; exec sleep 600", print(0..FLOOD)))
        .spec("activeDeadlineSeconds", json!(3600));
    world.running(&pod).await?;
    let stuck = try_join_all((0..STUCK).map(|_| follow(&world, "talker", "flood"))).await?;
    let idle = try_join_all((0..STUCK).map(|_| follow(&world, "talker", "main"))).await?;
    let last = line(FLOOD - 1);
    flooded(&world, &last).await?;
    let expected = numbered(0..2 * LINES);
    // All followers have read everything before the program continues.
    let half = Barrier::new(FOLLOWERS + 1);
    let readers = (0..FOLLOWERS).map(async |number| {
        let mut log = follow(&world, "talker", "main").await?;
        let mut text = vec![0; expected.len() / 2];
        log.read_exact(&mut text).await?;
        half.wait().await;
        log.read_to_end(&mut text).await?;
        ensure!(
            text == expected.as_bytes(),
            "follower {number}: {} of {} bytes",
            text.len(),
            expected.len()
        );
        Ok(())
    });
    let all = async {
        let told = async {
            half.wait().await;
            go(&world, "talker", "main").await
        };
        tokio::try_join!(try_join_all(readers), told)
    };
    let all = tokio::time::timeout(MINUTES, all).await;
    all.context("not all followers came to the end")??;
    // Stalled readers were blocked, not disconnected: the first one now reads everything.
    let mut first = stuck.into_iter().next().context("none is stuck")?;
    let mut flood = vec![0; FLOOD * 100];
    let read = tokio::time::timeout(MINUTES, first.read_exact(&mut flood)).await;
    read.context("who was stuck stays so")??;
    ensure!(
        flood == numbered(0..FLOOD).into_bytes(),
        "the bytes of a slow reader differ"
    );
    // Readers of an ended container that had not read a line still get everything.
    all_end_with(idle.into_iter().take(LATE), &expected).await?;
    drop(first);
    world.finish().await
}

/// A container's log over a WebSocket of the API server, as a browser reads it: the concatenated bytes of all messages.
async fn log_over_websocket(
    world: &World,
    pod: &str,
    container: &str,
    what: LogParams,
    protocol: &str,
) -> anyhow::Result<Vec<u8>> {
    let what = LogParams {
        container: Some(container.to_owned()),
        ..what
    };
    let base = format!("/api/v1/namespaces/{}/pods", world.namespace);
    let mut request = Request::new(base).logs(pod, &what)?;
    for (name, value) in [
        (header::CONNECTION, "Upgrade"),
        (header::UPGRADE, "websocket"),
        (header::SEC_WEBSOCKET_VERSION, "13"),
        (header::SEC_WEBSOCKET_KEY, &generate_key()),
        (header::SEC_WEBSOCKET_PROTOCOL, protocol),
    ] {
        request.headers_mut().insert(name, value.parse()?);
    }
    let client: Client = world.api::<Pod>().into_client();
    let answer = client.send(request.map(Body::from)).await?;
    ensure!(
        answer.status() == StatusCode::SWITCHING_PROTOCOLS,
        "{answer:?}"
    );
    let agreed = answer.headers().get(header::SEC_WEBSOCKET_PROTOCOL);
    ensure!(agreed.is_some_and(|it| it == protocol), "{agreed:?}");
    let io = TokioIo::new(hyper::upgrade::on(answer).await?);
    let mut socket = WebSocketStream::from_raw_socket(io, Role::Client, None).await;
    let mut log = Vec::new();
    let read = async {
        while let Some(message) = socket.next().await {
            match message {
                Ok(Message::Text(text)) => log.extend(BASE64_STANDARD.decode(text)?),
                Ok(Message::Binary(data)) => log.extend_from_slice(&data),
                Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_)) => {}
                // The API server ends a log by closing the connection, with or without a close message.
                Ok(Message::Close(_)) | Err(_) => break,
            }
        }
        anyhow::Ok(())
    };
    let read = tokio::time::timeout(MINUTES, read).await;
    read.context("the log does not end")??;
    Ok(log)
}

#[tokio::test]
async fn a_log_over_the_api_servers_websocket_is_complete() -> anyhow::Result<()> {
    // More than all buffers between the kubelet and a reader hold.
    const LINES: usize = 200_000;
    let world = World::new("logs-websocket").await?;
    let pod = PodBuilder::new("teller")
        .sh("echo short")
        .container("silent")
        .sh("true")
        .container("buffer")
        .sh("awk 'BEGIN { for (i = 0; i < 2048; i++) printf \"x\" }'")
        .container("pages")
        .sh(&print(0..100))
        .container("long")
        .sh(&print(0..LINES));
    world.create(&pod).await?;
    world.wait_phase("teller", "Succeeded", MINUTES).await?;
    for protocol in ["binary.k8s.io", "base64.binary.k8s.io"] {
        for (container, expected) in [
            ("main", "short\n".to_owned()),
            ("silent", String::new()),
            ("buffer", "x".repeat(2048)),
            ("pages", numbered(0..100)),
            ("long", numbered(0..LINES)),
        ] {
            for follow in [false, true] {
                let what = LogParams {
                    follow,
                    ..LogParams::default()
                };
                let log = log_over_websocket(&world, "teller", container, what, protocol).await?;
                ensure!(
                    log == expected.as_bytes(),
                    "{container} by {protocol}, followed: {follow}: {} of {} bytes",
                    log.len(),
                    expected.len()
                );
            }
        }
        let some = LogParams {
            limit_bytes: Some(3000),
            ..LogParams::default()
        };
        let log = log_over_websocket(&world, "teller", "long", some, protocol).await?;
        let expected = &numbered(0..30).into_bytes()[..3000];
        ensure!(log == expected, "{} of 3000 bytes", log.len());
        for follow in [false, true] {
            let last = LogParams {
                follow,
                tail_lines: Some(3),
                ..LogParams::default()
            };
            let log = log_over_websocket(&world, "teller", "long", last, protocol).await?;
            let expected = numbered(LINES - 3..LINES);
            let got = String::from_utf8_lossy(&log);
            ensure!(got == expected, "the last lines, followed: {follow}: {got}");
        }
    }
    world.finish().await
}
