//! L1: the controller between a fake API server and a fake agent, both in this process.

mod agent;
mod api;
mod capabilities;
mod changes;
mod cost;
mod ephemeral;
mod extended;
mod large;
mod live;
mod predicates;
mod pull_secrets;
mod restarted;
mod vanish;

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use knoc_proto::{
    ids::PodUid,
    pb::{self, OutcomeKind, PodPhase},
};
use serde_json::{Value, json};
use tokio::{sync::watch, task::JoinSet};

use crate::{
    agent::{Link, watch::AgentWatch},
    egress::Described,
    node::{Identity, PodIp, allocations::Allocatable, unit::Unit},
    pods::events::Recorder,
};
use agent::FakeAgent;
use api::FakeApi;

use super::{
    super::{
        events::Events, presence::PodLookup, queue::Queue, references::References,
        services::Services, store::Store,
    },
    *,
};

const UID: &str = "0f0f0f0f-0000-4000-8000-000000000001";

fn uid() -> PodUid {
    UID.parse().unwrap()
}
const SOON: Duration = Duration::from_mins(1);

/// A kubelet without Node and Lease: controller, agent watch, Events.
struct Kubelet {
    api: FakeApi,
    agent: FakeAgent,
    store: Store,
    queue: Queue,
    deposed: CancellationToken,
    shutdown: CancellationToken,
    tasks: JoinSet<()>,
    context: Arc<Context>,
    version: u64,
}

/// The node `n` with room for ten pods.
fn identity() -> Identity {
    Identity {
        name: "n".to_owned(),
        internal_ip: "127.0.0.1".to_owned(),
        port: 10250,
        labels: BTreeMap::new(),
        pods: 10,
        queue_factor: 10,
        cluster_domain: "cluster.local".to_owned(),
        pod_ip: PodIp::None,
        pod_range: None,
        taint: true,
        websockets: true,
    }
}

impl Kubelet {
    async fn start() -> Self {
        Self::start_with(FakeAgent::start()).await
    }

    async fn start_with(agent: FakeAgent) -> Self {
        let (api, client) = FakeApi::start();
        let handle = agent.handle();
        let (link_to, link) = watch::channel(Link::never());
        let (capacity_to, capacity) = watch::channel(None);
        let (_, listed) = watch::channel(true);
        let (events, notes) = Events::channel();
        let services = Services::default();
        services.no_services();
        let references = References::default();
        let (store, queue) = (Store::default(), Queue::default());
        let (shutdown, deposed) = (CancellationToken::new(), CancellationToken::new());
        let context = Arc::new(Context {
            api: ApiServer {
                client: client.clone(),
                pod_lookup: PodLookup::Get,
                events,
                services,
                references: references.clone(),
            },
            site: Site {
                agent: handle.clone(),
                link: link.clone(),
                network: Described::default(),
            },
            node: Arc::new(Unit::new(identity(), capacity)),
            pods: KnownPods {
                store: store.clone(),
                queue: queue.clone(),
                listed,
            },
            process: Process::new(Timestamp::now(), deposed.clone()),
        });
        let mut tasks = JoinSet::new();
        let watch = AgentWatch::new(handle, store.clone(), queue.clone(), link_to, capacity_to);
        tasks.spawn(watch.run(shutdown.clone()));
        tasks.spawn(references.run(client.clone(), queue.clone(), shutdown.clone()));
        tasks.spawn(Recorder::new(client, "knoc-t").run(notes, shutdown.clone()));
        tasks.spawn(Controller::new(context.clone()).run(shutdown.clone()));
        let up = link.clone().wait_for(Link::is_up).await.map(drop);
        up.unwrap();
        Self {
            api,
            agent,
            store,
            queue,
            deposed,
            shutdown,
            tasks,
            context,
            version: 0,
        }
    }

