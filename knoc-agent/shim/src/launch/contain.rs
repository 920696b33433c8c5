//! `knoc-agent contain`: mounts the image and the volumes of a container, each from the descriptor that was checked, and
//! becomes the container runtime.
//!
//! The runtime takes paths, and a path that was checked may lead elsewhere when it is mounted: a container may replace a
//! folder of its volume with a link, and another user may replace a file of a shared folder. So this helper enters a user
//! and a mount namespace of its own, resolves each source there ([`knoc_contract::walk`]), and binds the resulting
//! descriptor to a staging path below the shim's scratch folder, which no container sees. The runtime mounts the staging
//! paths. Nothing is mounted on the host, and all mounts disappear with the runtime's last process.
//!
//! ```text
//! shim ──ContainSpec──► unshare, map ids ──► walk + bind each source ──► exec runtime (end of file: it runs)
//!      ◄─ descriptor of the termination message's mount ─┘   └─ Failed, NoNamespaces: reports why, and exits
//! ```
//!
//! If the pod has a network of its own, it joins the pod's user and network namespace instead of creating a user namespace:
//! their descriptors come with the specification.
//!
//! Read-only mounts are read-only here already, so not even root in the container's user namespace can make them writable.
//! A path of the node, or a sandbox, may have other file systems mounted below it, which become read-only with it ([`read_only`]).
//! The sources are resolved after the namespaces were entered, since the kernel binds a descriptor only in the mount
//! namespace in which it was opened.
//!
//! Standard input is one end of a socket pair; the shim has the other. Single-threaded, as `unshare(2)` requires.

pub(crate) mod host;
mod read_only;
pub(crate) mod spec;

