//! Commands beside the program of a rank. For each, the helper opens a connection to the shim, over which the messages of
//! `Exec` go.

use std::{collections::HashMap, sync::Arc, time::Duration};

use knoc_link::{Connection, pinned::KeyPair};
use knoc_proto::pb::{self, ExecOutput, exec_input::Input, from_rank};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _},
    sync::mpsc,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::super::{
    container::Program,
    exec::{self, Session},
    inputs::Inputs,
    link::dial,
    pod::Pod,
    ranks::wire,
};

/// How many commands there may be at once; the shim has the same limit for all ranks together.
const MAX: usize = 256;

/// How many messages of output may wait for the connection.
const OUTPUTS: usize = 4;

/// How long the last messages of commands may take once the program has ended.
const LAST: Duration = Duration::from_secs(5);

/// How the helper reaches the shim, and what it says of itself.
#[derive(Debug)]
pub(super) struct Way {
    pub(super) addresses: Vec<String>,
    pub(super) pair: KeyPair,
    pub(super) attempt: u32,
    pub(super) rank: u32,
}

/// All commands beside the program.
pub(super) struct Streams {
    way: Arc<Way>,
    /// What ends each, by its number.
    running: HashMap<u64, CancellationToken>,
    tasks: JoinSet<u64>,
}

impl Streams {
    pub(super) fn new(way: Way) -> Self {
        Self {
            way: Arc::new(way),
            running: HashMap::new(),
            tasks: JoinSet::new(),
        }
    }

    pub(super) fn way(&self) -> &Way {
        &self.way
    }

    /// Opens a stream. If the program does not run any more, the shim knows soon, and waits for none.
    pub(super) fn open(&mut self, id: u64, pod: &Arc<Pod>, program: Option<&Arc<Program>>) {
        let Some(program) = program.filter(|_| self.running.len() < MAX) else {
            return;
        };
        let gone = CancellationToken::new();
        self.running.insert(id, gone.clone());
        let (way, pod, program) = (Arc::clone(&self.way), Arc::clone(pod), Arc::clone(program));
        self.tasks.spawn(async move {
            let dialling = dialled(&way, id);
            if let Some(Some((start, connection))) = gone.run_until_cancelled(dialling).await {
                let (output, outputs) = mpsc::channel(OUTPUTS);
                let session = Session {
                    pod,
                    program,
                    start,
                    output,
                };
                let (reader, writer) = tokio::io::split(connection);
                tokio::join!(
                    exec::run(session, Frames(reader)),
                    answer(outputs, writer, &gone)
                );
            }
            id
        });
    }

    /// Ends the command of a client that has gone.
    pub(super) fn end(&mut self, id: u64) {
        if let Some(gone) = self.running.get(&id) {
            gone.cancel();
        }
    }

    /// Waits for the end of a command, and forgets it. Cancel safe.
    pub(super) async fn next_end(&mut self) {
        match self.tasks.join_next().await {
            Some(Ok(id)) => {
                self.running.remove(&id);
            }
            Some(Err(_)) => {}
            None => std::future::pending().await,
        }
    }

    /// Waits until all commands have said how they ended, for a limited time.
    pub(super) async fn finish(mut self) {
        let all = async { while self.tasks.join_next().await.is_some() {} };
        tokio::time::timeout(LAST, all).await.ok();
    }
}

/// Dials the shim and reads what to start.
async fn dialled(way: &Way, stream: u64) -> Option<(pb::ExecStart, Connection)> {
    let dialled = dial::any(&way.addresses, &way.pair, way.pair.spki()).await;
    // The shim reports that the rank does not answer.
    let (_, mut connection) = dialled.ok()?;
    let joins = pb::RankStream {
        attempt: way.attempt,
        rank: way.rank,
        stream,
    };
    let joins = from_rank::Message::Stream(joins);
    super::say(&mut connection, joins).await.ok()?;
    let first = wire::read::<pb::ExecInput>(&mut connection, wire::OF_COMMAND).await;
    let Input::Start(start) = first.ok()??.input? else {
        return None;
    };
    Some((start, connection))
}

/// The client's messages, from a connection.
struct Frames<R>(R);

impl<R: AsyncRead + Unpin + Send> Inputs for Frames<R> {
    async fn next(&mut self) -> Option<pb::ExecInput> {
        let read = wire::read(&mut self.0, wire::OF_COMMAND).await;
        read.ok().flatten()
    }
}

/// Writes the command's messages, until the last one or until the client has gone.
async fn answer(
    mut outputs: mpsc::Receiver<Result<ExecOutput, Status>>,
    mut writer: impl AsyncWrite + Unpin,
    gone: &CancellationToken,
) {
    let writing = async {
        while let Some(Ok(message)) = outputs.recv().await {
            writer.write_all(&wire::frame(&message)?).await?;
            writer.flush().await?;
        }
        writer.shutdown().await
    };
    // Either way the command sees that nobody takes its output any more.
    gone.run_until_cancelled(writing).await.map(Result::ok);
}

#[cfg(test)]
mod tests {
    use knoc_proto::pb::exec_output::Output;

    use super::*;

    fn output(text: &str) -> ExecOutput {
        ExecOutput {
            output: Some(Output::Stdout(text.to_owned().into())),
        }
    }

    #[tokio::test]
    async fn output_is_written_to_its_end() {
        let (ours, mut theirs) = tokio::io::duplex(4096);
        let (sender, outputs) = mpsc::channel(2);
        for text in ["a", "b"] {
            sender.send(Ok(output(text))).await.unwrap();
        }
        drop(sender);
        answer(outputs, ours, &CancellationToken::new()).await;
        for wanted in [Some(output("a")), Some(output("b")), None] {
            let read = wire::read(&mut theirs, wire::OF_COMMAND).await;
            assert_eq!(read.unwrap(), wanted);
        }
    }

    #[tokio::test]
    async fn a_client_that_has_gone_ends_a_command_whose_output_nobody_reads() {
        // It takes less than one message.
        let (ours, _theirs) = tokio::io::duplex(1);
        let (sender, outputs) = mpsc::channel(2);
        sender.send(Ok(output("never read"))).await.unwrap();
        let gone = CancellationToken::new();
        let (answering, ()) = tokio::join!(
            tokio::time::timeout(Duration::from_secs(20), answer(outputs, ours, &gone)),
            async { gone.cancel() }
        );
        assert!(answering.is_ok() && sender.is_closed());
    }
}
