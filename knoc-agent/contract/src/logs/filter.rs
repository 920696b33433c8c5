//! PURE: from pieces of a log to the bytes that a reader asked for (since, stream, timestamps, byte limit), and where
//! the last `n` lines begin.

use jiff::Timestamp;
use knoc_proto::pb;
use memchr::memchr;

use super::cri::{self, STAMP_LEN, Stream};

/// What of a log a reader wants.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// Lines of this stream only.
    pub stream: Option<Stream>,
    /// Not what is older than this stamp.
    pub since: Option<String>,
    /// The last so many lines; `None`: all.
    pub tail_lines: Option<u64>,
    /// Stop after so many bytes; `None`: never.
    pub limit_bytes: Option<u64>,
    /// Begin each line with its time.
    pub timestamps: bool,
    /// Go on where another reader stopped.
    pub from: Option<Position>,
}

/// A place in a series, as one reader leaves it for the next.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Position {
    /// The file, whatever rotation calls it meanwhile.
    pub inode: u64,
    /// The byte in it where the next line begins.
    pub offset: u64,
    /// Of the last line before it.
    pub stamp: Vec<u8>,
    /// By stream: is the next piece the beginning of a line?
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
            from: None,
        }
    }
}

impl Position {
    /// As it travels; `attempt` is whose log it is.
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

/// Turns log lines into output bytes.
#[derive(Debug)]
pub struct Filter {
    options: Options,
    left: u64,
    /// By stream: is the next piece the beginning of a line?
    at_start: [bool; 2],
    /// Of the last piece seen, wanted or not.
    stamp: Option<[u8; STAMP_LEN]>,
    /// Pieces up to this stamp were sent by another reader.
    sent: Option<[u8; STAMP_LEN]>,
}

impl Filter {
    /// A filter that has seen nothing yet.
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

    /// The file where another reader stopped is not there: what is not newer than its last line was sent.
    pub fn skip_sent(&mut self) {
        self.sent = self.stamp;
    }

    /// The last stamp, and by stream whether a line begins: what the next reader must know beside the place.
    #[must_use]
    pub fn state(&self) -> (&[u8], [bool; 2]) {
        (
            self.stamp.as_ref().map_or(&[], |stamp| stamp),
            self.at_start,
        )
    }

    /// Has the byte limit been reached?
    #[must_use]
    pub fn done(&self) -> bool {
        self.left == 0
    }

    /// Appends what is wanted of whole lines to `kept`. What is not in the format is left out, and so is what follows
    /// the last newline.
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

    /// The same of one line, which has its newline.
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
        // A part of a line ends without the newline that stands in the file.
        let newline = usize::from(piece.partial);
        let text = piece.text.len().saturating_sub(newline);
        kept.extend_from_slice(piece.text.get(..text).unwrap_or_default());
        let added = u64::try_from(kept.len() - begin).unwrap_or(u64::MAX);
        let allowed = added.min(self.left);
        self.left -= allowed;
        kept.truncate(begin + usize::try_from(allowed).unwrap_or_default());
    }
}

/// Finds where the last `n` lines begin, block by block from the end of a series.
#[derive(Debug)]
pub struct TailSearch {
    options: Options,
    wanted: u64,
    found: u64,
    seen_any: bool,
}

impl TailSearch {
    /// `None` where all lines are wanted.
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

    /// Takes the next older line (without newline). `true` where reading must begin after this one.
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
        // A line ends with its F piece; P pieces before it belong to it. A P at the very end is a line too.
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
