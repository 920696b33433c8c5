//! Task: the listeners in the edge of the pod's network, which follow the cluster's network while the pod runs.
//!
//! A listener that goes leaves its open connections as they are. The number of connections is bounded; one that exceeds it
//! is reset.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt::Ipv4PacketInfo};
use tokio::{
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::{AbortHandle, JoinSet},
};
use tokio_util::task::TaskTracker;

use super::{Egress, Table, tcp, udp};
use crate::{
    launch::network::protocol::Kind,
    network::{Network, Private},
    pod::Pod,
    supervisor::Command,
};

/// How many connections the containers of a pod may have open to the cluster at once, and how many may wait to be accepted
/// at one port.
const CONNECTIONS: usize = 1024;
const BACKLOG: i32 = 256;

/// How many flows of datagrams they may have.
const FLOWS: usize = 1024;

/// The pause after a connection could not be accepted, because the shim has too many files open.
pub(super) const PAUSE: Duration = Duration::from_millis(100);

/// The open listeners.
#[derive(Debug)]
pub(crate) struct Ports {
    private: Arc<Private>,
    open: HashMap<(Kind, u16), AbortHandle>,
    tasks: JoinSet<()>,
    gate: Gate,
}

/// What admits connections.
#[derive(Debug, Clone)]
pub(crate) struct Gate {
    pub(super) egress: Arc<Egress>,
    connections: Arc<Semaphore>,
    pub(super) flows: Arc<Semaphore>,
    /// The tasks of the connections, which outlive their listener.
    pub(super) tasks: TaskTracker,
    notes: mpsc::Sender<Command>,
    /// Whether users were told that there are too many.
    told: Arc<AtomicBool>,
}

impl Ports {
    /// Listens as the network says that is known by now. `None` if the pod has no edge.
    pub(crate) async fn open(pod: &Pod, gate: Gate) -> Option<Self> {
        let Network::Private(private) = &pod.network else {
            return None;
        };
        if private.no_edge.is_some() {
            return None;
        }
        let mut ports = Self {
            private: Arc::clone(private),
            open: HashMap::new(),
            tasks: JoinSet::new(),
            gate,
        };
        ports.follow(&pod.egress.table()).await;
        Some(ports)
    }

    /// Task: follows the network until it is dropped.
    pub(crate) async fn keep(mut self) {
        let mut table = self.gate.egress.table.subscribe();
        loop {
            let now = Arc::clone(&table.borrow_and_update());
            self.follow(&now).await;
            if table.changed().await.is_err() {
                return;
            }
        }
    }

    /// Makes routes and listeners those of the table. What fails is tried again with the next table.
    async fn follow(&mut self, table: &Table) {
        if let Err(error) = self.private.lead(table.ranges.clone()).await {
            let message = format!("the pod does not reach the cluster: {error}");
            self.gate.note("EgressUnavailable", message);
        }
        let gone = changes(&self.open, &table.ports);
        for port in gone {
            if let Some(task) = self.open.remove(&port) {
                task.abort();
            }
        }
        // Those that were ended.
        while self.tasks.try_join_next().is_some() {}
        let mut failed = None;
        for (kind, port) in &table.ports {
            if self.open.contains_key(&(*kind, *port)) {
                continue;
            }
            match self.listen(*kind, *port).await {
                Ok(task) => drop(self.open.insert((*kind, *port), task)),
                Err(error) => failed = Some((*port, error)),
            }
        }
        if let Some((port, error)) = failed {
            let message =
                format!("the pod does not reach port {port} of the cluster's Services: {error}");
            self.gate.note("EgressUnavailable", message);
        }
    }

    async fn listen(&mut self, kind: Kind, port: u16) -> io::Result<AbortHandle> {
        let socket = self.private.edge_socket(kind).await?;
        let gate = self.gate.clone();
        Ok(match kind {
            Kind::Tcp => self.tasks.spawn(accept(listener(socket, port)?, gate)),
            Kind::Udp => self
                .tasks
                .spawn(udp::serve(datagrams(socket, port)?, port, gate)),
        })
    }
}

/// PURE: the ports that are no longer wanted.
fn changes<T>(open: &HashMap<(Kind, u16), T>, wanted: &BTreeSet<(Kind, u16)>) -> Vec<(Kind, u16)> {
    let open = open.keys().copied();
    open.filter(|port| !wanted.contains(port)).collect()
}

fn listener(socket: OwnedFd, port: u16) -> io::Result<TcpListener> {
    rustix::net::bind(&socket, &SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port))?;
    rustix::net::listen(&socket, BACKLOG)?;
    TcpListener::from_std(socket.into())
}

fn datagrams(socket: OwnedFd, port: u16) -> io::Result<UdpSocket> {
    // The address that a container has sent to comes with each datagram.
    setsockopt(&socket, Ipv4PacketInfo, &true)?;
    rustix::net::bind(&socket, &SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port))?;
    UdpSocket::from_std(socket.into())
}

/// Task: accepts the connections to one port.
async fn accept(listener: TcpListener, gate: Gate) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => gate.admit(stream),
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

impl Gate {
    pub(crate) fn new(egress: &Arc<Egress>, notes: mpsc::Sender<Command>) -> Self {
        Self {
            egress: Arc::clone(egress),
            connections: Arc::new(Semaphore::new(CONNECTIONS)),
            flows: Arc::new(Semaphore::new(FLOWS)),
            tasks: TaskTracker::new(),
            notes,
            told: Arc::default(),
        }
    }

    pub(super) fn admit(&self, stream: TcpStream) {
        let stream = tcp::Guarded::new(stream);
        // The edge has an address of its own, which is none of the cluster's.
        let Some(target) = self.target(stream.local_addr()) else {
            return;
        };
        let Some(slot) = self.slot() else { return };
        let egress = Arc::clone(&self.egress);
        self.tasks.spawn(async move {
            tcp::serve(stream, target, &egress).await;
            drop(slot);
        });
    }

    /// Room for one more connection.
    pub(super) fn slot(&self) -> Option<OwnedSemaphorePermit> {
        let slot = Arc::clone(&self.connections).try_acquire_owned();
        if slot.is_err() {
            self.note_once(format!(
                "the containers have {CONNECTIONS} connections to the cluster open: further ones are reset until some have ended"
            ));
        }
        slot.ok()
    }

    fn target(&self, dialled: io::Result<SocketAddr>) -> Option<SocketAddrV4> {
        match dialled {
            Ok(SocketAddr::V4(target)) => self.reaches(*target.ip()).then_some(target),
            Ok(SocketAddr::V6(_)) | Err(_) => None,
        }
    }

    /// Whether this address leads to the cluster.
    pub(super) fn reaches(&self, address: Ipv4Addr) -> bool {
        self.egress.table.borrow().contains(address)
    }

    pub(super) fn note_once(&self, message: String) {
        if !self.told.swap(true, Ordering::Relaxed) {
            self.note("EgressLimit", message);
        }
    }

    fn note(&self, reason: &'static str, message: String) {
        tracing::warn!("{message}");
        // The supervisor has ended, or is flooded with commands.
        self.notes.try_send(Command::Note { reason, message }).ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ports_that_are_no_longer_wanted_are_closed() {
        let open = [
            ((Kind::Tcp, 80), ()),
            ((Kind::Tcp, 53), ()),
            ((Kind::Udp, 53), ()),
        ];
        let wanted = [(Kind::Tcp, 443), (Kind::Tcp, 53)].into();
        let mut gone = changes(&open.into(), &wanted);
        gone.sort_unstable();
        assert_eq!(gone, [(Kind::Tcp, 80), (Kind::Udp, 53)]);
    }
}
