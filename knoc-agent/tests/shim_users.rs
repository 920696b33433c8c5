//! The shim and a container that asks for a user and a group.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod harness;

use std::time::Instant;

use harness::{
    DEADLINE, Job, isolated, sh,
    streams::{SLEEPER, command, exec, stop, up},
};
use knoc_proto::pb;

/// As whom the command sees itself and what it makes; whether it and the container's program differ in ids, rights or namespaces.
const WHO: &str = "id -u; id -g; touch /tmp/mine; stat -c %u:%g /tmp/mine; \
     grep -E '^Cap(Prm|Eff|Bnd|Amb)' /proc/self/status | cut -f 2 | sort -u; \
     of() { grep -E '^(Uid|Gid|Cap|NoNewPrivs)' /proc/$1/status; readlink /proc/$1/ns/user; readlink /proc/$1/ns/mnt; }; \
     test \"$(of 1)\" = \"$(of self)\" && echo same";

/// A container with this script for these ids.
fn asks(script: &str, uid: i64, gid: i64) -> pb::Container {
    pb::Container {
        run_as_user: Some(uid),
        run_as_group: Some(gid),
        ..sh("a", script)
    }
}

/// What says that the ids are not those that the pod asks for.
fn mapped(report: &pb::Report) -> Option<&pb::PodNote> {
    report.notes.iter().find(|note| note.reason == "Mapped")
}

fn own() -> u32 {
    nix::unistd::getuid().as_raw()
}

#[tokio::test]
async fn without_isolation_the_program_keeps_its_ids_and_a_note_says_so() {
    if isolated() {
        return;
    }
    let (mut job, _agent, mut shim) = up(asks(SLEEPER, 1234, 5678)).await;
    let report = job.until(|report| mapped(report).is_some()).await;
    let note = mapped(&report).unwrap();
    assert!(note.container == "a" && !note.warning, "{note:?}");
    let ran = exec(&mut shim, command(&["id", "-u"]), b"").await;
    assert_eq!(ran.text(), format!("{}\n", own()), "{ran:?}");
    stop(&mut shim).await;
    job.wait().await;
}

#[tokio::test]
async fn the_program_and_a_command_beside_it_have_the_ids_and_no_right() {
    if !isolated() {
        return;
    }
    for (uid, gid) in [(1234, 5678), (0, 0)] {
        let (mut job, _agent, mut shim) = up(asks(SLEEPER, uid, gid)).await;
        let ran = exec(&mut shim, command(&["sh", "-c", WHO]), b"").await;
        let wanted = format!("{uid}\n{gid}\n{uid}:{gid}\n0000000000000000\nsame\n");
        assert_eq!(ran.text(), wanted, "{ran:?}");
        stop(&mut shim).await;
        job.wait().await;
        assert_eq!(mapped(&job.report()), None);
    }
}

/// A program that hides the container's `/tmp` in namespaces of its own, and says so. `then` follows.
fn hides(then: &str) -> String {
    let inside = format!(
        "mount -t tmpfs none /tmp && trap \"exit 0\" TERM && echo up; {then} while :; do sleep 0.05; done"
    );
    format!("echo seen >/tmp/of-the-container; exec unshare -U -r -m sh -c '{inside}'")
}

#[tokio::test]
async fn a_command_enters_the_container_and_not_what_its_program_has_entered() {
    if !isolated() {
        return;
    }
    let look = command(&["sh", "-c", "cat /tmp/of-the-container; id -u"]);
    for (container, uid) in [
        (sh("a", &hides("")), own()),
        (asks(&hides(""), 1234, 5678), 1234),
    ] {
        let (mut job, _agent, mut shim) = up(container).await;
        let ran = exec(&mut shim, look.clone(), b"").await;
        assert_eq!(ran.text(), format!("seen\n{uid}\n"), "{ran:?}");
        stop(&mut shim).await;
        job.wait().await;
    }
}

/// The shim has let go of the container's namespaces then.
#[tokio::test]
async fn without_its_output_the_message_says_that_the_program_has_entered_namespaces() {
    if !isolated() {
        return;
    }
    let script = hides("exec >/dev/null 2>&1;");
    let (mut job, _agent, mut shim) = up(sh("a", &script)).await;
    let began = Instant::now();
    let error = loop {
        let ran = exec(&mut shim, command(&["true"]), b"").await;
        let exit = ran.exit.unwrap_or_default();
        if exit.code != 0 {
            break exit.error;
        }
        assert!(began.elapsed() < DEADLINE, "its output is still open");
    };
    assert!(error.contains("as a child process"), "{error}");
    stop(&mut shim).await;
    job.wait().await;
}

#[tokio::test]
async fn the_site_may_want_that_all_programs_keep_their_ids() {
    if !isolated() {
        return;
    }
    let mut job = Job::new(vec![asks("id -u", 1234, 5678)]);
    job.file.settings.as_mut().unwrap().own_ids = true;
    job.start();
    assert_eq!(job.code().await, 0);
    assert_eq!(job.log("a", 0), format!("{}\n", own()));
    // The kubelet has said it.
    assert_eq!(mapped(&job.report()), None);
}
