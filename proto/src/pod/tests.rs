use bytes::Bytes;

use super::*;

fn valid() -> pb::PodSpec {
    let container = |name: &str| pb::Container {
        name: name.into(),
        image: "busybox:1.36".into(),
        mounts: vec![pb::Mount {
            volume: "conf".into(),
            path: "/etc/app".into(),
            ..pb::Mount::default()
        }],
        ..pb::Container::default()
    };
    pb::PodSpec {
        uid: "u-1".into(),
        namespace: "default".into(),
        name: "demo".into(),
        init_containers: vec![container("init")],
        containers: vec![container("main")],
        volumes: vec![pb::Volume {
            name: "conf".into(),
            source: Some(pb::volume::Source::Files(pb::FilesVolume {})),
        }],
        ..pb::PodSpec::default()
    }
}

pub(super) fn problems(change: impl FnOnce(&mut pb::PodSpec)) -> Vec<String> {
    let mut spec = valid();
    change(&mut spec);
    PodSpec::try_from(spec).unwrap_err().problems
}

#[test]
fn a_grace_period_that_is_too_long_for_a_clock_is_a_century() {
    let spec = pb::PodSpec {
        termination_grace_period_seconds: i64::MAX,
        active_deadline_seconds: i64::MAX,
        ..valid()
    };
    let spec = PodSpec::try_from(spec).unwrap();
    assert_eq!((spec.grace(), spec.deadline()), (LONGEST, Some(LONGEST)));
    let probe = pb::Probe {
        termination_grace_period_seconds: Some(i64::MAX),
        ..pb::Probe::default()
    };
    assert_eq!(probe.grace(), Some(LONGEST));
    assert_eq!(duration(30), Some(Duration::from_secs(30)));
    assert_eq!(duration(-1), None);
}

#[test]
fn a_valid_pod_passes() {
    let spec = PodSpec::try_from(valid()).unwrap();
    assert_eq!(spec.uid().as_str(), "u-1");
    assert_eq!(spec.generation(), 1);
    assert_eq!(spec.all_containers().count(), 2);
    assert!(spec.container("main").is_some());
}

#[test]
fn all_problems_are_reported_at_once() {
    let got = problems(|spec| {
        spec.uid = "../x".into();
        spec.containers[0].name = "init".into();
        spec.containers[0].mounts[0].volume = "nowhere".into();
        spec.containers[0].mounts[0].path = "relative".into();
        spec.containers[0].working_dir = "/a/../b".into();
    });
    assert_eq!(got.len(), 5, "{got:#?}");
    assert!(
        got.iter()
            .any(|p| p.contains("two containers are named \"init\"")),
        "{got:#?}"
    );
}

#[test]
fn paths_may_be_untidy_but_never_lead_out() {
    let mut spec = valid();
    let main = &mut spec.containers[0];
    main.working_dir = "/a//b/".into();
    main.termination_message_path = "/dev/./log".into();
    main.mounts[0].path = "/etc//app/".into();
    for sub_path in ["./x", "logs/", "a//b", ".", "..foo", "a..b"] {
        spec.containers[0].mounts[0].sub_path = sub_path.into();
        PodSpec::try_from(spec.clone()).unwrap();
    }
    let got = problems(|spec| {
        let main = &mut spec.containers[0];
        main.working_dir = "work".into();
        main.termination_message_path = "/dev/../log".into();
        main.mounts[0].path = "/etc/../app".into();
        main.mounts[0].sub_path = "a/../b".into();
    });
    assert_eq!(
        got,
        [
            "container \"main\": workingDir \"work\" must be an absolute path",
            "container \"main\": terminationMessagePath \"/dev/../log\" must not contain '..'",
            "container \"main\": mountPath \"/etc/../app\" must not contain '..'",
            "container \"main\": subPath \"a/../b\" must not contain '..'",
        ]
    );
}

