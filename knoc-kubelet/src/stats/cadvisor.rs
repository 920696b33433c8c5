//! PURE: `/metrics/cadvisor`, the text that dashboards and rules about containers are written for, with the names and labels that a kubelet's
//! cAdvisor gives them. It has the containers only: no pods, no node, and nothing of networks and file systems, which nobody measures.

use std::{collections::HashMap, sync::Arc};

use k8s_openapi::api::core::v1::{Pod, PodSpec};

use super::{
    Measured, Snapshot,
    resource::{braces, family, head, line, seconds, shows},
};

type Value = fn(&Measured) -> String;

/// The gauges of memory and the start time: name, what it says, and its value.
const GAUGES: [(&str, &str, Value); 5] = [
    (
        "container_memory_working_set_bytes",
        "Memory in use that cannot be reclaimed at once, in bytes",
        |one| one.usage.working_set_bytes.to_string(),
    ),
    (
        "container_memory_usage_bytes",
        "Memory in use, in bytes",
        |one| one.usage.usage_bytes.to_string(),
    ),
    (
        "container_memory_rss",
        "Anonymous memory, in bytes",
        |one| one.usage.rss_bytes.to_string(),
    ),
    (
        "container_memory_swap",
        "Memory swapped out, in bytes",
        |one| one.usage.swap_bytes.to_string(),
    ),
    (
        "container_start_time_seconds",
        "When the container's program started, Unix seconds",
        |one| seconds(u64::try_from(one.started_at).unwrap_or_default()),
    ),
];

/// Renders one snapshot. The images are those that the pods of the node name: rules and dashboards leave out what has no label `image`.
#[must_use]
pub fn render(snapshot: &Snapshot, pods: &[Arc<Pod>]) -> String {
    let specs: HashMap<&str, &PodSpec> = pods
        .iter()
        .filter_map(|pod| Some((pod.metadata.uid.as_deref()?, pod.spec.as_ref()?)))
        .collect();
    let mut text = String::new();
    family(
        &mut text,
        "container_cpu_usage_seconds_total",
        "CPU time used so far, in core-seconds",
        "counter",
        &rows(snapshot, &specs, &[("cpu", "total")]),
        |one| seconds(one.usage.cpu_nanoseconds),
    );
    let plain = rows(snapshot, &specs, &[]);
    for (name, help, value) in GAUGES {
        family(&mut text, name, help, "gauge", &plain, value);
    }
    let name = "container_scrape_error";
    let help = "1 if the agent did not answer; the other samples are then from its last answer";
    head(&mut text, name, help, "gauge");
    let failed = u8::from(snapshot.failed.is_some());
    line(&mut text, name, "", &failed.to_string(), None);
    text
}

/// The labels of the containers that are shown, with `cpu` among them, and what was measured of each.
fn rows<'a>(
    snapshot: &'a Snapshot,
    specs: &HashMap<&str, &PodSpec>,
    cpu: &[(&str, &str)],
) -> Vec<(String, &'a Measured)> {
    let mut rows = Vec::new();
    for pod in &snapshot.pods {
        let spec = specs.get(pod.uid.as_str());
        for (name, one) in pod.containers.iter().filter(|(_, one)| shows(one)) {
            let image = spec.and_then(|spec| image(spec, name)).unwrap_or_default();
            let mut labels = vec![("container", name.as_str())];
            labels.extend(cpu);
            labels.extend([
                ("image", image),
                ("namespace", pod.namespace.as_str()),
                ("pod", pod.name.as_str()),
            ]);
            rows.push((braces(&labels), one));
        }
    }
    rows
}

/// The image that the pod names for the container.
fn image<'a>(spec: &'a PodSpec, name: &str) -> Option<&'a str> {
    let init = spec.init_containers.iter().flatten();
    let plain = spec.containers.iter().chain(init);
    let plain = plain.map(|one| (&one.name, &one.image));
    let ephemeral = spec.ephemeral_containers.iter().flatten();
    let mut all = plain.chain(ephemeral.map(|one| (&one.name, &one.image)));
    let (_, image) = all.find(|(of, _)| of.as_str() == name)?;
    image.as_deref()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::tests::snapshot, *};

    fn pods() -> Vec<Arc<Pod>> {
        let pod = json!({
            "metadata": {"name": "web", "namespace": "team", "uid": "u1"},
            "spec": {"containers": [{"name": "main", "image": "busybox:1.36"}]},
        });
        vec![Arc::new(serde_json::from_value(pod).unwrap())]
    }

    #[test]
    fn the_exact_text() {
        let expected = "\
# HELP container_cpu_usage_seconds_total CPU time used so far, in core-seconds
# TYPE container_cpu_usage_seconds_total counter
container_cpu_usage_seconds_total{container=\"main\",cpu=\"total\",image=\"busybox:1.36\",namespace=\"team\",pod=\"web\"} 1.500000000 1700000010123
# HELP container_memory_working_set_bytes Memory in use that cannot be reclaimed at once, in bytes
# TYPE container_memory_working_set_bytes gauge
container_memory_working_set_bytes{container=\"main\",image=\"busybox:1.36\",namespace=\"team\",pod=\"web\"} 4096 1700000010123
# HELP container_memory_usage_bytes Memory in use, in bytes
# TYPE container_memory_usage_bytes gauge
container_memory_usage_bytes{container=\"main\",image=\"busybox:1.36\",namespace=\"team\",pod=\"web\"} 4096 1700000010123
# HELP container_memory_rss Anonymous memory, in bytes
# TYPE container_memory_rss gauge
container_memory_rss{container=\"main\",image=\"busybox:1.36\",namespace=\"team\",pod=\"web\"} 0 1700000010123
# HELP container_memory_swap Memory swapped out, in bytes
# TYPE container_memory_swap gauge
container_memory_swap{container=\"main\",image=\"busybox:1.36\",namespace=\"team\",pod=\"web\"} 0 1700000010123
# HELP container_start_time_seconds When the container's program started, Unix seconds
# TYPE container_start_time_seconds gauge
container_start_time_seconds{container=\"main\",image=\"busybox:1.36\",namespace=\"team\",pod=\"web\"} 1700000000.250000000 1700000010123
# HELP container_scrape_error 1 if the agent did not answer; the other samples are then from its last answer
# TYPE container_scrape_error gauge
container_scrape_error 0
";
        assert_eq!(render(&snapshot(), &pods()), expected);
    }

    #[test]
    fn a_pod_that_is_no_longer_known_has_no_image() {
        let text = render(&snapshot(), &[]);
        assert!(text.contains("image=\"\",namespace=\"team\""), "{text}");
    }

    #[test]
    fn images_are_those_of_all_kinds_of_containers() {
        let spec: PodSpec = serde_json::from_value(json!({
            "containers": [{"name": "main", "image": "a"}],
            "initContainers": [{"name": "sidecar", "image": "b"}],
            "ephemeralContainers": [{"name": "shell", "image": "c"}],
        }))
        .unwrap();
        let found = ["main", "sidecar", "shell", "other"].map(|name| image(&spec, name));
        assert_eq!(found, [Some("a"), Some("b"), Some("c"), None]);
    }
}
