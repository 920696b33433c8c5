//! The user account that a container's program sees: HOME as container runtimes set it, and its line in `/etc/passwd`.
//!
//! Every program runs as the HPC user, whatever user the image or the pod names, and may see itself as that user
//! ([`ids::show`](super::ids::show)). It gets the home folder and the shell that
//! the image's `/etc/passwd` has for the named user. The container runtime adds the HPC user to that file, with the home
//! folder and the shell of the host. Neither may exist in the container, so that line gets those of the named user; and, if
//! the program sees itself as a user of whom the image has no line, that user's number.
//!
//! If a line of the image has the HPC user's uid, the container runtime has overwritten its name and home folder, and
//! mounted the result over the image's own file. The image's own file is then read in a copy of the container's mount
//! namespace, in which the mount can be removed without affecting the container ([`send_images_own`]). So is `/etc/group`, in which
//! the runtime has the groups of the HPC user, if the image names a group.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    os::{fd::BorrowedFd, unix::fs::OpenOptionsExt as _},
};

use nix::mount::{MntFlags, umount2};
use rustix::fs::OFlags;

use super::volume::unshare_mounts;

#[cfg(any(test, feature = "fuzzed"))]
pub(crate) mod fuzzed;

const PASSWD: &str = "/etc/passwd";
/// A longer `passwd` or `group` file is not read.
pub(crate) const PASSWD_BYTES: u64 = 1 << 20;

/// The fields of a `passwd` line that the program gets.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Account {
    home: Vec<u8>,
    /// Empty if it is not known.
    shell: Vec<u8>,
}

/// Whether the container runtime may have overwritten the line of `user`.
pub(crate) fn may_be_overwritten(user: &[u8]) -> bool {
    let name = user.split(|byte| *byte == b':').next().unwrap_or_default();
    number(name).map_or(!name.is_empty(), |uid| uid == own_uid())
}

/// PURE: the user and the group in an image's `User` that are names and not numbers.
pub(crate) fn names(user: &[u8]) -> [Option<&[u8]>; 2] {
    let mut parts = user.splitn(2, |byte| *byte == b':');
    let is_name = |part: &&[u8]| !part.is_empty() && number(part).is_none();
    [parts.next(), parts.next()].map(|part| part.filter(is_name))
}

/// PURE: the number of the user or the group `name` in the text of a `passwd` or `group` file.
pub(crate) fn named(text: &[u8], name: &[u8]) -> Option<u32> {
    let mut named = lines(text).filter(|fields| fields.first() == Some(&name));
    // The last field of a line may end with a CR.
    named.find_map(|fields| number(fields.get(2)?.trim_ascii_end()))
}

/// HOME for a program of `user` (of the process's own user if it is `None`), from the image's own file if it is known.
pub(super) fn home(user: Option<&[u8]>, images_own: Option<&[u8]>) -> Vec<u8> {
    match images_own {
        Some(passwd) => account(passwd, user).home,
        None => account(&passwd(), user).home,
    }
}

/// Writes the home folder and the shell of `user` into this process's line of the container's `/etc/passwd`, and the `ids` that
/// the program sees itself as. Best effort: the file may be the image's own, and not writable.
pub(super) fn settle(user: &[u8], images_own: Option<&[u8]>, ids: Option<[u32; 2]>) {
    let passwd = passwd();
    let account = account(images_own.unwrap_or(&passwd), Some(user));
    if let Some(text) = with_own_line(&passwd, own_uid(), ids, &account) {
        rewrite(&text).ok();
    }
}

/// The ids that a program sees itself as that asks for these. Without a user it is its own; without a group it is that of the
/// user in the image's `passwd` file, else root's, as with other container runtimes.
pub(super) fn ids(uid: Option<u32>, gid: Option<u32>, images_own: Option<&[u8]>) -> [u32; 2] {
    let gid = gid.unwrap_or_else(|| match images_own {
        Some(passwd) => gid_of(passwd, uid),
        None => gid_of(&passwd(), uid),
    });
    [uid.unwrap_or_else(own_uid), gid]
}

