//! `knoc-agent enter PID START`: starts a process in the namespaces of a running container, by `setns(2)`.
//!
//! Standard input is one end of a socket pair, over which the launch protocol runs; the shim has the other end. The process
//! joins the user namespace first (which gives it the rights for the others), then the rest. A network of the pod's own belongs
//! to another user namespace, above the container's: it is joined before, with the rights in that one. Then the process changes
//! to the container's root, and forks into the PID namespace. The child becomes the program; the parent waits and exits as
//! the child did. Namespaces that the helper shares with the container already are left out, so without isolation it joins none.
//! A program that sees itself as another user is in a user namespace below the container's, which has no rights for the others:
//! it is joined last, without any rights in it ([`ids::show`]).
//!
//! The namespaces are those that the runtime has made, which the shim sends first ([`super::kept`]), whatever the program has entered
//! since. Where the shim has none, they are those of the program.
//!
//! With a second PID and START, the container shares the processes of that process ([`Beside`]).
//!
//! `knoc-agent enter PID START passwd` and `… group` write the image's own file of that name in `/etc` to standard input instead (see
//! [`account`]), `knoc-agent enter PID START folder` mounts a folder of an image ([`folder`]), and `… volume` copies what the image has in
//! one of its volumes to standard output ([`volume`]).

use std::{
    fs::{File, Metadata},
    io::{self, Read as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::{fs::MetadataExt as _, net::UnixStream},
    },
    process::ExitCode,
};

use knoc_contract::launch::Reply;
use nix::{
    sys::{
        signal::{Signal, raise},
        wait::{WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid},
};
use rustix::{
    process::{Resource, Rlimit, fchdir, setrlimit},
    thread::{LinkNameSpaceType, move_into_link_name_space, set_no_new_privs},
};

use super::{
    account,
    beside::{Beside, Within},
    fds, folder, ids,
    kept::Received,
    program, sys, volume,
};
use crate::signals::Identity;

/// In the order of joining: the user namespace gives the rights for the others, the mount namespace hides `/proc`.
const NAMESPACES: [(&str, LinkNameSpaceType); 6] = [
    ("user", LinkNameSpaceType::User),
    ("mnt", LinkNameSpaceType::Mount),
    ("pid", LinkNameSpaceType::ProcessID),
    ("ipc", LinkNameSpaceType::InterProcessCommunication),
    ("uts", LinkNameSpaceType::HostNameAndNISDomainName),
    ("cgroup", LinkNameSpaceType::ControlGroup),
];

/// How deep user namespaces are nested at most.
const LEVELS: usize = 33;

/// The helper's exit code if it fails before the program runs.
pub(crate) const FAILED: u8 = 125;

#[derive(Debug, thiserror::Error)]
enum EnterError {
    #[error("usage: knoc-agent enter PID START [PID START holder|container]")]
    Usage,
    #[error("the container has ended")]
    Ended,
    #[error(
        "exec is not possible into this container: its runtime set it up as root (setuid), and the kernel lets no \
         other user join it; the site needs Apptainer, or `allow setuid = no` in the runtime's configuration"
    )]
    Setuid,
    #[error(
        "exec is not possible into this container: its program has itself entered a user and a mount namespace, which lead to no \
         other; let the container's command start the program as a child process, as in `sh -c 'PROGRAM; exit $?'`"
    )]
    Entered,
    #[error("{what}")]
    Io {
        what: String,
        #[source]
        source: io::Error,
    },
}

