//! PURE: reads and writes the WebSocket frames (RFC 6455) of a server. It knows no channels, handshakes or sockets.
//!
//! Messages are unmasked and passed on in pieces as they arrive, so that no message is buffered, however large: some
//! clients send a whole file as one. Control frames are buffered whole; they have at most [`MAX_CONTROL`] bytes. It
//! never panics (property tests below).

use bytes::{Buf as _, BufMut, Bytes, BytesMut};
use thiserror::Error;

/// The longest payload of a control frame in bytes (RFC 6455, section 5.5).
pub(crate) const MAX_CONTROL: usize = 125;
/// The longest payload of a message that is written, in bytes: a peer must buffer it whole.
pub(super) const MAX_MESSAGE: usize = 64 << 10;

const FIN: u8 = 0x80;
const RESERVED: u8 = 0x70;
const MASKED: u8 = 0x80;

/// The rule of the protocol that the peer violates, which ends the connection.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum FrameError {
    #[error("a frame with reserved bits")]
    Reserved,
    #[error("a frame that is not masked")]
    Unmasked,
    #[error("a frame with opcode {opcode}")]
    Opcode { opcode: u8 },
    #[error("a control frame that is fragmented or longer than {MAX_CONTROL} bytes")]
    Control,
    #[error("a message within another one, or a continuation without a beginning")]
    Order,
    #[error("a frame of over 2^63 bytes")]
    TooLong,
}

/// What the peer has sent.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A piece of a message. Text and binary messages are not distinguished.
    Data {
        data: Bytes,
        /// Whether the message begins with it.
        first: bool,
        /// Whether the message ends with it.
        last: bool,
    },
    Ping(Bytes),
    Pong,
    /// The peer closes the connection, with its code if it sends one.
    Close(Option<u16>),
}

/// A frame whose payload has not arrived completely.
#[derive(Debug)]
struct Open {
    fin: bool,
    first: bool,
    left: u64,
    mask: [u8; 4],
}

/// Splits a stream of bytes into frames.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    open: Option<Open>,
    /// Whether a message has begun and not ended.
    within: bool,
}

/// The head of a frame.
struct Head {
    fin: bool,
    opcode: u8,
    length: u64,
    mask: [u8; 4],
    /// The length of the head itself in bytes.
    size: usize,
}

impl Decoder {
    /// Takes the next event from the front of `buffer`; `None` if more bytes are needed.
    pub(crate) fn decode(&mut self, buffer: &mut BytesMut) -> Result<Option<Event>, FrameError> {
        if let Some(open) = self.open.take() {
            return Ok(self.piece(open, buffer));
        }
        let Some(head) = head(buffer)? else {
            return Ok(None);
        };
        if head.opcode >= 8 {
            return control(&head, buffer);
        }
        let first = match head.opcode {
            0 => false,
            1 | 2 => true,
            opcode => return Err(FrameError::Opcode { opcode }),
        };
        if first == self.within {
            return Err(FrameError::Order);
        }
        self.within = !head.fin;
        buffer.advance(head.size);
        let open = Open {
            fin: head.fin,
            first,
            left: head.length,
            mask: head.mask,
        };
        Ok(self.piece(open, buffer))
    }

    fn piece(&mut self, mut open: Open, buffer: &mut BytesMut) -> Option<Event> {
        let take = usize::try_from(open.left).map_or(buffer.len(), |left| left.min(buffer.len()));
        if take == 0 && open.left > 0 {
            self.open = Some(open);
            return None;
        }
        let mut data = buffer.split_to(take);
        unmask(&mut data, open.mask);
        open.mask.rotate_left(take % 4);
        open.left -= u64::try_from(take).unwrap_or(open.left);
        let event = Event::Data {
            data: data.freeze(),
            first: open.first,
            last: open.fin && open.left == 0,
        };
        if open.left > 0 {
            open.first = false;
            self.open = Some(open);
        }
        Some(event)
    }
}

