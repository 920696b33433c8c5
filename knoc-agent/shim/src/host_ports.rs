//! Host ports: the shim listens on ports of the compute node and forwards each connection, or datagram, to a port of the pod.
//!
//! They are the pod's own listeners, so there is no TLS, and whoever reaches the node can connect. The agent has checked
//! the ports against the site's policy. They are bound before any container starts, only on the node's own address and on
//! its loopback interface.

mod datagrams;

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use knoc_proto::pb;
use rustix::net::sockopt::set_socket_keepalive;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream, UdpSocket},
    sync::Semaphore,
    task::JoinSet,
};

use self::datagrams::{CLIENTS, Inside, Relay};
use super::{forward, network::Network, pod::Pod};

/// How many connections are forwarded at the same time; further ones are closed at once.
const CONNECTIONS: usize = 512;

/// The pause after a connection could not be accepted, because the shim has too many files open.
const PAUSE: Duration = Duration::from_millis(100);

/// Why a pod cannot have its host ports.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HostPortError {
    #[error(
        "hostPort {port}: hostIP {ip} is neither 127.0.0.1 nor the address of the compute node ({node}); leave it out"
    )]
    Address { port: u32, ip: String, node: String },
    #[error(
        "hostPort {port}: datagrams are forwarded to another port only if the pod has a network of its own \
         (`knoc.io/network: private`)"
    )]
    Datagrams { port: u32 },
    #[error("hostPort {} cannot be used on the compute node", address.port())]
    Bind {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
}

/// One address of the node, and the pod's port that it leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Way {
    from: SocketAddr,
    to: u16,
    udp: bool,
}

/// A port of the node that is bound.
#[derive(Debug)]
enum Bound {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

impl Bound {
    async fn on(way: Way) -> io::Result<Self> {
        Ok(if way.udp {
            Self::Udp(UdpSocket::bind(way.from).await?)
        } else {
            Self::Tcp(TcpListener::bind(way.from).await?)
        })
    }

    /// Task: forwards until it is dropped. `slots` limits what is forwarded at the same time, of either kind.
    async fn serve(self, port: u16, network: Network, slots: [Arc<Semaphore>; 2]) {
        let [connections, clients] = slots;
        match (self, network) {
            (Self::Tcp(listener), network) => accept(listener, port, network, connections).await,
            (Self::Udp(socket), Network::Private(private)) => {
                let relay = Relay::new(socket, port, Inside::Pod(private), clients);
                relay.run().await;
            }
            // [`ways`] has none.
            (Self::Udp(_), Network::Host) => {}
        }
    }
}

/// The bound ports.
#[derive(Debug, Default)]
pub(crate) struct HostPorts(Vec<(Bound, u16)>);

impl HostPorts {
    /// Binds all host ports of the pod, or none.
    pub(crate) async fn bind(pod: &Pod) -> Result<Self, HostPortError> {
        let containers = pod.containers().flat_map(|(_, one)| &one.host_ports);
        let own = matches!(pod.network, Network::Private(_));
        let mut bound = Vec::new();
        for way in ways(containers, &pod.facts.fields.host_ip, own)? {
            let port = Bound::on(way).await;
            let port = port.map_err(|source| HostPortError::Bind {
                address: way.from,
                source,
            })?;
            bound.push((port, way.to));
        }
        Ok(Self(bound))
    }

    /// Task: forwards until it is dropped; all connections end with it.
    pub(crate) async fn serve(self, network: Network) {
        let slots = [CONNECTIONS, CLIENTS].map(|most| Arc::new(Semaphore::new(most)));
        let mut loops = JoinSet::new();
        for (bound, port) in self.0 {
            loops.spawn(bound.serve(port, network.clone(), slots.clone()));
        }
        while loops.join_next().await.is_some() {}
    }
}

async fn accept(listener: TcpListener, port: u16, network: Network, slots: Arc<Semaphore>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else {
                    tokio::time::sleep(PAUSE).await;
                    continue;
                };
                if let Ok(slot) = Arc::clone(&slots).try_acquire_owned() {
                    let network = network.clone();
                    connections.spawn(async move {
                        relay(stream, port, &network).await;
                        drop(slot);
                    });
                }
            }
        }
    }
}

/// Copies both directions until they have ended. A client of a port on which the pod does not listen sees its connection
/// closed.
async fn relay(mut client: TcpStream, port: u16, network: &Network) {
    let own = std::process::id();
    let connected = forward::connect_anywhere(network, port, own, forward::DIALLING).await;
    if let Ok(reached) = connected {
        let mut inside = reached.stream;
        // The connection works without both, too. A client that is gone for hours must not keep its place.
        client.set_nodelay(true).ok();
        set_socket_keepalive(&client, true).ok();
        // An error ends the connection, and both ends see it close.
        copy_bidirectional(&mut client, &mut inside).await.ok();
    }
}

