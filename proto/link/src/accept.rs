//! The accept loop of every TCP port and socket of ours: connections of a listener, each after its handshake, as a
//! stream.
//!
//! There is no task: the listener and the handshakes make progress while the stream is polled. A connection passes two
//! stages, each bounded by [`Admissions`] and by time:
//!
//! ```text
//! accept ─► silent: no byte yet, at most FIRST_BYTE ─► handshake: at most CONNECT_TIMEOUT ─► given out
//! ```
//!
//! The listener is never left alone because a stage is full; the oldest connection of the busiest source is closed
//! instead. Connections that have sent something are counted apart from those that have not, so silent ones displace
//! only each other. If the process has no descriptor left, an unfinished connection is closed for the new one; if there
//! is none, a descriptor kept in reserve serves to refuse whoever waits in the kernel's queue.
use std::{
    collections::HashMap,
    fmt,
    fs::File,
    future::Future,
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::{
    FutureExt as _, Stream, StreamExt as _,
    future::{AbortHandle, Abortable, Aborted, BoxFuture},
    stream::FuturesUnordered,
};
use knoc_proto::log_limit::LogLimit;
use rustix::{io::Errno, net::sockopt};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream},
    time::{Instant, Sleep},
};

use super::{
    CONNECT_TIMEOUT,
    admission::{Admissions, Bounds, Source, Ticket},
};

/// From the connection to its first byte. A client sends it as soon as it is connected; a busy one takes a second.
const FIRST_BYTE: Duration = Duration::from_secs(5);
/// What the kernel may keep for us between two polls. Connections that do not fit are tried again by their clients only
/// after a second, so this is what the system allows by default.
const BACKLOG: u32 = 4096;
/// Connections accepted before handshakes get their turn.
const BATCH: usize = 32;
/// The pause after `accept` failed for a reason that we cannot do anything about.
const PAUSE: Duration = Duration::from_millis(200);
/// `accept` has no descriptor or memory left.
const SCARCE: [Errno; 4] = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
/// `accept` failed because of the connection, see accept(2).
const ONE_CONNECTION: [Errno; 4] = [Errno::CONNABORTED, Errno::PROTO, Errno::PERM, Errno::INTR];

/// Listens on `addr`.
pub fn bind(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = if addr.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_reuseaddr(true)?;
    socket.bind(addr)?;
    socket.listen(BACKLOG)
}

pub(super) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A connection before its handshake.
pub(super) enum Raw {
    Tcp(TcpStream, SocketAddr),
    Unix(UnixStream),
}

impl Raw {
    fn source(&self) -> Source {
        match self {
            Self::Tcp(_, from) => Source::from(*from),
            Self::Unix(_) => Source::Local,
        }
    }

    fn peer(&self) -> String {
        match self {
            Self::Tcp(_, from) => from.to_string(),
            Self::Unix(_) => Source::Local.to_string(),
        }
    }
}

/// What a handshake comes to: the connection, or what the log says of the refusal.
pub type Handshake<T> = BoxFuture<'static, Result<T, String>>;

/// Why a connection was not given out.
enum Refusal {
    /// It was closed before it said anything, as health checks and port scans do.
    Probe,
    Failed(String),
}

/// Connections in one stage. Evicted ones are dropped at the next poll.
struct Stage<T> {
    admissions: Admissions,
    running: FuturesUnordered<Member<T>>,
    aborts: HashMap<Ticket, AbortHandle>,
}

type Member<T> = Pin<Box<dyn Future<Output = (Ticket, Result<T, Aborted>)> + Send>>;

impl<T: Send + 'static> Stage<T> {
    fn new(overall: usize, per_source: usize) -> Self {
        Self {
            admissions: Admissions::new(overall, per_source),
            running: FuturesUnordered::new(),
            aborts: HashMap::new(),
        }
    }

    /// Adds one; answers the source of the one that was closed for it.
    fn push(&mut self, source: Source, future: BoxFuture<'static, T>) -> Option<Source> {
        let (ticket, evicted) = self.admissions.admit(source);
        let (abort, registration) = AbortHandle::new_pair();
        self.aborts.insert(ticket, abort);
        let member = Abortable::new(future, registration).map(move |done| (ticket, done));
        self.running.push(Box::pin(member));
        self.close(evicted)
    }

    fn close(&mut self, evicted: Option<(Ticket, Source)>) -> Option<Source> {
        let (ticket, source) = evicted?;
        if let Some(abort) = self.aborts.remove(&ticket) {
            abort.abort();
        }
        Some(source)
    }

    /// Closes the one whose turn it is.
    fn evict(&mut self) -> Option<Source> {
        let evicted = self.admissions.evict();
        self.close(evicted)
    }

    /// The next that is done.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<(Source, T)> {
        loop {
            match ready!(self.running.poll_next_unpin(cx)) {
                Some((ticket, Ok(done))) => {
                    self.aborts.remove(&ticket);
                    // An evicted one that was done in the same instant is gone all the same.
                    if let Some(source) = self.admissions.remove(ticket) {
                        return Poll::Ready((source, done));
                    }
                }
                Some((_, Err(Aborted))) => {}
                None => return Poll::Pending,
            }
        }
    }
}

