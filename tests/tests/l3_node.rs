//! The Node object on the real stack: Kubernetes schedules by Slurm's resources. Also what users see of a pod while it waits in the
//! queue, and its Events.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail, ensure};
use futures::StreamExt as _;
use k8s_openapi::{
    api::{
        coordination::v1::Lease,
        core::v1::{Event, Node, NodeCondition, NodeStatus, Pod},
    },
    apimachinery::pkg::api::resource::Quantity,
};
use knoc_tests::{
    PodBuilder, World, wait_for,
    world::{SOON, container_reason, phase_of, why},
};
use knoc_translate::quantity;
use kube::api::{ListParams, WatchEvent, WatchParams};
use serde_json::json;

/// The default of `node.queueFactor`: the node offers that many times the cluster's resources, because pods wait in Slurm's queue.
const QUEUE_FACTOR: i64 = 10;

const MIB: i64 = 1 << 20;

async fn node(world: &World) -> anyhow::Result<(Node, NodeStatus)> {
    let node = world.cluster_api::<Node>().get(&world.node).await?;
    let status = node.status.clone().context("no status")?;
    Ok((node, status))
}

/// sinfo's totals of all nodes, each counted once: CPUs, bytes of memory, GPUs.
async fn of_sinfo(world: &World) -> anyhow::Result<[i64; 3]> {
    let rows = world
        .on("login", ["sinfo", "-h", "-N", "-o", "%N|%c|%m|%G"])
        .ok()
        .await?
        .text();
    let mut nodes = BTreeMap::new();
    for row in rows.lines() {
        let [name, cpus, memory, gres] = *row.split('|').collect::<Vec<_>>() else {
            anyhow::bail!("{row:?}");
        };
        // "gpu:fake:2", "(null)"
        let gpus = gres
            .strip_prefix("gpu:")
            .and_then(|gres| gres.rsplit(':').next());
        let gpus = gpus.map_or(Ok(0), str::parse::<i64>)?;
        nodes.insert(
            name.to_owned(),
            [cpus.parse()?, memory.parse::<i64>()? * MIB, gpus],
        );
    }
    ensure!(!nodes.is_empty(), "{rows}");
    let sum = |at: usize| nodes.values().map(|node| node[at]).sum();
    let all = [sum(0), sum(1), sum(2)];
    ensure!(all.iter().all(|amount| *amount > 0), "{all:?} of {rows}");
    Ok(all)
}

fn amounts(list: Option<&BTreeMap<String, Quantity>>) -> anyhow::Result<[i64; 4]> {
    let list = list.context("no resources")?;
    let amount = |name: &str| {
        let quantity = list
            .get(name)
            .with_context(|| format!("{name} is not in {list:?}"))?;
        anyhow::Ok(quantity::units(quantity)?)
    };
    Ok([
        amount("cpu")?,
        amount("memory")?,
        amount("nvidia.com/gpu")?,
        amount("pods")?,
    ])
}

#[tokio::test]
async fn capacity_is_that_of_sinfo_and_allocatable_a_multiple_of_it() -> anyhow::Result<()> {
    let world = World::new("capacity").await?;
    // Node and Slurm are read one after the other, so both are read again if another test changed something in between.
    wait_for("the node has what Slurm has", SOON, async || {
        let [cpu, memory, gpus] = of_sinfo(&world).await?;
        let (_, status) = node(&world).await?;
        let capacity = amounts(status.capacity.as_ref())?;
        let pods = capacity[3];
        ensure!(
            capacity == [cpu, memory, gpus, pods] && pods > 0,
            "{capacity:?} where Slurm has {:?}",
            [cpu, memory, gpus]
        );
        let allocatable = amounts(status.allocatable.as_ref())?;
        let wanted = [cpu, memory, gpus].map(|amount| amount * QUEUE_FACTOR);
        let [cpu, memory, gpus] = wanted;
        ensure!(
            allocatable == [cpu, memory, gpus, pods],
            "{allocatable:?} is not {QUEUE_FACTOR} times {capacity:?}"
        );
        Ok(())
    })
    .await?;
    world.finish().await
}

/// The conditions of a healthy node.
const WELL: [(&str, &str, &str); 9] = [
    ("Ready", "True", "KubeletReady"),
    ("MemoryPressure", "False", "KubeletHasSufficientMemory"),
    ("DiskPressure", "False", "KubeletHasNoDiskPressure"),
    ("PIDPressure", "False", "KubeletHasSufficientPID"),
    ("NetworkUnavailable", "False", "RouteCreated"),
    ("AgentConnected", "True", "LinkUp"),
    ("SlurmReachable", "True", "ControllerAnswers"),
    ("PidIsolation", "True", "PidNamespaces"),
    ("ApiServerCertificateMismatch", "False", "AddressesNamed"),
];

