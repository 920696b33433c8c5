//! A small HTTP proxy on loopback that answers `CONNECT`, well or badly.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
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
    /// Connects to this address, and ends a connection on which nothing was sent for that long.
    RelayUnlessIdle(SocketAddr, Duration),
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
    idle: Arc<AtomicUsize>,
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
        let idle = Arc::new(AtomicUsize::new(0));
        let seen = Seen {
            requests: Arc::clone(&requests),
            idle: Arc::clone(&idle),
        };
        task.spawn(serve(listener, behaviour, seen, cuts));
        Ok(Self {
            address,
            requests,
            idle,
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

    /// How many connections it has ended because they were idle.
    #[must_use]
    pub fn idle_ones(&self) -> usize {
        self.idle.load(Ordering::Relaxed)
    }

    /// Ends all connections; new ones are accepted.
    pub fn cut(&self) {
        self.cut.send_modify(|count| *count += 1);
    }
}

/// What the proxy has seen.
#[derive(Debug, Clone)]
struct Seen {
    requests: Arc<Mutex<Vec<String>>>,
    idle: Arc<AtomicUsize>,
}

async fn serve(
    listener: TcpListener,
    behaviour: Behaviour,
    seen: Seen,
    cuts: watch::Receiver<u64>,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => {
                let Ok((io, _)) = accepted else { return };
                let (behaviour, seen) = (behaviour.clone(), seen.clone());
                let mut cuts = cuts.clone();
                cuts.mark_unchanged();
                connections.spawn(async move {
                    tokio::select! {
                        _ = cuts.changed() => {}
                        // However it ends, both sides see it.
                        ended = one(io, &behaviour, &seen) => drop(ended),
                    }
                });
            }
        }
    }
}

async fn one(mut near: TcpStream, behaviour: &Behaviour, seen: &Seen) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") && head.len() < 8192 {
        head.push(near.read_u8().await?);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    seen.requests
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(head.clone());
    let mut longest = None;
    let target = match behaviour {
        Behaviour::Relay(target) => target,
        Behaviour::RelayUnlessIdle(target, limit) => {
            longest = Some(*limit);
            target
        }
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
    if let Some(longest) = longest {
        relay(near, far, longest, &seen.idle).await
    } else {
        tokio::io::copy_bidirectional(&mut near, &mut far).await?;
        Ok(())
    }
}

/// Passes bytes on until either side ends, or until nothing was sent for `longest`.
async fn relay(
    mut near: TcpStream,
    mut far: TcpStream,
    longest: Duration,
    idle: &AtomicUsize,
) -> std::io::Result<()> {
    let (mut out, mut back) = (vec![0; 64 << 10], vec![0; 64 << 10]);
    loop {
        tokio::select! {
            read = near.read(&mut out) => match read? {
                0 => return Ok(()),
                count => far.write_all(&out[..count]).await?,
            },
            read = far.read(&mut back) => match read? {
                0 => return Ok(()),
                count => near.write_all(&back[..count]).await?,
            },
            () = tokio::time::sleep(longest) => {
                idle.fetch_add(1, Ordering::Relaxed);
                return Ok(());
            }
        }
    }
}
