//! Where log lines go: each event is exactly one line, whatever its fields contain.
//!
//! Fields, errors and their sources contain text of peers, pods, Slurm and registries. That text is escaped at the one
//! place that all events pass, instead of at every call that logs: a line feed in it cannot begin a new line of the
//! log, and no escape sequence reaches a terminal.
use std::io::{self, Write};

use crate::text;

/// The longest line in bytes, so that a peer's text cannot fill the disk.
const LINE: usize = 16 << 10;

/// The format of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Readable text.
    Text,
    /// One JSON object per line.
    Json,
}

/// Writes whole events, as `tracing-subscriber` passes them: one `write` for each, with a line feed at its end.
#[derive(Debug)]
pub struct Lines<W> {
    to: W,
    form: Form,
}

impl<W: Write> Lines<W> {
    /// Writes events in this format to `to`.
    pub fn new(to: W, form: Form) -> Self {
        Self { to, form }
    }
}

/// Writes events in this format to standard error.
#[must_use]
pub fn stderr(form: Form) -> Lines<io::Stderr> {
    Lines::new(io::stderr(), form)
}

impl<W: Write> Write for Lines<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        self.to.write_all(line(event, self.form).as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// Formats an event as one line.
fn line(event: &[u8], form: Form) -> String {
    let event = String::from_utf8_lossy(event);
    let event = event.strip_suffix('\n').unwrap_or(&event);
    let mut line = match form {
        Form::Text => text::shorten(&text::escape(&text::shorten(event, LINE)), LINE).into_owned(),
        Form::Json if event.len() > LINE => {
            let cut = serde_json::json!({"cut": text::shorten(event, LINE)});
            text::escape_json(&cut.to_string()).into_owned()
        }
        Form::Json => text::escape_json(event).into_owned(),
    };
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex, PoisonError};

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            held.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What `what` logs, as it appears in a process's log.
    fn logged(form: Form, what: impl FnOnce()) -> String {
        let sink = Sink::default();
        let to = sink.clone();
        let builder = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(move || Lines::new(to.clone(), form));
        match form {
            Form::Text => tracing::subscriber::with_default(builder.finish(), what),
            Form::Json => tracing::subscriber::with_default(builder.json().finish(), what),
        }
        String::from_utf8(sink.0.lock().unwrap().clone()).unwrap()
    }

    #[derive(Debug, thiserror::Error)]
    #[error("rejected by {0}")]
    struct NastyError(&'static str);

    const NASTY: &str =
        "x\n2026-11-28T00:00:00Z ERROR forged: line\r\u{1b}[2J\u{9b}31m\u{2028}\u{202e}end";

    fn log_nasty() {
        let span = tracing::info_span!("call", peer = NASTY, shown = %NASTY);
        let _entered = span.enter();
        tracing::info!(subject = %NASTY, quoted = ?NASTY, plain = NASTY, "message {NASTY}");
        let error = NastyError(NASTY);
        tracing::warn!(%error, "refused a TLS handshake");
        tracing::error!("{NASTY}");
    }

    #[test]
    fn an_event_is_one_line_whatever_it_contains() {
        for form in [Form::Text, Form::Json] {
            let log = logged(form, log_nasty);
            assert_eq!(log.lines().count(), 3, "{form:?}: {log}");
            assert!(log.ends_with('\n'));
            let shown = |c| text::is_unshown(c) && c != '\n';
            assert!(!log.contains(shown), "{form:?}: {log:?}");
            assert!(
                !log.lines().any(|line| line.contains("ERROR forged")
                    && line.starts_with("2026-11-28T00:00:00Z"))
            );
        }
    }

    #[test]
    fn json_keeps_the_original_text() {
        let log = logged(Form::Json, || tracing::info!(subject = NASTY, "m"));
        let value: serde_json::Value = serde_json::from_str(&log).unwrap();
        assert_eq!(value["fields"]["subject"], NASTY);
    }

    #[test]
    fn a_line_is_bounded_in_length() {
        let endless = "\u{1b}".repeat(100_000);
        for form in [Form::Text, Form::Json] {
            let log = logged(form, || tracing::info!(value = %endless, "m"));
            assert!(
                log.len() < 8 * LINE && log.lines().count() == 1,
                "{}",
                log.len()
            );
            if form == Form::Json {
                serde_json::from_str::<serde_json::Value>(&log).unwrap();
            }
        }
    }
}
