//! Changes of the objects to which a pod refers.

use super::*;

impl Kubelet {
    /// A pod with a volume of the ConfigMap `live` that the agent has, once the ConfigMap is watched.
    async fn with_live_volume(&mut self) {
        self.api.config_map("live", json!({"key": "old"}));
        self.apply(|pod| {
            let volume = json!({"name": "live", "configMap": {"name": "live"}});
            pod["spec"]["volumes"].as_array_mut().unwrap().push(volume);
        });
        self.wait("EnsurePod", |kubelet| kubelet.called("EnsurePod") == 1)
            .await;
        self.agent
            .change(UID, |pod| pod.phase = PodPhase::Running.into());
    }

    async fn watched(&self) {
        self.wait("a watch", |kubelet| {
            kubelet.said(&["WATCH", "metadata.name%3Dlive"]) == 1
        })
        .await;
    }

    /// What the agent has of the volume `live`.
    fn live(&self) -> String {
        let values = self.agent.values();
        let volume = values.files.iter().find(|files| files.volume == "live");
        let file = volume.and_then(|volume| volume.files.first());
        file.map_or_else(String::new, |file| {
            String::from_utf8_lossy(&file.data).into_owned()
        })
    }
}

#[tokio::test]
async fn a_changed_config_map_reaches_the_agent_at_once() {
    let mut kubelet = Kubelet::start().await;
    kubelet.with_live_volume().await;
    kubelet.watched().await;
    assert_eq!(kubelet.live(), "old");
    let asked = |kubelet: &Kubelet| kubelet.said(&["GET", "/configmaps/live "]);
    assert_eq!(asked(&kubelet), 1, "what was read is no change");
    kubelet.api.config_map("live", json!({"key": "new"}));
    kubelet
        .wait("the new contents", |kubelet| kubelet.live() == "new")
        .await;
    assert_eq!(asked(&kubelet), 2);
    assert_eq!(kubelet.called("UpdateValues"), 1);
    kubelet.stop().await;
}

#[tokio::test]
async fn a_volume_whose_object_is_gone_keeps_its_files_and_says_so() {
    let mut kubelet = Kubelet::start().await;
    kubelet.with_live_volume().await;
    kubelet.watched().await;
    kubelet.api.no_config_map("live");
    kubelet
        .wait("an Event", |kubelet| {
            kubelet.said(&["/events", "FailedMount", "keeps its present files"]) == 1
        })
        .await;
    assert_eq!(kubelet.called("UpdateValues"), 0);
    kubelet.api.config_map("live", json!({"key": "back"}));
    kubelet
        .wait("the object is back", |kubelet| kubelet.live() == "back")
        .await;
    kubelet.stop().await;
}

/// No watch reports an object that was deleted before the watch began.
#[tokio::test]
async fn an_object_that_is_deleted_before_its_first_watch_is_missed() {
    let mut kubelet = Kubelet::start().await;
    kubelet.api.read_once("live");
    kubelet.with_live_volume().await;
    kubelet
        .wait("an Event", |kubelet| {
            kubelet.said(&["/events", "FailedMount", "keeps its present files"]) == 1
        })
        .await;
    assert_eq!(kubelet.called("UpdateValues"), 0);
    kubelet.stop().await;
}

#[tokio::test]
async fn values_that_the_agent_rejects_are_reported_and_not_repeated() {
    let mut kubelet = Kubelet::start().await;
    kubelet.with_live_volume().await;
    kubelet.watched().await;
    kubelet
        .agent
        .refuse(knoc_proto::reason::ErrorReason::InvalidSpec);
    kubelet.api.config_map("live", json!({"key": "too much"}));
    kubelet
        .wait("an Event", |kubelet| {
            kubelet.said(&["/events", "FailedMount", "refused"]) == 1
        })
        .await;
    kubelet.round("Marker").await;
    assert_eq!(kubelet.called("UpdateValues"), 1);
    kubelet.stop().await;
}

#[tokio::test]
async fn a_pod_that_has_ended_is_watched_no_longer() {
    let mut kubelet = Kubelet::start().await;
    kubelet.with_live_volume().await;
    kubelet.watched().await;
    kubelet.agent.change(UID, finish);
    kubelet.phase("Succeeded").await;
    let references = &kubelet.context.api.references;
    let level = references.level();
    kubelet.api.config_map("live", json!({"key": "new"}));
    kubelet.round("Marker").await;
    assert_eq!(references.changed_since(&uid(), level), None);
    assert_eq!(kubelet.called("UpdateValues"), 0);
    kubelet.stop().await;
}

#[tokio::test]
async fn a_pod_that_was_rejected_is_watched_no_longer() {
    let mut kubelet = Kubelet::start().await;
    kubelet.api.config_map("live", json!({"key": "old"}));
    kubelet
        .agent
        .refuse(knoc_proto::reason::ErrorReason::PermissionDenied);
    kubelet.apply(|pod| {
        let volume = json!({"name": "live", "configMap": {"name": "live"}});
        pod["spec"]["volumes"].as_array_mut().unwrap().push(volume);
    });
    kubelet.phase("Failed").await;
    let status = kubelet.store.by_uid(&uid()).unwrap().pod.status.clone();
    kubelet.apply(|pod| pod["status"] = serde_json::to_value(&status).unwrap());
    kubelet
        .wait("nothing is watched", |kubelet| {
            let references = &kubelet.context.api.references;
            references.follows_nothing()
        })
        .await;
    kubelet.stop().await;
}

/// Without the right to watch, the objects are read again from time to time.
#[tokio::test]
async fn a_denied_watch_leaves_the_pod_to_the_period() {
    let mut kubelet = Kubelet::start().await;
    kubelet.api.deny_watches();
    kubelet.with_live_volume().await;
    let denied = |kubelet: &Kubelet| kubelet.said(&["GET", "/configmaps "]);
    kubelet
        .wait("a denied watch", |kubelet| denied(kubelet) == 1)
        .await;
    assert!(!kubelet.context.api.references.all_watched(&uid()));
    kubelet.stop().await;
}
