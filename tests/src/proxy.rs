//! A small HTTP proxy on loopback that answers `CONNECT`, well or badly.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};

/// What the proxy does with a request.
#[derive(Debug, Clone)]
pub enum Behaviour {
    /// Connects to this address, whatever the request names.
    Relay(SocketAddr),
    /// The same if the request has this value of `Proxy-Authorization`, else 407.
    RelayWith(SocketAddr, String),
    /// Sends these bytes.
    Answer(Vec<u8>),
    /// Never answers.
    Silent,
}

/// A running proxy. Dropping it ends all its connections.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
    cut: watch::Sender<u64>,
    _task: JoinSet<()>,
}

impl Proxy {
    /// Starts to listen.
    pub async fn start(behaviour: Behaviour) -> anyhow::Result<Self> {
        let listener = TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (cut, cuts) = watch::channel(0);
        let mut task = JoinSet::new();
        task.spawn(serve(listener, behaviour, Arc::clone(&requests), cuts));
        Ok(Self {
            address,
            requests,
            cut,
            _task: task,
        })
    }

    /// Its address as a setting names it.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The head of each request so far.
    #[must_use]
    pub fn requests(&self) -> Vec<String> {
        let requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        requests.clone()
    }

    /// Ends all connections; new ones are accepted.
    pub fn cut(&self) {
        self.cut.send_modify(|count| *count += 1);
    }
}

async fn serve(
    listener: TcpListener,
    behaviour: Behaviour,
    requests: Arc<Mutex<Vec<String>>>,
    cuts: watch::Receiver<u64>,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => {
                let Ok((io, _)) = accepted else { return };
                let (behaviour, requests) = (behaviour.clone(), Arc::clone(&requests));
                let mut cuts = cuts.clone();
                cuts.mark_unchanged();
                connections.spawn(async move {
                    tokio::select! {
                        _ = cuts.changed() => {}
                        // However it ends, both sides see it.
                        ended = one(io, &behaviour, &requests) => drop(ended),
                    }
                });
            }
        }
    }
}

async fn one(
    mut near: TcpStream,
    behaviour: &Behaviour,
    requests: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") && head.len() < 8192 {
        head.push(near.read_u8().await?);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    requests
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(head.clone());
    let target = match behaviour {
        Behaviour::Relay(target) => target,
        Behaviour::RelayWith(target, login) => {
            if !head.contains(&format!("\r\nProxy-Authorization: {login}\r\n")) {
                return near
                    .write_all(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
                    .await;
            }
            target
        }
        Behaviour::Answer(bytes) => return near.write_all(bytes).await,
        Behaviour::Silent => {
            tokio::time::sleep(Duration::from_hours(1)).await;
            return Ok(());
        }
    };
    let mut far = TcpStream::connect(target).await?;
    near.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n")
        .await?;
    tokio::io::copy_bidirectional(&mut near, &mut far).await?;
    Ok(())
}
