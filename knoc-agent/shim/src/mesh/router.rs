//! Task: owns the pod's address on the mesh, the interface, the listener for tunnels, and the tasks of all tunnels.
//!
//! It waits until the agent has given the pod an address, brings the interface up, and says where tunnels are taken. From then on
//! it gives each packet of the pod to the [lane](super::lane) of its target, and each tunnel that was dialled to a task of its
//! own ([`super::inbound`]).
//!
//! Containers wait for the address, since programs read `status.podIP` once, but not for ever: [`WAIT`]. An address that comes
//! later still works for what is started then.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    pin::pin,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures::StreamExt as _;
use knoc_link::{
    Connection, Incoming, Peer,
    admission::Bounds,
    pinned::{self, KeyPair},
};
use knoc_proto::{error::chain, overlap};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};

use super::{
    Given, Mesh,
    carried::Tunnel,
    inbound::Inbound,
    interface::{Interface, Room},
    lane::{Lane, QUEUE},
    notes::Notes,
    packet::{Header, Reason, header, refusal},
    unproven::Unproven,
};
use crate::{
    budget::Budget,
    launch::network::protocol::Range,
    network::{Network, Private},
    pod::Pod,
    supervisor::Command,
};

/// How long containers wait for the pod's address.
const WAIT: Duration = Duration::from_mins(1);
/// The pause before what failed is tried again.
const AGAIN: Duration = Duration::from_secs(30);
/// How many tunnels that the agent carries may wait to be taken.
const ARRIVALS: usize = 16;
/// How many connections may be open without a byte, and how many in their handshake; those after it are bounded by
/// [`super::unproven`]. Strangers can open them all, and their memory is that of the pod's job. The pods of a node may all begin at once.
const BOUNDS: Bounds = Bounds {
    silent: 256,
    handshakes: 256,
    finished: 256,
};
/// How many bytes wait for all other pods together. The only packet for a pod always fits, so that nobody who sends much to others keeps
/// the pod from it.
const WAITING: usize = 32 << 20;
/// How many packets are read before other work is done.
const BATCH: usize = 64;

/// The reason of Events about the address.
const UNAVAILABLE: &str = "PodAddressUnavailable";
/// The reason of the Event about networks of the node that are in the range.
const OVERLAPS: &str = "PodRangeOverlaps";
/// The node's IPv4 routes.
const ROUTES: &str = "/proc/self/net/route";

/// What the task needs.
#[derive(Debug)]
pub(crate) struct Router {
    mesh: Arc<Mesh>,
    private: Arc<Private>,
    range: Range,
    /// The address of the compute node, on which tunnels are taken.
    node: String,
    /// The files of the pod's key.
    pair: (PathBuf, PathBuf),
    commands: mpsc::Sender<Command>,
}

/// What is there once the pod has its address.
struct Up {
    own: Ipv4Addr,
    interface: Arc<Interface>,
    incoming: Incoming,
    /// Tunnels that the agent carries from other shims.
    carried: mpsc::Receiver<Tunnel>,
    pair: Arc<KeyPair>,
}

impl Router {
    /// `None` if the pod is to have no address of its own, or has no network of its own.
    pub(crate) fn of(pod: &Pod, commands: mpsc::Sender<Command>) -> Option<Self> {
        let Network::Private(private) = &pod.network else {
            return None;
        };
        Some(Self {
            mesh: Arc::clone(&pod.mesh),
            private: Arc::clone(private),
            range: pod.mesh.range()?,
            node: pod.facts.fields.host_ip.clone(),
            pair: pod.jobdir.link_pair(),
            commands,
        })
    }

    /// Task: runs until it is dropped.
    pub(crate) async fn run(self) {
        self.bar().await;
        let own = self.address().await;
        let mut told = false;
        let (up, endpoint) = loop {
            match self.bring_up(own).await {
                Ok(up) => break up,
                Err(why) if !told => {
                    told = true;
                    self.without(&why).await;
                }
                Err(why) => tracing::debug!("the pod has no address yet: {why}"),
            }
            sleep(AGAIN).await;
        };
        self.mesh.endpoint.send_replace(Some(endpoint));
        self.tell(Command::Addressed(Some(own))).await;
        self.tell_hidden().await;
        let notes = Arc::new(Notes::new(self.commands.clone()));
        let mesh = Arc::clone(&self.mesh);
        let error = tokio::select! {
            error = Routes::new(mesh, up, notes).serve() => error,
            error = self.keep_routes() => error,
        };
        self.mesh.endpoint.send_replace(None);
        self.bar().await;
        self.note(format!(
            "the pod is not reached at {own} any more: its interface has failed: {error}"
        ))
        .await;
    }

