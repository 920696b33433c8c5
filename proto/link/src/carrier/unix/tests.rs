use std::os::unix::fs::symlink;

use knoc_proto::error::chain;

use super::*;
use crate::carrier::Listener as _;

const NAME: &str = "agent.sock";

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// The errors of a client and of a listener at the same path.
async fn errors_at(path: &Path) -> [String; 2] {
    let connected = connect(path).await.unwrap_err();
    let bound = Listener::bind(path).unwrap_err();
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
    let listener = Listener::bind(&path).unwrap();
    assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o7777, 0o700);
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    connect(&path).await.unwrap();
    // If others can enter the folder, somebody else may have created the socket.
    for open in [0o701, 0o710, 0o770, 0o1777] {
        mode(&folder, open);
        for message in errors_at(&path).await {
            assert!(message.contains(&format!("mode {open:04o}")), "{message}");
        }
    }
    mode(&folder, 0o700);
    drop(listener);
    assert!(!path.exists(), "removed with its listener");
}

#[tokio::test]
async fn a_link_in_place_of_the_folder_is_followed_by_neither_side() {
    let root = tempfile::tempdir().unwrap();
    let (elsewhere, folder) = (root.path().join("elsewhere"), root.path().join("knoc"));
    let _bound = Listener::bind(&elsewhere.join(NAME)).unwrap();
    symlink(&elsewhere, &folder).unwrap();
    for message in errors_at(&folder.join(NAME)).await {
        assert!(message.contains("symbolic link"), "{message}");
    }
    fs::remove_file(&folder).unwrap();
    fs::File::create(&folder).unwrap();
    let message = chain(&connect(&folder.join(NAME)).await.unwrap_err());
    assert!(message.contains("not a folder"), "{message}");
}

#[tokio::test]
async fn a_folder_of_another_user_is_used_by_neither_side() {
    // Only root can change the owner of a folder; an ordinary user takes one of root's instead.
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
    for message in errors_at(&foreign.join(NAME)).await {
        assert!(message.contains("must belong to uid"), "{message}");
    }
}

#[tokio::test]
async fn a_socket_in_a_folder_with_a_long_path_works() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("x".repeat(120)).join("socket").join(NAME);
    assert!(path.as_os_str().len() > 107);
    let listener = Listener::bind(&path).unwrap();
    let (connected, accepted) = tokio::join!(
        connect(&path),
        std::future::poll_fn(|cx| listener.poll_accept(cx))
    );
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
    // A socket that was bound and closed, but not removed: a killed agent leaves one, and a socket of another host
    // looks the same.
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
    let _listener = Listener::bind(&path).unwrap();
    assert!(matches!(
        Listener::bind(&path).unwrap_err(),
        LinkError::InUse { .. }
    ));
    connect(&path).await.unwrap();
}

/// Each of them finds the socket that a killed agent has left; only one may remove it.
#[tokio::test]
async fn of_many_that_replace_a_dead_socket_at_once_one_serves_it() {
    const RACERS: usize = 8;
    let runtime = tokio::runtime::Handle::current();
    let root = tempfile::tempdir().unwrap();
    mode(root.path(), 0o700);
    let path = root.path().join(NAME);
    for _ in 0..40 {
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let barrier = std::sync::Barrier::new(RACERS);
        let bind = || {
            let _inside = runtime.enter();
            barrier.wait();
            Listener::bind(&path)
        };
        let bound: Vec<_> = std::thread::scope(|scope| {
            let racers: Vec<_> = (0..RACERS).map(|_| scope.spawn(bind)).collect();
            let ended = racers.into_iter().map(|racer| racer.join().unwrap());
            ended.collect()
        });
        let served = bound.iter().filter(|bound| bound.is_ok()).count();
        assert_eq!(served, 1);
        for bound in bound.iter().filter_map(|bound| bound.as_ref().err()) {
            assert!(matches!(bound, LinkError::InUse { .. }), "{}", chain(bound));
        }
        connect(&path).await.unwrap();
        drop(bound);
        assert!(!path.exists());
    }
}