#[tokio::test]
async fn the_node_has_its_conditions_and_a_taint() -> anyhow::Result<()> {
    let world = World::new("well").await?;
    // The taint of a lost agent goes a moment after its condition, if an earlier test had stopped the agent.
    wait_for("the conditions of a node that is well", SOON, async || {
        let (found, status) = node(&world).await?;
        let conditions = status.conditions.unwrap_or_default();
        for (kind, status, reason) in WELL {
            let is = |one: &&NodeCondition| one.type_ == kind && one.status == status;
            let condition = conditions.iter().find(is);
            let condition =
                condition.with_context(|| format!("{kind}={status}: {conditions:?}"))?;
            ensure!(condition.reason.as_deref() == Some(reason), "{condition:?}");
        }
        let taints = found.spec.and_then(|spec| spec.taints).unwrap_or_default();
        let taints: Vec<_> = taints
            .iter()
            .map(|taint| {
                (
                    taint.key.as_str(),
                    taint.value.as_deref(),
                    taint.effect.as_str(),
                )
            })
            .collect();
        let ours = [("virtual-kubelet.io/provider", Some("knoc"), "NoSchedule")];
        ensure!(taints == ours, "{taints:?}");
        Ok(())
    })
    .await?;
    world.finish().await
}

#[tokio::test]
async fn the_node_has_the_labels_and_the_information_of_a_node() -> anyhow::Result<()> {
    let world = World::new("node").await?;
    let (found, _) = node(&world).await?;
    let labels = found.metadata.labels.unwrap_or_default();
    for (label, value) in [
        ("kubernetes.io/hostname", world.node.as_str()),
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", "amd64"),
        ("type", "virtual-kubelet"),
        ("node-role.kubernetes.io/knoc", ""),
        (
            "node.kubernetes.io/exclude-from-external-load-balancers",
            "true",
        ),
    ] {
        ensure!(
            labels.get(label).is_some_and(|is| is == value),
            "{label}: {labels:?}"
        );
    }
    let info = found
        .status
        .and_then(|status| status.node_info)
        .context("no nodeInfo")?;
    // "apptainer version 1.4.5", "slurm-wlm 24.11.5"
    let version = async |command: [&str; 2]| {
        let text = world.on("login", command).ok().await?.text();
        anyhow::Ok(text.rsplit(' ').next().unwrap_or_default().to_owned())
    };
    let runtime = format!("apptainer://{}", version(["apptainer", "--version"]).await?);
    let slurm = format!("slurm {}", version(["sinfo", "-V"]).await?);
    ensure!(
        info.container_runtime_version == runtime && info.os_image.ends_with(&format!(", {slurm}")),
        "{info:?}"
    );
    ensure!(
        !info.kernel_version.is_empty()
            && info.machine_id.len() == 32
            && info.system_uuid.len() == 36,
        "{info:?}"
    );
    world.finish().await
}

#[tokio::test]
async fn the_nodes_lease_is_renewed_and_is_the_nodes() -> anyhow::Result<()> {
    let world = World::new("lease").await?;
    let leases: kube::Api<Lease> = world.api_in("kube-node-lease");
    let first = leases.get(&world.node).await?;
    let (of, spec) = (first.metadata, first.spec.context("no spec")?);
    ensure!(
        spec.holder_identity.as_ref() == Some(&world.node),
        "{spec:?}"
    );
    ensure!(spec.lease_duration_seconds == Some(40), "{spec:?}");
    let (node, _) = node(&world).await?;
    let owners = of.owner_references.unwrap_or_default();
    let owner = owners
        .iter()
        .find(|owner| owner.kind == "Node")
        .context("no owner")?;
    ensure!(Some(&owner.uid) == node.metadata.uid.as_ref(), "{owner:?}");
    // The kubelet renews every 10 s.
    wait_for("the lease is renewed", SOON, async || {
        let now = leases
            .get(&world.node)
            .await?
            .spec
            .and_then(|spec| spec.renew_time);
        ensure!(now > spec.renew_time, "{now:?}");
        Ok(())
    })
    .await?;
    world.finish().await
}

/// A foreign job that has both GPUs for ten minutes.
async fn all_gpus(world: &World) -> anyhow::Result<String> {
    let job = [
        "sbatch",
        "--parsable",
        "--partition=gpu",
        "--gres=gpu:2",
        "--time=10",
        "--no-requeue",
        "--wrap",
        "sleep 600",
    ];
    let job = world.on("login", job).ok().await?.text();
    let runs = wait_for("the other job runs", SOON, async || {
        // If this fails, the error shows who else has the GPUs.
        let squeue = ["squeue", "-h", "--partition=gpu", "-o", "%i %j %T %r %b %V"];
        let queue = world.on("login", squeue).ok().await?.text();
        let ours = format!("{job} wrap RUNNING ");
        ensure!(queue.lines().any(|row| row.starts_with(&ours)), "{queue}");
        Ok(())
    })
    .await;
    if runs.is_err() {
        world.on("login", ["scancel", &job]).ok().await?;
    }
    runs.map(|()| job)
}