    /// As long as there is no interface, packets to other pods must not leave over the networks of the compute node, where somebody else
    /// may have their addresses.
    async fn bar(&self) {
        if let Err(error) = self.private.bar(self.range).await {
            tracing::warn!(range = %self.range, %error, "what the pod sends to other pods may leave over the networks of the node");
        }
    }

    /// Waits for the pod's address. Containers wait, too, for a while: one may become free, and the agent may be back soon.
    async fn address(&self) -> Ipv4Addr {
        let mut given = self.mesh.given.subscribe();
        let mut patience = pin!(sleep_until(Instant::now() + WAIT));
        let mut waits = true;
        let mut why = format!("the agent has given it none within {} s", WAIT.as_secs());
        loop {
            let now = given.borrow_and_update().clone();
            match now {
                Given::Address(own) => return own,
                Given::Nothing(because) => why = because,
                Given::Unknown => {}
            }
            tokio::select! {
                biased;
                // The sender is in `self.mesh`.
                _ = given.changed() => {}
                () = &mut patience, if waits => {
                    waits = false;
                    self.without(&why).await;
                }
            }
        }
    }

    /// Containers start without an address.
    async fn without(&self, why: &str) {
        self.note(format!(
            "the pod has no address of its own, and other pods do not reach it: {why}"
        ))
        .await;
        self.tell(Command::Addressed(None)).await;
    }

    /// Has the addresses of other nodes' pods lead to the interface, too. Returns why it cannot.
    async fn keep_routes(&self) -> io::Error {
        let mut ranges = self.mesh.ranges.subscribe();
        loop {
            let now = ranges.borrow_and_update().clone();
            if now.len() > 1
                && let Err(error) = self.private.reach(now).await
            {
                return error;
            }
            // The sender is in `self.mesh`.
            ranges.changed().await.ok();
        }
    }

    /// Says which networks of the node the pod does not reach.
    async fn tell_hidden(&self) {
        let routes = std::fs::read_to_string(ROUTES).unwrap_or_default();
        let hidden = overlap::hidden((self.range.first, self.range.prefix), &routes);
        if hidden.is_empty() {
            return;
        }
        let message = format!(
            "the range {} of the pods' own addresses has networks of the compute node in it, which the pod does not reach: {}; choose another \
             range (spec.podCIDR of the Node, or node.podRange of the kubelet)",
            self.range,
            hidden.join(", ")
        );
        tracing::warn!("{message}");
        let reason = OVERLAPS;
        self.tell(Command::Note { reason, message }).await;
    }

    async fn bring_up(&self, own: Ipv4Addr) -> Result<(Up, SocketAddr), String> {
        let node: IpAddr = self.node.parse().map_err(|_| {
            "the address of the compute node at which other nodes reach it is not known".to_owned()
        })?;
        let (certificate, key) = self.pair.clone();
        let read = tokio::task::spawn_blocking(move || KeyPair::from_files(&certificate, &key));
        let pair = read.await.map_err(|error| chain(&error))?;
        let pair = pair.map_err(|error| chain(&error))?;
        let here = SocketAddr::new(node, 0);
        let listening = pinned::listen_within(here, pair.clone(), BOUNDS).await;
        let incoming = listening.map_err(|error| chain(&error))?;
        let endpoint = incoming.local_addr();
        let endpoint = endpoint.ok_or_else(|| "the listener has no address".to_owned())?;
        let interface = self.interface(own).await;
        let interface =
            interface.map_err(|error| format!("create the interface (/dev/net/tun): {error}"))?;
        let (arrivals, carried) = mpsc::channel(ARRIVALS);
        self.mesh.arrivals.send_replace(Some(arrivals));
        let up = Up {
            own,
            interface: Arc::new(interface),
            incoming,
            carried,
            pair: Arc::new(pair),
        };
        Ok((up, endpoint))
    }

    async fn interface(&self, own: Ipv4Addr) -> io::Result<Interface> {
        Interface::new(self.private.join(own, self.range).await?)
    }

    async fn note(&self, message: String) {
        tracing::warn!("{message}");
        let reason = UNAVAILABLE;
        self.tell(Command::Note { reason, message }).await;
    }

    async fn tell(&self, command: Command) {
        // If the supervisor has ended, nobody needs to know.
        self.commands.send(command).await.ok();
    }
}

/// Where packets go, and the tasks that carry them.
struct Routes {
    mesh: Arc<Mesh>,
    up: Up,
    notes: Arc<Notes>,
    /// The queues of packets, each with the number of its lane.
    queues: HashMap<Ipv4Addr, (u64, mpsc::Sender<Bytes>)>,
    budget: Budget,
    /// The number of the newest lane.
    newest: u64,
    lanes: JoinSet<(Ipv4Addr, u64)>,
    tunnels: JoinSet<()>,
    unproven: Unproven,
}

