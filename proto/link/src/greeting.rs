//! What the two sides of a link exchange between TLS and HTTP/2, if the far side dialled: the messages of `link.proto`,
//! each preceded by its length, and then single bytes.
use std::io;

use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// The longest message: a hello with the numbers of some hundred connections.
const MAX: usize = 4096;
/// The byte by which the near side asks whether the far side is still there. The far side echoes it.
pub(super) const PING: u8 = 0;
/// How the near side's HTTP/2 begins (RFC 9113, section 3.4).
pub(super) const HTTP2: u8 = b'P';

/// Sends one message.
pub(super) async fn send(
    io: &mut (impl AsyncWrite + Unpin),
    message: &impl Message,
) -> io::Result<()> {
    let body = message.encode_to_vec();
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    if body.len() > MAX {
        return Err(io::Error::other("the message is too long"));
    }
    io.write_all(&[&length.to_be_bytes()[..], &body].concat())
        .await?;
    io.flush().await
}

/// Receives one message.
pub(super) async fn receive<M: Message + Default>(
    io: &mut (impl AsyncRead + Unpin),
) -> io::Result<M> {
    let wrong = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
    let length = io.read_u32().await?;
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length > MAX {
        return Err(wrong(format!(
            "a message of {length} bytes; at most {MAX} are allowed"
        )));
    }
    let mut body = vec![0; length];
    io.read_exact(&mut body).await?;
    M::decode(&*body).map_err(|error| wrong(error.to_string()))
}

/// Sends one byte.
pub(super) async fn send_byte(io: &mut (impl AsyncWrite + Unpin), byte: u8) -> io::Result<()> {
    io.write_all(&[byte]).await?;
    io.flush().await
}

/// An answer that does not come in time.
pub(super) fn late() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "no answer in time")
}

/// A byte that neither side sends at this point.
pub(super) fn unexpected(byte: u8) -> io::Error {
    let text = format!("the byte {byte:#04x} was not expected");
    io::Error::new(io::ErrorKind::InvalidData, text)
}

#[cfg(test)]
mod tests {
    use knoc_proto::pb;

    use super::*;

    #[tokio::test]
    async fn a_message_arrives_and_a_length_without_bound_does_not() {
        let hello = pb::DialOutHello {
            instance: "i".into(),
            held: (0..200).collect(),
            ..pb::DialOutHello::default()
        };
        let (mut near, mut far) = tokio::io::duplex(MAX);
        send(&mut far, &hello).await.unwrap();
        let came: pb::DialOutHello = receive(&mut near).await.unwrap();
        assert_eq!(came, hello);
        far.write_all(&u32::MAX.to_be_bytes()).await.unwrap();
        let error = receive::<pb::DialOutHello>(&mut near).await.unwrap_err();
        assert!(error.to_string().contains("at most 4096"), "{error}");
        far.write_all(&[0, 0, 0, 2, 0xff, 0xff]).await.unwrap();
        receive::<pb::DialOutHello>(&mut near).await.unwrap_err();
        let long = pb::DialOutHello {
            hostname: "h".repeat(MAX),
            ..hello
        };
        send(&mut far, &long).await.unwrap_err();
    }
}
