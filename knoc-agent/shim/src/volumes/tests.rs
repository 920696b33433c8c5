use std::fs::File;

use knoc_proto::pod::PodSpec;

use super::{super::scratch::Fallback, *};

fn file(path: &str, data: &'static str, mode: u32) -> pb::VolumeFile {
    pb::VolumeFile {
        path: path.to_owned(),
        data: data.into(),
        mode,
    }
}

fn values(revision: i64, files: Vec<pb::VolumeFile>) -> PodValues {
    let files = vec![pb::VolumeFiles {
        volume: "cm".to_owned(),
        files,
    }];
    let values = pb::PodValues {
        revision,
        files,
        ..Default::default()
    };
    let shape = pb::PodSpec {
        volumes: shape().to_vec(),
        ..Default::default()
    };
    let shape = PodSpec::accepted_before("u1".try_into().unwrap(), shape);
    PodValues::check(values, &shape).unwrap()
}

fn shape() -> [pb::Volume; 2] {
    let volume = |name: &str, source| pb::Volume {
        name: name.to_owned(),
        source: Some(source),
    };
    [
        volume("cm", Source::Files(pb::FilesVolume {})),
        volume("empty", Source::EmptyDir(pb::EmptyDir::default())),
    ]
}

fn mount(volume: &str, sub_path: &str) -> pb::Mount {
    let (volume, sub_path) = (volume.to_owned(), sub_path.to_owned());
    pb::Mount {
        volume,
        path: "/data".to_owned(),
        sub_path,
        read_only: false,
        ..pb::Mount::default()
    }
}

fn volumes() -> (tempfile::TempDir, Scratch, Volumes) {
    let base = tempfile::tempdir().unwrap();
    let scratch = Scratch::create(base.path().to_str().unwrap(), Fallback::Error).unwrap();
    let volumes = Volumes::create(&shape(), &scratch, &pb::HostPathPolicy::default(), &[]).unwrap();
    (base, scratch, volumes)
}

/// The path that such a mount leads to.
fn opened(volumes: &Volumes, volume: &str, path: &str) -> Result<PathBuf, String> {
    let mounts = volumes.mounts(&[mount(volume, path)]);
    let mounted = mounts.map_err(|error| error.to_string())?.remove(0);
    let found = mounted.source.open();
    Ok(found.map_err(|error| error.to_string())?.path)
}

#[test]
fn files_are_replaced_at_once_and_modes_are_kept() {
    let (_base, _scratch, volumes) = volumes();
    let bind = opened(&volumes, "cm", "").unwrap();
    assert!(volumes.mounts(&[mount("cm", "")]).unwrap()[0].read_only);
    let first = vec![
        file("a", "1", 0o640),
        file("dir/b", "2", 0o400),
        file("gone", "", 0o644),
    ];
    volumes.write(&values(1, first)).unwrap();
    let read = |name: &str| fs::read_to_string(bind.join(name));
    assert_eq!(read("dir/b").unwrap(), "2");
    let mode = fs::metadata(bind.join("a")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o640);
    assert_eq!(
        fs::read_link(bind.join("a")).unwrap(),
        Path::new("..data/a")
    );
    volumes
        .write(&values(2, vec![file("a", "new", 0o644)]))
        .unwrap();
    assert_eq!(read("a").unwrap(), "new");
    assert!(read("gone").is_err() && read("dir/b").is_err());
    File::create(bind.join("mount-point")).unwrap();
    volumes
        .write(&values(2, vec![file("a", "new", 0o644)]))
        .unwrap();
    let left: BTreeSet<_> = fs::read_dir(&bind)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(
        left,
        BTreeSet::from(["..2", "..data", "a", "mount-point"].map(str::to_owned))
    );
}

#[test]
fn the_longest_key_is_a_file() {
    let (_base, _scratch, volumes) = volumes();
    let (key, name) = ("k".repeat(253), "n".repeat(255));
    for revision in [1, 2] {
        let files = vec![file(&key, "1", 0o644), file(&name, "2", 0o644)];
        volumes.write(&values(revision, files)).unwrap();
    }
    let folder = opened(&volumes, "cm", "").unwrap();
    assert_eq!(fs::read_to_string(folder.join(key)).unwrap(), "1");
    assert_eq!(fs::read_to_string(folder.join(name)).unwrap(), "2");
}

#[test]
fn untidy_paths_lead_to_the_same_files_as_clean_ones() {
    let (_base, _scratch, volumes) = volumes();
    let source = |volume: &str, path: &str| opened(&volumes, volume, path).unwrap();
    let whole = source("empty", "");
    for (untidy, clean) in [
        ("./x", "x"),
        ("logs/", "logs"),
        ("a//b", "a/b"),
        ("./a/./b/", "a/b"),
        ("./", ""),
        ("..foo", "..foo"),
        ("a..b", "a..b"),
    ] {
        assert_eq!(source("empty", untidy), whole.join(clean), "{untidy}");
    }
    let written = vec![
        file("./conf//a", "1", 0o644),
        file("b/", "2", 0o644),
        file("c/..d", "3", 0o644),
    ];
    volumes.write(&values(1, written)).unwrap();
    for (path, text) in [
        ("conf/a", "1"),
        ("./conf/a", "1"),
        ("b", "2"),
        ("c//..d", "3"),
        ("..data/b", "2"),
    ] {
        assert_eq!(fs::read_to_string(source("cm", path)).unwrap(), text);
    }
}

