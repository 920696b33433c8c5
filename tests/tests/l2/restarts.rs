//! Level 2: a restart of the kubelet, of the agent, or of both changes nothing of a pod in the API server.

use std::time::Duration;

use anyhow::ensure;
use knoc_tests::{
    site::{Kubelet, Options, Site},
    wait_for,
};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_mins(2);

/// A pod that runs, one that has ended, and one that waits for a ConfigMap.
const PODS: [&str; 3] = ["runs", "ended", "waits"];

/// The pods as the API server has them, and the number of Events.
fn stored(kubelet: &Kubelet) -> anyhow::Result<(Vec<Value>, usize)> {
    let pods = PODS.iter();
    let pods = pods.map(|name| kubelet.api.get("v1", "pods", "default", name));
    let events = kubelet.api.list("v1", "events", "default");
    let about = |event: &&Value| {
        PODS.iter()
            .any(|name| event["involvedObject"]["name"] == *name)
    };
    let events = events.iter().filter(about).count();
    Ok((pods.collect::<anyhow::Result<_>>()?, events))
}

/// Those of the Events that are written once for each pod which are not there yet.
fn missing(kubelet: &Kubelet) -> Vec<(&'static str, &'static str)> {
    let events = kubelet.api.list("v1", "events", "default");
    let program = ["Created", "Started", "SlurmJobStarted"];
    let programs = ["runs", "ended"].map(|pod| program.map(|reason| (pod, reason)));
    let waits = ("waits", "Failed");
    let wanted = programs.into_iter().flatten().chain([waits]);
    let is_missing = |(pod, reason): &(&str, &str)| {
        !events
            .iter()
            .any(|event| event["involvedObject"]["name"] == *pod && event["reason"] == *reason)
    };
    wanted.filter(is_missing).collect()
}

/// A pod from its creation to its end: afterwards the kubelet has looked at all others too.
async fn another_pod_runs(kubelet: &Kubelet, name: &str) -> anyhow::Result<()> {
    kubelet.create_pod(
        name,
        json!({"containers": [{"name": "main", "image": "none", "command": ["/bin/true"]}]}),
    )?;
    kubelet.phase(name, "Succeeded", SOON).await?;
    Ok(())
}

#[tokio::test]
async fn a_restart_changes_nothing_of_a_pod() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let mut agent = site.agent(&[]).await?;
    let kubelet = Kubelet::prepare(&site).await?;
    let mut process = Some(kubelet.start(&site, &[]).await?);
    let container = |script: &str| json!({"containers": [{"name": "main", "image": "none", "command": ["/bin/sh", "-c", script]}]});
    kubelet.create_pod("runs", container("sleep 600"))?;
    kubelet.create_pod("ended", container("exit 3"))?;
    let mut waits = container("exit 0");
    waits["containers"][0]["envFrom"] = json!([{"configMapRef": {"name": "missing"}}]);
    kubelet.create_pod("waits", waits)?;
    kubelet.phase("runs", "Running", SOON).await?;
    kubelet.phase("ended", "Failed", SOON).await?;
    let waiting = "/status/containerStatuses/0/state/waiting/reason";
    wait_for(
        "the pod waits, and all Events are written",
        SOON,
        async || {
            let (pods, events) = stored(&kubelet).map_err(|error| error.to_string())?;
            let reason = pods[2].pointer(waiting).cloned().unwrap_or_default();
            let missing = missing(&kubelet);
            if reason == "CreateContainerConfigError" && missing.is_empty() {
                Ok(())
            } else {
                Err(format!("{missing:?} of {events} Events, {pods:#?}"))
            }
        },
    )
    .await?;
    another_pod_runs(&kubelet, "before").await?;
    let before = stored(&kubelet)?;
    for (restarted, both) in [("kubelet", false), ("agent", false), ("both", true)] {
        let old = process.take_if(|_| restarted == "kubelet" || both);
        if let Some(old) = old {
            old.kill().await?;
        }
        if restarted == "agent" || both {
            agent.kill().await?;
            agent = site.agent(&[]).await?;
        }
        if process.is_none() {
            process = Some(kubelet.start(&site, &[]).await?);
        }
        another_pod_runs(&kubelet, &format!("after-{restarted}")).await?;
        let after = stored(&kubelet)?;
        // The same resourceVersion: nothing was written.
        ensure!(after == before, "{restarted}: {after:#?}\n{before:#?}");
    }
    Ok(())
}

/// A deletion must not be lost on its way, whichever of the two is away at the time and whichever comes back first.
#[tokio::test]
async fn pods_that_are_deleted_while_agent_or_kubelet_is_away_end_soon_after() -> anyhow::Result<()>
{
    let site = Site::new(Options::default())?;
    let mut agent = site.agent(&[]).await?;
    let kubelet = Kubelet::prepare(&site).await?;
    let mut process = kubelet.start(&site, &[]).await?;
    let main = json!({"name": "main", "image": "none", "command": ["/bin/sleep", "600"]});
    let names = ["before", "kubelet-away", "both-away", "agent-away", "after"];
    for name in names {
        kubelet.create_pod(name, json!({"containers": [main]}))?;
    }
    for name in names {
        kubelet.phase(name, "Running", SOON).await?;
    }
    let delete = |name: &str| {
        let none = json!({});
        kubelet.api.delete("pods", "default", name, &none).map(drop)
    };
    // The request may be on its way to the agent.
    delete("before")?;
    process.kill().await?;
    delete("kubelet-away")?;
    agent.kill().await?;
    delete("both-away")?;
    process = kubelet.process(&site, &[])?;
    delete("agent-away")?;
    agent = site.agent(&[]).await?;
    delete("after")?;
    for name in names {
        kubelet.gone(name, SOON).await?;
    }
    drop((agent, process));
    Ok(())
}
