//! Bare TLS relays: the floor of streams. Each is a process of its own that takes a connection over
//! TLS 1.3 and passes its bytes on to the next, or makes them. The same TLS library and settings as
//! the links have, and nothing else.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

use anyhow::Context as _;
use futures::StreamExt as _;
use knoc_proto::link::pinned::{self, KeyPair};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional_with_sizes};

/// Bytes moved at once.
const CHUNK: usize = 64 << 10;

/// What a relay does with a connection.
#[derive(Debug, Clone, Copy)]
pub enum Role {
    /// Writes so many bytes and closes.
    Source(u64),
    /// Dials that port of loopback and copies both ways.
    Relay(u16),
}

impl Role {
    /// `source=BYTES` or `relay=PORT`.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        match text.split_once('=') {
            Some(("source", bytes)) => Ok(Self::Source(bytes.parse()?)),
            Some(("relay", port)) => Ok(Self::Relay(port.parse()?)),
            _ => anyhow::bail!("{text:?} is neither source=BYTES nor relay=PORT"),
        }
    }
}

/// Serves connections one after the other, for ever. `keys` has `pair.crt` and `pair.key`.
pub async fn serve(port: u16, role: Role, keys: &Path) -> anyhow::Result<()> {
    let pair = KeyPair::from_files(&keys.join("pair.crt"), &keys.join("pair.key"))?;
    let mut incoming = pinned::listen(loopback(port), pair.clone()).await?;
    while let Some(connection) = incoming.next().await {
        // A probe whether we listen shakes no hands.
        let Ok((_, near)) = connection else { continue };
        match role {
            Role::Source(bytes) => make(near, bytes).await?,
            Role::Relay(next) => pass(near, dial(next, &pair).await?).await?,
        }
    }
    Ok(())
}

async fn make(mut near: pinned::TlsIo, bytes: u64) -> anyhow::Result<()> {
    let chunk = vec![b'x'; CHUNK];
    let mut left = bytes;
    while left > 0 {
        let take = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        near.write_all(&chunk[..take]).await?;
        left -= u64::try_from(take)?;
    }
    near.shutdown().await?;
    // What is sent is lost where a socket is closed with bytes unread.
    let mut rest = Vec::new();
    near.read_to_end(&mut rest).await?;
    Ok(())
}

async fn pass(mut near: pinned::TlsIo, mut far: pinned::TlsIo) -> anyhow::Result<()> {
    copy_bidirectional_with_sizes(&mut near, &mut far, CHUNK, CHUNK).await?;
    Ok(())
}

/// Reads all that a relay sends; answers how many bytes.
pub(super) async fn read(port: u16, pair: &KeyPair) -> anyhow::Result<u64> {
    let mut relay = dial(port, pair).await?;
    let mut buffer = vec![0; CHUNK];
    let mut bytes = 0;
    loop {
        match relay.read(&mut buffer).await? {
            0 => break,
            read => bytes += u64::try_from(read)?,
        }
    }
    relay.shutdown().await.context("closing our half")?;
    Ok(bytes)
}

async fn dial(port: u16, pair: &KeyPair) -> anyhow::Result<pinned::TlsIo> {
    Ok(pinned::dial(&loopback(port).to_string(), pair, pair.spki()).await?)
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}
