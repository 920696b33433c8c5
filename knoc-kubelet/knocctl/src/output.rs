//! Output formats: tables for people, JSON and YAML for programs.
//!
//! Rendering is pure. Text from pods and agents passes through [`knoc_proto::text`], so that it can neither move the
//! user's cursor nor forge a line of output.

use std::io::{self, Write as _};

use knoc_proto::text::{escape, escape_json, escape_lines, is_unshown};
use serde_json::Value;
use tokio::io::AsyncWriteExt as _;

use super::CtlError;

/// The space between two columns.
const GAP: usize = 3;

/// The output format of all commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum Format {
    #[default]
    Table,
    Wide,
    Json,
    Yaml,
}

/// Prints `value` in the formats for programs (JSON, YAML), and `text` otherwise.
pub(super) fn show(
    format: Format,
    value: impl FnOnce() -> Value,
    text: impl FnOnce(bool) -> String,
) -> Result<(), CtlError> {
    match format {
        Format::Table => print(&text(false)),
        Format::Wide => print(&text(true)),
        Format::Json => {
            let text = serde_json::to_string_pretty(&value()).unwrap_or_default();
            print(&format!("{}\n", json(&text)))
        }
        Format::Yaml => print(&yaml(&value())),
    }
}

/// Escapes each line by itself, so that the line feeds between JSON's tokens stay.
fn json(text: &str) -> String {
    let lines: Vec<_> = text.split('\n').map(escape_json).collect();
    lines.join("\n")
}

/// Formats as YAML. If a text contains control characters, the result is JSON, which is also valid YAML and escapes them.
fn yaml(value: &Value) -> String {
    let text = serde_saphyr::to_string(value).unwrap_or_default();
    if text.contains(|c| is_unshown(c) && c != '\n') {
        return json(&format!("{value:#}\n"));
    }
    text
}

/// Writes text to standard output and flushes it. Line feeds are kept.
pub(super) fn print(text: &str) -> Result<(), CtlError> {
    print_bytes(escape_lines(text).as_bytes())
}

/// Writes bytes unchanged to standard output and flushes them.
pub(super) fn print_bytes(bytes: &[u8]) -> Result<(), CtlError> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(bytes).and_then(|()| stdout.flush());
    written.map_err(|source| CtlError::Print { source })
}

/// [`print_bytes`] for streams: while a slow reader (`less`) blocks the write, the link still answers pings.
pub(super) async fn pass(bytes: &[u8]) -> Result<(), CtlError> {
    let mut stdout = tokio::io::stdout();
    stdout
        .write_all(bytes)
        .await
        .map_err(|source| CtlError::Print { source })?;
    stdout
        .flush()
        .await
        .map_err(|source| CtlError::Print { source })
}

/// The same as [`pass`], to standard error.
pub(super) async fn pass_error(bytes: &[u8]) -> Result<(), CtlError> {
    let mut stderr = tokio::io::stderr();
    stderr
        .write_all(bytes)
        .await
        .map_err(|source| CtlError::Print { source })?;
    stderr
        .flush()
        .await
        .map_err(|source| CtlError::Print { source })
}

/// Writes bytes unchanged to standard error and flushes them.
fn complain_bytes(bytes: &[u8]) -> Result<(), CtlError> {
    let mut stderr = io::stderr().lock();
    let written = stderr.write_all(bytes).and_then(|()| stderr.flush());
    written.map_err(|source| CtlError::Print { source })
}

/// Prints a line on standard error. A failure is ignored, because there is no other place to report it.
pub(super) fn complain(line: &str) {
    // Further lines are indented, so that none of them looks like a line of knocctl.
    let lines = escape_lines(line).replace('\n', "\n  ");
    complain_bytes(format!("{lines}\n").as_bytes()).unwrap_or_default();
}

/// Formats a table: headings, then rows, with columns as wide as their longest cell.
#[must_use]
pub(crate) fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> = rows
        .iter()
        .map(|row| row.iter().map(|cell| plain(cell)).collect())
        .collect();
    let width = |column: usize| {
        let cells = rows
            .iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count());
        cells
            .chain([headings[column].chars().count()])
            .max()
            .unwrap_or(0)
            + GAP
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded = cells
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"));
        let mut line = padded.collect::<String>().trim_end().to_owned();
        line.push('\n');
        line
    };
    let mut text = line(&mut headings.iter().copied());
    for row in &rows {
        text.push_str(&line(&mut row.iter().map(String::as_str)));
    }
    text
}