/// Writes the image's own `/etc/passwd` or `/etc/group` to `reader`, and nothing if the image has none. The caller must be in the
/// namespaces of the container and have rights over them; afterwards the process must exit.
pub(super) fn send_images_own(file: &str, reader: BorrowedFd<'_>) -> io::Result<()> {
    unshare_mounts()?;
    let path = format!("/etc/{file}");
    let unmount = || umount2(path.as_str(), MntFlags::MNT_DETACH).is_ok();
    let text = lowest(unmount, || match read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        read => read,
    })?;
    File::from(reader.try_clone_to_owned()?).write_all(&text)
}

/// The image's own text: the lowest one below all that the runtime and the pod have mounted there. The lowest file of all may be an
/// empty one of the runtime, on which it has mounted the image's (`underlay`).
fn lowest(
    mut unmount: impl FnMut() -> bool,
    read: impl Fn() -> io::Result<Vec<u8>>,
) -> io::Result<Vec<u8>> {
    let mut lowest = read();
    while unmount() {
        match read() {
            Ok(text) if text.is_empty() => {}
            text => lowest = text,
        }
    }
    lowest
}

/// Writes in place: the file is a mount point, over which nothing can be renamed.
fn rewrite(text: &[u8]) -> io::Result<()> {
    let mut file = File::options().write(true).truncate(true).open(PASSWD)?;
    file.write_all(text)
}

/// The text of `/etc/passwd`; empty if there is no regular file of an acceptable size.
fn passwd() -> Vec<u8> {
    read(PASSWD).unwrap_or_default()
}

