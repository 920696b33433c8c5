//! How the credentials of a pod's pull secrets reach the agent, and for how long.

use super::*;

const GOOD: &str = r#"{"auths": {"docker.io": {"username": "ann", "password": "good"}}}"#;

impl Kubelet {
    fn with_pull_secrets(&mut self, names: &[&str]) {
        let names: Vec<_> = names.iter().map(|name| json!({ "name": name })).collect();
        self.apply(|pod| pod["spec"]["imagePullSecrets"] = names.into());
    }

    fn passwords(&self) -> Option<Vec<String>> {
        let images = self.agent.credentials()?.images.into_iter();
        let logins = images.flat_map(|image| image.logins);
        Some(logins.map(|login| login.password).collect())
    }
}

#[tokio::test]
async fn credentials_go_to_the_agent_for_as_long_as_it_needs_them() {
    let mut kubelet = Kubelet::start().await;
    kubelet.with_pull_secrets(&["login", "none"]);
    kubelet.ensured().await;
    assert_eq!(kubelet.passwords(), Some(Vec::new()), "no Secret exists");
    assert_eq!(kubelet.agent.spec().image_pull_secrets, ["login", "none"]);
    let text = "Unable to retrieve some image pull secrets (login, none); attempting to pull the image may not succeed.";
    kubelet
        .wait("an Event", |kubelet| {
            kubelet.said(&["/events", "FailedToRetrieveImagePullSecret", text]) == 1
        })
        .await;
    // The agent lost them in a restart; meanwhile one of the Secrets was created.
    kubelet.api.pull_secret("login", GOOD);
    kubelet.agent.change(UID, |pod| {
        pod.phase = PodPhase::Staging.into();
        pod.values_wanted = true;
    });
    kubelet
        .wait("the credentials", |kubelet| {
            kubelet.passwords() == Some(vec!["good".to_owned()])
        })
        .await;
    let sent = kubelet.agent.credentials().unwrap();
    assert_eq!(sent.images[0].image, "busybox");
    assert_eq!(sent.images[0].logins[0].secret_uid, "uid of login");
    // The images are there: the Secrets are read no more.
    kubelet.agent.change(UID, |pod| {
        pod.phase = PodPhase::Queued.into();
        pod.values_wanted = false;
    });
    kubelet.round("Marker").await;
    let read = kubelet.said(&["GET", "/secrets/"]);
    let updates = kubelet.called("UpdateValues");
    kubelet.agent.change(UID, |pod| pod.values_wanted = true);
    kubelet
        .wait("the values", |kubelet| {
            kubelet.called("UpdateValues") > updates
        })
        .await;
    kubelet
        .wait("no credentials", |kubelet| {
            kubelet.agent.credentials().is_none()
        })
        .await;
    assert_eq!(kubelet.said(&["GET", "/secrets/"]), read);
    kubelet.stop().await;
}

#[tokio::test]
async fn a_pull_secret_that_cannot_be_read_holds_the_pod_until_it_can() {
    let mut kubelet = Kubelet::start().await;
    kubelet
        .api
        .pull_secret("login", r#"{"auths": {"docker.io": {"auth": "s3cr3t"}}}"#);
    kubelet.with_pull_secrets(&["login"]);
    kubelet
        .wait("the reason", |kubelet| {
            let pod = kubelet.store.by_uid(&uid()).unwrap().pod;
            let status = serde_json::to_string(&pod.status).unwrap();
            status.contains("ErrImagePull") && status.contains("image pull secret")
        })
        .await;
    assert_eq!(kubelet.called("EnsurePod"), 0);
    assert_eq!(kubelet.said(&["s3cr3t"]), 0, "it is quoted nowhere");
    kubelet.api.pull_secret("login", GOOD);
    kubelet
        .wait("the credentials", |kubelet| {
            kubelet.passwords() == Some(vec!["good".to_owned()])
        })
        .await;
    kubelet.stop().await;
}

#[tokio::test]
async fn an_ephemeral_container_brings_the_credentials_for_its_image() {
    let mut kubelet = Kubelet::start().await;
    kubelet.api.pull_secret("login", GOOD);
    kubelet.with_pull_secrets(&["login"]);
    kubelet.running().await;
    kubelet.apply(|pod| {
        pod["metadata"]["generation"] = 2.into();
        pod["spec"]["ephemeralContainers"] = json!([{"name": "debug", "image": "ann/tools"}]);
    });
    kubelet
        .wait("EnsurePod", |kubelet| kubelet.called("EnsurePod") == 2)
        .await;
    let sent = kubelet.agent.credentials().unwrap();
    let images: Vec<_> = sent.images.iter().map(|image| &*image.image).collect();
    assert_eq!(images, ["ann/tools", "busybox"]);
    kubelet.stop().await;
}
