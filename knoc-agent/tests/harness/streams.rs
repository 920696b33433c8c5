//! Streams of a shim: a running pod, and exec to its end.

use std::time::{Duration, Instant};

use knoc_proto::pb::{
    self, ExecInput, ExecStart, exec_input::Input, exec_output::Output, shim_client::ShimClient,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use super::{Agent, DEADLINE, Job, isolated, running};

pub(crate) const SLEEPER: &str = "trap 'exit 0' TERM; echo up; while :; do sleep 0.05; done";

/// A pod of one container that runs, and its link.
pub(crate) async fn up(container: pb::Container) -> (Job, Agent, ShimClient<Channel>) {
    let mut job = Job::new(vec![container]);
    let mut agent = job.agent().await;
    job.start();
    let shim = agent.shim().await;
    job.until(running).await;
    // Running is not yet listening to signals.
    let began = Instant::now();
    while job.log("a", 0) != "up\n" {
        assert!(began.elapsed() < DEADLINE, "{}", job.state_words());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    (job, agent, shim)
}

pub(crate) async fn stop(shim: &mut ShimClient<Channel>) {
    let request = pb::StopRequest {
        grace_seconds: 30,
        reason: "test".to_owned(),
    };
    shim.stop(request).await.unwrap();
}

/// Has container `a` wait, with [`AT_GATE`], until [`go`] is called with the file returned.
pub(crate) fn gate(job: &mut Job) -> String {
    let gate = if isolated() {
        "/tmp/go".to_owned()
    } else {
        job.dir.path().join("go").display().to_string()
    };
    job.set_env("a", vec![("GO", gate.clone().into_bytes())]);
    gate
}

pub(crate) const AT_GATE: &str = "while ! test -e \"$GO\"; do sleep 0.05; done";

/// Lets the program pass its gate. It may end, and the shim with it, before this command does.
pub(crate) async fn go(shim: &mut ShimClient<Channel>, gate: &str) {
    let (sender, inputs) = mpsc::channel(1);
    let start = message(Input::Start(command(&["touch", gate])));
    sender.send(start).await.unwrap();
    if let Ok(output) = shim.exec(ReceiverStream::new(inputs)).await {
        let mut output = output.into_inner();
        while let Ok(Some(_)) = output.message().await {}
    }
    drop(sender);
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Ran {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) exit: Option<pb::ExecExit>,
}

impl Ran {
    pub(crate) fn code(&self) -> i32 {
        self.exit.as_ref().map_or(-1, |exit| exit.code)
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }
}

pub(crate) fn message(input: Input) -> ExecInput {
    ExecInput { input: Some(input) }
}

pub(crate) fn command(words: &[&str]) -> ExecStart {
    ExecStart {
        command: words.iter().map(|word| (*word).to_owned()).collect(),
        stdout: true,
        stderr: true,
        ..Default::default()
    }
}

/// Runs a command to its end; `stdin` is sent in pieces, then closed.
pub(crate) async fn exec(shim: &mut ShimClient<Channel>, start: ExecStart, stdin: &[u8]) -> Ran {
    let (sender, inputs) = mpsc::channel(4);
    let feed = async {
        let with_stdin = start.stdin;
        sender.send(message(Input::Start(start))).await.unwrap();
        for piece in stdin.chunks(50_000) {
            let piece = message(Input::Stdin(piece.to_vec().into()));
            if sender.send(piece).await.is_err() {
                return;
            }
        }
        if with_stdin {
            sender.send(message(Input::StdinClosed(true))).await.ok();
        }
        // The input stays open until the exit has come: closing it is no part of the protocol.
        sender.closed().await;
    };
    let run = async {
        let mut output = shim
            .exec(ReceiverStream::new(inputs))
            .await
            .unwrap()
            .into_inner();
        let mut ran = Ran::default();
        while let Some(item) = output.message().await.unwrap() {
            assert!(ran.exit.is_none(), "output after the exit");
            match item.output.unwrap() {
                Output::Stdout(data) => ran.stdout.extend_from_slice(&data),
                Output::Stderr(data) => ran.stderr.extend_from_slice(&data),
                Output::Exit(exit) => ran.exit = Some(exit),
                Output::Started(started) => assert!(started),
            }
        }
        ran
    };
    let both = async {
        tokio::select! {
            ran = run => ran,
            () = async { feed.await; std::future::pending().await } => unreachable!(),
        }
    };
    tokio::time::timeout(DEADLINE, both)
        .await
        .expect("the exec did not end")
}
