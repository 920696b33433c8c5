//! Unpacks the archive of the remote `tar`, never outside of the destination. Blocking.
//!
//! The image's `tar` is not trusted. Links are not created, so that no entry can lead outside. A name that is absolute,
//! contains `..` or is not below the requested path is an error. The long names that come before an entry are
//! bounded, because the library reads them into memory.

use std::{
    cell::Cell,
    fs,
    io::{self, Read},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Component, Path, PathBuf},
    rc::Rc,
};

use bytes::{Buf as _, Bytes};
use tokio::sync::mpsc;

use super::{super::CtlError, LeftOut};

/// The most bytes between the data of two entries: headers, and long names of up to 4 KiB that do not fit into a header.
const MAX_HEAD: u64 = 256 << 10;

/// Unpacks `member` of the archive as `to`. Returns what was left out (links, devices).
pub(super) fn receive(
    receiver: mpsc::Receiver<Bytes>,
    member: &str,
    to: &Path,
) -> Result<LeftOut, CtlError> {
    let allowed = Rc::new(Cell::new(MAX_HEAD));
    let mut archive = tar::Archive::new(Pipe {
        receiver,
        left: Bytes::new(),
        allowed: Rc::clone(&allowed),
    });
    let broken = |source| CtlError::Copy {
        what: "read the archive".to_owned(),
        source,
    };
    let mut left_out = LeftOut::default();
    for entry in archive.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        let name = entry.path().map_err(broken)?.into_owned();
        let place = place(&name, member, to)?;
        let mode = entry.header().mode().unwrap_or(0o644) & 0o777;
        let failed = |source| CtlError::Copy {
            what: format!("write {}", place.display()),
            source,
        };
        allowed.set(u64::MAX);
        let kind = entry.header().entry_type();
        if kind.is_dir() {
            fs::create_dir_all(&place).map_err(failed)?;
            // Its entries follow, so the folder must be writable for us.
            let rights = fs::Permissions::from_mode(mode | 0o700);
            fs::set_permissions(&place, rights).map_err(failed)?;
        } else if kind.is_file() {
            write(&place, mode, &mut entry).map_err(failed)?;
        } else {
            left_out.add(place.clone());
        }
        // An entry of any kind may have data. It is read here, so that it does not count as part of the next header.
        io::copy(&mut entry, &mut io::sink()).map_err(failed)?;
        allowed.set(MAX_HEAD);
    }
    Ok(left_out)
}

/// PURE: the path at which an entry is written.
fn place(name: &Path, member: &str, to: &Path) -> Result<PathBuf, CtlError> {
    let refused = || CtlError::Archive {
        name: name.to_owned(),
    };
    let inside = name.strip_prefix("./").unwrap_or(name);
    let inside = inside.strip_prefix(member).map_err(|_| refused())?;
    let mut place = to.to_owned();
    for component in inside.components() {
        match component {
            Component::Normal(part) => place.push(part),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => {
                return Err(refused());
            }
        }
    }
    Ok(place)
}

/// Writes a file in place, so that the user can see it grow.
fn write(place: &Path, mode: u32, data: &mut impl Read) -> io::Result<()> {
    let mut options = fs::OpenOptions::new();
    let options = options.write(true).create(true).truncate(true).mode(mode);
    let mut file = options.open(place)?;
    io::copy(data, &mut file)?;
    Ok(())
}

/// A reader of the bytes that arrive through a channel.
struct Pipe {
    receiver: mpsc::Receiver<Bytes>,
    left: Bytes,
    /// How many bytes may be read before this is reset.
    allowed: Rc<Cell<u64>>,
}

