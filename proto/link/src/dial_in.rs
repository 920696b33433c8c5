//! The carrier `accept`, from the kubelet's side: agents dial in, and the kubelet is the gRPC client on their connections.
//!
//! Connections of agents wait until they are needed; [`DialIn::channel`] takes one whenever a channel has to connect, so
//! that a channel behaves as over any other carrier. [`Reception`] is the task that owns them:
//!
//! ```text
//! accept ─► TLS ─► hello ─┬─► older epoch: told who serves, closed
//!                         └─► waits, with a ping every KEEPALIVE ─► asked once more ─► taken: HTTP/2
//! ```
//!
//! Nothing that has not finished its handshake changes anything here. An agent with a higher epoch replaces the one that
//! served, whose connections are cut; a hello also names the connections that its agent still has, and others are cut.
use std::{
    collections::{HashMap, HashSet, VecDeque},
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use jiff::Timestamp;
use knoc_proto::{error::chain, pb};
use tokio::{
    io::AsyncReadExt as _,
    sync::{mpsc, oneshot},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use super::{
    CONNECT_TIMEOUT, Connection, Credentials, ExpectPeer, KEEPALIVE, KEEPALIVE_TIMEOUT, LinkError,
    Peer,
    accept::Accept,
    admission::Bounds,
    carrier::{Carrier, Unverified, tcp},
    cut::Cuttable,
    dial,
    greeting::{self, PING},
    listen::shake_hands,
    tls::readable_error,
};
use leader::{Leader, Verdict, judge};

mod leader;

/// The most connections that wait. One is enough; there are more if one was lost and the kubelet does not know it yet.
const MOST_WAITING: usize = 8;
/// The most connections that are attended: those that wait, and those that are being refused.
const MOST_ATTENDED: usize = 64;
/// The most requests that wait for a connection.
const MOST_REQUESTS: usize = 16;
/// How long an agent may take to answer when its connection is about to be taken.
const PROBE: Duration = Duration::from_secs(5);
/// How long a refusal is remembered for an error: an older one explains nothing.
const REMEMBERED: Duration = Duration::from_mins(5);

/// Gives out connections of agents that have dialled in. Clones share them.
#[derive(Debug, Clone)]
pub struct DialIn {
    listen: SocketAddr,
    requests: mpsc::Sender<oneshot::Sender<Connection>>,
    refusal: Arc<Mutex<Option<(Instant, String)>>>,
}

/// A [`Reception`] that does not listen yet.
#[derive(Debug)]
pub struct Desk {
    listen: SocketAddr,
    credentials: Credentials,
    expect: ExpectPeer,
    requests: mpsc::Receiver<oneshot::Sender<Connection>>,
    refusal: Arc<Mutex<Option<(Instant, String)>>>,
}

/// Prepares to receive agents that `expect` allows, at `listen`. Nothing listens before [`Desk::open`].
#[must_use]
pub fn prepare(listen: SocketAddr, credentials: Credentials, expect: ExpectPeer) -> (DialIn, Desk) {
    let (requests, requested) = mpsc::channel(MOST_REQUESTS);
    let refusal = Arc::new(Mutex::new(None));
    let dial_in = DialIn {
        listen,
        requests,
        refusal: Arc::clone(&refusal),
    };
    let desk = Desk {
        listen,
        credentials,
        expect,
        requests: requested,
        refusal,
    };
    (dial_in, desk)
}

impl DialIn {
    /// A lazy channel over connections of agents.
    #[must_use]
    pub fn channel(&self) -> Channel {
        let this = self.clone();
        dial::channel(move || {
            let this = this.clone();
            async move { this.take().await }
        })
    }

    /// The next connection; waits for one for [`CONNECT_TIMEOUT`].
    pub async fn take(&self) -> Result<Connection, LinkError> {
        let (give, given) = oneshot::channel();
        let taking = async {
            self.requests.send(give).await.ok()?;
            given.await.ok()
        };
        let taken = tokio::time::timeout(CONNECT_TIMEOUT, taking).await;
        taken.ok().flatten().ok_or_else(|| {
            let refusal = self.refusal.lock().unwrap_or_else(PoisonError::into_inner);
            let recent = refusal.as_ref().filter(|(at, _)| at.elapsed() < REMEMBERED);
            LinkError::NobodyDialledIn {
                listen: self.listen,
                refusal: recent.map(|(_, text)| text.clone()),
            }
        })
    }
}

/// A connection whose agent has presented itself.
struct Arrived {
    connection: Connection,
    hello: pb::DialOutHello,
    /// The pin of our certificate that the agent has seen.
    shown: String,
}

type Arrivals = Accept<tcp::Listener, Arrived>;

impl Desk {
    /// Starts to listen. Must be called within a tokio runtime.
    pub fn open(self) -> Result<Reception, LinkError> {
        let failed = |source| LinkError::Listen {
            carrier: Carrier::Tcp(self.listen.to_string()),
            source,
        };
        let listener = tcp::Listener::bind(self.listen).map_err(failed)?;
        let (credentials, expect) = (self.credentials.clone(), self.expect.clone());
        let refusal = Arc::clone(&self.refusal);
        let arrivals = Accept::new(listener, Bounds::own(), move |connection| {
            let (credentials, expect) = (credentials.clone(), expect.clone());
            let refusal = Arc::clone(&refusal);
            Box::pin(async move {
                let arrived = arrive(connection, &credentials, expect).await;
                arrived.map_err(|error| {
                    let text = chain(&error);
                    let mut last = refusal.lock().unwrap_or_else(PoisonError::into_inner);
                    *last = Some((Instant::now(), text.clone()));
                    text
                })
            })
        });
        Ok(Reception {
            arrivals,
            credentials: self.credentials,
            requests: self.requests,
            requested: VecDeque::new(),
            serving: None,
            waiting: VecDeque::new(),
            attended: FuturesUnordered::new(),
            asked: HashSet::new(),
            taken: Arc::default(),
            next: 0,
        })
    }
}

async fn arrive(
    connection: Unverified<tokio::net::TcpStream>,
    credentials: &Credentials,
    expect: ExpectPeer,
) -> Result<Arrived, LinkError> {
    let shown = credentials.info().spki;
    let (mut stream, peer) = shake_hands(connection, credentials, expect).await?;
    let hello = greeting::receive(&mut stream).await;
    let hello = hello.map_err(|source| LinkError::Greeting {
        peer: peer.to_string(),
        claimed: None,
        source: readable_error(source),
    })?;
    Ok(Arrived {
        connection: Connection::new(stream, peer),
        hello,
        shown,
    })
}

/// A connection that waits.
struct Waiting {
    ticket: u64,
    number: u64,
    shown: String,
    until: Timestamp,
    /// Asks its attendant to hand it out.
    ask: oneshot::Sender<()>,
}

/// How the attendance of a connection ended.
enum Attended {
    /// It was asked for, and its agent is there.
    Ready(Connection),
    /// It was lost.
    Lost(io::Error),
    /// Its agent was told that another one serves.
    Refused,
}

/// A connection that is in use.
struct Taken {
    number: u64,
    cut: CancellationToken,
}

type AllTaken = Arc<Mutex<HashMap<u64, Taken>>>;

/// Removes a connection from those in use when it is dropped.
struct InUse {
    ticket: u64,
    taken: AllTaken,
}

impl Drop for InUse {
    fn drop(&mut self) {
        lock(&self.taken).remove(&self.ticket);
    }
}

fn lock(taken: &AllTaken) -> std::sync::MutexGuard<'_, HashMap<u64, Taken>> {
    taken.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The task that receives agents. Dropping it closes the port and all connections that wait.
pub struct Reception {
    arrivals: Arrivals,
    credentials: Credentials,
    requests: mpsc::Receiver<oneshot::Sender<Connection>>,
    /// The requests for a connection, oldest first.
    requested: VecDeque<oneshot::Sender<Connection>>,
    serving: Option<Leader>,
    /// The connections that wait, oldest first.
    waiting: VecDeque<Waiting>,
    attended: FuturesUnordered<BoxFuture<'static, (u64, u64, Attended)>>,
    /// Connections that were asked for and have not answered yet.
    asked: HashSet<u64>,
    taken: AllTaken,
    next: u64,
}

impl std::fmt::Debug for Reception {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reception")
            .field("serving", &self.serving)
            .finish_non_exhaustive()
    }
}

impl Reception {
    /// The address that agents dial.
    #[must_use]
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.arrivals.local_addr()
    }

    /// Receives agents until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                Some((ticket, number, ended)) = self.attended.next() => {
                    self.ended(ticket, number, ended);
                }
                request = self.requests.recv(), if self.requested.len() < MOST_REQUESTS => {
                    match request {
                        Some(request) => self.requested.push_back(request),
                        // Nobody is left who could ask.
                        None => return,
                    }
                }
                arrived = self.arrivals.next() => match arrived {
                    Some(Ok(arrived)) => self.arrived(arrived),
                    Some(Err(error)) => tracing::warn!(%error, "receive an agent"),
                    None => return,
                },
            }
            self.give();
        }
    }

    fn arrived(&mut self, arrived: Arrived) {
        let leader = Leader::of(&arrived.hello);
        if self.attended.len() >= MOST_ATTENDED {
            tracing::warn!(peer = %arrived.connection.peer(), "an agent has too many connections: one was closed");
            return;
        }
        match judge(self.serving.as_ref(), &leader) {
            Verdict::Refused => return self.refuse(arrived),
            Verdict::Same => {}
            Verdict::Newer => self.replace(leader, arrived.connection.peer()),
        }
        // The agent does not have these any more, even if the network has not told us.
        let held = &arrived.hello.held;
        for lost in lock(&self.taken).values() {
            if !held.contains(&lost.number) {
                lost.cut.cancel();
            }
        }
        self.waiting
            .retain(|waiting| held.contains(&waiting.number));
        if self.waiting.len() >= MOST_WAITING {
            self.waiting.pop_front();
        }
        self.wait(
            arrived.connection,
            arrived.hello.connection,
            arrived.shown,
            true,
        );
    }

    /// Another agent serves from now on.
    fn replace(&mut self, leader: Leader, peer: &Peer) {
        tracing::info!(%peer, host = leader.hostname, epoch = leader.epoch, "an agent dialled in");
        for taken in lock(&self.taken).values() {
            taken.cut.cancel();
        }
        self.waiting.clear();
        self.serving = Some(leader);
    }

    fn refuse(&mut self, arrived: Arrived) {
        let Some(serving) = &self.serving else { return };
        let Arrived {
            mut connection,
            hello,
            ..
        } = arrived;
        tracing::warn!(
            peer = %connection.peer(), host = hello.hostname, epoch = hello.epoch,
            serving = serving.hostname, serving_epoch = serving.epoch,
            "a second agent of this site dialled in and was refused: its lease epoch is not higher than that of the one that serves"
        );
        let rival = pb::DialOutRival {
            epoch: serving.epoch,
            hostname: serving.hostname.clone(),
        };
        let ticket = self.ticket();
        let telling = async move {
            let welcome = pb::DialOutWelcome { rival: Some(rival) };
            let told = async {
                greeting::send(&mut connection, &welcome).await?;
                // The agent closes the connection when it has read this.
                connection.read_u8().await
            };
            // Whether it was heard is of no interest here.
            drop(tokio::time::timeout(CONNECT_TIMEOUT, told).await);
            (ticket, hello.connection, Attended::Refused)
        };
        self.attended.push(telling.boxed());
    }

    fn ticket(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Lets a connection wait; a new one is welcomed first.
    fn wait(&mut self, connection: Connection, number: u64, shown: String, new: bool) {
        let ticket = self.ticket();
        let (ask, asked) = oneshot::channel();
        let until = match connection.peer() {
            Peer::Tls { certificate, .. } => certificate.info().validity.until,
            Peer::Unix { .. } | Peer::Pinned { .. } | Peer::Command => Timestamp::MAX,
        };
        self.waiting.push_back(Waiting {
            ticket,
            number,
            shown,
            until,
            ask,
        });
        let attending = attend(connection, asked, new);
        let attending = attending.map(move |ended| (ticket, number, ended));
        self.attended.push(attending.boxed());
    }

    fn ended(&mut self, ticket: u64, number: u64, ended: Attended) {
        self.asked.remove(&ticket);
        self.waiting.retain(|waiting| waiting.ticket != ticket);
        match ended {
            Attended::Ready(connection) => self.hand_over(connection, number),
            Attended::Lost(error) => tracing::debug!(%error, "a connection of an agent was lost"),
            Attended::Refused => {}
        }
    }

    fn hand_over(&mut self, connection: Connection, number: u64) {
        while let Some(request) = self.requested.pop_front() {
            if request.is_closed() {
                continue;
            }
            let (ticket, cut) = (self.ticket(), CancellationToken::new());
            let taken = Taken {
                number,
                cut: cut.clone(),
            };
            lock(&self.taken).insert(ticket, taken);
            let in_use = InUse {
                ticket,
                taken: Arc::clone(&self.taken),
            };
            let peer = connection.peer().clone();
            let why = "the agent has replaced this connection";
            let cuttable = Cuttable::new(connection, cut, why);
            let connection = Connection::new(cuttable, peer).holding(in_use);
            // Whoever has given up in this instant lets it fall, and the agent dials again.
            drop(request.send(connection));
            return;
        }
        let shown = self.credentials.info().spki;
        self.wait(connection, number, shown, false);
    }

    /// Asks for as many connections as are wanted, the newest first.
    fn give(&mut self) {
        self.requested.retain(|request| !request.is_closed());
        if self.asked.len() >= self.requested.len() {
            return;
        }
        let (shown, now) = (self.credentials.info().spki, Timestamp::now());
        while self.asked.len() < self.requested.len() {
            let Some(waiting) = self.waiting.pop_back() else {
                return;
            };
            // The agent judges us by the certificate that it has seen, and we judge it by its own: a connection that was
            // opened before a renewal is closed, and the agent opens a new one.
            let fresh = waiting.shown == shown && waiting.until > now;
            if fresh && waiting.ask.send(()).is_ok() {
                self.asked.insert(waiting.ticket);
            }
        }
    }
}

