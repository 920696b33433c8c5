//! The shim's side of a command that runs beside the program of a rank: asks the rank's helper for a connection, and
//! copies the messages of the client and the command between the link and that connection, with their back-pressure.
//!
//! If the client disconnects, the helper is told over its own connection ([`pb::to_rank::Message::EndStream`]), because it
//! may be blocked on a command that does not read its input, and then sees nothing of this one.

use std::time::Duration;

use bytes::Bytes;
use knoc_link::Connection;
use knoc_proto::{
    pb::{self, ExecOutput, exec_input::Input, exec_output::Output, to_rank},
    reason::ErrorReason,
};
use rustix::process::Signal;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _},
    sync::{mpsc, oneshot},
    time::timeout,
};
use tonic::Status;

use super::{super::inputs::Inputs, wire};

/// How long a helper may take to open a connection.
const OPEN: Duration = Duration::from_secs(30);

/// How long it may take to tell a helper that the client is gone.
const TELL: Duration = Duration::from_secs(5);

/// The way to all ranks of a running container.
#[derive(Debug, Clone)]
pub(crate) struct Ranks {
    pub(crate) signals: mpsc::Sender<Signal>,
    pub(crate) streams: mpsc::Sender<Open>,
}

/// A request for a connection to the helper of a rank.
#[derive(Debug)]
pub(crate) struct Open {
    pub(crate) rank: usize,
    pub(crate) answer: oneshot::Sender<Result<Opened, String>>,
}

/// A connection to the helper of a rank.
#[derive(Debug)]
pub(crate) struct Opened<S = Connection> {
    pub(crate) rank: usize,
    pub(crate) stream: u64,
    pub(crate) connection: S,
    /// The helper's own connection, which must not stay open because of this one.
    pub(crate) line: mpsc::WeakSender<Bytes>,
}

impl Ranks {
    /// Opens a connection to the helper of `rank`. Cancel safe.
    pub(crate) async fn open(&self, rank: u32) -> Result<Opened, Status> {
        let not_running = |why: String| ErrorReason::NotRunning.status(why);
        let ended = || not_running("the container has ended".to_owned());
        let (answer, opened) = oneshot::channel();
        let open = Open {
            rank: usize::try_from(rank).unwrap_or(usize::MAX),
            answer,
        };
        self.streams.send(open).await.map_err(|_| ended())?;
        match timeout(OPEN, opened).await {
            Ok(Ok(opened)) => opened.map_err(not_running),
            Ok(Err(_)) => Err(ended()),
            Err(_) => {
                let seconds = OPEN.as_secs();
                let message = format!(
                    "rank {rank} has not answered within {seconds} s; its node may be down"
                );
                Err(ErrorReason::ShimUnreachable.status(message))
            }
        }
    }
}

/// Task: carries the command to its end. The last output is its exit.
pub(crate) async fn carry<S: AsyncRead + AsyncWrite>(
    opened: Opened<S>,
    start: pb::ExecStart,
    input: impl Inputs,
    output: mpsc::Sender<Result<ExecOutput, Status>>,
) {
    let Opened {
        rank,
        stream,
        connection,
        line,
    } = opened;
    let (mut reader, writer) = tokio::io::split(connection);
    let answering = async {
        loop {
            let read = wire::read::<ExecOutput>(&mut reader, wire::OF_COMMAND).await;
            let Ok(Some(message)) = read else {
                let text = format!("the connection to rank {rank} was lost");
                let lost = ErrorReason::NotRunning.status(text);
                output.send(Err(lost)).await.ok();
                return;
            };
            let last = matches!(message.output, Some(Output::Exit(_)));
            if output.send(Ok(message)).await.is_err() || last {
                return;
            }
        }
    };
    tokio::select! {
        biased;
        () = output.closed() => {}
        () = answering => {}
        () = feed(start, input, writer) => {}
    }
    let message = pb::ToRank {
        message: Some(to_rank::Message::EndStream(stream)),
    };
    if let (Some(line), Ok(frame)) = (line.upgrade(), wire::frame(&message)) {
        timeout(TELL, line.send(frame)).await.ok();
    }
}

/// Passes on the client's messages. Never returns: the command's exit ends it.
async fn feed(start: pb::ExecStart, mut input: impl Inputs, mut writer: impl AsyncWrite + Unpin) {
    let mut next = Some(Input::Start(start));
    while let Some(message) = next {
        let closed = matches!(message, Input::StdinClosed(_));
        let message = pb::ExecInput {
            input: Some(message),
        };
        let Ok(frame) = wire::frame(&message) else {
            break;
        };
        if writer.write_all(&frame).await.is_err() || writer.flush().await.is_err() {
            break;
        }
        next = match input.next().await {
            Some(message) => message.input,
            // The end of the client's messages is the end of the input.
            None => (!closed).then_some(Input::StdinClosed(true)),
        };
    }
    std::future::pending::<()>().await;
}

