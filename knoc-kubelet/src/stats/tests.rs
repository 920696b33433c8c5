use std::sync::atomic::{AtomicU32, Ordering};

use super::*;

const SECOND: i64 = 1_000_000_000;
const START: i64 = 1_700_000_000 * SECOND + SECOND / 4;

fn usage(time: i64, cpu: u64, memory: u64) -> pb::Usage {
    pb::Usage {
        time,
        cpu_nanoseconds: cpu,
        working_set_bytes: memory,
        usage_bytes: memory,
        ..pb::Usage::default()
    }
}

/// A node with one pod, one container of which has used no CPU time yet.
pub(crate) fn snapshot() -> Snapshot {
    let time = 1_700_000_010 * SECOND + 123_456_789;
    let one = |cpu| Measured {
        started_at: START,
        usage: usage(time, cpu, 4096),
        nano_cores: None,
    };
    let mut whole = usage(time, 2_000_000_000, 8192);
    whole.process_count = 3;
    Snapshot {
        node: Measured {
            started_at: START,
            usage: usage(1_700_000_011 * SECOND, 9_000_000_000, 8192),
            nano_cores: None,
        },
        memory_capacity: 0,
        pods: vec![PodMeasured {
            namespace: "team".to_owned(),
            name: "web".to_owned(),
            uid: "u1".parse().unwrap(),
            whole: Measured {
                started_at: START,
                usage: whole,
                nano_cores: Some(250),
            },
            containers: vec![
                ("idle".to_owned(), one(0)),
                ("main".to_owned(), one(1_500_000_000)),
            ],
        }],
        failed: None,
    }
}

fn reported(time: i64, cpu: u64, started_at: i64) -> pb::PodStats {
    pb::PodStats {
        uid: "u1".to_owned(),
        namespace: "team".to_owned(),
        name: "web".to_owned(),
        started_at: 1,
        usage: Some(usage(time, cpu, 10)),
        containers: vec![pb::ContainerStats {
            name: "main".to_owned(),
            started_at,
            usage: Some(usage(time, cpu, 10)),
        }],
    }
}

fn next(before: Option<&Snapshot>, reported: pb::PodStats, now: i64) -> Snapshot {
    let totals = |pods: &[PodMeasured]| Totals::of(&pods[0].whole.usage);
    assemble(before, Ok(vec![reported]), totals, now, 1)
}

#[test]
fn a_rate_needs_two_measurements_of_the_same_counters() {
    let first = next(None, reported(SECOND, 100, 1), SECOND);
    assert_eq!(first.pods[0].whole.nano_cores, None);
    let second = next(
        Some(&first),
        reported(3 * SECOND, 1_000_000_100, 1),
        3 * SECOND,
    );
    assert_eq!(second.pods[0].whole.nano_cores, Some(500_000_000));
    assert_eq!(second.pods[0].containers[0].1.nano_cores, Some(500_000_000));
    assert_eq!(second.node.nano_cores, Some(500_000_000));
    // The shim is disconnected: its last measurement is repeated, and its rate stays.
    let away = next(
        Some(&second),
        reported(3 * SECOND, 1_000_000_100, 1),
        13 * SECOND,
    );
    assert_eq!(away.pods[0].whole, second.pods[0].whole);
    // The container was restarted.
    let restarted = next(Some(&second), reported(4 * SECOND, 5, 2), 4 * SECOND);
    assert_eq!(restarted.pods[0].containers[0].1.nano_cores, None);
}

#[test]
fn the_last_measurement_stays_while_the_agent_is_down() {
    let first = next(None, reported(SECOND, 100, 1), SECOND);
    let none = |_: &[PodMeasured]| Totals::default();
    let away = assemble(Some(&first), Err("gone".to_owned()), none, 9 * SECOND, 1);
    assert_eq!(away.failed.as_deref(), Some("gone"));
    assert_eq!((&away.pods, &away.node), (&first.pods, &first.node));
    let never = assemble(None, Err("gone".to_owned()), none, 9 * SECOND, 1);
    assert_eq!(never.pods, []);
}

/// An agent that answers each call after `takes`, with its link and how often it was called.
fn agent(takes: Duration) -> (Stats, watch::Sender<Link>, Arc<AtomicU32>) {
    let up = Link::Up {
        info: Arc::default(),
        since: Timestamp::UNIX_EPOCH,
    };
    let (link, up) = watch::channel(up);
    let asked = Arc::<AtomicU32>::default();
    let count = Arc::clone(&asked);
    let ask: FetchStats = Box::new(move || {
        count.fetch_add(1, Ordering::Relaxed);
        Box::pin(async move {
            tokio::time::sleep(takes).await;
            Ok(Vec::new())
        })
    });
    (Stats::with_source(ask, up, Store::default()), link, asked)
}

async fn failed(stats: &Stats) -> Option<String> {
    stats.snapshot(0).await.failed.clone()
}

#[tokio::test(start_paused = true)]
async fn a_call_outlives_its_caller() {
    let (stats, _link, asked) = agent(Duration::from_secs(7));
    let start = Instant::now();
    let left = tokio::time::timeout(Duration::from_secs(5), stats.snapshot(0));
    assert!(left.await.is_err());
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(failed(&stats).await, None);
    assert_eq!(start.elapsed().as_secs(), 15, "it was answered meanwhile");
    // Counted from the answer at 7 s, not from when a caller took it.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(failed(&stats).await, None);
    assert_eq!(start.elapsed().as_secs(), 25);
    assert_eq!(asked.load(Ordering::Relaxed), 2);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_hangs_is_given_up_before_a_scraper_leaves() {
    let (stats, _link, asked) = agent(Duration::MAX);
    let start = Instant::now();
    let scrape = tokio::time::timeout(Duration::from_secs(10), failed(&stats));
    let message = scrape.await.expect("the scraper has left");
    assert_eq!(message.as_deref(), Some("no answer in 9 s"));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(failed(&stats).await.is_some(), "the same answer as before");
    assert_eq!(start.elapsed().as_secs(), 10, "at once");
    assert_eq!(asked.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_for_a_link_that_is_down() {
    let (stats, link, asked) = agent(Duration::MAX);
    let start = Instant::now();
    let cut = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        link.send_replace(Link::never());
    };
    let (message, ()) = tokio::join!(failed(&stats), cut);
    let down = Some("no link to the agent: not connected yet");
    assert_eq!(message.as_deref(), down);
    assert_eq!(failed(&stats).await.as_deref(), down);
    assert_eq!(start.elapsed().as_secs(), 1);
    assert_eq!(asked.load(Ordering::Relaxed), 1);
}
