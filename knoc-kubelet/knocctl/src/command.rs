//! The programs of the user's machine that knocctl runs (kubectl, helm, the agent's program beside it), with the user's own
//! environment. Each has a deadline, after which it is killed, and a bound on what is kept of its output. No shell is involved.

use std::{ffi::OsStr, io, process::Stdio, time::Duration};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};

/// How much is kept of each output.
const MOST: u64 = 1 << 20;

/// What a program said before it ended.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) ok: bool,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
}

impl Said {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim().to_owned()
    }

    /// The last line of stderr, or of stdout if that is empty.
    pub(crate) fn last(&self) -> String {
        let stderr = String::from_utf8_lossy(&self.stderr);
        let last = |text: &str| text.trim().lines().last().map(str::to_owned);
        let last = last(&stderr).or_else(|| last(&self.text()));
        last.unwrap_or_else(|| "it printed no reason".to_owned())
    }
}

/// Why a program did not run to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    #[error("there is no such program")]
    NotFound,
    #[error("start it")]
    Start(#[source] io::Error),
    #[error("no answer within {} s", .0.as_secs())]
    Late(Duration),
}

/// Runs the program with this input until it ends.
pub(crate) async fn run(
    program: &OsStr,
    args: &[&str],
    input: &[u8],
    limit: Duration,
) -> Result<Said, RunError> {
    let started = start(program, args);
    let mut child = started.map_err(|error| {
        if error.kind() == io::ErrorKind::NotFound {
            RunError::NotFound
        } else {
            RunError::Start(error)
        }
    })?;
    let stdin = child.stdin.take();
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let feed = async {
        if let Some(mut stdin) = stdin {
            // A program may end before it has read everything.
            stdin.write_all(input).await.ok();
        }
    };
    let work = async {
        let ((), stdout, stderr) = tokio::join!(feed, read(stdout), read(stderr));
        let status = child.wait().await?;
        Ok(Said {
            ok: status.success(),
            stdout: stdout?,
            stderr: stderr?,
        })
    };
    match tokio::time::timeout(limit, work).await {
        Ok(said) => said.map_err(RunError::Start),
        Err(_) => Err(RunError::Late(limit)),
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "this is the module that starts children"
)]
fn start(program: &OsStr, args: &[&str]) -> io::Result<tokio::process::Child> {
    let mut command = tokio::process::Command::new(program);
    command.args(args).kill_on_drop(true);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command.spawn()
}

async fn read(pipe: Option<impl AsyncRead + Unpin>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        pipe.take(MOST).read_to_end(&mut bytes).await?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_mins(2);

    #[tokio::test]
    async fn a_program_gets_its_input_and_is_heard_or_killed() {
        let run = |script: &'static str, limit| async move {
            run(OsStr::new("/bin/sh"), &["-c", script], b"word", limit).await
        };
        let said = run("cat; echo no >&2; exit 3", SOON).await.unwrap();
        assert_eq!(
            (said.ok, said.text(), said.last()),
            (false, "word".into(), "no".into())
        );
        let late = run("exec sleep 60", Duration::from_millis(50)).await;
        assert!(matches!(late, Err(RunError::Late(_))), "{late:?}");
        let none = super::run(OsStr::new("no-such-program"), &[], b"", SOON).await;
        assert!(matches!(none, Err(RunError::NotFound)), "{none:?}");
    }
}
