//! Mounts a folder of an image over the whole of it, inside of a container: `subPath` of an image volume.
//!
//! The container runtime has mounted the image at the path that the pod names. This process makes that its root, so a link in
//! the image, wherever it points, leads to a file of the image, and changes into the folder. What it is in then is what it
//! mounts: no path is looked up twice.

use std::io;

use nix::mount::{MsFlags, mount};
use rustix::process::{chdir, chroot};

/// The longest request: two paths.
pub(super) const REQUEST_BYTES: u64 = 2 << 12;

/// `request` has the path at which the image is mounted in the container and, after a NUL, that of the folder in the image. The
/// caller must be in the namespaces of the container and have rights over them; afterwards the process must exit.
pub(super) fn mount_over_whole(request: &[u8]) -> io::Result<()> {
    let mut paths = request.split(|byte| *byte == 0);
    let (Some(image), Some(folder), None) = (paths.next(), paths.next(), paths.next()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    chroot(image)?;
    chdir("/")?;
    let none = None::<&str>;
    // Another folder of the same image must not appear here, nor this one there.
    mount(none, "/", none, MsFlags::MS_PRIVATE, none)?;
    chdir(folder)?;
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    Ok(mount(Some("."), "/", none, flags, none)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_two_paths() {
        for request in ["", "/models", "/models\0a\0b"] {
            let error = mount_over_whole(request.as_bytes()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{request:?}");
        }
    }
}
