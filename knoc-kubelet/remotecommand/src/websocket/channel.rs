//! PURE: Kubernetes' channels in WebSocket messages: the first byte is the number of the channel, the rest its data.
//!
//! In the base64 encodings a message is text: the channel as a digit, then base64. With v5, the message `[255, n]`
//! closes channel `n`. Messages are read in pieces as they arrive; at most three characters are buffered.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::{BufMut, Bytes};
use thiserror::Error;

use super::frame::{Kind, MAX_MESSAGE, put_head};

/// The channel on which the client closes other channels (v5).
const CLOSE: u8 = 255;
/// The number of base64 characters that encode [`QUANTUM_BYTES`] bytes.
const QUANTUM: usize = 4;
const QUANTUM_BYTES: usize = 3;

/// How channels are encoded in messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// A byte for the channel, then the data.
    Binary,
    /// A digit for the channel, then the data in base64.
    Base64,
    /// Like binary, but the client may close a channel.
    BinaryWithClose,
}

impl Encoding {
    /// The most data of one message that is written, in bytes: it fits [`MAX_MESSAGE`], for base64 in whole quanta.
    pub(super) fn most(self) -> usize {
        match self {
            Self::Binary | Self::BinaryWithClose => MAX_MESSAGE - 1,
            Self::Base64 => (MAX_MESSAGE - QUANTUM) / QUANTUM * QUANTUM_BYTES,
        }
    }
}

/// A message is not valid base64, which ends the connection.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("a message that is not base64")]
pub struct NotBase64;

/// The meaning of a message.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// Data for a channel.
    Data { channel: u8, data: Bytes },
    /// The client will send no more data on the channel.
    Close { channel: u8 },
}

/// How much of the current message has been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Within {
    /// Nothing of it has arrived.
    Start,
    Channel(u8),
    /// A message that closes a channel; the number of the channel if that has arrived.
    Closing(Option<u8>),
    /// A closing message that is too long and therefore ignored.
    Nonsense,
}

/// Reads messages in pieces.
#[derive(Debug)]
pub(crate) struct Messages {
    encoding: Encoding,
    within: Within,
    /// Characters of base64 that wait for the rest of their quantum.
    rest: Vec<u8>,
}

impl Messages {
    pub(crate) fn new(encoding: Encoding) -> Self {
        Self {
            encoding,
            within: Within::Start,
            rest: Vec::with_capacity(QUANTUM),
        }
    }

    /// Reads a piece and returns its meaning, if it has one; `last` says that the message ends with it.
    pub(crate) fn piece(
        &mut self,
        mut data: Bytes,
        last: bool,
    ) -> Result<Option<Meaning>, NotBase64> {
        if self.within == Within::Start && !data.is_empty() {
            let first = data.split_to(1).first().copied().unwrap_or_default();
            self.within = match self.encoding {
                // A byte that is not a digit wraps around to a channel that does not exist.
                Encoding::Base64 => Within::Channel(first.wrapping_sub(b'0')),
                Encoding::BinaryWithClose if first == CLOSE => Within::Closing(None),
                Encoding::Binary | Encoding::BinaryWithClose => Within::Channel(first),
            };
        }
        let meaning = match self.within {
            Within::Start | Within::Nonsense => None,
            Within::Channel(channel) => {
                let data = match self.encoding {
                    Encoding::Base64 => self.decoded(&data)?,
                    Encoding::Binary | Encoding::BinaryWithClose => data,
                };
                (!data.is_empty()).then_some(Meaning::Data { channel, data })
            }
            Within::Closing(closed) => {
                self.within = match (closed, &data[..]) {
                    (closed, []) => Within::Closing(closed),
                    (None, [channel]) => Within::Closing(Some(*channel)),
                    (_, _) => Within::Nonsense,
                };
                if let Within::Closing(Some(channel)) = self.within
                    && last
                {
                    Some(Meaning::Close { channel })
                } else {
                    None
                }
            }
        };
        if last {
            self.within = Within::Start;
            if !self.rest.is_empty() {
                return Err(NotBase64);
            }
        }
        Ok(meaning)
    }

    fn decoded(&mut self, text: &[u8]) -> Result<Bytes, NotBase64> {
        let mut out = Vec::with_capacity(text.len() / QUANTUM * QUANTUM_BYTES + QUANTUM_BYTES);
        let missing = (QUANTUM - self.rest.len()) % QUANTUM;
        let (head, text) = text.split_at(missing.min(text.len()));
        self.rest.extend_from_slice(head);
        let mut decode = |text: &[u8]| STANDARD.decode_vec(text, &mut out).map_err(|_| NotBase64);
        if self.rest.len() == QUANTUM {
            decode(&self.rest)?;
            self.rest.clear();
        }
        let (whole, rest) = text.split_at(text.len() - text.len() % QUANTUM);
        decode(whole)?;
        self.rest.extend_from_slice(rest);
        Ok(out.into())
    }
}

