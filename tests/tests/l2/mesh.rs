//! Level 2: addresses of pods. Without a container runtime all pods are in the node's network, so their address is the node's; the
//! kubelet's and the agent's part is the same.

use std::time::Duration;

use anyhow::ensure;
use knoc_proto::pb;
use knoc_tests::{
    site::{Kubelet, Options, Pod, Site, container},
    wait_for,
};
use serde_json::json;

const SOON: Duration = Duration::from_mins(2);
const OWN: (&str, &str) = ("KNOC_NODE_POD_IP", "own");

fn sleeper(kubelet: &Kubelet, name: &str) -> anyhow::Result<String> {
    let main = json!({"name": "main", "image": "none", "command": ["sleep", "600"]});
    kubelet.create_pod(name, json!({"containers": [main]}))
}

#[tokio::test]
async fn a_pod_waits_for_a_range_of_addresses_and_says_where_it_is_set() -> anyhow::Result<()> {
    let (site, _agent, _) = Site::start(Options::default()).await?;
    let kubelet = Kubelet::prepare(&site).await?;
    let process = kubelet.start(&site, &[OWN]).await?;
    sleeper(&kubelet, "waits")?;
    wait_for("the reason", SOON, async || {
        let pod = kubelet.api.get("v1", "pods", "default", "waits");
        let status = pod.map_err(|error| error.to_string())?["status"].to_string();
        let named = status.contains("spec.podCIDR") && status.contains("node.podRange");
        if named { Ok(()) } else { Err(status) }
    })
    .await?;
    drop(process);
    let range = ("KNOC_NODE_POD_RANGE", "10.200.0.0/16");
    let _process = kubelet.start(&site, &[OWN, range]).await?;
    kubelet.phase("waits", "Running", SOON).await?;
    Ok(())
}

#[tokio::test]
async fn a_range_of_which_no_pod_can_have_an_address_is_rejected_by_the_agent() -> anyhow::Result<()>
{
    let (_site, _agent, client) = Site::start(Options::default()).await?;
    let with = |uid: &str, range: &str| {
        let mut pod = Pod::new(uid, vec![container("main", &["sleep", "600"], &[])]);
        if let Some(spec) = &mut pod.request.spec {
            range.clone_into(&mut spec.pod_range);
        }
        pod
    };
    for (range, why) in [
        ("10.200.0.0", "no range"),
        ("fd00::/64", "IPv4 only"),
        ("127.0.0.0/8", "no host"),
    ] {
        let pod = with("wrong", range);
        let rejected = client.clone().ensure_pod(pod.request).await;
        let message = rejected.err().map(|status| status.message().to_owned());
        let message = message.unwrap_or_default();
        ensure!(
            message.contains("the range of the node's pods") && message.contains(why),
            "{range}: {message:?}"
        );
    }
    // In the node's network it has none, and it runs.
    let pod = with("right", "10.200.0.0/16");
    pod.ensure(&client).await?;
    let network = pod.running(&client, SOON).await?.network;
    let network = network.unwrap_or_default();
    ensure!(network.mode() == pb::NetworkMode::Host, "{network:?}");
    ensure!(network.address.is_empty(), "{network:?}");
    // The kubelet's configuration may change while it runs.
    let mut changed = with("right", "10.201.0.0/16");
    changed.ensure(&client).await?;
    if let Some(spec) = &mut changed.request.spec {
        spec.generation = 2;
        spec.labels.insert("app".to_owned(), "web".to_owned());
    }
    changed.ensure(&client).await?;
    pod.remove(&client).await
}
