//! Task: the datagrams that come to one host port.
//!
//! Each client has a socket of its own in the pod's network, so that the program can tell clients apart and its answers find
//! back. A client that exchanges nothing for a while is forgotten, and so is the one that was silent for the longest time if
//! there are too many. As on any network, what does not fit is dropped.

use std::{
    future::poll_fn,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use rustix::net::connect;
use tokio::{
    io::ReadBuf,
    net::UdpSocket,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep, timeout},
};

use super::PAUSE;
use crate::network::Private;

/// How many clients all host ports of a pod may have together.
pub(super) const CLIENTS: usize = 256;

/// After which time a silent client is forgotten, as by the kernel's own translation of addresses.
const IDLE: Duration = Duration::from_mins(2);

/// The longest datagram.
const LONGEST: usize = 64 << 10;

/// How many addresses of the pod a program may listen at.
const TARGETS: usize = 3;

/// Where the datagrams go.
#[derive(Debug)]
pub(super) enum Inside {
    Pod(Arc<Private>),
    /// For tests: the loopback interface of this host.
    #[cfg(test)]
    Loopback,
}

impl Inside {
    async fn socket(&self) -> io::Result<UdpSocket> {
        match self {
            Self::Pod(private) => private.datagrams().await,
            #[cfg(test)]
            Self::Loopback => UdpSocket::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await,
        }
    }

    /// PURE: an address of the pod. Programs that choose one listen at that by which others know the pod.
    fn address(&self, number: usize) -> IpAddr {
        match self {
            Self::Pod(private) => match (number % TARGETS, private.own_address()) {
                (0, Some(own)) => own.into(),
                (0 | 1, _) => private.address,
                _ => Ipv4Addr::LOCALHOST.into(),
            },
            #[cfg(test)]
            Self::Loopback => Ipv4Addr::LOCALHOST.into(),
        }
    }
}

/// One port of the node, and the clients that it has.
#[derive(Debug)]
pub(super) struct Relay {
    node: UdpSocket,
    /// The pod's port.
    port: u16,
    inside: Inside,
    slots: Arc<Semaphore>,
    clients: Vec<Client>,
    /// Whose turn it is to be asked first: a client, or the node's socket behind the last one.
    turn: usize,
    buffer: Vec<u8>,
}

#[derive(Debug)]
struct Client {
    address: SocketAddr,
    /// Connected to an address of the pod.
    socket: UdpSocket,
    /// Which address of the pod that is.
    number: usize,
    used: Instant,
    slot: OwnedSemaphorePermit,
}

/// A datagram, which is in the buffer.
#[derive(Debug, Clone, Copy)]
struct Arrived {
    /// Who has sent it, or is to get it.
    client: SocketAddr,
    from_pod: bool,
    length: usize,
}

impl Relay {
    pub(super) fn new(node: UdpSocket, port: u16, inside: Inside, slots: Arc<Semaphore>) -> Self {
        Self {
            node,
            port,
            inside,
            slots,
            clients: Vec::new(),
            turn: 0,
            buffer: vec![0; LONGEST],
        }
    }

    /// Task: relays until it is dropped.
    pub(super) async fn run(mut self) {
        loop {
            let arrived = timeout(IDLE, poll_fn(|context| self.poll(context))).await;
            self.clients.retain(|one| one.used.elapsed() < IDLE);
            match arrived {
                Ok(Ok(arrived)) if arrived.from_pod => {
                    let data = self.buffer.get(..arrived.length).unwrap_or_default();
                    // As on any network, it may be lost.
                    self.node.try_send_to(data, arrived.client).ok();
                }
                Ok(Ok(arrived)) => {
                    // A client that cannot be reached is none.
                    self.pass_on(arrived).await.ok();
                }
                Ok(Err(_)) => sleep(PAUSE).await,
                Err(_) => {}
            }
        }
    }

    /// The next datagram, from each side in turn. An error is one of the node's socket.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<Arrived>> {
        let count = self.clients.len() + 1;
        for step in 0..count {
            let at = (self.turn + step) % count;
            let mut read = ReadBuf::new(&mut self.buffer);
            let (client, from_pod) = match self.clients.get_mut(at) {
                None => match self.node.poll_recv_from(context, &mut read) {
                    Poll::Ready(from) => (from?, false),
                    Poll::Pending => continue,
                },
                Some(client) => match client.socket.poll_recv(context, &mut read) {
                    Poll::Ready(Ok(())) => {
                        client.used = Instant::now();
                        (client.address, true)
                    }
                    Poll::Ready(Err(_)) => {
                        // Nobody listens there, or not any more. Its next datagram goes elsewhere.
                        client.number += 1;
                        client.aim(&self.inside, self.port)?;
                        context.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                    Poll::Pending => continue,
                },
            };
            self.turn = at + 1;
            return Poll::Ready(Ok(Arrived {
                client,
                from_pod,
                length: read.filled().len(),
            }));
        }
        Poll::Pending
    }

