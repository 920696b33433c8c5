//! PURE: reads SPDY/3.1 frames from a stream of bytes and writes them. It knows no headers, streams or sockets.
//!
//! Data frames are passed on in pieces as they arrive, so that the up to 16 MiB of a frame are never buffered. Control
//! frames are buffered whole and bounded. It never panics (property tests below).

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use thiserror::Error;

/// The longest control frame that is accepted, in bytes: a compressed header block of Kubernetes has some hundred.
pub(crate) const MAX_CONTROL: usize = 64 << 10;
/// The longest data frame that is written, in bytes: the peer must buffer a frame whole.
pub(super) const MAX_DATA: usize = 64 << 10;

const VERSION: u16 = 3;
const FLAG_FIN: u8 = 1;
const HEAD: usize = 8;
/// Stream ids and similar numbers have 31 bits.
const ID: u32 = 0x7fff_ffff;

/// The rule of the protocol that the peer violates, which ends the connection.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum FrameError {
    #[error("a control frame of SPDY version {version}")]
    Version { version: u16 },
    #[error("a control frame of type {kind} with {length} bytes, more than {MAX_CONTROL}")]
    TooLong { kind: u16, length: usize },
    #[error("a control frame of type {kind} with only {length} bytes")]
    TooShort { kind: u16, length: usize },
}

/// Why a stream is refused or ended; the status codes of RST_STREAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reset {
    Protocol = 1,
    InvalidStream = 2,
    Refused = 3,
    Internal = 6,
}

/// A frame that the peer has sent, or a piece of one.
#[derive(Debug, PartialEq, Eq)]
#[allow(
    unreachable_pub,
    reason = "reachable with the feature `test-peer` alone"
)]
pub enum Frame {
    /// Opens a stream.
    SynStream {
        /// The id of the stream.
        id: u32,
        /// The opener sends no data on it.
        fin: bool,
        /// The compressed header block.
        block: Bytes,
    },
    /// Accepts a stream.
    SynReply {
        /// The compressed header block.
        block: Bytes,
    },
    /// Ends a stream in both directions.
    Reset {
        /// The id of the stream.
        id: u32,
    },
    /// Requests the same frame in return.
    Ping {
        /// The number to return.
        id: u32,
    },
    /// The sender opens no more streams (GOAWAY).
    GoAway,
    /// Further headers of a stream.
    Headers {
        /// The id of the stream.
        id: u32,
        /// The sender sends no more data on it.
        fin: bool,
        /// The compressed header block.
        block: Bytes,
    },
    /// SETTINGS, WINDOW_UPDATE or an unknown frame, all of which are ignored.
    Other,
    /// Data of a stream; `fin` is set only with the last piece of a frame.
    Data {
        /// The id of the stream.
        id: u32,
        /// The bytes of the frame that have arrived.
        data: Bytes,
        /// The sender sends no more data on the stream.
        fin: bool,
    },
}

/// Splits a stream of bytes into frames.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    data: Option<OpenData>,
}

/// A data frame that has not arrived completely.
#[derive(Debug)]
struct OpenData {
    id: u32,
    left: usize,
    fin: bool,
}

impl Decoder {
    /// Takes the next frame or piece from the front of `buffer`; `None` if more bytes are needed.
    pub(crate) fn decode(&mut self, buffer: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
        if let Some(open) = self.data.take() {
            return Ok(self.piece(open, buffer));
        }
        let Some(head) = buffer.first_chunk::<HEAD>() else {
            return Ok(None);
        };
        let mut fields = &head[..];
        let (first, second) = (fields.get_u32(), fields.get_u32());
        let fin = (second >> 24) & u32::from(FLAG_FIN) != 0;
        let length = usize::try_from(second & 0x00ff_ffff).unwrap_or(usize::MAX);
        if first & !ID == 0 {
            buffer.advance(HEAD);
            let open = OpenData {
                id: first,
                left: length,
                fin,
            };
            return Ok(self.piece(open, buffer));
        }
        let [_, _, kind_high, kind_low] = first.to_be_bytes();
        let kind = u16::from_be_bytes([kind_high, kind_low]);
        let version = u16::try_from((first & ID) >> 16).unwrap_or(u16::MAX);
        if version != VERSION {
            return Err(FrameError::Version { version });
        }
        if length > MAX_CONTROL {
            return Err(FrameError::TooLong { kind, length });
        }
        if buffer.len() < HEAD + length {
            return Ok(None);
        }
        buffer.advance(HEAD);
        control(kind, fin, buffer.split_to(length).freeze()).map(Some)
    }