/// Formats `name: value` lines with aligned values; empty values are left out.
#[must_use]
pub(crate) fn fields(indent: usize, list: &[(&str, String)]) -> String {
    let shown = || list.iter().filter(|(_, value)| !value.is_empty());
    let width = shown().map(|(name, _)| name.len() + 1).max().unwrap_or(0) + 2;
    let line = |(name, value): &(&str, String)| {
        let name = format!("{name}:");
        format!("{:indent$}{name:<width$}{}\n", "", plain(value))
    };
    shown().map(line).collect()
}

/// Makes one line of a text: white space becomes a blank, and characters that are not printable are escaped.
#[must_use]
pub(crate) fn plain(text: &str) -> String {
    let blanks = text.replace(['\n', '\r', '\t'], " ");
    escape(&blanks).into_owned()
}

/// Formats a duration for people: `45s`, `12m`, `3h20m`, `5d`.
#[must_use]
pub(crate) fn span(seconds: i64) -> String {
    let s = seconds.max(0);
    match s {
        0..120 => format!("{s}s"),
        120..7200 => format!("{}m", s / 60),
        7200..172_800 if s % 3600 / 60 == 0 => format!("{}h", s / 3600),
        7200..172_800 => format!("{}h{}m", s / 3600, s % 3600 / 60),
        _ => format!("{}d", s / 86_400),
    }
}

/// Formats a number of bytes for people: `512 B`, `1.5 MiB`.
#[must_use]
pub(crate) fn size(bytes: i64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes.max(0);
    let mut unit = "B";
    for larger in UNITS {
        if value < 10_240 {
            break;
        }
        value /= 1024;
        unit = larger;
    }
    format!("{value} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_as_wide_as_they_need() {
        let rows = vec![
            vec!["a".into(), "long-name".into()],
            vec!["bcdefgh".into(), "x\u{1b}[31m".into()],
        ];
        let wanted = "NS        NAME\na         long-name\nbcdefgh   x\\u{1b}[31m\n";
        assert_eq!(table(&["NS", "NAME"], &rows), wanted);
        assert_eq!(table(&["NS", "NAME"], &[]), "NS   NAME\n");
    }

    #[test]
    fn fields_leave_out_what_is_empty() {
        let list = [
            ("Name", "x".into()),
            ("Nothing", String::new()),
            ("Longer", "y\nz".into()),
        ];
        assert_eq!(fields(2, &list), "  Name:    x\n  Longer:  y z\n");
    }

    #[test]
    fn spans_and_sizes() {
        for (seconds, text) in [
            (-5, "0s"),
            (119, "119s"),
            (120, "2m"),
            (7200, "2h"),
            (12_000, "3h20m"),
            (172_800, "2d"),
        ] {
            assert_eq!(span(seconds), text);
        }
        for (bytes, text) in [
            (0, "0 B"),
            (10_239, "10239 B"),
            (64 << 20, "64 MiB"),
            (1 << 40, "1024 GiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn yaml_and_json_say_the_same() {
        let value = serde_json::json!({"name": "x", "list": [1, 2], "text": "yes"});
        let back: Value = serde_saphyr::from_str(&yaml(&value)).unwrap();
        assert_eq!(back, value);
    }

    #[test]
    fn texts_of_a_pod_cannot_move_the_cursor_in_any_format() {
        let nasty = "a\nb\r\u{1b}[2J\u{9b}31m\u{2028}\u{202e}c\u{200b}";
        let value = serde_json::json!({"message": nasty, "list": [nasty], "plain": "x"});
        for text in [
            yaml(&value),
            json(&format!("{value:#}")),
            table(&["NAME"], &[vec![nasty.to_owned()]]),
            fields(0, &[("Why", nasty.to_owned())]),
        ] {
            assert!(!text.contains(|c| is_unshown(c) && c != '\n'), "{text:?}");
        }
        let back: Value = serde_saphyr::from_str(&yaml(&value)).unwrap();
        assert_eq!(back, value);
        let back: Value = serde_json::from_str(&json(&format!("{value:#}"))).unwrap();
        assert_eq!(back, value);
    }
}
