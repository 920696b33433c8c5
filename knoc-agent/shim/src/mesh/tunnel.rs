//! The bytes of a tunnel: the greeting, and packets after their lengths. See `mesh.proto`.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use bytes::{BufMut as _, Bytes, BytesMut};
use knoc_link::{
    Connection, Origin,
    carrier::{Io, Unverified},
    pinned::{self, KeyPair},
};
use knoc_proto::error::chain;
use rustix::net::sockopt;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    sync::mpsc,
};

/// The first bytes of every tunnel.
const GREETING: [u8; 8] = *b"KNOCMSH1";

/// How long the connection to another node may take, without the TLS handshake, which has a limit of its own.
const CONNECTING: Duration = Duration::from_secs(3);
/// After this time without an answer of the other node, the tunnel is lost. As with all links.
const UNANSWERED: u32 = 40_000;
/// How long a tunnel without packets stays open.
pub(super) const IDLE: Duration = Duration::from_mins(5);
/// How much is written at once. More packets than one are collected if they wait already.
const BATCH: usize = 64 << 10;
/// What is read at once: a TLS record.
const RECORD: usize = 16 << 10;
/// A buffer that is larger is not kept for packets that are smaller.
const KEPT: usize = 4 << 10;

/// Dials the shim at `endpoint`, which must have the key `spki`, and greets it as the pod `own`.
pub(super) async fn dial(
    endpoint: SocketAddr,
    pair: &KeyPair,
    spki: &str,
    own: Ipv4Addr,
) -> Result<Connection, String> {
    let connecting = tokio::time::timeout(CONNECTING, TcpStream::connect(endpoint)).await;
    let stream = connecting
        .map_err(|_| {
            format!(
                "no connection to {endpoint} within {} s",
                CONNECTING.as_secs()
            )
        })?
        .and_then(|stream| prepare(&stream).map(|()| stream))
        .map_err(|error| format!("connect to {endpoint}: {error}"))?;
    let unverified = Unverified {
        io: stream,
        origin: Origin::Address(endpoint),
    };
    greet(unverified, &endpoint.to_string(), (pair, spki), own).await
}

/// Begins a tunnel over a stream of bytes to the shim with the key `spki`; `peer` names it in errors.
pub(super) async fn greet(
    unverified: Unverified<impl Io>,
    peer: &str,
    (pair, spki): (&KeyPair, &str),
    own: Ipv4Addr,
) -> Result<Connection, String> {
    let made = pinned::over(unverified, peer, pair, spki).await;
    let mut connection = made.map_err(|error| chain(&error))?;
    let greeting = [&GREETING[..], &own.octets()].concat();
    let greeted = async {
        connection.write_all(&greeting).await?;
        connection.flush().await
    };
    let greeted = greeted.await;
    greeted.map_err(|error| format!("greet {peer}: {error}"))?;
    Ok(connection)
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_tcp_user_timeout(stream, UNANSWERED)?;
    Ok(())
}

/// Reads the greeting of whoever has dialled: the address that its pod claims.
pub(super) async fn greeted(connection: &mut Connection) -> io::Result<Ipv4Addr> {
    let mut greeting = [0; 12];
    connection.read_exact(&mut greeting).await?;
    let (first, octets) = greeting.split_at(GREETING.len());
    let octets: [u8; 4] = octets.try_into().map_err(io::Error::other)?;
    if first == GREETING {
        Ok(octets.into())
    } else {
        Err(io::ErrorKind::InvalidData.into())
    }
}

/// Why a tunnel has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// No packet for a while.
    Idle,
    /// The other side, or the network between.
    Broken,
    /// Nobody has packets any more.
    Closed,
}

/// Writes the packets of the queue, until the tunnel ends. The other side never sends anything.
pub(super) async fn send(connection: Connection, queue: &mut mpsc::Receiver<Bytes>) -> Ended {
    let (mut reader, mut writer) = tokio::io::split(connection);
    let mut nothing = [0];
    let end = reader.read(&mut nothing);
    tokio::pin!(end);
    let mut batch = BytesMut::new();
    loop {
        let first = tokio::select! {
            biased;
            _ = &mut end => return Ended::Broken,
            first = tokio::time::timeout(IDLE, queue.recv()) => first,
        };
        let first = match first {
            Ok(Some(first)) => first,
            Ok(None) => return Ended::Closed,
            Err(_) => return Ended::Idle,
        };
        put(&mut batch, &first);
        while batch.len() < BATCH
            && let Ok(packet) = queue.try_recv()
        {
            put(&mut batch, &packet);
        }
        let writing = async {
            writer.write_all_buf(&mut batch).await?;
            writer.flush().await
        };
        let written = tokio::select! {
            biased;
            _ = &mut end => return Ended::Broken,
            written = writing => written,
        };
        if written.is_err() {
            return Ended::Broken;
        }
        if batch.capacity() > KEPT && queue.is_empty() {
            batch = BytesMut::new();
        }
    }
}

