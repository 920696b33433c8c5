//! The carrier `accept`, from the agent's side: it dials the kubelet, and is the gRPC server on that connection.
//!
//! One connection waits until the kubelet takes it; then the agent dials the next one, so that the kubelet opens
//! connections whenever it needs them, as if it dialled itself. `link.proto` describes what they exchange before that.
use std::{
    collections::BTreeSet,
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use knoc_proto::pb;
use rustls_pki_types::ServerName;
use tokio::io::AsyncReadExt as _;

use super::{
    CONNECT_TIMEOUT, Carrier, Connection, Credentials, ExpectPeer, KEEPALIVE, KEEPALIVE_TIMEOUT,
    LinkError, Peer,
    carrier::{http_connect, tcp},
    connect::over_tls,
    greeting::{self, HTTP2, PING},
    tls::readable_error,
};

/// The most connections that an agent holds to all its kubelets, including those that wait. Each kubelet uses two, and a
/// few more while older streams outlive a renewal of its certificate.
pub const MOST: usize = 64;

/// The agent process, as it presents itself to kubelets. Clones share the numbers of its connections.
#[derive(Debug, Clone)]
pub struct Caller {
    hello: Arc<pb::DialOutHello>,
    held: Arc<Held>,
}

/// The numbers of all connections of the process, to whichever kubelet.
#[derive(Debug, Default)]
struct Held {
    next: AtomicU64,
    numbers: Mutex<BTreeSet<u64>>,
}

impl Held {
    fn with<T>(&self, act: impl FnOnce(&mut BTreeSet<u64>) -> T) -> T {
        let mut numbers = self.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        act(&mut numbers)
    }
}

/// The number of one connection; it is removed from [`Held`] when dropped.
#[derive(Debug)]
struct Number {
    number: u64,
    held: Arc<Held>,
}

impl Drop for Number {
    fn drop(&mut self) {
        self.held.with(|numbers| numbers.remove(&self.number));
    }
}

impl Caller {
    /// `instance` tells this process from every other one; `epoch` is that of its lease.
    #[must_use]
    pub fn new(instance: &str, epoch: i64, hostname: &str) -> Self {
        let hello = pb::DialOutHello {
            instance: instance.to_owned(),
            epoch,
            hostname: hostname.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            connection: 0,
            held: Vec::new(),
        };
        Self {
            hello: Arc::new(hello),
            held: Arc::default(),
        }
    }

    /// The hello of a new connection, and its number; `None` at [`MOST`] connections.
    fn next(&self) -> Option<(pb::DialOutHello, Number)> {
        let number = self.held.next.fetch_add(1, Ordering::Relaxed);
        let held: Option<Vec<u64>> = self.held.with(|numbers| {
            let others = (numbers.len() < MOST).then(|| numbers.iter().copied().collect());
            if others.is_some() {
                numbers.insert(number);
            }
            others
        });
        let hello = pb::DialOutHello {
            connection: number,
            held: held?,
            ..(*self.hello).clone()
        };
        let held = Arc::clone(&self.held);
        Some((hello, Number { number, held }))
    }
}

/// How one kubelet is reached.
#[derive(Debug, Clone)]
pub struct Target {
    /// The carrier.
    pub carrier: Carrier,
    /// The host name that is sent in the TLS handshake, by which an Ingress or a load balancer chooses the service; none:
    /// the host of the address.
    pub server_name: Option<String>,
    /// The peer that is expected there.
    pub expect: ExpectPeer,
}

impl Target {
    /// Whether this can be sent as a host name.
    #[must_use]
    pub fn is_server_name(name: &str) -> bool {
        ServerName::try_from(name).is_ok()
    }

    fn name(&self) -> Option<ServerName<'static>> {
        let host = || {
            let (host, _) = self.carrier.address()?.rsplit_once(':')?;
            Some(host.trim_matches(['[', ']']).to_owned())
        };
        let name = self.server_name.clone().or_else(host)?;
        ServerName::try_from(name).ok()
    }

    async fn open(&self, credentials: &Credentials) -> Result<Connection, LinkError> {
        let (carrier, expect) = (&self.carrier, &self.expect);
        match carrier {
            Carrier::Tcp(address) => {
                let dialler = tcp::Dialler { address };
                over_tls(&dialler, carrier, credentials, expect, self.name()).await
            }
            Carrier::HttpConnect { address, proxy } => {
                let dialler = http_connect::Dialler { address, proxy };
                over_tls(&dialler, carrier, credentials, expect, self.name()).await
            }
            // The site file's check refuses these: the kubelet is reached over a network.
            Carrier::Unix(_) | Carrier::Exec(_) | Carrier::Ssh(_) => {
                Err(LinkError::NeedlessCredentials {
                    carrier: carrier.clone(),
                })
            }
        }
    }
}

