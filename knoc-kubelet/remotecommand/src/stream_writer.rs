//! The stream that a relay writes to a client, whatever protocol carries it.

use bytes::Bytes;

use crate::streams::Closed;
use crate::{spdy, websocket};

/// The sending half of a stream. If it is dropped without [`StreamWriter::finish`], the client's reading half stays
/// open.
#[derive(Debug)]
pub enum StreamWriter {
    /// A stream of a SPDY session.
    Spdy(spdy::Sender),
    /// A channel of a WebSocket.
    Channel(websocket::Sender),
}

impl StreamWriter {
    /// Queues bytes, and waits while the client does not read. Fails once the connection has ended. Not cancel safe:
    /// part of the bytes may be queued.
    pub async fn send(&self, data: Bytes) -> Result<(), Closed> {
        match self {
            Self::Spdy(sender) => sender.send(data).await,
            Self::Channel(sender) => sender.send(data).await,
        }
    }

    /// Sends the last bytes and closes our half. (A channel of a WebSocket cannot be closed apart from its connection.)
    pub async fn finish(self, data: Bytes) -> Result<(), Closed> {
        match self {
            Self::Spdy(sender) => sender.finish(data).await,
            Self::Channel(sender) => sender.send(data).await,
        }
    }

    /// Aborts the stream in both directions. (On a channel of a WebSocket this sends nothing.)
    pub async fn reset(self) {
        match self {
            Self::Spdy(sender) => sender.reset().await,
            Self::Channel(_) => {}
        }
    }
}
