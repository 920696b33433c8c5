//! Level 2: agent, shim and kubelet die at each boundary of an effect, and at random moments under
//! load. Afterwards, no second job has run a pod's containers, no pod was lost, and nothing is left over.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use futures::future::{try_join, try_join_all};
use knoc_proto::pb;
use knoc_proto::pb::agent_client::AgentClient;
use knoc_tests::site::{self, Daemon, Kubelet, Options, Pod, Site};
use knoc_tests::wait_for;
use serde_json::{Value, json};
use tonic::transport::Channel;

/// The time from a restart to the correct state.
const RIGHT: Duration = Duration::from_mins(3);

/// The time to the correct state while the process is killed repeatedly.
const UNDER_LOAD: Duration = Duration::from_mins(6);

/// How often the agent is killed under load.
const KILLS: usize = 50;

/// Pods at the same time under load.
const LOAD: usize = 8;

async fn agent_dies_at(point: &str) -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let pod = Pod::counting(&site, "crash", 0.5)?;
    let mut doomed = site.agent(&[("KNOC_CRASH_AT", point)]).await?;
    let client = site.client()?;
    // The agent may die before it answers; the request is then repeated, as a kubelet does.
    let _answer = client.clone().ensure_pod(pod.request.clone()).await;
    let status = doomed.ended(RIGHT).await.context(point.to_owned())?;
    anyhow::ensure!(
        !status.success(),
        "{point}: the agent ended well instead of dying there"
    );
    let agent = site.agent(&[]).await?;
    pod.ensure(&client).await?;
    pod.succeeded(&client, RIGHT)
        .await
        .with_context(|| site.log())?;
    ran_once(&site, &pod, point)?;
    site::nothing_names(&site.jobdir(pod.uid()), agent.pid()).await?;
    pod.remove(&client).await?;
    anyhow::ensure!(
        !site.jobdir(pod.uid()).exists(),
        "{point}: the job directory is left"
    );
    agent.terminate().await?;
    Ok(())
}