impl EnterError {
    fn on(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// The last argument if the image's `/etc/passwd` is to be read.
pub(crate) const PASSWD: &str = "passwd";
/// The last argument if the image's `/etc/group` is to be read.
pub(crate) const GROUP: &str = "group";
/// The last argument if a folder of an image is to be mounted over the whole of it.
pub(crate) const FOLDER: &str = "folder";
/// The last argument if a volume of the image is to be filled.
pub(crate) const VOLUME: &str = "volume";

/// The arguments for a container that shares the processes `beside`, if it shares any.
pub(crate) fn arguments(container: Identity, beside: Option<Beside>) -> Vec<String> {
    let container = [container.pid.to_string(), container.start.to_string()];
    let beside = beside.into_iter().flat_map(Beside::arguments);
    container.into_iter().chain(beside).collect()
}

/// Entry point of the hidden subcommand.
pub(super) fn main(arguments: &[String]) -> ExitCode {
    super::die_with_parent();
    // The program must not keep open the folder in which the shim was started.
    std::env::set_current_dir("/").ok();
    if let [container @ .., mode] = arguments {
        match mode.as_str() {
            PASSWD | GROUP => return read_own(container, mode),
            FOLDER => return do_request(container, folder::mount_over_whole),
            VOLUME => return do_request(container, volume::fill),
            _ => {}
        }
    }
    let shim = match super::shim_at_stdin("enter") {
        Ok(shim) => shim,
        Err(code) => return code,
    };
    let joined = Received::receive(&shim)
        .map_err(EnterError::on("receive the container's namespaces"))
        .and_then(|kept| join(arguments, &kept));
    if let Err(error) = joined {
        return report_failure(&shim, &error);
    }
    match sys::fork_single_threaded() {
        Ok(ForkResult::Child) => {
            super::die_with_parent();
            program::run(&shim)
        }
        Ok(ForkResult::Parent { child }) => {
            let pid = u32::try_from(child.as_raw()).unwrap_or_default();
            fds::send(&shim, &Reply::Pid(pid).encode(), &[]).ok();
            drop(shim);
            // The socket pair is standard input too: only the child may hold it, or the shim sees no end of file.
            super::release_stdin();
            end_as(child)
        }
        Err(errno) => {
            let source = io::Error::from(errno);
            report_failure(
                &shim,
                &EnterError::Io {
                    what: "fork".to_owned(),
                    source,
                },
            )
        }
    }
}

/// Sends a file of the image in `/etc`. On failure it sends nothing, and the exit code tells the shim.
fn read_own(container: &[String], file: &str) -> ExitCode {
    let read = join(container, &Received::default()).is_ok()
        && account::send_images_own(file, rustix::stdio::stdin()).is_ok();
    if read {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(FAILED)
    }
}

/// Does in the container what standard input asks for. On failure the exit code is the errno, if there is one.
fn do_request(container: &[String], work: fn(&[u8]) -> io::Result<()>) -> ExitCode {
    let mut request = Vec::new();
    let mut reading = io::stdin().take(folder::REQUEST_BYTES);
    let joined =
        reading.read_to_end(&mut request).is_ok() && join(container, &Received::default()).is_ok();
    if !joined {
        return ExitCode::from(FAILED);
    }
    match work(&request) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ExitCode::from(code_of(&error)),
    }
}

/// PURE: the exit code that tells of this error.
fn code_of(error: &io::Error) -> u8 {
    let errno = error.raw_os_error().map(u8::try_from);
    match errno {
        Some(Ok(errno)) if (1..FAILED).contains(&errno) => errno,
        Some(_) | None => FAILED,
    }
}

fn report_failure(shim: &UnixStream, error: &EnterError) -> ExitCode {
    let errno = match error {
        EnterError::Io { source, .. } => source.raw_os_error().unwrap_or_default(),
        EnterError::Setuid | EnterError::Entered => nix::libc::EPERM,
        EnterError::Usage | EnterError::Ended => 0,
    };
    let reply = Reply::Failed {
        errno,
        what: knoc_proto::error::chain(error),
    };
    fds::send(shim, &reply.encode(), &[]).ok();
    ExitCode::from(FAILED)
}

/// What is opened of the container before its mount namespace hides `/proc`.
struct Target {
    /// The network namespace, after the user namespace that owns it unless this process is in that already.
    network: Vec<(&'static str, LinkNameSpaceType, OwnedFd)>,
    namespaces: Vec<(&'static str, LinkNameSpaceType, OwnedFd)>,
    /// Whether the program is in the container's mount namespace, and so has its root.
    has_root: bool,
    /// The user namespace that the program was given below that of the container.
    below: Option<OwnedFd>,
    no_new_privileges: bool,
}

fn join(arguments: &[String], kept: &Received) -> Result<(), EnterError> {
    let (pid, target, beside) = find(arguments, kept)?;
    for (name, kind, fd) in &target.network {
        move_into_link_name_space(fd.as_fd(), Some(*kind))
            .map_err(io::Error::from)
            .map_err(EnterError::on(format!(
                "join the {name} namespace of the pod's network"
            )))?;
    }
    if let Some(beside) = beside {
        let mut joined = target.network.iter();
        let within = if joined.any(|(name, ..)| *name == "user") {
            Within::Network
        } else {
            Within::Node
        };
        beside
            .join(within)
            .map_err(EnterError::on("join the shared processes"))?;
    }
    let own_user = target.namespaces.iter().all(|(name, ..)| *name != "user");
    let mut root = None;
    let shares = beside.is_some();
    for (name, kind, fd) in &target.namespaces {
        if *name == "pid" && shares {
            // Joined already: the container's own user namespace has no rights in it.
            continue;
        }
        if *name == "user" && is_joined(fd).map_err(EnterError::on("stat the user namespace"))? {
            // It is that of the pod's network.
            continue;
        }
        // Joining a mount namespace leads to its root, which is that of the container. With a runtime that could only change the
        // root, it is another one.
        if *name == "mnt" && target.has_root {
            // Opened after the user namespace was joined: a FUSE root is accessible only inside of it.
            let path = format!("/proc/{pid}/root");
            root = Some(File::open(&path).map_err(EnterError::on(format!("open {path}")))?);
        }
        move_into_link_name_space(fd.as_fd(), Some(*kind))
            .map_err(io::Error::from)
            .map_err(|source| not_joined(name, pid, own_user, source))?;
    }
    if let Some(root) = root {
        fchdir(&root)
            .and_then(|()| rustix::process::chroot("."))
            .map_err(io::Error::from)
            .map_err(EnterError::on("change to the container's root"))?;
    }
    if target.no_new_privileges {
        set_no_new_privs(true).ok();
    }
    if let Some(below) = &target.below {
        move_into_link_name_space(below.as_fd(), Some(LinkNameSpaceType::User))
            .map_err(io::Error::from)
            .and_then(|()| ids::drop_capabilities())
            .map_err(EnterError::on("join the program's user namespace"))?;
    }
    Ok(())
}

/// Opens the process that the arguments name, and reads what it shares.
fn find(
    arguments: &[String],
    kept: &Received,
) -> Result<(u32, Target, Option<Beside>), EnterError> {
    let (pid, start, beside) = match arguments {
        [pid, start] => (pid, start, None),
        [pid, start, of, since, whose] => {
            let beside = Beside::parse(of, since, whose).ok_or(EnterError::Usage)?;
            (pid, start, Some(beside))
        }
        _ => return Err(EnterError::Usage),
    };
    let pid: u32 = pid.parse().map_err(|_| EnterError::Usage)?;
    let target = open(Place { pid, kept })?;
    // The start time is compared after the descriptors were opened, so a pid that was given to another process is noticed.
    let started = crate::proc::start_time(pid).map(|time| time.to_string());
    if started.as_ref() != Some(start) {
        return Err(EnterError::Ended);
    }
    Ok((pid, target, beside))
}

/// PURE: the error for a namespace that was not joined. If the container has no user namespace of its own, root set it up. If the
/// files are joined and the rest is denied, the files are the program's own.
fn not_joined(name: &str, pid: u32, own_user: bool, source: io::Error) -> EnterError {
    if source.kind() == io::ErrorKind::PermissionDenied {
        if own_user {
            return EnterError::Setuid;
        }
        if !matches!(name, "user" | "mnt") {
            return EnterError::Entered;
        }
    }
    EnterError::on(format!("join the {name} namespace of process {pid}"))(source)
}

/// Where the namespaces of a container are found.
#[derive(Clone, Copy)]
struct Place<'a> {
    /// The program.
    pid: u32,
    kept: &'a Received,
}

impl Place<'_> {
    /// The container's.
    fn namespace(self, name: &str) -> Result<File, EnterError> {
        let Some(kept) = self.kept.get(name) else {
            return self.of_program(name);
        };
        let copy = kept.try_clone().map_err(EnterError::on("dup"))?;
        Ok(copy.into())
    }

