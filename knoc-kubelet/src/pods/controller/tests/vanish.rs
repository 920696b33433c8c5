//! Pods that a list lacks, with the watch of pods, the API server and the agent.

use futures::channel::mpsc;
use kube::runtime::watcher::Event;

use super::*;
use crate::pods::watch::{PodWatch, Watched};

/// The watch of pods, with events from the test.
struct Fed {
    events: mpsc::UnboundedSender<kube::runtime::watcher::Result<Event<Watched>>>,
    halted: watch::Receiver<usize>,
}

impl Fed {
    fn start(kubelet: &mut Kubelet) -> Self {
        let (synced, _) = watch::channel(false);
        let (halted_to, halted) = watch::channel(0);
        let (events, fed) = mpsc::unbounded();
        let watch = PodWatch::new(kubelet.context.clone(), synced, halted_to);
        kubelet
            .tasks
            .spawn(watch.follow(fed, kubelet.shutdown.clone()));
        Self { events, halted }
    }

    fn send(&self, event: Event<Watched>) {
        self.events.unbounded_send(Ok(event)).unwrap();
    }

    fn list(&self, pods: &[Value]) {
        self.send(Event::Init);
        for pod in pods {
            self.send(Event::InitApply(watched(pod)));
        }
        self.send(Event::InitDone);
    }
}

fn watched(pod: &Value) -> Watched {
    serde_json::from_value(pod.clone()).unwrap()
}

fn known(kubelet: &Kubelet) -> Value {
    serde_json::to_value(&*kubelet.store.by_uid(&uid()).unwrap().pod).unwrap()
}

#[tokio::test]
async fn a_list_that_lacks_a_pod_ends_its_job_only_when_the_pod_is_gone() {
    let mut kubelet = Kubelet::start().await;
    kubelet.running().await;
    let fed = Fed::start(&mut kubelet);
    fed.list(&[known(&kubelet)]);
    fed.list(&[]);
    kubelet
        .wait("a question", |kubelet| {
            kubelet.called("GET /api/v1/namespaces/ns/pods/p") >= 1
        })
        .await;
    kubelet.round("Marker").await;
    assert_eq!(kubelet.called("DeletePod"), 0, "it is there");
    assert!(kubelet.store.by_uid(&uid()).is_some());
    kubelet.api.no_pod();
    fed.list(&[]);
    kubelet
        .wait("DeletePod", |kubelet| {
            kubelet.called("DeletePod grace 0") == 1
        })
        .await;
    kubelet.stop().await;
}

#[tokio::test]
async fn a_live_deleted_needs_no_question() {
    let mut kubelet = Kubelet::start().await;
    kubelet.running().await;
    let fed = Fed::start(&mut kubelet);
    fed.send(Event::Delete(watched(&known(&kubelet))));
    kubelet
        .wait("DeletePod", |kubelet| {
            kubelet.called("DeletePod grace 0") == 1
        })
        .await;
    assert_eq!(kubelet.called("GET /api/v1/namespaces/ns/pods"), 0);
    kubelet.stop().await;
}

#[tokio::test]
async fn a_list_that_lacks_too_many_ends_no_job() {
    let mut kubelet = Kubelet::start().await;
    let pods: Vec<_> = (0..7)
        .map(|number| {
            let uid = format!("u{number}");
            kubelet.agent.put(pb::PodObserved {
                uid: uid.clone(),
                phase: PodPhase::Running.into(),
                spec_generation: 1,
                ..pb::PodObserved::default()
            });
            json!({
                "metadata": {"name": format!("p{number}"), "namespace": "ns", "uid": uid, "generation": 1},
                "spec": {"containers": [{"name": "main", "image": "busybox"}]},
                "status": {"phase": "Running"},
            })
        })
        .collect();
    kubelet
        .wait("the agent's pods", |kubelet| {
            kubelet.store.observed_uids().len() == 7
        })
        .await;
    let mut fed = Fed::start(&mut kubelet);
    fed.list(&pods);
    fed.list(&[]);
    let halted = fed.halted.wait_for(|jobs| *jobs == 7);
    tokio::time::timeout(SOON, halted).await.unwrap().unwrap();
    assert_eq!(kubelet.called("GET /api/v1/namespaces/ns/pods"), 0);
    // The operator ends one: its job is no longer at risk, so the API server may be asked for its pod.
    kubelet.agent.change("u0", finish);
    let halted = fed.halted.wait_for(|jobs| *jobs == 6);
    tokio::time::timeout(SOON, halted).await.unwrap().unwrap();
    kubelet
        .wait("the ended pod is removed", |kubelet| {
            kubelet.store.by_uid(&"u0".parse().unwrap()).is_none()
        })
        .await;
    assert_eq!(kubelet.store.desired_uids().len(), 6);
    // The next list is complete again.
    fed.list(&pods);
    let halted = fed.halted.wait_for(|jobs| *jobs == 0);
    tokio::time::timeout(SOON, halted).await.unwrap().unwrap();
    assert_eq!(kubelet.called("DeletePod"), 0);
    kubelet.stop().await;
}
