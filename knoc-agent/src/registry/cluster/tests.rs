use std::sync::mpsc;

use proptest::prelude::*;

use super::*;

const NOW: i64 = 1_795_000_000;

fn asked<'a>(cluster_id: &'a str, node: &'a str, epoch: i64) -> Asked<'a> {
    Asked {
        cluster_id,
        configured: None,
        leader: (epoch != 0).then_some(Leader { node, epoch }),
        pins: true,
        now: NOW,
    }
}

fn reason(answer: Result<(), RequestError>) -> ErrorReason {
    answer.unwrap_err().reason
}

/// If a caller goes away during its write, the next one is checked against what was written.
#[test]
fn a_caller_that_goes_away_leaves_file_and_memory_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let state = StateDir::new(folder.path());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .max_blocking_threads(1)
        .build()
        .unwrap();
    runtime.block_on(async {
        let pin = Pin::load(&state).unwrap();
        // The only thread for blocking work is busy.
        let (gate, waits) = mpsc::channel::<()>();
        let busy = tokio::task::spawn_blocking(move || waits.recv().unwrap_or_default());
        let (one, two) = (asked("one", "a", 3), asked("two", "a", 1));
        {
            let gone = std::pin::pin!(pin.claim(&one));
            assert!(futures::poll!(gone).is_pending());
        }
        let next = pin.claim(&two);
        let (rejected, ()) = tokio::join!(next, async { drop(gate) });
        assert_eq!(reason(rejected), ErrorReason::ClusterMismatch);
        busy.await.unwrap();
    });
    let kept: Cluster = jobdir::read_json(&state.cluster()).unwrap().unwrap();
    assert_eq!(kept.cluster_id, "one");
}

/// An agent that was suspended may answer a request before it finds out that a newer one has taken over.
#[tokio::test]
async fn a_fenced_agent_takes_no_epoch_of_the_newer_one_back() {
    let folder = tempfile::tempdir().unwrap();
    let state = StateDir::new(folder.path());
    let agent = |host: &str, at: i64| {
        let process = crate::lease::Process {
            host: host.to_owned(),
            boot_id: "b".to_owned(),
            pid: 10,
        };
        let at = jiff::Timestamp::from_second(at).unwrap();
        let lease = Holder::take(&state, &process, at).unwrap();
        Pin::load(&state).unwrap().under(lease)
    };
    let older = agent("login1", NOW);
    older.claim(&asked("one", "a", 3)).await.unwrap();
    let newer = agent("login2", NOW + 61);
    newer.claim(&asked("one", "a", 9)).await.unwrap();
    let late = older.claim(&asked("one", "a", 4)).await;
    assert_eq!(reason(late), ErrorReason::ShuttingDown);
    let kept: Cluster = jobdir::read_json(&state.cluster()).unwrap().unwrap();
    assert_eq!(kept.leaders["a"], 9);
}

#[tokio::test]
async fn kubelets_of_several_nodes_lead_each_for_itself() {
    let folder = tempfile::tempdir().unwrap();
    let state = StateDir::new(folder.path());
    let pin = Pin::load(&state).unwrap();
    pin.claim(&asked("one", "a", 9)).await.unwrap();
    pin.claim(&asked("one", "b", 3)).await.unwrap();
    let pin = Pin::load(&state).unwrap();
    for (node, older) in [("a", 8), ("b", 2)] {
        let rejected = pin.claim(&asked("one", node, older)).await;
        assert_eq!(reason(rejected), ErrorReason::StaleLeader);
    }
    pin.claim(&asked("one", "b", 4)).await.unwrap();
}

/// An epoch that an older agent recorded for the whole cluster applies to every node.
#[tokio::test]
async fn an_epoch_of_an_older_agent_still_counts() {
    let folder = tempfile::tempdir().unwrap();
    let state = StateDir::new(folder.path());
    let older = br#"{"cluster_id": "one", "leadership_epoch": 7}"#;
    jobdir::atomic::write(&state.cluster(), older, 0o600).unwrap();
    let pin = Pin::load(&state).unwrap();
    let rejected = pin.claim(&asked("one", "a", 6)).await;
    assert_eq!(reason(rejected), ErrorReason::StaleLeader);
    pin.claim(&asked("one", "a", 8)).await.unwrap();
    pin.claim(&asked("one", "b", 1)).await.unwrap();
    let kept: Cluster = jobdir::read_json(&state.cluster()).unwrap().unwrap();
    assert_eq!(kept.leadership_epoch, 8, "for a downgraded agent");
}

