//! Pods that need something that an older agent does not know. The fake agent knows nothing beyond the first release.

use super::*;

#[tokio::test]
async fn a_pod_that_needs_what_an_older_agent_does_not_know_waits() {
    let mut kubelet = Kubelet::start().await;
    kubelet.apply(|pod| pod["spec"]["subdomain"] = "web".into());
    kubelet
        .wait("a message", |kubelet| {
            let pod = kubelet.store.by_uid(&uid()).unwrap().pod;
            let status = serde_json::to_string(&pod.status).unwrap();
            status.contains("does not know pod-domain") && status.contains("upgrade it")
        })
        .await;
    assert_eq!(kubelet.phase_now().as_deref(), Some("Pending"));
    assert_eq!(kubelet.called("EnsurePod"), 0);
    // What it knows goes on.
    kubelet.apply(|pod| {
        pod["spec"]["subdomain"] = Value::Null;
    });
    kubelet.ensured().await;
    kubelet.stop().await;
}