#[cfg(test)]
mod tests {
    use tokio::{io::DuplexStream, task::JoinSet};

    use super::*;

    /// What a client sends, until the test drops the sender.
    struct Client(mpsc::Receiver<Input>);

    impl Inputs for Client {
        async fn next(&mut self) -> Option<pb::ExecInput> {
            let input = self.0.recv().await?;
            Some(pb::ExecInput { input: Some(input) })
        }
    }

    /// A command in a rank, with its client and its helper.
    struct World {
        client: mpsc::Sender<Input>,
        outputs: mpsc::Receiver<Result<ExecOutput, Status>>,
        helper: DuplexStream,
        /// The helper's own connection.
        frames: mpsc::Receiver<Bytes>,
        _line: mpsc::Sender<Bytes>,
        carrying: JoinSet<()>,
    }

    fn world() -> World {
        let (connection, helper) = tokio::io::duplex(4096);
        let (line, frames) = mpsc::channel(4);
        let (client, input) = mpsc::channel(4);
        let (output, outputs) = mpsc::channel(4);
        let opened = Opened {
            rank: 3,
            stream: 9,
            connection,
            line: line.downgrade(),
        };
        let start = pb::ExecStart {
            rank: 3,
            ..pb::ExecStart::default()
        };
        let mut carrying = JoinSet::new();
        carrying.spawn(carry(opened, start, Client(input), output));
        World {
            client,
            outputs,
            helper,
            frames,
            _line: line,
            carrying,
        }
    }

    impl World {
        async fn heard(&mut self) -> Option<Input> {
            let read = wire::read::<pb::ExecInput>(&mut self.helper, wire::OF_COMMAND).await;
            read.unwrap().and_then(|message| message.input)
        }

        async fn says(&mut self, output: Output) {
            let message = ExecOutput {
                output: Some(output),
            };
            let frame = wire::frame(&message).unwrap();
            self.helper.write_all(&frame).await.unwrap();
        }

        /// What the helper was told over its own connection, once the command is over.
        async fn end(mut self) -> Option<Bytes> {
            self.carrying.join_next().await.unwrap().unwrap();
            self.frames.recv().await
        }
    }

    fn end_of_nine() -> Option<Bytes> {
        let message = pb::ToRank {
            message: Some(to_rank::Message::EndStream(9)),
        };
        wire::frame(&message).ok()
    }

    #[tokio::test]
    async fn input_goes_to_the_rank_and_its_output_and_exit_come_back() {
        let mut world = world();
        assert!(matches!(world.heard().await, Some(Input::Start(start)) if start.rank == 3));
        let input = Input::Stdin("in".into());
        world.client.send(input.clone()).await.unwrap();
        assert_eq!(world.heard().await, Some(input));
        // The client has nothing more to say, and waits for the output.
        world.client = mpsc::channel(1).0;
        assert_eq!(world.heard().await, Some(Input::StdinClosed(true)));
        world.says(Output::Stdout("out".into())).await;
        let exit = pb::ExecExit {
            code: 3,
            ..pb::ExecExit::default()
        };
        world.says(Output::Exit(exit.clone())).await;
        let out = world.outputs.recv().await.unwrap().unwrap();
        assert_eq!(out.output, Some(Output::Stdout("out".into())));
        let last = world.outputs.recv().await.unwrap().unwrap();
        assert_eq!(last.output, Some(Output::Exit(exit)));
        assert_eq!(world.end().await, end_of_nine());
    }

    #[tokio::test]
    async fn a_client_that_is_gone_ends_the_command_of_a_rank_that_reads_nothing() {
        let mut world = world();
        // More than the connection takes.
        let input = Input::Stdin(vec![0; 8192].into());
        world.client.send(input).await.unwrap();
        world.outputs.close();
        assert_eq!(world.end().await, end_of_nine());
    }

    #[tokio::test]
    async fn a_connection_that_is_lost_is_an_error_and_no_exit() {
        let mut world = world();
        world.helper = tokio::io::duplex(1).0;
        let lost = world.outputs.recv().await.unwrap().unwrap_err();
        assert!(lost.message().contains("rank 3 was lost"), "{lost}");
        world.end().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_rank_that_never_answers_and_a_container_that_ends_are_named() {
        let (signals, _signals) = mpsc::channel(1);
        let (streams, mut opens) = mpsc::channel(1);
        let ranks = Ranks { signals, streams };
        let silent = ranks.open(1).await.unwrap_err();
        assert!(silent.message().contains("rank 1 has not answered"));
        let asked: Open = opens.recv().await.unwrap();
        assert!(asked.rank == 1 && asked.answer.is_closed());
        drop(opens);
        let ended = ranks.open(1).await.unwrap_err();
        assert_eq!(ended.message(), "the container has ended");
    }
}
