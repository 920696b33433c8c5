//! Ephemeral containers that lack what their variables refer to.

use super::*;

/// Adds `debug`, which needs the ConfigMap `later`, and `look`, which needs nothing.
fn debugged(pod: &mut Value) {
    pod["metadata"]["generation"] = 2.into();
    pod["spec"]["activeDeadlineSeconds"] = 600.into();
    let later = json!([{"configMapRef": {"name": "later"}}]);
    pod["spec"]["ephemeralContainers"] = json!([
        {"name": "debug", "image": "ann/tools", "envFrom": later},
        {"name": "look", "image": "ann/tools"},
    ]);
}

impl Kubelet {
    fn ephemeral(&self) -> Vec<String> {
        let all = self.agent.spec().ephemeral_containers.into_iter();
        all.map(|one| one.name).collect()
    }

    /// Two containers are added, of which one lacks what its variables refer to; waits until the other one was sent.
    async fn debug(&mut self) {
        self.apply(debugged);
        self.wait("the other container", |kubelet| {
            kubelet.called("EnsurePod") == 2
        })
        .await;
    }

    fn runs_ephemeral(&self, name: &str) {
        self.agent.change(UID, |pod| {
            let mut all = pod.ephemeral_containers.iter_mut();
            let one = all.find(|one| one.name == name).unwrap();
            one.state = Some(pb::container_status::State::Running(pb::Running::default()));
        });
    }
}

#[tokio::test]
async fn an_ephemeral_container_that_lacks_something_holds_back_nothing_else() {
    let mut kubelet = Kubelet::start().await;
    kubelet.running().await;
    kubelet.debug().await;
    assert_eq!(kubelet.ephemeral(), ["look"]);
    assert_eq!(kubelet.agent.spec().generation, 2);
    assert_eq!(kubelet.agent.spec().active_deadline_seconds, 600);
    let waits = |kubelet: &Kubelet| {
        let view = kubelet.store.by_uid(&uid())?;
        let statuses = view
            .pod
            .status
            .as_ref()?
            .ephemeral_container_statuses
            .clone()?;
        let state = statuses
            .into_iter()
            .find(|one| one.name == "debug")?
            .state?;
        state.waiting?.reason
    };
    kubelet
        .wait("CreateContainerConfigError", |kubelet| {
            waits(kubelet).as_deref() == Some("CreateContainerConfigError")
        })
        .await;
    kubelet.api.config_map("later", json!({"K": "v"}));
    kubelet
        .wait("both containers", |kubelet| {
            kubelet.ephemeral() == ["debug", "look"]
        })
        .await;
    assert_eq!(kubelet.called("EnsurePod"), 3);
    let values = kubelet.agent.values();
    let env = values
        .ephemeral_env
        .iter()
        .find(|env| env.container == "debug");
    assert_eq!(env.unwrap().vars[0].name, "K");
    kubelet.stop().await;
}

#[tokio::test]
async fn an_ephemeral_container_that_the_agent_could_not_take_is_sent_again() {
    let mut kubelet = Kubelet::start().await;
    kubelet.running().await;
    kubelet.debug().await;
    kubelet
        .agent
        .refuse(knoc_proto::reason::ErrorReason::Internal);
    kubelet.api.config_map("later", json!({"K": "v"}));
    kubelet
        .wait("a call that fails", |kubelet| {
            kubelet.called("EnsurePod") > 2
        })
        .await;
    kubelet.agent.refuse_nothing();
    kubelet
        .wait("both containers", |kubelet| {
            kubelet.ephemeral() == ["debug", "look"]
        })
        .await;
    kubelet.stop().await;
}

