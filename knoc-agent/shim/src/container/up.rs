//! Starts the runtime's process with the best root that works, waits until the launcher inside connects, and ends the
//! runtime.

use std::{
    io,
    os::{
        fd::OwnedFd,
        unix::{fs::MetadataExt as _, net::UnixStream as StdUnixStream},
    },
    path::{Path, PathBuf},
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
        gpus,
        handshake::{self, HandshakeError, Launched},
        mounts::Named,
        output,
        pod::Pod,
        processes::{Helper, ProcessesError},
        ranks::node::NodeFolder,
        signals::{self, Identity},
    },
    Attempt, AttemptError, Event, KILLED, News, Unmounted,
    folders::{Folders, PrepareError},
};
use crate::{
    launch::{
        beside::Beside,
        contain::spec::{ContainSpec, MountSpec},
    },
    runtime::{COMPRESSION, Root, Sandbox, Work, blames_compression, names_squashfs},
    sif,
};

/// How many bytes of the runtime's standard error are kept, counted from its end.
const STDERR_BYTES: usize = 4096;

/// How long a runtime may live on after it was sent TERM, or after its program was killed.
const RUNTIME_GRACE: Duration = Duration::from_secs(5);

/// How long a killed container may take to end. The kernel ends its processes at once, unless it keeps them in an operation that nothing
/// interrupts, as on a file system that hangs.
const AFTER_KILL: Duration = Duration::from_secs(30);

/// How often the shim looks whether a killed program has ended, which is not its child.
const LOOK: Duration = Duration::from_millis(100);

/// The message of a container that did not end.
const STUCK: &str = "its processes were killed (SIGKILL) and have not ended: the kernel keeps them in an operation that nothing \
    interrupts (state D), as on a file system or a device that hangs";

/// How long the runtime's helpers may keep its standard error open after the runtime has ended.
const STDERR_GRACE: Duration = Duration::from_millis(500);

/// The variables by which a runtime keeps no images of its own. It then takes each image that it unpacks for one of its own, and
/// removes it: that would be the file in the agent's cache, or the site's.
const REMOVES_IMAGES: [&str; 2] = ["APPTAINER_DISABLE_CACHE", "SINGULARITY_DISABLE_CACHE"];

/// The runtime's process and its standard error.
pub(super) struct Runtime {
    pub(super) child: Child,
    stderr: Arc<Mutex<Vec<u8>>>,
    /// Reads standard error.
    tasks: JoinSet<io::Result<()>>,
    /// Whether it leads a process group.
    group: bool,
    /// Whether it was killed and has not ended.
    stuck: bool,
}

/// A runtime whose launcher has connected and waits for its specification.
pub(super) struct Up {
    pub(super) runtime: Runtime,
    pub(super) socket: UnixStream,
    pub(super) identity: Identity,
    /// The process whose PID namespace it shares.
    pub(super) beside: Option<Beside>,
    /// The volume that holds the termination message, if it lies in one.
    pub(super) message: Option<OwnedFd>,
}

/// Starts the runtime, with the best root that works, until its launcher connects.
pub(super) async fn bring_up(
    pod: &Arc<Pod>,
    attempt: &Attempt,
    folders: &Folders,
    container: &pb::Container,
) -> Result<Up, AttemptError> {
    let listener = folders.listen()?;
    let beside = shared_processes(pod, attempt, container).await?;
    if pod.runtime.isolates() && !pod.mounting.by_name() {
        let named = folders.mounts().staged();
        let starting = Starting {
            pod,
            attempt,
            folders,
            listener: &listener,
            specs: Some(folders.mounts().specs()),
            beside,
        };
        match starting.with_best_root(container, named).await {
            Err(AttemptError::NoNamespaces { errno, what })
                if beside.is_none() && pod.network.is_host() && pod.mounting.is_final(errno) =>
            {
                tracing::warn!(error = %what, "no user namespaces: volumes are mounted by name");
                pod.mounting.only_by_name();
            }
            Ok(up) => {
                pod.mounting.worked();
                return Ok(up);
            }
            Err(other) => return Err(other),
        }
    }
    let named = by_name(pod, attempt, folders).await?;
    let starting = Starting {
        pod,
        attempt,
        folders,
        listener: &listener,
        specs: None,
        beside: None,
    };
    starting.with_best_root(container, named).await
}

