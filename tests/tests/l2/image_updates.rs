//! Level 2: containers that get another image while their job waits or runs, with the real agent and the real shim.

use std::time::Duration;

use anyhow::ensure;
use knoc_proto::pb::{self, container_status::State};
use knoc_tests::site::{Options, Pod, Site, container};

const SOON: Duration = Duration::from_mins(2);

fn shell(name: &str, script: &str) -> pb::Container {
    container(name, &["/bin/sh", "-c", script], &[])
}

/// Asks for the pod with another image for one container, as a kubelet does after `kubectl set image`.
fn with_image(pod: &Pod, name: &str, image: &str) -> Pod {
    let mut pod = pod.clone();
    if let Some(spec) = &mut pod.request.spec {
        spec.generation += 1;
        let all = spec.init_containers.iter_mut().chain(&mut spec.containers);
        for container in all.filter(|one| one.name == name) {
            image.clone_into(&mut container.image);
        }
    }
    pod
}

fn status<'a>(pod: &'a pb::PodObserved, name: &str) -> Option<&'a pb::ContainerStatus> {
    let mut all = pod.init_containers.iter().chain(&pod.containers);
    all.find(|status| status.name == name)
}

fn runs_with(pod: &pb::PodObserved, name: &str, image: &str, restarts: i32) -> bool {
    status(pod, name).is_some_and(|one| {
        matches!(one.state, Some(State::Running(_)))
            && (&*one.image, one.restart_count) == (image, restarts)
    })
}

#[tokio::test]
async fn another_image_restarts_its_container_alone_and_a_restarted_agent_does_not_repeat_it()
-> anyhow::Result<()> {
    let (site, agent, client) = Site::start(Options::default()).await?;
    let wait = "trap 'exit 0' TERM; while :; do sleep 0.1; done";
    let mut pod = Pod::new("updated", vec![shell("main", wait), shell("other", wait)]);
    if let Some(spec) = &mut pod.request.spec {
        spec.init_containers = vec![shell("before", "true")];
    }
    pod.ensure(&client).await?;
    pod.running(&client, SOON).await?;
    // The pod's restart policy is Never, which does not matter.
    let newer = with_image(&pod, "main", "newer");
    newer.ensure(&client).await?;
    let done = |pod: &pb::PodObserved| runs_with(pod, "main", "newer", 1);
    let state = pod
        .wait_for_state(&client, "main has the newer image", SOON, done)
        .await?;
    ensure!(runs_with(&state, "other", "none", 0), "{state:?}");
    let killing = "Container main definition changed, will be restarted";
    let said = |note: &pb::PodNote| note.reason == "Killing" && note.message == killing;
    ensure!(state.notes.iter().any(said), "{:?}", state.notes);
    let last = status(&state, "main").and_then(|main| main.last_termination.clone());
    ensure!(last.is_some_and(|last| last.exit_code == 0), "{state:?}");

    agent.kill().await?;
    let _agent = site.agent(&[]).await?;
    newer.ensure(&client).await?;
    // An init container that has ended takes note of its image, and does not run again.
    let twice = with_image(&newer, "before", "newer");
    twice.ensure(&client).await?;
    let thrice = with_image(&twice, "main", "newest");
    thrice.ensure(&client).await?;
    let done = |pod: &pb::PodObserved| runs_with(pod, "main", "newest", 2);
    let state = pod
        .wait_for_state(&client, "main has the newest image", SOON, done)
        .await?;
    ensure!(runs_with(&state, "other", "none", 0), "{state:?}");
    let before = status(&state, "before").map(|one| (one.image.clone(), one.restart_count));
    ensure!(before == Some(("none".to_owned(), 0)), "{state:?}");
    // Nothing but images may change.
    let mut other = thrice.clone();
    if let Some(spec) = &mut other.request.spec {
        spec.generation += 1;
        spec.containers[0].args = vec!["x".to_owned()];
    }
    let refused = client.clone().ensure_pod(other.request).await;
    let why = refused.err().map(|status| status.message().to_owned());
    ensure!(
        why.as_ref().is_some_and(|why| why.contains("images")),
        "{why:?}"
    );
    pod.remove(&client).await
}

#[tokio::test]
async fn a_job_without_a_link_is_told_of_another_image_once_a_step_can_carry_it_and_goes_on_until_then()
-> anyhow::Result<()> {
    let (_site, _agent, client) = Site::start(Options::without_link()).await?;
    let pod = Pod::new("cut-off", vec![shell("main", "exec sleep 600")]);
    pod.ensure(&client).await?;
    let runs = |pod: &pb::PodObserved| runs_with(pod, "main", "none", 0);
    pod.wait_for_state(&client, "it runs", SOON, runs).await?;
    with_image(&pod, "main", "newer").ensure(&client).await?;
    let told = |pod: &pb::PodObserved| {
        let mut notes = pod.notes.iter();
        notes.any(|note| {
            note.reason == "Failed"
                && note
                    .message
                    .starts_with("the container goes on with the image that it has")
        })
    };
    let state = pod
        .wait_for_state(&client, "the failure is told", SOON, told)
        .await?;
    ensure!(runs_with(&state, "main", "none", 0), "{state:?}");
    pod.remove(&client).await
}