/// A connection that the kubelet has not taken yet.
pub struct Waiting {
    connection: Connection,
    carrier: Carrier,
}

impl fmt::Debug for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waiting")
            .field("carrier", &self.carrier)
            .finish_non_exhaustive()
    }
}

/// Dials a kubelet and presents `caller`. The connection then waits until the kubelet takes it.
pub async fn dial(
    target: &Target,
    credentials: &Credentials,
    caller: &Caller,
) -> Result<Waiting, LinkError> {
    let carrier = &target.carrier;
    let Some((hello, number)) = caller.next() else {
        return Err(LinkError::TooMany { most: MOST });
    };
    let opened = tokio::time::timeout(CONNECT_TIMEOUT, target.open(credentials)).await;
    let late = || LinkError::Timeout {
        carrier: carrier.clone(),
    };
    let mut connection = opened.unwrap_or_else(|_| Err(late()))?.holding(number);
    let failed = greeting_of(carrier, connection.peer());
    let greeted = async {
        greeting::send(&mut connection, &hello).await?;
        greeting::receive::<pb::DialOutWelcome>(&mut connection).await
    };
    let greeted = tokio::time::timeout(CONNECT_TIMEOUT, greeted).await;
    // In TLS 1.3 the side that dials learns only here that its certificate was rejected.
    let welcome = greeted
        .unwrap_or_else(|_| Err(greeting::late()))
        .map_err(failed)?;
    match welcome.rival {
        None => Ok(Waiting {
            connection,
            carrier: carrier.clone(),
        }),
        Some(rival) => Err(LinkError::Superseded {
            carrier: Box::new(carrier.clone()),
            hostname: rival.hostname,
            epoch: rival.epoch,
        }),
    }
}

fn greeting_of(carrier: &Carrier, peer: &Peer) -> impl Fn(std::io::Error) -> LinkError + use<> {
    let (carrier, claimed) = (carrier.to_string(), claimed(peer));
    move |source| LinkError::Greeting {
        peer: carrier.clone(),
        claimed: claimed.clone(),
        source: readable_error(source),
    }
}

fn claimed(peer: &Peer) -> Option<String> {
    match peer {
        Peer::Tls { identity, .. } => Some(identity.to_string()),
        Peer::Unix { .. } | Peer::Pinned { .. } | Peer::Command => None,
    }
}

impl Waiting {
    /// One over a connection that was not dialled.
    #[cfg(test)]
    pub(crate) fn over(connection: Connection) -> Self {
        let carrier = Carrier::Tcp("kubelet:443".to_owned());
        Self {
            connection,
            carrier,
        }
    }

    /// The kubelet that will take it.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        self.connection.peer()
    }

    /// Waits until the kubelet takes the connection, which is then served with gRPC. Ends with an error when the kubelet
    /// is gone.
    pub async fn taken(self) -> Result<Connection, LinkError> {
        let Self {
            mut connection,
            carrier,
        } = self;
        let failed = greeting_of(&carrier, connection.peer());
        loop {
            let byte = tokio::time::timeout(KEEPALIVE + KEEPALIVE_TIMEOUT, connection.read_u8());
            let byte = byte.await.unwrap_or_else(|_| Err(greeting::late()));
            match byte.map_err(&failed)? {
                PING => greeting::send_byte(&mut connection, PING)
                    .await
                    .map_err(&failed)?,
                HTTP2 => return Ok(connection.replaying(&[HTTP2])),
                other => return Err(failed(greeting::unexpected(other))),
            }
        }
    }
}