/// The process whose PID namespace the container shares: that of the pod, of its target, of the ranks on this node, or none.
/// Without isolation all containers see all processes.
async fn shared_processes(
    pod: &Pod,
    attempt: &Attempt,
    container: &pb::Container,
) -> Result<Option<Beside>, AttemptError> {
    let ranks = pod
        .shared
        .as_ref()
        .and_then(|shared| shared.processes.as_ref());
    if let Some(folder) = ranks {
        return of_ranks(pod, attempt, (container, folder)).await;
    }
    let shares = pod.spec().share_process_namespace;
    if !pod.runtime.isolates() || !shares && attempt.target.is_none() {
        return Ok(None);
    }
    if pod.mounting.by_name() {
        return Err(ProcessesError::NoNamespaces.into());
    }
    if !shares {
        return Ok(attempt.target.map(Beside::container));
    }
    Ok(Some(Beside::holder(pod.holder.first(helper(pod)).await?)))
}

/// The process whose PID namespace the ranks on this node share, if the node and the runtime can do that. A rank can do without.
async fn of_ranks(
    pod: &Pod,
    attempt: &Attempt,
    (container, folder): (&pb::Container, &Arc<NodeFolder>),
) -> Result<Option<Beside>, AttemptError> {
    // Root's rights in a container need a user namespace of its own for the subordinate ids.
    if !pod.runtime.isolates() || pod.mounting.by_name() || container.fakeroot {
        return Ok(None);
    }
    let first = tokio::select! {
        biased;
        first = pod.holder.of_node(folder, helper(pod)) => first,
        () = attempt.abort.cancelled() => return Err(AttemptError::Aborted),
    };
    match first {
        Ok(first) => Ok(Some(Beside::holder(first))),
        // The start of the container will find the same.
        Err(ProcessesError::Hold(HandshakeError::NoNamespaces { errno, .. }))
            if pod.mounting.is_final(errno) =>
        {
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

fn helper(pod: &Pod) -> Helper<'_> {
    Helper {
        agent: &pod.agent,
        children: &pod.children,
        users: &pod.mounting.users,
        network: &pod.network,
    }
}

/// Resolves the names on a blocking thread: a file system that the pod mounts may hang.
async fn by_name(pod: &Pod, attempt: &Attempt, folders: &Folders) -> Result<Named, AttemptError> {
    if !pod.runtime.isolates() {
        // Nothing is mounted, so the launcher is started by its path on the host.
        return Ok(Named {
            agent: pod.agent.clone(),
            ..folders.mounts().staged()
        });
    }
    let mounts = folders.mounts().clone();
    let naming = tokio::task::spawn_blocking(move || mounts.names());
    tokio::select! {
        biased;
        named = naming => match named {
            Ok(named) => Ok(named.map_err(PrepareError::Name)?),
            Err(error) => Err(PrepareError::Pipes(io::Error::other(error)).into()),
        },
        () = attempt.abort.cancelled() => Err(AttemptError::Aborted),
    }
}

/// Whether the image is a folder of another user, as sites keep them. By its name in the node's file system: only what the temporary
/// folders are made of depends on it. The image may lie on a file system that hangs, so `abort` ends the wait.
async fn is_foreign_folder(image: &Path, abort: &CancellationToken) -> Result<bool, AttemptError> {
    let own = rustix::process::getuid().as_raw();
    let looking = abort.run_until_cancelled(tokio::fs::metadata(image));
    let found = looking.await.ok_or(AttemptError::Aborted)?;
    Ok(found.is_ok_and(|found| found.is_dir() && found.uid() != own))
}

/// What every try to start the runtime needs.
struct Starting<'a> {
    pod: &'a Pod,
    attempt: &'a Attempt,
    folders: &'a Folders,
    listener: &'a UnixListener,
    /// What the helper mounts first; `None` if the runtime is started without the helper.
    specs: Option<Vec<MountSpec>>,
    /// The process whose PID namespace the container shares.
    beside: Option<Beside>,
}

impl Starting<'_> {
    async fn with_best_root(
        &self,
        container: &pb::Container,
        named: Named,
    ) -> Result<Up, AttemptError> {
        let Named {
            image,
            agent,
            binds,
            base,
        } = named;
        let (pod, folders) = (self.pod, self.folders);
        let work = folders.work.clone();
        let image_path = Path::new(&self.attempt.spec.image.path);
        let work = if is_foreign_folder(image_path, &self.attempt.abort).await? {
            Work::Needed(work)
        } else {
            Work::Spare(work)
        };
        let mut sandbox = Sandbox {
            binds,
            image,
            agent,
            folder: folders.shared.clone(),
            hostname: if pod.runtime.isolates() {
                pod.facts.hostname.kernel.clone()
            } else {
                String::new()
            },
            root: Root::ReadOnly,
            work: (!container.read_only_root).then_some(work),
            fakeroot: container.fakeroot,
            gpus: gpus::asked(container),
            shares_processes: self.beside.is_some(),
            unpacked: false,
        };
        let roots = if container.read_only_root {
            vec![Root::ReadOnly]
        } else {
            pod.runtime.writable_roots(&folders.root)
        };
        let up = match self.try_roots(&mut sandbox, &roots).await {
            Err(AttemptError::Runtime(message)) => {
                self.try_unpacked(&mut sandbox, &roots, message).await
            }
            other => other,
        }?;
        let message = up.message.or(base);
        Ok(Up { message, ..up })
    }

    /// Tries one kind of root after the other. If all fail, the first message counts.
    async fn try_roots(&self, sandbox: &mut Sandbox, roots: &[Root]) -> Result<Up, AttemptError> {
        let mut first_message = None;
        for root in roots {
            sandbox.root = root.clone();
            match self.start(sandbox).await {
                Err(AttemptError::Runtime(message)) => {
                    let message = self.folders.mounts().with_own_names(&message);
                    tracing::warn!(root = ?sandbox.root, %message, "the runtime failed; the next kind of root is tried, if there is one");
                    first_message.get_or_insert(message);
                }
                other => return other,
            }
        }
        Err(AttemptError::Runtime(first_message.unwrap_or_default()))
    }

    /// Has the runtime unpack the image, if `message` says that it could not mount it, and the image is not compressed with gzip.
    async fn try_unpacked(
        &self,
        sandbox: &mut Sandbox,
        roots: &[Root],
        message: String,
    ) -> Result<Up, AttemptError> {
        let compression = if names_squashfs(&message) {
            self.other_compression().await?
        } else {
            None
        };
        let Some(compression) = compression else {
            return Err(AttemptError::Runtime(message));
        };
        tracing::warn!(
            compression,
            "the runtime could not mount the image, and is to unpack it"
        );
        sandbox.unpacked = true;
        let up = self.try_roots(sandbox, roots).await;
        let event = Event {
            id: self.attempt.spec.id,
            attempt: self.attempt.number,
            news: News::Unmounted(Unmounted {
                compression,
                // The message may have paths of the pod's.
                at_fault: blames_compression(&message)
                    && !self.folders.mounts().mention(COMPRESSION),
                by_agent: self.attempt.spec.image.file.is_none(),
                unpacked: up.is_ok(),
            }),
        };
        // In the helper of a rank nobody reads it.
        self.attempt.events.send(event).await.ok();
        match up {
            Err(AttemptError::Runtime(also)) => Err(AttemptError::Runtime(format!(
                "{message}; nor could it unpack the image: {also}"
            ))),
            other => other,
        }
    }

    /// The compression of the image, if it is not gzip. Read on a blocking thread: the file system may hang.
    async fn other_compression(&self) -> Result<Option<&'static str>, AttemptError> {
        let path = PathBuf::from(&self.attempt.spec.image.path);
        let reading = tokio::task::spawn_blocking(move || sif::other_compression(&path));
        tokio::select! {
            biased;
            read = reading => Ok(read.ok().flatten()),
            () = self.attempt.abort.cancelled() => Err(AttemptError::Aborted),
        }
    }

    async fn start(&self, sandbox: &Sandbox) -> Result<Up, AttemptError> {
        let argv = self.pod.runtime.argv(sandbox);
        let argv = argv.map_err(PrepareError::Runtime)?;
        // What is unpacked goes away with the folders of the attempt, however the runtime ends.
        let unpack = sandbox.unpacked.then_some(&*self.folders.work);
        let (mut runtime, message) = match &self.specs {
            None => (
                spawn(self.pod, &argv, Stdio::null(), unpack).map_err(PrepareError::Spawn)?,
                None,
            ),
            Some(mounts) => {
                let joined = self.pod.network.to_join().map_err(PrepareError::Pipes)?;
                let (network, namespaces) =
                    joined.map_or((None, Vec::new()), |to| (Some(to.ids), to.namespaces));
                let spec = ContainSpec {
                    argv,
                    users: self.pod.mounting.users.clone(),
                    root: sandbox.fakeroot,
                    network,
                    mounts: mounts.clone(),
                    beside: self.beside,
                };
                self.contain(&spec, namespaces, unpack).await?
            }
        };
        loop {
            tokio::select! {
                biased;
                connected = self.listener.accept() => {
                    let (socket, _) = connected.map_err(PrepareError::Pipes)?;
                    if let Some(identity) = peer(&socket) {
                        let beside = self.beside;
                        return Ok(Up { runtime, socket, identity, beside, message });
                    }
                }
                exit = runtime.child.wait() => {
                    return Err(AttemptError::Runtime(runtime.end_message(exit).await));
                }
                () = self.attempt.abort.cancelled() => {
                    runtime.end().await;
                    return Err(AttemptError::Aborted);
                }
            }
        }
    }

    /// Starts the helper, which mounts the volumes and then executes the runtime.
    async fn contain(
        &self,
        spec: &ContainSpec,
        namespaces: Vec<OwnedFd>,
        unpack: Option<&Path>,
    ) -> Result<(Runtime, Option<OwnedFd>), AttemptError> {
        let (ours, theirs) = StdUnixStream::pair().map_err(PrepareError::Pipes)?;
        ours.set_nonblocking(true).map_err(PrepareError::Pipes)?;
        let ours = UnixStream::from_std(ours).map_err(PrepareError::Pipes)?;
        let argv = [self.pod.agent.clone().into(), "contain".into()];
        let stdin = Stdio::from(OwnedFd::from(theirs));
        let mut runtime = spawn(self.pod, &argv, stdin, unpack).map_err(PrepareError::Spawn)?;
        let contained = tokio::select! {
            biased;
            contained = handshake::contain(ours, spec, namespaces) => contained,
            () = self.attempt.abort.cancelled() => {
                runtime.end().await;
                return Err(AttemptError::Aborted);
            }
        };
        let error = match contained {
            Ok(Launched { master, .. }) => return Ok((runtime, master)),
            Err(HandshakeError::NoNamespaces { errno, what }) => {
                AttemptError::NoNamespaces { errno, what }
            }
            Err(HandshakeError::Failed { what, .. }) => PrepareError::Mount(what).into(),
            Err(error @ (HandshakeError::Socket(_) | HandshakeError::Wire(_))) => {
                AttemptError::Start(error)
            }
        };
        // The helper has reported the error, and exits.
        runtime.end().await;
        Err(error)
    }
}