/// Slurm's reason and estimated start of the job (to the minute), as soon as Slurm has an estimate.
async fn estimate(world: &World, job: &str) -> anyhow::Result<(String, String)> {
    wait_for("Slurm estimates the start", SOON, async || {
        let squeue = ["env", "TZ=UTC", "squeue", "-h", "-o", "%r|%S", "-j", job];
        let text = world.on("login", squeue).ok().await?.text();
        let (reason, start) = text.split_once('|').with_context(|| text.clone())?;
        ensure!(start.len() == "2026-11-22T10:00:00".len(), "{text}");
        Ok((
            reason.to_owned(),
            format!("{}Z", &start[.."2026-11-22T10:00".len()]),
        ))
    })
    .await
}

#[tokio::test]
async fn a_queued_pod_shows_the_reason_and_the_estimated_start() -> anyhow::Result<()> {
    let world = World::new("queue").await?;
    let other = all_gpus(&world).await?;
    let one =
        json!({"requests": {"cpu": "1"}, "limits": {"memory": "64Mi", "nvidia.com/gpu": "1"}});
    let pod = PodBuilder::new("waits")
        .annotation("knoc.io/partition", "gpu")
        .annotation("knoc.io/time", "5")
        .sh("echo at last, on $CUDA_VISIBLE_DEVICES")
        .set("resources", one);
    let uid = world.create(&pod).await?;
    let job = world.wait_job(&uid).await?;
    let shown = wait_for("the pod says what Slurm says", SOON, async || {
        let (reason, start) = estimate(&world, &job).await?;
        let wanted = format!("Slurm job {job} pending: {reason}, estimated start {start}");
        let pod = world.pod("waits").await?;
        let (_, message) = why(&pod);
        ensure!(message == wanted, "{message:?} instead of {wanted:?}");
        Ok::<_, anyhow::Error>((reason, pod))
    })
    .await;
    // An Event about the queue comes if the pod is queued for longer than a moment.
    let reason = shown.as_ref().map_or("", |(reason, _)| reason.as_str());
    let waits = format!("SlurmJobPending: job {job} waits: {reason}");
    let told = wait_for("an Event with Slurm's reason", SOON, async || {
        let events = world.events("waits").await?;
        ensure!(events.contains(&waits), "{events:?}");
        Ok(())
    })
    .await;
    world.on("login", ["scancel", &other]).ok().await?;
    let (reason, pod) = shown?;
    told?;
    ensure!(
        ["Resources", "Priority"].contains(&reason.as_str()),
        "{reason}"
    );
    ensure!(phase_of(&pod) == "Pending", "{:?}", pod.status);
    let container = container_reason(&pod, "main").context("no status")?;
    ensure!(
        container.0 == "ContainerCreating" && container.1.contains(&reason),
        "{container:?}"
    );
    // The job is no longer queued, so the message about the queue is gone.
    let ended = world.wait_phase("waits", "Succeeded", SOON).await?;
    ensure!(why(&ended).1.is_empty(), "{:?}", ended.status);
    let log = world.logs("waits", "main").await?;
    // The job sees the GPU that Slurm chose and no other.
    ensure!(log == "at last, on 0\n", "{log:?}");
    world.finish().await
}

/// The Events of an image that is pulled first, and of a job that waits for a moment.
const MAY_BE: [&str; 3] = ["Pulling", "SlurmJobPending", "SlurmJobSubmitted"];

/// The part of an Event that the tests check: reason, container, message.
type Told = (String, String, String);

/// The Events of the pod that are ours, without those of [`MAY_BE`].
async fn told(world: &World, pod: &Pod) -> anyhow::Result<Vec<Told>> {
    let uid = pod.metadata.uid.clone().context("no uid")?;
    let of = ListParams::default().fields(&format!("involvedObject.uid={uid}"));
    let mut events = world.api::<Event>().list(&of).await?.items;
    events.retain(|event| event.reporting_component.as_deref() == Some("kubelet"));
    let mut told = Vec::new();
    for event in events {
        // How many there are of these, and how often, depends on how busy everything is.
        if MAY_BE.contains(&event.reason.as_deref().unwrap_or_default()) {
            continue;
        }
        let source = event.source.clone().unwrap_or_default();
        ensure!(source.host.as_ref() == Some(&world.node), "{event:?}");
        ensure!(
            event.type_.as_deref() == Some("Normal") && event.count == Some(1),
            "{event:?}"
        );
        let place = event.involved_object.field_path.unwrap_or_default();
        told.push((
            event.reason.unwrap_or_default(),
            place,
            event.message.unwrap_or_default(),
        ));
    }
    Ok(told)
}

