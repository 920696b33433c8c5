//! What happens to an accepted pod that is changed, deleted or kept by a finalizer.

use super::*;

impl Kubelet {
    /// How many calls of the API server and the agent contain all of `parts`.
    pub(super) fn said(&self, parts: &[&str]) -> usize {
        let calls = self.api.calls().into_iter().chain(self.agent.calls());
        calls
            .filter(|line| parts.iter().all(|word| line.contains(word)))
            .count()
    }

    fn delete_in_api(&mut self) {
        self.apply(|pod| {
            pod["metadata"]["generation"] = 2.into();
            pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
            pod["metadata"]["deletionGracePeriodSeconds"] = 7.into();
        });
    }

    /// Waits until a round has begun that started after this call.
    pub(super) async fn round(&self, marker: &str) {
        self.agent.change(UID, |pod| {
            let sequence = i64::try_from(pod.notes.len()).unwrap() + 1;
            pod.notes.push(pb::PodNote {
                sequence,
                reason: marker.to_owned(),
                at: i64::try_from(Timestamp::now().as_nanosecond()).unwrap(),
                ..pb::PodNote::default()
            });
        });
        self.wait(marker, |kubelet| kubelet.said(&["/events", marker]) == 1)
            .await;
    }

    /// Waits until the pod runs at the agent.
    pub(super) async fn running(&mut self) {
        self.apply(|_| ());
        self.wait("EnsurePod", |kubelet| kubelet.called("EnsurePod") == 1)
            .await;
        self.agent.change(UID, |pod| {
            pod.phase = PodPhase::Running.into();
            let running = pb::Running { started_at: 1 };
            pod.containers = vec![pb::ContainerStatus {
                name: "main".to_owned(),
                state: Some(pb::container_status::State::Running(running)),
                ..pb::ContainerStatus::default()
            }];
        });
        self.phase("Running").await;
    }

    /// Whether the pod is ready, according to its status.
    fn ready(&self) -> Option<String> {
        let status = self.store.by_uid(&uid())?.pod.status.clone()?;
        let mut conditions = status.conditions?.into_iter();
        let ready = conditions.find(|one| one.type_ == "Ready")?;
        Some(ready.status)
    }

    /// The observedGeneration of the status and of each of its conditions.
    fn observed_generations(&self) -> Vec<Option<i64>> {
        let status = self.store.by_uid(&uid()).unwrap().pod.status.clone();
        let status = status.unwrap();
        let conditions = status.conditions.iter().flatten();
        let conditions = conditions.map(|one| one.observed_generation);
        std::iter::once(status.observed_generation)
            .chain(conditions)
            .collect()
    }

    /// The last status that was written before the last DELETE.
    fn written_before_the_last_delete(&self) -> Value {
        let calls = self.api.calls();
        let last = calls.iter().position(|line| line.starts_with("DELETE"));
        let patches = calls[..last.unwrap()].iter().rev();
        let patch = patches
            .filter_map(|line| line.strip_prefix("PATCH /api/v1/namespaces/ns/pods/p/status "))
            .find(|patch| patch.contains("\"phase\""));
        serde_json::from_str(patch.expect("a phase is written first")).unwrap()
    }
}

#[tokio::test]
async fn a_change_that_the_agent_rejects_leaves_the_pod_running() {
    let mut kubelet = Kubelet::start().await;
    kubelet.running().await;
    kubelet
        .agent
        .refuse(knoc_proto::reason::ErrorReason::Unsupported);
    assert_eq!(kubelet.observed_generations(), [Some(1); 6]);
    kubelet.apply(|pod| pod["metadata"]["generation"] = 2.into());
    kubelet
        .wait("an Event", |kubelet| {
            kubelet.said(&["/events", "UnsupportedChange"]) == 1
        })
        .await;
    kubelet.round("Marker").await;
    assert_eq!(kubelet.observed_generations(), [Some(2); 6], "seen");
    kubelet.agent.change(UID, finish);
    kubelet.phase("Succeeded").await;
    assert_eq!(kubelet.called("EnsurePod"), 2, "asked once");
    assert_eq!(kubelet.called("DeletePod"), 0);
    assert_eq!(kubelet.said(&["/events", "UnsupportedChange"]), 1);
    assert_eq!(kubelet.said(&["PATCH", "Failed"]), 0);
    kubelet.stop().await;
}

#[tokio::test]
async fn a_change_that_cannot_be_translated_does_not_reject_the_pod() {
    let mut kubelet = Kubelet::start().await;
    kubelet.running().await;
    kubelet.apply(|pod| {
        pod["metadata"]["generation"] = 2.into();
        pod["metadata"]["annotations"] = json!({"knoc.io/time": "soon"});
    });
    kubelet
        .wait("an Event", |kubelet| {
            kubelet.said(&[
                "/events",
                "UnsupportedChange",
                "the change is not applied, the pod goes on as before: ",
            ]) == 1
        })
        .await;
    kubelet.round("Marker").await;
    kubelet.agent.change(UID, finish);
    kubelet.phase("Succeeded").await;
    assert_eq!(kubelet.said(&["Pod was rejected"]), 0);
    assert_eq!(kubelet.said(&["/events", "UnsupportedChange"]), 1);
    assert_eq!(kubelet.called("EnsurePod"), 1);
    assert_eq!(kubelet.called("DeletePod"), 0);
    kubelet.stop().await;
}

