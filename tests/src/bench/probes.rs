//! What probes cost: the processor time of a pod's shim for a thousand http and tcp probes a minute, less that of the shim of the same pod
//! without probes over the same time; and that of an exec probe, beside `nsenter` by hand into the same container.

mod execs;

use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::{Value, json};

use self::execs::Execs;
use super::{
    bed::Bed,
    machine::{self, Taken},
};
use crate::{PodBuilder, ports::some_port, world::has_condition};

/// The time limit for one step.
const STEP: Duration = Duration::from_mins(5);

/// Containers of the pod. Each has an http probe every second, and each but the first also a tcp probe every second.
const CONTAINERS: u32 = 9;

/// What the server of the pod writes about its answers.
const LOG: &str = "/tmp/log";

/// The results.
#[derive(Debug, Default)]
pub(super) struct Probes {
    pub(super) node: Served,
    pub(super) private: Served,
    pub(super) execs: Execs,
}

/// The cost of http and tcp probes.
#[derive(Debug, Default)]
pub(super) struct Served {
    /// Probes a minute.
    pub(super) rate: f64,
    /// The processor time of the shim as a percentage of one core.
    pub(super) with: f64,
    /// The same of a pod without probes.
    pub(super) without: f64,
}

/// The network of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Network {
    Node,
    Private,
}

/// Measures everything; each part watches the pods for this long.
pub(super) async fn measure(bed: &Bed, watched: Duration) -> anyhow::Result<Probes> {
    let node = served(bed, Network::Node, watched).await;
    let node = node.context("http and tcp probes in the node's network")?;
    let private = served(bed, Network::Private, watched).await;
    let private = private.context("http and tcp probes in a network of the pod's own")?;
    let execs = execs::measure(bed, watched).await.context("exec probes")?;
    Ok(Probes {
        node,
        private,
        execs,
    })
}

async fn served(bed: &Bed, network: Network, watched: Duration) -> anyhow::Result<Served> {
    let pods = [
        server("probed", network, true),
        server("unprobed", network, false),
    ];
    let uids = start(bed, &pods).await?;
    let (earlier, began) = (answers(bed, &uids[0]).await?, Instant::now());
    let ([with, without], seconds) = watch(&uids, watched).await?;
    let http = answers(bed, &uids[0]).await? - earlier;
    let minutes = began.elapsed().as_secs_f64() / 60.0;
    stop(bed, &pods).await?;
    // The server sees only those that ask it for something.
    let for_each = f64::from(2 * CONTAINERS - 1) / f64::from(CONTAINERS);
    let served = Served {
        rate: http * for_each / minutes,
        with: 100.0 * with.own / seconds,
        without: 100.0 * without.own / seconds,
    };
    anyhow::ensure!(
        served.rate >= 900.0,
        "only {:.0} probes a minute",
        served.rate
    );
    Ok(served)
}

/// A pod of which one container serves a file, with probes of all containers if `probed`.
fn server(name: &str, network: Network, probed: bool) -> PodBuilder {
    let port = some_port();
    let script = format!(
        "mkdir /tmp/www; echo ok >/tmp/www/index.html; exec httpd -f -v -p 127.0.0.1:{port} -h /tmp/www 2>{LOG}"
    );
    let mut pod = PodBuilder::new(name);
    if network == Network::Private {
        pod = pod.annotation("knoc.io/network", "private");
    }
    for at in 0..CONTAINERS {
        pod = match at {
            0 => pod.sh(&script),
            at => pod
                .container(&format!("other{at}"))
                .command(["sleep", "3600"]),
        };
        pod = small(pod);
        if probed {
            let http = json!({"port": port, "path": "/index.html"});
            pod = pod.set("readinessProbe", every_second("httpGet", &http));
        }
        if probed && at > 0 {
            let tcp = json!({"port": port});
            pod = pod.set("livenessProbe", every_second("tcpSocket", &tcp));
        }
    }
    pod
}

/// The image of the benchmark, and so few resources that the containers of a pod together take one processor.
fn small(pod: PodBuilder) -> PodBuilder {
    pod.image(&Bed::image_path()).set(
        "resources",
        json!({"requests": {"cpu": "100m"}, "limits": {"memory": "64Mi"}}),
    )
}

/// A probe every second, which does not fail because the machine is busy or the server still begins.
fn every_second(kind: &str, action: &Value) -> Value {
    json!({kind: action, "periodSeconds": 1, "timeoutSeconds": 10, "failureThreshold": 100})
}

/// How many requests the server of the pod has answered.
async fn answers(bed: &Bed, uid: &str) -> anyhow::Result<f64> {
    let count = ["grep", "-c", "response:200", LOG];
    let count = bed.world.exec(uid, "main", count).ok().await?.text();
    count.parse().context(count)
}

/// Creates both pods, and waits until they are ready. Returns their UIDs.
async fn start(bed: &Bed, pods: &[PodBuilder; 2]) -> anyhow::Result<[String; 2]> {
    let [probed, unprobed] = pods;
    let uids = [
        bed.world.create(probed).await?,
        bed.world.create(unprobed).await?,
    ];
    for pod in pods {
        let ready = bed.world.wait_for_state(pod.name(), "ready", STEP, |pod| {
            has_condition(pod, "Ready").then_some(())
        });
        ready.await?;
    }
    Ok(uids)
}

/// Deletes both pods, which have to be ready still.
async fn stop(bed: &Bed, pods: &[PodBuilder; 2]) -> anyhow::Result<()> {
    for pod in pods {
        let now = bed.world.pod(pod.name()).await?;
        anyhow::ensure!(has_condition(&now, "Ready"), "{:?}", now.status);
        bed.world.delete(pod.name(), Some(0)).await?;
    }
    for pod in pods {
        bed.world.wait_gone(pod.name(), STEP).await?;
    }
    Ok(())
}

/// What the shims of both pods take, and in how many seconds.
async fn watch(uids: &[String; 2], watched: Duration) -> anyhow::Result<([Taken; 2], f64)> {
    let (before, began) = (taken(uids)?, Instant::now());
    // This sleep is the measured time and not a wait for a state.
    tokio::time::sleep(watched).await;
    let ([with, without], seconds) = (taken(uids)?, began.elapsed().as_secs_f64());
    let spent = [with.since(before[0]), without.since(before[1])];
    Ok((spent, seconds))
}

/// What the shims of both pods have taken so far.
fn taken([probed, unprobed]: &[String; 2]) -> anyhow::Result<[Taken; 2]> {
    let of = |uid: &str| machine::shim(uid).with_context(|| format!("no shim of pod {uid}"));
    Ok([of(probed)?, of(unprobed)?])
}
