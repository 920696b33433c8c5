use std::{fs, os::unix::fs::symlink, path::PathBuf};

use knoc_proto::error::chain;

use super::*;
use crate::scratch::{Fallback, Scratch};

/// Volumes in a folder, which exist as long as the first two values.
fn volumes() -> (tempfile::TempDir, Scratch, Volumes, PathBuf) {
    let base = tempfile::tempdir().unwrap();
    let scratch = Scratch::create(base.path().to_str().unwrap(), Fallback::Error).unwrap();
    let volume = |name: &str, source| pb::Volume {
        name: name.to_owned(),
        source: Some(source),
    };
    let shape = [
        volume("v", pb::volume::Source::EmptyDir(pb::EmptyDir::default())),
        volume("map", pb::volume::Source::Files(pb::FilesVolume {})),
    ];
    let volumes = Volumes::create(&shape, &scratch, &pb::HostPathPolicy::default(), &[]).unwrap();
    let folder = volumes.folder("v").unwrap().to_owned();
    (base, scratch, volumes, folder)
}

fn file(volume: &str, path: &str, key: &str, optional: bool) -> Value {
    Value::File(pb::FileKey {
        volume: volume.to_owned(),
        path: path.to_owned(),
        key: key.to_owned(),
        optional,
    })
}

/// The variables that the container gets, as `NAME=value`.
fn get(volumes: &Volumes, value: Value) -> Result<String, String> {
    let container = pb::Container {
        name: "main".to_owned(),
        ..pb::Container::default()
    };
    let var = |name: &str, value| pb::EnvVar {
        name: name.to_owned(),
        value: Some(value),
    };
    let env = |container: &str, vars| pb::ContainerEnv {
        container: container.to_owned(),
        vars,
    };
    let values = pb::PodValues {
        env: vec![
            env("other", vec![var("X", file("none", "x", "x", false))]),
            env(
                "main",
                vec![
                    var("A", value),
                    var("B", Value::Template("$(A)".to_owned())),
                ],
            ),
        ],
        ..pb::PodValues::default()
    };
    let places = Places {
        volumes,
        network: &Network::Host,
    };
    let resolved = resolve(&container, &values, places).map_err(|error| chain(&error))?;
    let [own] = &resolved.env[..] else {
        panic!("{resolved:?}");
    };
    let fields = knoc_proto::expand::RuntimeFields::default();
    let all = knoc_proto::expand::pod_environment(&own.vars, &fields);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let all = all
        .iter()
        .map(|(name, value)| format!("{}={}", text(name), text(value)));
    Ok(all.collect::<Vec<_>>().join(" "))
}

#[test]
fn a_variable_has_its_value_from_the_file_and_others_may_refer_to_it() {
    let (_base, _scratch, volumes, folder) = volumes();
    fs::create_dir(folder.join("sub")).unwrap();
    fs::write(folder.join("sub/config.env"), "ADDRESS='here'\n").unwrap();
    let of = |key: &str, optional| get(&volumes, file("v", "sub//config.env", key, optional));
    assert_eq!(of("ADDRESS", false).unwrap(), "A=here B=here");
    assert_eq!(of("NONE", true).unwrap(), "B=$(A)", "it is not set");
    let missing = of("NONE", false).unwrap_err();
    assert!(
        missing.starts_with("environment variable key \"NONE\" not found in file"),
        "{missing}"
    );
}

#[test]
fn what_is_missing_malformed_or_no_file_of_an_empty_dir_is_said() {
    let (_base, _scratch, volumes, folder) = volumes();
    let optional = get(&volumes, file("v", "none", "A", true)).unwrap();
    assert_eq!(optional, "B=$(A)");
    let missing = get(&volumes, file("v", "none", "A", false)).unwrap_err();
    assert!(missing.contains("not found in file \"none\""), "{missing}");
    for volume in ["none", "map"] {
        let text = get(&volumes, file(volume, "a", "A", true)).unwrap_err();
        assert!(text.contains("cannot find the emptyDir volume"), "{text}");
    }
    fs::write(folder.join("bad"), "A=1").unwrap();
    let malformed = get(&volumes, file("v", "bad", "A", true)).unwrap_err();
    assert!(
        malformed.contains("couldn't parse env file") && malformed.contains("line 1"),
        "{malformed}"
    );
    let large = vec![b'#'; LARGEST + 1];
    fs::write(folder.join("large"), large).unwrap();
    let large = get(&volumes, file("v", "large", "A", true)).unwrap_err();
    assert!(large.contains("larger than"), "{large}");
    fs::write(folder.join("full"), vec![b'#'; LARGEST]).unwrap();
    let full = get(&volumes, file("v", "full", "A", true)).unwrap();
    assert_eq!(full, "B=$(A)", "its last byte belongs to a comment");
    get(&volumes, file("v", ".", "A", true)).unwrap_err();
    get(&volumes, file("v", "../x", "A", true)).unwrap_err();
}

#[test]
fn many_variables_with_one_large_value_are_refused_before_they_fill_the_memory() {
    let (_base, _scratch, volumes, folder) = volumes();
    let value = vec![b'x'; LARGEST - "A=''".len()];
    fs::write(folder.join("f"), [&b"A='"[..], &value, b"'"].concat()).unwrap();
    let container = pb::Container {
        name: "main".to_owned(),
        ..pb::Container::default()
    };
    let of = |count: usize| {
        let var = |number: usize| pb::EnvVar {
            name: format!("V{number}"),
            value: Some(file("v", "f", "A", false)),
        };
        let values = pb::PodValues {
            env: vec![pb::ContainerEnv {
                container: "main".to_owned(),
                vars: (0..count).map(var).collect(),
            }],
            ..pb::PodValues::default()
        };
        resolve(&container, &values, &volumes).map_err(|error| chain(&error))
    };
    let few = of(TOGETHER / LARGEST).unwrap();
    assert_eq!(few.env[0].vars.len(), TOGETHER / LARGEST);
    let many = of(TOGETHER / LARGEST + 1).unwrap_err();
    assert!(many.contains("together"), "{many}");
}

#[test]
fn no_link_leads_out_of_the_volume_and_no_pipe_is_waited_for() {
    let (base, _scratch, volumes, folder) = volumes();
    let secret = base.path().join("secret");
    fs::write(&secret, "A='secret'").unwrap();
    symlink(&secret, folder.join("link")).unwrap();
    let out = get(&volumes, file("v", "link", "A", false));
    assert!(!format!("{out:?}").contains("A=secret"), "{out:?}");
    out.unwrap_err();
    fs::write(folder.join("real"), "A='1'").unwrap();
    symlink("real", folder.join("inside")).unwrap();
    let inside = get(&volumes, file("v", "inside", "A", false)).unwrap();
    assert_eq!(inside, "A=1 B=1");
    nix::unistd::mkfifo(&folder.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    get(&volumes, file("v", "pipe", "A", true)).unwrap_err();
}
