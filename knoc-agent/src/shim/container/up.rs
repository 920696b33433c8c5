//! The runtime's process: started with the best root that works, until the launcher inside connects; and its end.

use std::{
    io,
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use knoc_proto::pb;
use rustix::process::Signal;
use tokio::{
    net::{UnixListener, UnixStream},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use super::{
    super::{
        children::{Child, Exit},
        fdio::Stream,
        gpus, output,
        pod::Pod,
        signals::{self, Identity},
    },
    Attempt, AttemptError,
    folders::{Folders, PrepareError},
};
use crate::runtime::{Root, Sandbox};

/// How much of the runtime's own words is kept.
const WORDS: usize = 4096;

/// How long a runtime may live on after it was told to end, or its program was killed.
const RUNTIME_GRACE: Duration = Duration::from_secs(5);

/// How long the runtime's helpers may hold its standard error after its end.
const WORDS_GRACE: Duration = Duration::from_millis(500);

/// The runtime's process, and what it says.
pub(super) struct Runtime {
    pub(super) child: Child,
    words: Arc<Mutex<Vec<u8>>>,
    /// Reads the words.
    tasks: JoinSet<io::Result<()>>,
    /// Does it lead a process group?
    group: bool,
}

/// A runtime whose launcher waits for what to become.
pub(super) struct Up {
    pub(super) runtime: Runtime,
    pub(super) socket: UnixStream,
    pub(super) identity: Identity,
}

/// Starts the runtime, with the best root that works, until its launcher connects.
pub(super) async fn bring_up(
    pod: &Arc<Pod>,
    attempt: &Attempt,
    folders: &Folders,
    container: &pb::Container,
    image: &Path,
) -> Result<Up, AttemptError> {
    let listener = folders.listen()?;
    let mut roots = if container.read_only_root {
        vec![Root::ReadOnly]
    } else {
        pod.runtime.writable_roots(&folders.root)
    };
    let mut first_words = None;
    while !roots.is_empty() {
        let sandbox = Sandbox {
            image: image.to_owned(),
            agent: pod.agent.clone(),
            folder: folders.shared.clone(),
            binds: folders.binds.clone(),
            hostname: if pod.runtime.isolates() {
                pod.facts.hostname.clone()
            } else {
                String::new()
            },
            root: roots.remove(0),
            work: (!container.read_only_root).then(|| folders.work.clone()),
            fakeroot: container.fakeroot,
            gpus: gpus::asked(container),
        };
        match start(pod, attempt, &sandbox, &listener).await {
            Err(AttemptError::Runtime(words)) => {
                tracing::warn!(root = ?sandbox.root, %words, "the runtime gave up");
                first_words.get_or_insert(words);
            }
            other => return other,
        }
    }
    Err(AttemptError::Runtime(first_words.unwrap_or_default()))
}

async fn start(
    pod: &Arc<Pod>,
    attempt: &Attempt,
    sandbox: &Sandbox,
    listener: &UnixListener,
) -> Result<Up, AttemptError> {
    let argv = pod.runtime.argv(sandbox).map_err(PrepareError::Runtime)?;
    let mut runtime = spawn(pod, &argv).map_err(PrepareError::Spawn)?;
    loop {
        tokio::select! {
            biased;
            connected = listener.accept() => {
                let (socket, _) = connected.map_err(PrepareError::Pipes)?;
                if let Some(identity) = peer(&socket) {
                    return Ok(Up { runtime, socket, identity });
                }
            }
            exit = runtime.child.wait() => {
                return Err(AttemptError::Runtime(runtime.last_words(exit).await));
            }
            () = attempt.abort.cancelled() => {
                runtime.end().await;
                return Err(AttemptError::Aborted);
            }
        }
    }
}

/// The launcher, if it is one of ours.
fn peer(socket: &UnixStream) -> Option<Identity> {
    let credentials = rustix::net::sockopt::socket_peercred(socket).ok()?;
    if credentials.uid != rustix::process::getuid() {
        return None;
    }
    Identity::of(u32::try_from(credentials.pid.as_raw_nonzero().get()).ok()?)
}

#[expect(
    clippy::disallowed_methods,
    reason = "the shim's one module that starts containers"
)]
fn spawn(pod: &Pod, argv: &[std::ffi::OsString]) -> io::Result<Runtime> {
    let [program, arguments @ ..] = argv else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(&pod.job.runtime_env)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    // A launcher that is the program itself must be able to lead a session.
    let group = pod.runtime.isolates();
    let mut child = pod.children.spawn(&mut command, group)?;
    let words = Arc::new(Mutex::new(Vec::new()));
    let mut tasks = JoinSet::new();
    if let Some(stderr) = child.stderr.take() {
        let stream = Stream::new(stderr.into())?;
        tasks.spawn(output::keep_tail(stream, WORDS, Arc::clone(&words)));
    }
    Ok(Runtime {
        child,
        words,
        tasks,
        group,
    })
}

impl Runtime {
    /// Waits for the end of the container. Once aborted, a runtime that outlives its program is killed too.
    pub(super) async fn ended(&mut self, abort: &CancellationToken, program: Identity) -> Exit {
        tokio::select! {
            biased;
            exit = self.child.wait() => return exit,
            () = abort.cancelled() => {}
        }
        if let Ok(exit) = tokio::time::timeout(RUNTIME_GRACE, self.child.wait()).await {
            return exit;
        }
        signals::to_program(program, Signal::KILL);
        self.signal(Signal::KILL);
        self.child.wait().await
    }

    /// Ends a runtime whose program does not run.
    pub(super) async fn end(&mut self) {
        // Killing it at once would leave its file system helpers behind.
        self.signal(Signal::TERM);
        if tokio::time::timeout(RUNTIME_GRACE, self.child.wait())
            .await
            .is_err()
        {
            self.signal(Signal::KILL);
            self.child.wait().await;
        }
    }

    fn signal(&self, signal: Signal) {
        if self.group {
            signals::to_group(self.child.pid, signal);
        } else {
            signals::send(self.child.pid, signal);
        }
    }

    async fn last_words(&mut self, exit: Exit) -> String {
        // Its helpers may hold the pipe: what they would say is not waited for.
        tokio::time::timeout(WORDS_GRACE, self.tasks.join_next())
            .await
            .ok();
        let words = self.words.lock().unwrap_or_else(PoisonError::into_inner);
        let words = String::from_utf8_lossy(&words).trim().to_owned();
        if words.is_empty() {
            format!("the runtime ended with code {}", exit.code)
        } else {
            words
        }
    }
}