    fn piece(&mut self, mut open: OpenData, buffer: &mut BytesMut) -> Option<Frame> {
        let take = open.left.min(buffer.len());
        if take == 0 && open.left > 0 {
            self.data = Some(open);
            return None;
        }
        open.left -= take;
        let frame = Frame::Data {
            id: open.id,
            data: buffer.split_to(take).freeze(),
            fin: open.fin && open.left == 0,
        };
        if open.left > 0 {
            self.data = Some(open);
        }
        Some(frame)
    }
}

fn control(kind: u16, fin: bool, mut payload: Bytes) -> Result<Frame, FrameError> {
    let length = payload.len();
    let needed = match kind {
        1 => 10,
        2 | 6 | 8 => 4,
        3 | 7 => 8,
        _ => 0,
    };
    if length < needed {
        return Err(FrameError::TooShort { kind, length });
    }
    Ok(match kind {
        1 => {
            let id = payload.get_u32() & ID;
            // The associated stream, the priority and the slot are ignored.
            payload.advance(6);
            Frame::SynStream {
                id,
                fin,
                block: payload,
            }
        }
        2 => Frame::SynReply {
            block: payload.split_off(4),
        },
        3 => Frame::Reset {
            id: payload.get_u32() & ID,
        },
        6 => Frame::Ping {
            id: payload.get_u32(),
        },
        7 => Frame::GoAway,
        8 => Frame::Headers {
            id: payload.get_u32() & ID,
            fin,
            block: payload,
        },
        _ => Frame::Other,
    })
}

fn head(out: &mut BytesMut, kind: u16, length: u32) {
    out.put_u16(0x8000 | VERSION);
    out.put_u16(kind);
    out.put_u32(length);
}

/// Writes a SYN_REPLY, which accepts a stream; `block` is a compressed header block.
pub(super) fn syn_reply(out: &mut BytesMut, id: u32, block: &[u8]) {
    head(out, 2, u32::try_from(block.len() + 4).unwrap_or(u32::MAX));
    out.put_u32(id);
    out.put_slice(block);
}

/// Writes a RST_STREAM, which refuses or ends a stream.
pub(super) fn reset(out: &mut BytesMut, id: u32, status: Reset) {
    head(out, 3, 8);
    out.put_u32(id);
    out.put_u32(status as u32);
}

/// Writes a PING, which answers the peer's.
pub(super) fn ping(out: &mut BytesMut, id: u32) {
    head(out, 6, 4);
    out.put_u32(id);
}

/// Writes a GOAWAY: no more streams are accepted.
pub(super) fn go_away(out: &mut BytesMut, last: u32) {
    head(out, 7, 8);
    out.put_u32(last);
    out.put_u32(0);
}

/// Writes data in frames of at most [`MAX_DATA`], the last one with FIN if requested; no data with FIN is one empty
/// frame.
pub(super) fn data(out: &mut BytesMut, id: u32, bytes: &[u8], fin: bool) {
    let mut pieces = bytes.chunks(MAX_DATA).peekable();
    if bytes.is_empty() && fin {
        data_frame(out, id, &[], true);
    }
    while let Some(piece) = pieces.next() {
        data_frame(out, id, piece, fin && pieces.peek().is_none());
    }
}

fn data_frame(out: &mut BytesMut, id: u32, piece: &[u8], fin: bool) {
    let length = u32::try_from(piece.len()).unwrap_or(u32::MAX);
    out.put_u32(id & ID);
    out.put_u32(u32::from(fin) << 24 | length);
    out.put_slice(piece);
}

