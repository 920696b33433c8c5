//! The accept loop of every port and socket of KNoC: [`Accept`] is a stream of the connections of a [`Listener`], each
//! of them after its handshake.
//!
//! No task is spawned: the listener and the handshakes make progress while the stream is polled. A connection passes
//! two stages, each of them bounded in number by [`Admissions`] and in time:
//!
//! ```text
//! accept ─► silent: no byte yet, at most FIRST_BYTE ─► handshake: at most CONNECT_TIMEOUT ─► yielded
//! ```
//!
//! A full stage never stops the loop from accepting; instead the oldest connection of the busiest source is closed.
//! Connections that have sent something are counted apart from those that have not, so silent ones displace only each
//! other. A listener that strangers cannot reach has no first stage. If the process runs out of descriptors, an
//! unfinished connection is closed for the new one; if there is none, a descriptor kept in reserve is spent to refuse
//! the connections that wait in the kernel's queue.
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
use rustix::io::Errno;
use tokio::time::{Instant, Sleep};

use super::{
    CONNECT_TIMEOUT,
    admission::{Admissions, Bounds, Source, Ticket},
    carrier::{Listener, Unverified},
};

/// The limit from the connection to its first byte. A client sends it as soon as it is connected; a busy one needs a
/// second.
const FIRST_BYTE: Duration = Duration::from_secs(5);
/// How many connections are accepted in a row before the handshakes are polled.
const BATCH: usize = 32;
/// The pause after `accept` failed with an error that this process cannot resolve.
const PAUSE: Duration = Duration::from_millis(200);
/// The errors with which accept(2) reports that descriptors or memory are exhausted.
const SCARCE: [Errno; 4] = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
/// The errors of accept(2) that concern only the connection that was to be accepted.
const ONE_CONNECTION: [Errno; 4] = [Errno::CONNABORTED, Errno::PROTO, Errno::PERM, Errno::INTR];

/// The result of a handshake: the connection, or the error text for the log.
pub type Handshake<T> = BoxFuture<'static, Result<T, String>>;

/// Why a connection was closed before it was yielded.
enum AcceptError {
    /// The peer closed it before it sent a byte, as health checks and port scans do.
    Probe,
    /// The handshake failed with this text.
    Failed(String),
}

