//! A Ray cluster on the real stack, as `deploy/examples/ray.yaml` describes it: a head, three workers and a client, each in a job of its own,
//! which find each other by the name of a headless Service and at the addresses of their pods. The image is made of Debian's packages and
//! Ray's own of PyPI, and the test is the cluster's DNS.
//!
//! Ray is large, so this suite is left to `make ray`.

use std::time::Duration;

use knoc_tests::{World, several_pods::Example};

/// The time to make the image (tests/testbed/ray.sh).
const MADE: Duration = Duration::from_mins(8);

const RAY: Example = Example {
    file: "ray.yaml",
    images: ("rayproject/ray:2.53.0", "/images/ray"),
    service: "ray-head",
    job: "ray-client",
    workers: "ray-worker-",
    // Each of five pods starts several processes of Python on a busy machine.
    limit: Duration::from_mins(8),
};

#[tokio::test]
async fn a_ray_cluster_of_a_head_and_three_workers_computes_a_sum() -> anyhow::Result<()> {
    let world = World::new("ray").await?;
    let made = world.service("ray.sh", "image").deadline(MADE);
    made.ok().await?;
    RAY.check(&world).await?;
    world.finish().await
}