    /// Sends a datagram of a client to the first address of the pod where somebody listens.
    async fn pass_on(&mut self, arrived: Arrived) -> io::Result<()> {
        let mut all = self.clients.iter();
        let known = all.position(|one| one.address == arrived.client);
        let mut client = match known {
            Some(at) => self.clients.swap_remove(at),
            None => self.welcome(arrived.client).await?,
        };
        let data = self.buffer.get(..arrived.length).unwrap_or_default();
        for _ in 0..TARGETS {
            let sent = client.socket.send(data).await;
            // Within one host, a refusal usually comes at once.
            if sent.is_ok() && client.socket.take_error()?.is_none() {
                break;
            }
            client.number += 1;
            client.aim(&self.inside, self.port)?;
        }
        client.used = Instant::now();
        self.clients.push(client);
        Ok(())
    }

    /// A new client, in the place of the one that was silent for the longest time if there are too many.
    async fn welcome(&mut self, address: SocketAddr) -> io::Result<Client> {
        let slot = if let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() {
            slot
        } else {
            let all = self.clients.iter().enumerate();
            let oldest = all.min_by_key(|(_, one)| one.used).map(|(at, _)| at);
            let oldest = oldest.ok_or(io::ErrorKind::QuotaExceeded)?;
            self.clients.swap_remove(oldest).slot
        };
        let client = Client {
            address,
            socket: self.inside.socket().await?,
            number: 0,
            used: Instant::now(),
            slot,
        };
        client.aim(&self.inside, self.port)?;
        Ok(client)
    }
}

impl Client {
    /// Connects its socket to the address of the pod whose turn it is.
    fn aim(&self, inside: &Inside, port: u16) -> io::Result<()> {
        let address = SocketAddr::new(inside.address(self.number), port);
        Ok(connect(&self.socket, &address)?)
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::JoinSet;

    use super::*;

    async fn bound() -> UdpSocket {
        UdpSocket::bind("127.0.0.1:0").await.unwrap()
    }

    async fn received(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
        let mut buffer = vec![0; 100];
        let receiving = timeout(Duration::from_secs(20), socket.recv_from(&mut buffer));
        let (count, from) = receiving.await.expect("nothing comes").unwrap();
        buffer.truncate(count);
        (buffer, from)
    }

    async fn relay(to: u16, most: usize) -> (Relay, SocketAddr) {
        let node = bound().await;
        let address = node.local_addr().unwrap();
        let slots = Arc::new(Semaphore::new(most));
        (Relay::new(node, to, Inside::Loopback, slots), address)
    }

    #[tokio::test]
    async fn each_client_gets_the_answers_to_its_own_datagrams() {
        let program = bound().await;
        let to = program.local_addr().unwrap().port();
        let (relay, address) = relay(to, CLIENTS).await;
        let mut tasks = JoinSet::new();
        tasks.spawn(relay.run());
        let clients = [bound().await, bound().await];
        let mut seen = Vec::new();
        for (number, client) in clients.iter().enumerate() {
            client
                .send_to(number.to_string().as_bytes(), address)
                .await
                .unwrap();
            let (data, from) = received(&program).await;
            assert_eq!(data, number.to_string().as_bytes());
            seen.push(from);
        }
        assert_ne!(seen[0], seen[1], "the program tells them apart");
        // The later one is answered first.
        for at in [1, 0] {
            program.send_to(b"answer", seen[at]).await.unwrap();
            let (data, from) = received(&clients[at]).await;
            assert_eq!((&data[..], from), (&b"answer"[..], address));
        }
        // The same client again is the same for the program.
        clients[0].send_to(b"again", address).await.unwrap();
        assert_eq!(received(&program).await, (b"again".to_vec(), seen[0]));
    }

    #[tokio::test]
    async fn a_program_that_listens_later_is_reached_later() {
        let program = bound().await;
        let at = program.local_addr().unwrap();
        drop(program);
        let (relay, address) = relay(at.port(), CLIENTS).await;
        let mut tasks = JoinSet::new();
        tasks.spawn(relay.run());
        let client = bound().await;
        client.send_to(b"early", address).await.unwrap();
        let program = UdpSocket::bind(at).await.unwrap();
        // The first may still be on its way.
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut buffer = [0; 100];
        loop {
            client.send_to(b"late", address).await.unwrap();
            let receiving = program.recv_from(&mut buffer);
            if timeout(PAUSE, receiving).await.is_ok() {
                break;
            }
            assert!(Instant::now() < deadline, "nothing comes");
        }
    }

    #[tokio::test]
    async fn beyond_the_limit_the_client_that_was_silent_for_the_longest_time_is_forgotten() {
        let program = bound().await;
        let to = program.local_addr().unwrap().port();
        let (mut relay, _) = relay(to, 2).await;
        let client = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        for port in [1, 2, 1, 3] {
            let arrived = Arrived {
                client: client(port),
                from_pod: false,
                length: 1,
            };
            relay.pass_on(arrived).await.unwrap();
        }
        let mut known: Vec<_> = relay.clients.iter().map(|one| one.address).collect();
        known.sort();
        assert_eq!(known, [client(1), client(3)]);
    }
}