fn head(buffer: &BytesMut) -> Result<Option<Head>, FrameError> {
    let Some(&[first, second]) = buffer.first_chunk::<2>() else {
        return Ok(None);
    };
    if first & RESERVED != 0 {
        return Err(FrameError::Reserved);
    }
    if second & MASKED == 0 {
        return Err(FrameError::Unmasked);
    }
    let short = second & !MASKED;
    let mut rest = buffer.get(2..).unwrap_or_default();
    let length = match short {
        126 => rest.try_get_u16().map(u64::from),
        127 => rest.try_get_u64(),
        length => Ok(u64::from(length)),
    };
    let (Ok(length), Some(&mask)) = (length, rest.first_chunk::<4>()) else {
        return Ok(None);
    };
    if length >> 63 != 0 {
        return Err(FrameError::TooLong);
    }
    Ok(Some(Head {
        fin: first & FIN != 0,
        opcode: first & 0x0f,
        length,
        mask,
        size: buffer.len() - rest.len() + 4,
    }))
}

fn control(head: &Head, buffer: &mut BytesMut) -> Result<Option<Event>, FrameError> {
    let length = usize::try_from(head.length).unwrap_or(usize::MAX);
    if !head.fin || length > MAX_CONTROL {
        return Err(FrameError::Control);
    }
    if buffer.len() < head.size + length {
        return Ok(None);
    }
    buffer.advance(head.size);
    let mut payload = buffer.split_to(length);
    unmask(&mut payload, head.mask);
    match head.opcode {
        8 => Ok(Some(Event::Close(payload.try_get_u16().ok()))),
        9 => Ok(Some(Event::Ping(Bytes::copy_from_slice(&payload)))),
        10 => Ok(Some(Event::Pong)),
        opcode => Err(FrameError::Opcode { opcode }),
    }
}

/// Works in units of eight bytes, because every byte that a client sends passes here.
fn unmask(data: &mut [u8], mask: [u8; 4]) {
    let [a, b, c, d] = mask;
    let wide = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
    let mut chunks = data.chunks_exact_mut(8);
    for chunk in &mut chunks {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(chunk);
        chunk.copy_from_slice(&(u64::from_ne_bytes(bytes) ^ wide).to_ne_bytes());
    }
    let rest = chunks.into_remainder();
    for (byte, key) in rest.iter_mut().zip(mask.into_iter().cycle()) {
        *byte ^= key;
    }
}

/// The kinds of frames that are written.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Text = 1,
    Binary = 2,
    Close = 8,
    Pong = 10,
}