/// Writes a message of at most [`Encoding::most`] bytes for a channel.
pub(super) fn put(out: &mut impl BufMut, encoding: Encoding, channel: u8, data: Bytes) {
    match encoding {
        Encoding::Binary | Encoding::BinaryWithClose => {
            put_head(out, Kind::Binary, data.len() + 1);
            out.put_u8(channel);
            out.put(data);
        }
        Encoding::Base64 => {
            let text = STANDARD.encode(data);
            put_head(out, Kind::Text, text.len() + 1);
            out.put_u8(b'0'.wrapping_add(channel));
            out.put_slice(text.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;

    use super::*;
    use proptest::prelude::*;

    /// The meanings of messages that arrive in pieces of this size; the data of each message is joined.
    fn meanings(
        encoding: Encoding,
        messages: &[&[u8]],
        step: usize,
    ) -> Result<Vec<Meaning>, NotBase64> {
        let mut all: Vec<Meaning> = Vec::new();
        let mut taker = Messages::new(encoding);
        for message in messages {
            let mut whole: Option<(u8, BytesMut)> = None;
            let mut left = *message;
            loop {
                let (piece, rest) = left.split_at(step.min(left.len()));
                left = rest;
                match taker.piece(Bytes::copy_from_slice(piece), rest.is_empty())? {
                    Some(Meaning::Data { channel, data }) => {
                        let (_, whole) = whole.get_or_insert_with(|| (channel, BytesMut::new()));
                        whole.extend_from_slice(&data);
                    }
                    Some(closed) => all.push(closed),
                    None => {}
                }
                if rest.is_empty() {
                    break;
                }
            }
            all.extend(whole.map(|(channel, data)| Meaning::Data {
                channel,
                data: data.freeze(),
            }));
        }
        Ok(all)
    }

    fn data(channel: u8, data: &'static str) -> Meaning {
        let data = Bytes::from(data);
        Meaning::Data { channel, data }
    }

    #[test]
    fn the_first_byte_is_the_channel() {
        let messages: [&[u8]; 5] = [b"\x00hello", b"", b"\x04", b"\x04{}", b"\xff\x00"];
        for step in 1..7 {
            let expected = [data(0, "hello"), data(4, "{}"), data(255, "\0")];
            assert_eq!(
                meanings(Encoding::Binary, &messages, step).unwrap(),
                expected
            );
            let closed = [
                data(0, "hello"),
                data(4, "{}"),
                Meaning::Close { channel: 0 },
            ];
            assert_eq!(
                meanings(Encoding::BinaryWithClose, &messages, step).unwrap(),
                closed
            );
        }
    }

    #[test]
    fn only_two_bytes_close() {
        let messages: [&[u8]; 4] = [b"\xff", b"\xff\x00\x00", b"\xff\x00 ", b"\xff\x01"];
        for step in 1..4 {
            let expected = [Meaning::Close { channel: 1 }];
            assert_eq!(
                meanings(Encoding::BinaryWithClose, &messages, step).unwrap(),
                expected
            );
        }
    }

    #[test]
    fn base64_is_text_with_a_digit_in_front() {
        let messages: [&[u8]; 4] = [b"0aGVsbG8=", b"", b"4e30=", b"0"];
        for step in 1..10 {
            let expected = [data(0, "hello"), data(4, "{}")];
            assert_eq!(
                meanings(Encoding::Base64, &messages, step).unwrap(),
                expected
            );
            for broken in [&b"0aGVsbG8"[..], b"0a", b"0!!!!", b"0\xff\xff\xff\xff"] {
                assert_eq!(meanings(Encoding::Base64, &[broken], step), Err(NotBase64));
            }
        }
    }

    #[test]
    fn what_is_written_fits_a_message() {
        for encoding in [Encoding::Binary, Encoding::Base64] {
            let mut out = BytesMut::new();
            put(&mut out, encoding, 1, vec![7; encoding.most()].into());
            assert!(out.len() <= MAX_MESSAGE + 10, "{}", out.len());
        }
        let mut out = BytesMut::new();
        put(&mut out, Encoding::Base64, 3, Bytes::from("{}"));
        assert_eq!(&out[..], b"\x81\x053e30=");
        out.clear();
        put(&mut out, Encoding::Binary, 1, Bytes::new());
        assert_eq!(
            &out[..],
            b"\x82\x01\x01",
            "the empty message that signals readiness"
        );
    }

    proptest! {
        #[test]
        fn never_panics(messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..60), 0..6), step in 1usize..60) {
            for encoding in [Encoding::Binary, Encoding::Base64, Encoding::BinaryWithClose] {
                let messages: Vec<&[u8]> = messages.iter().map(Vec::as_slice).collect();
                drop(meanings(encoding, &messages, step));
            }
        }

        #[test]
        fn base64_round_trips(bytes in prop::collection::vec(any::<u8>(), 1..200), step in 1usize..60) {
            let message = format!("0{}", STANDARD.encode(&bytes));
            let expected = Meaning::Data { channel: 0, data: bytes.into() };
            prop_assert_eq!(meanings(Encoding::Base64, &[message.as_bytes()], step).unwrap(), [expected]);
        }
    }
}
