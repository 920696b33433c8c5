//! PURE: the places below a container's `/dev` at which no volume can be mounted.

use crate::{paths, pb};

/// The extended resources whose devices the container runtime adds to a container's `/dev`.
pub const NVIDIA: &str = "nvidia.com/gpu";
/// See [`NVIDIA`].
pub const AMD: &str = "amd.com/gpu";

/// The files of a container's `/dev` that its runtime makes: devices, and links to them.
const DEVICES: [&str; 11] = [
    "fd", "full", "null", "ptmx", "random", "stderr", "stdin", "stdout", "tty", "urandom", "zero",
];

/// The file systems in a container's `/dev` in which no file or folder can be created.
const FILE_SYSTEMS: [&str; 2] = ["mqueue", "pts"];

/// Whether the container requests the extended resource.
#[must_use]
pub fn requests(container: &pb::Container, resource: &str) -> bool {
    let given = [&container.limits, &container.requests];
    let mut given = given.into_iter().flatten();
    given.any(|given| given.extended.get(resource).is_some_and(|n| *n > 0))
}

/// Why nothing can be mounted at `place`, a clean path in the container, and what to do instead; `None` if something can.
#[must_use]
pub fn device_problem(container: &pb::Container, place: &str) -> Option<&'static str> {
    let below = place.strip_prefix("/dev/")?;
    let first = below.split('/').next().unwrap_or_default();
    // In a `/dev` of the pod's own the runtime makes nothing.
    if mounts_at(container, "/dev") {
        return None;
    }
    if DEVICES.contains(&first) {
        return Some(
            "is a device that every container has, where nothing can be mounted; leave the mount out",
        );
    }
    if first != below
        && FILE_SYSTEMS.contains(&first)
        && !mounts_at(container, &format!("/dev/{first}"))
    {
        return Some(
            "lies in a file system of the kernel, where nothing can be mounted; mount the volume elsewhere",
        );
    }
    let nvidia = first.starts_with("nvidia") && requests(container, NVIDIA);
    let amd = ["dri", "kfd"].contains(&first) && requests(container, AMD);
    (nvidia || amd).then_some(
        "is a device of the GPUs that the container requests, where nothing can be mounted; leave the mount out",
    )
}

fn mounts_at(container: &pb::Container, place: &str) -> bool {
    let is_there =
        |mount: &pb::Mount| paths::in_container(&mount.path).is_ok_and(|path| path == place);
    container.mounts.iter().any(is_there)
}
