//! What a client of the API server does in the benchmarks: kube's library with one warm client, and kubectl for cp.

use std::time::Duration;

use anyhow::Context as _;
use futures::AsyncReadExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, AttachParams, LogParams};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::bed::Bed;

/// Bytes moved at once.
const CHUNK: usize = 64 << 10;

/// What the library holds of an exec before it stops reading.
const WINDOW: usize = 1 << 20;

/// Of one cp.
const COPY: Duration = Duration::from_mins(10);

/// Runs a command in the pod's container `main`, to success, and answers the bytes of its output.
pub(super) async fn exec(bed: &Bed, pod: &str, command: &[&str]) -> anyhow::Result<u64> {
    let pods: Api<Pod> = bed.world.api();
    let streams = AttachParams::default()
        .container("main")
        .stderr(false)
        .max_stdout_buf_size(WINDOW);
    let mut process = pods.exec(pod, command.to_vec(), &streams).await?;
    let status = process.take_status().context("the status was taken")?;
    let bytes = count(process.stdout().context("no output")?).await?;
    let status = status.await.context("no status")?;
    anyhow::ensure!(
        status.status.as_deref() == Some("Success"),
        "{command:?}: {status:?}"
    );
    Ok(bytes)
}

/// Connects to a port of the pod and answers how many bytes came until the other side closed.
pub(super) async fn forward(bed: &Bed, pod: &str, port: u16) -> anyhow::Result<u64> {
    let pods: Api<Pod> = bed.world.api();
    let mut forwarder = pods.portforward(pod, &[port]).await?;
    count(forwarder.take_stream(port).context("no stream")?).await
}

/// Reads so many bytes of the log of `main`.
pub(super) async fn logs(bed: &Bed, pod: &str, bytes: u64) -> anyhow::Result<u64> {
    let what = LogParams {
        container: Some("main".to_owned()),
        limit_bytes: Some(i64::try_from(bytes)?),
        ..LogParams::default()
    };
    let pods: Api<Pod> = bed.world.api();
    let mut stream = pods.log_stream(pod, &what).await?;
    let mut buffer = vec![0; CHUNK];
    let mut bytes = 0;
    loop {
        match stream.read(&mut buffer).await? {
            0 => return Ok(bytes),
            read => bytes += u64::try_from(read)?,
        }
    }
}

/// `kubectl cp` of one file.
pub(super) async fn copy(bed: &Bed, from: &str, to: &str) -> anyhow::Result<()> {
    let words = ["cp", "--retries=0", "-c", "main", from, to];
    bed.world.kubectl(words).deadline(COPY).ok().await?;
    Ok(())
}

/// How many bytes a file of the pod has.
pub(super) async fn size(bed: &Bed, pod: &str, path: &str) -> anyhow::Result<u64> {
    let words = ["exec", pod, "-c", "main", "--", "stat", "-c", "%s", path];
    let text = bed.world.kubectl(words).ok().await?.text();
    text.parse()
        .with_context(|| format!("size of {path}: {text:?}"))
}

/// Reads to the end.
async fn count(mut from: impl AsyncRead + Unpin) -> anyhow::Result<u64> {
    let mut buffer = vec![0; CHUNK];
    let mut bytes = 0;
    loop {
        match AsyncReadExt::read(&mut from, &mut buffer).await? {
            0 => return Ok(bytes),
            read => bytes += u64::try_from(read)?,
        }
    }
}
