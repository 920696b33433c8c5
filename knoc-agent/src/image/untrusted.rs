//! PURE: makes texts of untrusted servers, and of the runtime about untrusted images, safe to show and to log.

use knoc_proto::error::chain;

use crate::command::CommandError;

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

/// Why the runtime failed, in its own message if it wrote one.
pub(super) fn why(error: &CommandError) -> String {
    let message = error.message().map_or_else(|| chain(error), fatal);
    // The message may contain text from the image.
    shown(&message)
}

/// How the lines of Apptainer begin that say why it failed, and those of Slurm about a job that it ends.
const WHY: [&str; 3] = ["FATAL", "ERROR", "slurmstepd: error"];

/// The lines of Apptainer's output, or of a job's, that say why it failed.
pub(super) fn fatal(message: &str) -> String {
    let why: Vec<&str> = message
        .lines()
        .filter(|line| WHY.iter().any(|word| line.starts_with(word)))
        .filter_map(|line| line.split_once(':').map(|(_, rest)| rest.trim()))
        .collect();
    if why.is_empty() {
        message.to_owned()
    } else {
        why.join("; ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lines_that_matter_are_kept() {
        let message = "INFO:    Converting OCI blobs to SIF format\nWARNING: x\nFATAL:   While making image from oci registry: error fetching image: manifest unknown\n";
        assert_eq!(
            fatal(message),
            "While making image from oci registry: error fetching image: manifest unknown"
        );
        assert_eq!(fatal("anything"), "anything");
        let stopped = "INFO:    Creating SIF file\nslurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-30T01:00:00 DUE TO TIME LIMIT ***\n";
        assert!(fatal(stopped).ends_with("DUE TO TIME LIMIT ***"));
        assert!(!fatal(stopped).contains("INFO"));
    }

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
