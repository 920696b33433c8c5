//! Pods that ask for extended resources, which are the site's or somebody else's.

use super::*;

/// An agent that was just started does not know yet what the site has. A GPU that was taken for somebody else's would not
/// be requested from Slurm.
#[tokio::test]
async fn a_pod_with_an_extended_resource_waits_until_it_is_known_whose_it_is() {
    let mut kubelet = Kubelet::start().await;
    kubelet.agent.report(pb::NodeInfo::default());
    kubelet.apply(|pod| {
        let list = json!({"nvidia.com/gpu": "1"});
        pod["spec"]["containers"][0]["resources"] = json!({"limits": list, "requests": list});
    });
    kubelet
        .wait("a message", |kubelet| {
            let pod = kubelet.store.by_uid(&uid()).unwrap().pod;
            let status = serde_json::to_string(&pod.status).unwrap();
            status.contains("has not reported yet which extended resources")
        })
        .await;
    assert_eq!(kubelet.called("EnsurePod"), 0);
    kubelet.agent.report(pb::NodeInfo {
        nodes_total: 1,
        extended: [("nvidia.com/gpu".to_owned(), 1)].into(),
        ..pb::NodeInfo::default()
    });
    kubelet.ensured().await;
    let limits = kubelet.agent.spec().containers[0].limits.clone();
    assert_eq!(limits.unwrap().extended["nvidia.com/gpu"], 1);
    kubelet.stop().await;
}
