//! The resource use of pods on the real stack: the kubelet's endpoints through the API server, then metrics-server, `kubectl top`
//! and an autoscaler over them. After virtual-kubelet's TestGetStatsSummary and TestGetMetricsResource.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use knoc_tests::{PodBuilder, World, wait_for, world::SOON};
use serde_json::{Value, json};

/// metrics-server scrapes every 15 s and needs two scrapes, and so does the autoscaler, on a busy machine.
const MINUTES: Duration = Duration::from_mins(6);
const MIB: u64 = 1 << 20;

/// Holds 32 MiB and copies them from /dev/zero to /dev/null forever.
const BUSY: &str = "exec dd if=/dev/zero of=/dev/null bs=32M";

fn busy(name: &str) -> PodBuilder {
    PodBuilder::new(name)
        .sh(BUSY)
        .memory("128Mi")
        .container("idle")
        .sh("sleep 600")
}

/// A path of our kubelet, through the API server.
async fn kubelet(world: &World, path: &str) -> anyhow::Result<String> {
    let path = format!("/api/v1/nodes/{}/proxy{path}", world.node);
    let answer = world.kubectl(["get", "--raw", &path]).ok().await?;
    Ok(answer.text())
}

/// The value of one sample.
fn sample(text: &str, series: &str) -> anyhow::Result<f64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    let value = line.and_then(|rest| rest.split(' ').next());
    Ok(value
        .with_context(|| format!("{series} is not there"))?
        .parse()?)
}

async fn json_of(world: &World, path: &str) -> anyhow::Result<Value> {
    Ok(serde_json::from_str(&kubelet(world, path).await?)?)
}

#[tokio::test]
async fn the_kubelet_reports_the_use_of_each_container() -> anyhow::Result<()> {
    let world = World::new("usage").await?;
    let uid = world.create(&busy("hot")).await?;
    world.wait_phase("hot", "Running", SOON).await?;
    let of = |scope: &str, container: &str| {
        let namespace = &world.namespace;
        match container {
            "" => format!("{scope}{{namespace=\"{namespace}\",pod=\"hot\"}}"),
            name => {
                format!("{scope}{{container=\"{name}\",namespace=\"{namespace}\",pod=\"hot\"}}")
            }
        }
    };
    let text = wait_for("a second of CPU time", MINUTES, async || {
        let text = kubelet(&world, "/metrics/resource").await?;
        let used = sample(&text, &of("container_cpu_usage_seconds_total", "main"))?;
        ensure!(used >= 1.0, "{used}");
        Ok(text)
    })
    .await?;
    let memory = sample(&text, &of("container_memory_working_set_bytes", "main"))?;
    ensure!((32e6..100e6).contains(&memory), "{memory}");
    let idle = sample(&text, &of("container_cpu_usage_seconds_total", "idle"))?;
    ensure!(idle < 1.0, "{idle}");
    // The job's cgroup includes the memory of the runtime itself.
    let whole = sample(&text, &of("pod_cpu_usage_seconds_total", ""))?;
    let main = sample(&text, &of("container_cpu_usage_seconds_total", "main"))?;
    ensure!(
        whole >= main * 0.9,
        "{whole} of the pod, {main} of a container"
    );
    ensure!(sample(&text, "node_cpu_usage_seconds_total")? >= whole * 0.9);
    ensure!((sample(&text, "resource_scrape_error")?).abs() < f64::EPSILON);
    // What the dashboards of Prometheus ask for.
    let dashboards = kubelet(&world, "/metrics/cadvisor").await?;
    let labels = format!(
        "container=\"main\",cpu=\"total\",image=\"{}\",namespace=\"{}\",pod=\"hot\"",
        PodBuilder::image_name(),
        world.namespace
    );
    let series = format!("container_cpu_usage_seconds_total{{{labels}}}");
    ensure!(sample(&dashboards, &series)? >= main, "{dashboards}");
    let summary = json_of(&world, "/stats/summary").await?;
    ensure!(
        summary["node"]["nodeName"] == world.node.as_str(),
        "{summary}"
    );
    let pods = summary["pods"].as_array().context("no pods")?;
    let ours = pods.iter().find(|pod| pod["podRef"]["uid"] == uid.as_str());
    let ours = ours.with_context(|| summary.to_string())?;
    ensure!(
        ours["memory"]["workingSetBytes"].as_u64() >= Some(32 * MIB),
        "{ours}"
    );
    let running = json_of(&world, "/runningpods/").await?;
    let names = running["items"].to_string();
    ensure!(names.contains(&uid), "{running}");
    world.finish().await
}

#[tokio::test]
async fn the_nodes_counter_outlives_its_pods() -> anyhow::Result<()> {
    let world = World::new("ledger").await?;
    world.create(&busy("gone")).await?;
    world.wait_phase("gone", "Running", SOON).await?;
    let node = async || {
        let text = kubelet(&world, "/metrics/resource").await?;
        sample(&text, "node_cpu_usage_seconds_total")
    };
    let first = node().await?;
    let grown = wait_for("the counter grows", MINUTES, async || {
        let now = node().await?;
        ensure!(now > first + 1.0, "{first} then {now}");
        Ok(now)
    })
    .await?;
    world.delete("gone", Some(0)).await?;
    world.wait_gone("gone", SOON).await?;
    let mut before = grown;
    wait_for("a new measurement without the pod", MINUTES, async || {
        let text = kubelet(&world, "/metrics/resource").await?;
        let now = sample(&text, "node_cpu_usage_seconds_total")?;
        assert!(now >= before, "it fell from {before} to {now}");
        before = now;
        ensure!(!text.contains(&world.namespace), "the pod is still there");
        anyhow::Ok(())
    })
    .await?;
    world.finish().await
}

