//! Children of `serve`: the only place of the agent that spawns one.
//!
//! Every command has an explicit environment, a deadline that kills its whole process group, and a
//! bound on what is kept of its output. A failure keeps the program's own words. Nothing here ever
//! meets a shell, and nothing is inherited from the agent's own environment.
//!
//! Owner task: none; whoever awaits [`Command::run`] owns the child. Cancel safety: dropping the
//! future kills the process group.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};

use crate::open_files;

/// Kept of each output stream where the command does not say otherwise.
const DEFAULT_CAPTURE: usize = 256 * 1024;
/// Deadline of a command that does not say otherwise.
const DEFAULT_DEADLINE: Duration = Duration::from_secs(30);
/// Of a failed command's output only this much goes into its error.
const WORDS_LIMIT: usize = 4096;
const READ_BUFFER: usize = 16 * 1024;

/// What programs expect of a login, as the agent was started with it: for sites whose file does not
/// name these variables. Read where settings are made, never later.
#[must_use]
pub fn login_environment() -> BTreeMap<String, String> {
    let names = ["HOME", "USER", "LOGNAME", "SHELL", "LANG"];
    let found = names
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), std::env::var(name).ok()?)));
    found.collect()
}

/// A program with all that it is given.
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

/// What a command that exited with 0 said.
#[derive(Debug, Clone)]
pub struct Output {
    /// At most the command's capture limit.
    pub stdout: Vec<u8>,
    /// At most the command's capture limit.
    pub stderr: Vec<u8>,
    /// More was written to stdout than is kept.
    pub truncated: bool,
    /// From spawn to exit.
    pub elapsed: Duration,
}

impl Output {
    /// Standard output as text; bytes that are no UTF-8 are replaced.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// A command that did not succeed.
#[derive(Debug, thiserror::Error)]
#[error("{} {kind}", program.display())]
pub struct CommandError {
    /// What was run.
    pub program: PathBuf,
    /// How it failed; its text is part of this error's.
    pub kind: CommandErrorKind,
}

/// How a command failed.
#[derive(Debug)]
pub enum CommandErrorKind {
    /// There is no such program, or it is not executable for us.
    NotFound,
    /// The process could not be started, or its pipes failed.
    Spawn(io::Error),
    /// The deadline passed; the process group was killed. Whether it had its effect is not known.
    Timeout {
        /// The deadline.
        after: Duration,
        /// What it had said until then.
        stderr: String,
    },
    /// It ended with another code than 0, or by a signal.
    Exit {
        /// Exit code, where it ended by itself.
        code: Option<i32>,
        /// Signal that ended it.
        signal: Option<i32>,
        /// Its own words.
        stdout: String,
        /// Its own words.
        stderr: String,
    },
}

impl fmt::Display for CommandErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound => f.write_str("is not there or not executable"),
            Self::Spawn(err) => write!(f, "could not be started: {err}"),
            Self::Timeout { after, .. } => write!(f, "did not end within {after:?}"),
            Self::Exit {
                code: Some(code), ..
            } => write!(f, "exited with code {code}"),
            Self::Exit { signal, .. } => write!(f, "was ended by signal {}", signal.unwrap_or(0)),
        }?;
        match self.words() {
            Some(words) => write!(f, ": {words}"),
            None => Ok(()),
        }
    }
}

impl CommandErrorKind {
    /// What the program itself said: stderr, else stdout.
    #[must_use]
    pub fn words(&self) -> Option<&str> {
        let (first, second) = match self {
            Self::NotFound | Self::Spawn(_) => return None,
            Self::Timeout { stderr, .. } => (stderr.trim(), ""),
            Self::Exit { stdout, stderr, .. } => (stderr.trim(), stdout.trim()),
        };
        [first, second].into_iter().find(|words| !words.is_empty())
    }
}

impl CommandError {
    /// What the program itself said, if anything.
    #[must_use]
    pub fn words(&self) -> Option<&str> {
        self.kind.words()
    }
}

impl Command {
    /// A command with nothing in its environment.
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

    /// Adds one variable.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env
            .push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Adds variables; of a name that comes twice the last one counts.
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

    /// What is written to its standard input; without this it reads from /dev/null.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// Its standard input, instead of bytes.
    #[must_use]
    pub fn stdin_file(mut self, file: &Arc<File>) -> Self {
        self.stdin_file = Some(Arc::clone(file));
        self
    }

    /// Where it runs.
    #[must_use]
    pub fn current_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.cwd = Some(dir.into());
        self
    }

    /// When it is killed.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// How much of each output stream is kept; the rest is read and thrown away.
    #[must_use]
    pub fn capture(mut self, bytes: usize) -> Self {
        self.capture = bytes;
        self
    }

    /// What is run.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Runs it to its end.
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
                    // A program may end without reading all; its exit code tells.
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
                let (after, stderr) = (self.deadline, err.words());
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

    /// Starts it in a session of its own, both output streams going to `output`, and lets go of it:
    /// it outlives the agent. Its deadline and capture limit do not apply. Returns its process id.
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
        // Through tokio, since its signal driver reaps children whose handle is gone.
        let child = tokio::process::Command::from(command)
            .spawn()
            .map_err(spawn_error)?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        pid.ok_or_else(|| CommandErrorKind::Spawn(io::Error::other("ended before it had an id")))
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
    let (stdout, stderr) = (out.words(), err.words());
    Err(CommandErrorKind::Exit {
        code: status.code(),
        signal: status.signal(),
        stdout,
        stderr,
    })
}

/// The process group of a child; dropping it kills what is left of the group.
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
            // ESRCH: the usual case, nothing is left. The group's id cannot be another's while a
            // member lives, and the leader was waited for at most an instant ago.
            killpg(group, Signal::SIGKILL).ok();
        }
    }
}

/// One output stream: read to its end, kept up to a limit.
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

    fn words(&self) -> String {
        let end = self.kept.len().min(WORDS_LIMIT);
        String::from_utf8_lossy(self.kept.get(..end).unwrap_or_default())
            .trim()
            .to_owned()
    }
}

#[cfg(test)]
mod tests;
