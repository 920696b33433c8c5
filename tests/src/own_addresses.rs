//! A kubelet of the bed that gives pods addresses of their own, for the suites that need it. The other suites do not, so these run alone.

use std::time::Duration;

use crate::World;

/// The time to start the kubelet.
const SCRIPT: Duration = Duration::from_mins(5);
/// The settings of such a kubelet. The relay needs pods without addresses; kubelet.sh lets the kubelet listen at these instead.
const OWN: [(&str, &str); 3] = [
    ("KNOC_NODE_POD_IP", "own"),
    ("KNOC_NODE_POD_RANGE", "10.200.0.0/16"),
    ("KNOC_RELAY_ALLOW", "off"),
];

/// Starts the kubelet again with addresses of pods.
pub async fn begin(world: &World) -> anyhow::Result<()> {
    kubelet(world, &OWN).await
}

/// Starts the kubelet again as the other suites need it.
pub async fn end(world: &World) -> anyhow::Result<()> {
    kubelet(world, &[]).await
}

async fn kubelet(world: &World, settings: &[(&str, &str)]) -> anyhow::Result<()> {
    world.service("kubelet.sh", "down").ok().await?;
    let up = world.service("kubelet.sh", "up").deadline(SCRIPT);
    let up = settings
        .iter()
        .fold(up, |up, (name, value)| up.env(name, value));
    up.ok().await.map(drop)
}
