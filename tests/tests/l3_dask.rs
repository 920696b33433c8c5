//! A Dask cluster on the real stack, as `deploy/examples/dask.yaml` describes it: a scheduler, three workers and a client, each in a job of
//! its own, which find each other by the name of a headless Service and at the addresses of their pods. The image is made of Debian's
//! packages, and the test is the cluster's DNS.

use std::time::Duration;

use knoc_tests::{World, several_pods::Example};

/// The time to make the image (tests/testbed/dask.sh).
const MADE: Duration = Duration::from_mins(8);

const DASK: Example = Example {
    file: "dask.yaml",
    images: ("ghcr.io/dask/dask:2024.12.1", "/images/dask"),
    service: "dask-scheduler",
    job: "dask-client",
    workers: "dask-worker-",
    // Five pods start Python one after the other on a busy machine, and compute.
    limit: Duration::from_mins(5),
};

#[tokio::test]
async fn a_dask_cluster_of_a_scheduler_and_three_workers_computes_a_sum() -> anyhow::Result<()> {
    let world = World::new("dask").await?;
    let made = world.service("dask.sh", "image").deadline(MADE);
    made.ok().await?;
    DASK.check(&world).await?;
    world.finish().await
}
