//! Copies the bytes of a TCP connection to a call of the agent, and those of the call to the connection. Connections that pods
//! open to the cluster (`egress`) and connections that the cluster opens to pods (`relay`) use it.
//!
//! Back-pressure: if one side does not read, the other side is not read either (flow control of HTTP/2 and of TCP). Each
//! direction ends on its own. A connection that breaks is reset, so that no program takes a part of the data for all of it.

use std::io;

use bytes::{Bytes, BytesMut};
use knoc_link::{bulk::Messages, reset::ResetUnlessEnded};
use knoc_proto::CHUNK;
use tokio::{
    io::{AsyncWriteExt as _, Interest},
    net::{TcpStream, tcp::OwnedReadHalf},
    sync::mpsc,
};

/// What a message carries.
#[derive(Debug)]
pub(crate) enum Part {
    Data(Bytes),
    /// The regular end of the direction.
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

/// What happens once the peer of the socket takes no more bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnWriteError {
    /// The other direction goes on, and what the pod sends is read and dropped: the peer reads no more, but what it sends still matters.
    Drain,
    /// The connection ends: otherwise a program that sends without end would never notice.
    Break,
}

/// Splits a connection, which is reset unless its writing half ends regularly.
pub(crate) fn split(stream: TcpStream) -> (OwnedReadHalf, ResetUnlessEnded) {
    let (reader, writer) = stream.into_split();
    (reader, ResetUnlessEnded::new(writer))
}

/// Resets a connection.
pub(crate) fn reset(stream: TcpStream) {
    drop(split(stream));
}

/// Writes the data of the call to the socket until the call ends. `on_error` is asked with each piece that cannot be written.
pub(crate) async fn to_socket<M: prost::Message + Default>(
    mut output: Messages<M>,
    mut guard: ResetUnlessEnded,
    on_error: impl Fn() -> OnWriteError,
    part: impl Fn(M) -> Option<Part>,
) -> Result<(), Broken> {
    let mut failed = None;
    loop {
        let next = output.message().await;
        let next = next.map_err(|status| Broken::Pod(status.message().to_owned()))?;
        let Some(next) = next else { break };
        match (part(next), guard.writer()) {
            (Some(Part::Data(data)), Some(writer)) => {
                if failed.is_none() {
                    failed = writer.write_all(&data).await.err();
                }
                let Some(error) = failed.take() else { continue };
                match on_error() {
                    OnWriteError::Drain => failed = Some(error),
                    OnWriteError::Break => return Err(Broken::Socket(error)),
                }
            }
            (Some(Part::Closed), _) => {
                // Fails if the peer has closed the connection, which the other direction notices.
                guard.end().await.ok();
            }
            (Some(Part::Data(_)), None) | (None, _) => {}
        }
    }
    match guard.writer() {
        // Both directions have ended.
        None => Ok(()),
        Some(_) => Err(Broken::Pod("it ended without a half-close".to_owned())),
    }
}

/// Sends what arrives on the socket to the call, and then the end of it. `input` stays open, so that the caller can cancel the
/// call of a broken connection before its input ends, which would look like the end of the data.
pub(crate) async fn from_socket<M>(
    reader: &OwnedReadHalf,
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

/// Copies like [`from_socket`] until the connection breaks, which is noticed even while the pod takes no more data, and after the peer's
/// half-close. For peers whose last bytes do not matter once they have reset the connection.
pub(crate) async fn until_broken<M>(
    reader: &OwnedReadHalf,
    input: &mpsc::Sender<M>,
    message: impl Fn(Part) -> M,
) -> Broken {
    tokio::select! {
        biased;
        Err(error) = from_socket(reader, input, message) => error,
        error = broken(reader) => error,
    }
}

/// Waits until the connection breaks. While nobody reads from the socket, neither a reset nor a peer that no longer answers keepalive
/// would be noticed otherwise.
async fn broken(reader: &OwnedReadHalf) -> Broken {
    match reader.ready(Interest::ERROR).await {
        Ok(_) => Broken::Socket(io::ErrorKind::ConnectionReset.into()),
        Err(error) => Broken::Socket(error),
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
    use std::time::Duration;

    use tokio::{io::AsyncReadExt as _, net::TcpListener, time::timeout};

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
        from_socket(&reader, &input, |part| part).await.unwrap();
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

    #[tokio::test]
    async fn a_reset_after_the_half_close_is_noticed() {
        let (mut client, server) = pair().await;
        client.shutdown().await.unwrap();
        let (reader, _guard) = split(server);
        let (input, mut messages) = mpsc::channel(8);
        from_socket(&reader, &input, |part| part).await.unwrap();
        assert!(matches!(messages.recv().await, Some(Part::Closed)));
        // A half-close alone breaks nothing.
        let waited = timeout(Duration::from_millis(50), broken(&reader)).await;
        waited.expect_err("a connection that is half closed counts as broken");
        knoc_link::reset::at_the_end(&client);
        drop(client);
        let waited = timeout(Duration::from_secs(10), broken(&reader)).await;
        assert!(matches!(waited, Ok(Broken::Socket(_))), "{waited:?}");
    }

    #[tokio::test]
    async fn a_reset_is_noticed_while_nobody_takes_the_data() {
        let (mut client, server) = pair().await;
        let (reader, _guard) = split(server);
        // A second message finds no room.
        let (input, _messages) = mpsc::channel(1);
        let queue = &input;
        let resets = async move {
            let data = BytesMut::zeroed(3 * CHUNK);
            client.write_all(&data).await.unwrap();
            while queue.capacity() > 0 {
                tokio::task::yield_now().await;
            }
            knoc_link::reset::at_the_end(&client);
            drop(client);
        };
        let copies = until_broken(&reader, queue, |part| part);
        let both = async { tokio::join!(copies, resets).0 };
        let broken = timeout(Duration::from_secs(10), both).await;
        assert!(matches!(broken, Ok(Broken::Socket(_))), "{broken:?}");
    }
}