type Begin<T> = Box<dyn Fn(Raw) -> Handshake<T> + Send + Sync>;
type Opened<T> = Result<T, (String, Refusal)>;

/// See the module. Never ends by itself.
pub struct Accept<T> {
    listener: Listener,
    begin: Begin<T>,
    silent: Stage<Opened<Raw>>,
    handshakes: Stage<Opened<T>>,
    pause: Option<Pin<Box<Sleep>>>,
    /// A descriptor to spend when there is no other.
    reserve: Option<File>,
    log: RefusalLog,
}

impl<T> fmt::Debug for Accept<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Accept").finish_non_exhaustive()
    }
}

impl<T: Send + 'static> Accept<T> {
    /// Connections of a TCP listener, with `begin` as their handshake.
    pub fn tcp(
        listener: TcpListener,
        bounds: Bounds,
        begin: impl Fn(TcpStream, SocketAddr) -> Handshake<T> + Send + Sync + 'static,
    ) -> Self {
        Self::new(Listener::Tcp(listener), bounds, move |raw| match raw {
            Raw::Tcp(stream, from) => begin(stream, from),
            Raw::Unix(_) => Box::pin(async { Err("a unix socket on a TCP port".to_owned()) }),
        })
    }

    pub(super) fn new(
        listener: Listener,
        bounds: Bounds,
        begin: impl Fn(Raw) -> Handshake<T> + Send + Sync + 'static,
    ) -> Self {
        Self {
            listener,
            begin: Box::new(begin),
            silent: Stage::new(bounds.silent, bounds.silent / 4 * 3),
            handshakes: Stage::new(bounds.handshakes, bounds.handshakes / 2),
            pause: None,
            reserve: reserve(),
            log: RefusalLog::default(),
        }
    }

    /// The address listened on; none for a unix socket.
    #[must_use]
    pub fn local_addr(&self) -> Option<SocketAddr> {
        match &self.listener {
            Listener::Tcp(listener) => listener.local_addr().ok(),
            Listener::Unix(_) => None,
        }
    }

    fn accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Raw>> {
        match &self.listener {
            Listener::Tcp(listener) => {
                let accepted = ready!(listener.poll_accept(cx));
                Poll::Ready(accepted.map(|(stream, from)| Raw::Tcp(stream, from)))
            }
            Listener::Unix(listener) => {
                let accepted = ready!(listener.poll_accept(cx));
                Poll::Ready(accepted.map(|(stream, _)| Raw::Unix(stream)))
            }
        }
    }

    /// Takes what the kernel has for us, one batch of it. Then `true` if there may be more.
    fn take(&mut self, cx: &mut Context<'_>) -> bool {
        for _ in 0..BATCH {
            if let Some(pause) = &mut self.pause {
                if pause.as_mut().poll(cx).is_pending() {
                    return false;
                }
                self.pause = None;
            }
            match self.accept(cx) {
                Poll::Pending => return false,
                Poll::Ready(Ok(raw)) => self.admit(raw),
                Poll::Ready(Err(error)) => {
                    if !self.recover(cx, &error) {
                        return true;
                    }
                }
            }
        }
        true
    }

    fn admit(&mut self, raw: Raw) {
        if self.reserve.is_none() {
            self.reserve = reserve();
        }
        let source = raw.source();
        let evicted = match raw {
            Raw::Tcp(..) => self.silent.push(source, first_byte(raw).boxed()),
            Raw::Unix(_) => self.shake_hands(source, raw),
        };
        self.note_eviction(evicted);
    }

    /// Begins the handshakes of those that have sent their first byte.
    fn poll_silent(&mut self, cx: &mut Context<'_>) {
        while let Poll::Ready((source, done)) = self.silent.poll(cx) {
            match done {
                Ok(raw) => {
                    let evicted = self.shake_hands(source, raw);
                    self.note_eviction(evicted);
                }
                Err(refusal) => self.refused(source, refusal),
            }
        }
    }

    fn shake_hands(&mut self, source: Source, raw: Raw) -> Option<Source> {
        let peer = raw.peer();
        let handshake = tokio::time::timeout(CONNECT_TIMEOUT, (self.begin)(raw));
        let handshake = handshake.map(move |done| {
            let late = || {
                Err(format!(
                    "no handshake within {} s",
                    CONNECT_TIMEOUT.as_secs()
                ))
            };
            let done = done.unwrap_or_else(|_| late());
            done.map_err(|error| (peer, Refusal::Failed(error)))
        });
        self.handshakes.push(source, handshake.boxed())
    }

    fn note_eviction(&mut self, evicted: Option<Source>) {
        if let Some(source) = evicted {
            self.log.write(source, || {
                tracing::warn!(
                    %source,
                    "closed the oldest of too many connections that have not finished their handshake"
                );
            });
        }
    }

    /// After `accept` failed. False if connections that were closed for it have to be let go of first.
    fn recover(&mut self, cx: &mut Context<'_>, error: &io::Error) -> bool {
        let errno = Errno::from_io_error(error);
        if !errno.is_some_and(|errno| SCARCE.contains(&errno)) {
            tracing::debug!(%error, "accept a connection");
            // Some concern only the one connection that was to be accepted; another error may be the listener's
            // own, and must not make us spin.
            if !errno.is_some_and(|errno| ONE_CONNECTION.contains(&errno)) {
                self.wait();
            }
            return true;
        }
        self.log.write(Source::Local, || {
            tracing::warn!(
                %error,
                "accept a connection: raise the limit of open files (ulimit -n) of this process"
            );
        });
        let evicted = self.silent.evict().or_else(|| self.handshakes.evict());
        if evicted.is_some() {
            // Its descriptor is free when the stages have been polled.
            self.note_eviction(evicted);
            cx.waker().wake_by_ref();
            return false;
        }
        // Nothing of ours can go: refuse whoever waits, rather than let it wait without an answer.
        drop(self.reserve.take());
        match self.accept(cx) {
            Poll::Ready(Ok(raw)) => drop(raw),
            Poll::Ready(Err(_)) => self.wait(),
            Poll::Pending => {}
        }
        self.reserve = reserve();
        true
    }

    fn wait(&mut self) {
        self.pause = Some(Box::pin(tokio::time::sleep(PAUSE)));
    }

    fn refused(&mut self, source: Source, (peer, refusal): (String, Refusal)) {
        match refusal {
            Refusal::Probe => tracing::debug!(peer, "a connection ended before its first byte"),
            Refusal::Failed(error) => self.log.write(source, || {
                tracing::warn!(peer, error, "connection refused");
            }),
        }
    }
}

