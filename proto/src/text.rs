//! PURE: makes text from elsewhere safe to show, so that it cannot move a cursor, begin a line or hide anything.
//!
//! Peers, pods, Slurm and registries may send any text. Before it is logged, printed, or put into an Event or a status,
//! it passes through here once, at the point where it leaves the process.
use std::borrow::Cow;
use std::fmt::Write as _;

/// Characters that are not shown literally: Unicode's control and format characters (general categories Cc and Cf) and
/// the line and paragraph separators. Among them are the escape character of terminals (also as the single character
/// U+009B), the marks that reverse the direction of text, and characters without width.
const UNSHOWN: &[(char, char)] = &[
    ('\0', '\u{1f}'),
    ('\u{7f}', '\u{9f}'),
    ('\u{ad}', '\u{ad}'),
    ('\u{600}', '\u{605}'),
    ('\u{61c}', '\u{61c}'),
    ('\u{6dd}', '\u{6dd}'),
    ('\u{70f}', '\u{70f}'),
    ('\u{890}', '\u{891}'),
    ('\u{8e2}', '\u{8e2}'),
    ('\u{180e}', '\u{180e}'),
    ('\u{200b}', '\u{200f}'),
    ('\u{2028}', '\u{202e}'),
    ('\u{2060}', '\u{2064}'),
    ('\u{2066}', '\u{206f}'),
    ('\u{feff}', '\u{feff}'),
    ('\u{fff9}', '\u{fffb}'),
    ('\u{110bd}', '\u{110bd}'),
    ('\u{110cd}', '\u{110cd}'),
    ('\u{13430}', '\u{1343f}'),
    ('\u{1bca0}', '\u{1bca3}'),
    ('\u{1d173}', '\u{1d17a}'),
    ('\u{e0001}', '\u{e0001}'),
    ('\u{e0020}', '\u{e007f}'),
];

/// Whether the character could change how the text around it is shown.
#[must_use]
pub fn is_unshown(c: char) -> bool {
    // Most text has only characters above the first range, which one comparison shows.
    !(' '..='~').contains(&c)
        && UNSHOWN
            .iter()
            .any(|(first, last)| (*first..=*last).contains(&c))
}

/// Escapes `text` for one line: characters that are not shown literally are written as in Rust, such as `\n` or
/// `\u{1b}`.
#[must_use]
pub fn escape(text: &str) -> Cow<'_, str> {
    escape_but(text, &[])
}

/// Does the same as [`escape`] for text of several lines: line feeds and tabs stay.
#[must_use]
pub fn escape_lines(text: &str) -> Cow<'_, str> {
    escape_but(text, &['\n', '\t'])
}

fn escape_but<'a>(text: &'a str, kept: &[char]) -> Cow<'a, str> {
    let escaped = |c: char| is_unshown(c) && !kept.contains(&c);
    let Some(first) = text.find(escaped) else {
        return Cow::Borrowed(text);
    };
    let mut out = String::with_capacity(text.len() + 16);
    out.push_str(&text[..first]);
    for c in text[first..].chars() {
        if escaped(c) {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

/// Escapes the same characters in a line of JSON by JSON's own escapes. Outside of its strings JSON contains none of
/// them, so the value stays the same.
#[must_use]
pub fn escape_json(json: &str) -> Cow<'_, str> {
    let Some(first) = json.find(is_unshown) else {
        return Cow::Borrowed(json);
    };
    let mut out = String::with_capacity(json.len() + 16);
    out.push_str(&json[..first]);
    for c in json[first..].chars() {
        if !is_unshown(c) {
            out.push(c);
            continue;
        }
        for unit in c.encode_utf16(&mut [0; 2]) {
            // Writing to a String cannot fail.
            write!(out, "\\u{unit:04x}").unwrap_or_default();
        }
    }
    Cow::Owned(out)
}

/// The first `limit` bytes of `text`, or fewer, so that no character is split; ends with `…` if something is left out.
#[must_use]
pub fn shorten(text: &str, limit: usize) -> Cow<'_, str> {
    const MARK: char = '…';
    if text.len() <= limit {
        return Cow::Borrowed(text);
    }
    let end = text.floor_char_boundary(limit.saturating_sub(MARK.len_utf8()));
    let mut out = text[..end].to_owned();
    out.push(MARK);
    Cow::Owned(out)
}

/// A message of one or several lines in at most `limit` bytes, for an Event, a status or an error.
#[must_use]
pub fn message(text: &str, limit: usize) -> String {
    // It is shortened first, because escaping makes it longer.
    shorten(&escape_lines(&shorten(text, limit)), limit).into_owned()
}

/// Quotes `text` on one line in about `limit` bytes at most, for a name in an error.
#[must_use]
pub fn quote(text: &str, limit: usize) -> String {
    format!("\"{}\"", escape(&shorten(text, limit)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn characters_that_move_a_cursor_or_hide_text_are_escaped() {
        for (raw, shown) in [
            ("plain — üñï 漢字 🙂", "plain — üñï 漢字 🙂"),
            ("a\nERROR b", "a\\nERROR b"),
            ("a\r\n\tb", "a\\r\\n\\tb"),
            ("\u{1b}[2J\u{1b}]0;x\u{7}", "\\u{1b}[2J\\u{1b}]0;x\\u{7}"),
            ("\u{9b}31m", "\\u{9b}31m"),
            ("a\u{2028}b\u{2029}c", "a\\u{2028}b\\u{2029}c"),
            ("\u{202e}txt.exe\u{2066}", "\\u{202e}txt.exe\\u{2066}"),
            ("pay\u{200b}pal\u{feff}", "pay\\u{200b}pal\\u{feff}"),
            ("\u{7f}\0", "\\u{7f}\\u{0}"),
            ("\u{e0041}", "\\u{e0041}"),
            ("C:\\dir", "C:\\dir"),
        ] {
            assert_eq!(escape(raw), shown);
        }
        assert_eq!(escape_lines("a\n\tb\r\u{1b}c"), "a\n\tb\\r\\u{1b}c");
    }

    #[test]
    fn json_stays_the_same_value() {
        let value = serde_json::json!({"a\u{9b}": "x\n\u{2028}\u{1b}[0m\u{e0041}ü"});
        let text = value.to_string();
        let escaped = escape_json(&text);
        assert!(!escaped.contains(is_unshown), "{escaped}");
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&escaped).unwrap(),
            value
        );
    }

    #[test]
    fn long_text_is_cut_between_characters() {
        assert_eq!(shorten("abc", 3), "abc");
        assert_eq!(shorten("abcd", 3), "…");
        assert_eq!(shorten("abcdef", 5), "ab…");
        assert_eq!(shorten("üüüü", 6), "ü…");
        assert_eq!(quote("a\nb", 10), "\"a\\nb\"");
    }

    proptest! {
        #[test]
        fn text_is_escaped_once_and_shortened_to_its_limit(text in ".*", limit in 3..40_usize) {
            let line = escape(&text).into_owned();
            prop_assert!(!line.contains(is_unshown));
            prop_assert_eq!(escape(&line), line.as_str());
            prop_assert!(!escape_lines(&text).contains(|c| is_unshown(c) && c != '\n' && c != '\t'));
            let short = shorten(&text, limit);
            prop_assert!(short.len() <= limit);
        }
    }
}
