use std::{io, os::unix::fs::PermissionsExt as _};

use super::*;
use crate::carrier::unix::Listener;

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn a_runtime_folder_is_used_only_if_it_exists_and_is_ours() {
    let root = tempfile::tempdir().unwrap();
    let runtime = root.path().join("run");
    let locations = |runtime: &Path| SocketLocations {
        configured: None,
        runtime_dir: Some(runtime.to_owned()),
        state_dir: root.path().join("state"),
    };
    let fallback = root.path().join("state/socket/agent.sock");
    let assert_fault = |runtime: &Path, why: &str| {
        let (path, fault) = locations(runtime).choose();
        assert_eq!(path, fallback);
        let fault = fault.unwrap();
        assert!(
            fault.contains("XDG_RUNTIME_DIR=") && fault.contains(why),
            "{fault}"
        );
    };
    assert_fault(&runtime, "No such file");
    assert_fault(Path::new("run"), "absolute");
    assert_fault(Path::new("/proc/version"), "not a folder");
    fs::create_dir(&runtime).unwrap();
    mode(&runtime, 0o777);
    assert_fault(&runtime, "writable by others");
    mode(&runtime, 0o755);
    let (path, fault) = locations(&runtime).choose();
    assert_eq!((path, fault), (runtime.join("knoc/agent.sock"), None));
    let none = SocketLocations {
        runtime_dir: None,
        ..locations(&runtime)
    };
    assert_eq!(none.choose(), (fallback.clone(), None));
    let configured = SocketLocations {
        configured: Some("/s/agent.sock".into()),
        ..locations(&runtime)
    };
    assert_eq!(configured.candidates(), [PathBuf::from("/s/agent.sock")]);
    // A client with another environment looks there too.
    assert!(locations(&runtime).candidates().contains(&fallback));
}

#[tokio::test]
async fn a_client_finds_the_socket_of_an_agent_with_another_environment() {
    let root = tempfile::tempdir().unwrap();
    let runtime = root.path().join("run");
    fs::create_dir(&runtime).unwrap();
    let locations = SiteFile::default().socket_locations(root.path(), Some(runtime.clone()));
    assert_eq!(locations.find(), None);
    let fallback = root.path().join(".local/state/knoc/socket/agent.sock");
    let _without = Listener::bind(&fallback).unwrap();
    assert_eq!(locations.find(), Some(fallback));
    let usual = runtime.join("knoc/agent.sock");
    let _with = Listener::bind(&usual).unwrap();
    assert_eq!(locations.find(), Some(usual.clone()));
    mode(&runtime.join("knoc"), 0o755);
    assert_ne!(
        locations.find(),
        Some(usual),
        "others can write to that folder"
    );
}

#[test]
fn the_site_file_sets_the_locations_unless_it_is_invalid() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("agent.toml");
    let locations = |text: &str| {
        fs::remove_file(&file).ok();
        io::Write::write_all(&mut fs::File::create(&file).unwrap(), text.as_bytes()).unwrap();
        SiteFile::load(&file).socket_locations(Path::new("/home/ann"), None)
    };
    let own = locations("site = 's'\nstate_dir = '~/deep'\n[listen]\nshim = '0.0.0.0:1'\n");
    assert_eq!(own.state_dir, Path::new("/home/ann/deep"));
    assert_eq!(
        own.choose().0,
        Path::new("/home/ann/deep/socket/agent.sock")
    );
    let configured = locations("[listen]\nsocket = '~/a.sock'\n");
    assert_eq!(configured.choose().0, Path::new("/home/ann/a.sock"));
    let default = Path::new("/home/ann/.local/state/knoc");
    assert_eq!(locations("state_dir = 7").state_dir, default);
    assert_eq!(locations("not TOML").state_dir, default);
}

#[test]
fn a_lease_of_another_host_names_it() {
    let root = tempfile::tempdir().unwrap();
    let locations = SocketLocations {
        state_dir: root.path().to_owned(),
        ..SocketLocations::default()
    };
    assert_eq!(locations.other_host(), None);
    let lease = |host: &str| {
        let text =
            format!("{{\"host\":{host:?},\"boot_id\":\"\",\"pid\":1,\"epoch\":1,\"heartbeat\":1}}");
        let path = root.path().join("agent.lease");
        io::Write::write_all(&mut fs::File::create(path).unwrap(), text.as_bytes()).unwrap();
    };
    lease("elsewhere");
    assert_eq!(locations.other_host().as_deref(), Some("elsewhere"));
    let here = rustix::system::uname();
    lease(&here.nodename().to_string_lossy());
    assert_eq!(locations.other_host(), None);
}

/// In the default runtime folder, another agent of this user may listen, which is not the one that was asked for.
#[test]
fn if_a_runtime_folder_is_set_no_other_is_tried() {
    let (folder, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let locations = SocketLocations {
        configured: None,
        runtime_dir: Some(folder.path().to_owned()),
        state_dir: state.path().to_owned(),
    };
    let of_state = state.path().join("socket/agent.sock");
    for candidate in locations.candidates() {
        let named = candidate.starts_with(folder.path()) || candidate == of_state;
        assert!(named, "{}", candidate.display());
    }
}
