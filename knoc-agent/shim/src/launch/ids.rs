//! New namespaces of a helper, a user namespace among them, and the ids that are mapped into it.
//!
//! This user is mapped to itself. If the site gave the user subordinate ids (`/etc/subuid`, `/etc/subgid`) and installed the
//! tools that map them, they are mapped to themselves, too. The tools have root's rights on the host, not in the
//! namespace, so a child that stays outside runs them.
//!
//! A container that asks for root's rights gets a second pair of namespaces inside the first, in which this user is root
//! and the subordinate ids are the other users. Apptainer would create them itself, but needs tools that belong to root,
//! and the host's root does not exist in the first pair. Read-only mounts of the first stay read-only in the second.
//!
//! A program that is to see itself as another user gets a user namespace below that of its container, in which this user has
//! the wanted number ([`show`]). No other id exists there, and nothing is gained outside: neither files nor processes.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use knoc_proto::private::while_dumpable;
use nix::{
    sched::{CloneFlags, unshare},
    sys::wait::{WaitStatus, waitpid},
    unistd::ForkResult,
};
use rustix::{
    process::{Gid, getgid, getgroups, getuid},
    thread::{
        CapabilitySet, CapabilitySets, remove_capability_from_bounding_set, set_capabilities,
    },
};
use serde::{Deserialize, Serialize};

use super::sys;

/// The exit code of the child that maps ids if it could not.
const FAILED: u8 = 125;

/// How many ranges are mapped at most.
const MAX_RANGES: usize = 8;

/// The namespaces of a container that has root's rights.
const OF_ROOT: CloneFlags = CloneFlags::CLONE_NEWUSER.union(CloneFlags::CLONE_NEWNS);

/// How many bytes of a file are read at most.
const MAX_FILE: u64 = 4 << 20;

/// What the kernel shows instead of an id that is not mapped into a user namespace (`/proc/sys/kernel/overflowgid`).
const NO_NUMBER: u32 = 65_534;

/// How many numbers of a process are told at most.
const MAX_SEEN: usize = 66;

/// Folders in which the tools are looked for after those of `PATH`.
const FOLDERS: &str = "/usr/bin:/bin:/usr/sbin:/usr/local/bin";

/// Which of two processes the caller is, after [`isolate`] or [`become_root`].
pub(crate) enum Isolated {
    /// The process in the namespaces.
    Done(Ids),
    /// The child outside, which has written the maps and must exit with this code.
    Mapper(ExitCode),
}

/// The ids that are mapped into the namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ids {
    uid: u32,
    gid: u32,
    uids: Vec<Range>,
    gids: Vec<Range>,
}

/// A range of ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Range {
    first: u32,
    count: u32,
}

/// The tools, and the ranges that they are to map.
struct Mapping {
    uids: (PathBuf, Vec<Range>),
    gids: (PathBuf, Vec<Range>),
}

impl Mapping {
    /// `None` if the site has no subordinate ids for this user, or no tools to map them.
    fn find(users: &[String]) -> Option<Self> {
        let ranges = |file: &str, own: u32| {
            let mut text = String::new();
            let open = File::open(file).ok()?;
            open.take(MAX_FILE).read_to_string(&mut text).ok()?;
            Some(ranges(&text, users, own)).filter(|ranges| !ranges.is_empty())
        };
        Some(Self {
            uids: (
                tool("newuidmap")?,
                ranges("/etc/subuid", getuid().as_raw())?,
            ),
            gids: (
                tool("newgidmap")?,
                ranges("/etc/subgid", getgid().as_raw())?,
            ),
        })
    }

    /// Runs the tools on the process `pid`.
    fn write(&self, pid: u32) -> bool {
        let uids = map(&self.uids, pid, getuid().as_raw());
        let gids = map(&self.gids, pid, getgid().as_raw());
        uids && gids
    }
}

/// PURE: the ranges that the lines of `text` give to one of `users`, without those that contain `own`, which is mapped
/// in any case.
fn ranges(text: &str, users: &[String], own: u32) -> Vec<Range> {
    let own = u64::from(own);
    text.lines()
        .filter_map(|line| {
            let mut fields = line.trim().split(':');
            let user = fields.next()?;
            let first: u32 = fields.next()?.parse().ok()?;
            let count: u32 = fields.next()?.parse().ok()?;
            let (from, to) = (u64::from(first), u64::from(first) + u64::from(count));
            let fits = count > 0 && !(from..to).contains(&own);
            let ours = users.iter().any(|name| name == user);
            (fits && ours).then_some(Range { first, count })
        })
        .take(MAX_RANGES)
        .collect()
}

