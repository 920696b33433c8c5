//! Measures how much disk space a folder tree takes, whatever a program has put into it.
//!
//! Folders are opened relative to the descriptor of their parent, no link is followed, and other file systems are not
//! entered. A file with several names counts once in all: each name counts for its share. Each level keeps a descriptor
//! open, so what is more than [`DEEPEST`] levels down is measured after everything above it: no depth hides anything. Only if
//! more than [`WAITING`] folders wait for that at a time, further ones are left out.
//!
//! The function blocks on file I/O.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
    time::Instant,
};

use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, fstat, openat, statat},
    io::Errno,
};

/// How deep a tree is measured in one go.
const DEEPEST: usize = 64;

/// How many folders at that depth may wait to be measured.
const WAITING: usize = 256;

/// The unit of `st_blocks`, whatever the file system's block size is (stat(2)).
const BLOCK: u64 = 512;

const FOLDER: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK)
    .union(OFlags::CLOEXEC);

/// The bytes on disk of everything below `path`, or of a part of it that has more than `most`. It may change meanwhile, and what
/// cannot be read does not count.
///
/// # Errors
/// `TimedOut` at the time `until`; other errors only for `path` itself.
pub fn size_until(path: &Path, most: u64, until: Instant) -> io::Result<u64> {
    let top = openat(CWD, path, FOLDER, Mode::empty())?;
    let device = fstat(&top)?.st_dev;
    let mut levels = vec![Dir::new(top)?];
    let mut waiting = Vec::new();
    let mut bytes = 0_u64;
    loop {
        let depth = levels.len();
        let Some(folder) = levels.last_mut() else {
            let Some(deep) = waiting.pop() else {
                return Ok(bytes);
            };
            levels.push(Dir::new(deep)?);
            continue;
        };
        if Instant::now() >= until {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let Some(Ok(entry)) = folder.read() else {
            levels.pop();
            continue;
        };
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let Ok(parent) = folder.fd() else { continue };
        let Ok(size) = entry_size(parent, name) else {
            continue;
        };
        bytes = bytes.saturating_add(size);
        if bytes > most {
            return Ok(bytes);
        }
        let is_folder = matches!(entry.file_type(), FileType::Directory | FileType::Unknown);
        if !is_folder {
            continue;
        }
        let Ok(below) = enter(parent, name, device) else {
            continue;
        };
        if depth < DEEPEST {
            levels.push(Dir::new(below)?);
        } else if waiting.len() < WAITING {
            waiting.push(below);
        }
    }
}

/// What one name of a file, or a folder without its entries, takes.
fn entry_size(parent: BorrowedFd<'_>, name: &CStr) -> Result<u64, Errno> {
    let found = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let bytes = u64::try_from(found.st_blocks)
        .unwrap_or(0)
        .saturating_mul(BLOCK);
    let is_folder = FileType::from_raw_mode(found.st_mode) == FileType::Directory;
    #[cfg_attr(
        target_arch = "x86_64",
        expect(clippy::useless_conversion, reason = "u32 on arm64")
    )]
    let names = if is_folder {
        1
    } else {
        u64::from(found.st_nlink.max(1))
    };
    Ok(bytes / names)
}

fn enter(parent: BorrowedFd<'_>, name: &CStr, device: u64) -> Result<OwnedFd, Errno> {
    let folder = openat(parent, name, FOLDER, Mode::empty())?;
    if fstat(folder.as_fd())?.st_dev == device {
        Ok(folder)
    } else {
        Err(Errno::XDEV)
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "files of the test's own")]
mod tests {
    use std::{fs, os::unix::fs::symlink, time::Duration};

    use super::*;

    fn size(path: &Path) -> u64 {
        let until = Instant::now() + Duration::from_secs(10);
        size_until(path, u64::MAX, until).unwrap()
    }

    #[test]
    fn files_count_once_and_links_lead_nowhere() {
        let base = tempfile::tempdir().unwrap();
        let (tree, outside) = (base.path().join("tree"), base.path().join("outside"));
        fs::create_dir_all(tree.join("a/b")).unwrap();
        fs::create_dir(&outside).unwrap();
        let empty = size(&tree);
        fs::write(outside.join("large"), vec![1; 4 << 20]).unwrap();
        symlink(&outside, tree.join("a/folder")).unwrap();
        symlink(outside.join("large"), tree.join("a/file")).unwrap();
        let links = size(&tree);
        assert!(links < empty + (64 << 10), "{links}, {empty} before");
        fs::write(tree.join("a/b/file"), vec![1; 1 << 20]).unwrap();
        fs::hard_link(tree.join("a/b/file"), tree.join("other-name")).unwrap();
        let file = size(&tree) - links;
        assert!((1 << 20..(1 << 20) + (64 << 10)).contains(&file), "{file}");
        // A sparse file takes what is written.
        fs::File::create(tree.join("sparse"))
            .unwrap()
            .set_len(1 << 40)
            .unwrap();
        assert!(size(&tree) < 2 << 20);
    }

    /// A program could otherwise write without limit below many folders.
    #[test]
    fn no_depth_hides_what_is_written() {
        let base = tempfile::tempdir().unwrap();
        let mut deep = base.path().to_owned();
        for level in 1..=300 {
            deep.push("d");
            fs::create_dir(&deep).unwrap();
            if level == DEEPEST || level == 300 {
                fs::write(deep.join("file"), vec![1; 1 << 20]).unwrap();
            }
        }
        let found = size(base.path());
        assert!((2 << 20..4 << 20).contains(&found), "{found}");
    }

    #[test]
    fn what_exceeds_the_limit_is_not_measured_to_its_end() {
        let base = tempfile::tempdir().unwrap();
        for name in ["a", "b", "c"] {
            fs::write(base.path().join(name), vec![1; 1 << 20]).unwrap();
        }
        let until = Instant::now() + Duration::from_secs(10);
        let found = size_until(base.path(), 1 << 19, until).unwrap();
        assert!((1 << 20..2 << 20).contains(&found), "{found}");
    }

    #[test]
    fn a_tree_that_takes_too_long_is_an_error() {
        let base = tempfile::tempdir().unwrap();
        fs::write(base.path().join("file"), "x").unwrap();
        let error = size_until(base.path(), u64::MAX, Instant::now()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