#[test]
fn no_mount_path_is_used_twice_or_is_the_root() {
    let got = problems(|spec| {
        let main = &mut spec.containers[0];
        main.mounts.push(main.mounts[0].clone());
    });
    assert_eq!(
        got,
        ["container \"main\" mounts twice at mountPath \"/etc/app\""]
    );
    let got = problems(|spec| spec.containers[0].mounts[0].path = "//".into());
    assert!(got[0].contains("the container's root"), "{got:?}");
    for path in ["/.knoc", "//.knoc/./", "/.knoc/agent"] {
        let got = problems(|spec| spec.containers[0].mounts[0].path = path.into());
        assert!(got[0].contains("lies in /.knoc"), "{got:?}");
    }
    let mut other = valid();
    other.containers[0].mounts[0].path = "/.knock".into();
    assert!(PodSpec::try_from(other).is_ok());
}

#[test]
fn nothing_is_mounted_on_a_device_that_every_container_has() {
    for path in [
        "/dev/null",
        "//dev/./zero/",
        "/dev/tty",
        "/dev/stdout",
        "/dev/fd/3",
    ] {
        let got = problems(|spec| spec.containers[0].mounts[0].path = path.into());
        let wanted = format!("container \"main\": mountPath {path:?} is a device");
        assert!(got.len() == 1 && got[0].starts_with(&wanted), "{got:?}");
    }
    for path in [
        "/dev",
        "/dev/nullx",
        "/dev/shm",
        "/dev/a/null",
        "/x/dev/null",
    ] {
        let mut other = valid();
        other.containers[0].mounts[0].path = path.into();
        assert!(PodSpec::try_from(other).is_ok(), "{path}");
    }
    assert!(PodSpec::try_from(mounting(&["/dev/", "/dev/null"])).is_ok());
}

/// A pod whose container mounts a volume at each of these paths.
fn mounting(paths: &[&str]) -> pb::PodSpec {
    let mut spec = valid();
    let main = &mut spec.containers[0];
    let mount = main.mounts[0].clone();
    let at = |path: &&str| pb::Mount {
        path: (*path).into(),
        ..mount.clone()
    };
    main.mounts = paths.iter().map(at).collect();
    spec
}

#[test]
fn nothing_is_mounted_below_dev_where_it_would_get_lost() {
    let requesting = |paths: &[&str], resource: &str| {
        let mut spec = mounting(paths);
        spec.containers[0].limits = Some(pb::Resources {
            extended: [(resource.to_owned(), 1)].into(),
            ..Default::default()
        });
        PodSpec::try_from(spec).map_or_else(|error| error.problems, |_| Vec::new())
    };
    let wanted = |path: &str, why: &str| format!("container \"main\": mountPath {path:?} {why}");
    for path in ["/dev/pts/x", "/dev//mqueue/a/b"] {
        let got = PodSpec::try_from(mounting(&[path])).unwrap_err().problems;
        let wanted = wanted(path, "lies in a file system of the kernel");
        assert!(got.len() == 1 && got[0].starts_with(&wanted), "{got:?}");
    }
    for (resource, path) in [
        (NVIDIA, "/dev/nvidia0"),
        (NVIDIA, "/dev/nvidia-caps/x"),
        (AMD, "/dev/kfd"),
        (AMD, "/dev/dri/by-path"),
    ] {
        let got = requesting(&[path], resource);
        let wanted = wanted(path, "is a device of the GPUs");
        assert!(got.len() == 1 && got[0].starts_with(&wanted), "{got:?}");
        assert_eq!(requesting(&["/dev", path], resource), [""; 0], "{path}");
        assert_eq!(requesting(&[path], "example.com/fpga"), [""; 0], "{path}");
    }
    for paths in [
        ["/dev/pts", "/dev/pts/x"],
        ["/dev/mqueue", "/dev/mqueue/a/b"],
        ["/dev/ptsx/y", "/dev/a/pts/x"],
    ] {
        assert!(PodSpec::try_from(mounting(&paths)).is_ok(), "{paths:?}");
    }
}

