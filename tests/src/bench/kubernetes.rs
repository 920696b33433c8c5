//! The client of the API server in the benchmarks: kube's library with one warm client, and kubectl for cp.

use std::process::Stdio;
use std::time::Duration;

use anyhow::Context as _;
use bytes::{BufMut as _, Bytes, BytesMut};
use futures::{SinkExt as _, StreamExt as _};
use http_body_util::BodyExt as _;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Status;
use kube::api::{Api, AttachParams, LogParams, Request};
use kube::client::Body;
use kube::{Client, Resource as _};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio_tungstenite::tungstenite::Message;

use super::bed::Bed;
use crate::Run;

/// The size of the buffer for copying.
const CHUNK: usize = 64 << 10;

/// How many bytes of an exec the library buffers before it stops reading.
const WINDOW: usize = 1 << 20;

/// The channels on which data arrives: from an exec, and from the first forwarded port.
const STDOUT: u8 = 1;
const FORWARDED: u8 = 0;

/// The channels for data to the pod, for the exit status, and for closing a channel.
const STDIN: u8 = 0;
const STATUS: u8 = 3;
const CLOSE: u8 = 255;

/// The time limit for one cp.
const COPY: Duration = Duration::from_mins(10);

/// Runs a command in the pod's container `main`, which must succeed; returns the number of bytes of its output.
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

/// The same for a command with much output. It reads the WebSocket itself, as the relays' reader reads its TLS connection;
/// otherwise the pipe in memory, through which the library passes every byte, would be measured too.
pub(super) async fn exec_bytes(bed: &Bed, pod: &str, command: &[&str]) -> anyhow::Result<u64> {
    let streams = AttachParams::default().container("main").stderr(false);
    let request = pods_of(bed).exec(pod, command.to_vec(), &streams)?;
    let mut said = Vec::new();
    let bytes = receive(bed, request, STDOUT, &mut said).await?;
    let status: Status = serde_json::from_slice(&said).context("no status")?;
    anyhow::ensure!(
        status.status.as_deref() == Some("Success"),
        "{command:?}: {status:?}"
    );
    Ok(bytes)
}

/// Connects to a port of the pod; returns how many bytes arrived until the other side closed.
pub(super) async fn forward(bed: &Bed, pod: &str, port: u16) -> anyhow::Result<u64> {
    let request = pods_of(bed).portforward(pod, &[port])?;
    let mut said = Vec::new();
    let bytes = receive(bed, request, FORWARDED, &mut said).await?;
    // Both channels begin with the port's number.
    anyhow::ensure!(said.len() == 2, "{:?}", String::from_utf8_lossy(&said));
    Ok(bytes - 2)
}

fn pods_of(bed: &Bed) -> Request {
    let namespace = &bed.world.namespace;
    Request::new(Pod::url_path(&(), Some(namespace)))
}

/// Counts the bytes that arrive on a channel until its end; data of other channels is appended to `said`.
async fn receive(
    bed: &Bed,
    request: http::Request<Vec<u8>>,
    channel: u8,
    said: &mut Vec<u8>,
) -> anyhow::Result<u64> {
    let client: Client = bed.world.api::<Pod>().into_client();
    let mut messages = client.connect(request).await?.into_stream();
    let mut bytes = 0;
    while let Some(message) = messages.next().await {
        match message?.into_data().split_first() {
            Some((of, data)) if *of == channel => bytes += u64::try_from(data.len())?,
            Some((255, _)) | None => {}
            Some((_, data)) => said.extend_from_slice(data),
        }
    }
    Ok(bytes)
}

/// Reads `bytes` bytes of the log of `main` from the body of the response.
pub(super) async fn logs(bed: &Bed, pod: &str, bytes: u64) -> anyhow::Result<u64> {
    let what = LogParams {
        container: Some("main".to_owned()),
        limit_bytes: Some(i64::try_from(bytes)?),
        ..LogParams::default()
    };
    let request = pods_of(bed).logs(pod, &what)?.map(Body::from);
    let client: Client = bed.world.api::<Pod>().into_client();
    let answer = client.send(request).await?;
    anyhow::ensure!(answer.status().is_success(), "{}", answer.status());
    let mut body = answer.into_body().into_data_stream();
    let mut bytes = 0;
    while let Some(data) = body.next().await {
        bytes += u64::try_from(data?.len())?;
    }
    Ok(bytes)
}

/// Copies one file with `kubectl cp`.
pub(super) async fn copy(bed: &Bed, from: &str, to: &str) -> anyhow::Result<()> {
    let arguments = ["cp", "--retries=0", "-c", "main", from, to];
    bed.world.kubectl(arguments).deadline(COPY).ok().await?;
    Ok(())
}

/// Copies a file to the pod without kubectl: the output of a local `tar` goes through the WebSocket to `tar` in the pod.
pub(super) async fn copy_up(bed: &Bed, pod: &str, local: &str, to: &str) -> anyhow::Result<()> {
    let streams = AttachParams::default()
        .container("main")
        .stdin(true)
        .stderr(false);
    let request = pods_of(bed).exec(pod, ["tar", "-xf", "-", "-C", to], &streams)?;
    let client: Client = bed.world.api::<Pod>().into_client();
    let connection = client.connect(request).await?;
    anyhow::ensure!(connection.supports_stream_close(), "no v5");
    let (mut into, mut messages) = connection.into_stream().split();
    let mut tar = Run::new("tar").args(["-cf", "-", "-C", local, "large"]);
    let mut tar = tar.command_mut().stdout(Stdio::piped()).spawn()?;
    let mut packed = tar.stdout.take().context("no pipe")?;
    let send = async move {
        loop {
            let mut message = BytesMut::with_capacity(CHUNK);
            message.put_u8(STDIN);
            if packed.read_buf(&mut message).await? == 0 {
                break;
            }
            into.send(Message::Binary(message.freeze())).await?;
        }
        into.send(Message::Binary(Bytes::from_static(&[CLOSE, STDIN])))
            .await?;
        anyhow::Ok(into)
    };
    let said = async move {
        let mut said = Vec::new();
        while let Some(message) = messages.next().await {
            if let Some((&STATUS, data)) = message?.into_data().split_first() {
                said.extend_from_slice(data);
            }
        }
        anyhow::Ok(said)
    };
    let (_into, said) = tokio::try_join!(send, said)?;
    let status: Status = serde_json::from_slice(&said).context("no status")?;
    let success = status.status.as_deref() == Some("Success");
    anyhow::ensure!(success, "tar in the pod: {status:?}");
    anyhow::ensure!(tar.wait().await?.success(), "tar here");
    Ok(())
}

/// The size of a file in the pod.
pub(super) async fn size(bed: &Bed, pod: &str, path: &str) -> anyhow::Result<u64> {
    let arguments = ["exec", pod, "-c", "main", "--", "stat", "-c", "%s", path];
    let text = bed.world.kubectl(arguments).ok().await?.text();
    text.parse()
        .with_context(|| format!("size of {path}: {text:?}"))
}

/// Reads to the end; returns the number of bytes.
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