/// Writes the head of a whole message or control frame of `length` bytes, which must follow.
pub(super) fn put_head(out: &mut impl BufMut, kind: Kind, length: usize) {
    out.put_u8(FIN | kind as u8);
    if let Ok(short) = u8::try_from(length)
        && usize::from(short) <= MAX_CONTROL
    {
        out.put_u8(short);
    } else if let Ok(medium) = u16::try_from(length) {
        out.put_u8(126);
        out.put_u16(medium);
    } else {
        out.put_u8(127);
        out.put_u64(u64::try_from(length).unwrap_or(u64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A frame as a client writes it.
    fn masked(first: u8, payload: &[u8], mask: [u8; 4]) -> Vec<u8> {
        let mut out = vec![first];
        match payload.len() {
            length @ 0..=125 => out.push(0x80 | u8::try_from(length).unwrap()),
            length @ 126..=0xffff => {
                out.push(0x80 | 0x7e);
                out.extend(u16::try_from(length).unwrap().to_be_bytes());
            }
            length => {
                out.push(0x80 | 0x7f);
                out.extend(u64::try_from(length).unwrap().to_be_bytes());
            }
        }
        out.extend(mask);
        out.extend(
            payload
                .iter()
                .zip(mask.iter().cycle())
                .map(|(byte, key)| byte ^ key),
        );
        out
    }

    /// Decodes all events, and joins the pieces of messages.
    fn decode_all<'a>(
        pieces: impl IntoIterator<Item = &'a [u8]>,
    ) -> Result<Vec<Event>, FrameError> {
        let (mut decoder, mut buffer) = (Decoder::default(), BytesMut::new());
        let (mut events, mut message) = (Vec::new(), BytesMut::new());
        for piece in pieces {
            buffer.extend_from_slice(piece);
            while let Some(event) = decoder.decode(&mut buffer)? {
                let Event::Data { data, first, last } = event else {
                    events.push(event);
                    continue;
                };
                assert!(!first || message.is_empty());
                message.extend_from_slice(&data);
                if last {
                    let data = message.split().freeze();
                    events.push(Event::Data {
                        data,
                        first: true,
                        last,
                    });
                }
            }
        }
        Ok(events)
    }

    fn whole(data: &'static str) -> Event {
        let data = Bytes::from(data);
        Event::Data {
            data,
            first: true,
            last: true,
        }
    }

    #[test]
    fn reads_messages_in_frames_with_control_frames_between() {
        let key = [1, 2, 3, 250];
        let wire = [
            masked(0x82, b"one", key),
            masked(0x01, b"in ", key),
            masked(0x89, b"ping", key),
            masked(0x00, b"", key),
            masked(0x80, b"pieces", key),
            masked(0x82, b"", key),
            masked(0x8a, b"", key),
            masked(0x88, &[3, 232, b'!'], key),
        ]
        .concat();
        let expected = [
            whole("one"),
            Event::Ping(Bytes::from("ping")),
            whole("in pieces"),
            whole(""),
            Event::Pong,
            Event::Close(Some(1000)),
        ];
        for step in 1..wire.len() {
            assert_eq!(decode_all(wire.chunks(step)).unwrap(), expected, "{step}");
        }
    }

    #[test]
    fn a_huge_message_is_never_buffered() {
        let mut buffer = BytesMut::from(&[0x82, 0xff, 0, 0, 0, 1, 0, 0, 0, 0, 9, 9, 9, 9][..]);
        let mut decoder = Decoder::default();
        assert_eq!(decoder.decode(&mut buffer), Ok(None));
        for _ in 0..100 {
            buffer.extend_from_slice(&[9; 1000]);
            let Ok(Some(Event::Data { data, .. })) = decoder.decode(&mut buffer) else {
                panic!("no piece");
            };
            assert!(data.len() == 1000 && data.iter().all(|byte| *byte == 0));
            assert!(buffer.is_empty());
        }
    }

    #[test]
    fn rejects_what_the_protocol_forbids() {
        let key = [0; 4];
        let long = [&[0x82, 0xff][..], &[0xff; 8], &[0; 4]].concat();
        let cases = [
            (masked(0xc2, b"x", key), FrameError::Reserved),
            (vec![0x82, 1, b'x'], FrameError::Unmasked),
            (masked(0x83, b"x", key), FrameError::Opcode { opcode: 3 }),
            (masked(0x8b, b"x", key), FrameError::Opcode { opcode: 11 }),
            (masked(0x09, b"x", key), FrameError::Control),
            (masked(0x89, &[0; 126], key), FrameError::Control),
            (masked(0x80, b"x", key), FrameError::Order),
            (
                [masked(0x02, b"x", key), masked(0x82, b"y", key)].concat(),
                FrameError::Order,
            ),
            (long, FrameError::TooLong),
        ];
        for (wire, error) in cases {
            assert_eq!(decode_all([&wire[..]]), Err(error), "{wire:x?}");
        }
    }

    #[test]
    fn writes_heads_of_all_lengths() {
        let cases: [(usize, &[u8]); 5] = [
            (0, &[0x82, 0]),
            (125, &[0x82, 125]),
            (126, &[0x82, 126, 0, 126]),
            (0xffff, &[0x82, 126, 0xff, 0xff]),
            (0x1_0000, &[0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0]),
        ];
        for (length, wire) in cases {
            let mut out = BytesMut::new();
            put_head(&mut out, Kind::Binary, length);
            assert_eq!(out, wire);
        }
    }

    proptest! {
        #[test]
        fn never_panics(wire in prop::collection::vec(any::<u8>(), 0..300), step in 1usize..300) {
            drop(decode_all(wire.chunks(step)));
        }

        #[test]
        fn frames_are_read_in_pieces_of_any_size(
            payloads in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..400), any::<[u8; 4]>()), 1..6),
            step in 1usize..50,
        ) {
            let mut wire = Vec::new();
            let mut expected = Vec::new();
            for (payload, mask) in payloads {
                wire.extend(masked(0x82, &payload, mask));
                expected.push(Event::Data { data: payload.into(), first: true, last: true });
            }
            prop_assert_eq!(decode_all(wire.chunks(step)).unwrap(), expected);
        }
    }
}