use std::{
    convert::Infallible,
    fs::File,
    io,
    ops::ControlFlow,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::{net::UnixStream, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use knoc_contract::{launch::Reply, walk::Found};
use knoc_proto::private::while_dumpable;
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::signal::SigSet,
    unistd::{ForkResult, Pid},
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, LinkNameSpaceType, capabilities, move_into_link_name_space,
    set_capabilities,
};

use self::spec::{ContainSpec, MountSpec, SourceError};
use super::{
    beside::Within,
    enter, fds,
    ids::{self, Ids, Isolated},
    sys,
};
use crate::nofollow;

/// The helper's exit code if the runtime was not executed.
pub(super) const FAILED: u8 = 125;

/// A larger specification is rejected: each mount takes a few hundred bytes.
const MAX_SPEC: usize = 8 << 20;

/// The namespaces that it creates if it joins none.
pub(super) const NAMESPACES: CloneFlags = CloneFlags::CLONE_NEWUSER.union(CloneFlags::CLONE_NEWNS);

#[derive(Debug, thiserror::Error)]
pub(super) enum ContainError {
    #[error("{what}")]
    Io {
        what: String,
        #[source]
        source: io::Error,
    },
    #[error("receive the mounts")]
    Spec(#[source] serde_json::Error),
    #[error("{what}")]
    Source {
        what: String,
        #[source]
        source: SourceError,
    },
    #[error("create user and mount namespaces")]
    Namespaces(#[source] io::Error),
}

impl ContainError {
    pub(super) fn on(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    pub(super) fn errno(&self) -> i32 {
        match self {
            Self::Io { source, .. } | Self::Namespaces(source) => {
                source.raw_os_error().unwrap_or_default()
            }
            Self::Source { source, .. } => source.errno(),
            Self::Spec(_) => 0,
        }
    }
}

/// Entry point of the hidden subcommand. Returns only if the runtime was not executed.
pub(super) fn main() -> ExitCode {
    super::die_with_parent();
    let shim = match super::shim_at_stdin("contain") {
        Ok(shim) => shim,
        Err(code) => return code,
    };
    match run(&shim) {
        // This is the child that wrote the id maps.
        Ok(Ran::Mapper(code)) => code,
        Ok(Ran::Parent(child)) => wait_for(child, shim),
        Err(error) => {
            let what = knoc_proto::error::chain(&error);
            let errno = error.errno();
            let reply = match error {
                ContainError::Namespaces(_) => Reply::NoNamespaces { errno, what },
                ContainError::Io { .. } | ContainError::Spec(_) | ContainError::Source { .. } => {
                    Reply::Failed { errno, what }
                }
            };
            // If the shim has ended, nobody receives the reply.
            fds::send(&shim, &reply.encode(), &[]).ok();
            ExitCode::from(FAILED)
        }
    }
}

/// A process that does not become the runtime.
enum Ran {
    /// The child that has written the id maps and exits with this code.
    Mapper(ExitCode),
    /// The parent of the process that becomes the runtime, in the PID namespace of another container.
    Parent(Pid),
}

/// Waits for the runtime and ends as it does.
fn wait_for(runtime: Pid, shim: UnixStream) -> ExitCode {
    // Only the runtime may hold the socket, or the shim sees no end of file.
    drop(shim);
    super::release_stdin();
    // The shim signals the group. The runtime decides what follows from it, and this process ends after the runtime.
    SigSet::all().thread_block().ok();
    enter::end_as(runtime)
}

fn run(shim: &UnixStream) -> Result<Ran, ContainError> {
    let (spec, namespaces) = receive(shim)?;
    let ids = match enter_namespaces(&spec, namespaces)? {
        ControlFlow::Break(code) => return Ok(Ran::Mapper(code)),
        ControlFlow::Continue(ids) => ids,
    };
    // The change of credentials may have reset it.
    super::die_with_parent();
    // The host's new mounts still appear here, for automounters; mounts made here never appear on the host.
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_SLAVE | MsFlags::MS_REC,
        None::<&str>,
    )
    // A security module may give a program a user namespace without any rights in it (AppArmor on Ubuntu).
    .map_err(|errno| ContainError::Namespaces(errno.into()))?;
    let mut opened = Vec::new();
    for mount in &spec.mounts {
        let found = stage(shim, mount, &opened)?;
        opened.push(found);
    }
    if let Some(ids) = ids.filter(|_| spec.root) {
        match while_dumpable(|| ids::become_root(ids))
            .flatten()
            .map_err(ContainError::on(
                "enter the container's user namespace as root",
            ))? {
            Isolated::Mapper(code) => return Ok(Ran::Mapper(code)),
            Isolated::Done(_) => super::die_with_parent(),
        }
    }
    if spec.beside.is_some() {
        // Only a child is in the PID namespace that was joined.
        match sys::fork_single_threaded() {
            Ok(ForkResult::Parent { child }) => return Ok(Ran::Parent(child)),
            Ok(ForkResult::Child) => super::die_with_parent(),
            Err(errno) => return Err(ContainError::on("fork")(errno.into())),
        }
        show_processes().map_err(ContainError::on("mount /proc of the shared processes"))?;
    }
    keep_capabilities().map_err(ContainError::on("pass on the capabilities"))?;
    let Err(error) = become_runtime(&spec);
    Err(error)
}

/// Joins the pod's network and shared processes if it has them, and creates the namespaces that are the container's own.
/// Returns the ids of the user namespace, unless it is another one's; the child outside, which has written its map, must exit
/// with the code.
fn enter_namespaces(
    spec: &ContainSpec,
    namespaces: Vec<OwnedFd>,
) -> Result<ControlFlow<ExitCode, Option<Ids>>, ContainError> {
    if spec.network.is_some() {
        join(&namespaces)?;
    }
    drop(namespaces);
    Ok(match (spec.beside, &spec.network) {
        (Some(beside), _) => {
            let within = if spec.network.is_some() {
                Within::Network
            } else {
                Within::Node
            };
            let joined = beside.join(within);
            joined.map_err(ContainError::on("join the shared processes"))?;
            unshare_mounts()?;
            ControlFlow::Continue(None)
        }
        (None, Some(ids)) => {
            unshare_mounts()?;
            ControlFlow::Continue(Some(ids.clone()))
        }
        (None, None) => match while_dumpable(|| ids::isolate(&spec.users, NAMESPACES))
            .flatten()
            .map_err(ContainError::Namespaces)?
        {
            Isolated::Mapper(code) => ControlFlow::Break(code),
            Isolated::Done(ids) => ControlFlow::Continue(Some(ids)),
        },
    })
}

/// What to mount, and the namespaces to join.
pub(super) fn receive(shim: &UnixStream) -> Result<(ContainSpec, Vec<OwnedFd>), ContainError> {
    let received = fds::receive_frame(shim, MAX_SPEC).and_then(|received| {
        let ended = || io::Error::from(io::ErrorKind::UnexpectedEof);
        received.ok_or_else(ended)
    });
    let (body, namespaces) = received.map_err(ContainError::on("receive the mounts"))?;
    let spec = serde_json::from_slice(&body).map_err(ContainError::Spec)?;
    Ok((spec, namespaces))
}

/// Joins the pod's user namespace and then its network namespace, which gives all rights in both. If the pod has volumes in
/// memory with a size, it then joins the mount namespace in which they are.
pub(super) fn join(namespaces: &[OwnedFd]) -> Result<(), ContainError> {
    let on = || ContainError::on("join the pod's network");
    let (user, net, mounts) = match namespaces {
        [user, net] => (user, net, None),
        [user, net, mounts] => (user, net, Some(mounts)),
        _ => return Err(on()(io::ErrorKind::InvalidInput.into())),
    };
    let enter = |namespace: &OwnedFd, kind| {
        move_into_link_name_space(namespace.as_fd(), Some(kind)).map_err(io::Error::from)
    };
    enter(user, LinkNameSpaceType::User).map_err(on())?;
    enter(net, LinkNameSpaceType::Network).map_err(on())?;
    if let Some(mounts) = mounts {
        let on = || ContainError::on("join the mounts of the pod's volumes in memory");
        // Joining leads to the root of the namespace.
        let here = std::env::current_dir().map_err(on())?;
        enter(mounts, LinkNameSpaceType::Mount).map_err(on())?;
        std::env::set_current_dir(here).map_err(on())?;
    }
    Ok(())
}

fn unshare_mounts() -> Result<(), ContainError> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(|errno| ContainError::Namespaces(errno.into()))
}

/// Binds one source to its staging path. `opened` are the sources before it.
fn stage(shim: &UnixStream, spec: &MountSpec, opened: &[Found]) -> Result<Found, ContainError> {
    let found = spec.source.open().map_err(|source| ContainError::Source {
        what: spec.what.clone(),
        source,
    })?;
    let on = |step: &str| ContainError::on(format!("{}: {step}", spec.what));
    if let Some(point) = &spec.point {
        // If this fails, the mount point may exist already. If it does not, the runtime reports the error.
        point.make(spec.source.is_folder(&found), opened).ok();
    }
    create_staging(&spec.staging, found.is_folder()).map_err(on("create its staging path"))?;
    let source = PathBuf::from(format!("/proc/self/fd/{}", found.fd.as_raw_fd()));
    bind(&source, &spec.staging, MsFlags::MS_BIND | MsFlags::MS_REC).map_err(on("mount"))?;
    if spec.read_only {
        let all = spec.source.is_of_node(&found);
        read_only::remount(&spec.staging, all).map_err(on("mount read-only"))?;
    }
    if let Some(rest) = &spec.message {
        if !spec.read_only {
            // If the folder is not writable, the launcher says so.
            nofollow::touch_in(&found.fd, rest).ok();
        }
        let sent = fds::send(shim, &Reply::Master.encode(), &[found.fd.as_fd()]);
        sent.map_err(io::Error::from)
            .map_err(on("send its descriptor"))?;
    }
    Ok(found)
}

fn bind(source: &Path, target: &Path, flags: MsFlags) -> io::Result<()> {
    Ok(mount(
        Some(source),
        target,
        None::<&str>,
        flags,
        None::<&str>,
    )?)
}

/// Creates the staging path: a folder or a file, as the source is.
fn create_staging(staging: &Path, folder: bool) -> io::Result<()> {
    let made = if folder {
        std::fs::create_dir(staging)
    } else {
        File::options()
            .write(true)
            .create_new(true)
            .open(staging)
            .map(drop)
    };
    match made {
        // An earlier try with another kind of root has created it.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Mounts the `/proc` of this process's PID namespace over that of the node: the runtime binds it into the container.
fn show_processes() -> io::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    Ok(mount(
        Some("proc"),
        "/proc",
        Some("proc"),
        flags,
        None::<&str>,
    )?)
}

/// Passes this process's capabilities in its user namespace on to the runtime, as `unshare --keep-caps` does. The runtime
/// needs them to map the ids of a container.
fn keep_capabilities() -> io::Result<()> {
    let own = capabilities(None)?;
    let inheritable = own.permitted;
    set_capabilities(None, CapabilitySets { inheritable, ..own })?;
    for capability in own.permitted.iter() {
        ambient(capability)?;
    }
    Ok(())
}

fn ambient(capability: CapabilitySet) -> io::Result<()> {
    match rustix::thread::configure_capability_in_ambient_set(capability, true) {
        // This kernel does not know the capability.
        Err(rustix::io::Errno::INVAL) | Ok(()) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "this process becomes the runtime: nothing is started that outlives it"
)]
fn become_runtime(spec: &ContainSpec) -> Result<Infallible, ContainError> {
    let [program, arguments @ ..] = spec.argv.as_slice() else {
        let source = io::ErrorKind::InvalidInput.into();
        return Err(ContainError::on("execute the container runtime")(source));
    };
    super::release_stdin();
    sys::close_on_exec();
    sys::reset_signals();
    let error = Command::new(program).args(arguments).exec();
    let what = format!("execute {}", Path::new(program).display());
    Err(ContainError::on(what)(error))
}
