//! The pods of `deploy/examples` on the real stack, as the files are. Other suites run those for MPI, Dask and Argo Workflows.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::{batch::v1::Job, discovery::v1::EndpointSlice};
use knoc_tests::{World, guide::root, wait_for, web, world::SOON};
use kube::api::ListParams;

/// The time for twenty small jobs beside those of other tests.
const JOB: Duration = Duration::from_mins(8);

async fn apply(world: &World, file: &str) -> anyhow::Result<()> {
    let path = root().join("deploy/examples").join(file);
    let apply = world.kubectl(["apply", "-f"]).arg(path);
    apply.ok().await.map(drop)
}

#[tokio::test]
async fn containers_of_a_pod_share_a_folder() -> anyhow::Result<()> {
    let world = World::new("example-containers").await?;
    apply(&world, "containers.yaml").await?;
    world.wait_phase("containers", "Succeeded", SOON).await?;
    let log = world.logs("containers", "report").await?;
    ensure!(log == "the sum is 55\n", "{log}");
    world.finish().await
}

#[tokio::test]
async fn values_are_variables_and_files() -> anyhow::Result<()> {
    let world = World::new("example-values").await?;
    apply(&world, "values.yaml").await?;
    world.wait_phase("values", "Succeeded", SOON).await?;
    let log = world.logs("values", "show").await?;
    ensure!(
        log == "hello, values\n[solver]\nsteps = 100\n16\n",
        "{log:?}"
    );
    world.finish().await
}

#[tokio::test]
async fn a_job_of_twenty_pods_completes() -> anyhow::Result<()> {
    let world = World::new("example-job").await?;
    apply(&world, "job.yaml").await?;
    wait_for("the Job", JOB, async || {
        let job = world.api::<Job>().get("squares").await?;
        let status = job.status.unwrap_or_default();
        ensure!(status.succeeded == Some(20), "{status:?}");
        Ok(())
    })
    .await?;
    let of = ["logs", "-l", "job-name=squares", "--tail=-1"];
    let logs = world.kubectl(of).arg("--max-log-requests=20");
    let logs = logs.ok().await?.text();
    for number in 0..20 {
        let line = format!("{number} squared is {}", number * number);
        ensure!(logs.lines().any(|one| one == line), "{line}: {logs}");
    }
    world.finish().await
}

/// Where the Service leads: the port of the kubelet for its pod, if that is ready.
async fn endpoint(world: &World) -> anyhow::Result<SocketAddr> {
    let of = ListParams::default().labels("kubernetes.io/service-name=web");
    let slices = world.api::<EndpointSlice>().list(&of).await?.items;
    let mut found = slices.iter().filter_map(|slice| {
        let endpoint = slice.endpoints.iter().flatten().next()?;
        let address = endpoint.addresses.first()?.parse().ok()?;
        let port = slice.ports.iter().flatten().next()?.port?;
        let ready = endpoint.conditions.as_ref()?.ready?;
        ready.then_some(SocketAddr::new(address, u16::try_from(port).ok()?))
    });
    found.next().with_context(|| format!("{slices:?}"))
}

/// The bed has no kube-proxy: the test dials what the kubelet publishes.
#[tokio::test]
async fn a_web_server_is_behind_a_service() -> anyhow::Result<()> {
    let world = World::new("example-web").await?;
    apply(&world, "web.yaml").await?;
    let address = wait_for("a ready endpoint", SOON, async || endpoint(&world).await).await?;
    let page = String::from_utf8(web::page(address, "/").await?)?;
    ensure!(page.starts_with("hello from web-"), "{page:?}");
    world.finish().await
}