/// Older agents accepted any epoch from anyone; 2^63 - 1 would lock out every kubelet forever.
#[tokio::test]
async fn an_epoch_far_ahead_of_the_clock_locks_no_kubelet_out() {
    let folder = tempfile::tempdir().unwrap();
    let state = StateDir::new(folder.path());
    for older in [
        format!(
            r#"{{"cluster_id": "one", "leadership_epoch": {}}}"#,
            i64::MAX
        ),
        format!(
            r#"{{"cluster_id": "one", "leadership_epoch": {0}, "leaders": {{"a": {0}, "": 5}}}}"#,
            i64::MAX
        ),
    ] {
        jobdir::atomic::write(&state.cluster(), older.as_bytes(), 0o600).unwrap();
        let pin = Pin::load(&state).unwrap();
        pin.claim(&asked("one", "a", NOW)).await.unwrap();
        let rejected = pin.claim(&asked("one", "a", NOW - 1)).await;
        assert_eq!(reason(rejected), ErrorReason::StaleLeader);
        let kept: Cluster = jobdir::read_json(&state.cluster()).unwrap().unwrap();
        assert_eq!(kept.leadership_epoch, NOW);
    }
}

#[tokio::test]
async fn pinned_at_first_use_and_epochs_only_grow() {
    let folder = tempfile::tempdir().unwrap();
    let state = StateDir::new(folder.path());
    let pin = Pin::load(&state).unwrap();
    pin.claim(&asked("", "a", 0)).await.unwrap();
    // A request that is only verified records nothing, nor does one that may not pin.
    pin.verify(&asked("two", "a", 9)).await.unwrap();
    let ctl = Asked {
        pins: false,
        ..asked("two", "a", 0)
    };
    pin.claim(&ctl).await.unwrap();
    assert!(
        jobdir::read_json::<Cluster>(&state.cluster())
            .unwrap()
            .is_none()
    );
    pin.claim(&asked("one", "a", 3)).await.unwrap();
    let other = pin.claim(&asked("two", "a", 4)).await;
    assert_eq!(reason(other), ErrorReason::ClusterMismatch);
    assert_eq!(reason(pin.claim(&ctl).await), ErrorReason::ClusterMismatch);
    let pin = Pin::load(&state).unwrap();
    let older = asked("one", "a", 2);
    assert_eq!(reason(pin.verify(&older).await), ErrorReason::StaleLeader);
    assert_eq!(reason(pin.claim(&older).await), ErrorReason::StaleLeader);
    pin.claim(&asked("one", "a", 0)).await.unwrap();
    pin.claim(&asked("one", "a", 3)).await.unwrap();
    // A reinstalled kubelet starts with the current time as its epoch.
    pin.claim(&asked("one", "a", NOW)).await.unwrap();
    let older = pin.claim(&asked("one", "a", 4)).await;
    assert_eq!(reason(older), ErrorReason::StaleLeader);
    let configured = |request| Asked {
        configured: Some("two"),
        ..request
    };
    let pin = Pin::load(&state).unwrap();
    let rejected = pin.claim(&configured(asked("one", "a", 9))).await;
    assert_eq!(reason(rejected), ErrorReason::ClusterMismatch);
    pin.claim(&configured(asked("two", "a", 1))).await.unwrap();
}

proptest! {
    /// Whatever one node's kubelet claims, the epochs of the others stay, and no epoch falls.
    #[test]
    fn a_claim_touches_its_own_node_only(claims in prop::collection::vec((0..4_u8, 1..=NOW + 300), 1..40)) {
        let mut known = Cluster::default();
        for (node, epoch) in claims {
            let node = node.to_string();
            let before = known.clone();
            match judge(&known, &asked("one", &node, epoch)) {
                Ok(next) => known = next,
                Err(rejected) => prop_assert_eq!(rejected.reason, ErrorReason::StaleLeader),
            }
            for (name, epoch) in &before.leaders {
                prop_assert!(known.leaders[name] >= *epoch);
                prop_assert!(*name == node || known.leaders[name] == *epoch);
            }
        }
    }
}