/// The process at the other end, if it belongs to this user.
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
fn spawn(
    pod: &Pod,
    argv: &[std::ffi::OsString],
    stdin: Stdio,
    unpack: Option<&Path>,
) -> io::Result<Runtime> {
    let [program, arguments @ ..] = argv else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(&pod.job.runtime_env)
        .current_dir("/")
        .stdin(stdin)
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    for name in REMOVES_IMAGES {
        command.env_remove(name);
    }
    if let Some(folder) = unpack {
        for name in ["APPTAINER_TMPDIR", "SINGULARITY_TMPDIR"] {
            command.env(name, folder);
        }
    }
    // Without isolation the launcher becomes the program, which must be able to create a session.
    let group = pod.runtime.isolates();
    let mut child = pod.children.spawn(&mut command, group)?;
    // The command still holds the helper's end of the socket, and the shim would never see the end of file.
    drop(command);
    let stderr = Arc::new(Mutex::new(Vec::new()));
    let mut tasks = JoinSet::new();
    if let Some(pipe) = child.stderr.take() {
        let stream = Stream::new(pipe.into())?;
        tasks.spawn(output::keep_tail(stream, STDERR_BYTES, Arc::clone(&stderr)));
    }
    Ok(Runtime {
        child,
        stderr,
        tasks,
        group,
        stuck: false,
    })
}

