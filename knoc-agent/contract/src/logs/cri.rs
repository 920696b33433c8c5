//! PURE: the CRI log format, `TIME stdout|stderr F|P text`.
//!
//! A line longer than [`MAX_TEXT`] is split into pieces tagged `P`, the last one tagged `F`. Output
//! that does not end with a newline is a piece tagged `P`, so that a reader gets it back byte for
//! byte.

use std::io::BufRead as _;

use jiff::Timestamp;

/// The maximum length of one piece's text in bytes, the same as containerd's.
pub const MAX_TEXT: usize = 16 << 10;

/// The length of a time stamp, such as `2026-11-22T18:01:56.123456789Z`.
pub const STAMP_LEN: usize = 30;

/// The stream that a piece came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// One parsed piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece<'a> {
    /// The time in RFC 3339 with nanoseconds, UTC. Stamps compare as bytes.
    pub stamp: &'a [u8; STAMP_LEN],
    /// The stream that it came from.
    pub stream: Stream,
    /// The piece is not the end of a line.
    pub partial: bool,
    /// The text without the newline.
    pub text: &'a [u8],
}

/// Parses one line of a log file, given without its newline. `None` if it is not in the CRI format.
#[must_use]
pub fn parse(line: &[u8]) -> Option<Piece<'_>> {
    let (stamp, rest) = line.split_first_chunk::<STAMP_LEN>()?;
    let (stream, rest) = rest.split_first_chunk::<8>()?;
    let stream = match stream {
        b" stdout " => Stream::Stdout,
        b" stderr " => Stream::Stderr,
        _ => return None,
    };
    let (tag, text) = rest.split_first_chunk::<2>()?;
    let partial = match tag {
        b"F " => false,
        b"P " => true,
        _ => return None,
    };
    Some(Piece {
        stamp,
        stream,
        partial,
        text,
    })
}

/// Formats a time as log files state it.
#[must_use]
pub fn stamp(at: Timestamp) -> String {
    format!("{at:.9}")
}

/// Splits one stream of bytes into pieces.
#[derive(Debug)]
pub struct Cutter {
    stream: Stream,
    /// Text since the last newline or split; always shorter than [`MAX_TEXT`].
    held: Vec<u8>,
}

impl Cutter {
    /// A cutter for `stream`.
    #[must_use]
    pub fn new(stream: Stream) -> Self {
        Self {
            stream,
            held: Vec::new(),
        }
    }

    /// Appends the pieces that `data` completes to `out`, and returns their number.
    pub fn push(&mut self, mut data: &[u8], stamp: &str, out: &mut Vec<u8>) -> u64 {
        let mut pieces = 0;
        while !data.is_empty() {
            let room = MAX_TEXT - self.held.len();
            let (mut window, beyond) = data.split_at(room.min(data.len()));
            let before = window.len();
            let start = out.len();
            self.head(stamp, b'F', out);
            // Reading from a slice cannot fail.
            drop(window.read_until(b'\n', out));
            let taken = before - window.len();
            data = data.get(taken..).unwrap_or_default();
            if out.last() == Some(&b'\n') && taken > 0 {
                self.held.clear();
                pieces += 1;
            } else if taken == room {
                set_partial(out, start, self.stream);
                out.push(b'\n');
                self.held.clear();
                pieces += 1;
            } else {
                debug_assert!(
                    beyond.is_empty(),
                    "a window that was not filled is the last"
                );
                let text = out.len() - taken;
                self.held
                    .extend_from_slice(out.get(text..).unwrap_or_default());
                out.truncate(start);
            }
        }
        pieces
    }

    /// Appends the text that is left as a last piece without a newline, and returns the number of
    /// pieces.
    pub fn finish(&mut self, stamp: &str, out: &mut Vec<u8>) -> u64 {
        if self.held.is_empty() {
            return 0;
        }
        self.head(stamp, b'P', out);
        out.push(b'\n');
        self.held.clear();
        1
    }

    fn head(&self, stamp: &str, tag: u8, out: &mut Vec<u8>) {
        out.extend_from_slice(stamp.as_bytes());
        out.push(b' ');
        out.extend_from_slice(self.stream.name().as_bytes());
        out.extend_from_slice(&[b' ', tag, b' ']);
        out.extend_from_slice(&self.held);
    }
}

fn set_partial(out: &mut [u8], start: usize, stream: Stream) {
    if let Some(tag) = out.get_mut(start + STAMP_LEN + 1 + stream.name().len() + 1) {
        *tag = b'P';
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STAMP: &str = "2026-11-22T18:01:56.123456789Z";

    fn text_of(log: &[u8]) -> Vec<u8> {
        let mut text = Vec::new();
        for line in log.split_inclusive(|byte| *byte == b'\n') {
            let piece = parse(line.strip_suffix(b"\n").unwrap()).unwrap();
            assert_eq!(piece.stamp[..], *STAMP.as_bytes());
            assert!(piece.text.len() <= MAX_TEXT);
            text.extend_from_slice(piece.text);
            if !piece.partial {
                text.push(b'\n');
            }
        }
        text
    }

    #[test]
    fn the_stamp_has_nine_digits() {
        let at = Timestamp::new(1_795_370_516, 1000).unwrap();
        assert_eq!(stamp(at), "2026-11-22T18:01:56.000001000Z");
        assert_eq!(stamp(at).len(), STAMP_LEN);
    }

    #[test]
    fn lines_and_the_rest_are_split() {
        let (mut cutter, mut out) = (Cutter::new(Stream::Stderr), Vec::new());
        assert_eq!(cutter.push(b"a b\n\nrest", STAMP, &mut out), 2);
        assert_eq!(cutter.finish(STAMP, &mut out), 1);
        assert_eq!(cutter.finish(STAMP, &mut out), 0);
        let expected = format!("{STAMP} stderr F a b\n{STAMP} stderr F \n{STAMP} stderr P rest\n");
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }

    #[test]
    fn a_line_of_exactly_the_maximum_and_one_more() {
        for extra in [0, 1] {
            let (mut cutter, mut out) = (Cutter::new(Stream::Stdout), Vec::new());
            let mut data = vec![b'x'; MAX_TEXT + extra];
            data.push(b'\n');
            cutter.push(&data, STAMP, &mut out);
            assert_eq!(text_of(&out), data);
        }
    }

    proptest! {
        #[test]
        fn text_comes_back_byte_for_byte(
            chunks in proptest::collection::vec(
                (proptest::collection::vec(prop_oneof![Just(b'\n'), any::<u8>()], 0..30), 1_usize..900),
                0..20,
            ),
        ) {
            let (mut cutter, mut out, mut all) = (Cutter::new(Stream::Stdout), Vec::new(), Vec::new());
            for (chunk, times) in chunks {
                let chunk = chunk.repeat(times);
                cutter.push(&chunk, STAMP, &mut out);
                all.extend(chunk);
            }
            cutter.finish(STAMP, &mut out);
            prop_assert_eq!(text_of(&out), all);
        }

        #[test]
        fn any_line_is_parsed_or_rejected(line in proptest::collection::vec(any::<u8>(), 0..80)) {
            prop_assert!(parse(&line).is_none_or(|piece| piece.text.len() < line.len()));
        }
    }
}