fn tool(name: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let folders = path.split(':').chain(FOLDERS.split(':'));
    let absolute = folders.filter(|folder| folder.starts_with('/'));
    absolute
        .map(|folder| Path::new(folder).join(name))
        .find(|path| path.is_file())
}

#[expect(
    clippy::disallowed_methods,
    reason = "the helper's one place that starts a program, which it waits for"
)]
fn map((tool, ranges): &(PathBuf, Vec<Range>), pid: u32, own: u32) -> bool {
    let mut command = Command::new(tool);
    command.arg(pid.to_string());
    let own = Range {
        first: own,
        count: 1,
    };
    for range in std::iter::once(&own).chain(ranges) {
        let first = range.first.to_string();
        command.args([&first, &first, &range.count.to_string()]);
    }
    // If the tool fails, the container runs without the subordinate ids.
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let status = command.stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

/// Enters new namespaces of these `kinds`, a user namespace among them. The child that maps ids returns as well, and must
/// exit.
pub(crate) fn isolate(users: &[String], kinds: CloneFlags) -> io::Result<Isolated> {
    let mut ids = Ids {
        uid: getuid().as_raw(),
        gid: getgid().as_raw(),
        ..Ids::default()
    };
    if let Some(mapping) = Mapping::find(users) {
        if let Some(code) = unshare_mapped(kinds, |pid| mapping.write(pid))? {
            return Ok(Isolated::Mapper(code));
        }
        if is_mapped("uid_map") && is_mapped("gid_map") {
            ids.uids = mapping.uids.1;
            ids.gids = mapping.gids.1;
        }
    } else {
        unshare(kinds)?;
    }
    // Each map can be written once. One that no tool has written maps this user only.
    if !is_mapped("uid_map") {
        write("self", "uid_map", &one(ids.uid, ids.uid))?;
    }
    if !is_mapped("gid_map") {
        // The kernel requires it. Old kernels have neither the file nor the requirement.
        write("self", "setgroups", "deny").ok();
        write("self", "gid_map", &one(ids.gid, ids.gid))?;
    }
    Ok(Isolated::Done(ids))
}

/// Enters the second namespaces as their root. Without subordinate ids it does nothing, and the runtime maps what it can
/// by itself. The child that maps ids returns as well, and must exit.
pub(crate) fn become_root(ids: Ids) -> io::Result<Isolated> {
    if ids.uids.is_empty() || ids.gids.is_empty() {
        return Ok(Isolated::Done(ids));
    }
    let uids = root_map(ids.uid, &ids.uids);
    let gids = root_map(ids.gid, &ids.gids);
    let mapped = unshare_mapped(OF_ROOT, |pid| {
        let pid = pid.to_string();
        write(&pid, "uid_map", &uids).is_ok() && write(&pid, "gid_map", &gids).is_ok()
    })?;
    if let Some(code) = mapped {
        return Ok(Isolated::Mapper(code));
    }
    if is_mapped("uid_map") && is_mapped("gid_map") {
        return Ok(Isolated::Done(ids));
    }
    Err(io::Error::other("the ids of the container were not mapped"))
}

/// PURE: the map in which this user is root and the ids of `ranges` follow.
fn root_map(own: u32, ranges: &[Range]) -> String {
    let mut text = format!("0 {own} 1\n");
    let mut next: u64 = 1;
    for range in ranges {
        // Writing to a string cannot fail.
        writeln!(text, "{next} {} {}", range.first, range.count).ok();
        next += u64::from(range.count);
    }
    text
}

/// Enters new namespaces, while a child that stays outside waits and then writes the maps of this process. In the child,
/// returns the child's exit code.
fn unshare_mapped(
    kinds: CloneFlags,
    map: impl FnOnce(u32) -> bool,
) -> io::Result<Option<ExitCode>> {
    let (mut reader, mut writer) = io::pipe()?;
    let pid = std::process::id();
    match sys::fork_single_threaded()? {
        ForkResult::Child => {
            super::die_with_parent();
            drop(writer);
            let mut byte = [0];
            let isolated = reader.read_exact(&mut byte).is_ok();
            let code = if isolated && map(pid) { 0 } else { FAILED };
            Ok(Some(ExitCode::from(code)))
        }
        ForkResult::Parent { child } => {
            drop(reader);
            let isolated = unshare(kinds);
            if isolated.is_ok() {
                // If the child has ended, it mapped nothing, which the caller notices.
                writer.write_all(b"m").ok();
            }
            drop(writer);
            while waitpid(child, None) == Err(nix::errno::Errno::EINTR) {}
            isolated?;
            Ok(None)
        }
    }
}

/// Whether [`show`] and [`drop_capabilities`] work here. A child tries it, because who has entered the namespace cannot leave it.
pub(super) fn can_show(ids: [u32; 2]) -> bool {
    match sys::fork_single_threaded() {
        Ok(ForkResult::Child) => {
            super::die_with_parent();
            end_child(show(ids).and_then(|()| drop_capabilities()).is_ok())
        }
        Ok(ForkResult::Parent { child }) => loop {
            match waitpid(child, None) {
                Err(nix::errno::Errno::EINTR) => {}
                ended => return matches!(ended, Ok(WaitStatus::Exited(_, 0))),
            }
        },
        Err(_) => false,
    }
}

#[expect(
    clippy::exit,
    reason = "a child that has nothing more to do, and must not become the program"
)]
fn end_child(succeeded: bool) -> ! {
    std::process::exit(i32::from(!succeeded))
}

