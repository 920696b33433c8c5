//! PURE: `/metrics/resource`, the text that metrics-server reads, with the names, labels and timestamps of a kubelet.
//!
//! metrics-server ignores a whole pod if one of its containers has no CPU time or no memory yet, so such a container is
//! left out until it has both. Timestamps are those of the measurement in milliseconds, never of the request.

use std::fmt::Write as _;

use super::{Measured, Snapshot};

/// `Content-Type` of the Prometheus text format.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

const NANOS_PER_MILLI: i64 = 1_000_000;

/// Renders one snapshot.
#[must_use]
pub fn render(snapshot: &Snapshot) -> String {
    let mut text = String::new();
    let containers: Vec<(String, &Measured)> = snapshot
        .pods
        .iter()
        .flat_map(|pod| {
            let shown = pod.containers.iter().filter(|(_, one)| shows(one));
            shown.map(|(name, one)| {
                let labels = [
                    ("container", name.as_str()),
                    ("namespace", &pod.namespace),
                    ("pod", &pod.name),
                ];
                (braces(&labels), one)
            })
        })
        .collect();
    let pods: Vec<(String, &Measured)> = snapshot
        .pods
        .iter()
        .filter(|pod| shows(&pod.whole))
        .map(|pod| {
            let labels = [("namespace", pod.namespace.as_str()), ("pod", &pod.name)];
            (braces(&labels), &pod.whole)
        })
        .collect();
    // Before the first measurement there is no sample for the node.
    let node = (snapshot.node.usage.time > 0).then(|| (String::new(), &snapshot.node));
    let node: Vec<_> = node.into_iter().collect();
    for (scope, rows) in [("container", &containers), ("node", &node), ("pod", &pods)] {
        scoped(&mut text, scope, rows);
    }
    let failed = u8::from(snapshot.failed.is_some());
    for (name, help) in [
        (
            "resource_scrape_error",
            "1 if the agent did not answer; the other samples are then from its last answer",
        ),
        ("scrape_error", "The older name of resource_scrape_error"),
    ] {
        head(&mut text, name, help, "gauge");
        line(&mut text, name, "", &failed.to_string(), None);
    }
    text
}

fn scoped(text: &mut String, scope: &str, rows: &[(String, &Measured)]) {
    type Value = fn(&Measured) -> String;
    let cpu: Value = |one| seconds(one.usage.cpu_nanoseconds);
    let memory: Value = |one| one.usage.working_set_bytes.to_string();
    let swap: Value = |one| one.usage.swap_bytes.to_string();
    let families: [(&str, &str, &str, Value); 3] = [
        (
            "cpu_usage_seconds_total",
            "counter",
            "CPU time used so far, in core-seconds",
            cpu,
        ),
        (
            "memory_working_set_bytes",
            "gauge",
            "Memory in use that cannot be reclaimed at once, in bytes",
            memory,
        ),
        (
            "swap_usage_bytes",
            "gauge",
            "Memory swapped out, in bytes",
            swap,
        ),
    ];
    for (name, kind, help, value) in families {
        family(text, &format!("{scope}_{name}"), help, kind, rows, value);
    }
    if scope == "container" && !rows.is_empty() {
        let name = "container_start_time_seconds";
        let help = "When the container's program started, Unix seconds";
        head(text, name, help, "gauge");
        for (labels, one) in rows {
            let at = u64::try_from(one.started_at).unwrap_or_default();
            line(text, name, labels, &seconds(at), None);
        }
    }
}

/// Writes one family, unless it has no sample. The time of a sample is that of its measurement.
pub(super) fn family(
    text: &mut String,
    name: &str,
    help: &str,
    kind: &str,
    rows: &[(String, &Measured)],
    value: fn(&Measured) -> String,
) {
    if rows.is_empty() {
        return;
    }
    head(text, name, help, kind);
    for (labels, one) in rows {
        let at = one.usage.time / NANOS_PER_MILLI;
        line(text, name, labels, &value(one), Some(at));
    }
}

/// Whether a container is shown: once it has used CPU time and memory.
pub(super) fn shows(one: &Measured) -> bool {
    one.usage.cpu_nanoseconds > 0 && one.usage.working_set_bytes > 0
}

/// Nanoseconds as seconds with nine decimal places, without the rounding of a float.
pub(super) fn seconds(nanos: u64) -> String {
    format!("{}.{:09}", nanos / 1_000_000_000, nanos % 1_000_000_000)
}

/// Writes `# HELP` and `# TYPE` of a family.
pub(crate) fn head(text: &mut String, name: &str, help: &str, kind: &str) {
    // Writing to a String cannot fail.
    write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n").ok();
}

