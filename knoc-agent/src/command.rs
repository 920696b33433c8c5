//! Child processes of `serve`. This is the only module of the agent that spawns them.
//!
//! Every command has an explicit environment, a deadline after which its whole process group is
//! killed, and a limit on how much of its output is kept. A failure keeps the program's own
//! message. No shell is involved, and nothing is inherited from the agent's own environment.
//!
//! Owner task: none; the task that awaits [`Command::run`] owns the child. Cancel safety: dropping
//! the future kills the process group.

pub mod relay;

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fmt,
    fs::File,
    io,
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};

use crate::open_files;

/// How much of each output stream is kept unless the command sets another limit.
const DEFAULT_CAPTURE: usize = 256 * 1024;
/// The deadline of a command that sets none.
const DEFAULT_DEADLINE: Duration = Duration::from_secs(30);
/// How much of a failed command's output goes into its error.
const MESSAGE_LIMIT: usize = 4096;
const READ_BUFFER: usize = 16 * 1024;

/// The variables of the agent's login that programs expect, for sites whose site file does not set
/// them. Read once, when the settings are loaded.
#[must_use]
pub fn login_environment() -> BTreeMap<String, String> {
    let names = ["HOME", "USER", "LOGNAME", "SHELL", "LANG"];
    let found = names
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), std::env::var(name).ok()?)));
    found.collect()
}

/// A program with its arguments, environment, input and limits.
#[derive(Debug, Clone)]
pub struct Command {
    program: PathBuf,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    stdin: Vec<u8>,
    stdin_file: Option<Arc<File>>,
    cwd: Option<PathBuf>,
    deadline: Duration,
    capture: usize,
}

/// The output of a command that exited with code 0.
#[derive(Debug, Clone)]
pub struct Output {
    /// Standard output, at most as much as the command's capture limit.
    pub stdout: Vec<u8>,
    /// Standard error, at most as much as the command's capture limit.
    pub stderr: Vec<u8>,
    /// Whether more was written to stdout than is kept.
    pub truncated: bool,
    /// The time from spawn to exit.
    pub elapsed: Duration,
}

impl Output {
    /// Standard output as text; bytes that are not UTF-8 are replaced.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// A command that failed.
#[derive(Debug, thiserror::Error)]
#[error("{} {kind}", program.display())]
pub struct CommandError {
    /// The program that was run.
    pub program: PathBuf,
    /// How it failed; its text is part of this error's text.
    pub kind: CommandErrorKind,
}

/// How a command failed.
#[derive(Debug)]
pub enum CommandErrorKind {
    /// The program does not exist, or we may not execute it.
    NotFound,
    /// The process could not be started, or its pipes failed.
    Spawn(io::Error),
    /// The deadline passed and the process group was killed. Whether the command had its effect is
    /// unknown.
    Timeout {
        /// The deadline.
        after: Duration,
        /// What it had written to stderr before it was killed.
        stderr: String,
    },
    /// It exited with a code other than 0, or was killed by a signal.
    Exit {
        /// The exit code, if it exited by itself.
        code: Option<i32>,
        /// The signal that killed it.
        signal: Option<i32>,
        /// Its standard output.
        stdout: String,
        /// Its standard error.
        stderr: String,
    },
}

impl fmt::Display for CommandErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound => f.write_str("does not exist or is not executable"),
            Self::Spawn(err) => write!(f, "could not be started: {err}"),
            Self::Timeout { after, .. } => write!(f, "did not end within {after:?}"),
            Self::Exit {
                code: Some(code), ..
            } => write!(f, "exited with code {code}"),
            Self::Exit { signal, .. } => write!(f, "was killed by signal {}", signal.unwrap_or(0)),
        }?;
        match self.message() {
            Some(message) => write!(f, ": {message}"),
            None => Ok(()),
        }
    }
}

impl CommandErrorKind {
    /// The program's own message: stderr, or stdout if stderr is empty.
    #[must_use]
    pub fn message(&self) -> Option<&str> {
        let (first, second) = match self {
            Self::NotFound | Self::Spawn(_) => return None,
            Self::Timeout { stderr, .. } => (stderr.trim(), ""),
            Self::Exit { stdout, stderr, .. } => (stderr.trim(), stdout.trim()),
        };
        [first, second]
            .into_iter()
            .find(|message| !message.is_empty())
    }
}

