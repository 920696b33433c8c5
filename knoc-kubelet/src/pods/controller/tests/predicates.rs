//! Which new pods match the node.

use super::*;
use crate::node::predicates::NodeAttributes;

const MESSAGE: &str = "Pod was rejected: Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector";

fn node(labels: &Value, taints: &Value) -> Value {
    json!({"metadata": {"name": "n", "labels": labels}, "spec": {"taints": taints}})
}

fn wants_ssd(pod: &mut Value) {
    pod["spec"]["nodeSelector"] = json!({"disk": "ssd"});
}

impl Kubelet {
    fn why(&self) -> (Option<String>, Option<String>) {
        let status = self.store.by_uid(&uid()).unwrap().pod.status.clone();
        status.map_or((None, None), |status| (status.reason, status.message))
    }
}

#[tokio::test]
async fn a_pod_that_does_not_belong_here_fails_as_on_any_node() {
    let mut kubelet = Kubelet::start().await;
    kubelet.api.node(node(&json!({"disk": "hdd"}), &json!([])));
    kubelet.apply(wants_ssd);
    kubelet.phase("Failed").await;
    let (reason, message) = kubelet.why();
    assert_eq!(reason.as_deref(), Some("NodeAffinity"));
    assert_eq!(message.as_deref(), Some(MESSAGE));
    kubelet
        .wait("an Event", |kubelet| {
            kubelet.said(&["/events", "NodeAffinity"]) == 1
        })
        .await;
    assert_eq!(kubelet.called("EnsurePod"), 0);
    kubelet.stop().await;
}

#[tokio::test]
async fn a_pod_that_does_not_tolerate_a_no_execute_taint_is_rejected() {
    let mut kubelet = Kubelet::start().await;
    let node = node(
        &json!({}),
        &json!([{"key": "broken", "effect": "NoExecute"}]),
    );
    let known = NodeAttributes::of(&serde_json::from_value(node.clone()).unwrap());
    kubelet.context.node.set_attributes(known);
    kubelet.api.node(node);
    kubelet.apply(|_| ());
    kubelet.phase("Failed").await;
    let (reason, message) = kubelet.why();
    assert_eq!(reason.as_deref(), Some("TaintToleration"));
    let expected = "Pod was rejected: Predicate TaintToleration failed: node(s) had taints that the pod didn't tolerate";
    assert_eq!(message.as_deref(), Some(expected));
    kubelet.stop().await;
}

#[tokio::test]
async fn a_label_that_was_just_set_counts() {
    let mut kubelet = Kubelet::start().await;
    kubelet.api.node(node(&json!({"disk": "ssd"}), &json!([])));
    kubelet.apply(wants_ssd);
    kubelet.ensured().await;
    assert_eq!(kubelet.called("GET /api/v1/nodes/n"), 1);
    kubelet.stop().await;
}

#[tokio::test]
async fn no_pod_fails_for_a_node_that_cannot_be_read() {
    let mut kubelet = Kubelet::start().await;
    kubelet.api.node(Value::Null);
    kubelet.apply(wants_ssd);
    kubelet
        .wait("a question", |kubelet| {
            kubelet.called("GET /api/v1/nodes/n") >= 2
        })
        .await;
    assert_eq!(kubelet.said(&["PATCH", "Failed"]), 0);
    assert_eq!(kubelet.called("EnsurePod"), 0);
    kubelet.api.node(node(&json!({"disk": "ssd"}), &json!([])));
    kubelet.ensured().await;
    kubelet.stop().await;
}

#[tokio::test]
async fn a_pod_that_was_accepted_before_stays_whatever_the_labels_are() {
    let mut kubelet = Kubelet::start().await;
    kubelet.running().await;
    kubelet.api.node(node(&json!({}), &json!([])));
    kubelet.apply(|pod| {
        wants_ssd(pod);
        pod["metadata"]["generation"] = 2.into();
    });
    kubelet
        .wait("EnsurePod", |kubelet| kubelet.called("EnsurePod") == 2)
        .await;
    assert_eq!(kubelet.called("GET /api/v1/nodes/n"), 0);
    assert_eq!(kubelet.phase_now().as_deref(), Some("Running"));
    kubelet.stop().await;
}