/// PURE: what to bind. In the node's network, the same port leads to the program without the shim.
fn ways<'a>(
    ports: impl Iterator<Item = &'a pb::HostPort>,
    node: &str,
    own_network: bool,
) -> Result<BTreeSet<Way>, HostPortError> {
    let loopback = IpAddr::from(Ipv4Addr::LOCALHOST);
    let node_ip: Option<IpAddr> = node.parse().ok();
    let mut ways = BTreeSet::new();
    for one in ports {
        if !own_network && one.host_port == one.container_port {
            continue;
        }
        let refused = || HostPortError::Address {
            port: one.host_port,
            ip: one.host_ip.clone(),
            node: node.to_owned(),
        };
        // Kubernetes accepts forms such as 127.0.0.01, which must not be taken for an address that was left out.
        let asked: Option<IpAddr> = match one.host_ip.as_str() {
            "" => None,
            text => Some(text.parse().map_err(|_| refused())?),
        };
        if one.udp && !own_network {
            return Err(HostPortError::Datagrams {
                port: one.host_port,
            });
        }
        let addresses: Vec<IpAddr> = match asked.filter(|ip| !ip.is_unspecified()) {
            None => node_ip.into_iter().chain([loopback]).collect(),
            Some(ip) if ip.is_loopback() || Some(ip) == node_ip => vec![ip],
            Some(_) => return Err(refused()),
        };
        // The agent has checked that both are ports.
        let number = |port: u32| u16::try_from(port).unwrap_or_default();
        let (from, to) = (number(one.host_port), number(one.container_port));
        ways.extend(addresses.into_iter().map(|ip| Way {
            from: SocketAddr::new(ip, from),
            to,
            udp: one.udp,
        }));
    }
    Ok(ways)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    fn port(host_port: u32, container_port: u32, ip: &str) -> pb::HostPort {
        pb::HostPort {
            host_port,
            container_port,
            host_ip: ip.to_owned(),
            udp: false,
        }
    }

    fn shown(ports: &[pb::HostPort], own: bool) -> Result<Vec<String>, String> {
        let ways = ways(ports.iter(), "10.0.0.7", own).map_err(|error| error.to_string())?;
        let shown = ways.iter().map(|way| format!("{}>{}", way.from, way.to));
        Ok(shown.collect())
    }

    #[test]
    fn only_the_nodes_address_and_its_loopback_are_bound() {
        let all = ["10.0.0.7:8080>80", "127.0.0.1:8080>80"].map(str::to_owned);
        for unspecified in ["", "0.0.0.0", "::"] {
            let found = shown(&[port(8080, 80, unspecified)], true);
            assert_eq!(found.unwrap(), all);
        }
        // The same twice is one.
        let twice = [port(8080, 80, ""), port(8080, 80, "10.0.0.7")];
        assert_eq!(shown(&twice, true).unwrap(), all);
        let one = shown(&[port(8080, 80, "127.0.0.1")], true);
        assert_eq!(one.unwrap(), ["127.0.0.1:8080>80"]);
        let error = shown(&[port(8080, 80, "10.0.0.8")], true).unwrap_err();
        let named = error.contains("hostIP 10.0.0.8") && error.contains("10.0.0.7");
        assert!(named, "{error}");
        let error = shown(&[port(8080, 80, "127.0.0.01")], true).unwrap_err();
        assert!(error.contains("hostIP 127.0.0.01"), "{error}");
    }

    #[test]
    fn in_the_nodes_network_a_program_listens_on_the_same_port_itself() {
        let count = |port, own| shown(&[port], own).unwrap().len();
        assert_eq!(count(port(80, 80, ""), false), 0);
        assert_eq!(count(port(8080, 80, "127.0.0.1"), false), 1);
        assert_eq!(count(port(80, 80, "127.0.0.1"), true), 1);
    }

    #[test]
    fn datagrams_have_ports_of_their_own_and_lead_to_a_network_of_the_pods_own() {
        let datagrams = |ip| pb::HostPort {
            udp: true,
            ..port(53, 1053, ip)
        };
        let both = [port(53, 53, "127.0.0.1"), datagrams("127.0.0.1")];
        let found = shown(&both, true).unwrap();
        assert_eq!(found, ["127.0.0.1:53>53", "127.0.0.1:53>1053"]);
        let error = shown(&both, false).unwrap_err();
        assert!(error.contains("hostPort 53: datagrams"), "{error}");
        let same = pb::HostPort {
            container_port: 53,
            ..datagrams("")
        };
        assert_eq!(shown(&[same], false).unwrap().len(), 0);
    }

    #[tokio::test]
    async fn a_port_on_which_the_pod_does_not_listen_closes_the_connection() {
        // The test's own process is not below itself, so its listeners are not the pod's.
        let foreign = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let to = foreign.local_addr().unwrap().port();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut tasks = JoinSet::new();
        let bound = Bound::Tcp(listener);
        tasks.spawn(HostPorts(vec![(bound, to)]).serve(Network::Host));
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"secret").await.unwrap();
        let mut answer = Vec::new();
        let reading = client.read_to_end(&mut answer);
        let ended = tokio::time::timeout(Duration::from_secs(20), reading).await;
        // The end may be a reset, as the shim has not read what was sent.
        drop(ended.expect("the connection stays open"));
        assert!(answer.is_empty());
    }
}
