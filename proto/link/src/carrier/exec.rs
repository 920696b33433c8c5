//! The carrier `exec:COMMAND`: the standard input and output of a command are the connection.
//!
//! The command ends in `knoc-agent connect` on the login node, such as `ssh login knoc-agent connect`. It is an argv:
//! no shell reads it. A login shell may print a banner first, so `connect` writes a [`marker`] line before the first byte
//! of the link, and everything up to that line is discarded, within bounds.
//!
//! Nothing is trusted because of the command: the link inside is TLS with our identities, as over TCP. Only a client
//! without a certificate relies on the command, and then the far side must have said that its socket is the plain one.
//!
//! The command is killed with its whole process group when the connection is dropped, and reaped by the runtime. The
//! end of its stderr becomes the cause of an error ([`failure`]).
use std::{fmt, str::FromStr, time::Duration};

use super::{Carrier, Dial, InvalidCarrier, Unverified};
use crate::{LinkError, origin::Origin};

mod failure;
pub mod marker;
mod running;

pub use failure::{Cause, CommandFailure};
pub use running::CommandIo;
pub(super) use running::Held;

use marker::Speaks;

/// From the start of the command to its marker: two hops of SSH on busy hosts, and the start of an agent on demand.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(40);
/// The most words of a command.
const MAX_WORDS: usize = 64;
/// The most bytes of a command.
const MAX_COMMAND: usize = 16 << 10;

/// A program and its arguments, with at least the program.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Argv(Vec<String>);

impl Argv {
    /// The words of a command, the first of which is the program.
    pub(super) fn new(words: Vec<String>) -> Result<Self, &'static str> {
        if words.first().is_none_or(String::is_empty) {
            return Err("it has no program");
        }
        if words.len() > MAX_WORDS || words.iter().map(String::len).sum::<usize>() > MAX_COMMAND {
            return Err("it is longer than 64 words or 16 KiB");
        }
        if words.iter().any(|word| word.contains('\0')) {
            return Err("it contains a NUL");
        }
        Ok(Self(words))
    }

    pub(super) fn words(&self) -> &[String] {
        &self.0
    }
}

/// PURE: whether a word means the same with and without a shell.
fn is_plain(word: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_@%+=:,./-".contains(c);
    !word.is_empty() && !word.starts_with('[') && word.chars().all(plain)
}

impl FromStr for Argv {
    type Err = InvalidCarrier;

    /// Reads plain words, or a JSON list of strings for anything else.
    fn from_str(text: &str) -> Result<Self, InvalidCarrier> {
        let wrong = |why: String| InvalidCarrier::Command {
            command: text.to_owned(),
            why,
        };
        let text = text.trim();
        let words = if text.starts_with('[') {
            serde_json::from_str(text)
                .map_err(|error| wrong(format!("it is not a JSON list of strings: {error}")))?
        } else {
            let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
            if let Some(word) = words.iter().find(|word| !is_plain(word)) {
                return Err(wrong(format!(
                    "no shell reads it, so {word:?} would not mean what it seems to; write the command as a list: \
                     exec:[\"PROGRAM\", \"ARGUMENT\"]"
                )));
            }
            words
        };
        Self::new(words).map_err(|why| wrong(why.to_owned()))
    }
}

impl fmt::Display for Argv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.iter().all(|word| is_plain(word)) {
            return f.write_str(&self.0.join(" "));
        }
        f.write_str(&serde_json::to_string(&self.0).unwrap_or_default())
    }
}

/// The carrier that the text after `exec:` names.
pub(super) fn parse(text: &str) -> Result<Carrier, InvalidCarrier> {
    text.parse().map(Carrier::Exec)
}

/// Starts a command for each connection.
#[derive(Debug)]
pub(crate) struct Dialler<'a> {
    /// The command.
    pub argv: &'a Argv,
    /// What it is called in errors.
    pub carrier: &'a Carrier,
    /// What the far side has to speak.
    pub speaks: Speaks,
}

impl Dial for Dialler<'_> {
    type Io = CommandIo;

    async fn dial(&self) -> Result<Unverified<CommandIo>, LinkError> {
        start(self.argv, self.carrier, self.speaks, Held::default(), &[]).await
    }
}

/// Starts the command, with these variables beside those of this process, and waits for its marker. `held` is dropped
/// once that has come.
pub(super) async fn start(
    argv: &Argv,
    carrier: &Carrier,
    speaks: Speaks,
    held: Held,
    variables: &[(&str, &str)],
) -> Result<Unverified<CommandIo>, LinkError> {
    let failed = |source| LinkError::Command {
        carrier: carrier.clone(),
        source: Box::new(source),
    };
    let io = CommandIo::start(argv.words(), held, variables).map_err(failed)?;
    let io = io
        .after_marker(speaks, COMMAND_TIMEOUT)
        .await
        .map_err(failed)?;
    Ok(Unverified {
        io,
        origin: Origin::Command,
    })
}

#[cfg(test)]
mod tests;
