//! Compares what knoc-readback printed with what its container's cases expect.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::Container;

/// What differs between a case and what its process received.
#[derive(Debug, thiserror::Error)]
pub enum Mismatch {
    /// The output is not knoc-readback's, or not all of it.
    #[error("the read-back has no whole {part}: {length} bytes")]
    Truncated {
        /// `cmdline` or `environ`.
        part: &'static str,
        /// The length of the output in bytes.
        length: usize,
    },
    /// The number of arguments.
    #[error("{found} arguments instead of {expected}")]
    Count {
        /// The number of arguments after `argv[0]`.
        found: usize,
        /// The number of arguments in the cases.
        expected: usize,
    },
    /// An argument is different.
    #[error("argument {at} is {found}, must be {expected}")]
    Argument {
        /// The position of the argument, counted from 1.
        at: usize,
        /// The text that was found, escaped and shortened.
        found: String,
        /// The text that was expected, escaped and shortened.
        expected: String,
    },
    /// A variable that is missing, there more than once, or has another value.
    #[error("variable {name:?} is {found}, must be {expected}")]
    Variable {
        /// The variable's name.
        name: String,
        /// All values that were found, escaped and shortened.
        found: String,
        /// The text that was expected, escaped and shortened.
        expected: String,
    },
}

/// Compares all arguments and variables; returns the names of the variables that no case has set.
pub fn check(container: &Container, output: &[u8]) -> Result<BTreeSet<String>, Mismatch> {
    let cmdline = part(output, "cmdline")?;
    let mut arguments = strings(&cmdline);
    if !arguments.is_empty() {
        arguments.remove(0);
    }
    if arguments.len() != container.expected_args.len() {
        return Err(Mismatch::Count {
            found: arguments.len(),
            expected: container.expected_args.len(),
        });
    }
    for (at, (found, expected)) in arguments.iter().zip(&container.expected_args).enumerate() {
        if *found != expected.as_bytes() {
            return Err(Mismatch::Argument {
                at: at + 1,
                found: show(found),
                expected: show(expected.as_bytes()),
            });
        }
    }
    variables(container, &part(output, "environ")?)
}

fn variables(container: &Container, environ: &[u8]) -> Result<BTreeSet<String>, Mismatch> {
    let mut found: BTreeMap<&[u8], Vec<&[u8]>> = BTreeMap::new();
    for variable in strings(environ) {
        let end = variable
            .iter()
            .position(|byte| *byte == b'=')
            .unwrap_or(variable.len());
        let value = variable.get(end + 1..).unwrap_or_default();
        found.entry(&variable[..end]).or_default().push(value);
    }
    for (name, expected) in &container.expected_env {
        let values = found.remove(name.as_bytes()).unwrap_or_default();
        if values != [expected.as_bytes()] {
            let values: Vec<String> = values.iter().map(|value| show(value)).collect();
            return Err(Mismatch::Variable {
                name: name.clone(),
                found: format!("[{}]", values.join(", ")),
                expected: show(expected.as_bytes()),
            });
        }
    }
    Ok(found
        .keys()
        .map(|name| String::from_utf8_lossy(name).into_owned())
        .collect())
}

/// Splits a block of strings that each end with a NUL.
fn strings(block: &[u8]) -> Vec<&[u8]> {
    let block = block.strip_suffix(b"\0").unwrap_or(block);
    if block.is_empty() {
        return Vec::new();
    }
    block.split(|byte| *byte == 0).collect()
}

fn part(output: &[u8], name: &'static str) -> Result<Vec<u8>, Mismatch> {
    let truncated = || Mismatch::Truncated {
        part: name,
        length: output.len(),
    };
    let mut text = Vec::new();
    for line in output.split(|byte| *byte == b'\n') {
        let Some(rest) = line.strip_prefix(name.as_bytes()) else {
            continue;
        };
        match rest.strip_prefix(b" ").unwrap_or_default() {
            b"." => return STANDARD.decode(&text).map_err(|_| truncated()),
            rest => text.extend_from_slice(rest),
        }
    }
    Err(truncated())
}

fn show(bytes: &[u8]) -> String {
    let text = bytes.escape_ascii().to_string();
    match text.char_indices().nth(200) {
        Some((at, _)) => format!("\"{}…\" ({} bytes)", &text[..at], bytes.len()),
        None => format!("\"{text}\""),
    }
}
