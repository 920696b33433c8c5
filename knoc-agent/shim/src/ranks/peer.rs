//! Task: the shim's side of the connection to the helper of one rank. The connection has proved that its peer holds the
//! pod's key; what it says is checked here as far as one connection can be, and by [`super::table`] otherwise. A
//! connection that a helper has opened for a command is passed on after its first message.

use std::{io, time::Duration};

use bytes::Bytes;
use knoc_proto::pb::{self, from_rank::Message};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _},
    sync::mpsc,
};

use super::{
    table::{End, Input, Loss},
    wire,
};

/// How long a helper may take to say who it is.
const HELLO: Duration = Duration::from_secs(10);

/// How many messages may wait for a helper: its start, and signals.
const LINE: usize = 16;

/// The longest name of a node, in characters.
const HOST: usize = 253;

/// What a rank used, for the account of the container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) cpu_nanos: u64,
    pub(crate) page_faults: u64,
    pub(crate) major_page_faults: u64,
}

/// What a connection tells.
#[derive(Debug)]
pub(crate) struct Event {
    /// Which connection it is: one that was not admitted says nothing about its rank.
    pub(crate) id: u64,
    pub(crate) rank: usize,
    pub(crate) input: Input,
    /// The way to the helper, with its hello. The connection ends when it is dropped.
    pub(crate) line: Option<mpsc::Sender<Bytes>>,
    /// What is said of its program, once that runs.
    pub(crate) running: Option<pb::RankRunning>,
    pub(crate) used: Usage,
}

/// A connection that a helper has opened for one command.
#[derive(Debug)]
pub(crate) struct Joined<S> {
    pub(crate) rank: usize,
    /// The number by which the shim has asked for it.
    pub(crate) stream: u64,
    pub(crate) connection: S,
}

/// What comes from the helpers.
#[derive(Debug)]
pub(crate) enum Told<S> {
    Event(Event),
    Stream(Joined<S>),
}

/// Which connection it is, and to which attempt.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Whose {
    pub(crate) id: u64,
    pub(crate) attempt: u32,
}

/// Task: runs until the connection ends or is passed on.
pub(crate) async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    mut connection: S,
    whose: Whose,
    events: mpsc::Sender<Told<S>>,
) {
    let hello = tokio::time::timeout(HELLO, wire::read(&mut connection, wire::FROM_RANK)).await;
    let hello = hello.ok().and_then(Result::ok).flatten();
    match hello.and_then(|hello| of_attempt(hello, whose.attempt)) {
        Some(Hello::Rank { rank, host }) => talk(connection, (whose.id, rank, host), events).await,
        Some(Hello::Stream { rank, stream }) => {
            let joined = Joined {
                rank,
                stream,
                connection,
            };
            // The receiver outlives its connections.
            events.send(Told::Stream(joined)).await.ok();
        }
        None => {
            tracing::warn!("closed a connection that did not come from a helper of this attempt");
        }
    }
}

/// Exchanges messages with the helper of `rank` on `host`, over connection `id`.
async fn talk<S: AsyncRead + AsyncWrite + Unpin>(
    connection: S,
    (id, rank, host): (u64, usize, String),
    events: mpsc::Sender<Told<S>>,
) {
    let (mut reader, mut writer) = tokio::io::split(connection);
    let (line, mut frames) = mpsc::channel::<Bytes>(LINE);
    let event = |input| Event {
        id,
        rank,
        input,
        line: None,
        running: None,
        used: Usage::default(),
    };
    let begun = Event {
        line: Some(line),
        ..event(Input::Hello { host })
    };
    // The receiver outlives its connections.
    events.send(Told::Event(begun)).await.ok();
    let reading = async {
        loop {
            let message = match wire::read(&mut reader, wire::FROM_RANK).await {
                Ok(Some(message)) => message,
                Ok(None) => return Loss::Rank,
                Err(error) => return loss(&error),
            };
            let Some(said) = said(message) else {
                return Loss::Rank;
            };
            let told = Event {
                running: said.running,
                used: said.used,
                ..event(said.input)
            };
            events.send(Told::Event(told)).await.ok();
        }
    };
    let writing = async {
        while let Some(frame) = frames.recv().await {
            let written = async {
                writer.write_all(&frame).await?;
                writer.flush().await
            };
            if let Err(error) = written.await {
                return loss(&error);
            }
        }
        Loss::Rank
    };
    let how = tokio::select! {
        biased;
        loss = reading => loss,
        loss = writing => loss,
    };
    let lost = event(Input::Lost(how));
    events.send(Told::Event(lost)).await.ok();
}

