//! Child processes of the tests: argv, input, output and a deadline. Tests start child processes only here.

use std::{ffi::OsStr, fmt, process::Stdio, time::Duration};

use anyhow::{Context as _, bail};
use tokio::{
    io::AsyncWriteExt as _,
    process::{Child, Command},
    time::timeout,
};

/// The default deadline of a child process.
const DEADLINE: Duration = Duration::from_mins(2);

/// How a child process ended, and its output.
#[derive(Clone, Debug)]
pub struct Output {
    /// Exit code; 128 + signal if a signal ended it.
    pub code: i32,
    /// Bytes of standard output.
    pub stdout: Vec<u8>,
    /// Standard error, as text.
    pub stderr: String,
}

impl Output {
    /// Standard output as text, without the last line's end.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_owned()
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "code {}, stdout {:?}, stderr {:?}",
            self.code,
            self.text(),
            self.stderr
        )
    }
}

/// A command that is still to be run.
#[derive(Debug)]
pub struct Run {
    command: Command,
    argv: Vec<String>,
    stdin: Option<Vec<u8>>,
    deadline: Duration,
}

impl Run {
    /// A program of `PATH`, or a path.
    #[must_use]
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let argv = vec![program.as_ref().to_string_lossy().into_owned()];
        #[expect(
            clippy::disallowed_methods,
            reason = "the one place where tests start processes"
        )]
        let mut command = Command::new(program);
        command.kill_on_drop(true);
        Self {
            command,
            argv,
            stdin: None,
            deadline: DEADLINE,
        }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.argv.push(arg.as_ref().to_string_lossy().into_owned());
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(self, args: impl IntoIterator<Item = S>) -> Self {
        args.into_iter().fold(self, Self::arg)
    }

    /// Sets a variable of its environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Clears its environment, so that it has only the variables that `env` sets after this call.
    #[must_use]
    pub fn env_clear(mut self) -> Self {
        self.command.env_clear();
        self
    }

    /// Sets its standard input, which is empty by default.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(bytes.into());
        self
    }

    /// Sets the time limit of the command.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Runs it to its end, whatever its exit code.
    pub async fn output(mut self) -> anyhow::Result<Output> {
        let argv = self.argv.join(" ");
        let stdin = self.stdin.take();
        self.command.stdin(if stdin.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        });
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self
            .command
            .spawn()
            .with_context(|| format!("start `{argv}`"))?;
        let pipe = child.stdin.take();
        let feed = async move {
            if let (Some(mut pipe), Some(bytes)) = (pipe, stdin) {
                // A child may end without reading all of it.
                drop(pipe.write_all(&bytes).await);
            }
        };
        let both = async { tokio::join!(feed, child.wait_with_output()).1 };
        let Ok(output) = timeout(self.deadline, both).await else {
            bail!("`{argv}` has not ended after {:?}", self.deadline);
        };
        let output = output.with_context(|| format!("wait for `{argv}`"))?;
        Ok(Output {
            code: code_of(output.status),
            stdout: output.stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs an exec session that lets its own container end. The container's end kills what is still executed in it, so
    /// exit code 137 counts as 0.
    pub async fn ok_or_killed(self) -> anyhow::Result<Output> {
        const KILLED: i32 = 137;
        let argv = self.argv.join(" ");
        let output = self.output().await?;
        if ![0, KILLED].contains(&output.code) {
            bail!("`{argv}`: {output}");
        }
        Ok(output)
    }

    /// Runs it to its end; any exit code but 0 is an error.
    pub async fn ok(self) -> anyhow::Result<Output> {
        let argv = self.argv.join(" ");
        let output = self.output().await?;
        if output.code != 0 {
            bail!("`{argv}`: {output}");
        }
        Ok(output)
    }

    /// The underlying command, for settings that only one caller needs.
    pub(crate) fn command_mut(&mut self) -> &mut Command {
        &mut self.command
    }

    /// Starts it in the background, its output into `log`. It is killed when the handle is dropped.
    pub fn spawn(mut self, log: &std::path::Path) -> anyhow::Result<Child> {
        let input = match self.stdin.take() {
            Some(bytes) => {
                let path = log.with_extension("stdin");
                let mut file = std::fs::File::create_new(&path)?;
                std::io::Write::write_all(&mut file, &bytes)?;
                std::fs::File::open(path)?.into()
            }
            None => Stdio::null(),
        };
        self.spawn_with(input, log)
    }

    /// The same; the handle has a pipe for its standard input.
    pub(crate) fn spawn_piped(self, log: &std::path::Path) -> anyhow::Result<Child> {
        self.spawn_with(Stdio::piped(), log)
    }

    fn spawn_with(mut self, input: Stdio, log: &std::path::Path) -> anyhow::Result<Child> {
        let file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(log)?;
        self.command
            .stdin(input)
            .stdout(file.try_clone()?)
            .stderr(file);
        self.command
            .spawn()
            .with_context(|| format!("start `{}`", self.argv.join(" ")))
    }
}

/// 128 + signal if a signal ended it.
pub(crate) fn code_of(status: std::process::ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt as _;
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}