/// Enters a user namespace in which this user and group have the numbers `ids`. They stay those that the kernel knows: no file,
/// process or right is gained or lost by it, once [`drop_capabilities`] has been called.
pub(super) fn show([uid, gid]: [u32; 2]) -> io::Result<()> {
    let own = (getuid().as_raw(), getgid().as_raw());
    while_dumpable(|| {
        unshare(CloneFlags::CLONE_NEWUSER)?;
        write("self", "uid_map", &one(uid, own.0))?;
        write("self", "setgroups", "deny").ok();
        write("self", "gid_map", &one(gid, own.1))
    })
    .flatten()
}

/// The user, the group and the further groups of this process, by the numbers that it sees. A group without a number here is left out.
pub(super) fn seen() -> Vec<u32> {
    let gid = getgid().as_raw();
    let further = getgroups().unwrap_or_default().into_iter();
    let further = further.map(Gid::as_raw);
    let further = further.filter(|group| ![gid, NO_NUMBER].contains(group));
    let own = [getuid().as_raw(), gid].into_iter();
    own.chain(further).take(MAX_SEEN).collect()
}

/// PURE: the map of one id.
fn one(inside: u32, outside: u32) -> String {
    format!("{inside} {outside} 1")
}

/// Gives up all rights that the first process of a user namespace has in it, for good: a program that is user 0 there gets none
/// back when it is executed.
pub(super) fn drop_capabilities() -> io::Result<()> {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The kernel knows no more.
            Err(rustix::io::Errno::INVAL) => break,
            Err(errno) => return Err(errno.into()),
        }
    }
    let none = CapabilitySet::empty();
    let sets = CapabilitySets {
        effective: none,
        permitted: none,
        inheritable: none,
    };
    Ok(set_capabilities(None, sets)?)
}

fn is_mapped(map: &str) -> bool {
    fs::read_to_string(format!("/proc/self/{map}")).is_ok_and(|text| !text.trim().is_empty())
}

fn write(process: &str, name: &str, text: &str) -> io::Result<()> {
    let mut file = File::options()
        .write(true)
        .open(format!("/proc/{process}/{name}"))?;
    file.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ranges_of_a_user_by_name_or_number() {
        let text = "# comment\nann:100000:65536\nbob:200000:10\n2001:300000:5\nann:x:1\nann:1:0\nann:1000:10\n";
        let users = ["ann".to_owned(), "2001".to_owned()];
        let found = ranges(text, &users, 1005);
        let expected =
            [(100_000, 65_536), (300_000, 5)].map(|(first, count)| Range { first, count });
        assert_eq!(found, expected);
        assert!(ranges(text, &["nobody".to_owned()], 1).is_empty());
        let many = "ann:5:1\n".repeat(100);
        assert_eq!(ranges(&many, &users, 1).len(), MAX_RANGES);
    }

    #[test]
    fn a_shown_id_is_the_only_one_and_the_first_number_is_the_one_inside() {
        assert_eq!(one(1234, 2001), "1234 2001 1");
        assert_eq!(one(0, 2001), "0 2001 1");
    }

    #[test]
    fn root_inside_is_this_user_and_the_others_follow() {
        let ranges = [(100_000, 65_536), (300_000, 5)].map(|(first, count)| Range { first, count });
        let text = root_map(2001, &ranges);
        assert_eq!(text, "0 2001 1\n1 100000 65536\n65537 300000 5\n");
    }
}
