//! Level 2: a reader that stalls blocks its own stream, and no other stream of the same connections.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use knoc_proto::pb::{self, ExecInput, exec_input::Input};
use knoc_tests::{
    site::{Options, Pod, Site, container, processes_naming},
    wait_for,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

const SOON: Duration = Duration::from_mins(2);

/// Each fills a stream's window at both links; together this is many times what is in flight between two hops.
const STALLED: usize = 24;

/// The number of bytes that all writers have written together, or an error if it cannot be read.
fn written(pids: &[i32]) -> Result<u64, String> {
    let of = |pid: &i32| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/io")).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("wchar: "));
        line?.parse::<u64>().ok()
    };
    let sum: Option<u64> = pids.iter().map(of).sum();
    sum.ok_or_else(|| format!("no account of {pids:?}"))
}

#[tokio::test]
async fn readers_that_stall_block_no_other_stream() -> anyhow::Result<()> {
    let (site, _agent, mut client) = Site::start(Options::default()).await?;
    let pod = Pod::new("stalled", vec![container("main", &["sleep", "600"], &[])]);
    pod.ensure(&client).await?;
    pod.running(&client, SOON).await?;
    let marked = site.path("never-read");
    let mut open = Vec::new();
    for _ in 0..STALLED {
        let (input, inputs) = mpsc::channel(1);
        let start = pb::ExecStart {
            uid: "stalled".to_owned(),
            command: vec!["yes".to_owned(), marked.display().to_string()],
            stdout: true,
            ..pb::ExecStart::default()
        };
        let start = ExecInput {
            input: Some(Input::Start(start)),
        };
        input.send(start).await?;
        let output = client.exec(ReceiverStream::new(inputs)).await?;
        open.push((input, output.into_inner()));
    }
    let mut before = 0;
    wait_for("every writer stands still", SOON, async || {
        let pids: Vec<i32> = processes_naming(&marked)
            .into_iter()
            .filter(|(_, line)| line.starts_with("yes "))
            .map(|(pid, _)| pid)
            .collect();
        let now = written(&pids)?;
        let moved = now.abs_diff(std::mem::replace(&mut before, now));
        if pids.len() == STALLED && moved == 0 {
            Ok(())
        } else {
            Err(format!("{} writers, {moved} bytes more", pids.len()))
        }
    })
    .await?;
    let others = async {
        for _ in 0..10 {
            let (output, code) = pod.exec(&client, "main", &["echo", "through"], b"").await?;
            ensure!(output == b"through\n" && code == 0, "{code}: {output:?}");
        }
        pod.log(&client, "main").await
    };
    tokio::time::timeout(SOON, others)
        .await
        .context("the stalled readers hold up the others")??;
    for (_, output) in &mut open {
        output.message().await?.context("a stalled stream ended")?;
    }
    drop(open);
    pod.remove(&client).await
}
