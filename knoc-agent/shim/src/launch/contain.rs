//! `knoc-agent contain`: mounts what a container gets, each from the descriptor that was checked, and becomes the
//! container runtime.
//!
//! The runtime takes paths, and a path that was checked may lead elsewhere when it is mounted: a container may swap a
//! folder of its volume for a link, another user a file of a shared folder. So this helper enters a user and a mount
//! namespace of its own, resolves each source there ([`knoc_contract::walk`]), and binds the descriptor that it ends with to a place
//! below the shim's scratch folder, which no container sees. The runtime mounts those places. Nothing is mounted on the
//! host, and all of it goes with the runtime's last process.
//!
//! ```text
//! shim ──ContainSpec──► unshare, map ids ──► walk + bind each source ──► exec runtime (end of file: it runs)
//!      ◄─ descriptor of the termination message's mount ─┘   └─ Failed, NoNamespaces: says why, and exits
//! ```
//!
//! What is read-only is so here already: not even root of the container's own user namespace can undo that. The walk
//! is made after the namespaces, since the kernel binds only what was opened in the mount namespace that it is bound in.
//!
//! Standard input is one end of a socket pair, the other is the shim's. Single-threaded: `unshare(2)` demands it.

mod ids;
pub(crate) mod spec;

use std::{
    convert::Infallible,
    fs::File,
    io::{self, Read as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::{net::UnixStream, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use knoc_contract::launch::Reply;
use knoc_contract::walk::Found;
use knoc_proto::private::while_dumpable;
use nix::mount::{MsFlags, mount};
use rustix::fs::{StatVfsMountFlags, fstatvfs};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

use self::{
    ids::Isolated,
    spec::{ContainSpec, MountSpec, SourceError},
};
use super::{fds, sys};
use crate::nofollow;

/// What the helper exits with if the runtime was not executed.
const FAILED: u8 = 125;

/// A specification larger than this is refused: each mount is a few hundred bytes.
const MAX_SPEC: usize = 8 << 20;

#[derive(Debug, thiserror::Error)]
enum ContainError {
    #[error("{what}")]
    Io {
        what: String,
        #[source]
        source: io::Error,
    },
    #[error("receive the mounts")]
    Spec(#[source] serde_json::Error),
    #[error("the mounts take {0} bytes, which is too many")]
    TooLong(usize),
    #[error("{what}")]
    Source {
        what: String,
        #[source]
        source: SourceError,
    },
    #[error("make user and mount namespaces")]
    Namespaces(#[source] io::Error),
}

impl ContainError {
    fn on(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    fn errno(&self) -> i32 {
        match self {
            Self::Io { source, .. } | Self::Namespaces(source) => {
                source.raw_os_error().unwrap_or_default()
            }
            Self::Source { source, .. } => source.errno(),
            Self::Spec(_) | Self::TooLong(_) => 0,
        }
    }
}

/// Entry point of the hidden subcommand. Returns only if the runtime was not executed.
#[must_use]
pub fn main() -> ExitCode {
    super::die_with_parent();
    let shim = match rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3) {
        Ok(fd) => UnixStream::from(fd),
        Err(error) => {
            eprintln!("knoc-agent contain: standard input: {error}");
            return ExitCode::from(FAILED);
        }
    };
    match run(&shim) {
        // The child that wrote the maps of ids.
        Ok(code) => code,
        Err(error) => {
            let what = knoc_proto::error::chain(&error);
            let errno = error.errno();
            let reply = match error {
                ContainError::Namespaces(_) => Reply::NoNamespaces { errno, what },
                ContainError::Io { .. }
                | ContainError::Spec(_)
                | ContainError::TooLong(_)
                | ContainError::Source { .. } => Reply::Failed { errno, what },
            };
            // If the shim is gone nobody is left to be told.
            fds::send(&shim, &reply.encode(), &[]).ok();
            ExitCode::from(FAILED)
        }
    }
}

fn run(shim: &UnixStream) -> Result<ExitCode, ContainError> {
    let spec = receive(shim)?;
    let ids = match while_dumpable(|| ids::isolate(&spec.users))
        .flatten()
        .map_err(ContainError::Namespaces)?
    {
        Isolated::Mapper(code) => return Ok(code),
        Isolated::Done(ids) => ids,
    };
    // New credentials may have reset it.
    super::die_with_parent();
    // Mounts of the host still arrive, for automounters; ours never go there.
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_SLAVE | MsFlags::MS_REC,
        None::<&str>,
    )
    // A security module may give an unknown program a user namespace without any rights in it (AppArmor on Ubuntu).
    .map_err(|errno| ContainError::Namespaces(errno.into()))?;
    let mut opened = Vec::new();
    for mount in &spec.mounts {
        let found = stage(shim, mount, &opened)?;
        opened.push(found);
    }
    if spec.root {
        match while_dumpable(|| ids::become_root(ids))
            .flatten()
            .map_err(ContainError::on("make the container's root"))?
        {
            Isolated::Mapper(code) => return Ok(code),
            Isolated::Done(_) => super::die_with_parent(),
        }
    }
    keep_capabilities().map_err(ContainError::on("keep the capabilities"))?;
    let Err(error) = become_runtime(&spec);
    Err(error)
}

fn receive(mut shim: &UnixStream) -> Result<ContainSpec, ContainError> {
    let failed = || ContainError::on("receive the mounts");
    let mut head = [0; 4];
    shim.read_exact(&mut head).map_err(failed())?;
    let length = usize::try_from(u32::from_be_bytes(head)).unwrap_or(usize::MAX);
    if length > MAX_SPEC {
        return Err(ContainError::TooLong(length));
    }
    let mut body = vec![0; length];
    shim.read_exact(&mut body).map_err(failed())?;
    serde_json::from_slice(&body).map_err(ContainError::Spec)
}

/// Binds one source to its place. `opened` are those before it.
fn stage(shim: &UnixStream, spec: &MountSpec, opened: &[Found]) -> Result<Found, ContainError> {
    let found = spec.source.open().map_err(|source| ContainError::Source {
        what: spec.what.clone(),
        source,
    })?;
    let on = |step: &str| ContainError::on(format!("{}: {step}", spec.what));
    if let Some(point) = &spec.point {
        // It may be there in another form, or be a container's: then the runtime has its say.
        point.make(found.is_folder(), opened).ok();
    }
    place(&spec.place, found.is_folder()).map_err(on("make its place"))?;
    let source = PathBuf::from(format!("/proc/self/fd/{}", found.fd.as_raw_fd()));
    bind(&source, &spec.place, MsFlags::MS_BIND | MsFlags::MS_REC).map_err(on("mount"))?;
    if spec.read_only {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        let locked = locked_flags(&found.fd).map_err(on("look at its mount"))?;
        bind(Path::new("none"), &spec.place, flags | locked).map_err(on("mount read-only"))?;
    }
    if let Some(rest) = &spec.message {
        if !spec.read_only {
            // A folder that cannot be written gives no message.
            nofollow::touch_in(&found.fd, rest).ok();
        }
        let sent = fds::send(shim, &Reply::Master.encode(), &[found.fd.as_fd()]);
        sent.map_err(io::Error::from).map_err(on("pass it on"))?;
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

/// What is mounted on: a folder or a file, as the source is.
fn place(place: &Path, folder: bool) -> io::Result<()> {
    let made = if folder {
        std::fs::create_dir(place)
    } else {
        File::options()
            .write(true)
            .create_new(true)
            .open(place)
            .map(drop)
    };
    match made {
        // Of an earlier try with another kind of root.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Those flags of the mount that a remount in another user namespace may not clear.
fn locked_flags(fd: &OwnedFd) -> io::Result<MsFlags> {
    let has = fstatvfs(fd)?.f_flag;
    let pairs = [
        (StatVfsMountFlags::NOSUID, MsFlags::MS_NOSUID),
        (StatVfsMountFlags::NODEV, MsFlags::MS_NODEV),
        (StatVfsMountFlags::NOEXEC, MsFlags::MS_NOEXEC),
        (StatVfsMountFlags::NOATIME, MsFlags::MS_NOATIME),
        (StatVfsMountFlags::NODIRATIME, MsFlags::MS_NODIRATIME),
        (StatVfsMountFlags::RELATIME, MsFlags::MS_RELATIME),
    ];
    let set = pairs.into_iter().filter(|(flag, _)| has.contains(*flag));
    Ok(set.fold(MsFlags::empty(), |all, (_, flag)| all | flag))
}

/// Lets the runtime have what this process may do in its own user namespace, as `unshare --keep-caps` does: it maps
/// the ids of a container with it.
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
        // One that this kernel does not know.
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