#[tokio::test]
async fn an_annotation_that_changes_alone_is_not_applied_and_an_event_says_so() {
    let mut kubelet = Kubelet::start().await;
    kubelet.apply(|pod| {
        pod["metadata"]["annotations"] = json!({"knoc.io/time": "1h", "knoc.io/qos": "low"});
    });
    kubelet.running().await;
    kubelet.apply(|pod| {
        pod["metadata"]["annotations"]["knoc.io/job-id"] = "12".into();
        pod["metadata"]["annotations"]["example.com/mine"] = "1".into();
    });
    kubelet.round("Marker").await;
    assert_eq!(kubelet.said(&["/events", "UnsupportedChange"]), 0);
    kubelet.apply(|pod| {
        pod["metadata"]["annotations"]["knoc.io/time"] = "2h".into();
        pod["metadata"]["annotations"]["knoc.io/account"] = "mine".into();
    });
    let parts = [
        "/events",
        "UnsupportedChange",
        "metadata.annotations: knoc.io/account, knoc.io/time: read only",
    ];
    kubelet
        .wait("an Event", |kubelet| kubelet.said(&parts) == 1)
        .await;
    assert_eq!(kubelet.called("EnsurePod"), 1);
    kubelet.stop().await;
}

#[tokio::test]
async fn a_pod_deleted_before_it_began_is_failed_first() {
    let mut kubelet = Kubelet::start().await;
    kubelet.delete_in_api();
    kubelet
        .wait("the last DELETE", |kubelet| kubelet.called("DELETE") == 1)
        .await;
    let status = &kubelet.written_before_the_last_delete()["status"];
    assert_eq!(status["phase"], "Failed");
    assert_eq!(status["reason"], "ContainerStatusUnknown");
    assert_eq!(status["observedGeneration"], 2, "a deletion counts too");
    let ended = &status["containerStatuses"][0]["state"]["terminated"];
    assert_eq!(ended["reason"], "ContainerStatusUnknown", "{status}");
    assert_eq!(kubelet.called("EnsurePod"), 0);
    kubelet.stop().await;
}

#[tokio::test]
async fn a_rejected_pod_that_is_being_deleted_is_failed_first() {
    let mut kubelet = Kubelet::start().await;
    kubelet.apply(|pod| {
        pod["spec"]["hostPID"] = true.into();
        pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
    });
    kubelet
        .wait("the last DELETE", |kubelet| kubelet.called("DELETE") == 1)
        .await;
    let status = &kubelet.written_before_the_last_delete()["status"];
    assert_eq!(status["phase"], "Failed");
    assert_eq!(status["reason"], "UnsupportedPodSpec");
    assert_eq!(status["observedGeneration"], 1);
    kubelet.stop().await;
}

#[tokio::test]
async fn a_finalizer_that_stays_brings_no_further_delete() {
    let mut kubelet = Kubelet::start().await;
    kubelet.running().await;
    kubelet.agent.change(UID, |pod| {
        finish(pod);
        pod.deleting = true;
    });
    kubelet.phase("Succeeded").await;
    kubelet.delete_in_api();
    kubelet
        .wait("the last DELETE", |kubelet| kubelet.called("DELETE") == 1)
        .await;
    kubelet.apply(|pod| pod["metadata"]["finalizers"] = json!(["example.com/mine"]));
    kubelet.round("Marker").await;
    kubelet.vanish();
    kubelet
        .wait("ForgetPod", |kubelet| kubelet.called("ForgetPod") == 1)
        .await;
    assert_eq!(kubelet.called("DELETE"), 1);
    kubelet.stop().await;
}

#[tokio::test]
async fn skipped_names_are_reported_once_for_each_set() {
    let mut kubelet = Kubelet::start().await;
    kubelet.api.config_map("odd", json!({"K": "v"}));
    kubelet.apply(|pod| {
        pod["spec"]["containers"][0]["envFrom"] =
            json!([{"prefix": "a=", "configMapRef": {"name": "odd"}}]);
    });
    kubelet.ensured().await;
    kubelet.apply(|pod| pod["metadata"]["generation"] = 2.into());
    kubelet
        .wait("EnsurePod", |kubelet| kubelet.called("EnsurePod") == 2)
        .await;
    kubelet.round("Marker").await;
    assert_eq!(
        kubelet.said(&["/events", "InvalidEnvironmentVariableNames"]),
        1
    );
    kubelet.stop().await;
}

#[tokio::test]
async fn a_condition_of_a_pod_that_somebody_else_overwrote_is_written_again() {
    let mut kubelet = Kubelet::start().await;
    kubelet.running().await;
    kubelet
        .agent
        .change(UID, |pod| pod.containers[0].ready = true);
    let ready = |kubelet: &Kubelet| kubelet.ready().as_deref() == Some("True");
    kubelet.wait("ready", ready).await;
    // As the node controller does if the node was not heard of for a while.
    kubelet.apply(|pod| {
        for condition in pod["status"]["conditions"].as_array_mut().unwrap() {
            if condition["type"] == "Ready" {
                condition["status"] = "False".into();
                condition["reason"] = "NodeNotReady".into();
            }
        }
    });
    kubelet.wait("ready again", ready).await;
    kubelet.stop().await;
}