#[tokio::test]
async fn the_events_of_a_pod_report_each_step_once() -> anyhow::Result<()> {
    let world = World::new("events").await?;
    let pod = PodBuilder::new("told").sh("trap 'exit 0' TERM; while :; do sleep 0.1; done");
    let uid = world.create(&pod).await?;
    let pod = world.wait_phase("told", "Running", SOON).await?;
    let job = world.wait_job(&uid).await?;
    world.delete("told", None).await?;
    world.wait_gone("told", SOON).await?;
    let main = "spec.containers{main}";
    let wanted = [
        ("Pulled", main, String::new()),
        ("SlurmJobStarted", "", format!("job {job} has started")),
        ("Created", main, "Created container main".to_owned()),
        ("Started", main, "Started container main".to_owned()),
        ("Killing", main, "Stopping container main".to_owned()),
    ];
    wait_for("an Event for each step", SOON, async || {
        let told = told(&world, &pod).await?;
        for (reason, place, message) in &wanted {
            let such = told
                .iter()
                .filter(|(is, at, says)| is == reason && at == place && says.starts_with(message));
            ensure!(
                such.count() == 1,
                "{reason} {place} {message:?} once in {told:#?}"
            );
        }
        let image = PodBuilder::image_name();
        let pulled = told.iter().find(|(reason, ..)| reason == "Pulled");
        ensure!(
            pulled.is_some_and(|(.., message)| message.contains(&image)),
            "{image} is not in {pulled:?}"
        );
        ensure!(told.len() == wanted.len(), "{told:#?}");
        Ok(())
    })
    .await?;
    world.finish().await
}

/// Every status that the API server stored of the pod, from its creation to its terminal phase, as a watch saw them.
async fn statuses(world: &World, name: &str, version: &str) -> anyhow::Result<Vec<Pod>> {
    let only = WatchParams::default().fields(&format!("metadata.name={name}"));
    let events = world.api::<Pod>().watch(&only, version).await?;
    let mut events = std::pin::pin!(events);
    let mut seen: Vec<Pod> = Vec::new();
    while let Some(event) = events.next().await {
        let pod = match event? {
            WatchEvent::Added(pod) | WatchEvent::Modified(pod) => pod,
            WatchEvent::Bookmark(_) => continue,
            other @ (WatchEvent::Deleted(_) | WatchEvent::Error(_)) => bail!("{other:?}"),
        };
        if seen.last().is_none_or(|last| last.status != pod.status) {
            seen.push(pod);
        }
        if seen.last().is_some_and(|pod| phase_of(pod) == "Succeeded") {
            return Ok(seen);
        }
    }
    bail!("the watch ended: {seen:#?}")
}

#[tokio::test]
async fn a_short_life_costs_four_statuses_and_four_events() -> anyhow::Result<()> {
    let world = World::new("cost").await?;
    let list = world.api::<Pod>().list(&ListParams::default()).await?;
    let version = list.metadata.resource_version.context("no version")?;
    let pod = PodBuilder::new("short").sh("until [ -e /tmp/go ]; do sleep 0.1; done");
    let uid = world.create(&pod).await?;
    let lives = async {
        // A busy kubelet does not write that a pod runs which has ended meanwhile.
        world.wait_phase("short", "Running", SOON).await?;
        let touch = world.exec(&uid, "main", ["touch", "/tmp/go"]);
        touch.ok_or_killed().await
    };
    let seen = async { tokio::try_join!(statuses(&world, "short", &version), lives) };
    let seen = tokio::time::timeout(SOON * 2, Box::pin(seen)).await;
    let (seen, _) = seen.context("the pod did not end in time")??;
    // The first one is the API server's own, the scheduler writes that the pod is bound, and a busy cluster may have the pod
    // wait in the queue.
    let ours = seen.iter().filter(|pod| {
        let status = pod.status.as_ref();
        let queued = why(pod).1.starts_with("Slurm job ");
        status.is_some_and(|status| status.container_statuses.is_some()) && !queued
    });
    let ours = ours.count();
    ensure!((2..=4).contains(&ours), "{ours} statuses: {seen:#?}");
    let phases: Vec<_> = seen.iter().map(phase_of).collect();
    ensure!(phases.contains(&"Running"), "{phases:?}");
    let pod = seen.last().context("no pod")?;
    ensure!(pod.metadata.uid.as_deref() == Some(&uid), "{pod:?}");
    let told = wait_for("the last Event", SOON, async || {
        let told = told(&world, pod).await?;
        ensure!(
            told.iter().any(|(reason, ..)| reason == "Started"),
            "{told:?}"
        );
        Ok(told)
    })
    .await?;
    ensure!(told.len() <= 4, "{told:#?}");
    world.finish().await
}
