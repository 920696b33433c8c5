//! PURE: how an error becomes text. The code that handles an error for good logs its chain once.
//!
//! The `Display` of an error in this workspace says which action on which object failed, and never repeats its source.
use std::error::Error;

/// The error and its sources in one line: `a: b: c`.
///
/// A source whose text already ends the line is not repeated, since not every library follows that rule.
#[must_use]
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut line = own_message(error);
    let mut source = error.source();
    while let Some(cause) = source {
        let text = own_message(cause);
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

/// The error's own message, without its sources. gRPC's types need special treatment: the `Display` of a status holds
/// its code, trailers and sources, and that of a transport error nothing.
fn own_message(error: &(dyn Error + 'static)) -> String {
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
    fn a_repeated_source_appears_once() {
        let error = link("open file: no such file", Some(link("no such file", None)));
        assert_eq!(chain(&error), "open file: no such file");
    }
}
