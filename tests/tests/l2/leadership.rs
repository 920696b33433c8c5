//! Level 2: who may claim the leadership of a node: only its own kubelet, with a valid request and a correct clock.

use anyhow::ensure;
use jiff::Timestamp;
use knoc_proto::{pb, reason::ErrorReason};
use knoc_tests::site::{CLUSTER, Options, Pod, Site, container};
use tonic::Status;

fn pod(uid: &str, node: &str, epoch: i64) -> Pod {
    let mut pod = Pod::new(uid, vec![container("main", &["/bin/true"], &[])]);
    pod.request.leadership_epoch = epoch;
    if let Some(spec) = &mut pod.request.spec {
        node.clone_into(&mut spec.node_name);
    }
    pod
}

fn refused<T>(answer: Result<T, Status>, reason: ErrorReason) -> anyhow::Result<Status> {
    let Err(status) = answer else {
        anyhow::bail!("it was let through");
    };
    ensure!(ErrorReason::of(&status) == Some(reason), "{status}");
    Ok(status)
}

fn kept(site: &Site) -> String {
    std::fs::read_to_string(site.path("state/cluster.json")).unwrap_or_default()
}

fn now() -> i64 {
    Timestamp::now().as_second()
}

/// A `ctl` certificate could once store 2^63 - 1 with an invalid request, which locked every kubelet out.
#[tokio::test]
async fn only_a_nodes_kubelet_claims_its_epochs() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    let (ctl, socket) = (site.client()?, site.socket_client()?);
    let mut a = site.kubelet_client("a")?;
    for epoch in [i64::MAX, 5, -1] {
        for mut client in [ctl.clone(), socket.clone(), site.kubelet_client("b")?] {
            let answer = client.ensure_pod(pod("x", "a", epoch).request).await;
            refused(answer, ErrorReason::LeadershipDenied)?;
        }
    }
    for epoch in [i64::MAX, now() + 900] {
        let answer = a.ensure_pod(pod("x", "a", epoch).request).await;
        let status = refused(answer, ErrorReason::LeadershipDenied)?;
        ensure!(status.message().contains("compare the clocks"), "{status}");
    }
    // A client that is not a kubelet does not pin its cluster, and an invalid request stores nothing.
    ctl.clone().ensure_pod(pod("by-ctl", "", 0).request).await?;
    let mut invalid = pod("x", "a", now()).request;
    if let Some(spec) = &mut invalid.spec {
        spec.containers.clear();
    }
    refused(a.ensure_pod(invalid).await, ErrorReason::InvalidSpec)?;
    ensure!(kept(&site).is_empty(), "{}", kept(&site));
    // None of this locked the node's kubelet out.
    let epoch = now();
    a.ensure_pod(pod("led", "a", epoch).request).await?;
    ensure!(kept(&site).contains(&epoch.to_string()), "{}", kept(&site));
    let mut b = site.kubelet_client("b")?;
    b.ensure_pod(pod("b", "b", 3).request).await?;
    let answer = a.ensure_pod(pod("older", "a", epoch - 1).request).await;
    refused(answer, ErrorReason::StaleLeader)?;
    // Changes of an existing pod are checked against its node, whatever the request says about it.
    let mut of_b = pod("led", "b", now()).request;
    if let Some(spec) = &mut of_b.spec {
        spec.generation = 0;
    }
    refused(b.ensure_pod(of_b).await, ErrorReason::LeadershipDenied)?;
    let delete = pb::DeletePodRequest {
        leadership_epoch: epoch,
        cluster_id: CLUSTER.into(),
        uid: "led".into(),
        ..pb::DeletePodRequest::default()
    };
    let answer = b.delete_pod(delete.clone()).await;
    refused(answer, ErrorReason::LeadershipDenied)?;
    a.delete_pod(delete).await?;
    Ok(())
}

#[tokio::test]
async fn the_site_file_assigns_a_node_and_doctor_names_kubelets_that_are_denied()
-> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    // The state of an older agent: a kubelet with another name led this node, with an impossible epoch.
    let older = format!(
        r#"{{"cluster_id": "{CLUSTER}", "leaders": {{"gpu": {}}}}}"#,
        i64::MAX
    );
    std::fs::create_dir(site.path("state"))?;
    std::fs::set_permissions(
        site.path("state"),
        std::os::unix::fs::PermissionsExt::from_mode(0o700),
    )?;
    site.put("state/cluster.json", &older)?;
    let agent = site.agent(&[]).await?;
    let mut a = site.kubelet_client("a")?;
    let info = pb::GetInfoRequest {
        node_name: "gpu".into(),
        ..pb::GetInfoRequest::default()
    };
    a.get_info(info).await?;
    let finding = leadership(&mut a).await?;
    ensure!(!finding.ok && finding.detail.contains("gpu"), "{finding:?}");
    let line = "\"gpu\" = \"kubelet/a\"";
    ensure!(finding.cure.contains(line), "{finding:?}");
    ensure!(
        site.log().contains("may not lead its node"),
        "{}",
        site.log()
    );
    let answer = a.ensure_pod(pod("p", "gpu", now()).request).await;
    let status = refused(answer, ErrorReason::LeadershipDenied)?;
    ensure!(status.message().contains(line), "{status}");
    agent.terminate().await?;
    site.put_tables(&format!("[policy.nodes]\n{line}"))?;
    let _agent = site.agent(&[]).await?;
    let mut a = site.kubelet_client("a")?;
    a.ensure_pod(pod("p", "gpu", now()).request).await?;
    let finding = leadership(&mut a).await?;
    ensure!(finding.ok, "{finding:?}");
    Ok(())
}

async fn leadership(
    client: &mut pb::agent_client::AgentClient<tonic::transport::Channel>,
) -> anyhow::Result<pb::Finding> {
    let request = pb::DiagnoseRequest { probe: false };
    let mut findings = client.diagnose(request).await?.into_inner();
    while let Some(finding) = findings.message().await? {
        if finding.check == "policy: leadership" {
            return Ok(finding);
        }
    }
    anyhow::bail!("no finding about leadership")
}
