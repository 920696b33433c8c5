//! PURE: the mount points in a container: their order, those that lie in another mount, and those below `/dev`.
//!
//! A container runtime mounts parents before their children, whatever their order in the pod. The mount point of a child is
//! a folder (or file) in its parent, which is created if it is missing, as other runtimes do. Below `/dev` the runtime has
//! a file system of its own and creates no mount points: such a volume is mounted elsewhere, and a link leads to it.

use std::path::{Path, PathBuf};

use knoc_contract::launch::VOLUMES;

use super::volumes::Mounted;
use crate::launch::contain::spec::{Point, PointBase, Source};

/// The runtime mounts a file system of its own here.
const DEVICES: &str = "/dev";
/// Memory shared by the containers of a pod.
pub(crate) const SHARED_MEMORY: &str = "/dev/shm";
/// Folders of the runtime's `/dev` on which a volume can be mounted, and then below them too.
const FOLDERS: [&str; 2] = ["/dev/mqueue", "/dev/pts"];

/// A symbolic link in the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Link {
    /// The path that the pod asked for.
    pub(crate) name: PathBuf,
    /// The path at which the volume is mounted.
    pub(crate) target: PathBuf,
}

/// Puts `binds` in the order of mounting: parents before children, otherwise as the pod has them. Of two with the same
/// target only the last one stays.
pub(crate) fn order(binds: &mut Vec<Mounted>) {
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

/// Moves what is to be mounted below `/dev` into [`VOLUMES`] and returns the links
/// that lead there. `binds` are in the order of mounting.
pub(crate) fn leave_devices(binds: &mut [Mounted]) -> Vec<Link> {
    // If the pod mounts its own `/dev`, mount points can be created in it.
    if binds.iter().any(|bind| bind.target == Path::new(DEVICES)) {
        return Vec::new();
    }
    let mut links: Vec<Link> = Vec::new();
    let mut folders = vec![Path::new(SHARED_MEMORY)];
    for bind in binds {
        let target = bind.target.as_path();
        let own = FOLDERS.map(Path::new).into_iter();
        folders.extend(own.filter(|folder| target == *folder));
        let possible = folders.iter().any(|folder| target.starts_with(folder));
        if possible || !target.starts_with(DEVICES) {
            continue;
        }
        let parent = links
            .iter()
            .find_map(|link| Some(link.target.join(target.strip_prefix(&link.name).ok()?)));
        bind.target = parent.unwrap_or_else(|| {
            let target = Path::new(VOLUMES).join(links.len().to_string());
            links.push(Link {
                name: bind.target.clone(),
                target: target.clone(),
            });
            target
        });
    }
    links
}

/// Sets where the mount point of each of `binds` is created: in the nearest of `parents` (target, and folder on the host)
/// and of the earlier binds that it lies in. `binds` are in the order of mounting. In an image, and in a path of the node that is
/// mounted read-only, nothing is created: the mount point must be there.
pub(crate) fn set_mount_points(parents: &[(PathBuf, PathBuf)], binds: &mut [Mounted]) {
    let mut covers: Vec<(PathBuf, Option<PointBase>)> = parents
        .iter()
        .map(|(target, folder)| (target.clone(), Some(PointBase::Folder(folder.clone()))))
        .collect();
    for (index, bind) in binds.iter_mut().enumerate() {
        let nearest = covers
            .iter()
            .filter_map(|(target, base)| Some((base, bind.target.strip_prefix(target).ok()?)))
            .filter(|(_, rest)| !rest.as_os_str().is_empty())
            .min_by_key(|(_, rest)| rest.components().count());
        bind.point = nearest.and_then(|(base, rest)| {
            Some(Point {
                base: base.clone()?,
                rest: rest.to_owned(),
            })
        });
        let foreign = match bind.source {
            Source::Host(_) => bind.read_only,
            // A sandbox belongs to the site, and other pods use it too.
            Source::Image { .. } => true,
            Source::Inside { .. } | Source::Own(_) => false,
        };
        let base = (!foreign).then_some(PointBase::Mount(index));
        covers.push((bind.target.clone(), base));
    }
}

/// Those of `folders` that no bind covers: they are the image's own.
pub(crate) fn of_the_image<'a>(folders: &[&'a str], binds: &[Mounted]) -> Vec<&'a str> {
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

    fn binds(targets: &[&str]) -> Vec<Mounted> {
        let bind = |(index, target): (usize, &&str)| Mounted {
            what: format!("v{index}"),
            source: Source::Own(format!("/v{index}").into()),
            target: target.into(),
            read_only: false,
            needs_descriptor: false,
            image: None,
            folder: None,
            point: None,
        };
        targets.iter().enumerate().map(bind).collect()
    }

    fn targets(binds: &[Mounted]) -> Vec<&str> {
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
    fn of_two_binds_with_one_target_the_last_stays() {
        let mut all = binds(&["/a", "/b", "/a"]);
        order(&mut all);
        assert_eq!(targets(&all), ["/b", "/a"]);
        assert_eq!(all[1].source, Source::Own("/v2".into()));
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
        let mut all = binds(&["/dev/pts", "/dev/pts/x", "/dev/mqueue/y"]);
        assert_eq!(
            leave_devices(&mut all),
            [link("/dev/mqueue/y", "/.knoc/dev/0")]
        );
        assert_eq!(
            targets(&all),
            ["/dev/pts", "/dev/pts/x", "/.knoc/dev/0"],
            "a volume takes mount points, the kernel's file system takes none"
        );
        let mut all = binds(&["/dev", "/dev/hugecache"]);
        assert_eq!(leave_devices(&mut all), []);
        assert_eq!(targets(&all), ["/dev", "/dev/hugecache"]);
    }

    #[test]
    fn a_mount_point_lies_in_the_nearest_parent() {
        let mut all = binds(&["/a", "/a/b", "/ab", "/tmp/x", "/a/b/c/d", "/e/f"]);
        set_mount_points(&[("/tmp".into(), "/work".into())], &mut all);
        let point = |base: PointBase, rest: &str| {
            let rest = rest.into();
            Some(Point { base, rest })
        };
        let points: Vec<_> = all.into_iter().map(|bind| bind.point).collect();
        assert_eq!(
            points,
            [
                None,
                point(PointBase::Mount(0), "b"),
                None,
                point(PointBase::Folder("/work".into()), "x"),
                point(PointBase::Mount(1), "c/d"),
                None,
            ]
        );
    }

    #[test]
    fn nothing_is_created_in_an_image() {
        let mut all = binds(&["/models", "/models/cache"]);
        all[0].source = Source::Image {
            path: "/site/box".into(),
            expected: None,
        };
        all[0].read_only = true;
        set_mount_points(&[], &mut all);
        assert_eq!(all[1].point, None);
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