/// The text of a regular file of an acceptable size.
fn read(path: &str) -> io::Result<Vec<u8>> {
    // The file is the image's, and may be a pipe.
    let nonblock = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
    let file = File::options()
        .read(true)
        .custom_flags(nonblock)
        .open(path)?;
    let meta = file.metadata()?;
    if !meta.is_file() || meta.len() > PASSWD_BYTES {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut text = Vec::new();
    file.take(PASSWD_BYTES).read_to_end(&mut text)?;
    Ok(text)
}

fn own_uid() -> u32 {
    rustix::process::getuid().as_raw()
}

fn account(passwd: &[u8], user: Option<&[u8]>) -> Account {
    let uid = match user {
        Some(user) => uid_of(passwd, user),
        None => Some(own_uid()),
    };
    uid.and_then(|uid| account_of(passwd, uid))
        .unwrap_or_else(|| Account {
            home: b"/".to_vec(),
            shell: Vec::new(),
        })
}

fn lines(passwd: &[u8]) -> impl Iterator<Item = Vec<&[u8]>> {
    let lines = passwd.split(|byte| *byte == b'\n');
    lines.map(|line| line.split(|byte| *byte == b':').collect())
}

fn number(field: &[u8]) -> Option<u32> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

/// PURE: the uid that `user` means, in the form of an image's `User`: a name or a number, with or without a group. A
/// number is always a uid, never a name.
pub(crate) fn uid_of(passwd: &[u8], user: &[u8]) -> Option<u32> {
    let user = user.split(|byte| *byte == b':').next().unwrap_or_default();
    if user.is_empty() {
        return Some(0);
    }
    number(user).or_else(|| named(passwd, user))
}

/// PURE: the account of `uid` in the text of a `passwd` file; the first line with that uid counts.
fn account_of(passwd: &[u8], uid: u32) -> Option<Account> {
    let mut own = lines(passwd)
        .filter(|fields| fields.len() >= 6 && fields.get(2).copied().and_then(number) == Some(uid));
    let fields = own.next()?;
    let home = fields.get(5).filter(|home| !home.is_empty());
    Some(Account {
        home: home.map_or_else(|| b"/".to_vec(), |home| home.to_vec()),
        shell: fields.get(6).map_or_else(Vec::new, |shell| shell.to_vec()),
    })
}

/// PURE: the group in the line of `uid`; root's if there is none.
fn gid_of(passwd: &[u8], uid: Option<u32>) -> u32 {
    let mut own = lines(passwd).filter(|fields| {
        fields.len() >= 6 && fields.get(2).copied().and_then(number) == uid && uid.is_some()
    });
    let fields = own.next();
    fields
        .and_then(|fields| number(fields.get(3)?))
        .unwrap_or_default()
}

/// PURE: the text of a `passwd` file with the home folder and the shell of `account` in the line of `uid`, and the numbers
/// `ids` if there is no line for them; `None` if that changes nothing.
fn with_own_line(
    passwd: &[u8],
    uid: u32,
    ids: Option<[u32; 2]>,
    account: &Account,
) -> Option<Vec<u8>> {
    let own = account_of(passwd, uid)?;
    let ids = ids.filter(|[shown, _]| *shown != uid);
    if ids.is_some_and(|[shown, _]| account_of(passwd, shown).is_some()) {
        return None;
    }
    let numbers = ids.map(|ids| ids.map(|id| id.to_string()));
    let mut wanted = account.clone();
    if wanted.shell.is_empty() {
        wanted.shell = b"/bin/sh".to_vec();
    }
    if own == wanted && numbers.is_none() {
        return None;
    }
    let mut done = false;
    let lines: Vec<Vec<u8>> = lines(passwd)
        .map(|mut fields| {
            let is_own = fields.len() >= 6 && fields.get(2).copied().and_then(number) == Some(uid);
            if is_own && !done {
                done = true;
                fields.truncate(5);
                fields.extend([wanted.home.as_slice(), wanted.shell.as_slice()]);
                let places = fields.iter_mut().skip(2);
                for (field, number) in places.zip(numbers.iter().flatten()) {
                    *field = number.as_bytes();
                }
            }
            fields.join(&b':')
        })
        .collect();
    Some(lines.join(&b'\n'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n\
        toor:x:0:0::/toor:/bin/false\n\
        broken\n\
        1000:x:7:7::/seven:/bin/sh\n\
        jovyan:x:1000:100::/home/jovyan:/bin/zsh\n\
        daemon:x:1:1:::/sbin/nologin\n\
        hpc:x:2001:2001:An HPC user:/home/hpc:/bin/tcsh\n";

    fn home_of(user: &[u8]) -> String {
        String::from_utf8(account(PASSWD, Some(user)).home).unwrap()
    }

    #[test]
    fn home_is_the_one_in_the_images_passwd_file() {
        for (user, home) in [
            ("", "/root"),
            ("0", "/root"),
            ("root", "/root"),
            // Of two lines with one uid the first counts, whichever name was given.
            ("toor", "/root"),
            ("1000", "/home/jovyan"),
            ("1000:100", "/home/jovyan"),
            ("jovyan", "/home/jovyan"),
            ("jovyan:users", "/home/jovyan"),
            ("daemon", "/"),
            ("1234", "/"),
            ("nobody-knows", "/"),
            ("4294967296", "/"),
        ] {
            assert_eq!(home_of(user.as_bytes()), home, "{user:?}");
        }
        assert_eq!(account(b"", Some(b"0")).home, b"/");
    }

    #[test]
    fn names_and_the_own_uid_may_be_overwritten() {
        let own = own_uid();
        for (user, wanted) in [
            ("", false),
            ("4294967295", false),
            ("4294967295:0", false),
            ("jovyan", true),
            (&format!("{own}"), true),
            (&format!("{own}:5"), true),
        ] {
            assert_eq!(may_be_overwritten(user.as_bytes()), wanted, "{user:?}");
        }
    }

    #[test]
    fn names_of_users_and_groups_are_told_from_numbers() {
        let of = |user: &'static str| {
            names(user.as_bytes()).map(|name| name.map(|name| std::str::from_utf8(name).unwrap()))
        };
        for (user, wanted) in [
            ("", [None, None]),
            ("0", [None, None]),
            ("1000:100", [None, None]),
            ("1000:", [None, None]),
            ("jovyan", [Some("jovyan"), None]),
            ("jovyan:100", [Some("jovyan"), None]),
            ("jovyan:users", [Some("jovyan"), Some("users")]),
            ("1000:users", [None, Some("users")]),
            (":users", [None, Some("users")]),
            ("4294967296", [Some("4294967296"), None]),
        ] {
            assert_eq!(of(user), wanted, "{user:?}");
        }
    }

    #[test]
    fn the_images_own_text_is_the_lowest_that_is_not_empty() {
        fn of(mounted: &[&[u8]]) -> Vec<u8> {
            let at = std::cell::Cell::new(0);
            let unmount = || {
                let is_mount = at.get() + 1 < mounted.len();
                at.set(at.get() + usize::from(is_mount));
                is_mount
            };
            lowest(unmount, || Ok(mounted[at.get()].to_vec())).unwrap()
        }
        assert_eq!(of(&[b"image"]), b"image");
        assert_eq!(of(&[b""]), b"");
        assert_eq!(of(&[b"runtime", b"image"]), b"image");
        assert_eq!(of(&[b"pod", b"runtime", b"image"]), b"image");
        // The runtime has mounted each file of the image's `/etc`, because the pod mounts something new there.
        assert_eq!(of(&[b"runtime", b"image", b""]), b"image");
        assert_eq!(of(&[b"image", b""]), b"image");
    }

    #[test]
    fn a_name_has_the_number_of_its_line() {
        let group = b"root:x:0:\nusers:x:100:jovyan\nbroken:x\nbroken:x:7:\nusers:x:8:\n";
        assert_eq!(named(group, b"users"), Some(100));
        assert_eq!(named(group, b"root"), Some(0));
        assert_eq!(named(group, b"broken"), Some(7));
        for none in ["user", "100", "staff"] {
            assert_eq!(named(group, none.as_bytes()), None, "{none}");
        }
        assert_eq!(named(PASSWD, b"jovyan"), Some(1000));
        assert_eq!(named(b"", b"root"), None);
        assert_eq!(named(b"a:x:1\r\nb:x:2\r\n", b"b"), Some(2));
    }

    #[test]
    fn the_own_line_gets_home_and_shell_of_the_user_and_nothing_else_changes() {
        let jovyan = account(PASSWD, Some(b"jovyan"));
        let text = with_own_line(PASSWD, 2001, None, &jovyan).unwrap();
        let old = String::from_utf8(PASSWD.to_vec()).unwrap();
        let new = old.replace("/home/hpc:/bin/tcsh", "/home/jovyan:/bin/zsh");
        assert_eq!(String::from_utf8(text.clone()).unwrap(), new);
        assert_eq!(with_own_line(&text, 2001, None, &jovyan), None);
        // The user is unknown: it gets the shell that every image has.
        let unknown = account(PASSWD, Some(b"1234"));
        let text = with_own_line(PASSWD, 2001, None, &unknown).unwrap();
        assert!(text.ends_with(b"hpc:x:2001:2001:An HPC user:/:/bin/sh\n"));
        // If there is no line, none is added.
        assert_eq!(with_own_line(PASSWD, 3000, None, &jovyan), None);
    }

    #[test]
    fn who_is_seen_as_another_user_has_a_line() {
        let unknown = account(PASSWD, Some(b"1234"));
        let text = with_own_line(PASSWD, 2001, Some([1234, 5]), &unknown).unwrap();
        assert!(text.ends_with(b"hpc:x:1234:5:An HPC user:/:/bin/sh\n"));
        // The image has a line for it.
        let jovyan = account(PASSWD, Some(b"1000"));
        let known = with_own_line(PASSWD, 2001, Some([1000, 5]), &jovyan);
        assert_eq!(known, None);
        // It is its own.
        let own = account(PASSWD, Some(b"2001"));
        assert_eq!(with_own_line(PASSWD, 2001, Some([2001, 0]), &own), None);
    }

    #[test]
    fn the_group_is_that_of_the_user_in_the_image_else_roots() {
        let of = |uid, gid| ids(uid, gid, Some(PASSWD));
        assert_eq!(of(Some(1000), None), [1000, 100]);
        assert_eq!(of(Some(1000), Some(2002)), [1000, 2002]);
        assert_eq!(of(Some(1234), None), [1234, 0]);
        assert_eq!(of(None, Some(2002)), [own_uid(), 2002]);
    }
}
