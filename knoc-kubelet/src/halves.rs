//! The two halves of a TCP connection whose bytes go to a call of the agent, and come from it. Used by what pods open to the
//! cluster (`egress`) and by what the cluster opens to pods (`relay`).
//!
//! Back-pressure: a side that does not read stops the other one, through the windows of HTTP/2 and the socket's buffer. Each
//! direction ends on its own. A connection that breaks is reset, so that a part of the data never looks complete.

use std::{io, time::Duration};

use bytes::{Bytes, BytesMut};
use knoc_link::bulk::Messages;
use knoc_proto::CHUNK;
use tokio::{
    io::AsyncWriteExt as _,
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc,
};

/// What a message carries.
#[derive(Debug)]
pub(crate) enum Part {
    /// Bytes.
    Data(Bytes),
    /// The end of its direction.
    Closed,
}

/// Why copying ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Broken {
    /// The call of the agent failed.
    #[error("the pod's side: {0}")]
    Pod(String),
    /// The socket failed.
    #[error("the cluster's side: {0}")]
    Socket(io::Error),
}

/// What follows if the socket takes no more bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Deaf {
    /// The other direction goes on, and what the pod sends is read and dropped.
    Drain,
    /// The connection ends: a program that sends for ever would not notice otherwise.
    Break,
}

/// A writing half that resets the connection unless it was shut down.
#[derive(Debug)]
pub(crate) struct Resets(Option<OwnedWriteHalf>);

impl Drop for Resets {
    fn drop(&mut self) {
        if let Some(writer) = self.0.take() {
            let stream: &TcpStream = writer.as_ref();
            // Without this option the peer would see the end of the stream instead of a reset.
            rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO)).ok();
            writer.forget();
        }
    }
}

/// Splits a connection, which is reset unless its writing half is shut down.
pub(crate) fn split(stream: TcpStream) -> (OwnedReadHalf, Resets) {
    let (reader, writer) = stream.into_split();
    (reader, Resets(Some(writer)))
}

/// Resets a connection.
pub(crate) fn reset(stream: TcpStream) {
    drop(split(stream));
}

/// Writes what the call brings, until it ends.
pub(crate) async fn to_socket<M: prost::Message + Default>(
    mut output: Messages<M>,
    mut guard: Resets,
    deaf: Deaf,
    part: impl Fn(M) -> Option<Part>,
) -> Result<(), Broken> {
    let mut reads = true;
    loop {
        let next = output.message().await;
        let next = next.map_err(|status| Broken::Pod(status.message().to_owned()))?;
        let Some(next) = next else { break };
        match (part(next), &mut guard.0) {
            (Some(Part::Data(data)), Some(writer)) if reads => {
                match (writer.write_all(&data).await, deaf) {
                    (Ok(()), _) => {}
                    // The peer reads no more, but what it sends still matters.
                    (Err(_), Deaf::Drain) => reads = false,
                    (Err(error), Deaf::Break) => return Err(Broken::Socket(error)),
                }
            }
            (Some(Part::Closed), writer) => {
                if let Some(mut writer) = writer.take() {
                    // Fails if the peer has closed the connection, which the other direction notices.
                    writer.shutdown().await.ok();
                }
            }
            (Some(Part::Data(_)) | None, _) => {}
        }
    }
    match &guard.0 {
        // Both directions have ended.
        None => Ok(()),
        Some(_) => Err(Broken::Pod("it ended without a half-close".to_owned())),
    }
}

/// Sends what the socket brings to the call, and then its end. `input` stays open, so that a call whose connection broke can be
/// cancelled before its input ends, which would look like the end of the data.
pub(crate) async fn from_socket<M>(
    reader: OwnedReadHalf,
    input: &mpsc::Sender<M>,
    message: impl Fn(Part) -> M,
) -> Result<(), Broken> {
    loop {
        // A connection on which nothing is sent holds no buffer.
        reader.readable().await.map_err(Broken::Socket)?;
        let mut buffer = BytesMut::with_capacity(CHUNK);
        let count = match reader.try_read_buf(&mut buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(Broken::Socket(error)),
        };
        let next = if count == 0 {
            Part::Closed
        } else {
            Part::Data(cut(buffer))
        };
        // If nobody takes it, the call has ended, which the other direction notices.
        if input.send(message(next)).await.is_err() || count == 0 {
            return Ok(());
        }
    }
}

/// What was read. A few bytes are copied, so that no large buffer waits for a slow reader because of them.
fn cut(buffer: BytesMut) -> Bytes {
    if buffer.len() < CHUNK / 8 {
        Bytes::copy_from_slice(&buffer)
    } else {
        buffer.freeze()
    }
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncReadExt as _, net::TcpListener};

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        (client.unwrap(), accepted.unwrap().0)
    }

    #[tokio::test]
    async fn a_connection_that_is_dropped_before_its_end_is_reset() {
        let (mut client, server) = pair().await;
        reset(server);
        let error = client.read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn bytes_and_the_end_of_a_socket_become_messages() {
        let (mut client, server) = pair().await;
        client.write_all(b"hello").await.unwrap();
        client.shutdown().await.unwrap();
        let (reader, _guard) = split(server);
        let (input, mut messages) = mpsc::channel(8);
        from_socket(reader, &input, |part| part).await.unwrap();
        drop(input);
        let (mut bytes, mut ends) = (Vec::new(), 0);
        while let Some(part) = messages.recv().await {
            match part {
                Part::Data(data) => bytes.extend_from_slice(&data),
                Part::Closed => ends += 1,
            }
        }
        assert_eq!((bytes.as_slice(), ends), (&b"hello"[..], 1));
    }
}
