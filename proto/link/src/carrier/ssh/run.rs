//! Runs one fixed script on the login node, with its input and output passed on. For installing an agent there.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};

use super::{Secret, Ssh};
use crate::{
    LinkError,
    carrier::{
        Carrier,
        exec::{Cause, CommandFailure, CommandIo},
    },
};

/// What is sent at once.
const CHUNK: usize = 64 << 10;

/// A script for `sh` that every login shell passes on as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Script(String);

impl Script {
    /// PURE: `None` if sh, csh and fish would not all read the script, in single quotes, as one word: a quote, a backslash
    /// (fish), an exclamation mark or a newline (csh). No value of a user belongs into it: such values go by standard input.
    #[must_use]
    pub fn new(script: &str) -> Option<Self> {
        let alike = |c: char| (c.is_ascii_graphic() || c == ' ') && !"'\\!".contains(c);
        let right = !script.is_empty() && script.chars().all(alike);
        right.then(|| Self(format!("sh -c '{script}'")))
    }
}

impl Ssh {
    /// Runs the script with `input` as its standard input, and returns its standard output, which may have `most` bytes.
    pub async fn run(
        &self,
        script: &Script,
        mut input: impl AsyncRead + Unpin,
        most: usize,
        limit: Duration,
    ) -> Result<Vec<u8>, LinkError> {
        let carrier = Carrier::Ssh(Box::new(self.clone()));
        let secret = || {
            let folder = self.login.folder.as_deref();
            let secret = folder.map(Secret::read).transpose()?;
            self.argv(secret.as_ref(), script.0.clone())
        };
        let (argv, held) = secret().map_err(|source| LinkError::Secret {
            carrier: carrier.clone(),
            source: Box::new(source),
        })?;
        let failed = |source| LinkError::Command {
            carrier: carrier.clone(),
            source: Box::new(source),
        };
        let io = CommandIo::start(argv.words(), held, &[]).map_err(failed)?;
        let (mut from, mut to) = tokio::io::split(io);
        let feed = async {
            let mut chunk = vec![0; CHUNK];
            loop {
                match input.read(&mut chunk).await? {
                    0 => return to.shutdown().await,
                    read => to.write_all(chunk.get(..read).unwrap_or_default()).await?,
                }
            }
        };
        let collect = async {
            let mut output = Vec::new();
            let bound = u64::try_from(most).unwrap_or(u64::MAX);
            (&mut from).take(bound).read_to_end(&mut output).await?;
            std::io::Result::Ok(output)
        };
        // If both fail, the end of the output knows why the command has ended.
        let both = async {
            let (sent, received) = tokio::join!(feed, collect);
            received.and_then(|output| sent.map(|()| output))
        };
        let done = tokio::time::timeout(limit, both).await;
        let done = done.map_err(|_| failed(CommandFailure::of(Cause::Late, String::new())))?;
        done.map_err(|error| {
            failed(match error.downcast::<CommandFailure>() {
                Ok(failure) => failure,
                Err(error) => CommandFailure::broken(error),
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_every_login_shell_reads_alike_is_a_script() {
        assert_eq!(
            Script::new("exec \"$HOME/x\" manage"),
            Some(Script("sh -c 'exec \"$HOME/x\" manage'".into()))
        );
        for wrong in ["", "a'b", "a\\b", "a!b", "a\nb", "ä"] {
            assert_eq!(Script::new(wrong), None, "{wrong:?}");
        }
    }
}
