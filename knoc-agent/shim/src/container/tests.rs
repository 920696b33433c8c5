use super::{super::oom::OomCounter, *};

#[test]
fn what_the_runtime_itself_used_is_not_the_containers() {
    let cpu = |cpu| Counters {
        cpu,
        ..Counters::default()
    };
    let used = |own, kids| Used {
        own: cpu(own),
        kids: cpu(kids),
    };
    assert_eq!(spent(true, used(10, 100), used(20, 150)), cpu(50));
    assert_eq!(spent(false, used(1, 0), used(20, 150)), cpu(170));
    assert_eq!(spent(true, used(10, 100), used(0, 0)), cpu(0));
}

#[tokio::test]
async fn a_launcher_that_never_answers_is_given_up_when_the_pod_is_stopped() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let abort = CancellationToken::new();
    let spec = LaunchSpec::default();
    let launching = launch(ours, &spec, Vec::new(), &abort);
    let stopping = async { abort.cancel() };
    let both = async { tokio::join!(launching, stopping) };
    let (launched, ()) = tokio::time::timeout(Duration::from_secs(20), both)
        .await
        .expect("the launch still waits");
    assert!(matches!(launched, Err(AttemptError::Aborted)));
}

#[test]
#[expect(
    clippy::disallowed_methods,
    reason = "a test's own file, which stands for a kernel counter"
)]
fn one_oom_kill_is_counted_for_one_container_only() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("memory.events");
    let counted = |kills: u32| std::fs::write(&file, format!("oom_kill {kills}\n")).unwrap();
    counted(3);
    let oom = OomCounter::of(vec![file.clone()]);
    let (first, second) = (oom.unclaimed(), oom.unclaimed());
    counted(4);
    let exit = |code| Exit { code, signal: 0 };
    // Neither a container that ends in another way nor one that the shim kills claims the kill.
    assert!(!by_kernel(exit(1), false, || oom.claim(second)));
    assert!(!by_kernel(exit(137), true, || oom.claim(second)));
    assert!(by_kernel(exit(137), false, || oom.claim(first)));
    assert!(!by_kernel(exit(137), false, || oom.claim(second)));
    counted(5);
    assert!(by_kernel(exit(137), false, || oom.claim(second)));
}

#[test]
fn reasons_and_signals() {
    let exit = |code| Exit { code, signal: 0 };
    assert_eq!(reason_of(exit(0), true), "Completed");
    assert_eq!(reason_of(exit(137), true), "OOMKilled");
    assert_eq!(reason_of(exit(137), false), "Error");
    assert_eq!(with_signal(exit(143)).signal, 15);
    assert_eq!(with_signal(exit(255)).signal, 0);
}
