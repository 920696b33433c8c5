//! Which protocol carries a client's streams to the kubelet, according to the kubelet's own counters: WebSockets as the client
//! sent them if the API server passes them on (`ExtendWebSocketsToKubelet`), else SPDY.
//!
//! The counters belong to the node, so these tests run one after the other, and no other suite runs at the same time.

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};
use knoc_tests::{
    World,
    interop::{
        check::Scene,
        clients::{Client, Verb},
    },
};
use tokio::sync::Mutex;

static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

const FEATURE: &str = "ExtendWebSocketsToKubelet";

/// The minor version of the first API server that knows [`FEATURE`].
const SINCE: u32 = 36;

const EXEC_BY_SPDY: &str = "spdy/v4.channel.k8s.io";
const PORTS_BY_SPDY: &str = "spdy/portforward.k8s.io";
const EXEC_BY_WEBSOCKET: &str = "websocket/v5.channel.k8s.io";
const PORTS_BY_TUNNEL: &str = "websocket/SPDY/3.1+portforward.k8s.io";

/// Whether the API server knows the feature.
async fn knows_the_feature(world: &World) -> anyhow::Result<bool> {
    let version = world.server_version().await?;
    let minor = version.split('.').nth(1).and_then(|it| it.parse().ok());
    let minor: u32 = minor.with_context(|| version.clone())?;
    Ok(minor >= SINCE)
}

/// The sessions so far, by `{verb="…",protocol="…"}`.
async fn sessions(world: &World) -> anyhow::Result<BTreeMap<String, u64>> {
    let text = world.kubelet("metrics").await?;
    let name = "knoc_streaming_sessions_total";
    ensure!(text.contains(name), "the kubelet does not count: {text}");
    let samples = text.lines().filter_map(|line| line.strip_prefix(name));
    samples
        .map(|line| {
            let (labels, count) = line.rsplit_once(' ').with_context(|| line.to_owned())?;
            Ok((labels.to_owned(), count.parse()?))
        })
        .collect()
}

/// Makes the client run exec, attach and port-forward; each must arrive with the expected protocol and no other.
async fn arrives(scene: &Scene, exec: &str, ports: &str) -> anyhow::Result<()> {
    let verbs = [
        (Verb::Exec, "exec", exec),
        (Verb::Attach, "attach", exec),
        (Verb::PortForward, "portforward", ports),
    ];
    for (verb, name, protocol) in verbs {
        let before = sessions(&scene.world).await?;
        scene.check(verb).await?;
        let after = sessions(&scene.world).await?;
        let grown = after
            .into_iter()
            .filter(|(labels, count)| before.get(labels) != Some(count));
        let grown: Vec<String> = grown.map(|(labels, _)| labels).collect();
        let expected = format!("{{verb=\"{name}\",protocol=\"{protocol}\"}}");
        ensure!(
            grown == [expected.as_str()],
            "{name} was to arrive as {protocol}; sessions were added to {grown:?}"
        );
    }
    Ok(())
}

async fn scene(client: &str) -> anyhow::Result<Scene> {
    Scene::set(World::new("sessions").await?, Client::named(client)?).await
}

#[tokio::test]
async fn the_node_declares_websockets_to_an_api_server_that_passes_them_on() -> anyhow::Result<()> {
    let world = World::new("declared").await?;
    let path = "jsonpath={.status.declaredFeatures}";
    let declared = world.kubectl(["get", "node", &world.node, "-o", path]);
    let declared = declared.ok().await?.text();
    let features: Vec<String> = match declared.as_str() {
        "" => Vec::new(),
        list => serde_json::from_str(list)?,
    };
    let found = features.iter().any(|feature| feature == FEATURE);
    ensure!(
        found == knows_the_feature(&world).await?,
        "{declared:?} to {}",
        world.server_version().await?
    );
    world.finish().await
}

#[tokio::test]
async fn websockets_and_tunnels_arrive_as_kubectl_sent_them() -> anyhow::Result<()> {
    let _alone = ONE_AT_A_TIME.lock().await;
    for client in ["kubectl 1.36", "kubectl 1.37"] {
        let scene = scene(client).await?;
        // An older API server converts the client's streams to SPDY.
        let (exec, ports) = if knows_the_feature(&scene.world).await? {
            (EXEC_BY_WEBSOCKET, PORTS_BY_TUNNEL)
        } else {
            (EXEC_BY_SPDY, PORTS_BY_SPDY)
        };
        let outcome = arrives(&scene, exec, ports).await;
        outcome.with_context(|| client.to_owned())?;
        scene.world.finish().await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_kubectl_of_1_30_forwards_ports_by_spdy() -> anyhow::Result<()> {
    let _alone = ONE_AT_A_TIME.lock().await;
    let scene = scene("kubectl 1.30").await?;
    let exec = if knows_the_feature(&scene.world).await? {
        EXEC_BY_WEBSOCKET
    } else {
        EXEC_BY_SPDY
    };
    arrives(&scene, exec, PORTS_BY_SPDY).await?;
    scene.world.finish().await
}