impl Routes {
    fn new(mesh: Arc<Mesh>, up: Up, notes: Arc<Notes>) -> Self {
        Self {
            mesh,
            up,
            notes,
            queues: HashMap::new(),
            budget: Budget::new(WAITING),
            newest: 0,
            lanes: JoinSet::new(),
            tunnels: JoinSet::new(),
            unproven: Unproven::default(),
        }
    }

    /// Carries packets until the interface fails.
    async fn serve(mut self) -> io::Error {
        let mut room = Room::default();
        let interface = Arc::clone(&self.up.interface);
        loop {
            tokio::select! {
                Some(ended) = self.lanes.join_next() => if let Ok((target, number)) = ended {
                    self.close(target, number);
                },
                Some(_) = self.tunnels.join_next() => {}
                // Its listener never ends, and says itself what fails.
                Some(accepted) = self.up.incoming.next() => if let Ok(connection) = accepted {
                    self.accept(connection);
                },
                Some(tunnel) = self.up.carried.recv() => self.accept_carried(tunnel),
                ready = interface.readable() => {
                    let sent = ready.and_then(|()| self.send_all(&interface, &mut room));
                    if let Err(error) = sent {
                        return error;
                    }
                }
            }
        }
    }

    /// Gives the packets that the pod has sent to their lanes.
    fn send_all(&mut self, interface: &Interface, room: &mut Room) -> io::Result<()> {
        for _ in 0..BATCH {
            match interface.take(room)? {
                Some(packet) => self.send(packet),
                None => return Ok(()),
            }
        }
        Ok(())
    }

    fn send(&mut self, packet: &[u8]) {
        // The kernel says something over IPv6 to every interface.
        let Some(Header { source, target }) = header(packet) else {
            return;
        };
        if source != self.up.own || target == self.up.own || !self.mesh.reaches(target) {
            return;
        }
        // A lane may have ended without a packet for a while.
        for _ in 0..2 {
            let Some((number, queue)) = self.queue(target) else {
                self.notes.too_many(target);
                if let Some(answer) = refusal(packet, Reason::HostUnreachable) {
                    self.up.interface.put(&answer);
                }
                return;
            };
            if queue.is_closed() {
                self.close(target, number);
                continue;
            }
            let is_only = queue.capacity() == queue.max_capacity();
            // A packet that does not fit is lost, and TCP slows down.
            if let Ok(room) = queue.try_reserve()
                && let Some(packet) = self.budget.copy(packet, is_only)
            {
                room.send(packet);
            }
            return;
        }
    }

    /// The queue of packets to a pod. `None` if there are too many others.
    fn queue(&mut self, target: Ipv4Addr) -> Option<(u64, mpsc::Sender<Bytes>)> {
        if let Some(queue) = self.queues.get(&target) {
            return Some(queue.clone());
        }
        let lane = Lane {
            target,
            own: self.up.own,
            wanted: self.mesh.want(target)?,
            interface: Arc::clone(&self.up.interface),
            pair: Arc::clone(&self.up.pair),
            notes: Arc::clone(&self.notes),
        };
        self.newest += 1;
        let (number, (queue, packets)) = (self.newest, mpsc::channel(QUEUE));
        self.lanes.spawn(async move {
            lane.run(packets).await;
            (target, number)
        });
        self.queues.insert(target, (number, queue.clone()));
        Some((number, queue))
    }

    /// A lane has ended. Its place may have another one by now.
    fn close(&mut self, target: Ipv4Addr, number: u64) {
        let ended = |(open, _): &(u64, mpsc::Sender<Bytes>)| *open == number;
        if self.queues.get(&target).is_some_and(ended) {
            self.queues.remove(&target);
        }
    }

    /// What takes the packets of a tunnel that was dialled.
    fn inbound(&self) -> Inbound {
        Inbound {
            mesh: Arc::clone(&self.mesh),
            own: self.up.own,
            interface: Arc::clone(&self.up.interface),
            notes: Arc::clone(&self.notes),
        }
    }

    fn accept(&mut self, connection: Connection) {
        let Peer::Pinned { origin, .. } = connection.peer() else {
            return;
        };
        let place = self.unproven.admit(*origin);
        self.tunnels.spawn(self.inbound().run(connection, place));
    }

    /// Its handshake is still to come.
    fn accept_carried(&mut self, tunnel: Tunnel) {
        let mut place = self.unproven.admit(tunnel.origin);
        let (inbound, pair) = (self.inbound(), Arc::clone(&self.up.pair));
        self.tunnels.spawn(async move {
            let accepted = tokio::select! {
                biased;
                () = place.lost() => return,
                accepted = pinned::accept_over(tunnel, "another shim", &pair) => accepted,
            };
            if let Ok(connection) = accepted {
                inbound.run(connection, place).await;
            }
        });
    }
}

#[cfg(test)]
mod tests;