impl Read for Pipe {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.left.is_empty() {
            match self.receiver.blocking_recv() {
                Some(data) => self.left = data,
                None => return Ok(0),
            }
        }
        let allowed = usize::try_from(self.allowed.get()).unwrap_or(usize::MAX);
        let count = buffer.len().min(self.left.len()).min(allowed);
        if count == 0 && !buffer.is_empty() {
            return Err(io::Error::other("the name of an entry is too long"));
        }
        let used = u64::try_from(count).unwrap_or_default();
        self.allowed.set(self.allowed.get().saturating_sub(used));
        self.left
            .copy_to_slice(buffer.get_mut(..count).unwrap_or_default());
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_written_elsewhere() {
        let to = Path::new("/home/me/copy");
        let at = |name: &str| {
            place(Path::new(name), "data", to).map(|place| place.display().to_string())
        };
        assert_eq!(at("data").unwrap(), "/home/me/copy");
        assert_eq!(at("data/a/./b").unwrap(), "/home/me/copy/a/b");
        assert_eq!(at("./data/a").unwrap(), "/home/me/copy/a");
        for evil in [
            "../x",
            "data/../../x",
            "/etc/passwd",
            "other",
            "data/../data/x",
            "database",
        ] {
            let error = at(evil).unwrap_err().to_string();
            assert!(error.contains("outside"), "{evil}: {error}");
        }
    }

    fn arriving(archive: &[u8]) -> mpsc::Receiver<Bytes> {
        let (sender, receiver) = mpsc::channel(1 << 10);
        for piece in archive.chunks(700) {
            sender.try_send(Bytes::copy_from_slice(piece)).unwrap();
        }
        receiver
    }

    #[test]
    fn an_archive_arrives_and_its_links_do_not() {
        let folder = tempfile::tempdir().unwrap();
        let mut archive = tar::Builder::new(Vec::new());
        let mut entry = |name: &str, kind, data: &[u8]| {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_mode(0o4755);
            header.set_size(data.len().try_into().unwrap());
            if kind == tar::EntryType::Symlink {
                header.set_link_name("/etc").unwrap();
            }
            archive.append_data(&mut header, name, data).unwrap();
        };
        entry("d", tar::EntryType::Directory, b"");
        entry("d/run", tar::EntryType::Regular, b"#!/bin/sh\n");
        entry("d/evil", tar::EntryType::Symlink, b"");
        let bytes = archive.into_inner().unwrap();
        let to = folder.path().join("copy");
        let left_out = receive(arriving(&bytes), "d", &to).unwrap();
        assert_eq!(
            (left_out.named, left_out.further),
            (vec![to.join("evil")], 0)
        );
        assert_eq!(fs::read(to.join("run")).unwrap(), b"#!/bin/sh\n");
        let mode = fs::metadata(to.join("run")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7700, 0o700);
        let half = arriving(&bytes[..bytes.len() / 2 + 100]);
        let cut = receive(half, "d", &folder.path().join("cut"));
        assert!(cut.is_err(), "a cut archive is whole");
    }

    /// A program that pretends to be `tar` may announce a name of gigabytes.
    #[test]
    fn an_endless_name_is_an_error_before_it_fills_the_memory() {
        let folder = tempfile::tempdir().unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::GNULongName);
        header.set_path("././@LongLink").unwrap();
        header.set_size(8 << 30);
        header.set_cksum();
        let (sender, receiver) = mpsc::channel(1);
        let to = folder.path().join("copy");
        let sent = std::thread::scope(|scope| {
            let unpacking = scope.spawn(move || receive(receiver, "d", &to));
            let head = Bytes::copy_from_slice(header.as_bytes());
            let name = Bytes::from(vec![b'd'; 64 << 10]);
            let pieces = std::iter::once(head).chain(std::iter::repeat_n(name, 1 << 10));
            let sent = pieces.take_while(|piece| sender.blocking_send(piece.clone()).is_ok());
            let sent = sent.count();
            let error = unpacking.join().unwrap().unwrap_err();
            let text = knoc_proto::error::chain(&error);
            assert!(text.contains("too long"), "{text}");
            sent
        });
        assert!(sent < 10, "{sent} pieces were taken");
    }

    #[test]
    fn what_is_left_out_is_counted_and_only_the_first_are_named() {
        let mut left_out = LeftOut::default();
        for n in 0..1000 {
            left_out.add(PathBuf::from(n.to_string()));
        }
        assert_eq!(left_out.named.len(), 100);
        assert_eq!(left_out.further, 900);
    }
}
