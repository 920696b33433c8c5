//! Messages between the shim and the helpers of ranks, each with its length in front.

use std::io;

use bytes::{BufMut as _, Bytes, BytesMut};
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// The longest message to a helper: it contains the values of a pod.
pub(crate) const TO_RANK: usize = knoc_link::MAX_MESSAGE;
/// The longest message of a helper: it contains a termination message.
pub(crate) const FROM_RANK: usize = 64 << 10;
/// The longest message of a command, to or from its helper.
pub(crate) const OF_COMMAND: usize = knoc_link::MAX_MESSAGE;

/// Reads one message; `None` if the peer has closed the connection. A message of more than `longest` bytes is an error.
pub(crate) async fn read<M: Message + Default>(
    stream: &mut (impl AsyncRead + Unpin),
    longest: usize,
) -> io::Result<Option<M>> {
    let mut head = [0; 4];
    match stream.read_exact(&mut head).await {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let length = usize::try_from(u32::from_be_bytes(head)).unwrap_or(usize::MAX);
    if length > longest {
        let what = format!("a message of {length} bytes is too long");
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    let message = M::decode(Bytes::from(body));
    message
        .map(Some)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Encodes one message, with its length in front.
pub(crate) fn frame(message: &impl Message) -> io::Result<Bytes> {
    let length = u32::try_from(message.encoded_len()).map_err(io::Error::other)?;
    let mut frame = BytesMut::with_capacity(message.encoded_len() + 4);
    frame.put_u32(length);
    message.encode(&mut frame).map_err(io::Error::other)?;
    Ok(frame.freeze())
}

#[cfg(test)]
mod tests {
    use knoc_proto::pb;

    use super::*;

    fn hello(rank: u32) -> pb::FromRank {
        let hello = pb::RankHello {
            attempt: 1,
            rank,
            host: "c1".to_owned(),
        };
        pb::FromRank {
            message: Some(pb::from_rank::Message::Hello(hello)),
        }
    }

    #[tokio::test]
    async fn messages_come_back_and_then_the_end() {
        let bytes = [frame(&hello(1)).unwrap(), frame(&hello(2)).unwrap()].concat();
        let mut stream = bytes.as_slice();
        for rank in [1, 2] {
            let message: Option<pb::FromRank> = read(&mut stream, FROM_RANK).await.unwrap();
            assert_eq!(message, Some(hello(rank)));
        }
        let end: Option<pb::FromRank> = read(&mut stream, FROM_RANK).await.unwrap();
        assert_eq!(end, None);
    }

    #[tokio::test]
    async fn a_message_that_is_long_cut_or_nonsense_is_an_error() {
        let whole = frame(&hello(1)).unwrap();
        let cut = whole.slice(..whole.len() - 1);
        let long = u32::MAX.to_be_bytes();
        let nonsense = [0, 0, 0, 2, 0xff, 0xff];
        for bytes in [&cut[..], &long[..], &nonsense[..]] {
            let mut stream = bytes;
            let message: io::Result<Option<pb::FromRank>> = read(&mut stream, FROM_RANK).await;
            assert!(message.is_err(), "{bytes:?}");
        }
    }
}
