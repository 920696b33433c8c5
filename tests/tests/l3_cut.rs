//! Streams that are interrupted: the agent, the shim or the job is killed while kubectl runs exec, attach, port-forward and
//! `logs -f`. The first three fail at once, and none of them hangs or ends with success; the log continues.
//! The tests run alone, one after the other, because they affect the agent that all tests share.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use knoc_link::{KEEPALIVE, KEEPALIVE_TIMEOUT};
use knoc_tests::{
    Background, Forward, PodBuilder, World,
    ports::some_port,
    wait_for,
    world::{SOON, exit_code, why},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

/// How long a broken stream may take to fail on a busy machine: less than the shortest time in which a silent link is found.
const AT_ONCE: Duration = KEEPALIVE_TIMEOUT.saturating_sub(Duration::from_secs(1));

/// How long both sides of a link may take to detect that it is silent and to report it.
const NOTICED: Duration = KEEPALIVE
    .saturating_add(KEEPALIVE_TIMEOUT)
    .saturating_add(Duration::from_mins(1));

/// `KillWait` of the test bed's Slurm.
const KILL_WAIT: Duration = Duration::from_secs(3);

/// Prints a line ten times a second. The pod also runs an echo server.
const TALKER: &str = "while :; do echo tick; sleep 0.1; done";

fn talker(port: u16) -> PodBuilder {
    PodBuilder::new("talker").sh(&format!("nc -ll -p {port} -e cat & {TALKER}"))
}

/// kubectl's four kinds of streams into the pod `talker`, each with traffic.
struct Streams {
    exec: Background,
    attach: Background,
    logs: Background,
    forward: Forward,
    /// A connection through `forward` to the pod's server.
    connection: TcpStream,
}

impl Streams {
    async fn open(world: &World, port: u16) -> anyhow::Result<Self> {
        // kubectl's port-forward ends with the first connection that is refused.
        world.wait_listens("talker", "main", port).await?;
        let talking = async |args: &[&str]| {
            let mut client = Background::start(world.kubectl(args))?;
            client.expect("tick\ntick\n").await?;
            anyhow::Ok(client)
        };
        let exec = talking(&["exec", "talker", "--", "sh", "-c", TALKER]).await?;
        let attach = talking(&["attach", "talker"]).await?;
        let logs = talking(&["logs", "-f", "talker"]).await?;
        let forward = world.kubectl(["port-forward", "talker", &format!(":{port}")]);
        let forward = Forward::start(forward).await?;
        let mut connection = forward.connect().await?;
        connection.write_all(b"?").await?;
        let mut echo = [0];
        let answer = timeout(SOON, connection.read_exact(&mut echo)).await;
        answer.with_context(|| forward.program.shown())??;
        Ok(Self {
            exec,
            attach,
            logs,
            forward,
            connection,
        })
    }

    /// Checks that all streams except the log have failed by then.
    async fn fail(&mut self, deadline: Instant) -> anyhow::Result<()> {
        let Self {
            exec,
            attach,
            forward,
            connection,
            ..
        } = self;
        let ends = tokio::join!(
            failed("exec", exec, deadline),
            failed("attach", attach, deadline),
            failed("port-forward", &mut forward.program, deadline),
            closed(connection, deadline),
        );
        all([ends.0, ends.1, ends.2, ends.3])
    }
}

/// All errors, not only the first one.
fn all<const N: usize>(ends: [anyhow::Result<()>; N]) -> anyhow::Result<()> {
    let wrong = ends.into_iter().filter_map(Result::err);
    let wrong: Vec<String> = wrong.map(|error| format!("{error:#}")).collect();
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// Waits until the program ends in time; returns its exit code and its messages without the pod's output.
async fn ended(
    name: &str,
    client: &mut Background,
    deadline: Instant,
) -> anyhow::Result<(i32, String)> {
    let left = deadline.saturating_duration_since(Instant::now());
    let code = client.exit_code(left).await;
    let code = code.with_context(|| format!("{name} hangs"))?;
    let shown = client.shown();
    let messages: Vec<&str> = shown.lines().filter(|line| *line != "tick").collect();
    Ok((code, messages.join("\n")))
}

/// Checks that the program ends in time with a reason and with a failing exit code.
async fn failed(name: &str, client: &mut Background, deadline: Instant) -> anyhow::Result<()> {
    let (code, messages) = ended(name, client, deadline).await?;
    ensure!(code != 0, "{name} ended as if all were well: {messages}");
    ensure!(
        messages.contains("error: "),
        "{name} does not say why: {messages}"
    );
    Ok(())
}

/// Checks that the forwarded connection is closed in time, by an end or by a reset.
async fn closed(connection: &mut TcpStream, deadline: Instant) -> anyhow::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    let mut more = Vec::new();
    match timeout(left, connection.read_to_end(&mut more)).await {
        Ok(_) => ensure!(more.is_empty(), "bytes that nobody sent: {more:?}"),
        Err(_) => bail!("the forwarded connection stays open"),
    }
    Ok(())
}

#[tokio::test]
async fn kubectl_fails_at_once_when_the_agent_is_killed() -> anyhow::Result<()> {
    let world = World::new("cut-agent").await?;
    let port = some_port();
    let uid = world.running(&talker(port)).await?;
    let mut streams = Streams::open(&world, port).await?;
    world.service("agent.sh", "kill").ok().await?;
    let ends = streams.fail(Instant::now() + AT_ONCE).await;
    let up = world.service("agent.sh", "up").ok().await;
    ends?;
    up?;
    // The job continues, and a new agent reaches it.
    wait_for("the same pod answers again", SOON, async || {
        let exec = ["exec", "talker", "--", "echo", "again"];
        let answer = world.kubectl(exec).ok().await?;
        ensure!(answer.text() == "again", "{answer}");
        Ok(())
    })
    .await?;
    world.one_job(&uid, "RUNNING").await?;
    // The log goes on where it was, without a lost or doubled line.
    let job = world.wait_job(&uid).await?;
    let kill = world.on("login", ["scancel", "--signal=KILL", &job]);
    kill.ok().await?;
    world.wait_phase("talker", "Failed", SOON).await?;
    whole_log(&world, &mut streams.logs).await?;
    world.finish().await
}

/// As during an upgrade of the chart: streams that end with the kubelet have not succeeded.
#[tokio::test]
async fn kubectl_fails_when_the_kubelet_is_stopped() -> anyhow::Result<()> {
    let world = World::new("cut-kubelet").await?;
    let port = some_port();
    let uid = world.running(&talker(port)).await?;
    let mut streams = Streams::open(&world, port).await?;
    world.service("kubelet.sh", "down").ok().await?;
    let ends = streams.fail(Instant::now() + AT_ONCE).await;
    let up = world.service("kubelet.sh", "up");
    up.ok().await?;
    ends?;
    for client in [&streams.exec, &streams.attach] {
        let shown = client.shown();
        ensure!(shown.contains("the kubelet is shutting down"), "{shown}");
    }
    world.one_job(&uid, "RUNNING").await?;
    world.finish().await
}

/// Checks the streams of a pod whose shim is killed with `kill`.
async fn shim_is_killed(
    test: &str,
    kill: impl AsyncFnOnce(&World, &str) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let world = World::new(test).await?;
    let port = some_port();
    let uid = world.running(&talker(port)).await?;
    let mut streams = Streams::open(&world, port).await?;
    kill(&world, &uid).await?;
    streams.fail(Instant::now() + AT_ONCE).await?;
    // The log is not lost with the shim: it continues from the files and ends with the pod.
    let ended = world.wait_phase("talker", "Failed", SOON).await?;
    let (reason, message) = why(&ended);
    ensure!(
        reason == "ContainerStatusUnknown" && message.contains("signal 9"),
        "{reason}: {message}"
    );
    whole_log(&world, &mut streams.logs).await?;
    world.finish().await
}

/// Checks that the follower got the complete log.
async fn whole_log(world: &World, logs: &mut Background) -> anyhow::Result<()> {
    let code = logs.exit_code(SOON).await?;
    let (shown, whole) = (logs.shown(), world.logs("talker", "main").await?);
    ensure!(code == 0 && shown == whole, "{code}: {shown} of {whole}");
    Ok(())
}

#[tokio::test]
async fn kubectl_fails_at_once_when_the_shim_is_killed() -> anyhow::Result<()> {
    shim_is_killed("cut-shim", async |world, uid| {
        let node = world.compute_node(uid).await?;
        let shim = format!("knoc-agent shim .*{uid}");
        let kill = world.on(&node, ["pkill", "-KILL", "-f", &shim]);
        kill.ok().await.map(drop)
    })
    .await
}

#[tokio::test]
async fn kubectl_fails_at_once_when_slurm_kills_the_batch_script() -> anyhow::Result<()> {
    shim_is_killed("cut-batch", async |world, uid| {
        let job = world.wait_job(uid).await?;
        let kill = world.on("login", ["scancel", "--batch", "--signal=KILL", &job]);
        kill.ok().await.map(drop)
    })
    .await
}

/// Slurm sends TERM first, and KILL after [`KILL_WAIT`]: the shim ends its containers and their streams in between.
#[tokio::test]
async fn kubectl_fails_in_time_when_the_job_is_cancelled() -> anyhow::Result<()> {
    let world = World::new("cut-job").await?;
    let port = some_port();
    let uid = world.running(&talker(port)).await?;
    let mut streams = Streams::open(&world, port).await?;
    let job = world.wait_job(&uid).await?;
    let kill = world.on("login", ["scancel", "--signal=KILL", &job]);
    kill.ok().await?;
    let deadline = Instant::now() + KILL_WAIT + AT_ONCE;
    let ends = tokio::join!(
        ended("exec", &mut streams.exec, deadline),
        ended("attach", &mut streams.attach, deadline),
        closed(&mut streams.connection, deadline),
    );
    // A command reports how it ended; an attached client has seen all of the output.
    let (code, messages) = ends.0?;
    ensure!(code != 0 && !messages.is_empty(), "{code}: {messages}");
    ends.1?;
    ends.2?;
    let ended = world.wait_phase("talker", "Failed", SOON).await?;
    ensure!(why(&ended).0 == "Cancelled", "{:?}", why(&ended));
    ensure!(exit_code(&ended, "main") == Some(137), "{:?}", ended.status);
    // port-forward notices it with the next connection, as with any kubelet.
    let Streams { forward, .. } = &mut streams;
    let answer = forward.exchange(b"?").await.unwrap_or_default();
    ensure!(answer.is_empty(), "{answer:?}");
    let deadline = Instant::now() + AT_ONCE;
    failed("port-forward", &mut forward.program, deadline).await?;
    whole_log(&world, &mut streams.logs).await?;
    world.finish().await
}

/// As with a firewall that forgot the connection, or a broken cable: no packet passes, and no error is reported.
#[tokio::test]
async fn kubectl_fails_when_the_link_goes_silent_and_the_pod_continues() -> anyhow::Result<()> {
    let world = World::new("cut-link").await?;
    let port = some_port();
    let uid = world.running(&talker(port)).await?;
    let mut streams = Streams::open(&world, port).await?;
    let way = |state| world.on_as_root("login", ["ip", "link", "set", "eth1", state]);
    way("down").ok().await?;
    let ends = async {
        streams.fail(Instant::now() + NOTICED).await?;
        wait_for("the node says that the agent is away", SOON, async || {
            let connected = world.condition(&world.node, "AgentConnected").await?;
            let ready = world.condition(&world.node, "Ready").await?;
            ensure!(connected.status == "False", "{connected:?}");
            ensure!(ready.status == "True", "{ready:?}");
            Ok(())
        })
        .await
    };
    let ends = ends.await;
    way("up").ok().await?;
    ends?;
    wait_for(
        "the same pod answers, and the command has ended",
        SOON,
        async || {
            let count = "ps | grep -c '[w]hile :'";
            let exec = ["exec", "talker", "--", "sh", "-c", count];
            let loops = world.kubectl(exec).ok().await?.text();
            ensure!(loops == "1", "{loops} loops, of which the pod's own is one");
            Ok(())
        },
    )
    .await?;
    world.one_job(&uid, "RUNNING").await?;
    world.finish().await
}
