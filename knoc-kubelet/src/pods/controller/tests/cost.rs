//! What the life of a pod costs the API server.

use super::*;
use pb::container_status::State;

/// How many patches and how many Events a normal life may cost.
const MOST: usize = 4;

impl Kubelet {
    /// The agent reports a change, which reaches the kubelet before this returns.
    async fn observes(&self, change: impl FnOnce(&mut pb::PodObserved)) {
        let generation = |kubelet: &Self| Some(kubelet.store.observed(&uid())?.generation);
        let before = generation(self);
        self.agent.change(UID, change);
        self.wait("the change", |kubelet| generation(kubelet) > before)
            .await;
    }

    /// The reasons of the Events that were created.
    fn reasons(&self) -> Vec<String> {
        let calls = self.api.calls();
        let events = calls.iter().filter_map(|line| {
            let (_, body) = line.split_once("/events ")?;
            let event: Value = serde_json::from_str(body).unwrap();
            Some(event["reason"].as_str().unwrap().to_owned())
        });
        let mut reasons: Vec<_> = events.collect();
        reasons.sort();
        reasons
    }
}

fn note(pod: &mut pb::PodObserved, container: &str, reason: &str) {
    pod.notes.push(pb::PodNote {
        sequence: i64::try_from(pod.notes.len()).unwrap() + 1,
        container: container.to_owned(),
        reason: reason.to_owned(),
        message: format!("{reason} of job 12"),
        at: i64::try_from(Timestamp::now().as_nanosecond()).unwrap(),
        ..pb::PodNote::default()
    });
}

fn main_container(pod: &mut pb::PodObserved, state: State) {
    pod.containers = vec![pb::ContainerStatus {
        name: "main".to_owned(),
        ready: matches!(state, State::Running(_)),
        container_id: "apptainer://12.main.0".to_owned(),
        state: Some(state),
        ..pb::ContainerStatus::default()
    }];
}

fn queued(pod: &mut pb::PodObserved, reason: &str) {
    pod.phase = PodPhase::Queued.into();
    pod.job = Some(pb::Job {
        id: "12".to_owned(),
        reason: reason.to_owned(),
        ..pb::Job::default()
    });
}

#[tokio::test]
async fn a_normal_life_costs_four_patches_and_four_events() {
    let mut kubelet = Kubelet::start().await;
    kubelet.apply(|_| ());
    kubelet.ensured().await;
    kubelet
        .observes(|pod| {
            pod.phase = PodPhase::Staging.into();
            note(pod, "main", "Pulled");
        })
        .await;
    kubelet
        .observes(|pod| {
            queued(pod, "None");
            note(pod, "", "SlurmJobSubmitted");
        })
        .await;
    for reason in ["Priority", "Resources"] {
        kubelet
            .observes(|pod| {
                queued(pod, reason);
                note(pod, "", "SlurmJobPending");
            })
            .await;
    }
    kubelet
        .wait("the first status", |kubelet| kubelet.called("PATCH") == 1)
        .await;
    kubelet
        .observes(|pod| {
            pod.phase = PodPhase::Running.into();
            pod.host_ip = "10.0.0.7".to_owned();
            note(pod, "", "SlurmJobStarted");
        })
        .await;
    let started_at = i64::try_from(Timestamp::now().as_nanosecond()).unwrap();
    kubelet
        .observes(|pod| main_container(pod, State::Running(pb::Running { started_at })))
        .await;
    kubelet.phase("Running").await;
    let ended = pb::Terminated {
        started_at,
        finished_at: started_at + 1,
        ..pb::Terminated::default()
    };
    kubelet
        .observes(|pod| main_container(pod, State::Terminated(ended)))
        .await;
    kubelet.observes(finish).await;
    kubelet.phase("Succeeded").await;
    let patches = kubelet.said(&["PATCH", "/status "]);
    assert!(patches <= MOST, "{:#?}", kubelet.api.calls());
    let wanted = ["Created", "Pulled", "SlurmJobStarted", "Started"];
    assert_eq!(wanted.len(), MOST);
    kubelet
        .wait("the Events", |kubelet| kubelet.reasons().len() >= MOST)
        .await;
    assert_eq!(kubelet.reasons(), wanted);
    kubelet.stop().await;
}