#[tokio::test]
async fn the_kubelet_exports_metrics_about_itself() -> anyhow::Result<()> {
    let world = World::new("own").await?;
    // On a busy machine a round of Slurm's commands may come too late.
    let text = wait_for("agent and scheduler answer", SOON, async || {
        let text = kubelet(&world, "/metrics").await?;
        ensure!(sample(&text, "knoc_agent_link_up")? > 0.5, "{text}");
        ensure!(sample(&text, "knoc_scheduler_up")? > 0.5, "{text}");
        Ok(text)
    })
    .await?;
    ensure!(
        sample(&text, "process_resident_memory_bytes")? > 1e6,
        "{text}"
    );
    // Two descriptors for each accepted connection.
    ensure!(sample(&text, "process_max_fds")? > 4096.0, "{text}");
    for family in knoc_kubelet::metrics::FAMILIES {
        let declared = format!("# TYPE {} {}\n", family.name, family.kind);
        ensure!(text.contains(&declared), "{} is not there", family.name);
    }
    let shown = json_of(&world, "/configz").await?;
    ensure!(
        shown["kubeletconfig"]["node"]["name"] == world.node.as_str(),
        "{shown}"
    );
    ensure!(!shown.to_string().contains("PRIVATE"), "{shown}");
    let probes = kubelet(&world, "/metrics/probes").await?;
    ensure!(probes.contains("prober_probe_total"), "{probes}");
    world.finish().await
}

/// A Deployment of a busy program on our node.
fn deployment() -> Value {
    let mut spec = PodBuilder::new("hot")
        .sh(BUSY)
        .memory("128Mi")
        .restart("Always")
        .manifest()["spec"]
        .clone();
    spec["terminationGracePeriodSeconds"] = json!(1);
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "hot"},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": {"app": "hot"}},
            "template": {"metadata": {"labels": {"app": "hot"}}, "spec": spec},
        },
    })
}

fn autoscaler() -> Value {
    json!({
        "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": "hot"},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "hot"},
            "minReplicas": 1,
            "maxReplicas": 2,
            // The percentage of the whole core that it requests, which is low because the machine is busy.
            "metrics": [{"type": "Resource", "resource": {
                "name": "cpu", "target": {"type": "Utilization", "averageUtilization": 5}}}],
        },
    })
}

#[tokio::test]
async fn metrics_server_feeds_kubectl_top_and_an_autoscaler() -> anyhow::Result<()> {
    let world = World::new("top").await?;
    world
        .service("kube/metrics-server.sh", "up")
        .deadline(MINUTES)
        .ok()
        .await?;
    let objects =
        json!({"apiVersion": "v1", "kind": "List", "items": [deployment(), autoscaler()]});
    world
        .kubectl(["apply", "-f", "-"])
        .stdin(objects.to_string())
        .ok()
        .await?;
    let number = |cell: Option<&&str>, unit: &str| -> anyhow::Result<u64> {
        let cell = cell.context("a cell is missing")?;
        Ok(cell.trim_end_matches(unit).parse()?)
    };
    wait_for("kubectl top pod", MINUTES, async || {
        let top = world.kubectl(["top", "pod", "--no-headers", "--containers"]);
        let pod = top.ok().await?.text();
        ensure!(pod.contains("main"), "{pod}");
        // POD NAME CPU MEMORY
        let cells: Vec<&str> = pod.split_whitespace().collect();
        ensure!(number(cells.get(2), "m")? >= 50, "{pod}");
        ensure!((32..128).contains(&number(cells.get(3), "Mi")?), "{pod}");
        Ok(())
    })
    .await?;
    wait_for("kubectl top node", MINUTES, async || {
        let top = world.kubectl(["top", "node", &world.node, "--no-headers"]);
        let top = top.ok().await?.text();
        ensure!(!top.contains("unknown"), "{top}");
        anyhow::Ok(())
    })
    .await?;
    wait_for(
        "the autoscaler asks for a second pod, and it runs",
        MINUTES,
        async || {
            let status = "jsonpath={.status.replicas} {.status.readyReplicas}";
            let replicas = world
                .kubectl(["get", "deployment", "hot", "-o", status])
                .ok()
                .await?
                .text();
            let scaler = world.kubectl(["describe", "hpa", "hot"]).output().await?;
            ensure!(replicas.trim() == "2 2", "{replicas}; {scaler}");
            anyhow::Ok(())
        },
    )
    .await?;
    world
        .kubectl(["delete", "hpa,deployment", "hot", "--wait=false"])
        .ok()
        .await?;
    world.service("kube/metrics-server.sh", "down").ok().await?;
    world.finish().await
}
