//! What the runner asks of the cluster, through kubectl.

use std::time::Duration;

use anyhow::Context as _;

use crate::{Output, Run, wait_for};

/// A pod that shows which addresses pods have.
const PROBE: &str = "knoc-conformance-address";
/// The image of that pod, as `images.sh` pushes it.
const PAUSE: &str = "pause:3.10.2";
/// The time that the namespaces of earlier tests may take to be removed.
const EMPTY: Duration = Duration::from_mins(5);
/// The time that a pod may take to run.
const RUNS: Duration = Duration::from_mins(2);

/// The cluster's configuration.
pub(super) fn kubeconfig() -> anyhow::Result<String> {
    std::env::var("KUBECONFIG").context("KUBECONFIG is not set: use make conformance")
}

async fn kubectl<'a>(words: impl IntoIterator<Item = &'a str>) -> anyhow::Result<Output> {
    Run::new("kubectl").args(words).ok().await
}

/// What pods have as `status.podIP`: `none`, the address of their compute node, or one of their own.
pub(super) async fn pod_ip_policy() -> anyhow::Result<String> {
    let registry = std::env::var("KNOC_REGISTRY").context("KNOC_REGISTRY is not set")?;
    let image = format!("--image={registry}/{PAUSE}");
    remove_probe().await?;
    kubectl(["run", PROBE, &image, "--restart=Never"]).await?;
    let look = async || {
        let path = "jsonpath={.status.phase} {.status.hostIP} {.status.podIP}";
        let text = match kubectl(["get", "pod", PROBE, "-o", path]).await {
            Ok(output) => output.text(),
            Err(error) => return Err(format!("{error:#}")),
        };
        let mut words = text.splitn(3, ' ').map(str::to_owned);
        match (words.next().as_deref(), words.next(), words.next()) {
            (Some("Running"), Some(host), pod) => Ok((host, pod.unwrap_or_default())),
            _ => Err(text),
        }
    };
    let found = wait_for("the pod that shows the addresses runs", RUNS, look).await;
    remove_probe().await?;
    let (host, pod) = found?;
    let policy = match pod.as_str() {
        "" => "none",
        pod if pod == host => "node",
        _ => "own",
    };
    Ok(policy.to_owned())
}

async fn remove_probe() -> anyhow::Result<()> {
    kubectl(["delete", "pod", PROBE, "--ignore-not-found", "--now"]).await?;
    Ok(())
}

/// Waits until the namespaces of all earlier tests, and with them their pods, are gone.
pub(super) async fn is_empty() -> anyhow::Result<()> {
    let look = async || {
        let words = ["get", "namespaces", "-l", "e2e-framework", "-o"];
        let path = "jsonpath={.items[*].metadata.name}";
        let left = match kubectl(words.into_iter().chain([path])).await {
            Ok(output) => output.text(),
            Err(error) => return Err(format!("{error:#}")),
        };
        for namespace in left.split_whitespace() {
            let let_go = let_go(namespace).await;
            let_go.map_err(|error| format!("{error:#}"))?;
        }
        if left.is_empty() { Ok(()) } else { Err(left) }
    };
    wait_for("the namespaces of earlier tests are gone", EMPTY, look).await
}

/// Removes the finalizers that a failed test left on its pods, which nobody else would remove.
async fn let_go(namespace: &str) -> anyhow::Result<()> {
    let names = "jsonpath={range .items[?(@.metadata.finalizers)]}{.metadata.name} {end}";
    let words = ["get", "pods", "-n", namespace, "-o", names];
    let held = kubectl(words).await?.text();
    for pod in held.split_whitespace() {
        let patch = r#"{"metadata": {"finalizers": null}}"#;
        let words = [
            "patch",
            "pod",
            pod,
            "-n",
            namespace,
            "--type=merge",
            "-p",
            patch,
        ];
        kubectl(words).await?;
    }
    Ok(())
}
