//! Level 2: the link between kubelet and agent is cut, or flaps, or comes back for many kubelets at once. Pods, followed logs
//! and commands do not suffer from it.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use futures::{AsyncBufReadExt as _, SinkExt as _, StreamExt as _, future::try_join_all};
use knoc_link::KEEPALIVE;
use knoc_proto::pb::{self, agent_client::AgentClient, pod_event::Event};
use knoc_tests::{
    relay::Relay,
    site::{Daemon, Kubelet, Options, Site},
    wait_for,
};
use serde_json::json;
use tokio_tungstenite::tungstenite::Message;
use tonic::transport::Channel;

const SOON: Duration = Duration::from_mins(2);

/// The real kubelet, whose link leads through a relay.
struct Linked {
    site: Site,
    relay: Relay,
    kubelet: Kubelet,
    process: Daemon,
}

impl Linked {
    async fn start() -> anyhow::Result<(Self, Daemon)> {
        let site = Site::new(Options::default())?;
        let agent = site.agent(&[]).await?;
        let mut relay = Relay::start().await?;
        relay.lead_to(site.address());
        let kubelet = Kubelet::prepare(&site).await?;
        let address = relay.address().to_string();
        let process = kubelet
            .start(&site, &[("KNOC_AGENT_ADDRESS", &address)])
            .await?;
        let linked = Self {
            site,
            relay,
            kubelet,
            process,
        };
        Ok((linked, agent))
    }

    /// A client of the kubelet API, as the API server is one.
    fn client(&self) -> anyhow::Result<kube::Client> {
        self.kubelet.client(&self.site)
    }

    fn log(&self) -> String {
        read(&self.site.path("kubelet.log"))
    }

    /// Waits until the kubelet's log has `text` that many times.
    async fn logged(&self, text: &str, times: usize) -> anyhow::Result<()> {
        wait_for(&format!("{text:?} in the log"), SOON, async || {
            let log = self.log();
            if log.matches(text).count() >= times {
                Ok(())
            } else {
                Err(log)
            }
        })
        .await
    }

    /// Creates a pod with one container that runs a shell script, and waits until it runs.
    async fn running(&self, name: &str, script: &str) -> anyhow::Result<()> {
        let command = json!(["/bin/sh", "-c", script]);
        let main = json!({"name": "main", "image": "none", "command": command});
        let spec = json!({"containers": [main]});
        self.kubelet.create_pod(name, spec)?;
        self.kubelet.phase(name, "Running", SOON).await?;
        Ok(())
    }
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// Prints lines in four parts; before each of the later ones it waits until its file exists.
fn parts(site: &Site, lines: usize) -> String {
    let part = |number: usize| {
        let (from, to) = (number * lines + 1, (number + 1) * lines);
        let go = site.path(&format!("go-{number}")).display().to_string();
        format!("while [ ! -e {go} ]; do sleep 0.02; done; seq {from} {to}")
    };
    (0..4).map(part).collect::<Vec<_>>().join("; ")
}

/// A log that is followed through the kubelet API.
struct Following<L> {
    lines: L,
    next: usize,
}

impl<L: futures::Stream<Item = std::io::Result<String>> + Unpin> Following<L> {
    /// Reads up to that line. Each must follow the one before it.
    async fn up_to(&mut self, last: usize) -> anyhow::Result<()> {
        while self.next <= last {
            let line = tokio::time::timeout(SOON, self.lines.next()).await;
            let line = line.with_context(|| format!("line {} does not come", self.next))?;
            let line = line.with_context(|| format!("it ended before line {}", self.next))??;
            ensure!(
                line == self.next.to_string(),
                "{line} instead of {}",
                self.next
            );
            self.next += 1;
        }
        Ok(())
    }

