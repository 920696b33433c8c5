use std::collections::BTreeSet;

use http::Method;

use super::*;

fn full() -> (Metrics, Gauges) {
    let metrics = Metrics::default();
    metrics.request("/pods", &Method::GET, 200);
    metrics.request("/pods", &Method::GET, 200);
    metrics.request("other", &Method::from_bytes(b"BREW").unwrap(), 404);
    metrics.patched(PatchResult::Ok, Duration::from_millis(30));
    metrics.patched(PatchResult::Ok, Duration::from_secs(20));
    for protocol in ["spdy/v4.channel.k8s.io", "websocket/v5.channel.k8s.io"] {
        metrics.session("exec", protocol.to_owned());
    }
    metrics.session("exec", "websocket/v5.channel.k8s.io".to_owned());
    let open = metrics.egress.made();
    open.add_from_pod(100);
    open.add_to_pod(2000);
    std::mem::forget(open);
    drop(metrics.relay.made());
    metrics.egress.refused(traffic::Reason::NotListed);
    metrics.egress.refused(traffic::Reason::Dial);
    metrics.relay.refused(traffic::Reason::Limit);
    let refused = [("policy", 2), ("limit_pod", 3), ("newer", 4), ("newest", 5)];
    let agent_egress = pb::EgressCounts {
        waiting: 1,
        refused: refused
            .map(|(reason, count)| (reason.to_owned(), count))
            .into(),
    };
    let agent = pb::AgentInfo {
        version: "0.1.0".to_owned(),
        site: "s".to_owned(),
        scheduler_version: "slurm 24.11.5".to_owned(),
        runtime_version: "apptainer 1.4.5".to_owned(),
        ..pb::AgentInfo::default()
    };
    let gauges = Gauges {
        phases: [("Running".to_owned(), 2)].into(),
        agent: Some(Arc::new(agent)),
        agent_egress: Some(agent_egress),
        link_changed: 1_700_000_000,
        scheduler: Some((true, Some(Duration::from_millis(1500)))),
        certificates: vec![("agent", -5), ("kubelet", 86_400)],
        streams: 3,
        process: Some(process::Process {
            cpu: Duration::from_millis(1250),
            resident: 4096,
            open_fds: 9,
            max_fds: 1024,
            started: Duration::from_secs(5),
        }),
    };
    (metrics, gauges)
}

#[test]
fn the_exact_text() {
    let (metrics, gauges) = full();
    insta::assert_snapshot!(metrics.render(&gauges));
}

/// The names of the families in a text, from its `# TYPE` lines.
fn families(text: &str) -> BTreeSet<String> {
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    types
        .map(|rest| rest.rsplit_once(' ').unwrap().0.to_owned())
        .collect()
}

#[test]
fn every_family_is_in_the_list_and_every_name_of_the_list_is_shown() {
    let (metrics, gauges) = full();
    let listed: BTreeSet<_> = FAMILIES
        .iter()
        .map(|family| family.name.to_owned())
        .collect();
    assert_eq!(families(&metrics.render(&gauges)), listed);
    let names: Vec<_> = FAMILIES.iter().map(|family| family.name).collect();
    assert!(names.is_sorted(), "by name");
}

#[test]
fn what_is_not_known_is_not_shown() {
    let text = Metrics::default().render(&Gauges::default());
    let shown = families(&text);
    assert!(!shown.contains("knoc_agent_info"));
    assert!(!shown.contains("knoc_scheduler_up"));
    assert!(text.contains("\nknoc_agent_link_up 0\n"), "{text}");
}

#[test]
fn names_follow_the_conventions() {
    for family in FAMILIES.iter().chain(PROBE_FAMILIES) {
        let counter = family.kind == "counter";
        assert_eq!(family.name.ends_with("_total"), counter, "{}", family.name);
        assert!(!family.help.ends_with('.') && !family.help.contains('\n'));
    }
}

#[test]
fn probes_have_families_and_no_samples() {
    let text = render_probes();
    assert!(text.lines().all(|line| line.starts_with("# ")), "{text}");
    assert_eq!(families(&text).len(), PROBE_FAMILIES.len());
}