/// Writes a SYN_STREAM, which opens a stream: the client's side, for tests.
#[cfg(any(test, feature = "test-peer"))]
pub(super) fn syn_stream(out: &mut BytesMut, id: u32, block: &[u8]) {
    head(out, 1, u32::try_from(block.len() + 10).unwrap_or(u32::MAX));
    out.put_u32(id);
    out.put_u32(0);
    out.put_u16(0);
    out.put_slice(block);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Decodes bytes that arrive in the given pieces, and joins the pieces of data frames.
    fn decode_all<'a>(
        pieces: impl IntoIterator<Item = &'a [u8]>,
    ) -> Result<Vec<Frame>, FrameError> {
        let (mut decoder, mut buffer, mut frames) =
            (Decoder::default(), BytesMut::new(), Vec::new());
        let mut joining: Option<(u32, BytesMut)> = None;
        for piece in pieces {
            buffer.extend_from_slice(piece);
            while let Some(frame) = decoder.decode(&mut buffer)? {
                let Frame::Data { id, data, fin } = frame else {
                    frames.push(frame);
                    continue;
                };
                let (_, joined) = joining.get_or_insert_with(|| (id, BytesMut::new()));
                joined.extend_from_slice(&data);
                if decoder.data.is_none() {
                    let data = joining.take().unwrap().1.freeze();
                    frames.push(Frame::Data { id, data, fin });
                }
            }
        }
        Ok(frames)
    }

    #[test]
    fn reads_what_a_client_sends() {
        let mut wire = BytesMut::new();
        syn_stream(&mut wire, 1, b"block");
        data(&mut wire, 1, b"hello", true);
        ping(&mut wire, 7);
        reset(&mut wire, 1, Reset::Refused);
        go_away(&mut wire, 1);
        wire.extend_from_slice(&[0x80, 3, 0, 4, 0, 0, 0, 4, 0, 0, 0, 0]); // SETTINGS
        wire.extend_from_slice(&[0x80, 3, 0, 9, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 9]); // WINDOW_UPDATE
        let frames = decode_all([&wire[..]]).unwrap();
        assert_eq!(
            frames,
            [
                Frame::SynStream {
                    id: 1,
                    fin: false,
                    block: Bytes::from("block")
                },
                Frame::Data {
                    id: 1,
                    data: Bytes::from("hello"),
                    fin: true
                },
                Frame::Ping { id: 7 },
                Frame::Reset { id: 1 },
                Frame::GoAway,
                Frame::Other,
                Frame::Other,
            ]
        );
    }

    #[test]
    fn rejects_frames_that_it_must_not_buffer() {
        let long = [0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff];
        let expected = FrameError::TooLong {
            kind: 1,
            length: 0xff_ffff,
        };
        assert_eq!(decode_all([&long[..]]), Err(expected));
        let other = [0x80, 2, 0, 1, 0, 0, 0, 0];
        assert_eq!(
            decode_all([&other[..]]),
            Err(FrameError::Version { version: 2 })
        );
        let short = [0x80, 3, 0, 3, 0, 0, 0, 4, 0, 0, 0, 1];
        assert_eq!(
            decode_all([&short[..]]),
            Err(FrameError::TooShort { kind: 3, length: 4 })
        );
    }

    #[test]
    fn a_large_data_frame_is_never_buffered() {
        let mut decoder = Decoder::default();
        let mut buffer = BytesMut::from(&[0, 0, 0, 1, 1, 0xff, 0xff, 0xff][..]);
        let mut seen = 0;
        assert_eq!(decoder.decode(&mut buffer), Ok(None));
        loop {
            buffer.extend_from_slice(&[7; 1000]);
            let Ok(Some(Frame::Data { data, fin, .. })) = decoder.decode(&mut buffer) else {
                panic!("no piece");
            };
            seen += data.len();
            if fin {
                break;
            }
            assert!(buffer.is_empty());
        }
        assert_eq!(seen, 0xff_ffff);
    }

    proptest! {
        #[test]
        fn never_panics(wire in prop::collection::vec(any::<u8>(), 0..600)) {
            drop(decode_all([&wire[..]]));
            let mut control = vec![0x80, 3, 0];
            control.extend(wire);
            drop(decode_all([&control[..]]));
        }

        #[test]
        fn frames_are_read_in_pieces_of_any_size(
            payloads in prop::collection::vec((1u32..9, prop::collection::vec(any::<u8>(), 0..200), any::<bool>()), 1..8),
            step in 1usize..50,
        ) {
            let mut wire = BytesMut::new();
            for (id, bytes, fin) in &payloads {
                syn_stream(&mut wire, *id, bytes);
                data(&mut wire, *id, bytes, *fin);
                ping(&mut wire, *id);
            }
            prop_assert_eq!(decode_all([&wire[..]]), decode_all(wire.chunks(step)));
        }
    }
}