impl CommandError {
    /// The program's own message, if it wrote any.
    #[must_use]
    pub fn message(&self) -> Option<&str> {
        self.kind.message()
    }
}

impl Command {
    /// Creates a command whose environment is empty.
    #[must_use]
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            stdin: Vec::new(),
            stdin_file: None,
            cwd: None,
            deadline: DEFAULT_DEADLINE,
            capture: DEFAULT_CAPTURE,
        }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(mut self, args: I) -> Self {
        self.args
            .extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets one variable.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env
            .push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Sets variables; if a name occurs twice, the last value counts.
    #[must_use]
    pub fn envs<'a, I, K, V>(mut self, vars: I) -> Self
    where
        I: IntoIterator<Item = (&'a K, &'a V)>,
        K: AsRef<OsStr> + ?Sized + 'a,
        V: AsRef<OsStr> + ?Sized + 'a,
    {
        let vars = vars.into_iter();
        self.env
            .extend(vars.map(|(k, v)| (k.as_ref().to_owned(), v.as_ref().to_owned())));
        self
    }

    /// Sets the bytes for its standard input; by default it reads from /dev/null.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// Sets a file as its standard input, instead of bytes.
    #[must_use]
    pub fn stdin_file(mut self, file: &Arc<File>) -> Self {
        self.stdin_file = Some(Arc::clone(file));
        self
    }

    /// Sets its working directory.
    #[must_use]
    pub fn current_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.cwd = Some(dir.into());
        self
    }

    /// Sets the time after which it is killed.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Sets how much of each output stream is kept; the rest is read and discarded.
    #[must_use]
    pub fn capture(mut self, bytes: usize) -> Self {
        self.capture = bytes;
        self
    }

    /// The program that is run.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Runs the command until it ends.
    pub async fn run(self) -> Result<Output, CommandError> {
        let program = self.program.clone();
        let begin = Instant::now();
        match self.run_inner().await {
            Ok(output) => {
                tracing::debug!(program = %program.display(), elapsed = ?output.elapsed, "ran");
                Ok(output)
            }
            Err(kind) => {
                let elapsed = begin.elapsed();
                tracing::debug!(program = %program.display(), ?elapsed, error = %kind, "failed");
                Err(CommandError { program, kind })
            }
        }
    }

    async fn run_inner(self) -> Result<Output, CommandErrorKind> {
        let begin = Instant::now();
        let mut child = self.std_command(Stdio::piped(), Stdio::piped())?;
        child.process_group(0);
        let mut child = tokio::process::Command::from(child)
            .spawn()
            .map_err(spawn_error)?;
        let group = Group::of(&child);
        let stdin = child.stdin.take();
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (mut out, mut err) = (Capture::new(self.capture), Capture::new(self.capture));
        let input = self.stdin;
        let work = async {
            let feed = async {
                if let Some(mut pipe) = stdin {
                    // A program may exit before it has read all input; its exit code says whether
                    // that is an error.
                    drop(pipe.write_all(&input).await);
                }
            };
            let (status, (), read_out, read_err) =
                tokio::join!(child.wait(), feed, out.fill(stdout), err.fill(stderr));
            read_out.and(read_err).and(status)
        };
        let status = tokio::time::timeout(self.deadline, work).await;
        drop(group);
        let status = match status {
            Ok(status) => status.map_err(CommandErrorKind::Spawn)?,
            Err(_elapsed) => {
                let (after, stderr) = (self.deadline, err.message());
                return Err(CommandErrorKind::Timeout { after, stderr });
            }
        };
        check(status, &out, &err)?;
        let truncated = out.truncated;
        Ok(Output {
            stdout: out.kept,
            stderr: err.kept,
            truncated,
            elapsed: begin.elapsed(),
        })
    }

    /// Starts the command in a session of its own, with both output streams going to `output`, and
    /// detaches it: it outlives the agent. Its deadline and capture limit do not apply. Returns its
    /// process ID.
    pub fn spawn_detached(self, output: File) -> Result<i32, CommandError> {
        let program = self.program.clone();
        self.detach(output)
            .map_err(|kind| CommandError { program, kind })
    }

    fn detach(self, output: File) -> Result<i32, CommandErrorKind> {
        let second = output.try_clone().map_err(CommandErrorKind::Spawn)?;
        let mut command = self.std_command(Stdio::from(output), Stdio::from(second))?;
        command.stdin(Stdio::null());
        own_session(&mut command);
        // Spawned through tokio, because its signal handler reaps children whose handle was
        // dropped.
        let child = tokio::process::Command::from(command)
            .spawn()
            .map_err(spawn_error)?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        pid.ok_or_else(|| {
            CommandErrorKind::Spawn(io::Error::other(
                "the process ended before its ID was known",
            ))
        })
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "this is the module that starts children"
    )]
    fn std_command(
        &self,
        out: Stdio,
        err: Stdio,
    ) -> Result<std::process::Command, CommandErrorKind> {
        if self.program.as_os_str().is_empty() {
            return Err(CommandErrorKind::NotFound);
        }
        let mut command = std::process::Command::new(&self.program);
        command.args(&self.args).env_clear().stdout(out).stderr(err);
        command.envs(self.env.iter().map(|(k, v)| (k, v)));
        command.stdin(match &self.stdin_file {
            Some(file) => Stdio::from(file.try_clone().map_err(CommandErrorKind::Spawn)?),
            None if self.stdin.is_empty() => Stdio::null(),
            None => Stdio::piped(),
        });
        if let Some(dir) = &self.cwd {
            command.current_dir(dir);
        }
        open_files::keep_for_child(&mut command);
        Ok(command)
    }
}

