//! A Dask cluster on the real stack, as `deploy/examples/dask.yaml` describes it: a scheduler, three workers and a client, each in a job of
//! its own, which find each other by the name of a headless Service and at the addresses of their pods. The image is made of Debian's
//! packages, and the test is the cluster's DNS.

use std::{collections::BTreeSet, fs, net::Ipv4Addr, time::Duration};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod, discovery::v1::EndpointSlice};
use knoc_tests::{World, cluster::ClusterDns, guide::root, own_addresses, wait_for};
use kube::{ResourceExt as _, api::ListParams};

/// The image of the example, and the one with the same programs on the bed (tests/testbed/dask.sh).
const IMAGES: (&str, &str) = ("ghcr.io/dask/dask:2024.12.1", "/images/dask");
/// The time to make that image.
const MADE: Duration = Duration::from_mins(8);
/// The time in which five pods start Python one after the other on a busy machine, and compute.
const COMPUTED: Duration = Duration::from_mins(5);

#[tokio::test]
async fn a_dask_cluster_of_a_scheduler_and_three_workers_computes_a_sum() -> anyhow::Result<()> {
    let world = World::new("dask").await?;
    let made = world.service("dask.sh", "image").deadline(MADE);
    made.ok().await?;
    let dns = ClusterDns::start(&world).await?;
    own_addresses::begin(&world).await?;
    let checked = check(&world, &dns).await;
    own_addresses::end(&world).await?;
    dns.withdraw(&world).await;
    checked?;
    world.finish().await
}

async fn check(world: &World, dns: &ClusterDns) -> anyhow::Result<()> {
    dns.reaches_pods(world).await?;
    let (image, here) = IMAGES;
    let example = fs::read_to_string(root().join("deploy/examples/dask.yaml"))?;
    ensure!(example.matches(image).count() == 3, "{example}");
    let apply = world.kubectl(["apply", "-f", "-"]);
    apply.stdin(example.replace(image, here)).ok().await?;
    // Cluster DNS reads the addresses of a headless Service from what Kubernetes publishes.
    let scheduler = wait_for("the scheduler", COMPUTED, async || scheduler(world).await).await?;
    let name = format!("dask-scheduler.{}.svc.cluster.local", world.namespace);
    dns.add(&name, scheduler);
    wait_for("the client's Job", COMPUTED, async || {
        let job = world.api::<Job>().get("dask-client").await?;
        let status = job.status.unwrap_or_default();
        ensure!(status.succeeded == Some(1), "{status:?}");
        Ok(())
    })
    .await?;
    let log = log(world).await?;
    ensure!(
        log.contains("the sum of the squares is 332833500\n"),
        "{log}"
    );
    let hosts = log
        .lines()
        .find_map(|line| line.strip_prefix("computed on "));
    let hosts: BTreeSet<_> = hosts.unwrap_or_default().split(' ').collect();
    let all_workers = hosts.iter().all(|host| host.starts_with("dask-worker-"));
    ensure!(hosts.len() == 3 && all_workers, "{log}");
    Ok(())
}

/// The address of the scheduler's pod, once it is ready.
async fn scheduler(world: &World) -> anyhow::Result<Ipv4Addr> {
    let of = ListParams::default().labels("kubernetes.io/service-name=dask-scheduler");
    let slices = world.api::<EndpointSlice>().list(&of).await?.items;
    let mut endpoints = slices
        .iter()
        .flat_map(|slice| slice.endpoints.iter().flatten());
    let ready = endpoints.find(|one| {
        let conditions = one.conditions.as_ref();
        conditions.and_then(|conditions| conditions.ready) == Some(true)
    });
    let address = ready.and_then(|one| one.addresses.first());
    let address = address.with_context(|| format!("{slices:?}"))?;
    Ok(address.parse()?)
}

/// The log of the client that has succeeded.
async fn log(world: &World) -> anyhow::Result<String> {
    let of = ListParams::default().labels("batch.kubernetes.io/job-name=dask-client");
    let pods = world.api::<Pod>().list(&of).await?.items;
    let succeeded = |pod: &&Pod| {
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_ref());
        phase.is_some_and(|phase| phase == "Succeeded")
    };
    let pod = pods.iter().find(succeeded).context("no client succeeded")?;
    world.logs(&pod.name_any(), "client").await
}
