//! Task: the listeners in the edge of the pod's network, which follow the cluster's network while the pod runs.
//!
//! A listener that goes leaves its open connections as they are. The [gate](super::gate) admits connections.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::OwnedFd,
    sync::Arc,
};

use nix::sys::socket::{setsockopt, sockopt::Ipv4PacketInfo};
use tokio::{
    net::{TcpListener, UdpSocket},
    task::{AbortHandle, JoinSet},
};

use super::{
    Table,
    gate::{Gate, PAUSE},
    udp,
};
use crate::{
    launch::network::protocol::{Kind, Range},
    mesh::Mesh,
    network::{Network, Private},
    pod::Pod,
};

/// How many connections may wait to be accepted at one port.
const BACKLOG: i32 = 256;

/// The open listeners.
#[derive(Debug)]
pub(crate) struct Ports {
    private: Arc<Private>,
    open: HashMap<(Kind, u16), AbortHandle>,
    tasks: JoinSet<()>,
    gate: Gate,
    mesh: Arc<Mesh>,
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
        if pod.mesh.range().is_some() {
            pod.egress.leads_to_pods(private, &pod.mesh);
        }
        let mut ports = Self {
            private: Arc::clone(private),
            open: HashMap::new(),
            tasks: JoinSet::new(),
            gate,
            mesh: Arc::clone(&pod.mesh),
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
        if let Err(error) = self.private.lead(self.to_cluster(table)).await {
            let message = format!("the pod does not reach the cluster: {error}");
            self.gate.note("EgressUnavailable", message);
        }
        for port in unwanted(&self.open, &table.ports) {
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

    /// What leads to the cluster: not the addresses of the node's own pods, to which the mesh leads.
    fn to_cluster(&self, table: &Table) -> BTreeSet<Range> {
        let ranges = table.ranges.iter().copied();
        ranges.filter(|range| !self.mesh.covers(*range)).collect()
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

/// PURE: the open ports that are not wanted.
fn unwanted<T>(open: &HashMap<(Kind, u16), T>, wanted: &BTreeSet<(Kind, u16)>) -> Vec<(Kind, u16)> {
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
        let mut gone = unwanted(&open.into(), &wanted);
        gone.sort_unstable();
        assert_eq!(gone, [(Kind::Tcp, 80), (Kind::Udp, 53)]);
    }
}
