use std::os::unix::fs::symlink;

use knoc_proto::error::chain;

use super::*;

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// The message of a refused connection, and that of a refused listener, at the same path.
async fn refusals(path: &Path) -> [String; 2] {
    let connected = connect(path).await.unwrap_err();
    let bound = bind(path).unwrap_err();
    [&connected, &bound].map(|error| chain(error))
}

#[test]
fn only_our_own_user() {
    check_user(1000, 1000, "s").unwrap();
    let error = check_user(0, 1000, "unix:/s").unwrap_err();
    let message = "the process behind unix:/s belongs to uid 0, not to uid 1000";
    assert_eq!(error.to_string(), message);
}

#[tokio::test]
async fn a_folder_that_others_can_enter_is_used_by_neither_side() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("knoc");
    let path = folder.join(NAME);
    let (listener, socket) = bind(&path).unwrap();
    assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o7777, 0o700);
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    connect(&path).await.unwrap();
    // Others may enter it: somebody else may have put the socket there.
    for open in [0o701, 0o710, 0o770, 0o1777] {
        mode(&folder, open);
        for message in refusals(&path).await {
            assert!(message.contains(&format!("mode {open:04o}")), "{message}");
        }
    }
    mode(&folder, 0o700);
    drop((listener, socket));
    assert!(!path.exists(), "removed with its listener");
}

#[tokio::test]
async fn a_link_in_place_of_the_folder_is_followed_by_neither_side() {
    let root = tempfile::tempdir().unwrap();
    let (elsewhere, folder) = (root.path().join("elsewhere"), root.path().join("knoc"));
    let _bound = bind(&elsewhere.join(NAME)).unwrap();
    symlink(&elsewhere, &folder).unwrap();
    for message in refusals(&folder.join(NAME)).await {
        assert!(message.contains("symbolic link"), "{message}");
    }
    fs::remove_file(&folder).unwrap();
    fs::File::create(&folder).unwrap();
    let message = chain(&connect(&folder.join(NAME)).await.unwrap_err());
    assert!(message.contains("not a folder"), "{message}");
}

#[tokio::test]
async fn a_folder_of_another_user_is_used_by_neither_side() {
    // Only root can give a folder away; an ordinary user finds one of root's instead.
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("knoc");
    fs::create_dir(&folder).unwrap();
    mode(&folder, 0o700);
    let foreign = if own_uid() == 0 {
        std::os::unix::fs::chown(&folder, Some(12_345), Some(12_345)).unwrap();
        folder
    } else {
        PathBuf::from("/root")
    };
    for message in refusals(&foreign.join(NAME)).await {
        assert!(message.contains("must belong to uid"), "{message}");
    }
}

#[tokio::test]
async fn a_long_folder_is_no_obstacle() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("x".repeat(120)).join("socket").join(NAME);
    assert!(path.as_os_str().len() > 107);
    let (listener, _socket) = bind(&path).unwrap();
    let (connected, accepted) = tokio::join!(connect(&path), listener.accept());
    let (_, peer) = connected.unwrap();
    accepted.unwrap();
    let pid = i32::try_from(std::process::id()).unwrap();
    assert_eq!(
        peer,
        Peer::Unix {
            uid: own_uid(),
            pid: Some(pid)
        }
    );
    assert!(is_ours(&path));
}

#[tokio::test]
async fn a_socket_that_no_process_of_this_host_serves_is_replaced_and_refuses_clients() {
    let root = tempfile::tempdir().unwrap();
    mode(root.path(), 0o700);
    let path = root.path().join(NAME);
    // Bound and closed, but never removed: what a killed agent leaves, and what a socket of another host looks like.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let error = connect(&path).await.unwrap_err();
    assert!(
        matches!(error, LinkError::NotServed { .. }),
        "{}",
        chain(&error)
    );
    assert!(
        chain(&error).contains("runs on another host"),
        "{}",
        chain(&error)
    );
    let (_listener, _socket) = bind(&path).unwrap();
    assert!(matches!(bind(&path).unwrap_err(), LinkError::InUse { .. }));
    connect(&path).await.unwrap();
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
    let _without = bind(&fallback).unwrap();
    assert_eq!(places.find(), Some(fallback));
    let usual = runtime.join("knoc/agent.sock");
    let _with = bind(&usual).unwrap();
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
