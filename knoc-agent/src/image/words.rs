//! PURE: texts of strangers, made fit to be shown and logged.

/// More than that of a registry's own text helps nobody.
const MAX_WORDS: usize = 1024;

/// A text that a registry had a hand in: control characters are escaped, and it is cut.
pub(super) fn shown(text: &str) -> String {
    let mut out = String::new();
    for (count, c) in text.chars().enumerate() {
        if count == MAX_WORDS {
            out.push('…');
            break;
        }
        // Also what turns the direction of text around, and invisible separators.
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
        assert_eq!(shown(&"x".repeat(5000)).chars().count(), MAX_WORDS + 1);
    }
}
