//! Task: the way to the API server from the node's network, where pods reach no other Service.
//!
//! A port of the loopback interface leads there. Other users of the node reach it too, so the kernel is asked who has the
//! other end of each connection, and those of others are reset before they take a place of the pod's own. The bytes are as the container sends them: TLS and the
//! token end at the API server.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use bytes::Bytes;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};

use super::{
    api::ApiServer,
    gate::{Gate, PAUSE},
    tcp,
};
use crate::{listeners, network::Network, pod::Pod};

/// How many connections may be open of which it is not known yet whose they are. Others wait to be accepted.
const UNKNOWN: usize = 32;

/// The port.
#[derive(Debug)]
pub(crate) struct ApiPort {
    listener: TcpListener,
    pub(crate) server: ApiServer,
}

impl ApiPort {
    /// Listens, if the pod is in the node's network and the API server is known.
    pub(crate) async fn bind(pod: &Pod) -> io::Result<Option<Self>> {
        let service = pod.egress.table().api;
        let (Network::Host, Some(service)) = (&pod.network, service) else {
            return Ok(None);
        };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let server = ApiServer {
            service,
            port: listener.local_addr()?.port(),
            named: pod.facts.isolated,
        };
        Ok(Some(Self { listener, server }))
    }

    /// Task: accepts until it is dropped.
    pub(crate) async fn serve(self, gate: Gate) {
        let unknown = Arc::new(Semaphore::new(UNKNOWN));
        // It is never closed.
        while let Ok(place) = Arc::clone(&unknown).acquire_owned().await {
            match self.listener.accept().await {
                Ok((stream, client)) => admit(stream, client, &gate, place),
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
        }
    }
}

/// Takes the connection if a process of this user has opened it. Those of others use nothing up but `place`, and nobody is told of them.
fn admit(stream: TcpStream, client: SocketAddr, gate: &Gate, place: OwnedSemaphorePermit) {
    let stream = tcp::Guarded::new(stream);
    let its_gate = gate.clone();
    gate.tasks.spawn(async move {
        let ours = is_own(&stream, client).await;
        drop(place);
        if !ours {
            return;
        }
        // The Service may have another address by now.
        let target = its_gate.egress.table().api;
        let (Some(target), Some(slot)) = (target, its_gate.slot()) else {
            return;
        };
        let egress = Arc::clone(&its_gate.egress);
        drop(its_gate);
        tcp::serve(stream, target, Bytes::new(), &egress).await;
        drop(slot);
    });
}

/// Whether a process of this user has the other end.
async fn is_own(stream: &tcp::Guarded, client: SocketAddr) -> bool {
    let Ok(here) = stream.local_addr() else {
        return false;
    };
    // A node may have many sockets.
    let asked = tokio::task::spawn_blocking(move || listeners::user(client, here)).await;
    let own = rustix::process::getuid().as_raw();
    asked.is_ok_and(|user| user == Some(own))
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncReadExt as _, sync::mpsc};

    use super::{
        super::{Egress, Table},
        *,
    };

    #[tokio::test]
    async fn a_connection_of_which_the_user_is_not_known_is_reset_and_nobody_is_told() {
        let egress = Arc::new(Egress::default());
        let mut table = Table::default();
        table.api = Some("10.96.0.1:443".parse().unwrap());
        egress.table.send_replace(Arc::new(table));
        let (notes, mut orders) = mpsc::channel(1);
        let gate = Gate::new(&egress, notes);
        let unknown = Arc::new(Semaphore::new(1));
        let place = || Arc::clone(&unknown).try_acquire_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut client = TcpStream::connect(address).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        // The kernel has no socket for a connection from this address, so it names no user either.
        let nobody = SocketAddr::new(address.ip(), address.port());
        // A connection of the pod's own would be an Event here.
        egress.set_isolated(true);
        admit(stream, nobody, &gate, place().unwrap());
        let mut buffer = [0; 1];
        let read = client.read(&mut buffer);
        let read = tokio::time::timeout(std::time::Duration::from_secs(5), read).await;
        let error = read.expect("it is not announced").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        orders.try_recv().unwrap_err();
        egress.set_isolated(false);
        let _client = TcpStream::connect(address).await.unwrap();
        let (stream, client) = listener.accept().await.unwrap();
        admit(stream, client, &gate, place().unwrap());
        let mut waiting = egress.waiting.subscribe();
        let own = waiting.wait_for(|waiting| waiting.after(0).is_some());
        let own = tokio::time::timeout(std::time::Duration::from_secs(30), own).await;
        own.expect("it is announced").unwrap();
    }
}
