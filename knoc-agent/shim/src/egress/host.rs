//! Task: the way to the API server from the node's network, where pods reach no other Service.
//!
//! A port of the loopback interface leads there. Other users of the node reach it too, so the kernel is asked who has the
//! other end of each connection, and those of others are reset. The bytes are as the container sends them: TLS and the
//! token end at the API server.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use tokio::net::{TcpListener, TcpStream};

use super::{
    api::ApiServer,
    gate::{Gate, PAUSE},
    tcp,
};
use crate::{listeners, network::Network, pod::Pod};

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
        loop {
            match self.listener.accept().await {
                Ok((stream, client)) => admit(stream, client, &gate),
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
        }
    }
}

fn admit(stream: TcpStream, client: SocketAddr, gate: &Gate) {
    let stream = tcp::Guarded::new(stream);
    // The Service may have another address by now.
    let target = gate.egress.table().api;
    let (Some(target), Some(slot)) = (target, gate.slot()) else {
        return;
    };
    let egress = Arc::clone(&gate.egress);
    gate.tasks.spawn(async move {
        if is_own(&stream, client).await {
            tcp::serve(stream, target, &egress).await;
        }
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
