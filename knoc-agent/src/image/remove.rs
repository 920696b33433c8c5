//! Removes what an unpacked image left, whatever modes its folders have and however deep they are. Blocking.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

/// Removes a folder of our own and all that is in it. Without recursion, and holding no list: an image may have any
/// number of folders in each other. Links are removed, not followed. Not being there is success.
pub(super) fn folder(root: &Path) -> io::Result<()> {
    let mut here = root.to_owned();
    loop {
        match inner(&here) {
            // Down into it first.
            Ok(Some(name)) => here.push(name),
            Ok(None) => {
                match fs::remove_dir(&here) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    Ok(()) | Err(_) => {}
                }
                if here == root {
                    return Ok(());
                }
                here.pop();
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound && here == root => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Removes the files of a folder up to the first folder in it, and names that.
fn inner(folder: &Path) -> io::Result<Option<std::ffi::OsString>> {
    let entries = match fs::read_dir(folder) {
        // An image may have folders that not even their owner may read or change.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            fs::set_permissions(folder, Permissions::from_mode(0o700))?;
            fs::read_dir(folder)?
        }
        entries => entries?,
    };
    let mut writable = false;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            if !writable {
                fs::set_permissions(folder, Permissions::from_mode(0o700))?;
            }
            return Ok(Some(entry.file_name()));
        }
        if !writable {
            fs::set_permissions(folder, Permissions::from_mode(0o700))?;
            writable = true;
        }
        match fs::remove_file(entry.path()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_without_permissions_deep_ones_and_links_go() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        let kept = dir.path().join("kept");
        fs::File::create(&kept).unwrap();
        let mut deep = root.clone();
        for _ in 0..800 {
            deep.push("d");
        }
        fs::create_dir_all(&deep).unwrap();
        fs::create_dir_all(root.join("closed/inner")).unwrap();
        fs::File::create(root.join("closed/inner/file")).unwrap();
        std::os::unix::fs::symlink(dir.path(), root.join("link")).unwrap();
        for (name, mode) in [("closed/inner", 0o000), ("closed", 0o555)] {
            fs::set_permissions(root.join(name), Permissions::from_mode(mode)).unwrap();
        }
        folder(&root).unwrap();
        assert!(!root.exists() && kept.exists());
        folder(&root).unwrap();
    }
}