    /// Does what the watch of pods does when the pod changes.
    fn apply(&mut self, change: impl FnOnce(&mut Value)) {
        self.version += 1000;
        let mut json = json!({
            "metadata": {"name": "p", "namespace": "ns", "uid": UID, "generation": 1},
            "spec": {
                "nodeName": "knoc-t", "restartPolicy": "Never", "terminationGracePeriodSeconds": 7,
                "containers": [{"name": "main", "image": "busybox"}],
                "volumes": [{"name": "token", "projected": {"sources": [
                    {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}},
                    {"configMap": {"name": "kube-root-ca.crt"}},
                ]}}],
            },
            "status": {"phase": "Pending"},
        });
        if let Some(known) = self.store.by_uid(&uid()) {
            json = serde_json::to_value(&*known.pod).unwrap();
        }
        json["metadata"]["resourceVersion"] = self.version.to_string().into();
        change(&mut json);
        self.api.pod(&json);
        let findings = knoc_translate::verdict::judge(&json);
        let pod: Pod = serde_json::from_value(json).unwrap();
        let uid = uid();
        self.store.set_desired(&uid, pod.into(), findings.into());
        self.queue.push(&uid);
    }

    fn vanish(&self) {
        self.store.remove_desired(&uid());
        self.queue.push(&uid());
    }

    async fn wait(&self, what: &str, reached: impl Fn(&Self) -> bool) {
        let waited = tokio::time::timeout(SOON, async {
            while !reached(self) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        assert!(
            waited.await.is_ok(),
            "not reached: {what}\napi: {:#?}\nagent: {:#?}",
            self.api.calls(),
            self.agent.calls()
        );
    }

    /// The agent was sent the pod, once.
    async fn ensured(&self) {
        self.wait("EnsurePod", |kubelet| kubelet.called("EnsurePod") == 1)
            .await;
    }

    async fn phase(&self, phase: &str) {
        self.wait(phase, |kubelet| {
            kubelet.phase_now().as_deref() == Some(phase)
        })
        .await;
    }

    fn phase_now(&self) -> Option<String> {
        self.store.by_uid(&uid())?.pod.status.clone()?.phase
    }

    fn called(&self, call: &str) -> usize {
        let calls = self.api.calls().into_iter().chain(self.agent.calls());
        calls.filter(|line| line.starts_with(call)).count()
    }

    async fn stop(mut self) {
        self.shutdown.cancel();
        while self.tasks.join_next().await.is_some() {}
    }
}

fn finish(pod: &mut pb::PodObserved) {
    pod.phase = PodPhase::Finished.into();
    let kind = OutcomeKind::Succeeded.into();
    pod.outcome = Some(pb::Outcome {
        kind,
        ..pb::Outcome::default()
    });
}

#[tokio::test]
async fn a_pod_from_the_watch_to_succeeded_and_away() {
    let mut kubelet = Kubelet::start().await;
    kubelet.apply(|_| ());
    kubelet.ensured().await;
    let values = kubelet.agent.values();
    let files = &values.files[0].files;
    assert_eq!(
        files
            .iter()
            .map(|file| file.path.as_str())
            .collect::<Vec<_>>(),
        ["ca.crt", "token"]
    );
    assert!(values.not_after > 0);
    kubelet
        .agent
        .change(UID, |pod| pod.phase = PodPhase::Running.into());
    kubelet.agent.change(UID, finish);
    kubelet.phase("Succeeded").await;
    assert_eq!(kubelet.called("EnsurePod"), 1, "the same pod is sent once");
    assert_eq!(kubelet.called("DeletePod"), 0);
    kubelet.apply(|pod| {
        pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
        pod["metadata"]["deletionGracePeriodSeconds"] = 7.into();
    });
    kubelet
        .wait("the last DELETE", |kubelet| kubelet.called("DELETE") == 1)
        .await;
    let last = kubelet
        .api
        .calls()
        .into_iter()
        .find(|line| line.starts_with("DELETE"))
        .unwrap();
    assert!(last.contains(&format!("\"uid\":\"{UID}\"")), "{last}");
    assert!(last.contains("\"gracePeriodSeconds\":0"), "{last}");
    kubelet.vanish();
    kubelet
        .wait("ForgetPod", |kubelet| kubelet.called("ForgetPod") == 1)
        .await;
    kubelet.stop().await;
}

#[tokio::test]
async fn a_rejected_pod_fails_with_all_reasons_and_no_job() {
    let mut kubelet = Kubelet::start().await;
    kubelet.apply(|pod| {
        pod["spec"]["hostPID"] = true.into();
        pod["spec"]["hostIPC"] = true.into();
    });
    kubelet.phase("Failed").await;
    let status = kubelet
        .store
        .by_uid(&uid())
        .unwrap()
        .pod
        .status
        .clone()
        .unwrap();
    assert_eq!(status.reason.as_deref(), Some("UnsupportedPodSpec"));
    let message = status.message.unwrap();
    assert!(
        message.contains("hostPID") && message.contains("hostIPC"),
        "{message}"
    );
    kubelet
        .wait("an Event", |kubelet| {
            kubelet.called("POST /api/v1/namespaces/ns/events") == 1
        })
        .await;
    assert_eq!(kubelet.called("EnsurePod"), 0);
    kubelet.stop().await;
}

#[tokio::test]
async fn a_deleted_pod_is_stopped_and_released_only_after_its_job_has_ended() {
    let mut kubelet = Kubelet::start().await;
    kubelet.apply(|_| ());
    kubelet.ensured().await;
    kubelet
        .agent
        .change(UID, |pod| pod.phase = PodPhase::Running.into());
    kubelet.apply(|pod| {
        pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
        pod["metadata"]["deletionGracePeriodSeconds"] = 7.into();
    });
    kubelet
        .wait("DeletePod", |kubelet| {
            kubelet.called("DeletePod grace 7") == 1
        })
        .await;
    assert_eq!(kubelet.called("DELETE"), 0, "the job lives");
    kubelet.apply(|pod| pod["metadata"]["deletionGracePeriodSeconds"] = 2.into());
    kubelet
        .wait("a shorter grace", |kubelet| {
            kubelet.called("DeletePod grace 2") == 1
        })
        .await;
    kubelet.agent.change(UID, finish);
    kubelet
        .wait("the last DELETE", |kubelet| kubelet.called("DELETE") == 1)
        .await;
    kubelet.stop().await;
}

#[tokio::test]
async fn a_status_that_fails_is_retried_and_delays_no_deletion() {
    // Tries, and how soon they are too many: the first pauses are 0.25, 0.5 and 1 s, less a quarter.
    const TRIES: usize = 5;
    const TOO_SOON: Duration = Duration::from_millis(500);
    let mut kubelet = Kubelet::start().await;
    kubelet.apply(|_| ());
    kubelet.ensured().await;
    kubelet.api.refuse_statuses();
    let (before, began) = (kubelet.called("PATCH"), tokio::time::Instant::now());
    // Due at once, but only after the status.
    kubelet.agent.change(UID, |pod| {
        pod.phase = PodPhase::Running.into();
        pod.values_wanted = true;
    });
    kubelet
        .wait("the status is tried again", |kubelet| {
            kubelet.called("PATCH") >= before + TRIES
        })
        .await;
    assert!(began.elapsed() >= TOO_SOON, "{:?}", began.elapsed());
    kubelet.apply(|pod| {
        pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
        pod["metadata"]["deletionGracePeriodSeconds"] = 7.into();
    });
    kubelet
        .wait("DeletePod", |kubelet| {
            kubelet.called("DeletePod grace 7") == 1
        })
        .await;
    kubelet.stop().await;
}

#[tokio::test]
async fn a_pod_that_vanishes_takes_its_job_with_it_at_once() {
    let mut kubelet = Kubelet::start().await;
    kubelet.apply(|_| ());
    kubelet.ensured().await;
    kubelet.vanish();
    kubelet
        .wait("DeletePod", |kubelet| {
            kubelet.called("DeletePod grace 0") == 1
        })
        .await;
    kubelet.agent.change(UID, finish);
    kubelet
        .wait("ForgetPod", |kubelet| kubelet.called("ForgetPod") == 1)
        .await;
    kubelet.stop().await;
}

#[tokio::test]
async fn a_missing_config_map_holds_the_pod_until_it_is_there() {
    let mut kubelet = Kubelet::start().await;
    kubelet.apply(|pod| {
        pod["spec"]["containers"][0]["envFrom"] = json!([{"configMapRef": {"name": "later"}}]);
    });
    let waits = |kubelet: &Kubelet| {
        let view = kubelet.store.by_uid(&uid())?;
        let statuses = view.pod.status.as_ref()?.container_statuses.as_ref()?;
        statuses[0].state.as_ref()?.waiting.as_ref()?.reason.clone()
    };
    kubelet
        .wait("CreateContainerConfigError", |kubelet| {
            waits(kubelet).as_deref() == Some("CreateContainerConfigError")
        })
        .await;
    assert_eq!(kubelet.called("EnsurePod"), 0);
    // Each round asks for it again; only the first one records an Event.
    let asked = |kubelet: &Kubelet| {
        let calls = kubelet.api.calls();
        calls
            .iter()
            .filter(|call| call.contains("/configmaps/later "))
            .count()
    };
    kubelet.wait("retries", |kubelet| asked(kubelet) >= 3).await;
    let told = kubelet.api.calls();
    let told = told.iter().filter(|call| call.contains("/events"));
    assert_eq!(told.count(), 1);
    kubelet.api.config_map("later", json!({"K": "v"}));
    kubelet.ensured().await;
    kubelet.stop().await;
}

#[tokio::test]
async fn a_known_pod_is_adopted_and_one_that_ran_is_never_run_again() {
    let mut kubelet = Kubelet::start().await;
    kubelet.agent.put(pb::PodObserved {
        uid: UID.to_owned(),
        phase: PodPhase::Running.into(),
        spec_generation: 1,
        ..pb::PodObserved::default()
    });
    kubelet
        .wait("the agent's pod", |kubelet| {
            kubelet.store.observed(&uid()).is_some()
        })
        .await;
    kubelet.apply(|pod| pod["status"]["phase"] = "Running".into());
    kubelet
        .wait("a status", |kubelet| kubelet.called("PATCH") >= 1)
        .await;
    assert_eq!(kubelet.called("EnsurePod"), 0, "adopted");
    kubelet.agent.remove(UID);
    kubelet.phase("Failed").await;
    assert_eq!(kubelet.called("EnsurePod"), 0, "never twice");
    kubelet.stop().await;
}

#[tokio::test]
async fn a_newer_leader_ends_this_one() {
    let mut kubelet = Kubelet::start().await;
    kubelet
        .agent
        .refuse(knoc_proto::reason::ErrorReason::StaleLeader);
    kubelet.apply(|_| ());
    kubelet
        .wait("deposed", |kubelet| kubelet.deposed.is_cancelled())
        .await;
    kubelet.stop().await;
}

/// Fills the node with ten pods.
fn fill(kubelet: &Kubelet) {
    let mut allocations = kubelet.context.node.allocations();
    for number in 0..10 {
        allocations.hold(&format!("other-{number}").parse().unwrap(), BTreeMap::new());
    }
}

#[tokio::test]
async fn a_pod_that_does_not_fit_fails_as_on_any_node() {
    let mut kubelet = Kubelet::start().await;
    fill(&kubelet);
    kubelet.apply(|_| ());
    kubelet.phase("Failed").await;
    let status = kubelet.store.by_uid(&uid()).unwrap().pod.status.clone();
    let status = status.unwrap();
    assert_eq!(status.reason.as_deref(), Some("OutOfpods"));
    assert_eq!(
        status.message.as_deref(),
        Some(
            "Pod was rejected: Node didn't have enough resource: pods, requested: 1, used: 10, capacity: 10"
        )
    );
    assert_eq!(kubelet.called("EnsurePod"), 0);
    kubelet.stop().await;
}

#[tokio::test]
async fn a_pod_that_was_accepted_before_needs_no_room() {
    let mut kubelet = Kubelet::start().await;
    fill(&kubelet);
    kubelet.agent.put(pb::PodObserved {
        uid: UID.to_owned(),
        phase: PodPhase::Queued.into(),
        spec_generation: 1,
        ..pb::PodObserved::default()
    });
    kubelet
        .wait("the agent's pod", |kubelet| {
            kubelet.store.observed(&uid()).is_some()
        })
        .await;
    kubelet.apply(|_| ());
    kubelet
        .wait("a status", |kubelet| kubelet.called("PATCH") >= 1)
        .await;
    assert_eq!(kubelet.phase_now().as_deref(), Some("Pending"));
    kubelet.stop().await;
}

#[tokio::test]
async fn a_pod_that_ended_makes_room_for_the_next() {
    let mut kubelet = Kubelet::start().await;
    kubelet.apply(|_| ());
    kubelet.ensured().await;
    fill(&kubelet);
    let short = |kubelet: &Kubelet| {
        let next = "next".parse().unwrap();
        let allocatable = Allocatable::of(None, 11, 10);
        let mut allocations = kubelet.context.node.allocations();
        allocations
            .allocate(&next, BTreeMap::new(), &allocatable)
            .is_err()
    };
    assert!(short(&kubelet), "ten others and this one");
    kubelet.agent.change(UID, finish);
    kubelet.phase("Succeeded").await;
    kubelet.wait("room", |kubelet| !short(kubelet)).await;
    kubelet.stop().await;
}
