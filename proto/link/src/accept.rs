//! The accept loop of every port and socket of ours: the connections of a listener ([`Listener`]), each after its
//! handshake, as a stream.
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
//! only each other; a listener that lets no strangers in has no first stage. If the process has no descriptor left, an
//! unfinished connection is closed for the new one; if there is none, a descriptor kept in reserve serves to refuse
//! whoever waits in the kernel's queue.
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

/// From the connection to its first byte. A client sends it as soon as it is connected; a busy one takes a second.
const FIRST_BYTE: Duration = Duration::from_secs(5);
/// Connections accepted before handshakes get their turn.
const BATCH: usize = 32;
/// The pause after `accept` failed for a reason that we cannot do anything about.
const PAUSE: Duration = Duration::from_millis(200);
/// `accept` has no descriptor or memory left.
const SCARCE: [Errno; 4] = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
/// `accept` failed because of the connection, see accept(2).
const ONE_CONNECTION: [Errno; 4] = [Errno::CONNABORTED, Errno::PROTO, Errno::PERM, Errno::INTR];

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

type Begin<I, T> = Box<dyn Fn(Unverified<I>) -> Handshake<T> + Send + Sync>;
type Opened<T> = Result<T, (String, Refusal)>;

/// The connections of a listener `L` after their handshakes, each as a `T`. Never ends by itself.
pub struct Accept<L: Listener, T> {
    listener: L,
    begin: Begin<L::Io, T>,
    silent: Stage<Opened<Unverified<L::Io>>>,
    handshakes: Stage<Opened<T>>,
    pause: Option<Pin<Box<Sleep>>>,
    /// A descriptor to spend when there is no other.
    reserve: Option<File>,
    log: RefusalLog,
}

impl<L: Listener, T> fmt::Debug for Accept<L, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Accept").finish_non_exhaustive()
    }
}

impl<L: Listener, T: Send + 'static> Accept<L, T> {
    /// The connections of `listener`, with `begin` as their handshake.
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
            log: RefusalLog::default(),
        }
    }

    /// The address listened on; none for a unix socket.
    #[must_use]
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.listener.local_addr()
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
            self.shake_hands(source, arrived)
        };
        self.note_eviction(evicted);
    }

    /// Begins the handshakes of those that have sent their first byte.
    fn poll_silent(&mut self, cx: &mut Context<'_>) {
        while let Poll::Ready((source, done)) = self.silent.poll(cx) {
            match done {
                Ok(spoke) => {
                    let evicted = self.shake_hands(source, spoke);
                    self.note_eviction(evicted);
                }
                Err(refusal) => self.refused(source, refusal),
            }
        }
    }

    fn shake_hands(&mut self, source: Source, connection: Unverified<L::Io>) -> Option<Source> {
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

async fn first_byte<L: Listener>(silent: Unverified<L::Io>) -> Opened<Unverified<L::Io>> {
    let refusal = match tokio::time::timeout(FIRST_BYTE, L::first_byte(&silent.io)).await {
        Ok(true) => return Ok(silent),
        Ok(false) => Refusal::Probe,
        Err(_) => Refusal::Failed(format!("no byte within {} s", FIRST_BYTE.as_secs())),
    };
    Err((silent.origin.to_string(), refusal))
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

impl<L: Listener, T: Send + 'static> Stream for Accept<L, T> {
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