/// PURE: what the error of a connection says about its rank. If a process ends, its kernel closes the connection. Only a host that
/// is gone does not answer; the kernel of this one asks it even if nobody writes.
fn loss(error: &io::Error) -> Loss {
    use io::ErrorKind::{HostUnreachable, NetworkDown, NetworkUnreachable, TimedOut};
    let unanswered = matches!(
        error.kind(),
        TimedOut | HostUnreachable | NetworkUnreachable | NetworkDown
    );
    if unanswered { Loss::Node } else { Loss::Rank }
}

/// With what a connection begins.
enum Hello {
    Rank { rank: usize, host: String },
    Stream { rank: usize, stream: u64 },
}

/// What the first message says, if it comes from a helper of this attempt.
fn of_attempt(message: pb::FromRank, attempt: u32) -> Option<Hello> {
    match message.message? {
        Message::Hello(hello) if hello.attempt == attempt => Some(Hello::Rank {
            rank: usize::try_from(hello.rank).ok()?,
            host: hello.host.chars().take(HOST).collect(),
        }),
        Message::Stream(joins) if joins.attempt == attempt => Some(Hello::Stream {
            rank: usize::try_from(joins.rank).ok()?,
            stream: joins.stream,
        }),
        Message::Hello(_) | Message::Stream(_) | Message::Running(_) | Message::Ended(_) => None,
    }
}

struct Said {
    input: Input,
    running: Option<pb::RankRunning>,
    used: Usage,
}