#[expect(
    unsafe_code,
    reason = "setsid between fork and exec: one async-signal-safe call"
)]
fn own_session(command: &mut std::process::Command) {
    // SAFETY: setsid(2) is async-signal-safe and allocates nothing.
    unsafe {
        command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(io::Error::from));
    }
}

fn spawn_error(err: io::Error) -> CommandErrorKind {
    let absent = [io::ErrorKind::NotFound, io::ErrorKind::PermissionDenied];
    if absent.contains(&err.kind()) {
        CommandErrorKind::NotFound
    } else {
        CommandErrorKind::Spawn(err)
    }
}

fn check(status: ExitStatus, out: &Capture, err: &Capture) -> Result<(), CommandErrorKind> {
    if status.success() {
        return Ok(());
    }
    let (stdout, stderr) = (out.message(), err.message());
    Err(CommandErrorKind::Exit {
        code: status.code(),
        signal: status.signal(),
        stdout,
        stderr,
    })
}

/// The process group of a child; dropping it kills whatever is left of the group.
struct Group(Option<Pid>);

impl Group {
    fn of(child: &tokio::process::Child) -> Self {
        Self(
            child
                .id()
                .and_then(|pid| i32::try_from(pid).ok())
                .map(Pid::from_raw),
        )
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // ESRCH is the usual case: nothing is left. The group's ID cannot have been reused
            // while a member lives, and the leader was reaped only a moment ago.
            killpg(group, Signal::SIGKILL).ok();
        }
    }
}

/// One output stream: read until it ends, kept up to a limit.
struct Capture {
    kept: Vec<u8>,
    limit: usize,
    truncated: bool,
}

impl Capture {
    fn new(limit: usize) -> Self {
        Self {
            kept: Vec::new(),
            limit,
            truncated: false,
        }
    }

    async fn fill(&mut self, pipe: Option<impl AsyncRead + Unpin>) -> io::Result<()> {
        let Some(mut pipe) = pipe else { return Ok(()) };
        let mut buffer = vec![0; READ_BUFFER];
        loop {
            let n = pipe.read(&mut buffer).await?;
            if n == 0 {
                return Ok(());
            }
            let room = self.limit - self.kept.len();
            self.truncated |= n > room;
            self.kept.extend(buffer.iter().take(n.min(room)));
        }
    }

    fn message(&self) -> String {
        let end = self.kept.len().min(MESSAGE_LIMIT);
        String::from_utf8_lossy(self.kept.get(..end).unwrap_or_default())
            .trim()
            .to_owned()
    }
}

#[cfg(test)]
mod tests;