#[tokio::test]
async fn what_is_mapped_in_a_new_ephemeral_container_is_told_once() {
    let mut kubelet = Kubelet::start().await;
    kubelet.running().await;
    let traces = json!({"capabilities": {"add": ["SYS_PTRACE"]}});
    kubelet.apply(|pod| {
        pod["metadata"]["generation"] = 2.into();
        pod["spec"]["ephemeralContainers"] =
            json!([{"name": "look", "image": "ann/tools", "securityContext": traces}]);
    });
    let told = |kubelet: &Kubelet| {
        let path = "spec.ephemeralContainers[look].securityContext.capabilities.add";
        kubelet.said(&["/events", "Mapped", path])
    };
    kubelet
        .wait("the Event", |kubelet| told(kubelet) == 1)
        .await;
    kubelet
        .wait("the agent's container", |kubelet| {
            let observed = kubelet.store.observed(&uid());
            observed.is_some_and(|pod| {
                pod.ephemeral_containers
                    .iter()
                    .any(|one| one.name == "look")
            })
        })
        .await;
    kubelet.apply(|pod| pod["metadata"]["generation"] = 3.into());
    kubelet
        .wait("EnsurePod", |kubelet| kubelet.called("EnsurePod") == 3)
        .await;
    kubelet.round("Marker").await;
    assert_eq!(told(&kubelet), 1);
    kubelet.stop().await;
}

/// An earlier process did not send the container, and the pod refers to no object whose refresh would send it.
#[tokio::test]
async fn a_new_process_sends_an_ephemeral_container_that_the_agent_does_not_know() {
    let mut kubelet = Kubelet::start().await;
    kubelet.agent.put(pb::PodObserved {
        uid: UID.to_owned(),
        phase: PodPhase::Running.into(),
        spec_generation: 2,
        ..pb::PodObserved::default()
    });
    kubelet
        .wait("the agent's pod", |kubelet| {
            kubelet.store.observed(&uid()).is_some()
        })
        .await;
    kubelet.apply(|pod| {
        pod["metadata"]["generation"] = 2.into();
        pod["spec"]["volumes"] = json!([]);
        pod["spec"]["ephemeralContainers"] = json!([{"name": "look", "image": "ann/tools"}]);
    });
    kubelet
        .wait("the container", |kubelet| {
            kubelet.called("EnsurePod") > 0 && kubelet.ephemeral() == ["look"]
        })
        .await;
    kubelet.stop().await;
}

/// Such an agent takes no further container for a generation that it knows.
#[tokio::test]
async fn an_older_agent_gets_an_ephemeral_container_once_it_lacks_nothing() {
    let agent = FakeAgent::start_without(knoc_proto::capability::LATE_EPHEMERAL);
    let mut kubelet = Kubelet::start_with(agent).await;
    kubelet.running().await;
    kubelet.apply(debugged);
    kubelet
        .wait("an Event", |kubelet| {
            kubelet.said(&["/events", "Failed", "later"]) == 1
        })
        .await;
    assert_eq!(kubelet.called("EnsurePod"), 1);
    kubelet.api.config_map("later", json!({"K": "v"}));
    kubelet
        .wait("both containers", |kubelet| {
            kubelet.ephemeral() == ["debug", "look"]
        })
        .await;
    assert_eq!(kubelet.called("EnsurePod"), 2);
    kubelet.stop().await;
}

#[tokio::test]
async fn a_container_that_lacks_something_has_no_pull_secrets_read_for_it() {
    let mut kubelet = Kubelet::start().await;
    kubelet.api.pull_secret("login", r#"{"auths": {}}"#);
    kubelet.apply(|pod| pod["spec"]["imagePullSecrets"] = json!([{"name": "login"}]));
    kubelet.running().await;
    kubelet.debug().await;
    kubelet.runs_ephemeral("look");
    kubelet.round("Running").await;
    // The agent asks for the values: they are made and sent without the credentials.
    let (read, sent) = (
        kubelet.said(&["GET", "/secrets/"]),
        kubelet.called("UpdateValues"),
    );
    kubelet.agent.change(UID, |pod| pod.values_wanted = true);
    kubelet
        .wait("the values", |kubelet| {
            kubelet.called("UpdateValues") > sent
        })
        .await;
    assert_eq!(kubelet.said(&["GET", "/secrets/"]), read);
    assert_eq!(kubelet.agent.credentials(), None);
    kubelet.stop().await;
}