/// The connections in one stage. A connection that was evicted is dropped at the next poll.
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

    /// Adds a connection. Returns the source of the connection that was closed for it, if any.
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

    /// Closes the oldest connection of the busiest source, and returns that source.
    fn evict(&mut self) -> Option<Source> {
        let evicted = self.admissions.evict();
        self.close(evicted)
    }

    /// The next connection that has passed this stage, or failed in it.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<(Source, T)> {
        loop {
            match ready!(self.running.poll_next_unpin(cx)) {
                Some((ticket, Ok(done))) => {
                    self.aborts.remove(&ticket);
                    // A connection that was evicted in the moment in which it finished stays evicted.
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

type Begin<I, T> = Box<dyn Fn(Unverified<I>) -> Handshake<T> + Send + Sync>;
type Opened<T> = Result<T, (String, AcceptError)>;

/// The connections of a listener `L` after their handshakes, each as a `T`. The stream never ends by itself.
pub struct Accept<L: Listener, T> {
    listener: L,
    begin: Begin<L::Io, T>,
    silent: Stage<Opened<Unverified<L::Io>>>,
    handshakes: Stage<Opened<T>>,
    pause: Option<Pin<Box<Sleep>>>,
    /// A descriptor that can be closed if no other is left.
    reserve: Option<File>,
    log: AcceptLog,
}

impl<L: Listener, T> fmt::Debug for Accept<L, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Accept").finish_non_exhaustive()
    }
}

impl<L: Listener, T: Send + 'static> Accept<L, T> {
    /// Accepts the connections of `listener` within `bounds`, and runs `begin` as the handshake of each.
    pub fn new(
        listener: L,
        bounds: Bounds,
        begin: impl Fn(Unverified<L::Io>) -> Handshake<T> + Send + Sync + 'static,
    ) -> Self {
        Self {
            listener,
            begin: Box::new(begin),
            silent: Stage::new(bounds.silent, bounds.silent / 4 * 3),
            handshakes: Stage::new(bounds.handshakes, bounds.handshakes / 2),
            pause: None,
            reserve: reserve(),
            log: AcceptLog::default(),
        }
    }

    /// The network address that is listened on; `None` for a unix socket.
    #[must_use]
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.listener.local_addr()
    }

    /// Accepts up to one batch of the connections that wait in the kernel's queue. Returns true if more may wait.
    fn take(&mut self, cx: &mut Context<'_>) -> bool {
        for _ in 0..BATCH {
            if let Some(pause) = &mut self.pause {
                if pause.as_mut().poll(cx).is_pending() {
                    return false;
                }
                self.pause = None;
            }
            match self.listener.poll_accept(cx) {
                Poll::Pending => return false,
                Poll::Ready(Ok(arrived)) => self.admit(arrived),
                Poll::Ready(Err(error)) => {
                    if !self.recover(cx, &error) {
                        return true;
                    }
                }
            }
        }
        true
    }

    fn admit(&mut self, arrived: Unverified<L::Io>) {
        if self.reserve.is_none() {
            self.reserve = reserve();
        }
        let source = Source::from(arrived.origin);
        let evicted = if L::STRANGERS {
            self.silent.push(source, first_byte::<L>(arrived).boxed())
        } else {
            self.start_handshake(source, arrived)
        };
        self.note_eviction(evicted);
    }

    /// Starts the handshakes of the connections that have sent their first byte.
    fn poll_silent(&mut self, cx: &mut Context<'_>) {
        while let Poll::Ready((source, done)) = self.silent.poll(cx) {
            match done {
                Ok(spoke) => {
                    let evicted = self.start_handshake(source, spoke);
                    self.note_eviction(evicted);
                }
                Err(error) => self.log_refused(source, error),
            }
        }
    }

    fn start_handshake(&mut self, source: Source, connection: Unverified<L::Io>) -> Option<Source> {
        let peer = connection.origin.to_string();
        let handshake = tokio::time::timeout(CONNECT_TIMEOUT, (self.begin)(connection));
        let handshake = handshake.map(move |done| {
            let late = || {
                Err(format!(
                    "no handshake within {} s",
                    CONNECT_TIMEOUT.as_secs()
                ))
            };
            let done = done.unwrap_or_else(|_| late());
            done.map_err(|error| (peer, AcceptError::Failed(error)))
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

    /// Handles an error of `accept`. Returns false if connections that were closed for it must be dropped by a poll of
    /// the stages first.
    fn recover(&mut self, cx: &mut Context<'_>, error: &io::Error) -> bool {
        let errno = Errno::from_io_error(error);
        if !errno.is_some_and(|errno| SCARCE.contains(&errno)) {
            tracing::debug!(%error, "accept a connection");
            // Some errors concern only the connection that was to be accepted. Any other may be a lasting fault of the
            // listener, and must not make this loop spin.
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
            // Its descriptor is released when the stages are polled.
            self.note_eviction(evicted);
            cx.waker().wake_by_ref();
            return false;
        }
        // No connection of this listener can be closed: refuse the next one in the queue rather than leave it without
        // an answer.
        drop(self.reserve.take());
        match self.listener.poll_accept(cx) {
            Poll::Ready(Ok(arrived)) => drop(arrived),
            Poll::Ready(Err(_)) => self.wait(),
            Poll::Pending => {}
        }
        self.reserve = reserve();
        true
    }

    fn wait(&mut self) {
        self.pause = Some(Box::pin(tokio::time::sleep(PAUSE)));
    }

    fn log_refused(&mut self, source: Source, (peer, error): (String, AcceptError)) {
        match error {
            AcceptError::Probe => tracing::debug!(peer, "a connection ended before its first byte"),
            AcceptError::Failed(error) => self.log.write(source, || {
                tracing::warn!(peer, error, "connection refused");
            }),
        }
    }
}

fn reserve() -> Option<File> {
    File::open("/dev/null").ok()
}

async fn first_byte<L: Listener>(silent: Unverified<L::Io>) -> Opened<Unverified<L::Io>> {
    let error = match tokio::time::timeout(FIRST_BYTE, L::first_byte(&silent.io)).await {
        Ok(true) => return Ok(silent),
        Ok(false) => AcceptError::Probe,
        Err(_) => AcceptError::Failed(format!("no byte within {} s", FIRST_BYTE.as_secs())),
    };
    Err((silent.origin.to_string(), error))
}

/// Writes log lines about refused connections, limited by source.
#[derive(Default)]
struct AcceptLog {
    limit: LogLimit<Source>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl AcceptLog {
    fn write(&mut self, source: Source, line: impl FnOnce()) {
        let verdict = self.limit.event(Instant::now(), source);
        left_out(verdict.left_out);
        if verdict.write {
            line();
        }
    }

    /// Logs how many lines were left out, once the interval of the limit is over.
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

impl<L: Listener, T: Send + 'static> Stream for Accept<L, T> {
    type Item = io::Result<T>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        // Connections that have sent a byte leave the silent stage first, before new ones could displace them.
        this.poll_silent(cx);
        let more = this.take(cx);
        this.poll_silent(cx);
        while let Poll::Ready((source, done)) = this.handshakes.poll(cx) {
            match done {
                Ok(done) => return Poll::Ready(Some(Ok(done))),
                Err(error) => this.log_refused(source, error),
            }
        }
        this.log.poll(cx);
        if more {
            // Not `wake_by_ref`: the runtime would poll this stream some sixty times before it checks which connections
            // have become readable, and by then those would have been closed as silent ones.
            if std::pin::pin!(tokio::task::yield_now()).poll(cx).is_ready() {
                cx.waker().wake_by_ref();
            }
        }
        Poll::Pending
    }
}
