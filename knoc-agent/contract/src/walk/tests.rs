use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
};

use super::*;

fn world() -> (tempfile::TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let path = fs::canonicalize(root.path()).unwrap();
    for folder in ["home", "volume/real/deep", "images/box"] {
        fs::create_dir_all(path.join(folder)).unwrap();
    }
    fs::write(path.join("home/key"), "secret").unwrap();
    fs::write(path.join("volume/real/file"), "file").unwrap();
    fs::write(path.join("images/a.sif"), "sif").unwrap();
    (root, path)
}

#[test]
fn links_are_followed_while_they_stay_inside() {
    let (_root, path) = world();
    let volume = path.join("volume");
    let link = |target: &str, name: &str| symlink(target, volume.join(name)).unwrap();
    link("real", "within");
    link("../real/deep/../file", "real/round");
    link("within/round", "twice");
    for (sub, wanted) in [
        ("", ""),
        ("within/deep", "real/deep"),
        ("twice", "real/file"),
        ("real/deep/../file", "real/file"),
    ] {
        let found = inside(&volume, Path::new(sub), false).unwrap();
        assert_eq!(found.path, volume.join(wanted), "{sub}");
        let meta = fs::metadata(volume.join(wanted)).unwrap();
        assert_eq!(found.is_folder(), meta.is_dir());
    }
    let made = inside(&volume, Path::new("within/new/newer"), true).unwrap();
    assert!(made.is_folder() && volume.join("real/new/newer").is_dir());
}

#[test]
fn no_path_leads_out() {
    let (_root, path) = world();
    let volume = path.join("volume");
    symlink("../home", volume.join("out")).unwrap();
    symlink(path.join("home"), volume.join("absolute")).unwrap();
    symlink(path.join("home/new"), volume.join("dangling")).unwrap();
    symlink("loop", volume.join("loop")).unwrap();
    symlink("real/deep/../../../home", volume.join("late")).unwrap();
    for sub in [
        "out",
        "out/key",
        "out/x",
        "absolute",
        "absolute/x",
        "dangling",
        "dangling/x",
        "loop",
        "late/x",
        "..",
        "real/../../home",
        "/etc",
        "real/file/x",
    ] {
        let walked = inside(&volume, Path::new(sub), true);
        assert!(walked.is_err(), "{sub}: {walked:?}");
    }
    assert_eq!(fs::read_dir(path.join("home")).unwrap().count(), 1);
    // A link as the root is not a folder of ours.
    assert!(inside(&volume.join("out"), Path::new("key"), false).is_err());
    let deep = "d/".repeat(MAX_DEPTH + 1);
    assert!(matches!(
        inside(&volume, Path::new(&deep), true),
        Err(WalkError::TooLong(_))
    ));
}

/// While another thread keeps swapping a folder and a link, only the folder is ever opened.
#[test]
fn a_swap_during_the_walk_never_leads_out() {
    let (_root, path) = world();
    let volume = path.join("volume");
    symlink(path.join("home"), volume.join("away")).unwrap();
    fs::create_dir(volume.join("sub")).unwrap();
    let home = fs::metadata(path.join("home")).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let mut folders = 0;
    std::thread::scope(|scope| {
        let swapper = scope.spawn(|| {
            let (sub, away) = (volume.join("sub"), volume.join("away"));
            let flags = rustix::fs::RenameFlags::EXCHANGE;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let cwd = rustix::fs::CWD;
                rustix::fs::renameat_with(cwd, &sub, cwd, &away, flags).unwrap();
            }
        });
        for _ in 0..20_000 {
            if let Ok(found) = inside(&volume, Path::new("sub"), true) {
                folders += 1;
                let ino = std::os::unix::fs::MetadataExt::ino(&home);
                assert!(found.is_folder() && found.stat.st_ino != ino);
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        swapper.join().unwrap();
    });
    assert!(folders > 0);
}

#[test]
fn a_folder_that_a_volume_lacks_is_made_with_the_rights_of_the_volume() {
    let (_root, path) = world();
    let volume = path.join("volume");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o777)).unwrap();
    inside(&volume, Path::new("one/two"), true).unwrap();
    assert_eq!(mode(&volume.join("one")), 0o777);
    assert_eq!(mode(&volume.join("one/two")), 0o777);
    // One that is there keeps its own.
    fs::set_permissions(volume.join("one"), fs::Permissions::from_mode(0o750)).unwrap();
    inside(&volume, Path::new("one/three"), true).unwrap();
    assert_eq!(mode(&volume.join("one")), 0o750);
    assert_eq!(mode(&volume.join("one/three")), 0o750);
}

#[test]
fn a_path_that_others_can_change_is_rejected_by_name() {
    let (_root, path) = world();
    let images = path.join("images");
    let mode = |path: &Path, mode: u32| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    let file = images.join("a.sif");
    symlink("a.sif", images.join("link")).unwrap();
    symlink(images.join("box"), images.join("absolute")).unwrap();
    assert_eq!(owned(&images.join("link"), false).unwrap().path, file);
    assert!(owned(&images.join("absolute"), false).unwrap().is_folder());
    for (which, bad) in [(&images, 0o775), (&images, 0o757), (&file, 0o664)] {
        let before = fs::metadata(which).unwrap().permissions().mode();
        mode(which, bad);
        let error = owned(&file, false).unwrap_err();
        assert!(
            matches!(&error, WalkError::Untrusted { path, .. } if path == which),
            "{bad:o}: {error}"
        );
        owned(&file, true).unwrap();
        mode(which, before);
    }
    // Others may create files in this folder, but cannot replace ours. Used as an image itself,
    // it is theirs too.
    mode(&images, 0o1777);
    owned(&file, false).unwrap();
    owned(&images, false).unwrap_err();
    owned_way(&images).unwrap();
    // But they may give a name there to a file of ours that is in another folder.
    let private = path.join("private.sif");
    fs::hard_link(&file, &private).unwrap();
    let error = owned(&file, false).unwrap_err();
    assert!(error.to_string().contains("another name"), "{error}");
    owned(&private, false).unwrap();
    owned(&file, true).unwrap();
    fs::remove_file(&private).unwrap();
    owned(&file, false).unwrap();
    mode(&images, 0o777);
    owned_way(&images).unwrap_err();
}

#[test]
fn another_users_file_is_rejected() {
    for (owner, mode, refused) in [
        (0, None, None),
        (1000, None, None),
        (1001, None, Some("belongs to user 1001")),
        (1001, Some(0o777), Some("belongs to user 1001")),
        (
            0,
            Some(0o100_664),
            Some("may be written by others (mode 664)"),
        ),
    ] {
        assert_eq!(distrust(owner, 1000, mode).as_deref(), refused);
    }
}
