use std::time::Duration;

use super::*;

/// A command that appends a line to a file and then ends with this message and code.
fn failing(log: &std::path::Path, name: &str, said: &str, code: i32) -> Carrier {
    let script = format!(
        "echo {name} >> '{}'; echo '{said}' >&2; exit {code}",
        log.display()
    );
    let words = serde_json::to_string(&["/bin/sh", "-c", &script]).unwrap();
    format!("exec:{words}").parse().unwrap()
}

fn attempts(log: &std::path::Path) -> Vec<String> {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

async fn attempt(route: &Route) -> String {
    let error = route.connect(None, &ExpectPeer::AnyAgent).await;
    chain(&error.unwrap_err())
}

#[tokio::test]
async fn addresses_are_tried_in_order_and_a_refused_login_is_not_repeated() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let route = Route::new(vec![
        failing(&log, "first", "u@a: Permission denied (publickey).", 255),
        failing(
            &log,
            "second",
            "ssh: connect to host b port 22: Connection refused",
            255,
        ),
    ])
    .unwrap();
    let error = attempt(&route).await;
    assert!(
        error.contains("no address answers") && error.contains("Permission denied"),
        "{error}"
    );
    assert_eq!(attempts(&log), ["first", "second"]);
    // The other connection, and every request meanwhile: the same message, and no further login.
    assert_eq!(attempt(&route.clone()).await, error);
    assert_eq!(attempts(&log), ["first", "second"]);
    tokio::time::timeout(Duration::from_secs(10), async {
        while attempts(&log).len() < 3 {
            attempt(&route).await;
        }
    })
    .await
    .unwrap();
    assert_eq!(attempts(&log), ["first", "second", "second"]);
}

#[tokio::test]
async fn the_address_that_worked_last_comes_first() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let script = format!(
        "echo third >> '{}'; printf 'KNOC-LINK/1 plain\\n'; cat",
        log.display()
    );
    let words = serde_json::to_string(&["/bin/sh", "-c", &script]).unwrap();
    let route = Route::new(vec![
        failing(&log, "first", "nothing", 1),
        failing(&log, "second", "nothing", 1),
        format!("exec:{words}").parse().unwrap(),
    ])
    .unwrap();
    for _ in 0..2 {
        let connection = route.connect(None, &ExpectPeer::AnyAgent).await.unwrap();
        assert_eq!(connection.peer(), &crate::Peer::Command);
    }
    assert_eq!(attempts(&log), ["first", "second", "third", "third"]);
}

#[expect(clippy::disallowed_methods, reason = "a file of the test itself")]
#[tokio::test]
async fn a_request_that_was_cancelled_does_not_keep_the_turn() {
    let folder = tempfile::tempdir().unwrap();
    let (log, go) = (folder.path().join("log"), folder.path().join("go"));
    let script = format!(
        "echo try >> '{}'; while [ ! -e '{}' ]; do sleep 0.05; done; exit 1",
        log.display(),
        go.display()
    );
    let words = serde_json::to_string(&["/bin/sh", "-c", &script]).unwrap();
    let carrier: Carrier = format!("exec:{words}").parse().unwrap();
    let route = Route::from(carrier);
    let channel = || crate::dial(route.clone(), None, ExpectPeer::AnyAgent).unwrap();
    // As control and bulk of one kubelet. Somebody asks over bulk, and gives up while the login goes on.
    let (control, bulk) = (channel(), channel());
    let asked = tokio::select! {
        biased;
        _ = crate::tests::ask(bulk.clone()) => false,
        () = async { while attempts(&log).is_empty() { tokio::task::yield_now().await } } => true,
    };
    assert!(asked);
    std::fs::write(&go, "").unwrap();
    let answer = tokio::time::timeout(Duration::from_secs(10), crate::tests::ask(control)).await;
    assert_eq!(answer.unwrap().code(), tonic::Code::Unavailable);
    drop(bulk);
}
