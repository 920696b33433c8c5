//! PURE: which Events the changes of the Node bring, with the reasons and messages of a kubelet. Why the Node is not Ready
//! any more is told by the node controller, and the state of the link by [`crate::agent::report`].

use k8s_openapi::api::core::v1::Node;

/// Reason and message of an Event.
pub(super) type News = (&'static str, String);

/// The Node as it was last read.
#[derive(Debug, Default)]
pub(super) struct LastSeen {
    /// Whether the Node was cordoned when it was last read; None before it was read.
    cordoned: Option<bool>,
}

impl LastSeen {
    /// What there is to tell about the Node as just read.
    pub(super) fn news(&mut self, node: &Node) -> Vec<News> {
        let spec = node.spec.as_ref();
        let cordoned = spec.is_some_and(|spec| spec.unschedulable == Some(true));
        match self.cordoned.replace(cordoned) {
            None => vec![("Starting", "Starting kubelet.".to_owned())],
            Some(before) if before == cordoned => Vec::new(),
            Some(_) if cordoned => vec![changed(node, "NodeNotSchedulable")],
            Some(_) => vec![changed(node, "NodeSchedulable")],
        }
    }
}

/// The conditions that the kubelet always writes, and the reason of the Event if the Node did not have them so.
const WRITTEN: [(&str, &str, &str); 4] = [
    ("MemoryPressure", "False", "NodeHasSufficientMemory"),
    ("DiskPressure", "False", "NodeHasNoDiskPressure"),
    ("PIDPressure", "False", "NodeHasSufficientPID"),
    ("Ready", "True", "NodeReady"),
];

/// What there is to tell once the status was written of a Node that was `before`.
pub(super) fn written(before: &Node) -> Vec<News> {
    let conditions = before.status.iter();
    let conditions: Vec<_> = conditions
        .flat_map(|status| status.conditions.iter().flatten())
        .collect();
    let was = |kind: &str, status: &str| {
        conditions
            .iter()
            .any(|one| one.type_ == kind && one.status == status)
    };
    let new = WRITTEN
        .iter()
        .filter(|(kind, status, _)| !was(kind, status));
    new.map(|(_, _, reason)| changed(before, reason)).collect()
}

fn changed(node: &Node, reason: &'static str) -> News {
    let name = node.metadata.name.as_deref().unwrap_or_default();
    (reason, format!("Node {name} status is now: {reason}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(unschedulable: bool, ready: Option<&str>) -> Node {
        let ready = ready.map(|status| json!({"type": "Ready", "status": status}));
        let conditions: Vec<_> = ready.into_iter().collect();
        serde_json::from_value(json!({
            "metadata": {"name": "knoc"},
            "spec": {"unschedulable": unschedulable},
            "status": {"conditions": conditions},
        }))
        .unwrap()
    }

    #[test]
    fn the_start_is_told_once_and_each_cordon() {
        let mut seen = LastSeen::default();
        let mut reasons = |cordoned: bool| -> Vec<_> {
            let news = seen.news(&node(cordoned, None));
            news.into_iter().map(|(reason, _)| reason).collect()
        };
        assert_eq!(reasons(true), ["Starting"]);
        assert!(reasons(true).is_empty());
        assert_eq!(reasons(false), ["NodeSchedulable"]);
        assert_eq!(reasons(true), ["NodeNotSchedulable"]);
    }

    #[test]
    fn a_node_is_told_to_be_what_it_was_not() {
        for before in [None, Some("Unknown"), Some("False")] {
            let news = written(&node(false, before));
            assert_eq!(news.len(), WRITTEN.len());
            let message = "Node knoc status is now: NodeReady".to_owned();
            assert_eq!(news.last(), Some(&("NodeReady", message)));
        }
        let mut all = node(false, Some("True"));
        assert_eq!(written(&all).len(), WRITTEN.len() - 1);
        let ours = WRITTEN.map(|(kind, status, _)| json!({"type": kind, "status": status}));
        let status = json!({"conditions": ours});
        all.status = Some(serde_json::from_value(status).unwrap());
        assert!(written(&all).is_empty());
    }
}
