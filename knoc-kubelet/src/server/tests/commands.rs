//! Commands of fake containers, and servers with containers that run them.

use std::sync::Arc;

use futures::{StreamExt as _, stream};
use k8s_openapi::api::core::v1::EphemeralContainer;
use knoc_proto::pb::{self, exec_input::Input, exec_output::Output};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;

use crate::server::PodView;

use super::harness::*;

/// `ns/pod` runs `c`, `ns/terminal` runs `c` with input and a terminal, `ns/queued` does not run.
pub(super) async fn with_command(command: Command) -> Fixture {
    let queued = PodView {
        pod: pod("ns", "queued", &["c"]).into(),
        ..PodView::default()
    };
    let mut terminal = running("ns", "terminal", &["c"]);
    let spec = Arc::make_mut(&mut terminal.pod).spec.as_mut().unwrap();
    spec.containers[0].stdin = Some(true);
    spec.containers[0].tty = Some(true);
    spec.ephemeral_containers = Some(vec![EphemeralContainer {
        name: "debugger".to_owned(),
        ..EphemeralContainer::default()
    }]);
    let backend = FakeBackend {
        pods: vec![running("ns", "pod", &["c"]), terminal, queued],
        command: Some(command).into(),
        ..FakeBackend::default()
    };
    Fixture::new(backend, FakeCluster::default()).await
}

/// A command that ends at once without output.
pub(super) fn nothing() -> Command {
    Box::new(|_| stream::empty().boxed())
}

pub(super) fn says(outputs: Vec<Output>) -> Command {
    let answer = |output| {
        Ok(pb::ExecOutput {
            output: Some(output),
        })
    };
    Box::new(move |_| stream::iter(outputs).map(answer).boxed())
}

pub(super) fn exit(code: i32) -> Output {
    Output::Exit(pb::ExecExit {
        code,
        ..pb::ExecExit::default()
    })
}

/// How a command was started.
#[derive(Debug)]
pub(super) enum Begun {
    Exec(pb::ExecStart),
    Attach(pb::AttachStart),
}

/// A command that echoes its input and ends with it: an exec with 0, an attached program with 7.
pub(super) fn echo(seen: oneshot::Sender<Begun>) -> Command {
    Box::new(move |mut input| {
        let (sender, receiver) = mpsc::channel(1);
        let echo = async move {
            let mut seen = Some(seen);
            let mut code = 0;
            while let Some(message) = input.recv().await {
                let output = match message.input {
                    Some(Input::Start(start)) => {
                        drop(seen.take().unwrap().send(Begun::Exec(start)));
                        Output::Started(true)
                    }
                    Some(Input::Attach(start)) => {
                        drop(seen.take().unwrap().send(Begun::Attach(start)));
                        code = 7;
                        Output::Started(true)
                    }
                    Some(Input::Stdin(data)) => Output::Stdout(data),
                    Some(Input::StdinClosed(_)) => exit(code),
                    Some(Input::Resize(size)) => {
                        Output::Stdout(format!("[{}x{}]", size.width, size.height).into())
                    }
                    None => continue,
                };
                let last = matches!(output, Output::Exit(_));
                let answer = pb::ExecOutput {
                    output: Some(output),
                };
                if sender.send(Ok(answer)).await.is_err() || last {
                    break;
                }
            }
        };
        let echo = Box::pin(stream::once(echo).filter_map(async |()| None));
        stream::select(ReceiverStream::new(receiver), echo).boxed()
    })
}

/// A command that neither writes nor reads; the returned receiver learns when it is dropped.
pub(super) fn deaf() -> (Command, oneshot::Receiver<()>) {
    let (gone, ended) = oneshot::channel::<()>();
    let command: Command = Box::new(move |input| {
        // Dropped together with the call.
        let held = (gone, input);
        stream::pending()
            .inspect(move |_: &Result<pb::ExecOutput, tonic::Status>| {
                let _held = &held;
            })
            .boxed()
    });
    (command, ended)
}
