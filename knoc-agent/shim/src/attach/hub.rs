//! The attached clients of one running program: each gets the program's output, and their input goes to the program.
//!
//! The program's output never waits for a client. [`Hub::publish`] copies the output into each client's own [`Queue`],
//! which holds at most [`LAG`] bytes. A client that falls further behind has lagged, and its queue takes no more output.
//! Input goes the other way through one bounded channel to [`Keeper::feed`], so it has back-pressure.

use std::{
    collections::VecDeque,
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use bytes::{Bytes, BytesMut};
use knoc_contract::logs::cri;
use tokio::{
    sync::{Notify, mpsc, watch},
    time::Instant,
};

use super::super::{children::Exit, fdio::Stream};

/// How many bytes an attached client may fall behind: some seconds of a chatty program over a slow link.
pub(crate) const LAG: usize = 4 << 20;

/// How many clients may attach to one program: each may hold [`LAG`] bytes of the job's memory.
pub(crate) const MAX_CLIENTS: usize = 16;

/// The size of a message to a client. Smaller pieces that wait are joined up to this size.
const PIECE: usize = 64 << 10;

/// How many messages of input may be on the way to the program.
const INPUTS: usize = 4;

/// Connects one program with its attached clients.
#[derive(Debug)]
pub(crate) struct Hub {
    clients: Mutex<Vec<Weak<Queue>>>,
    stdin: Stdin,
    terminal: Option<Arc<Stream>>,
    ended: watch::Receiver<Option<Exit>>,
}

/// The program's standard input.
#[derive(Debug)]
enum Stdin {
    /// The container was created without standard input.
    None,
    /// Any number of clients, one after the other or at once.
    Shared(mpsc::Sender<Bytes>),
    /// One client only. When it detaches, the program's input is closed.
    Once(Mutex<Option<mpsc::Sender<Bytes>>>),
}

/// Why a client cannot attach, or cannot have the program's standard input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AttachError {
    #[error("it was started without standard input (stdin: true is not set)")]
    NoStdin,
    /// The program has closed it, or the one client of `stdinOnce` has detached.
    #[error("its standard input is closed")]
    StdinClosed,
    /// The first client has it.
    #[error(
        "its standard input is for one client only (stdinOnce: true is set), which has attached already"
    )]
    StdinTaken,
    #[error("{MAX_CLIENTS} clients are attached already")]
    TooMany,
}

/// The attempt's side of the hub. Dropping it detaches all clients.
pub(crate) struct Keeper {
    hub: Arc<Hub>,
    ended: watch::Sender<Option<Exit>>,
    input: Option<(mpsc::Receiver<Bytes>, Arc<Stream>)>,
}

/// Creates the hub of one attempt. `stdin` is the shim's end of the pipe; a terminal is used instead of it if there is one.
pub(crate) fn open(
    wants_stdin: bool,
    once: bool,
    stdin: Option<Stream>,
    terminal: Option<Arc<Stream>>,
) -> Keeper {
    let (exit, ended) = watch::channel(None);
    let sink = terminal.clone().or_else(|| stdin.map(Arc::new));
    let sink = sink.filter(|_| wants_stdin);
    let (stdin, input) = match sink {
        None => (Stdin::None, None),
        Some(sink) => {
            let (sender, receiver) = mpsc::channel(INPUTS);
            // A terminal cannot be closed in one direction: as with other runtimes, its input stays open.
            let stdin = if once && terminal.is_none() {
                Stdin::Once(Mutex::new(Some(sender)))
            } else {
                Stdin::Shared(sender)
            };
            (stdin, Some((receiver, sink)))
        }
    };
    let hub = Arc::new(Hub {
        clients: Mutex::default(),
        stdin,
        terminal,
        ended,
    });
    Keeper {
        hub,
        ended: exit,
        input,
    }
}

impl Keeper {
    pub(crate) fn hub(&self) -> Arc<Hub> {
        Arc::clone(&self.hub)
    }

    /// Writes the clients' input to the program, and closes the program's input after a single client. Never returns: the
    /// caller drops it when the program has ended.
    pub(crate) async fn feed(&mut self) -> Infallible {
        if let Some((mut receiver, sink)) = self.input.take() {
            while let Some(data) = receiver.recv().await {
                if sink.write_all(&data).await.is_err() {
                    // The program has closed its standard input.
                    break;
                }
            }
        }
        std::future::pending().await
    }

    /// To be called once the program has ended and all its output is published.
    pub(crate) fn end(self, exit: Exit) {
        self.ended.send_replace(Some(exit));
    }
}

