//! Where log lines go: each event is one line, whatever stands in it.
//!
//! What is logged holds words of peers, pods, Slurm and registries, by way of fields, errors and their sources. They are
//! made safe at the one place that all of them pass, instead of at each that logs: a line feed in them begins no line of the
//! log, and no escape sequence reaches a terminal.
use std::io::{self, Write};

use crate::text;

/// The longest line: what a peer sends does not fill the disk of a log.
const LINE: usize = 16 << 10;

/// How events are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// A writer of whole events, as `tracing-subscriber` hands them over: one `write` each, with a line feed at its end.
#[derive(Debug)]
pub struct Lines<W> {
    to: W,
    form: Form,
}

impl<W: Write> Lines<W> {
    /// Writes to `to`.
    pub fn new(to: W, form: Form) -> Self {
        Self { to, form }
    }
}

/// The lines on standard error.
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

/// One event as one line.
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

    /// What is logged by `what`, as a process has it in its log.
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
    #[error("refused by {0}")]
    struct Refused(&'static str);

    const NASTY: &str =
        "x\n2026-11-28T00:00:00Z ERROR forged: line\r\u{1b}[2J\u{9b}31m\u{2028}\u{202e}end";

    fn log_nasty() {
        let span = tracing::info_span!("call", peer = NASTY, shown = %NASTY);
        let _entered = span.enter();
        tracing::info!(subject = %NASTY, quoted = ?NASTY, plain = NASTY, "message {NASTY}");
        let error = Refused(NASTY);
        tracing::warn!(%error, "refused a TLS handshake");
        tracing::error!("{NASTY}");
    }

    #[test]
    fn an_event_is_one_line_whatever_stands_in_it() {
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
    fn json_says_what_was_said() {
        let log = logged(Form::Json, || tracing::info!(subject = NASTY, "m"));
        let value: serde_json::Value = serde_json::from_str(&log).unwrap();
        assert_eq!(value["fields"]["subject"], NASTY);
    }

    #[test]
    fn a_line_has_an_end() {
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
