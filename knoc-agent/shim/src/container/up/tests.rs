use tokio::{sync::oneshot, time::Instant};

use super::{super::super::usage::Used, *};

/// Nothing has this pid, so no signal reaches a process.
const NO_PID: u32 = u32::MAX;
const NOBODY: Identity = Identity {
    pid: NO_PID,
    start: 0,
};

/// A runtime that ends when the test says so.
fn runtime() -> (Runtime, oneshot::Sender<(Exit, Option<Used>)>) {
    let (child, ends) = Child::that_stays(NO_PID);
    let runtime = Runtime {
        child,
        stderr: Arc::default(),
        tasks: JoinSet::new(),
        group: true,
        stuck: false,
    };
    (runtime, ends)
}

#[tokio::test(start_paused = true)]
async fn a_container_that_cannot_be_killed_is_waited_for_only_so_long_and_says_so() {
    let (mut runtime, ends) = runtime();
    assert_eq!(runtime.message("bye".to_owned()), "bye");
    let abort = CancellationToken::new();
    abort.cancel();
    let began = Instant::now();
    let exit = runtime.ended(&abort, NOBODY).await;
    assert_eq!(exit.code, KILLED);
    assert!(began.elapsed() >= RUNTIME_GRACE + AFTER_KILL);
    assert!(began.elapsed() < RUNTIME_GRACE + AFTER_KILL * 2);
    let message = runtime.message("bye".to_owned());
    assert!(message.contains("have not ended"), "{message}");
    // Nor does anything wait for a runtime whose program does not run yet.
    let began = Instant::now();
    runtime.end().await;
    assert!(began.elapsed() < RUNTIME_GRACE + AFTER_KILL * 2);
    drop(ends);
}

#[tokio::test(start_paused = true)]
async fn a_container_that_ends_once_it_is_killed_keeps_its_own_exit() {
    let (mut runtime, ends) = runtime();
    let abort = CancellationToken::new();
    abort.cancel();
    let own = Exit { code: 3, signal: 0 };
    let dies = async {
        tokio::time::sleep(RUNTIME_GRACE + AFTER_KILL / 2).await;
        ends.send((own, None)).unwrap();
    };
    let (exit, ()) = tokio::join!(runtime.ended(&abort, NOBODY), dies);
    assert_eq!(exit, own);
    assert_eq!(runtime.message("bye".to_owned()), "bye");
}

#[tokio::test]
async fn a_container_that_is_stopped_does_not_wait_for_the_file_system_of_its_image() {
    let abort = CancellationToken::new();
    let folder = Path::new("/proc");
    let own = rustix::process::getuid().as_raw() == 0;
    let found = is_foreign_folder(folder, &abort).await.unwrap();
    assert_eq!(found, !own);
    abort.cancel();
    let stopped = is_foreign_folder(folder, &abort).await;
    assert!(matches!(stopped, Err(AttemptError::Aborted)));
}
