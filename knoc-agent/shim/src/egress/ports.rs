//! Task: the listeners in the edge of the pod's network, which follow the cluster's network while the pod runs.
//!
//! A listener that goes leaves its open connections as they are. The [gate](super::gate) admits connections.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::OwnedFd,
    sync::Arc,
    time::Duration,
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

/// The pause after routes or a listener could not be made; each further one is twice as long.
const AGAIN: Duration = Duration::from_secs(1);
const AGAIN_MOST: Duration = Duration::from_mins(1);

/// The open listeners.
#[derive(Debug)]
pub(crate) struct Ports {
    private: Arc<Private>,
    open: HashMap<(Kind, u16), AbortHandle>,
    tasks: JoinSet<()>,
    gate: Gate,
    mesh: Arc<Mesh>,
    /// What failed last, of which the pod was told; `None` if nothing did.
    trouble: Option<String>,
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
            trouble: None,
        };
        ports.follow(&pod.egress.table()).await;
        Some(ports)
    }

    /// Task: follows the network until it is dropped. What fails is tried again, after a pause or with the next network.
    pub(crate) async fn keep(mut self) {
        let mut table = self.gate.egress.table.subscribe();
        let mut failures = 0_u32;
        loop {
            let now = Arc::clone(&table.borrow_and_update());
            self.follow(&now).await;
            failures = match self.trouble {
                Some(_) => failures.saturating_add(1),
                None => 0,
            };
            let again = async {
                match pause(failures) {
                    Some(pause) => {
                        let jittered = pause.mul_f64(rand::random_range(0.75..1.25));
                        tokio::time::sleep(jittered).await;
                    }
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                changed = table.changed() => if changed.is_err() {
                    return;
                },
                () = again => {}
            }
        }
    }

    /// Makes routes and listeners those of the table.
    async fn follow(&mut self, table: &Table) {
        let led = self.private.lead(self.to_cluster(table)).await;
        let mut trouble = led
            .err()
            .map(|error| format!("the pod does not reach the cluster: {error}"));
        for port in unwanted(&self.open, &table.ports) {
            if let Some(task) = self.open.remove(&port) {
                task.abort();
            }
        }
        // Those that were ended.
        while self.tasks.try_join_next().is_some() {}
        for (kind, port) in &table.ports {
            if self.open.contains_key(&(*kind, *port)) {
                continue;
            }
            match self.listen(*kind, *port).await {
                Ok(task) => drop(self.open.insert((*kind, *port), task)),
                Err(error) => {
                    trouble.get_or_insert_with(|| {
                        format!(
                            "the pod does not reach port {port} of the cluster's Services: {error}"
                        )
                    });
                }
            }
        }
        if let Some(news) = trouble.as_ref().filter(|_| trouble != self.trouble) {
            self.gate.note("EgressUnavailable", news.clone());
        }
        self.trouble = trouble;
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

/// PURE: the pause after so many failures in a row; `None` if there was none.
fn pause(failures: u32) -> Option<Duration> {
    let earlier = failures.checked_sub(1)?;
    Some(AGAIN.saturating_mul(1 << earlier.min(10)).min(AGAIN_MOST))
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
    fn what_fails_is_tried_again_less_and_less_often() {
        let pauses = [0, 1, 2, 3, 6, 7, 100, u32::MAX].map(pause);
        let seconds = pauses.map(|pause| pause.map(|pause| pause.as_secs()));
        let expected = [
            None,
            Some(1),
            Some(2),
            Some(4),
            Some(32),
            Some(60),
            Some(60),
            Some(60),
        ];
        assert_eq!(seconds, expected);
    }

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
