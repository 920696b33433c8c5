//! The one way errors become text: where an error stops travelling, its chain is logged once.
//!
//! Pure. Errors in this workspace say in `Display` what was tried on what, and never repeat their source.
use std::error::Error;

/// The error and its sources as one line: `a: b: c`.
///
/// A source whose text already ends the line is not repeated, since not every library keeps that rule.
#[must_use]
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut line = own_words(error);
    let mut source = error.source();
    while let Some(cause) = source {
        let text = own_words(cause);
        if !text.is_empty() && !line.ends_with(&text) {
            if !line.is_empty() {
                line.push_str(": ");
            }
            line.push_str(&text);
        }
        source = cause.source();
    }
    line
}

/// What this error says itself. gRPC's own types are told apart, since their texts hold their code, trailers and
/// sources all at once, or nothing.
fn own_words(error: &(dyn Error + 'static)) -> String {
    if let Some(status) = error.downcast_ref::<tonic::Status>() {
        if status.message().is_empty() {
            return status.code().description().to_owned();
        }
        return status.message().to_owned();
    }
    if error.is::<tonic::transport::Error>() && error.source().is_some() {
        return String::new();
    }
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Link {
        text: &'static str,
        #[source]
        source: Option<Box<Link>>,
    }

    fn link(text: &'static str, source: Option<Link>) -> Link {
        Link {
            text,
            source: source.map(Box::new),
        }
    }

    #[test]
    fn joins_sources_in_order() {
        let error = link(
            "submit job for pod x",
            Some(link("run sbatch", Some(link("exit 1", None)))),
        );
        assert_eq!(chain(&error), "submit job for pod x: run sbatch: exit 1");
    }

    #[test]
    fn a_status_is_its_message() {
        assert_eq!(chain(&tonic::Status::not_found("no pod x")), "no pod x");
        assert!(chain(&tonic::Status::unavailable("")).contains("unavailable"));
    }

    #[test]
    fn a_repeated_source_is_said_once() {
        let error = link("open file: no such file", Some(link("no such file", None)));
        assert_eq!(chain(&error), "open file: no such file");
    }
}