#[test]
fn what_was_accepted_once_is_told_from_what_is_new() {
    let with = |path: &str, image: &str| {
        let mut spec = valid();
        spec.containers[0].mounts[0].path = path.into();
        spec.containers[0].image = image.into();
        spec
    };
    let accepted = with("/dev/null", "a");
    let error = |spec: pb::PodSpec| PodSpec::try_from(spec).unwrap_err();
    assert!(error(accepted.clone()).is_known_of(accepted.clone()));
    assert!(error(with("/dev/null", "b")).is_known_of(accepted.clone()));
    assert!(!error(with("/dev/zero", "a")).is_known_of(accepted.clone()));
    assert!(!error(with("/dev/null", "")).is_known_of(accepted));
    assert!(!error(with("/dev/null", "a")).is_known_of(valid()));
}

#[test]
fn no_path_of_a_container_lies_in_the_folder_of_knoc() {
    for path in ["/.knoc", "//.knoc/./", "/.knoc/agent", "/.knoc/launch.sock"] {
        let got = problems(|spec| {
            spec.containers[0].working_dir = path.into();
            spec.containers[0].termination_message_path = path.into();
        });
        let wanted = ["workingDir", "terminationMessagePath"].map(|field| {
            format!(
                "container \"main\": {field} {path:?} lies in /.knoc, which KNoC needs itself; name another path"
            )
        });
        assert_eq!(got, wanted);
    }
    let mut other = valid();
    other.containers[0].working_dir = "/.knock".into();
    other.containers[0].termination_message_path = "/var/.knoc/log".into();
    assert!(PodSpec::try_from(other).is_ok());
}

#[test]
fn a_mount_path_with_a_colon_is_rejected() {
    let got = problems(|spec| spec.containers[0].mounts[0].path = "/a:/etc".into());
    assert_eq!(
        got,
        ["container \"main\": mountPath \"/a:/etc\" must not contain ':'"]
    );
}

#[test]
fn values_belong_to_the_shape_and_are_never_shown() {
    let spec = PodSpec::try_from(valid()).unwrap();
    let literal = |name: &str, value: &'static [u8]| pb::EnvVar {
        name: name.into(),
        value: Some(pb::env_var::Value::Literal(Bytes::from_static(value))),
    };
    let values = pb::PodValues {
        env: vec![
            pb::ContainerEnv {
                container: "main".into(),
                vars: vec![literal("A=B", b"s3cret")],
            },
            pb::ContainerEnv {
                container: "ghost".into(),
                vars: vec![literal("X", b"s3\0cret")],
            },
        ],
        files: vec![pb::VolumeFiles {
            volume: "conf".into(),
            files: vec![pb::VolumeFile {
                path: "../up".into(),
                ..pb::VolumeFile::default()
            }],
        }],
        ..pb::PodValues::default()
    };
    let error = PodValues::check(values, &spec).unwrap_err();
    assert_eq!(error.problems.len(), 4, "{:#?}", error.problems);
    assert!(!error.to_string().contains("cret"));
}

#[test]
fn files_have_clean_paths_below_their_volume() {
    let mut shape = valid();
    shape.volumes.push(pb::Volume {
        name: "cm".into(),
        source: Some(pb::volume::Source::Files(pb::FilesVolume {})),
    });
    let spec = PodSpec::try_from(shape).unwrap();
    let check = |path: &str| {
        let file = pb::VolumeFile {
            path: path.into(),
            ..pb::VolumeFile::default()
        };
        let files = pb::VolumeFiles {
            volume: "cm".into(),
            files: vec![file],
        };
        let values = pb::PodValues {
            files: vec![files],
            ..pb::PodValues::default()
        };
        PodValues::check(values, &spec)
    };
    for bad in ["../x", "/x", "a/../../x", "", "./", "..data/x", "./..1"] {
        assert_eq!(check(bad).unwrap_err().problems.len(), 1, "{bad}");
    }
    for (untidy, clean) in [("./conf//a", "conf/a"), ("b/", "b"), ("c/..d", "c/..d")] {
        assert_eq!(check(untidy).unwrap().files[0].files[0].path, clean);
    }
}
