//! Level 2: which paths of the compute nodes pods may mount, and the volumes of claims. Without a container runtime nothing is
//! mounted, so the pods that are admitted here have volumes that no container mounts.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, ensure};
use knoc_proto::{pb, reason::ErrorReason};
use knoc_tests::{
    site::{Kubelet, NODE, Options, Pod, Site, container},
    wait_for,
};
use serde_json::{Value, json};

/// The agent reads its policy again every ten seconds.
const SOON: Duration = Duration::from_mins(2);

/// A pod with a volume of this source, which its container does not mount.
fn pod(uid: &str, source: pb::volume::Source) -> Pod {
    let mut pod = Pod::new(uid, vec![container("main", &["/bin/true"], &[])]);
    if let Some(spec) = &mut pod.request.spec {
        spec.volumes = vec![pb::Volume {
            name: "data".to_owned(),
            source: Some(source),
        }];
    }
    pod
}

fn host_path(path: &str) -> pb::volume::Source {
    pb::volume::Source::HostPath(pb::HostPath {
        path: path.to_owned(),
        ..pb::HostPath::default()
    })
}

#[tokio::test]
async fn a_site_lets_pods_mount_what_its_policy_names_and_nothing_else() -> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let refused = async |pod: &Pod| -> anyhow::Result<String> {
        let answer = client.clone().ensure_pod(pod.request.clone()).await;
        let status = answer.err().context("it was accepted")?;
        ensure!(
            ErrorReason::of(&status) == Some(ErrorReason::InvalidSpec),
            "{status}"
        );
        Ok(status.message().to_owned())
    };
    let nfs = |path: &str| {
        pb::volume::Source::Nfs(pb::NfsVolume {
            server: "filer".to_owned(),
            path: path.to_owned(),
            ..pb::NfsVolume::default()
        })
    };
    let none = refused(&pod("none", host_path("/data"))).await?;
    ensure!(
        none.contains("spec.volumes[data].hostPath.path") && none.contains("is empty"),
        "{none}"
    );
    let state = site.path("state").display().to_string();
    let folder = site.path("").display().to_string();
    site.put_tables(&format!(
        "[policy]\nhost_paths = [{{path = '/data'}}, {{path = '{folder}'}}]\n\
         nfs = [{{server = 'filer', export = '/export', path = '/data/nfs'}}]"
    ))?;
    // It is in effect when the agent has read it.
    let first = pod("first", host_path("/data/set"));
    first.ensure(&client).await.with_context(|| site.log())?;
    pod("second", nfs("/export/x")).ensure(&client).await?;
    for uid in ["first", "second"] {
        let outcome = pod(uid, host_path("/data")).finished(&client, SOON).await?;
        ensure!(outcome.kind() == pb::OutcomeKind::Succeeded, "{outcome:?}");
    }
    for (source, why) in [
        (host_path("/database"), "is not below"),
        (host_path(&state), "is \""),
        (host_path(&format!("{state}/pods")), "lies in"),
        (host_path(&folder), "contains"),
        (host_path(&format!("{folder}/scratch")), "contains"),
        (nfs("/elsewhere"), "policy.nfs"),
    ] {
        let message = refused(&pod("refused", source)).await?;
        ensure!(message.contains(why), "{why}: {message}");
    }
    let mut written = pod("written", host_path("/data/set"));
    if let Some(spec) = &mut written.request.spec {
        spec.containers[0].mounts = vec![pb::Mount {
            volume: "data".to_owned(),
            path: "/data".to_owned(),
            ..pb::Mount::default()
        }];
    }
    let message = refused(&written).await?;
    ensure!(message.contains("readOnly: true"), "{message}");
    Ok(())
}

/// A PersistentVolume at this path, bound to the claim.
fn volume(name: &str, claim: &Value, path: &Path) -> Value {
    let uid = &claim["metadata"]["uid"];
    json!({"metadata": {"name": name}, "spec": {"claimRef": {"uid": uid}, "hostPath": {"path": path}}})
}

fn claiming(claim: &str) -> Value {
    json!({
        "containers": [{"name": "main", "image": "none", "command": ["/bin/true"]}],
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": claim}}],
    })
}

#[tokio::test]
async fn a_pod_waits_for_its_claim_and_then_has_the_path_of_its_volume() -> anyhow::Result<()> {
    let tables = "[policy]\nhost_paths = [{path = '/data'}]".to_owned();
    let options = Options {
        tables,
        ..Options::default()
    };
    let (site, _agent, _client) = Site::start(options).await?;
    let kubelet = Kubelet::prepare(&site).await?;
    let _kubelet = kubelet.start(&site, &[]).await?;
    let told = async |pod: &str, wanted: &str| {
        wait_for(wanted, SOON, async || {
            let events = kubelet.api.list("v1", "events", "default");
            let mut events = events
                .iter()
                .filter(|event| event["reason"] == "FailedMount");
            let told = events.any(|event| {
                let message = event["message"].as_str().unwrap_or_default();
                event["involvedObject"]["name"] == pod && message.contains(wanted)
            });
            let pod = kubelet.api.get("v1", "pods", "default", pod)?;
            ensure!(told && pod["status"]["phase"] == "Pending", "{pod}");
            Ok(())
        })
        .await
    };
    kubelet.create_pod("waits", claiming("c"))?;
    told(
        "waits",
        "error processing PVC default/c: persistentvolumeclaim \"c\" not found",
    )
    .await?;
    let bound = |name: &str, volume: &str| {
        let claim = json!({"metadata": {"name": name}, "spec": {"volumeName": volume}, "status": {"phase": "Bound"}});
        kubelet
            .api
            .create("v1", "persistentvolumeclaims", "default", claim)
    };
    let claim = bound("c", "pv")?;
    told("waits", "persistentvolume \"pv\" not found").await?;
    let pv = volume("pv", &claim, Path::new("/data/set"));
    kubelet.api.create("v1", "persistentvolumes", "", pv)?;
    kubelet.phase("waits", "Succeeded", SOON).await?;
    // The paths of volumes are judged as those of pods.
    let claim = bound("out", "pv-out")?;
    let pv = volume("pv-out", &claim, Path::new("/etc"));
    kubelet.api.create("v1", "persistentvolumes", "", pv)?;
    kubelet.create_pod("out", claiming("out"))?;
    let failed = kubelet.phase("out", "Failed", SOON).await?;
    let message = failed["status"]["message"].as_str().unwrap_or_default();
    ensure!(
        message.contains("the volume of the claim \"out\": \"/etc\" is not below"),
        "{NODE}: {failed}"
    );
    Ok(())
}