#[test]
fn nothing_is_created_outside_of_a_volume() {
    let (base, _scratch, volumes) = volumes();
    let home = base.path().join("home");
    fs::create_dir(&home).unwrap();
    let root = opened(&volumes, "empty", "").unwrap();
    symlink(&home, root.join("out")).unwrap();
    symlink(home.join("new"), root.join("dangling")).unwrap();
    fs::create_dir(root.join("real")).unwrap();
    symlink("real", root.join("within")).unwrap();
    for path in [
        "out",
        "out/x",
        "out/x/y",
        "dangling",
        "dangling/x",
        "within/../../x",
    ] {
        assert!(opened(&volumes, "empty", path).is_err(), "{path}");
    }
    assert_eq!(fs::read_dir(&home).unwrap().count(), 0);
    let bind = opened(&volumes, "empty", "within/x/y").unwrap();
    assert!(bind.ends_with("real/x/y") && bind.is_dir());
}

#[test]
fn paths_stay_in_their_volume() {
    let (_base, _scratch, volumes) = volumes();
    let bind = opened(&volumes, "empty", "a/b").unwrap();
    assert!(bind.is_dir());
    assert!(!volumes.mounts(&[mount("empty", "a/b")]).unwrap()[0].read_only);
    symlink("/", bind.join("root")).unwrap();
    assert!(opened(&volumes, "empty", "a/b/root/etc").is_err());
    assert!(opened(&volumes, "empty", "../cm").is_err());
    assert!(opened(&volumes, "none", "").is_err());
    volumes
        .write(&values(1, vec![file("a", "1", 0o644)]))
        .unwrap();
    let bind = opened(&volumes, "cm", "a").unwrap();
    assert_eq!(fs::read_to_string(bind).unwrap(), "1");
}

/// A folder of an image is no path of the node: the whole of the image is mounted, and then the folder over it.
#[test]
fn of_an_image_the_whole_is_mounted_first() {
    let (_base, _scratch, mut volumes) = volumes();
    let source = spec::Source::Own("/images/box".into());
    volumes.roots.push(Root {
        name: "models".to_owned(),
        place: Place::Image(source.clone(), None),
        limit: None,
        memory: false,
    });
    for (sub_path, folder) in [
        ("", None),
        ("./", None),
        ("a", Some("a")),
        ("./a//b/", Some("a/b")),
    ] {
        let mounted = volumes.mounts(&[mount("models", sub_path)]).unwrap();
        let mounted = &mounted[0];
        assert_eq!(mounted.source, source, "{sub_path:?}");
        assert_eq!(
            mounted.folder.as_deref(),
            folder.map(Path::new),
            "{sub_path:?}"
        );
        assert!(mounted.read_only && mounted.needs_descriptor == folder.is_some());
    }
    assert!(volumes.mounts(&[mount("models", "../a")]).is_err());
}

#[test]
fn the_site_mounts_by_partition_and_a_pods_own_mount_replaces_it() {
    let bind = |target: &str, partitions: &[&str]| pb::SiteBind {
        path: "/site".to_owned(),
        target: target.to_owned(),
        writable: false,
        partitions: partitions.iter().map(|name| (*name).to_owned()).collect(),
    };
    let binds = [
        bind("/a", &[]),
        bind("/b", &["gpu"]),
        bind("/data", &["cpu", "gpu"]),
    ];
    let (_base, _scratch, mut volumes) = volumes();
    volumes.site_binds = of_partition(&binds, "gpu");
    let own = volumes.mounts(&[mount("empty", "")]).unwrap();
    let of_site = volumes.of_site(&own);
    let targets: Vec<_> = of_site.iter().map(|mounted| &*mounted.target).collect();
    assert_eq!(targets, [Path::new("/a"), Path::new("/b")]);
    assert!(of_site.iter().all(|mounted| mounted.read_only));
    assert_eq!(of_partition(&binds, "").len(), 1);
}

#[test]
fn a_volume_in_memory_with_a_limit_is_no_larger_than_the_memory_of_the_job() {
    let base = tempfile::tempdir().unwrap();
    let scratch = Scratch::create(base.path().to_str().unwrap(), Fallback::Disk).unwrap();
    let volume = |name: &str, memory, size_limit_bytes| pb::Volume {
        name: name.to_owned(),
        source: Some(Source::EmptyDir(pb::EmptyDir {
            memory,
            size_limit_bytes,
        })),
    };
    let shape = [
        volume("disk", false, 9),
        volume("unlimited", true, 0),
        volume("small", true, 1 << 20),
        volume("large", true, 1 << 40),
    ];
    let volumes = Volumes::create(&shape, &scratch, &pb::HostPathPolicy::default(), &[]).unwrap();
    let sizes = |job| {
        let all = volumes.in_memory(job).into_iter();
        all.map(|volume| volume.bytes).collect::<Vec<_>>()
    };
    assert_eq!(sizes(0), [1 << 20, 1 << 40]);
    assert_eq!(sizes(1 << 30), [1 << 20, 1 << 30]);
    let small = volumes.in_memory(0).remove(0);
    assert_eq!(Some(&*small.path), volumes.folder("small"));
}
