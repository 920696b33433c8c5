//! PURE: makes texts of untrusted servers safe to show and to log.

/// The longest part of a registry's own text that is shown.
const MAX_SHOWN: usize = 1024;

/// Escapes control characters in a text that a registry may have influenced, and truncates it.
pub(super) fn shown(text: &str) -> String {
    let mut out = String::new();
    for (count, c) in text.chars().enumerate() {
        if count == MAX_SHOWN {
            out.push('…');
            break;
        }
        // Also escapes characters that change the text's direction, and invisible separators.
        if c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
        {
            out.extend(c.escape_unicode());
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped_and_long_texts_cut() {
        assert_eq!(shown("manifest unknown: \"é\""), "manifest unknown: \"é\"");
        assert_eq!(
            shown("a\nERROR \x1b[2J\u{202e}"),
            "a\\u{a}ERROR \\u{1b}[2J\\u{202e}"
        );
        assert_eq!(shown(&"x".repeat(5000)).chars().count(), MAX_SHOWN + 1);
    }
}