/// Looks after a connection that waits, until it is asked for or lost.
async fn attend(
    mut connection: Connection,
    mut asked: oneshot::Receiver<()>,
    new: bool,
) -> Attended {
    if new {
        let welcome = pb::DialOutWelcome::default();
        let welcomed = greeting::send(&mut connection, &welcome);
        match tokio::time::timeout(PROBE, welcomed).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Attended::Lost(error),
            Err(_) => return Attended::Lost(greeting::late()),
        }
    }
    loop {
        let wanted = tokio::select! {
            biased;
            asked = &mut asked => match asked {
                Ok(()) => true,
                Err(_) => return Attended::Lost(io::Error::other("it was replaced")),
            },
            // An agent says nothing unless it is asked.
            byte = connection.read_u8() => {
                return Attended::Lost(byte.map_or_else(|error| error, greeting::unexpected));
            }
            () = tokio::time::sleep(KEEPALIVE) => false,
        };
        let limit = if wanted { PROBE } else { KEEPALIVE_TIMEOUT };
        match tokio::time::timeout(limit, probe(&mut connection)).await {
            Ok(Ok(())) if wanted => return Attended::Ready(connection),
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Attended::Lost(error),
            Err(_) => return Attended::Lost(greeting::late()),
        }
    }
}

async fn probe(connection: &mut Connection) -> io::Result<()> {
    greeting::send_byte(connection, PING).await?;
    match connection.read_u8().await? {
        PING => Ok(()),
        other => Err(greeting::unexpected(other)),
    }
}

#[cfg(test)]
mod tests;