/// What a helper says after its hello; `None` if it must not say that.
fn said(message: pb::FromRank) -> Option<Said> {
    match message.message? {
        Message::Hello(_) | Message::Stream(_) => None,
        Message::Running(running) => Some(Said {
            input: Input::Running,
            running: Some(running),
            used: Usage::default(),
        }),
        Message::Ended(ended) => Some(Said {
            input: Input::Ended(End {
                code: ended.exit_code,
                reason: ended.reason,
                message: ended.message,
                lost: None,
            }),
            running: None,
            used: Usage {
                cpu_nanos: ended.cpu_nanos,
                page_faults: ended.page_faults,
                major_page_faults: ended.major_page_faults,
            },
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        pin::Pin,
        task::{Context, Poll, ready},
    };

    use tokio::io::{DuplexStream, ReadBuf};

    use super::*;

    fn hello(attempt: u32) -> pb::FromRank {
        let hello = pb::RankHello {
            attempt,
            rank: 1,
            host: "c2".to_owned(),
        };
        pb::FromRank {
            message: Some(Message::Hello(hello)),
        }
    }

    async fn send(peer: &mut DuplexStream, message: &pb::FromRank) {
        let frame = wire::frame(message).unwrap();
        peer.write_all(&frame).await.unwrap();
    }

    const OWN: Whose = Whose { id: 7, attempt: 2 };

    async fn next(events: &mut mpsc::Receiver<Told<DuplexStream>>) -> Event {
        match events.recv().await.unwrap() {
            Told::Event(event) => event,
            Told::Stream(joined) => panic!("{joined:?}"),
        }
    }

    #[tokio::test]
    async fn a_connection_for_a_command_is_passed_on_with_what_follows_its_first_message() {
        for (attempt, good) in [(2, true), (1, false)] {
            let (ours, mut theirs) = tokio::io::duplex(4096);
            let (sender, mut events) = mpsc::channel(4);
            let joins = pb::RankStream {
                attempt,
                rank: 3,
                stream: 9,
            };
            let joins = pb::FromRank {
                message: Some(Message::Stream(joins)),
            };
            send(&mut theirs, &joins).await;
            send(&mut theirs, &hello(5)).await;
            serve(ours, OWN, sender).await;
            let told = events.recv().await;
            let Some(Told::Stream(mut joined)) = told else {
                assert!(!good && told.is_none(), "{told:?}");
                continue;
            };
            assert!(good && (joined.rank, joined.stream) == (3, 9));
            let rest = wire::read(&mut joined.connection, wire::FROM_RANK).await;
            assert_eq!(rest.unwrap(), Some(hello(5)));
        }
    }

    #[tokio::test]
    async fn a_rank_is_told_what_to_start_and_its_end_is_reported() {
        let (ours, mut theirs) = tokio::io::duplex(4096);
        let (sender, mut events) = mpsc::channel(4);
        let serving = serve(ours, OWN, sender);
        let talking = async {
            send(&mut theirs, &hello(2)).await;
            let begun = next(&mut events).await;
            assert_eq!((begun.id, begun.rank), (7, 1));
            let start = pb::ToRank {
                message: Some(pb::to_rank::Message::Signal(15)),
            };
            let line = begun.line.unwrap();
            line.send(wire::frame(&start).unwrap()).await.unwrap();
            let got: Option<pb::ToRank> = wire::read(&mut theirs, wire::TO_RANK).await.unwrap();
            assert_eq!(got, Some(start));
            let ended = pb::RankEnded {
                exit_code: 3,
                cpu_nanos: 5,
                ..pb::RankEnded::default()
            };
            let ended = pb::FromRank {
                message: Some(Message::Ended(ended)),
            };
            send(&mut theirs, &ended).await;
            let told = next(&mut events).await;
            assert!(matches!(told.input, Input::Ended(end) if end.code == 3));
            assert_eq!(told.used.cpu_nanos, 5);
            drop(theirs);
            let lost = next(&mut events).await.input;
            assert_eq!(lost, Input::Lost(Loss::Rank), "its process closed it");
            drop(line);
        };
        tokio::join!(serving, talking);
    }

    /// A connection whose peer says who it is and whose host then answers no more, as TCP reports it.
    struct Vanishing(DuplexStream, io::ErrorKind);

    impl AsyncRead for Vanishing {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let before = buf.filled().len();
            ready!(Pin::new(&mut self.0).poll_read(cx, buf))?;
            let ended = buf.filled().len() == before;
            Poll::Ready(if ended { Err(self.1.into()) } else { Ok(()) })
        }
    }

    impl AsyncWrite for Vanishing {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            data: &[u8],
        ) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.0).poll_write(cx, data)
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_shutdown(cx)
        }
    }

    #[tokio::test]
    async fn a_host_that_does_not_answer_is_told_from_a_connection_that_breaks() {
        for (kind, loss) in [
            (io::ErrorKind::TimedOut, Loss::Node),
            (io::ErrorKind::HostUnreachable, Loss::Node),
            (io::ErrorKind::ConnectionReset, Loss::Rank),
            (io::ErrorKind::UnexpectedEof, Loss::Rank),
        ] {
            let (ours, mut theirs) = tokio::io::duplex(4096);
            let (sender, mut events) = mpsc::channel(4);
            send(&mut theirs, &hello(2)).await;
            drop(theirs);
            let serving = serve(Vanishing(ours, kind), OWN, sender);
            let watching = async {
                let mut lines = Vec::new();
                while let Some(Told::Event(event)) = events.recv().await {
                    if event.input == Input::Lost(loss) {
                        return true;
                    }
                    lines.extend(event.line);
                }
                false
            };
            let ((), lost) = tokio::join!(serving, watching);
            assert!(lost, "{kind}");
        }
    }

    #[tokio::test]
    async fn a_helper_of_another_attempt_is_sent_away() {
        let (ours, mut theirs) = tokio::io::duplex(4096);
        let (sender, mut events) = mpsc::channel(4);
        send(&mut theirs, &hello(1)).await;
        serve(ours, OWN, sender).await;
        assert!(events.recv().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_peer_is_given_up() {
        let (ours, _theirs) = tokio::io::duplex(64);
        let (sender, mut events) = mpsc::channel(4);
        serve(ours, OWN, sender).await;
        assert!(events.recv().await.is_none());
    }
}
