//! The functions that both the fuzz targets and the tests run: they feed arbitrary bytes to a decoder and check its
//! promises. A decoder must not panic, and must not use more memory than its bound; a broken promise is a panic here.
//!
//! Compiled for tests, and with the feature `fuzzed` for the targets in `fuzz/`.

#![allow(
    clippy::panic,
    reason = "a harness reports a broken promise with a panic"
)]

use bytes::{Bytes, BytesMut};

use crate::{
    ports,
    query::Query,
    spdy::{
        frame as spdy,
        headers::{HeaderError, Inflater, MAX_INFLATED},
    },
    websocket::{
        channel::{Encoding, Meaning, Messages},
        frame as websocket,
    },
};

/// Splits off the first byte, which decides in which pieces the rest arrives.
fn shape(data: &[u8]) -> (usize, &[u8]) {
    match data.split_first() {
        Some((first, rest)) => (usize::from(*first), rest),
        None => (0, data),
    }
}

/// The pieces in which the bytes arrive: from single bytes to all at once.
fn arrivals(shape: usize, data: &[u8]) -> impl Iterator<Item = &[u8]> {
    let step = match shape & 0x0f {
        0 => data.len().max(1),
        step => step * step,
    };
    data.chunks(step)
}

/// Decodes a client's SPDY bytes: frames, and the header blocks in them through one inflater, as a session reads them.
///
/// # Panics
/// If more is buffered than the bounds allow.
pub fn spdy_frames(data: &[u8]) {
    let (shape, data) = shape(data);
    let (mut decoder, mut buffer) = (spdy::Decoder::default(), BytesMut::new());
    let mut inflater = Inflater::new();
    for piece in arrivals(shape, data) {
        buffer.extend_from_slice(piece);
        loop {
            let block = match decoder.decode(&mut buffer) {
                Err(_) => return,
                Ok(None) => break,
                Ok(Some(
                    spdy::Frame::SynStream { block, .. }
                    | spdy::Frame::SynReply { block }
                    | spdy::Frame::Headers { block, .. },
                )) => block,
                Ok(Some(_)) => continue,
            };
            assert!(block.len() <= spdy::MAX_CONTROL);
            if inflated(&mut inflater, &block).is_err() {
                return;
            }
        }
        let most = spdy::MAX_CONTROL + 8 + piece.len();
        assert!(buffer.len() <= most, "{} bytes are held", buffer.len());
    }
}

/// Inflates header blocks of a client; the first two bytes of each give its length.
///
/// # Panics
/// If more is inflated than the bounds allow.
pub fn spdy_headers(mut data: &[u8]) {
    let mut inflater = Inflater::new();
    while let Some((length, rest)) = data.split_first_chunk::<2>() {
        let length = usize::from(u16::from_be_bytes(*length)).min(rest.len());
        let (block, rest) = rest.split_at(length);
        if inflated(&mut inflater, block).is_err() {
            return;
        }
        data = rest;
    }
}

fn inflated(inflater: &mut Inflater, block: &[u8]) -> Result<(), HeaderError> {
    let headers = inflater.headers(block)?;
    let pairs = headers.0.iter();
    let text: usize = pairs.map(|(name, value)| name.len() + value.len()).sum();
    // A name is stored once for each of its values.
    assert!(text <= 2 * MAX_INFLATED, "{text} bytes of headers");
    Ok(())
}

/// Decodes a client's WebSocket bytes: frames, and the channels in their messages.
///
/// # Panics
/// If more is buffered or passed on than has arrived.
pub fn websocket_messages(data: &[u8]) {
    let (shape, data) = shape(data);
    let encoding = match (shape >> 4) & 3 {
        0 => Encoding::Binary,
        1 => Encoding::Base64,
        _ => Encoding::BinaryWithClose,
    };
    let (mut decoder, mut buffer) = (websocket::Decoder::default(), BytesMut::new());
    let mut messages = Messages::new(encoding);
    for piece in arrivals(shape, data) {
        buffer.extend_from_slice(piece);
        loop {
            let (data, last) = match decoder.decode(&mut buffer) {
                // Like a session, which ends with the first error.
                Err(_) => return,
                Ok(None) => break,
                Ok(Some(websocket::Event::Data { data, last, .. })) => (data, last),
                Ok(Some(_)) => continue,
            };
            let length = data.len();
            match messages.piece(data, last) {
                Err(_) => return,
                // Up to three characters of base64 may have been buffered before.
                Ok(Some(Meaning::Data { data, .. })) => {
                    assert!(data.len() <= length.max(length.div_ceil(4) * 3));
                }
                Ok(Some(Meaning::Close { .. }) | None) => {}
            }
        }
        // The head of a frame, or a whole control frame.
        let most = 14 + websocket::MAX_CONTROL + piece.len();
        assert!(buffer.len() <= most, "{} bytes are held", buffer.len());
    }
}

