//! A link that can be cut: a TCP relay on loopback that does not look at the bytes.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// A relay. Dropping it cuts all connections and refuses new ones.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    target: Option<oneshot::Sender<SocketAddr>>,
    state: Arc<Mutex<State>>,
    _task: JoinSet<()>,
}

/// Never held across an await.
#[derive(Debug, Default)]
struct State {
    refuses: bool,
    /// Cut one connection each, in the order in which they came.
    connections: Vec<CancellationToken>,
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
        let state = Arc::default();
        let mut task = JoinSet::new();
        task.spawn(serve(listener, source, told, Arc::clone(&state)));
        Ok(Self {
            address,
            target: Some(target),
            state,
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

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes new connections at once from now on, or relays them again.
    pub fn refuse(&self, refuses: bool) {
        self.state().refuses = refuses;
    }

    /// How many connections have been relayed so far.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.state().connections.len()
    }

    /// Cuts one connection; 0 is the one that came first.
    pub fn cut_one(&self, number: usize) -> anyhow::Result<()> {
        use anyhow::Context as _;
        let state = self.state();
        let connection = state.connections.get(number);
        connection.context("no such connection")?.cancel();
        Ok(())
    }

    /// Cuts all connections that there are. New ones are relayed, unless they are refused.
    pub fn cut_all(&self) {
        for connection in &self.state().connections {
            connection.cancel();
        }
    }
}

async fn serve(
    listener: TcpListener,
    source: std::net::Ipv4Addr,
    told: oneshot::Receiver<SocketAddr>,
    state: Arc<Mutex<State>>,
) {
    let Ok(target) = told.await else { return };
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => {
                let Ok((near, _)) = accepted else { return };
                let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
                if !state.refuses {
                    let cut = CancellationToken::new();
                    state.connections.push(cut.clone());
                    connections.spawn(async move {
                        cut.run_until_cancelled(pass(near, source, target)).await;
                    });
                }
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
