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
            uid: "u1".to_owned(),
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

fn said(time: i64, cpu: u64, started_at: i64) -> pb::PodStats {
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

fn next(before: Option<&Snapshot>, said: pb::PodStats, now: i64) -> Snapshot {
    let totals = |pods: &[PodMeasured]| Totals::of(&pods[0].whole.usage);
    assemble(before, Ok(vec![said]), totals, now, 1)
}

#[test]
fn a_rate_needs_two_measurements_of_the_same_counters() {
    let first = next(None, said(SECOND, 100, 1), SECOND);
    assert_eq!(first.pods[0].whole.nano_cores, None);
    let second = next(Some(&first), said(3 * SECOND, 1_000_000_100, 1), 3 * SECOND);
    assert_eq!(second.pods[0].whole.nano_cores, Some(500_000_000));
    assert_eq!(second.pods[0].containers[0].1.nano_cores, Some(500_000_000));
    assert_eq!(second.node.nano_cores, Some(500_000_000));
    // The shim is away: its last word again, and the rate that was its last.
    let away = next(
        Some(&second),
        said(3 * SECOND, 1_000_000_100, 1),
        13 * SECOND,
    );
    assert_eq!(away.pods[0].whole, second.pods[0].whole);
    // The container was restarted.
    let restarted = next(Some(&second), said(4 * SECOND, 5, 2), 4 * SECOND);
    assert_eq!(restarted.pods[0].containers[0].1.nano_cores, None);
}

#[test]
fn an_agent_that_is_away_leaves_its_last_word() {
    let first = next(None, said(SECOND, 100, 1), SECOND);
    let none = |_: &[PodMeasured]| Totals::default();
    let away = assemble(Some(&first), Err("gone".to_owned()), none, 9 * SECOND, 1);
    assert_eq!(away.failed.as_deref(), Some("gone"));
    assert_eq!((&away.pods, &away.node), (&first.pods, &first.node));
    let never = assemble(None, Err("gone".to_owned()), none, 9 * SECOND, 1);
    assert_eq!(never.pods, []);
}
