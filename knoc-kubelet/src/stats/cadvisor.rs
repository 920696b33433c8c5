//! PURE: `/metrics/cadvisor`, the use of containers and pods with the names and labels of cAdvisor, for dashboards and
//! recording rules that were written for kubelets.
//!
//! The same measurement as in [`super::resource`]. The series of a pod have empty labels `container` and `image`, and those
//! of the node an empty `pod` too, by which rules leave them out. What nobody measures (network, file systems, throttling)
//! has no series.

use std::collections::HashMap;

use knoc_proto::pb;

use super::{
    Measured, PodMeasured, Snapshot,
    resource::{braces, family, head, line, seconds, shows},
};

/// A series: its labels without `cpu`, and what was measured.
type Row<'a> = ([(&'static str, String); 6], &'a Measured);

type Value = fn(&Measured) -> String;

/// The gauges with their help texts.
const GAUGES: [(&str, &str, Value); 4] = [
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
        "container_memory_usage_bytes",
        "Memory in use, including what can be reclaimed, in bytes",
        |one| one.usage.usage_bytes.to_string(),
    ),
    (
        "container_memory_working_set_bytes",
        "Memory in use that cannot be reclaimed at once, in bytes",
        |one| one.usage.working_set_bytes.to_string(),
    ),
];

/// Renders one snapshot. `observed` has the images and ids of the containers.
#[must_use]
pub fn render<'a, P: AsRef<pb::PodObserved>>(snapshot: &Snapshot, observed: &'a [P]) -> String {
    let by_uid = |pod: &'a P| {
        let pod: &pb::PodObserved = pod.as_ref();
        (pod.uid.as_str(), pod)
    };
    let known: HashMap<&str, &pb::PodObserved> = observed.iter().map(by_uid).collect();
    let mut rows = Vec::new();
    // Before the first measurement there is no sample for the node.
    if snapshot.node.usage.time > 0 {
        rows.push((labels(["", "/", "", "", "", ""]), &snapshot.node));
    }
    for pod in &snapshot.pods {
        rows.extend(of_pod(pod, known.get(pod.uid.as_str()).copied()));
    }
    let mut text = String::new();
    let name = "container_cpu_usage_seconds_total";
    let help = "CPU time used so far, in core-seconds";
    let cpu: Value = |one| seconds(one.usage.cpu_nanoseconds);
    family(
        &mut text,
        name,
        help,
        "counter",
        &braced(&rows, Some("total")),
        cpu,
    );
    let plain = braced(&rows, None);
    for (name, help, value) in GAUGES {
        family(&mut text, name, help, "gauge", &plain, value);
    }
    let started: Value = |one| seconds(u64::try_from(one.started_at).unwrap_or_default());
    let name = "container_start_time_seconds";
    let help = "When the counters started, Unix seconds";
    family(&mut text, name, help, "gauge", &plain, started);
    let (name, failed) = ("container_scrape_error", snapshot.failed.is_some());
    let help = "1 if the agent did not answer; the other samples are then from its last answer";
    head(&mut text, name, help, "gauge");
    line(&mut text, name, "", &u8::from(failed).to_string(), None);
    text
}

fn labels([container, id, image, name, namespace, pod]: [&str; 6]) -> [(&'static str, String); 6] {
    [
        ("container", container),
        ("id", id),
        ("image", image),
        ("name", name),
        ("namespace", namespace),
        ("pod", pod),
    ]
    .map(|(label, value)| (label, value.to_owned()))
}

/// The rows of a pod: of the whole, and of its containers that have used CPU time and memory.
fn of_pod<'a>(pod: &'a PodMeasured, observed: Option<&pb::PodObserved>) -> Vec<Row<'a>> {
    let id = format!("/pod{}", pod.uid);
    let mut rows = Vec::new();
    if shows(&pod.whole) {
        let whole = labels(["", &id, "", "", &pod.namespace, &pod.name]);
        rows.push((whole, &pod.whole));
    }
    for (name, one) in pod.containers.iter().filter(|(_, one)| shows(one)) {
        let status = observed.and_then(|observed| {
            let lasting = observed.init_containers.iter().chain(&observed.containers);
            let mut all = lasting.chain(&observed.ephemeral_containers);
            all.find(|status| status.name == *name)
        });
        let (image, of_runtime) = status.map_or(("", ""), |status| {
            (status.image.as_str(), status.container_id.as_str())
        });
        let own = format!("{id}/{name}");
        let place = labels([name, &own, image, of_runtime, &pod.namespace, &pod.name]);
        rows.push((place, one));
    }
    rows
}

/// The labels as the text format has them, with `cpu` if the family has it.
fn braced<'a>(rows: &[Row<'a>], cpu: Option<&str>) -> Vec<(String, &'a Measured)> {
    let one = |(labels, one): &Row<'a>| {
        let mut pairs: Vec<(&str, &str)> = labels
            .iter()
            .map(|(label, value)| (*label, value.as_str()))
            .collect();
        if let Some(cpu) = cpu {
            pairs.insert(1, ("cpu", cpu));
        }
        (braces(&pairs), *one)
    };
    rows.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{super::tests::snapshot, *};

    #[test]
    fn containers_have_images_and_pods_and_the_node_have_none() {
        let observed = pb::PodObserved {
            uid: "u1".to_owned(),
            containers: vec![pb::ContainerStatus {
                name: "main".to_owned(),
                image: "busybox:1".to_owned(),
                container_id: "apptainer://12.main.0".to_owned(),
                ..pb::ContainerStatus::default()
            }],
            ..pb::PodObserved::default()
        };
        let text = render(&snapshot(), &[Arc::new(observed)]);
        let main = "id=\"/podu1/main\",image=\"busybox:1\",name=\"apptainer://12.main.0\",namespace=\"team\",pod=\"web\"";
        let whole = "id=\"/podu1\",image=\"\",name=\"\",namespace=\"team\",pod=\"web\"";
        let node = "id=\"/\",image=\"\",name=\"\",namespace=\"\",pod=\"\"";
        for wanted in [
            format!(
                "container_cpu_usage_seconds_total{{container=\"main\",cpu=\"total\",{main}}} 1.500000000 1700000010123"
            ),
            format!(
                "container_cpu_usage_seconds_total{{container=\"\",cpu=\"total\",{whole}}} 2.000000000 1700000010123"
            ),
            format!(
                "container_cpu_usage_seconds_total{{container=\"\",cpu=\"total\",{node}}} 9.000000000 1700000011000"
            ),
            format!(
                "container_memory_working_set_bytes{{container=\"main\",{main}}} 4096 1700000010123"
            ),
            format!("container_memory_rss{{container=\"main\",{main}}} 0 1700000010123"),
            "container_scrape_error 0".to_owned(),
        ] {
            assert!(text.lines().any(|line| line == wanted), "{wanted}\n{text}");
        }
        assert!(!text.contains("idle"), "it has used no CPU time: {text}");
        let families = text.lines().filter(|line| line.starts_with("# TYPE "));
        assert_eq!(families.count(), 7, "each family once: {text}");
    }

    #[test]
    fn a_kubelet_that_never_heard_its_agent_says_only_that() {
        let none: [Arc<pb::PodObserved>; 0] = [];
        let snapshot = Snapshot {
            failed: Some("away".to_owned()),
            ..Snapshot::default()
        };
        let text = render(&snapshot, &none);
        assert!(text.ends_with("\ncontainer_scrape_error 1\n"), "{text}");
        assert_eq!(text.lines().count(), 3);
    }
}