    async fn ends(mut self) -> anyhow::Result<()> {
        let end = tokio::time::timeout(SOON, self.lines.next()).await;
        let end = end.context("it does not end")?;
        ensure!(end.is_none(), "{end:?} after the last line");
        Ok(())
    }
}

async fn follow(
    linked: &Linked,
    pod: &str,
) -> anyhow::Result<Following<impl futures::Stream<Item = std::io::Result<String>> + Unpin>> {
    let path = format!("/containerLogs/default/{pod}/main?follow=true");
    let request = http::Request::get(path).body(Vec::new())?;
    let lines = linked.client()?.request_stream(request).await?.lines();
    Ok(Following { lines, next: 1 })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_followed_log_survives_a_cut_link_and_a_restarted_agent() -> anyhow::Result<()> {
    const LINES: usize = 20_000;
    let (linked, agent) = Linked::start().await?;
    let site = &linked.site;
    linked.running("talks", &parts(site, LINES)).await?;
    let mut following = follow(&linked, "talks").await?;
    site.put("go-0", "")?;
    following.up_to(LINES / 2).await?;
    // In the middle of a part: what is in flight is lost.
    linked.relay.refuse(true);
    linked.relay.cut_all();
    site.put("go-1", "")?;
    linked.logged("a log stream was interrupted", 1).await?;
    linked.logged("lost the link to the agent", 1).await?;
    linked.relay.refuse(false);
    following.up_to(2 * LINES).await?;
    // The agent is killed and started again while nothing is written.
    agent.kill().await?;
    site.put("go-2", "")?;
    linked.logged("a log stream was interrupted", 2).await?;
    let _agent = site.agent(&[]).await?;
    following.up_to(3 * LINES).await?;
    site.put("go-3", "")?;
    following.up_to(4 * LINES).await?;
    following.ends().await?;
    linked.kubelet.phase("talks", "Succeeded", SOON).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_whose_pod_is_deleted_during_the_cut_ends_with_an_error() -> anyhow::Result<()> {
    let (linked, _agent) = Linked::start().await?;
    let site = &linked.site;
    linked.running("leaves", &parts(site, 100)).await?;
    let mut following = follow(&linked, "leaves").await?;
    site.put("go-0", "")?;
    following.up_to(100).await?;
    linked.relay.refuse(true);
    linked.relay.cut_all();
    linked.logged("a log stream was interrupted", 1).await?;
    let now = json!({"gracePeriodSeconds": 0});
    linked
        .kubelet
        .api
        .delete("pods", "default", "leaves", &now)?;
    let end = tokio::time::timeout(SOON, following.lines.next()).await;
    let end = end.context("it does not end")?;
    ensure!(matches!(end, Some(Err(_))), "{end:?} instead of an error");
    linked
        .logged("the pod was deleted before it came back", 1)
        .await
}

/// Sends a line to the command and waits for its answer.
async fn echo<S>(socket: &mut S, line: &str) -> anyhow::Result<()>
where
    S: futures::Stream<Item = Result<Message, tokio_tungstenite::tungstenite::Error>>
        + futures::Sink<Message, Error = tokio_tungstenite::tungstenite::Error>
        + Unpin,
{
    let input = [&[0], line.as_bytes(), b"\n"].concat();
    socket.send(Message::binary(input)).await?;
    let wanted = format!("got {line}\n");
    let mut said = String::new();
    while !said.contains(&wanted) {
        let message = tokio::time::timeout(SOON, socket.next()).await;
        let message = message.with_context(|| format!("no answer to {line:?}: {said:?}"))?;
        let data = message.context("the command has ended")??.into_data();
        ensure!(
            data.first() != Some(&3),
            "{:?}",
            String::from_utf8_lossy(&data)
        );
        said.push_str(&String::from_utf8_lossy(data.get(1..).unwrap_or_default()));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_survives_the_loss_of_the_control_connection_and_not_of_its_own()
-> anyhow::Result<()> {
    let (linked, _agent) = Linked::start().await?;
    linked.running("works", "exec sleep 600").await?;
    // A busy machine may have needed another attempt; the last one is open.
    let control = linked.relay.connections();
    ensure!(control > 0, "no connection before the first stream");
    let script = "while%20read%20l;%20do%20echo%20got%20$l;%20done";
    let path = format!(
        "/exec/default/works/main?command=sh&command=-c&command={script}&input=1&output=1&error=0"
    );
    let request = http::Request::get(path).body(Vec::new())?;
    let mut socket = linked.client()?.connect(request).await?.into_stream();
    echo(&mut socket, "one").await?;
    ensure!(
        linked.relay.connections() == control + 1,
        "it has no connection of its own"
    );
    linked.relay.refuse(true);
    linked.relay.cut_one(control - 1)?;
    linked.logged("lost the link to the agent", 1).await?;
    echo(&mut socket, "two").await?;
    linked.relay.refuse(false);
    linked.logged("connected to the agent", 2).await?;
    echo(&mut socket, "three").await?;
    let began = Instant::now();
    linked.relay.cut_all();
    let mut status = None;
    while let Some(Ok(message)) = tokio::time::timeout(SOON, socket.next()).await? {
        if let Some((3, said)) = message.into_data().split_first() {
            status = Some(serde_json::from_slice::<serde_json::Value>(said)?);
        }
    }
    let status = status.context("it ended without a status")?;
    ensure!(status["status"] == "Failure", "{status}");
    let message = status["message"].as_str().unwrap_or_default();
    ensure!(
        message.contains("the link to the agent was lost"),
        "{status}"
    );
    ensure!(began.elapsed() < KEEPALIVE, "{:?}", began.elapsed());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_flaps_costs_no_pod_and_no_line() -> anyhow::Result<()> {
    const CUTS: usize = 20;
    const LINES: usize = 20_000;
    let (linked, _agent) = Linked::start().await?;
    let site = &linked.site;
    linked.running("talks", &parts(site, LINES)).await?;
    let mut following = follow(&linked, "talks").await?;
    let before = linked.process.resident()?;
    let flapping = async {
        let mut pods = Vec::new();
        for cut in 0..CUTS {
            if cut.is_multiple_of(CUTS / 4) {
                site.put(&format!("go-{}", cut / (CUTS / 4)), "")?;
            }
            let name = format!("flap-{cut}");
            let spec = counting(site)?;
            pods.push((linked.kubelet.create_pod(&name, spec)?, name));
            tokio::time::sleep(Duration::from_millis(rand::random_range(50..700))).await;
            linked.relay.cut_all();
        }
        anyhow::Ok(pods)
    };
    let (pods, ()) = tokio::try_join!(flapping, following.up_to(4 * LINES))?;
    following.ends().await?;
    for (uid, name) in &pods {
        linked.kubelet.phase(name, "Succeeded", SOON).await?;
        let (runs, claims) = (site.runs(uid)?, site.claims(uid)?);
        ensure!(
            (runs, claims) == (1, 1),
            "{name}: {runs} runs and {claims} claims"
        );
    }
    // Two connections for each cut, and what was tried while they came back.
    let connections = linked.relay.connections();
    ensure!(connections <= 4 * CUTS, "{connections} connections");
    let grown = linked.process.resident()?.saturating_sub(before);
    ensure!(grown < 64 << 10, "the kubelet has grown by {grown} KiB");
    Ok(())
}

/// The spec of a pod that records in `runs/UID` that it ran.
fn counting(site: &Site) -> anyhow::Result<serde_json::Value> {
    let runs = site.path("runs");
    std::fs::create_dir_all(&runs)?;
    let script = format!("echo $$ >> {}/$UID_OF_POD; sleep 0.2", runs.display());
    let uid = json!({"fieldRef": {"fieldPath": "metadata.uid"}});
    let env = json!([{"name": "UID_OF_POD", "valueFrom": uid}]);
    let command = json!(["/bin/sh", "-c", script]);
    Ok(json!({"containers": [{"name": "main", "image": "none", "command": command, "env": env}]}))
}

/// Watches the pods as a kubelet does, over a link that it opens again with pauses, until the snapshot is complete.
async fn snapshot(
    mut client: AgentClient<Channel>,
) -> anyhow::Result<tonic::Streaming<pb::PodEvent>> {
    wait_for("a snapshot", SOON, async || {
        client.get_info(pb::GetInfoRequest::default()).await?;
        let watch = client.watch_pods(pb::WatchPodsRequest {}).await?;
        let mut watch = watch.into_inner();
        loop {
            let event = watch.message().await?.and_then(|event| event.event);
            match event {
                Some(Event::Synced(_)) => return Ok(watch),
                Some(_) => {}
                None => return Err(tonic::Status::unavailable("the watch ended")),
            }
        }
    })
    .await
}

/// Each of them has two connections, all from one address, as behind NAT.
#[tokio::test(flavor = "multi_thread")]
async fn fifty_kubelets_come_back_to_a_restarted_agent() -> anyhow::Result<()> {
    const KUBELETS: usize = 50;
    let site = Site::new(Options::default())?;
    let wrapper = site.path("wrapper");
    site.put("wrapper", "#!/bin/sh\nulimit -n 4096\nexec \"$@\"\n")?;
    std::fs::set_permissions(
        &wrapper,
        std::os::unix::fs::PermissionsExt::from_mode(0o700),
    )?;
    let agent = site.wrapped_agent(&wrapper).await?;
    let mut links = Vec::new();
    for number in 0..2 * KUBELETS {
        let name = format!("node-{}", number / 2);
        links.push(site.kubelet_client(&name)?);
    }
    let all = || try_join_all(links.iter().cloned().map(snapshot));
    let watches = all().await.with_context(|| site.log())?;
    agent.kill().await?;
    for mut watch in watches {
        let ended = tokio::time::timeout(SOON, watch.message()).await;
        ensure!(
            ended.context("a watch hangs")?.is_err(),
            "a watch ended well"
        );
    }
    let _agent = site.wrapped_agent(&wrapper).await?;
    let watches = all().await.with_context(|| site.log())?;
    ensure!(watches.len() == 2 * KUBELETS);
    Ok(())
}