/// PURE: a packet with its length. One that is too long is left out; the interface makes none.
fn put(batch: &mut BytesMut, packet: &[u8]) {
    if let Ok(length) = u16::try_from(packet.len()) {
        batch.put_u16(length);
        batch.put_slice(packet);
    }
}

/// Reads the packets of a tunnel.
#[derive(Debug)]
pub(super) struct Packets {
    reader: BufReader<Connection>,
    packet: Vec<u8>,
}

impl Packets {
    pub(super) fn of(connection: Connection) -> Self {
        Self {
            reader: BufReader::with_capacity(RECORD, connection),
            packet: Vec::new(),
        }
    }

    /// The next packet. Not cancel safe.
    pub(super) async fn next(&mut self) -> io::Result<&[u8]> {
        if self.packet.capacity() > KEPT && self.reader.buffer().is_empty() {
            // A silent tunnel holds no large buffer.
            self.packet = Vec::new();
        }
        let mut head = [0; 2];
        self.reader.read_exact(&mut head).await?;
        let length = usize::from(u16::from_be_bytes(head));
        self.packet.resize(length, 0);
        self.reader.read_exact(&mut self.packet).await?;
        Ok(&self.packet)
    }
}

#[cfg(test)]
mod tests {
    use knoc_link::Peer;

    use super::*;

    const SOON: Duration = Duration::from_secs(30);
    const OWN: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 3);

    fn peer() -> Peer {
        Peer::Pinned {
            spki: "key".into(),
            origin: Origin::ThisHost,
        }
    }

    /// Both ends of a tunnel behind its handshake.
    fn pair() -> (Connection, Connection) {
        let (one, other) = tokio::io::duplex(BATCH);
        (Connection::new(one, peer()), Connection::new(other, peer()))
    }

    #[tokio::test]
    async fn packets_arrive_as_they_were_sent_and_in_order() {
        let (near, far) = pair();
        let (packets, mut queue) = mpsc::channel(8);
        let sent: Vec<Bytes> = [1, 60_000, 20, 1500]
            .into_iter()
            .map(|length| Bytes::from(vec![7; length]))
            .collect();
        for packet in &sent {
            packets.send(packet.clone()).await.unwrap();
        }
        drop(packets);
        let reading = async {
            let mut received = Packets::of(far);
            for packet in &sent {
                let next = tokio::time::timeout(SOON, received.next()).await;
                assert_eq!(next.unwrap().unwrap(), packet);
            }
            // The sender has gone.
            received.next().await.unwrap_err();
        };
        let (ended, ()) = tokio::join!(send(near, &mut queue), reading);
        assert_eq!(ended, Ended::Closed);
    }

    #[tokio::test(start_paused = true)]
    async fn a_tunnel_ends_if_the_other_side_does_or_if_nothing_is_sent() {
        let (near, far) = pair();
        let (_packets, mut queue) = mpsc::channel(1);
        assert_eq!(send(near, &mut queue).await, Ended::Idle);
        drop(far);
        let (near, far) = pair();
        drop(far);
        assert_eq!(send(near, &mut queue).await, Ended::Broken);
        // It must not say anything either.
        let (near, mut far) = pair();
        far.write_all(b"x").await.unwrap();
        assert_eq!(send(near, &mut queue).await, Ended::Broken);
    }

    #[tokio::test]
    async fn a_shim_greets_with_the_address_of_its_pod_over_tls_with_both_keys() {
        use futures::StreamExt as _;

        let (own, other) = (
            KeyPair::generate("a").unwrap(),
            KeyPair::generate("b").unwrap(),
        );
        let any_port = "127.0.0.1:0".parse().unwrap();
        let mut incoming = pinned::listen(any_port, other.clone()).await.unwrap();
        let here = incoming.local_addr().unwrap();
        let dialling = dial(here, &own, other.spki(), OWN);
        let (dialled, accepted) = tokio::join!(dialling, incoming.next());
        let _dialled = dialled.unwrap();
        let mut accepted = accepted.unwrap().unwrap();
        let Peer::Pinned { spki, .. } = accepted.peer().clone() else {
            panic!("{:?}", accepted.peer());
        };
        assert_eq!(&*spki, own.spki());
        let claimed = tokio::time::timeout(SOON, greeted(&mut accepted)).await;
        assert_eq!(claimed.unwrap().unwrap(), OWN);
        // Another key at the same port is not spoken to.
        let dialling = dial(here, &own, own.spki(), OWN);
        let refused = tokio::select! {
            refused = dialling => refused,
            () = async { while incoming.next().await.is_some() {} } => panic!("no listener"),
        };
        let refused = refused.unwrap_err();
        assert!(refused.contains("not the pinned key"), "{refused}");
    }

    #[tokio::test]
    async fn other_protocols_are_not_taken_for_tunnels() {
        let (mut near, mut far) = pair();
        near.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        let error = greeted(&mut far).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