/// Writes one sample; `labels` is empty or comes from [`braces`].
pub(crate) fn line(text: &mut String, name: &str, labels: &str, value: &str, at: Option<i64>) {
    match at {
        Some(at) => writeln!(text, "{name}{labels} {value} {at}"),
        None => writeln!(text, "{name}{labels} {value}"),
    }
    .ok();
}

/// The labels as `{a="x",b="y"}`, escaped for the text format.
pub(crate) fn braces(labels: &[(&str, &str)]) -> String {
    let escape = |value: &str| {
        value
            .replace('\\', "\\\\")
            .replace('"', "\\\"")
            .replace('\n', "\\n")
    };
    let pairs: Vec<String> = labels
        .iter()
        .map(|(name, value)| format!("{name}=\"{}\"", escape(value)))
        .collect();
    format!("{{{}}}", pairs.join(","))
}

#[cfg(test)]
mod tests {
    use super::{super::tests::snapshot, *};

    #[test]
    fn the_exact_text() {
        let expected = "\
# HELP container_cpu_usage_seconds_total CPU time used so far, in core-seconds
# TYPE container_cpu_usage_seconds_total counter
container_cpu_usage_seconds_total{container=\"main\",namespace=\"team\",pod=\"web\"} 1.500000000 1700000010123
# HELP container_memory_working_set_bytes Memory in use that cannot be reclaimed at once, in bytes
# TYPE container_memory_working_set_bytes gauge
container_memory_working_set_bytes{container=\"main\",namespace=\"team\",pod=\"web\"} 4096 1700000010123
# HELP container_swap_usage_bytes Memory swapped out, in bytes
# TYPE container_swap_usage_bytes gauge
container_swap_usage_bytes{container=\"main\",namespace=\"team\",pod=\"web\"} 0 1700000010123
# HELP container_start_time_seconds When the container's program started, Unix seconds
# TYPE container_start_time_seconds gauge
container_start_time_seconds{container=\"main\",namespace=\"team\",pod=\"web\"} 1700000000.250000000
# HELP node_cpu_usage_seconds_total CPU time used so far, in core-seconds
# TYPE node_cpu_usage_seconds_total counter
node_cpu_usage_seconds_total 9.000000000 1700000011000
# HELP node_memory_working_set_bytes Memory in use that cannot be reclaimed at once, in bytes
# TYPE node_memory_working_set_bytes gauge
node_memory_working_set_bytes 8192 1700000011000
# HELP node_swap_usage_bytes Memory swapped out, in bytes
# TYPE node_swap_usage_bytes gauge
node_swap_usage_bytes 0 1700000011000
# HELP pod_cpu_usage_seconds_total CPU time used so far, in core-seconds
# TYPE pod_cpu_usage_seconds_total counter
pod_cpu_usage_seconds_total{namespace=\"team\",pod=\"web\"} 2.000000000 1700000010123
# HELP pod_memory_working_set_bytes Memory in use that cannot be reclaimed at once, in bytes
# TYPE pod_memory_working_set_bytes gauge
pod_memory_working_set_bytes{namespace=\"team\",pod=\"web\"} 8192 1700000010123
# HELP pod_swap_usage_bytes Memory swapped out, in bytes
# TYPE pod_swap_usage_bytes gauge
pod_swap_usage_bytes{namespace=\"team\",pod=\"web\"} 0 1700000010123
# HELP resource_scrape_error 1 if the agent did not answer; the other samples are then from its last answer
# TYPE resource_scrape_error gauge
resource_scrape_error 0
# HELP scrape_error The older name of resource_scrape_error
# TYPE scrape_error gauge
scrape_error 0
";
        assert_eq!(render(&snapshot()), expected);
    }

    #[test]
    fn a_kubelet_that_never_heard_its_agent_says_only_that() {
        let text = render(&Snapshot {
            failed: Some("away".to_owned()),
            ..Snapshot::default()
        });
        assert!(text.contains("\nresource_scrape_error 1\n"), "{text}");
        assert!(!text.contains("node_"), "{text}");
    }

    #[test]
    fn labels_are_escaped() {
        assert_eq!(
            braces(&[("a", "x\"y\\z\n"), ("b", "")]),
            r#"{a="x\"y\\z\n",b=""}"#
        );
    }

    #[test]
    fn seconds_keep_every_nanosecond() {
        assert_eq!(seconds(1), "0.000000001");
        assert_eq!(seconds(u64::MAX), "18446744073.709551615");
    }
}
