//! Connections of probes and hooks to what the pod itself listens on.
//!
//! In a network of the pod's own, only the pod listens. In the node's, finding out whose the listeners of a port are takes a
//! look at all files of all processes of the pod. Probes connect again and again, so what was found is remembered: as long as
//! the same sockets listen, the same address leads to the pod.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::net::TcpStream;

use super::LOCALHOST;
use crate::{
    forward::{self, ForwardError, Reached},
    listeners::{self, Listener},
    network::Network,
};

/// How many ports are remembered. A container has three probes; redirects may lead to more.
const PORTS: usize = 8;

/// How long a listener may take to answer: a probe has its own time limit, and for a hook the kernel gives up after two minutes.
const PATIENCE: Duration = Duration::from_hours(1);

/// The ports that a program's probes have connected to.
#[derive(Debug, Default)]
pub(super) struct Known {
    network: Network,
    /// Only in the node's network.
    ways: Mutex<HashMap<u16, Way>>,
}

/// How a port was reached.
#[derive(Debug, Clone)]
struct Way {
    address: IpAddr,
    listeners: Vec<Listener>,
}

impl Way {
    /// Connects in the same way if the same sockets listen, before and after.
    async fn again(&self, port: u16) -> Option<TcpStream> {
        let same = || listeners::listening(port) == self.listeners;
        if !same() {
            return None;
        }
        let stream = TcpStream::connect(SocketAddr::new(self.address, port));
        let stream = stream.await.ok()?;
        same().then_some(stream)
    }
}

impl Known {
    pub(super) fn of(network: Network) -> Self {
        Self {
            network,
            ways: Mutex::default(),
        }
    }

    fn ways(&self) -> MutexGuard<'_, HashMap<u16, Way>> {
        self.ways.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection to a listener of the pod. The error is for users.
    pub(super) async fn connect(&self, port: u16) -> Result<TcpStream, String> {
        let way = self.ways().get(&port).cloned();
        if let Some(way) = way
            && let Some(stream) = way.again(port).await
        {
            return Ok(stream);
        }
        let own = std::process::id();
        let reached = forward::connect_anywhere(&self.network, port, own, PATIENCE).await;
        let Reached {
            stream,
            address,
            listeners,
        } = reached.map_err(|error| text(&error))?;
        if matches!(self.network, Network::Private(_)) {
            return Ok(stream);
        }
        let mut ways = self.ways();
        if ways.len() >= PORTS {
            ways.clear();
        }
        ways.insert(port, Way { address, listeners });
        Ok(stream)
    }
}

/// As a real kubelet writes it, if it has such an error.
fn text(error: &ForwardError) -> String {
    match error {
        ForwardError::ConnectionRefused { port, tried } => {
            let late = |(_, error): &(IpAddr, io::Error)| error.kind() == io::ErrorKind::TimedOut;
            let why = if tried.iter().any(late) {
                "i/o timeout"
            } else {
                "connect: connection refused"
            };
            format!("dial tcp {LOCALHOST}:{port}: {why}")
        }
        ForwardError::Foreign { .. }
        | ForwardError::Changed { .. }
        | ForwardError::Elsewhere { .. } => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;

    /// A program that another test starts inherits a listener until its exec closes it, so some answers come late.
    async fn at_last<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
        let looking = async {
            loop {
                if let Some(found) = look().await {
                    return found;
                }
                tokio::task::yield_now().await;
            }
        };
        let found = tokio::time::timeout(Duration::from_secs(20), looking).await;
        found.unwrap_or_else(|_| panic!("{what}"))
    }

    #[tokio::test]
    async fn a_way_leads_to_the_same_listeners_or_nowhere() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let way = Way {
            address: Ipv4Addr::LOCALHOST.into(),
            listeners: listeners::listening(port),
        };
        assert!(way.again(port).await.is_some());
        // Another listener than the one that was found.
        let other = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port_of_other = other.local_addr().unwrap().port();
        assert!(way.again(port_of_other).await.is_none());
        drop(listener);
        at_last("a closed listener is reached", async || {
            way.again(port).await.is_none().then_some(())
        })
        .await;
    }

    #[tokio::test]
    async fn what_is_not_the_pods_is_not_reached() {
        // The test's process is not below itself.
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let known = Known::default();
        let error = at_last("a foreign listener is reached", async || {
            known.connect(port).await.err()
        })
        .await;
        assert!(error.contains("outside the pod"), "{error}");
        drop(listener);
        let refused = format!("dial tcp 127.0.0.1:{port}: connect: connection refused");
        at_last("a closed port is no refusal", async || {
            let refusal = known.connect(port).await;
            (refusal.err().as_ref() == Some(&refused)).then_some(())
        })
        .await;
    }
}
