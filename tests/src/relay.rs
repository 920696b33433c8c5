//! A link that can be cut: a TCP relay on loopback that does not look at the bytes.

use std::net::SocketAddr;

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

/// A relay. Dropping it cuts all connections and refuses new ones.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    target: Option<oneshot::Sender<SocketAddr>>,
    _task: JoinSet<()>,
}

impl Relay {
    /// Starts to listen; nothing is relayed before [`Relay::lead_to`].
    pub async fn start() -> anyhow::Result<Self> {
        Self::start_from(std::net::Ipv4Addr::UNSPECIFIED).await
    }

    /// Like `start`, but connects from this address of the host.
    pub async fn start_from(source: std::net::Ipv4Addr) -> anyhow::Result<Self> {
        let listener = TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (target, told) = oneshot::channel();
        let mut task = JoinSet::new();
        task.spawn(serve(listener, source, told));
        Ok(Self {
            address,
            target: Some(target),
            _task: task,
        })
    }

    /// The address to connect to.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Relays new connections to that address from now on.
    pub fn lead_to(&mut self, target: SocketAddr) {
        if let Some(told) = self.target.take() {
            // If the task has ended, there is nothing to relay.
            told.send(target).ok();
        }
    }

    /// Cuts all connections and relays no new ones.
    pub fn cut(self) {
        drop(self);
    }
}

async fn serve(
    listener: TcpListener,
    source: std::net::Ipv4Addr,
    told: oneshot::Receiver<SocketAddr>,
) {
    let Ok(target) = told.await else { return };
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => {
                let Ok((near, _)) = accepted else { return };
                connections.spawn(pass(near, source, target));
            }
        }
    }
}

async fn pass(mut near: TcpStream, source: std::net::Ipv4Addr, target: SocketAddr) {
    let connected = async {
        let socket = TcpSocket::new_v4()?;
        socket.bind((source, 0).into())?;
        socket.connect(target).await
    };
    if let Ok(mut far) = connected.await {
        // However the connection ends, both sides see it.
        tokio::io::copy_bidirectional(&mut near, &mut far)
            .await
            .ok();
    }
}