/// Parses a query string, and the ports in it.
///
/// # Panics
/// If decoding makes it longer.
pub fn query_string(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Ok(query) = Query::parse(text) else {
        return;
    };
    for name in ["command", "port", "tty", "tailLines"] {
        let weight: usize = query.all(name).map(str::len).sum();
        assert!(weight <= data.len());
    }
    if let Ok(ports) = ports::ports(&query) {
        assert!((1..=ports::MAX_PORTS).contains(&ports.len()) && !ports.contains(&0));
    }
}

/// Checks that a message that is read in pieces of this size yields the same as the whole message.
///
/// # Panics
/// If it yields something else.
pub fn websocket_borders(data: &[u8]) {
    let (shape, data) = shape(data);
    let encoding = if shape & 0x10 == 0 {
        Encoding::BinaryWithClose
    } else {
        Encoding::Base64
    };
    let meaning = |pieces: Vec<&[u8]>| {
        let mut messages = Messages::new(encoding);
        let (mut bytes, mut closed) = (BytesMut::new(), None);
        let last = pieces.len().saturating_sub(1);
        for (number, piece) in pieces.into_iter().enumerate() {
            match messages.piece(Bytes::copy_from_slice(piece), number == last) {
                Ok(Some(Meaning::Data { data, .. })) => bytes.extend_from_slice(&data),
                Ok(Some(Meaning::Close { channel })) => closed = Some(channel),
                Ok(None) => {}
                Err(_) => return None,
            }
        }
        Some((bytes, closed))
    };
    let whole = meaning(vec![data]);
    let pieces = meaning(arrivals((shape & 0x0f) | 1, data).collect());
    // Padding at the end of a piece ends a base64 quantum, while in a whole message it is rejected. Nothing else
    // differs.
    assert!(whole.is_none() || whole == pieces || data.is_empty());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Harness = fn(&[u8]);

    const HARNESSES: [(&str, Harness); 5] = [
        ("spdy_frames", spdy_frames),
        ("spdy_headers", spdy_headers),
        ("websocket_messages", websocket_messages),
        ("websocket_borders", websocket_borders),
        ("query_string", query_string),
    ];

    #[test]
    fn the_corpus_passes() {
        let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
        for (name, harness) in HARNESSES {
            let mut inputs = 0;
            for entry in std::fs::read_dir(corpus.join(name)).unwrap() {
                harness(&std::fs::read(entry.unwrap().path()).unwrap());
                inputs += 1;
            }
            assert!(inputs > 0, "no corpus of {name}");
        }
    }

    /// Bytes that pass the first checks more often than arbitrary bytes do.
    fn likely() -> impl Strategy<Value = Vec<u8>> {
        let frame = prop_oneof![
            (
                1u8..10,
                any::<u8>(),
                prop::collection::vec(any::<u8>(), 0..40)
            )
                .prop_map(|(kind, flags, payload)| {
                    let length = u8::try_from(payload.len()).unwrap();
                    let head = [0x80, 3, 0, kind, flags, 0, 0, length];
                    [&head[..], &payload].concat()
                }),
            (
                any::<u8>(),
                any::<[u8; 4]>(),
                prop::collection::vec(any::<u8>(), 0..40)
            )
                .prop_map(|(first, mask, payload)| {
                    let length = 0x80 | u8::try_from(payload.len()).unwrap();
                    [&[first & 0x8f, length][..], &mask, &payload].concat()
                }),
            prop::collection::vec(any::<u8>(), 0..60),
        ];
        (any::<u8>(), prop::collection::vec(frame, 0..8))
            .prop_map(|(shape, frames)| [vec![shape], frames.concat()].concat())
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_break_no_promise(data in likely(), any in prop::collection::vec(any::<u8>(), 0..400)) {
            for (_, harness) in HARNESSES {
                harness(&data);
                harness(&any);
            }
        }
    }
}