    fn of_program(self, name: &str) -> Result<File, EnterError> {
        let path = format!("/proc/{}/ns/{name}", self.pid);
        File::open(&path).map_err(EnterError::on(format!("open {path}")))
    }

    /// Whether the program has not left this namespace of the container.
    fn has_program(self, name: &str) -> Result<bool, EnterError> {
        let on = || EnterError::on(format!("stat the {name} namespaces"));
        let ours = self.of_program(name)?.metadata().map_err(on())?;
        is_same(&self.namespace(name)?, &ours).map_err(on())
    }
}

/// The user namespace that the program was given below that of the container: the program's own, or one above it.
fn given(container: &OwnedFd, program: OwnedFd) -> io::Result<OwnedFd> {
    let container = File::from(container.try_clone()?).metadata()?;
    let mut given = program;
    for _ in 0..LEVELS {
        let above = sys::parent_of_namespace(&given)?;
        if is_same(&File::from(above.try_clone()?), &container)? {
            return Ok(given);
        }
        given = above;
    }
    Err(io::ErrorKind::NotFound.into())
}

fn open(place: Place<'_>) -> Result<Target, EnterError> {
    let mut namespaces = Vec::new();
    for (name, kind) in NAMESPACES {
        namespaces.extend(other(place, name)?.map(|fd| (name, kind, fd)));
    }
    let mut below = below_the_containers(&mut namespaces)
        .map_err(EnterError::on("find the owner of the container's files"))?;
    if let (true, Some(launchers)) = (place.kept.shown(), place.kept.get("user")) {
        let own = OwnedFd::from(place.of_program("user")?);
        let given = given(launchers, own);
        below = Some(given.map_err(EnterError::on("find the program's user namespace"))?);
    }
    let pid = place.pid;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let no_new_privileges = status.lines().any(|line| line == "NoNewPrivs:\t1");
    Ok(Target {
        network: network(place)?,
        namespaces,
        has_root: place.has_program("mnt")?,
        below,
        no_new_privileges,
    })
}

/// If the program's user namespace, which comes first, does not own the container's files, which come next, the one that does
/// takes its place, and the program's is returned.
fn below_the_containers(
    namespaces: &mut [(&'static str, LinkNameSpaceType, OwnedFd)],
) -> io::Result<Option<OwnedFd>> {
    let [
        (_, LinkNameSpaceType::User, user),
        (_, LinkNameSpaceType::Mount, mounts),
        ..,
    ] = namespaces
    else {
        return Ok(None);
    };
    // On a kernel that does not tell the owner, no program sees itself as another user.
    let Ok(owner) = sys::owner_of_namespace(mounts) else {
        return Ok(None);
    };
    let same = is_same(
        &File::from(owner.try_clone()?),
        &File::from(user.try_clone()?).metadata()?,
    )?;
    Ok((!same).then(|| std::mem::replace(user, owner)))
}

/// The container's namespace of this kind; `None` if this process is in it already.
fn other(place: Place<'_>, name: &str) -> Result<Option<OwnedFd>, EnterError> {
    // A kernel without this kind of namespace has no such file, and there is nothing to join.
    let Ok(ours) = std::fs::metadata(format!("/proc/self/ns/{name}")) else {
        return Ok(None);
    };
    let theirs = place.namespace(name)?;
    let is_ours =
        is_same(&theirs, &ours).map_err(EnterError::on(format!("stat the {name} namespace")))?;
    Ok((!is_ours).then(|| theirs.into()))
}

/// Whether this process is in the user namespace by now.
fn is_joined(namespace: &OwnedFd) -> io::Result<bool> {
    let ours = std::fs::metadata("/proc/self/ns/user")?;
    is_same(&File::from(namespace.try_clone()?), &ours)
}

fn is_same(file: &File, ours: &Metadata) -> io::Result<bool> {
    let theirs = file.metadata()?;
    Ok((theirs.dev(), theirs.ino()) == (ours.dev(), ours.ino()))
}

/// The container's network namespace, and before it the user namespace that gives the right to join it.
fn network(
    place: Place<'_>,
) -> Result<Vec<(&'static str, LinkNameSpaceType, OwnedFd)>, EnterError> {
    let Some(network) = other(place, "net")? else {
        return Ok(Vec::new());
    };
    let on = || EnterError::on("find the owner of the container's network");
    let owner = File::from(sys::owner_of_namespace(&network).map_err(on())?);
    let ours = std::fs::metadata("/proc/self/ns/user").map_err(on())?;
    let mut namespaces = Vec::new();
    if !is_same(&owner, &ours).map_err(on())? {
        namespaces.push(("user", LinkNameSpaceType::User, owner.into()));
    }
    namespaces.push(("net", LinkNameSpaceType::Network, network));
    Ok(namespaces)
}

/// Waits for the program and ends in the same way, so that the shim sees its exit code or signal.
pub(super) fn end_as(child: Pid) -> ExitCode {
    loop {
        match waitpid(child, None) {
            Ok(WaitStatus::Exited(_, code)) => {
                return ExitCode::from(u8::try_from(code & 0xff).unwrap_or(FAILED));
            }
            Ok(WaitStatus::Signaled(_, signal, _)) => return raise_same(signal),
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(_) => return ExitCode::from(FAILED),
        }
    }
}

fn raise_same(signal: Signal) -> ExitCode {
    // The program may have dumped core; this helper must not.
    setrlimit(
        Resource::Core,
        Rlimit {
            current: Some(0),
            maximum: Some(0),
        },
    )
    .ok();
    sys::reset_signals();
    raise(signal).ok();
    ExitCode::from(u8::try_from(128 + signal as i32).unwrap_or(FAILED))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_for_a_setuid_container_says_what_the_site_can_do() {
        let denied = || io::Error::from(io::ErrorKind::PermissionDenied);
        let setuid = not_joined("mnt", 7, true, denied());
        let text = knoc_proto::error::chain(&setuid);
        assert!(
            text.contains("setuid") && text.contains("allow setuid = no"),
            "{text}"
        );
        // With a user namespace, or for another reason, the kernel's own message is shown.
        for (own_user, source) in [(false, denied()), (true, io::ErrorKind::NotFound.into())] {
            let text = knoc_proto::error::chain(&not_joined("mnt", 7, own_user, source));
            assert!(
                text.starts_with("join the mnt namespace of process 7: "),
                "{text}"
            );
        }
    }

    #[test]
    fn the_error_for_a_program_in_namespaces_of_its_own_says_what_the_user_can_do() {
        let denied = || io::Error::from(io::ErrorKind::PermissionDenied);
        for name in ["pid", "ipc"] {
            let text = knoc_proto::error::chain(&not_joined(name, 7, false, denied()));
            assert!(
                text.contains("itself entered a user and a mount namespace")
                    && text.contains("child process"),
                "{text}"
            );
        }
    }

    #[test]
    fn the_exit_code_is_the_errno_of_a_mount_that_failed() {
        for (error, code) in [
            (io::Error::from_raw_os_error(nix::libc::ENOENT), 2),
            (io::Error::from_raw_os_error(nix::libc::ENOTDIR), 20),
            (io::Error::from_raw_os_error(124), 124),
            (io::Error::from_raw_os_error(125), FAILED),
            (io::Error::from_raw_os_error(256), FAILED),
            (io::ErrorKind::InvalidInput.into(), FAILED),
        ] {
            assert_eq!(code_of(&error), code, "{error}");
        }
    }
}
