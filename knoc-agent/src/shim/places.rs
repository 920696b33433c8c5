//! PURE: the places in a container at which something is mounted: their order, the mount points that lie in another
//! mount, and those below `/dev`.
//!
//! A container runtime mounts parents before what lies below them, whatever their order in the pod. The mount point of a
//! child is a folder (or file) of its parent, made there if it is missing, as the kubelet does it. Below `/dev` the
//! runtime has a file system of its own in which it makes no mount points: such a volume is mounted elsewhere, and a
//! link leads to it.

use std::path::{Path, PathBuf};

use crate::runtime::{Bind, INSIDE};

/// Has a file system of the runtime's own.
const DEVICES: &str = "/dev";
/// Shared by the containers of a pod.
pub(crate) const SHARED_MEMORY: &str = "/dev/shm";
/// Folders of the runtime's `/dev`, over which something can be mounted.
const FOLDERS: [&str; 2] = ["/dev/mqueue", "/dev/pts"];

/// A symbolic link in the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Link {
    /// What the pod asked for.
    pub(crate) name: PathBuf,
    /// Where it is mounted.
    pub(crate) target: PathBuf,
}

/// A place on the host at which something is mounted in the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MountPoint<'a> {
    /// The mount point in its parent's source.
    pub(crate) place: PathBuf,
    /// What will be mounted there: a mount point is of the same kind.
    pub(crate) source: &'a Path,
}

/// Orders `binds` as they are to be mounted: parents before children, otherwise as the pod has them. Of two at one place
/// only the last is seen.
pub(crate) fn order(binds: &mut Vec<Bind>) {
    let mut seen = Vec::new();
    binds.reverse();
    binds.retain(|bind| {
        let new = !seen.contains(&bind.target);
        if new {
            seen.push(bind.target.clone());
        }
        new
    });
    binds.reverse();
    binds.sort_by_key(|bind| bind.target.components().count());
}

/// Moves what is to be mounted below `/dev` into [`INSIDE`], where mount points can be made; answers the links that lead
/// there. `binds` are in order.
pub(crate) fn leave_devices(binds: &mut [Bind]) -> Vec<Link> {
    // Over a `/dev` of the pod's own everything can be mounted.
    if binds.iter().any(|bind| bind.target == Path::new(DEVICES)) {
        return Vec::new();
    }
    let mut links: Vec<Link> = Vec::new();
    for bind in binds {
        let target = bind.target.as_path();
        let possible = target.starts_with(SHARED_MEMORY)
            || FOLDERS.iter().any(|folder| target == Path::new(folder));
        if possible || !target.starts_with(DEVICES) {
            continue;
        }
        let parent = links
            .iter()
            .find_map(|link| Some(link.target.join(target.strip_prefix(&link.name).ok()?)));
        bind.target = parent.unwrap_or_else(|| {
            let target = Path::new(INSIDE).join("dev").join(links.len().to_string());
            links.push(Link {
                name: bind.target.clone(),
                target: target.clone(),
            });
            target
        });
    }
    links
}

/// The mount points of `binds` that lie in one of `parents`, or in an earlier bind. `binds` are in order.
pub(crate) fn mount_points<'a>(
    parents: &[(PathBuf, PathBuf)],
    binds: &'a [Bind],
) -> Vec<MountPoint<'a>> {
    let mut covers: Vec<(&Path, &Path)> = parents
        .iter()
        .map(|(target, source)| (target.as_path(), source.as_path()))
        .collect();
    let mut points = Vec::new();
    for bind in binds {
        let nearest = covers
            .iter()
            .filter_map(|(target, source)| Some((source, bind.target.strip_prefix(target).ok()?)))
            .filter(|(_, rest)| !rest.as_os_str().is_empty())
            .min_by_key(|(_, rest)| rest.components().count());
        if let Some((source, rest)) = nearest {
            points.push(MountPoint {
                place: source.join(rest),
                source: &bind.source,
            });
        }
        covers.push((&bind.target, &bind.source));
    }
    points
}

