//! PURE: selects from a log's pieces the bytes that a reader asked for (since, stream, timestamps,
//! byte limit), and finds the beginning of the last `n` lines.

use jiff::Timestamp;
use knoc_proto::pb;
use memchr::memchr;

use super::cri::{self, STAMP_LEN, Stream};

/// Which part of a log a reader asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// Only lines of this stream; `None` means both.
    pub stream: Option<Stream>,
    /// Only lines with this time stamp or a newer one.
    pub since: Option<String>,
    /// Only the last lines, this many; `None` means all.
    pub tail_lines: Option<u64>,
    /// Stop after this many bytes; `None` means no limit.
    pub limit_bytes: Option<u64>,
    /// Prefix each line with its time.
    pub timestamps: bool,
    /// Continue at the position that another reader has reached.
    pub from: Option<Position>,
    /// Send the first position before there is anything to send.
    pub positions: bool,
}

/// A position in a series, which one reader hands to the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position {
    /// The inode of the file, whose name changes with each rotation; 0 before the first file.
    pub inode: u64,
    /// The offset in the file at which the next line begins.
    pub offset: u64,
    /// The time stamp of the last line before it.
    pub stamp: Vec<u8>,
    /// For each stream, whether the next piece begins a line.
    pub at_start: [bool; 2],
}

impl From<&pb::ReadLogsRequest> for Options {
    fn from(request: &pb::ReadLogsRequest) -> Self {
        let since = Timestamp::from_nanosecond(i128::from(request.since)).ok();
        Self {
            stream: match request.stream() {
                pb::LogStream::All => None,
                pb::LogStream::Stdout => Some(Stream::Stdout),
                pb::LogStream::Stderr => Some(Stream::Stderr),
            },
            since: since.filter(|_| request.since > 0).map(cri::stamp),
            tail_lines: u64::try_from(request.tail_lines).ok(),
            limit_bytes: u64::try_from(request.limit_bytes)
                .ok()
                .filter(|limit| *limit > 0),
            timestamps: request.timestamps,
            from: request.from.as_ref().map(Position::from),
            positions: request.positions,
        }
    }
}

impl Position {
    /// The beginning of a series, which may not exist yet.
    pub const BEGINNING: Self = Self {
        inode: 0,
        offset: 0,
        stamp: Vec::new(),
        at_start: [true; 2],
    };

    /// The position as a message; `attempt` is the attempt whose log it is.
    #[must_use]
    pub fn to_wire(&self, attempt: u32) -> pb::LogPosition {
        let [stdout, stderr] = self.at_start;
        pb::LogPosition {
            attempt: i32::try_from(attempt).unwrap_or(i32::MAX),
            inode: self.inode,
            offset: self.offset,
            stamp: String::from_utf8_lossy(&self.stamp).into_owned(),
            in_stdout_line: !stdout,
            in_stderr_line: !stderr,
        }
    }
}

impl From<&pb::LogPosition> for Position {
    fn from(wire: &pb::LogPosition) -> Self {
        Self {
            inode: wire.inode,
            offset: wire.offset,
            stamp: wire.stamp.clone().into_bytes(),
            at_start: [!wire.in_stdout_line, !wire.in_stderr_line],
        }
    }
}

impl Options {
    fn wants(&self, stream: Stream) -> bool {
        self.stream.is_none_or(|wanted| wanted == stream)
    }
}

/// Turns log lines into the bytes for a reader.
#[derive(Debug)]
pub struct Filter {
    options: Options,
    left: u64,
    /// For each stream, whether the next piece begins a line.
    at_start: [bool; 2],
    /// The time stamp of the last piece seen, wanted or not.
    stamp: Option<[u8; STAMP_LEN]>,
    /// Another reader has sent the pieces up to this time stamp.
    sent: Option<[u8; STAMP_LEN]>,
}

impl Filter {
    /// A filter at the beginning of a log.
    #[must_use]
    pub fn new(options: Options) -> Self {
        let left = options.limit_bytes.unwrap_or(u64::MAX);
        let from = options.from.as_ref();
        Self {
            left,
            at_start: from.map_or([true; 2], |from| from.at_start),
            stamp: from.and_then(|from| from.stamp.as_slice().try_into().ok()),
            sent: None,
            options,
        }
    }

    /// For use if the file in which another reader stopped no longer exists: skips lines that are
    /// not newer than the last line which that reader sent.
    pub fn skip_sent(&mut self) {
        self.sent = self.stamp;
    }

    /// The last time stamp, and for each stream whether a line begins: together with the offset,
    /// all that the next reader must know.
    #[must_use]
    pub fn state(&self) -> (&[u8], [bool; 2]) {
        (
            self.stamp.as_ref().map_or(&[], |stamp| stamp),
            self.at_start,
        )
    }

    /// Whether the byte limit has been reached.
    #[must_use]
    pub fn done(&self) -> bool {
        self.left == 0
    }

    /// Appends the wanted part of whole lines to `kept`. Lines that are not in the CRI format are
    /// skipped, and so is text after the last newline.
    pub fn keep(&mut self, lines: &[u8], kept: &mut Vec<u8>) {
        let mut rest = lines;
        while self.left > 0
            && let Some(length) = memchr(b'\n', rest)
            && let Some((line, after)) = rest.split_at_checked(length + 1)
        {
            self.line(line, kept);
            rest = after;
        }
    }

