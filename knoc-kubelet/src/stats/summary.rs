//! PURE: `/stats/summary`, the JSON of the kubelet's stats API (v1alpha1).
//!
//! Values that nobody measures (network, file systems, volumes) are left out instead of being reported as zero.

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::{Measured, PodMeasured, Snapshot};

/// Renders the document. With `only_cpu_and_memory` swap and processes are left out, as in the Kubernetes kubelet.
#[must_use]
pub fn render(node: &str, snapshot: &Snapshot, only_cpu_and_memory: bool) -> Value {
    let mut of_node = resources(&snapshot.node, only_cpu_and_memory);
    of_node.insert("nodeName".to_owned(), node.into());
    let working_set = snapshot.node.usage.working_set_bytes;
    let left = snapshot.memory_capacity.checked_sub(working_set);
    if let Some(left) = left.filter(|_| snapshot.memory_capacity > 0)
        && let Some(memory) = of_node.get_mut("memory")
    {
        memory["availableBytes"] = left.into();
    }
    let pods: Vec<Value> = snapshot
        .pods
        .iter()
        .map(|one| pod(one, only_cpu_and_memory))
        .collect();
    json!({"node": of_node, "pods": pods})
}

fn pod(pod: &PodMeasured, only_cpu_and_memory: bool) -> Value {
    let mut value = resources(&pod.whole, only_cpu_and_memory);
    let reference = json!({"name": pod.name, "namespace": pod.namespace, "uid": pod.uid});
    value.insert("podRef".to_owned(), reference);
    let containers: Vec<Value> = pod
        .containers
        .iter()
        .map(|(name, one)| {
            let mut value = resources(one, only_cpu_and_memory);
            value.insert("name".to_owned(), name.as_str().into());
            Value::Object(value)
        })
        .collect();
    value.insert("containers".to_owned(), containers.into());
    if !only_cpu_and_memory {
        let count = json!({"process_count": pod.whole.usage.process_count});
        value.insert("process_stats".to_owned(), count);
    }
    Value::Object(value)
}

fn resources(one: &Measured, only_cpu_and_memory: bool) -> Map<String, Value> {
    let usage = &one.usage;
    let at = time(usage.time);
    let mut cpu = json!({"time": at, "usageCoreNanoSeconds": usage.cpu_nanoseconds});
    if let Some(rate) = one.nano_cores {
        cpu["usageNanoCores"] = rate.into();
    }
    let memory = json!({
        "time": at,
        "usageBytes": usage.usage_bytes,
        "workingSetBytes": usage.working_set_bytes,
        "rssBytes": usage.rss_bytes,
        "pageFaults": usage.page_faults,
        "majorPageFaults": usage.major_page_faults,
    });
    let mut value = Map::new();
    value.insert("startTime".to_owned(), time(one.started_at).into());
    value.insert("cpu".to_owned(), cpu);
    value.insert("memory".to_owned(), memory);
    if !only_cpu_and_memory {
        let swap = json!({"time": at, "swapUsageBytes": usage.swap_bytes});
        value.insert("swap".to_owned(), swap);
    }
    value
}

/// A time as Kubernetes writes it, in whole seconds.
fn time(nanos: i64) -> String {
    let at = Timestamp::from_second(nanos.div_euclid(1_000_000_000));
    at.unwrap_or(Timestamp::UNIX_EPOCH).to_string()
}

#[cfg(test)]
mod tests {
    use super::{super::tests::snapshot, *};

    #[test]
    fn the_exact_document() {
        let mut whole = snapshot();
        whole.memory_capacity = 10_000;
        let memory = |bytes: u64, time: &str| {
            json!({
                "time": time, "usageBytes": bytes, "workingSetBytes": bytes, "rssBytes": 0,
                "pageFaults": 0, "majorPageFaults": 0,
            })
        };
        let (at, of_node) = ("2023-11-14T22:13:30Z", "2023-11-14T22:13:31Z");
        let swap = |time: &str| json!({"time": time, "swapUsageBytes": 0});
        let mut node_memory = memory(8192, of_node);
        node_memory["availableBytes"] = 1808.into();
        let start = "2023-11-14T22:13:20Z";
        let expected = json!({
            "node": {
                "nodeName": "virtual",
                "startTime": start,
                "cpu": {"time": of_node, "usageCoreNanoSeconds": 9_000_000_000_u64},
                "memory": node_memory,
                "swap": swap(of_node),
            },
            "pods": [{
                "podRef": {"name": "web", "namespace": "team", "uid": "u1"},
                "startTime": start,
                "cpu": {"time": at, "usageCoreNanoSeconds": 2_000_000_000_u64, "usageNanoCores": 250},
                "memory": memory(8192, at),
                "swap": swap(at),
                "process_stats": {"process_count": 3},
                "containers": [
                    {
                        "name": "idle", "startTime": start,
                        "cpu": {"time": at, "usageCoreNanoSeconds": 0},
                        "memory": memory(4096, at), "swap": swap(at),
                    },
                    {
                        "name": "main", "startTime": start,
                        "cpu": {"time": at, "usageCoreNanoSeconds": 1_500_000_000_u64},
                        "memory": memory(4096, at), "swap": swap(at),
                    },
                ],
            }],
        });
        assert_eq!(render("virtual", &whole, false), expected);
    }

    #[test]
    fn only_cpu_and_memory() {
        let value = render("virtual", &snapshot(), true);
        let pod = &value["pods"][0];
        assert!(pod.get("swap").is_none() && pod.get("process_stats").is_none());
        assert!(value["node"]["memory"].get("availableBytes").is_none());
        assert!(pod["containers"][0].get("cpu").is_some());
    }
}
