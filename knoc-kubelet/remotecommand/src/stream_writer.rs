//! What a relay writes to a client, whatever carries the stream.

use bytes::Bytes;

use crate::streams::Closed;
use crate::{spdy, websocket};

/// What we send on a stream. Dropped without an end it leaves the client's reading open.
#[derive(Debug)]
pub enum StreamWriter {
    /// A stream of a SPDY session.
    Spdy(spdy::Sender),
    /// A channel of a WebSocket.
    Channel(websocket::Sender),
}

impl StreamWriter {
    /// Queues bytes; waits while the client does not read.
    pub async fn send(&self, data: Bytes) -> Result<(), Closed> {
        match self {
            Self::Spdy(sender) => sender.send(data).await,
            Self::Channel(sender) => sender.send(data).await,
        }
    }

    /// The last bytes, then our half is closed (a channel of a WebSocket knows no end but the connection's).
    pub async fn finish(self, data: Bytes) -> Result<(), Closed> {
        match self {
            Self::Spdy(sender) => sender.finish(data).await,
            Self::Channel(sender) => sender.send(data).await,
        }
    }

    /// Gives the stream up, in both directions (a channel of a WebSocket: nothing is said).
    pub async fn reset(self) {
        match self {
            Self::Spdy(sender) => sender.reset().await,
            Self::Channel(_) => {}
        }
    }
}