/// Whichever it is. This one is awaited, so a patch of it alone would follow at once.
#[tokio::test]
async fn a_field_that_the_api_server_does_not_store_costs_no_patch_of_its_own() {
    let mut kubelet = Kubelet::start().await;
    kubelet.api.does_not_know("phase");
    kubelet.apply(|_| ());
    kubelet.ensured().await;
    let started_at = i64::try_from(Timestamp::now().as_nanosecond()).unwrap();
    kubelet
        .observes(|pod| {
            pod.phase = PodPhase::Running.into();
            main_container(pod, State::Running(pb::Running { started_at }));
        })
        .await;
    let running = ["PATCH", "/status ", "\"phase\":\"Running\""];
    kubelet
        .wait("Running", |kubelet| kubelet.said(&running) > 0)
        .await;
    // The round of the first one ends before that of the second one begins.
    kubelet.round("FirstMarker").await;
    kubelet.round("SecondMarker").await;
    assert_eq!(kubelet.said(&running), 1, "{:#?}", kubelet.api.calls());
    kubelet.stop().await;
}

/// A container that ends again and again costs no more Events than one that was restarted once.
#[tokio::test]
async fn the_restarts_of_a_container_are_counted_in_one_event() {
    let mut kubelet = Kubelet::start().await;
    kubelet.apply(|_| ());
    kubelet.ensured().await;
    for (attempt, written) in (0..4).zip([2, 4, 6, 8]) {
        let started_at = i64::try_from(Timestamp::now().as_nanosecond()).unwrap();
        kubelet
            .observes(|pod| {
                pod.phase = PodPhase::Running.into();
                main_container(pod, State::Running(pb::Running { started_at }));
                pod.containers[0].restart_count = attempt;
                pod.containers[0].container_id = format!("apptainer://12.main.{attempt}");
            })
            .await;
        kubelet
            .wait("Created and Started", |kubelet| {
                kubelet.said(&["/events"]) == written
            })
            .await;
    }
    assert_eq!(kubelet.reasons().len(), 4, "{:#?}", kubelet.api.calls());
    for count in ["\"count\":2", "\"count\":3"] {
        assert_eq!(kubelet.said(&["PATCH", "/events/", count]), 2, "{count}");
    }
    kubelet.stop().await;
}

#[tokio::test]
async fn the_start_of_a_job_is_published_although_no_container_starts() {
    let mut kubelet = Kubelet::start().await;
    kubelet.apply(|_| ());
    kubelet.ensured().await;
    kubelet.observes(|pod| queued(pod, "Priority")).await;
    kubelet
        .wait("the first status", |kubelet| kubelet.called("PATCH") == 1)
        .await;
    kubelet
        .observes(|pod| {
            pod.phase = PodPhase::Running.into();
            pod.host_ip = "10.0.0.7".to_owned();
        })
        .await;
    assert_eq!(kubelet.said(&["PATCH", "10.0.0.7"]), 0, "it waits");
    kubelet
        .wait("hostIP", |kubelet| {
            kubelet.said(&["PATCH", "10.0.0.7", "PodReadyToStartContainers"]) == 1
        })
        .await;
    kubelet.stop().await;
}

/// A queue that lasts is worth an Event, and so is what never ends by itself.
#[tokio::test]
async fn a_note_about_the_queue_is_recorded_if_nothing_replaces_it() {
    let mut kubelet = Kubelet::start().await;
    kubelet.apply(|_| ());
    kubelet.ensured().await;
    kubelet
        .observes(|pod| {
            queued(pod, "Priority");
            note(pod, "", "SlurmJobSubmitted");
            note(pod, "", "SlurmRequestChanged");
            note(pod, "", "SlurmJobPending");
        })
        .await;
    kubelet
        .wait("the changed request", |kubelet| {
            kubelet.reasons() == ["SlurmRequestChanged"]
        })
        .await;
    // The pod ends before its job starts: nothing is to come that replaces the note.
    kubelet.observes(finish).await;
    kubelet
        .wait("the queue", |kubelet| {
            kubelet.reasons() == ["SlurmJobPending", "SlurmRequestChanged"]
        })
        .await;
    kubelet.stop().await;
}