/// Those of `folders` that no bind covers: they are the image's own.
pub(crate) fn of_the_image<'a>(folders: &[&'a str], binds: &[Bind]) -> Vec<&'a str> {
    let covered = |folder: &str| {
        binds
            .iter()
            .any(|bind| Path::new(folder).starts_with(&bind.target))
    };
    let own = folders.iter().copied();
    own.filter(|folder| !covered(folder)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn binds(places: &[&str]) -> Vec<Bind> {
        let bind = |(index, place): (usize, &&str)| Bind {
            source: format!("/v{index}").into(),
            target: place.into(),
            read_only: false,
        };
        places.iter().enumerate().map(bind).collect()
    }

    fn targets(binds: &[Bind]) -> Vec<&str> {
        binds
            .iter()
            .map(|bind| bind.target.to_str().unwrap())
            .collect()
    }

    #[test]
    fn parents_come_before_their_children_whatever_the_order_of_the_pod() {
        let mut all = binds(&["/a/b/c", "/z", "/a", "/tmp/x", "/a/b", "/tmp", "/"]);
        order(&mut all);
        assert_eq!(
            targets(&all),
            ["/", "/z", "/a", "/tmp", "/tmp/x", "/a/b", "/a/b/c"]
        );
    }

    #[test]
    fn of_two_at_one_place_the_last_is_seen() {
        let mut all = binds(&["/a", "/b", "/a"]);
        order(&mut all);
        assert_eq!(targets(&all), ["/b", "/a"]);
        assert_eq!(all[1].source, Path::new("/v2"));
    }

    #[test]
    fn what_lies_below_dev_is_mounted_elsewhere_and_linked() {
        let mut all = binds(&[
            "/dev/hugecache",
            "/dev/shm",
            "/dev/mqueue",
            "/devices",
            "/dev/a/b",
            "/dev/hugecache/x",
            "/dev/shm/x",
        ]);
        let links = leave_devices(&mut all);
        assert_eq!(
            targets(&all),
            [
                "/.knoc/dev/0",
                "/dev/shm",
                "/dev/mqueue",
                "/devices",
                "/.knoc/dev/1",
                "/.knoc/dev/0/x",
                "/dev/shm/x",
            ]
        );
        let link = |name: &str, target: &str| Link {
            name: name.into(),
            target: target.into(),
        };
        assert_eq!(
            links,
            [
                link("/dev/hugecache", "/.knoc/dev/0"),
                link("/dev/a/b", "/.knoc/dev/1"),
            ]
        );
        let mut all = binds(&["/dev", "/dev/hugecache"]);
        assert_eq!(leave_devices(&mut all), []);
        assert_eq!(targets(&all), ["/dev", "/dev/hugecache"]);
    }

    #[test]
    fn a_mount_point_lies_in_the_nearest_parent() {
        let all = binds(&["/a", "/a/b", "/ab", "/tmp/x", "/a/b/c/d", "/e/f"]);
        let parents = [(PathBuf::from("/tmp"), PathBuf::from("/work"))];
        let points = mount_points(&parents, &all);
        let places: Vec<_> = points
            .iter()
            .map(|point| {
                (
                    point.place.to_str().unwrap(),
                    point.source.to_str().unwrap(),
                )
            })
            .collect();
        assert_eq!(
            places,
            [("/v0/b", "/v1"), ("/work/x", "/v3"), ("/v1/c/d", "/v4")]
        );
    }

    #[test]
    fn a_folder_is_the_images_unless_a_mount_covers_it() {
        let temporary = ["/tmp", "/var/tmp"];
        assert_eq!(of_the_image(&temporary, &binds(&["/tmp/x"])), temporary);
        assert_eq!(of_the_image(&temporary, &binds(&["/var"])), ["/tmp"]);
        assert_eq!(
            of_the_image(&temporary, &binds(&["/tmp", "/var/tmp"])).len(),
            0
        );
    }
}
