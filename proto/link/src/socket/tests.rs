use std::{io, os::unix::fs::PermissionsExt as _};

use super::*;
use crate::carrier::unix::Listener;

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn a_runtime_folder_counts_only_if_it_is_there_and_ours() {
    let root = tempfile::tempdir().unwrap();
    let runtime = root.path().join("run");
    let places = |runtime: &Path| Places {
        configured: None,
        runtime_dir: Some(runtime.to_owned()),
        state_dir: root.path().join("state"),
    };
    let fallback = root.path().join("state/socket/agent.sock");
    let refused = |runtime: &Path, why: &str| {
        let (path, fault) = places(runtime).choose();
        assert_eq!(path, fallback);
        let fault = fault.unwrap();
        assert!(
            fault.contains("XDG_RUNTIME_DIR=") && fault.contains(why),
            "{fault}"
        );
    };
    refused(&runtime, "No such file");
    refused(Path::new("run"), "absolute");
    refused(Path::new("/proc/version"), "not a folder");
    fs::create_dir(&runtime).unwrap();
    mode(&runtime, 0o777);
    refused(&runtime, "writable by others");
    mode(&runtime, 0o755);
    let (path, fault) = places(&runtime).choose();
    assert_eq!((path, fault), (runtime.join("knoc/agent.sock"), None));
    let none = Places {
        runtime_dir: None,
        ..places(&runtime)
    };
    assert_eq!(none.choose(), (fallback.clone(), None));
    let configured = Places {
        configured: Some("/s/agent.sock".into()),
        ..places(&runtime)
    };
    assert_eq!(configured.candidates(), [PathBuf::from("/s/agent.sock")]);
    // A client whose environment is not the agent's looks there too.
    assert!(places(&runtime).candidates().contains(&fallback));
}

#[tokio::test]
async fn a_client_finds_the_socket_of_an_agent_with_another_environment() {
    let root = tempfile::tempdir().unwrap();
    let runtime = root.path().join("run");
    fs::create_dir(&runtime).unwrap();
    let places = SiteFile::default().places(root.path(), Some(runtime.clone()));
    assert_eq!(places.find(), None);
    let fallback = root.path().join(".local/state/knoc/socket/agent.sock");
    let _without = Listener::bind(&fallback).unwrap();
    assert_eq!(places.find(), Some(fallback));
    let usual = runtime.join("knoc/agent.sock");
    let _with = Listener::bind(&usual).unwrap();
    assert_eq!(places.find(), Some(usual.clone()));
    mode(&runtime.join("knoc"), 0o755);
    assert_ne!(places.find(), Some(usual), "it may be anybody's");
}

#[test]
fn the_site_file_says_where_the_socket_is_and_a_faulty_one_says_nothing() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("agent.toml");
    let places = |text: &str| {
        fs::remove_file(&file).ok();
        io::Write::write_all(&mut fs::File::create(&file).unwrap(), text.as_bytes()).unwrap();
        SiteFile::load(&file).places(Path::new("/home/ann"), None)
    };
    let own = places("site = 's'\nstate_dir = '~/deep'\n[listen]\nshim = '0.0.0.0:1'\n");
    assert_eq!(own.state_dir, Path::new("/home/ann/deep"));
    assert_eq!(
        own.choose().0,
        Path::new("/home/ann/deep/socket/agent.sock")
    );
    let configured = places("[listen]\nsocket = '~/a.sock'\n");
    assert_eq!(configured.choose().0, Path::new("/home/ann/a.sock"));
    let default = Path::new("/home/ann/.local/state/knoc");
    assert_eq!(places("state_dir = 7").state_dir, default);
    assert_eq!(places("not TOML").state_dir, default);
}

#[test]
fn a_lease_of_another_host_names_it() {
    let root = tempfile::tempdir().unwrap();
    let places = Places {
        state_dir: root.path().to_owned(),
        ..Places::default()
    };
    assert_eq!(places.other_host(), None);
    let lease = |host: &str| {
        let text =
            format!("{{\"host\":{host:?},\"boot_id\":\"\",\"pid\":1,\"epoch\":1,\"heartbeat\":1}}");
        let path = root.path().join("agent.lease");
        io::Write::write_all(&mut fs::File::create(path).unwrap(), text.as_bytes()).unwrap();
    };
    lease("elsewhere");
    assert_eq!(places.other_host().as_deref(), Some("elsewhere"));
    let here = rustix::system::uname();
    lease(&here.nodename().to_string_lossy());
    assert_eq!(places.other_host(), None);
}

/// In the usual runtime folder another agent of this user may listen: who named a folder does not mean that one.
#[test]
fn a_runtime_folder_that_is_named_is_the_only_one_that_is_looked_at() {
    let (folder, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let places = Places {
        configured: None,
        runtime_dir: Some(folder.path().to_owned()),
        state_dir: state.path().to_owned(),
    };
    let of_state = state.path().join("socket/agent.sock");
    for candidate in places.candidates() {
        let named = candidate.starts_with(folder.path()) || candidate == of_state;
        assert!(named, "{}", candidate.display());
    }
}