fn ran_once(site: &Site, pod: &Pod, what: &str) -> anyhow::Result<()> {
    let (runs, claims) = (site.runs(pod.uid())?, site.claims(pod.uid())?);
    anyhow::ensure!(
        (runs, claims) == (1, 1),
        "{what}: {runs} runs and {claims} claims"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_dies_before_its_record() -> anyhow::Result<()> {
    agent_dies_at("agent.record.before").await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_dies_after_its_record() -> anyhow::Result<()> {
    agent_dies_at("agent.record.after").await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_dies_before_submitting() -> anyhow::Result<()> {
    agent_dies_at("agent.sbatch.before").await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_dies_after_submitting() -> anyhow::Result<()> {
    agent_dies_at("agent.sbatch.after").await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_dies_before_taking_a_report() -> anyhow::Result<()> {
    agent_dies_at("agent.report.before").await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_dies_after_taking_a_report() -> anyhow::Result<()> {
    agent_dies_at("agent.report.after").await
}

/// A job that ends without a report has failed; it is never assumed to have succeeded, and its containers do not outlive it.
async fn shim_dies_at(point: &str, may_run: usize) -> anyhow::Result<()> {
    let (site, agent, client) = Site::start(Options {
        prelude: format!("export KNOC_CRASH_AT={point}\n"),
        ..Options::default()
    })
    .await?;
    let pod = Pod::counting(&site, "crash", 30.0)?;
    pod.ensure(&client).await?;
    let outcome = pod
        .finished(&client, RIGHT)
        .await
        .with_context(|| site.log())?;
    anyhow::ensure!(
        outcome.kind() == pb::OutcomeKind::Failed,
        "{point}: {outcome:?}"
    );
    anyhow::ensure!(
        !outcome.reason.is_empty(),
        "{point}: {outcome:?} has no reason"
    );
    let (runs, claims) = (site.runs(pod.uid())?, site.claims(pod.uid())?);
    anyhow::ensure!(runs <= may_run, "{point}: {runs} runs");
    anyhow::ensure!(claims <= 1, "{point}: {claims} claims");
    site::nothing_names(&site.jobdir(pod.uid()), agent.pid()).await?;
    site::nothing_names(&site.path("runs"), agent.pid()).await?;
    pod.remove(&client).await?;
    agent.terminate().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shim_dies_before_its_claim() -> anyhow::Result<()> {
    shim_dies_at("shim.claim.before", 0).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shim_dies_after_its_claim() -> anyhow::Result<()> {
    shim_dies_at("shim.claim.after", 0).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shim_dies_before_a_report() -> anyhow::Result<()> {
    shim_dies_at("shim.report.before", 1).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shim_dies_after_a_report() -> anyhow::Result<()> {
    shim_dies_at("shim.report.after", 1).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_dies_fifty_times_under_load() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let client = site.client()?;
    let stop = AtomicBool::new(false);
    let workers = (0..LOAD).map(|worker| load(&site, &client, &stop, worker));
    let (agent, pods) = try_join(kill_often(&site, &stop), try_join_all(workers)).await?;
    let pods: Vec<Pod> = pods.into_iter().flatten().collect();
    println!("{} pods, {KILLS} kills", pods.len());
    for pod in &pods {
        ran_once(&site, pod, pod.uid())?;
        pod.remove(&client).await?;
    }
    site::nothing_names(&site.path("state/pods"), agent.pid()).await?;
    let left = std::fs::read_dir(site.path("state/pods"))?.count();
    anyhow::ensure!(left == 0, "{left} job directories are left");
    agent.terminate().await?;
    Ok(())
}

/// Kills the agent at random moments, then lets it run until the load ends.
async fn kill_often(site: &Site, stop: &AtomicBool) -> anyhow::Result<Daemon> {
    for kill in 0..KILLS {
        let agent = site.agent(&[]).await.with_context(|| site.log())?;
        let moment = Duration::from_millis(rand::random_range(0..400));
        tokio::time::sleep(moment).await;
        agent.kill().await.with_context(|| format!("kill {kill}"))?;
    }
    let agent = site.agent(&[]).await?;
    stop.store(true, Ordering::Relaxed);
    Ok(agent)
}

/// Runs pods one after the other, each until it has succeeded; returns all of them.
async fn load(
    site: &Site,
    client: &AgentClient<Channel>,
    stop: &AtomicBool,
    worker: usize,
) -> anyhow::Result<Vec<Pod>> {
    let mut pods = Vec::new();
    while pods.is_empty() || !stop.load(Ordering::Relaxed) {
        // All kills may happen while this pod runs.
        let pod = Pod::counting(site, &format!("load-{worker}-{}", pods.len()), 0.3)?;
        pod.ensure(client).await?;
        pod.succeeded(client, UNDER_LOAD)
            .await
            .with_context(|| site.log())?;
        pods.push(pod);
    }
    Ok(pods)
}

/// The spec of a pod that records in `runs/UID` that it ran.
fn counting(site: &Site) -> anyhow::Result<Value> {
    let runs = site.path("runs");
    std::fs::create_dir_all(&runs)?;
    let script = format!("echo $$ >> {}/$UID_OF_POD; sleep 0.5", runs.display());
    let uid = json!({"fieldRef": {"fieldPath": "metadata.uid"}});
    let env = json!([{"name": "UID_OF_POD", "valueFrom": uid}]);
    let command = json!(["/bin/sh", "-c", script]);
    let main = json!({"name": "main", "image": "none", "command": command, "env": env});
    Ok(json!({"containers": [main]}))
}

/// The kubelet dies at the point and is restarted, and the pod ends as expected.
async fn kubelet_dies_at(point: &str) -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let agent = site.agent(&[]).await?;
    let kubelet = Kubelet::prepare(&site).await?;
    let deleting = point.contains("delete");
    let first = if deleting {
        Vec::new()
    } else {
        vec![("KNOC_CRASH_AT", point)]
    };
    let mut doomed = kubelet.start(&site, &first).await?;
    let uid = kubelet.create_pod("crash", counting(&site)?)?;
    let delete = || {
        kubelet.api.delete(
            "pods",
            "default",
            "crash",
            &json!({"gracePeriodSeconds": 2}),
        )
    };
    if deleting {
        kubelet.phase("crash", "Succeeded", RIGHT).await?;
        doomed.terminate().await?;
        doomed = kubelet.start(&site, &[("KNOC_CRASH_AT", point)]).await?;
        delete()?;
    }
    let status = doomed.ended(RIGHT).await.context(point.to_owned())?;
    anyhow::ensure!(
        !status.success(),
        "{point}: the kubelet ended well instead of dying there"
    );
    let running = kubelet.start(&site, &[]).await?;
    if !deleting {
        kubelet.phase("crash", "Succeeded", RIGHT).await?;
        let pod = Pod::new(&uid, Vec::new());
        ran_once(&site, &pod, point)?;
        delete()?;
    }
    kubelet.gone("crash", RIGHT).await?;
    wait_for("the agent has forgotten the pod", RIGHT, async || {
        if site.jobdir(&uid).exists() {
            Err("its job directory is there")
        } else {
            Ok(())
        }
    })
    .await?;
    anyhow::ensure!(
        site.runs(&uid)? == 1,
        "{point}: it ran {} times",
        site.runs(&uid)?
    );
    running.terminate().await?;
    agent.terminate().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kubelet_dies_fifty_times_under_load() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let agent = site.agent(&[]).await?;
    let kubelet = Kubelet::prepare(&site).await?;
    let mut pods: Vec<(String, String)> = Vec::new();
    for kill in 0..KILLS {
        let running = kubelet.process(&site, &[])?;
        let name = format!("load-{kill}");
        let uid = kubelet.create_pod(&name, counting(&site)?)?;
        pods.push((name, uid));
        let moment = Duration::from_millis(rand::random_range(0..600));
        tokio::time::sleep(moment).await;
        running.kill().await?;
    }
    let running = kubelet.start(&site, &[]).await?;
    for (name, uid) in &pods {
        kubelet.phase(name, "Succeeded", RIGHT).await?;
        ran_once(&site, &Pod::new(uid, Vec::new()), name)?;
        let options = json!({"gracePeriodSeconds": 1});
        kubelet.api.delete("pods", "default", name, &options)?;
    }
    for (name, _) in &pods {
        kubelet.gone(name, RIGHT).await?;
    }
    running.terminate().await?;
    agent.terminate().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kubelet_dies_before_a_status_patch() -> anyhow::Result<()> {
    kubelet_dies_at("kubelet.patch.before").await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kubelet_dies_after_a_status_patch() -> anyhow::Result<()> {
    kubelet_dies_at("kubelet.patch.after").await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kubelet_dies_before_ensuring_a_pod() -> anyhow::Result<()> {
    kubelet_dies_at("kubelet.ensure.before").await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kubelet_dies_after_ensuring_a_pod() -> anyhow::Result<()> {
    kubelet_dies_at("kubelet.ensure.after").await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kubelet_dies_before_deleting_a_pod() -> anyhow::Result<()> {
    kubelet_dies_at("kubelet.delete.before").await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kubelet_dies_after_deleting_a_pod() -> anyhow::Result<()> {
    kubelet_dies_at("kubelet.delete.after").await
}