impl Runtime {
    /// Waits for the end of the container. Once aborted, kills a runtime that outlives its program, and waits only so long for what was
    /// killed: a container whose processes the kernel keeps counts as ended, because its pod could never end otherwise.
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
        self.killed(Some(program)).await
    }

    /// Kills the runtime, and waits until it and the program have ended.
    async fn killed(&mut self, program: Option<Identity>) -> Exit {
        self.signal(Signal::KILL);
        let dying = async {
            let exit = self.child.wait().await;
            // If it was the runtime's child, it is not known to have ended with it.
            while program.is_some_and(Identity::runs) {
                tokio::time::sleep(LOOK).await;
            }
            exit
        };
        if let Ok(exit) = tokio::time::timeout(AFTER_KILL, dying).await {
            return exit;
        }
        tracing::warn!(pid = self.child.pid, "a container: {STUCK}");
        self.stuck = true;
        Exit {
            code: KILLED,
            signal: 0,
        }
    }

    /// The termination message of the container, whose program left `message`.
    pub(super) fn message(&self, message: String) -> String {
        if self.stuck {
            STUCK.to_owned()
        } else {
            message
        }
    }

    /// Ends a runtime whose program does not run.
    pub(super) async fn end(&mut self) {
        // SIGKILL would leave its file system helpers behind, so TERM comes first.
        self.signal(Signal::TERM);
        if tokio::time::timeout(RUNTIME_GRACE, self.child.wait())
            .await
            .is_err()
        {
            self.killed(None).await;
        }
    }

    fn signal(&self, signal: Signal) {
        if self.group {
            signals::to_group(self.child.pid, signal);
        } else {
            signals::send(self.child.pid, signal);
        }
    }

    async fn end_message(&mut self, exit: Exit) -> String {
        // The runtime's helpers may keep the pipe open, so the wait for the end of file is short.
        tokio::time::timeout(STDERR_GRACE, self.tasks.join_next())
            .await
            .ok();
        let stderr = self.stderr.lock().unwrap_or_else(PoisonError::into_inner);
        let message = String::from_utf8_lossy(&stderr).trim().to_owned();
        if message.is_empty() {
            format!(
                "the container runtime exited with code {} and no message",
                exit.code
            )
        } else {
            message
        }
    }
}

#[cfg(test)]
mod tests;