fn reserve() -> Option<File> {
    File::open("/dev/null").ok()
}

/// Waits for the first byte, which stays where it is. A connection that is dropped before it came is reset: a flood must
/// not leave thousands of half-closed connections to the kernel either.
async fn first_byte(raw: Raw) -> Opened<Raw> {
    let Raw::Tcp(stream, _) = &raw else {
        return Ok(raw);
    };
    // If this fails the connection is gone, which the next call reports.
    drop(stream.set_zero_linger());
    let peeked = tokio::time::timeout(FIRST_BYTE, async { stream.peek(&mut [0]).await }).await;
    let refusal = match peeked {
        Ok(Ok(1..)) => {
            // From now on the last bytes, such as a TLS alert, are to arrive.
            sockopt::set_socket_linger(stream, None).ok();
            return Ok(raw);
        }
        Ok(Ok(0) | Err(_)) => Refusal::Probe,
        Err(_) => Refusal::Failed(format!("no byte within {} s", FIRST_BYTE.as_secs())),
    };
    Err((raw.peer(), refusal))
}

/// Lines about refused connections, limited by source.
#[derive(Default)]
struct RefusalLog {
    limit: LogLimit<Source>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl RefusalLog {
    fn write(&mut self, source: Source, line: impl FnOnce()) {
        let verdict = self.limit.event(Instant::now(), source);
        left_out(verdict.left_out);
        if verdict.write {
            line();
        }
    }

    /// Tells what was left out when its time has come.
    fn poll(&mut self, cx: &mut Context<'_>) {
        let Some(due) = self.limit.due() else {
            self.timer = None;
            return;
        };
        let timer = self
            .timer
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due)));
        if timer.deadline() != due {
            timer.as_mut().reset(due);
        }
        if timer.as_mut().poll(cx).is_ready() {
            self.timer = None;
            left_out(self.limit.flush(Instant::now()));
        }
    }
}

pub(super) fn left_out(count: Option<u64>) {
    if let Some(count) = count {
        tracing::warn!(
            count,
            "further refused connections were left out of the log"
        );
    }
}

impl<T: Send + 'static> Stream for Accept<T> {
    type Item = io::Result<T>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        // Those who have said something meanwhile are silent no more, before others arrive in their place.
        this.poll_silent(cx);
        let more = this.take(cx);
        this.poll_silent(cx);
        while let Poll::Ready((source, done)) = this.handshakes.poll(cx) {
            match done {
                Ok(done) => return Poll::Ready(Some(Ok(done))),
                Err(refusal) => this.refused(source, refusal),
            }
        }
        this.log.poll(cx);
        if more {
            // Not `wake_by_ref`: the runtime would come back here some sixty times before it looks which connections have
            // become readable, and those that have would be closed as silent ones by then.
            if std::pin::pin!(tokio::task::yield_now()).poll(cx).is_ready() {
                cx.waker().wake_by_ref();
            }
        }
        Poll::Pending
    }
}
