//! Pods whose ConfigMaps take much of the kubelet's memory.

use crate::pods::resolve;

use super::*;

impl Kubelet {
    /// A pod with a volume that has all keys of this many ConfigMaps of half a MiB.
    fn with_large(&mut self, count: usize) {
        let names: Vec<_> = (0..count).map(|n| format!("large{n}")).collect();
        for name in &names {
            let data = json!({ name.as_str(): "x".repeat(512 << 10) });
            self.api.config_map(name, data);
        }
        let sources = names
            .iter()
            .map(|name| json!({"configMap": {"name": name}}));
        let sources: Vec<_> = sources.collect();
        self.apply(|pod| {
            pod["spec"]["volumes"] = json!([{"name": "large", "projected": {"sources": sources}}]);
        });
    }

    /// Why the container of the pod waits.
    fn waits(&self, for_: &str) -> bool {
        let why = || {
            let view = self.store.by_uid(&uid())?;
            let statuses = view.pod.status.as_ref()?.container_statuses.as_ref()?;
            statuses[0]
                .state
                .as_ref()?
                .waiting
                .as_ref()?
                .message
                .clone()
        };
        why().is_some_and(|why| why.contains(for_))
    }
}

/// One test, because all room is that of the process.
#[tokio::test]
async fn a_pod_waits_for_memory_that_others_take_and_one_that_needs_too_much_says_so() {
    let room = resolve::take_all().await;
    let mut kubelet = Kubelet::start().await;
    kubelet.with_large(4);
    kubelet
        .wait("it waits for room", |kubelet| {
            kubelet.waits("no room yet for the ConfigMaps")
        })
        .await;
    assert_eq!(kubelet.called("EnsurePod"), 0);
    assert_eq!(kubelet.said(&["/events", "no room yet"]), 0);
    drop(room);
    kubelet.ensured().await;
    kubelet.stop().await;

    let mut kubelet = Kubelet::start().await;
    kubelet.with_large(60);
    kubelet
        .wait("an Event", |kubelet| {
            kubelet.said(&["/events", "FailedMount", "more than 20 MiB"]) == 1
        })
        .await;
    kubelet
        .wait("it says so", |kubelet| kubelet.waits("more than 20 MiB"))
        .await;
    assert_eq!(kubelet.called("EnsurePod"), 0);
    kubelet.with_large(4);
    kubelet.ensured().await;
    // Nothing that was read is kept.
    assert!(resolve::take_all().await.is_some());
    kubelet.stop().await;
}