impl Hub {
    /// Queues output of the program for each client that wants it. Does not wait.
    pub(crate) fn publish(&self, kind: cri::Stream, data: &[u8]) {
        let mut clients = lock(&self.clients);
        clients.retain(|client| match client.upgrade() {
            Some(queue) => queue.push(kind, data),
            None => false,
        });
    }

    /// Attaches a new client, which gets the output from now on.
    pub(crate) fn attach(&self, stdout: bool, stderr: bool) -> Result<Arc<Queue>, AttachError> {
        let mut clients = lock(&self.clients);
        clients.retain(|client| client.strong_count() > 0);
        if clients.len() >= MAX_CLIENTS {
            return Err(AttachError::TooMany);
        }
        let queue = Arc::new(Queue {
            stdout,
            stderr,
            pending: Mutex::new(Pending::new()),
            news: Notify::new(),
        });
        clients.push(Arc::downgrade(&queue));
        Ok(queue)
    }

    /// Gives a client the program's standard input.
    pub(crate) fn stdin(&self) -> Result<Input, AttachError> {
        let (sender, once) = match &self.stdin {
            Stdin::None => return Err(AttachError::NoStdin),
            Stdin::Shared(sender) => (sender.clone(), false),
            Stdin::Once(sender) => (lock(sender).take().ok_or(AttachError::StdinTaken)?, true),
        };
        if sender.is_closed() {
            return Err(AttachError::StdinClosed);
        }
        Ok(Input { sender, once })
    }

    /// The program's terminal, if it has one.
    pub(crate) fn terminal(&self) -> Option<&Arc<Stream>> {
        self.terminal.as_ref()
    }

    /// Becomes `Some` once the program has ended. If the sender is dropped before, the exit status is not known.
    pub(crate) fn ended(&self) -> watch::Receiver<Option<Exit>> {
        self.ended.clone()
    }
}

/// A client's way to the program's standard input. If `once` is set, dropping it closes the program's input.
#[derive(Debug)]
pub(crate) struct Input {
    pub(crate) sender: mpsc::Sender<Bytes>,
    pub(crate) once: bool,
}

/// The output that waits for one client.
#[derive(Debug)]
pub(crate) struct Queue {
    stdout: bool,
    stderr: bool,
    pending: Mutex<Pending>,
    news: Notify,
}

#[derive(Debug)]
struct Pending {
    pieces: VecDeque<(cri::Stream, BytesMut)>,
    bytes: usize,
    lagged: bool,
    /// When the program wrote last, to any stream.
    at: Instant,
}

/// What a client is given next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    Data(cri::Stream, Bytes),
    /// The client was too slow, and the output that waited for it was discarded.
    Lagged,
}

impl Pending {
    fn new() -> Self {
        Self {
            pieces: VecDeque::new(),
            bytes: 0,
            lagged: false,
            at: Instant::now(),
        }
    }

    fn take(&mut self) -> Option<Next> {
        if self.lagged {
            return Some(Next::Lagged);
        }
        let (kind, data) = self.pieces.pop_front()?;
        self.bytes -= data.len();
        Some(Next::Data(kind, data.freeze()))
    }
}

impl Queue {
    /// Returns `false` if this client has lagged and gets no more output.
    fn push(&self, kind: cri::Stream, data: &[u8]) -> bool {
        let wanted = match kind {
            cri::Stream::Stdout => self.stdout,
            cri::Stream::Stderr => self.stderr,
        };
        let mut pending = lock(&self.pending);
        pending.at = Instant::now();
        if wanted {
            if pending.bytes + data.len() > LAG {
                pending.lagged = true;
                pending.pieces = VecDeque::new();
            } else {
                pending.bytes += data.len();
                match pending.pieces.back_mut() {
                    Some((last, piece)) if *last == kind && piece.len() + data.len() <= PIECE => {
                        piece.extend_from_slice(data);
                    }
                    _ => pending.pieces.push_back((kind, BytesMut::from(data))),
                }
            }
            self.news.notify_one();
        }
        !pending.lagged
    }

    /// Returns what waits, if anything does.
    pub(crate) fn try_next(&self) -> Option<Next> {
        lock(&self.pending).take()
    }

    /// Waits for output. Cancel safe.
    pub(crate) async fn next(&self) -> Next {
        loop {
            if let Some(next) = self.try_next() {
                return next;
            }
            self.news.notified().await;
        }
    }

