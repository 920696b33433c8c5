//! The Rust client library on the command line; tests/interop/README.md has the contract.

use std::process::ExitCode;

use anyhow::{Context as _, bail};
use futures::{AsyncReadExt as _, SinkExt as _};
use k8s_openapi::{api::core::v1::Pod, apimachinery::pkg::apis::meta::v1::Status};
use kube::{
    Api, Client,
    api::{AttachParams, AttachedProcess, LogParams, TerminalSize},
};
use rustix::termios::tcgetwinsize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy};

/// The client itself failed.
const FAILED: u8 = 125;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = tokio::runtime::Runtime::new()
        .context("starting the runtime")
        .and_then(|runtime| {
            let outcome = runtime.block_on(run(&arguments));
            // A thread may still read standard input.
            runtime.shutdown_background();
            outcome
        });
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::from(FAILED)
        }
    }
}

async fn run(arguments: &[&str]) -> anyhow::Result<u8> {
    let [verb, namespace, pod, what, command @ ..] = arguments else {
        bail!("usage: knoc-kube-client VERB NAMESPACE POD CONTAINER|PORT [COMMAND...]");
    };
    drop(rustls::crypto::ring::default_provider().install_default());
    let pods: Api<Pod> = Api::namespaced(Client::try_default().await?, namespace);
    let streams = AttachParams::default()
        .container(*what)
        .stdin(*verb != "exec");
    match *verb {
        "exec" | "exec-stdin" => {
            relay(
                pods.exec(pod, command.to_vec(), &streams.stderr(true))
                    .await?,
            )
            .await
        }
        "exec-tty" => {
            let on_terminal = streams.tty(true).stderr(false);
            let mut process = pods.exec(pod, command.to_vec(), &on_terminal).await?;
            let size = tcgetwinsize(std::io::stdin())?;
            let mut sizes = process.terminal_size().context("no sizes on a terminal")?;
            let size = TerminalSize {
                width: size.ws_col,
                height: size.ws_row,
            };
            sizes.send(size).await?;
            relay(process).await
        }
        "attach" => relay(pods.attach(pod, &streams.stderr(true)).await?).await,
        "port-forward" => forward(&pods, pod, what.parse()?).await,
        "logs" => logs(&pods, pod, what).await,
        _ => bail!("no verb {verb:?}"),
    }
}

/// Connects the streams of the process to ours until it ends; returns its exit code.
async fn relay(mut process: AttachedProcess) -> anyhow::Result<u8> {
    let status = process.take_status().context("the status was taken")?;
    let input = pass(Some(tokio::io::stdin()), process.stdin());
    let outputs = async {
        tokio::try_join!(
            pass(process.stdout(), Some(tokio::io::stdout())),
            pass(process.stderr(), Some(tokio::io::stderr()))
        )
    };
    tokio::pin!(outputs);
    tokio::select! {
        biased;
        outcome = &mut outputs => { outcome?; }
        // The end of one stream does not end the others.
        fed = input => { fed?; outputs.await?; }
    }
    status.await.map_or(Ok(0), |status| code_of(&status))
}

/// Copies until the end and passes the end on. Does nothing if one of the two is missing.
async fn pass(
    from: Option<impl AsyncRead + Unpin>,
    to: Option<impl AsyncWrite + Unpin>,
) -> anyhow::Result<()> {
    if let (Some(mut from), Some(mut to)) = (from, to) {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let count = from.read(&mut buffer).await?;
            if count == 0 {
                break;
            }
            to.write_all(&buffer[..count]).await?;
            to.flush().await?;
        }
        to.shutdown().await?;
    }
    Ok(())
}

/// The exit code in a status.
fn code_of(status: &Status) -> anyhow::Result<u8> {
    if status.status.as_deref() == Some("Success") {
        return Ok(0);
    }
    let causes = status.details.iter().flat_map(|details| &details.causes);
    let code = causes
        .flatten()
        .find(|cause| cause.reason.as_deref() == Some("ExitCode"))
        .and_then(|cause| cause.message.as_deref());
    match code {
        Some(code) => Ok(code.parse()?),
        None => bail!("{}", status.message.as_deref().unwrap_or("no message")),
    }
}

async fn forward(pods: &Api<Pod>, pod: &str, port: u16) -> anyhow::Result<u8> {
    let mut forwarder = pods.portforward(pod, &[port]).await?;
    let stream = forwarder.take_stream(port).context("no stream")?;
    let error = forwarder.take_error(port).context("no errors")?;
    let (mut reader, mut writer) = tokio::io::split(stream);
    let send = async {
        copy(&mut tokio::io::stdin(), &mut writer).await?;
        // Closing our side would end the whole connection, because there is no half-close.
        std::future::pending::<std::io::Result<()>>().await
    };
    let mut stdout = tokio::io::stdout();
    tokio::select! {
        written = send => written?,
        read = copy(&mut reader, &mut stdout) => { read?; }
    }
    stdout.flush().await?;
    drop((reader, writer));
    match error.await {
        Some(message) => bail!(message),
        None => Ok(0),
    }
}

async fn logs(pods: &Api<Pod>, pod: &str, container: &str) -> anyhow::Result<u8> {
    let what = LogParams {
        container: Some(container.to_owned()),
        follow: true,
        ..LogParams::default()
    };
    let mut log = pods.log_stream(pod, &what).await?;
    let mut stdout = tokio::io::stdout();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = log.read(&mut buffer).await?;
        if count == 0 {
            return Ok(0);
        }
        stdout.write_all(&buffer[..count]).await?;
        stdout.flush().await?;
    }
}
