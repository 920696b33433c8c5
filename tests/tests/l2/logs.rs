//! Level 2: a log that is being read continues, byte for byte, when the shim or its link is lost.

use std::{fmt::Write as _, time::Duration};

use anyhow::{Context as _, ensure};
use knoc_proto::{
    pb::{self, agent_client::AgentClient},
    reason::ErrorReason,
};
use knoc_tests::{
    relay::Relay,
    site::{Options, Pod, Site, container, processes_naming},
};
use rustix::process::{Pid, Signal, kill_process};
use tonic::{Streaming, transport::Channel};

const SOON: Duration = Duration::from_mins(2);

/// Prints many lines, waits until `go` exists, prints as many again and ends.
const LINES: usize = 40_000;

fn program(site: &Site) -> pb::Container {
    let script = format!(
        "seq 1 {LINES}; while [ ! -e {} ]; do sleep 0.02; done; seq {} {}",
        site.path("go").display(),
        LINES + 1,
        2 * LINES
    );
    container("main", &["/bin/sh", "-c", &script], &[])
}

fn whole() -> String {
    (1..=2 * LINES).fold(String::new(), |mut text, n| {
        writeln!(text, "{n}").ok();
        text
    })
}

struct Reading {
    chunks: Streaming<pb::LogChunk>,
    text: Vec<u8>,
}

impl Reading {
    async fn follow(
        pod: &Pod,
        client: &AgentClient<Channel>,
        edit: impl FnOnce(&mut pb::ReadLogsRequest),
    ) -> anyhow::Result<Self> {
        let mut request = pb::ReadLogsRequest {
            uid: pod.uid().to_owned(),
            container: "main".to_owned(),
            follow: true,
            tail_lines: -1,
            ..pb::ReadLogsRequest::default()
        };
        edit(&mut request);
        let chunks = client.clone().read_logs(request).await?.into_inner();
        Ok(Self {
            chunks,
            text: Vec::new(),
        })
    }

    /// Reads one chunk; false at the end.
    async fn step(&mut self) -> anyhow::Result<bool> {
        let chunk = tokio::time::timeout(SOON, self.chunks.message()).await;
        let text = String::from_utf8_lossy(&self.text);
        let tail: String = text.chars().rev().take(20).collect();
        let chunk = chunk.with_context(|| format!("nothing after {tail:?} (reversed)"))??;
        Ok(match chunk {
            Some(chunk) => {
                self.text.extend_from_slice(&chunk.data);
                true
            }
            None => false,
        })
    }

    async fn rest(mut self) -> anyhow::Result<String> {
        while self.step().await? {}
        Ok(String::from_utf8(self.text)?)
    }
}

fn same(what: &str, read: &str, expected: &str) -> anyhow::Result<()> {
    let at = read
        .lines()
        .zip(expected.lines())
        .position(|(one, other)| one != other);
    ensure!(
        read == expected,
        "{what}: {} bytes read, {} expected, first different line {at:?}",
        read.len(),
        expected.len()
    );
    Ok(())
}

#[tokio::test]
async fn a_log_continues_from_the_files_when_the_link_is_cut() -> anyhow::Result<()> {
    let mut relay = Relay::start().await?;
    let site = Site::new(Options {
        shims_dial: Some(relay.address()),
        ..Options::default()
    })?;
    relay.lead_to(site.shim_address());
    let _agent = site.agent(&[]).await?;
    let client = site.client()?;
    let pod = Pod::new("cut", vec![program(&site)]);
    pod.ensure(&client).await?;
    pod.running(&client, SOON)
        .await
        .with_context(|| site.log())?;
    let mut early = Reading::follow(&pod, &client, |_| ()).await?;
    ensure!(early.step().await?, "the log ended at once");
    // Another reader that has read nothing yet, and one with a byte limit.
    let idle = Reading::follow(&pod, &client, |_| ()).await?;
    let limited = Reading::follow(&pod, &client, |request| request.limit_bytes = 300_000).await?;
    relay.cut();
    pod.link_down(&client, SOON).await?;
    site.put("go", "")?;
    let expected = whole();
    same("read from the start", &early.rest().await?, &expected)?;
    same("not read before", &idle.rest().await?, &expected)?;
    same("limited", &limited.rest().await?, &expected[..300_000])?;
    pod.succeeded(&client, SOON).await
}

#[tokio::test]
async fn a_followed_log_ends_with_a_shim_that_was_killed() -> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let pod = Pod::new("killed", vec![program(&site)]);
    pod.ensure(&client).await?;
    pod.running(&client, SOON)
        .await
        .with_context(|| site.log())?;
    let mut reading = Reading::follow(&pod, &client, |_| ()).await?;
    ensure!(reading.step().await?, "the log ended at once");
    let jobdir = site.jobdir("killed");
    let (shim, _) = processes_naming(&jobdir)
        .into_iter()
        .find(|(_, cmdline)| cmdline.contains("knoc-agent shim"))
        .context("no shim")?;
    kill_process(Pid::from_raw(shim).context("a pid")?, Signal::KILL)?;
    let text = reading.rest().await?;
    let outcome = pod.finished(&client, SOON).await?;
    ensure!(
        outcome.kind() == pb::OutcomeKind::Failed,
        "success was guessed: {outcome:?}"
    );
    let kept = pod.log(&client, "main").await?;
    same("what the files keep", &text, std::str::from_utf8(&kept)?)
}

#[tokio::test]
async fn what_the_job_prints_before_its_pod_is_in_no_log_of_a_container() -> anyhow::Result<()> {
    let prelude = "echo the modules of the site; echo and a warning >&2\n".to_owned();
    let (site, _agent, client) = Site::start(Options {
        prelude,
        ..Options::default()
    })
    .await?;
    let script = "echo of the program; echo and its error >&2";
    let program = container("main", &["/bin/sh", "-c", script], &[]);
    let pod = Pod::new("quiet", vec![program]);
    pod.ensure(&client).await?;
    pod.succeeded(&client, SOON)
        .await
        .with_context(|| site.log())?;
    let log = pod.log(&client, "main").await?;
    let log = String::from_utf8_lossy(&log);
    // Both streams are in the log, in either order.
    let mut lines: Vec<&str> = log.lines().collect();
    lines.sort_unstable();
    ensure!(lines == ["and its error", "of the program"], "{log}");
    Ok(())
}

#[tokio::test]
async fn a_log_is_asked_for_by_its_container_and_never_by_a_path() -> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let pod = Pod::new("plain", vec![container("main", &["/bin/true"], &[])]);
    pod.ensure(&client).await?;
    pod.succeeded(&client, SOON)
        .await
        .with_context(|| site.log())?;
    for name in ["../../../ca.crt", "/etc/passwd", "main/../main", ""] {
        let refused = pod.log(&client, name).await.err();
        let refused = refused.with_context(|| format!("{name:?} was read"))?;
        let status = refused.downcast_ref::<tonic::Status>();
        let reason = status.and_then(ErrorReason::of);
        ensure!(
            reason == Some(ErrorReason::InvalidRequest),
            "{name:?}: {refused:#}"
        );
    }
    Ok(())
}