    /// When the program wrote last; if it has not written since, when the client was attached.
    pub(crate) fn last(&self) -> Instant {
        lock(&self.pending).at
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use knoc_contract::logs::cri::Stream as Kind;

    use super::*;
    use crate::fdio;

    fn keeper(once: bool) -> (Keeper, std::os::fd::OwnedFd) {
        let (theirs, ours) = fdio::input_pipe().unwrap();
        (open(true, once, Some(ours), None), theirs)
    }

    #[tokio::test]
    async fn output_reaches_the_clients_that_want_it_from_now_on() {
        let (keeper, _theirs) = keeper(false);
        let hub = keeper.hub();
        hub.publish(Kind::Stdout, b"before");
        let both = hub.attach(true, true).unwrap();
        let errors = hub.attach(false, true).unwrap();
        hub.publish(Kind::Stdout, b"o");
        hub.publish(Kind::Stdout, b"ut");
        hub.publish(Kind::Stderr, b"err");
        let data =
            |kind, text: &'static str| Some(Next::Data(kind, Bytes::from_static(text.as_bytes())));
        assert_eq!(both.try_next(), data(Kind::Stdout, "out"));
        assert_eq!(both.try_next(), data(Kind::Stderr, "err"));
        assert_eq!(both.try_next(), None);
        assert_eq!(errors.try_next(), data(Kind::Stderr, "err"));
        assert_eq!(errors.try_next(), None);
        drop(both);
        hub.publish(Kind::Stdout, b"x");
        assert_eq!(lock(&hub.clients).len(), 1);
    }

    #[tokio::test]
    async fn a_client_that_lags_holds_nothing_and_hinders_nobody() {
        let (keeper, _theirs) = keeper(false);
        let hub = keeper.hub();
        let slow = hub.attach(true, true).unwrap();
        let fast = hub.attach(true, true).unwrap();
        let block = vec![7; PIECE];
        let mut taken = 0;
        for _ in 0..2 * LAG / PIECE {
            hub.publish(Kind::Stdout, &block);
            while let Some(Next::Data(_, data)) = fast.try_next() {
                taken += data.len();
            }
        }
        assert_eq!(taken, 2 * LAG);
        assert_eq!(slow.next().await, Next::Lagged);
        assert_eq!(slow.next().await, Next::Lagged);
        assert!(lock(&slow.pending).pieces.is_empty());
    }

    #[tokio::test]
    async fn clients_are_bounded() {
        let (keeper, _theirs) = keeper(false);
        let hub = keeper.hub();
        let mut all: Vec<_> = (0..MAX_CLIENTS)
            .map(|_| hub.attach(true, true).unwrap())
            .collect();
        assert_eq!(hub.attach(true, true).unwrap_err(), AttachError::TooMany);
        all.pop();
        hub.attach(true, true).unwrap();
    }

    #[tokio::test]
    async fn stdin_once_is_closed_after_its_client() {
        use std::io::Read as _;
        let (mut keeper, theirs) = keeper(true);
        let hub = keeper.hub();
        let input = hub.stdin().unwrap();
        assert!(input.once);
        assert_eq!(hub.stdin().unwrap_err(), AttachError::StdinTaken);
        input.sender.send(Bytes::from_static(b"all")).await.unwrap();
        drop(input);
        let mut text = String::new();
        let reading = tokio::task::spawn_blocking(move || {
            std::fs::File::from(theirs)
                .read_to_string(&mut text)
                .unwrap();
            text
        });
        let text = tokio::select! {
            text = reading => text.unwrap(),
            never = keeper.feed() => match never {},
        };
        assert_eq!(text, "all");
        assert_eq!(hub.stdin().unwrap_err(), AttachError::StdinTaken);
    }

    #[tokio::test]
    async fn shared_stdin_stays_open_until_the_program_closes_it() {
        let (mut keeper, theirs) = keeper(false);
        let hub = keeper.hub();
        drop(hub.stdin().unwrap());
        let input = hub.stdin().unwrap();
        drop(theirs);
        input
            .sender
            .send(Bytes::from_static(b"lost"))
            .await
            .unwrap();
        tokio::select! {
            () = input.sender.closed() => {}
            never = keeper.feed() => match never {},
        }
        assert_eq!(hub.stdin().unwrap_err(), AttachError::StdinClosed);
        let none = open(false, false, None, None);
        assert_eq!(none.hub().stdin().unwrap_err(), AttachError::NoStdin);
    }

    #[tokio::test]
    async fn clients_learn_of_the_end_even_if_the_exit_status_is_lost() {
        let (keeper, _theirs) = keeper(false);
        let mut ended = keeper.hub().ended();
        keeper.end(Exit { code: 3, signal: 0 });
        assert_eq!(
            ended
                .wait_for(Option::is_some)
                .await
                .unwrap()
                .map(|exit| exit.code),
            Some(3)
        );
        let (lost, _theirs) = self::keeper(false);
        let mut ended = lost.hub().ended();
        drop(lost);
        ended.wait_for(Option::is_some).await.unwrap_err();
    }
}