    /// Does the same for one line, which includes its newline.
    fn line(&mut self, line: &[u8], kept: &mut Vec<u8>) {
        let Some(piece) = cri::parse(line) else {
            return;
        };
        let stamp = *piece.stamp;
        let before = |bound: &[u8]| stamp[..] < *bound;
        if self.sent.as_ref().is_some_and(|sent| stamp[..] <= sent[..]) {
            return;
        }
        self.stamp = Some(stamp);
        let Options {
            since, timestamps, ..
        } = &self.options;
        let too_old = since.as_ref().is_some_and(|since| before(since.as_bytes()));
        if too_old || !self.options.wants(piece.stream) {
            return;
        }
        let [stdout, stderr] = &mut self.at_start;
        let at_start = match piece.stream {
            Stream::Stdout => stdout,
            Stream::Stderr => stderr,
        };
        let stamped = *timestamps && *at_start;
        *at_start = !piece.partial;
        let begin = kept.len();
        if stamped {
            kept.extend_from_slice(&stamp);
            kept.push(b' ');
        }
        // A partial line ends without the newline that the file has.
        let newline = usize::from(piece.partial);
        let text = piece.text.len().saturating_sub(newline);
        kept.extend_from_slice(piece.text.get(..text).unwrap_or_default());
        let added = u64::try_from(kept.len() - begin).unwrap_or(u64::MAX);
        let allowed = added.min(self.left);
        self.left -= allowed;
        kept.truncate(begin + usize::try_from(allowed).unwrap_or_default());
    }
}

/// Finds the beginning of the last `n` lines, block by block from the end of a series.
#[derive(Debug)]
pub struct TailSearch {
    options: Options,
    wanted: u64,
    found: u64,
    seen_any: bool,
}

impl TailSearch {
    /// `None` if all lines are wanted.
    #[must_use]
    pub fn new(options: &Options) -> Option<Self> {
        let wanted = options.tail_lines?;
        Some(Self {
            options: options.clone(),
            wanted,
            found: 0,
            seen_any: false,
        })
    }

    /// Takes the next older line (without newline). Returns `true` if reading must begin after it.
    pub fn is_before(&mut self, line: &[u8]) -> bool {
        if self.wanted == 0 {
            return true;
        }
        let Some(piece) = cri::parse(line) else {
            return false;
        };
        if !self.options.wants(piece.stream) {
            return false;
        }
        // A line ends with its F piece; the P pieces before belong to it. A P piece at the very end
        // also ends a line.
        let ends_line = !piece.partial || !self.seen_any;
        self.seen_any = true;
        if ends_line {
            if self.found == self.wanted {
                return true;
            }
            self.found += 1;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: [&str; 6] = [
        "2026-11-22T18:00:01.000000000Z stdout F one",
        "2026-11-22T18:00:02.000000000Z stderr F err",
        "2026-11-22T18:00:03.000000000Z stdout P tw",
        "2026-11-22T18:00:04.000000000Z stdout F o",
        "garbage",
        "2026-11-22T18:00:05.000000000Z stdout P end",
    ];

    fn run(options: Options) -> String {
        let first = TailSearch::new(&options).map_or(0, |mut search| {
            let before = LOG
                .iter()
                .rposition(|line| search.is_before(line.as_bytes()));
            before.map_or(0, |index| index + 1)
        });
        let (mut filter, mut out) = (Filter::new(options), Vec::new());
        let kept = |filter: &mut Filter, line: &[u8]| {
            let mut out = Vec::new();
            filter.keep(&[line, b"\n"].concat(), &mut out);
            out
        };
        LOG[first..]
            .iter()
            .for_each(|line| out.extend_from_slice(&kept(&mut filter, line.as_bytes())));
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn options_select() {
        let all = Options::default();
        assert_eq!(run(all.clone()), "one\nerr\ntwo\nend");
        let stream = Some(Stream::Stderr);
        assert_eq!(
            run(Options {
                stream,
                ..all.clone()
            }),
            "err\n"
        );
        let since = Some("2026-11-22T18:00:03.000000000Z".to_owned());
        assert_eq!(
            run(Options {
                since,
                ..all.clone()
            }),
            "two\nend"
        );
        assert_eq!(
            run(Options {
                limit_bytes: Some(6),
                ..all.clone()
            }),
            "one\ner"
        );
        let text = run(Options {
            timestamps: true,
            ..all
        });
        assert!(
            text.ends_with(
                "2026-11-22T18:00:03.000000000Z two\n2026-11-22T18:00:05.000000000Z end"
            )
        );
    }

    #[test]
    fn the_tail_counts_whole_lines() {
        for (lines, expected) in [
            (0, ""),
            (1, "end"),
            (2, "two\nend"),
            (3, "err\ntwo\nend"),
            (9, "one\nerr\ntwo\nend"),
        ] {
            let options = Options {
                tail_lines: Some(lines),
                ..Options::default()
            };
            assert_eq!(run(options), expected, "{lines}");
        }
        let options = Options {
            tail_lines: Some(3),
            stream: Some(Stream::Stdout),
            ..Options::default()
        };
        assert_eq!(run(options), "one\ntwo\nend");
    }
}
