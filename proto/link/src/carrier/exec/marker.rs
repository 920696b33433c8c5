//! PURE: the line that `knoc-agent connect` writes before the first byte of the link, and how it is found behind whatever a
//! login shell prints.
use std::fmt;

/// How the line begins. Its version changes if an older near side would misread what follows.
const BEGIN: &[u8] = b"KNOC-LINK/1 ";
/// What may precede the line: a banner and a message of the day, not a program that never ends.
pub const MAX_BANNER: usize = 64 << 10;
/// The longest rest of the line.
const MAX_REST: usize = 16;

/// What the far side speaks behind the marker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speaks {
    /// TLS with certificates of both sides.
    Tls,
    /// HTTP/2 without TLS: the far socket checks its peer's user.
    Plain,
}

impl Speaks {
    /// The marker line.
    #[must_use]
    pub fn marker(self) -> &'static [u8] {
        match self {
            Self::Tls => b"KNOC-LINK/1 tls\n",
            Self::Plain => b"KNOC-LINK/1 plain\n",
        }
    }
}

impl fmt::Display for Speaks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tls => "TLS",
            Self::Plain => "no TLS",
        })
    }
}

/// What the bytes so far contain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// No whole marker yet, and none that begins before this index.
    NotYet(usize),
    /// The marker; the link begins at this index.
    Link(Speaks, usize),
    /// A marker of another version, or one whose line end was changed on the way.
    Unknown,
    /// More than [`MAX_BANNER`] bytes without a marker.
    TooMuch,
}

/// Looks for the marker in all bytes so far. None begins before `searched`, as the last call has found: without it, a far
/// side that sends byte by byte would cost a look at all bytes each time.
pub(super) fn find(bytes: &[u8], searched: usize) -> Found {
    let rest = bytes.get(searched..).unwrap_or_default();
    let begin = rest.windows(BEGIN.len()).position(|part| part == BEGIN);
    let begin = begin.map(|begin| searched + begin);
    let Some(begin) = begin.filter(|begin| *begin <= MAX_BANNER) else {
        return if bytes.len() > MAX_BANNER + BEGIN.len() {
            Found::TooMuch
        } else {
            Found::NotYet(searched.max((bytes.len() + 1).saturating_sub(BEGIN.len())))
        };
    };
    let rest = &bytes[begin..];
    for speaks in [Speaks::Tls, Speaks::Plain] {
        let marker = speaks.marker();
        if rest.starts_with(marker) {
            return Found::Link(speaks, begin + marker.len());
        }
        if marker.starts_with(rest) {
            return Found::NotYet(begin);
        }
    }
    if rest.len() > BEGIN.len() + MAX_REST || rest[BEGIN.len()..].contains(&b'\n') {
        return Found::Unknown;
    }
    Found::NotYet(begin)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_marker_is_found_behind_a_banner_however_the_bytes_arrive() {
        let banner = b"Welcome to the cluster.\nKNOC-LINK is not this line\nno line end: ";
        let mut all = banner.to_vec();
        all.extend_from_slice(Speaks::Tls.marker());
        let whole = all.len();
        all.extend_from_slice(b"\x16\x03\x01");
        let mut searched = 0;
        for end in 0..whole {
            assert!(matches!(find(&all[..end], 0), Found::NotYet(_)), "{end}");
            let Found::NotYet(next) = find(&all[..end], searched) else {
                panic!("{end}");
            };
            assert!(next + BEGIN.len() + MAX_REST > end, "{end}: {next}");
            assert!(next >= searched, "{end}: {next}");
            searched = next;
        }
        for end in whole..=all.len() {
            for from in [0, searched] {
                assert_eq!(
                    find(&all[..end], from),
                    Found::Link(Speaks::Tls, whole),
                    "{end}"
                );
            }
        }
        assert_eq!(
            find(b"KNOC-LINK/1 plain\n", 0),
            Found::Link(Speaks::Plain, 18)
        );
    }

    #[test]
    fn a_line_end_that_a_terminal_changed_and_another_version_are_no_link() {
        assert_eq!(find(b"KNOC-LINK/1 tls\r\n", 0), Found::Unknown);
        assert_eq!(find(b"KNOC-LINK/1 quic\n", 0), Found::Unknown);
        assert_eq!(
            find(b"KNOC-LINK/1 and so on without an end", 0),
            Found::Unknown
        );
    }

    #[test]
    fn a_banner_is_bounded() {
        let mut endless = vec![b'x'; MAX_BANNER];
        assert!(matches!(find(&endless, 0), Found::NotYet(_)));
        let mut whole = endless.clone();
        whole.extend_from_slice(Speaks::Tls.marker());
        assert!(matches!(find(&whole, 0), Found::Link(..)));
        endless.extend_from_slice(&[b'x'; 13]);
        assert_eq!(find(&endless, 0), Found::TooMuch);
        endless.extend_from_slice(Speaks::Tls.marker());
        assert_eq!(find(&endless, 0), Found::TooMuch);
    }
}
