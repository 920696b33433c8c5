//! Ephemeral containers: how each one that the shape has reaches the shim.
//!
//! The actor compares levels, not edges: the containers of the shape with those in the shim's report. While the shim lacks
//! one, a task looks up its image, the actor notes the image in `job.pb` (so that it stays in the cache), and another task
//! gives the container to the shim. That waits until the shim has the newest values, which have the container's
//! environment. What fails is tried again after a pause, and meanwhile is the status of the container. Each container has
//! its own task, so one that cannot start holds up no other.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use knoc_contract::capability;
use knoc_proto::{
    ids::PodUid,
    pb::{self, container_status::State},
    pod::PodSpec,
};
use tonic::Request;

use super::{
    Actor,
    reach::{self, GIVE_AGAIN, IMAGE_AGAIN, Tasks},
    values::revision_of_shim,
};
use crate::{
    pod::{
        stage::{self, StageError},
        state::Pod,
    },
    policy::host_paths,
    shim_links::DEADLINE,
    site::Site,
};

/// The exit code of a container that was never started, as container runtimes report it.
const NEVER_STARTED: i32 = 128;

/// The containers on their way to the shim.
#[derive(Debug, Default)]
pub(super) struct Adding {
    /// At most one task for each container, and a pod has at most 64 of those (`MAX_EPHEMERAL`).
    tasks: Tasks<Step>,
    /// The images that were found.
    images: BTreeMap<String, pb::ResolvedImage>,
    /// Why the shim does not have a container yet, and how often that was tried.
    troubles: BTreeMap<String, (pb::Waiting, u32)>,
}

/// What the task has done.
#[derive(Debug)]
pub(super) enum Step {
    /// It looked for the image of a container.
    Found {
        container: String,
        image: Result<stage::Found, StageError>,
    },
    /// It gave a container to the shim.
    Given {
        container: String,
        result: Result<(), String>,
    },
}

impl Adding {
    /// What the next task has done, once it has; `None` if there is no task. A task that was aborted does not count.
    pub(super) async fn next(&mut self) -> Option<Step> {
        self.tasks.next().await
    }

    /// Gives up: the pod is not to start anything any more.
    pub(super) fn abort(&mut self) {
        self.tasks.abort();
    }

    /// Ends the tasks.
    pub(super) async fn end(&mut self) {
        self.tasks.end().await;
    }

    /// Ends the pauses after failures, and what was tried again, so that the next try begins at once.
    pub(super) fn retry_now(&mut self) {
        let troubles = std::mem::take(&mut self.troubles);
        self.tasks
            .abort_those(|container| troubles.contains_key(container));
    }

    /// Whether there is no image yet for a container that the shim does not have.
    pub(super) fn lacks_image(&self, pod: &Pod, spec: &pb::PodSpec) -> bool {
        let in_shim = |name: &str| {
            let mut all = pod.report.iter().flat_map(|it| &it.ephemeral_containers);
            all.any(|status| status.name == name)
        };
        let mut all = spec.ephemeral_containers.iter();
        all.any(|one| !self.images.contains_key(&one.name) && !in_shim(&one.name))
    }

    /// How often the container was tried, and the pause before the next try.
    fn pause(&self, container: &str, bounds: [Duration; 2]) -> Duration {
        let tries = self.troubles.get(container).map(|(_, tries)| *tries);
        reach::pause(tries.map_or(0, |tries| tries.saturating_add(1)), bounds)
    }

    fn fails(&mut self, container: String, reason: String, message: String) {
        let tries = self.troubles.get(&container);
        let tries = tries.map_or(0, |(_, tries)| tries.saturating_add(1));
        let waiting = pb::Waiting { reason, message };
        self.troubles.insert(container, (waiting, tries));
    }

    /// The statuses of the ephemeral containers of the shape.
    pub(super) fn statuses(&self, pod: &Pod, spec: &pb::PodSpec) -> Vec<pb::ContainerStatus> {
        let all = spec.ephemeral_containers.iter();
        all.map(|container| self.status(pod, container)).collect()
    }

    fn status(&self, pod: &Pod, container: &pb::Container) -> pb::ContainerStatus {
        let reported = pod.report.as_ref();
        let mut known = reported
            .into_iter()
            .flat_map(|report| &report.ephemeral_containers);
        if let Some(known) = known.find(|status| status.name == container.name) {
            let mut known = known.clone();
            if let Some(outcome) = pod.outcome() {
                crate::pod::publish::settle_one(&mut known, outcome, pod.since);
            }
            return known;
        }
        let lacks = reported.and_then(|report| Some((report, missing(report, container)?)));
        let state = match lacks {
            Some((report, what)) => State::Terminated(pb::Terminated {
                exit_code: NEVER_STARTED,
                reason: "ContainerCannotRun".to_owned(),
                message: format!(
                    "the job of the pod runs version {} of KNoC, which {what}: create the pod again to use them",
                    report.version
                ),
                ..pb::Terminated::default()
            }),
            None => State::Waiting(match self.troubles.get(&container.name) {
                Some((waiting, _)) => waiting.clone(),
                None => pb::Waiting {
                    reason: "ContainerCreating".to_owned(),
                    ..pb::Waiting::default()
                },
            }),
        };
        pb::ContainerStatus {
            name: container.name.clone(),
            image: container.image.clone(),
            state: Some(state),
            ..pb::ContainerStatus::default()
        }
    }
}

/// PURE: why the shim cannot run this ephemeral container; `None` if it can.
fn missing(report: &pb::Report, container: &pb::Container) -> Option<&'static str> {
    let has = |name: &str| report.capabilities.iter().any(|one| one == name);
    if !has(capability::EPHEMERAL) {
        Some("has no ephemeral containers")
    } else if container.env_files && !has(capability::ENV_FILES) {
        Some("reads no variables from files (`fileKeyRef`)")
    } else {
        None
    }
}

/// PURE: the containers that the shim lacks and can take now.
fn lacking<'a>(pod: &Pod, spec: &'a pb::PodSpec, values: i64) -> Vec<&'a pb::Container> {
    let Some(report) = pod.report.as_ref() else {
        return Vec::new();
    };
    let over = report.r#final || pod.is_finished() || pod.deletion.is_some();
    let has_values = revision_of_shim(pod).is_some_and(|has| has >= values);
    if over || !has_values {
        return Vec::new();
    }
    let known = |name: &str| {
        let mut all = report.ephemeral_containers.iter();
        all.any(|status| status.name == name)
    };
    let all = spec.ephemeral_containers.iter();
    all.filter(|container| !known(&container.name) && missing(report, container).is_none())
        .collect()
}

impl Actor {
    /// Whether the image of an ephemeral container, or another one for a container, is looked up now.
    pub(super) fn looks_for_image(&self, pod: &Pod) -> bool {
        let lacking = lacking(pod, &self.spec, self.values.revision);
        let mut names = lacking.iter().map(|container| &container.name);
        names.any(|name| !self.ephemeral.images.contains_key(name))
            || self.updates.looks_for_image(pod, &self.spec)
    }

    /// Takes the next step towards giving the shim each container that it lacks, unless that step is under way.
    pub(super) fn add_ephemeral(&mut self, pod: &Pod) {
        if self.spec.ephemeral_containers.is_empty() {
            return;
        }
        let spec = Arc::clone(&self.spec);
        for container in lacking(pod, &spec, self.values.revision) {
            if !self.ephemeral.tasks.is_busy(&container.name) {
                self.add_one(container);
            }
        }
    }

    fn add_one(&mut self, container: &pb::Container) {
        let name = container.name.clone();
        let (site, spec) = (Arc::clone(&self.site), Arc::clone(&self.spec));
        match self.ephemeral.images.get(&name).cloned() {
            // It goes on once they are there.
            None if self.lacks_credentials() => {}
            None => {
                let pause = self.ephemeral.pause(&name, IMAGE_AGAIN);
                let (own, credentials) = (self.own.clone(), self.known_credentials());
                let container = container.clone();
                self.ephemeral.tasks.start(name.clone(), async move {
                    tokio::time::sleep(pause).await;
                    let image = match may_mount(&site, &spec, &container) {
                        Ok(()) => {
                            let find = stage::image_of(&site, &spec, container, &credentials, &own);
                            Box::pin(find).await
                        }
                        Err(error) => Err(error),
                    };
                    Step::Found {
                        container: name,
                        image,
                    }
                });
            }
            Some(image) => {
                let pause = self.ephemeral.pause(&name, GIVE_AGAIN);
                let request = pb::AddEphemeralContainerRequest {
                    container: Some(container.clone()),
                    image: Some(image),
                };
                let uid = self.uid.clone();
                self.ephemeral.tasks.start(name.clone(), async move {
                    tokio::time::sleep(pause).await;
                    Step::Given {
                        container: name,
                        result: give(&site, &uid, request).await,
                    }
                });
            }
        }
    }

    /// A task has done something: takes the next step.
    pub(super) async fn ephemeral_step(&mut self, pod: &Pod, step: Step) {
        match step {
            Step::Found {
                container,
                image: Ok(found),
            } => match self.note_image(pod, &found).await {
                Ok(()) => {
                    self.ephemeral.troubles.remove(&container);
                    let image = found.images().first().cloned().unwrap_or_default();
                    self.ephemeral.images.insert(container, image);
                    if !self.needs_credentials(pod) {
                        self.credentials = None;
                    }
                }
                Err(message) => {
                    let reason = "CreateContainerError".to_owned();
                    self.ephemeral.fails(container, reason, message);
                }
            },
            Step::Found {
                container,
                image: Err(error),
            } => self.ephemeral.fails(container, error.reason, error.message),
            Step::Given {
                container,
                result: Ok(()),
            } => {
                self.ephemeral.troubles.remove(&container);
                // The shim's report names it soon.
                self.show(pod);
                return;
            }
            Step::Given {
                container,
                result: Err(message),
            } => {
                let reason = "CreateContainerError".to_owned();
                self.ephemeral.fails(container, reason, message);
            }
        }
        self.add_ephemeral(pod);
        self.show(pod);
    }
}

/// Whether the site's policy allows the paths of the node that the container mounts.
fn may_mount(site: &Site, spec: &PodSpec, container: &pb::Container) -> Result<(), StageError> {
    let policy = site.policy.now();
    let problems = host_paths::problems_of(container, spec, &policy, &site.host_paths());
    if problems.is_empty() {
        return Ok(());
    }
    Err(StageError {
        container: container.name.clone(),
        image: String::new(),
        reason: "CreateContainerConfigError".to_owned(),
        message: problems.join("; "),
    })
}

/// Gives a container to the shim. If compute nodes cannot reach the agent, a job step carries the link.
async fn give(
    site: &Site,
    uid: &PodUid,
    request: pb::AddEphemeralContainerRequest,
) -> Result<(), String> {
    let (mut client, _used) = reach::client(site, uid, capability::EPHEMERAL).await?;
    let mut request = Request::new(request);
    request.set_timeout(DEADLINE);
    let answer = client.add_ephemeral_container(request).await;
    answer
        .map(drop)
        .map_err(|status| status.message().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::state::{Deletion, Pod};

    fn report(has: &[&str]) -> pb::Report {
        let status = |name: &&str| pb::ContainerStatus {
            name: (*name).to_owned(),
            ..pb::ContainerStatus::default()
        };
        pb::Report {
            version: "1.2.3".to_owned(),
            capabilities: vec![capability::EPHEMERAL.to_owned()],
            values_revision: Some(5),
            ephemeral_containers: has.iter().map(status).collect(),
            ..pb::Report::default()
        }
    }

    fn spec() -> pb::PodSpec {
        let container = |name: &str| pb::Container {
            name: name.to_owned(),
            ..pb::Container::default()
        };
        pb::PodSpec {
            ephemeral_containers: vec![container("a"), container("b")],
            ..pb::PodSpec::default()
        }
    }

    #[test]
    fn the_shim_gets_what_it_lacks_once_it_has_the_newest_values() {
        let spec = spec();
        let next = |report, values| {
            let pod = Pod::that_reports(report);
            let lacking = lacking(&pod, &spec, values);
            let names: Vec<_> = lacking.iter().map(|it| it.name.as_str()).collect();
            names.join(" ")
        };
        assert_eq!(next(None, 5), "");
        assert_eq!(next(Some(report(&[])), 5), "a b");
        assert_eq!(next(Some(report(&["a"])), 5), "b");
        assert_eq!(next(Some(report(&["a", "b"])), 5), "");
        assert_eq!(next(Some(report(&[])), 6), "", "its values are older");
        let old = pb::Report {
            capabilities: Vec::new(),
            ..report(&[])
        };
        assert_eq!(next(Some(old), 5), "");
        let mut with_files = spec.clone();
        with_files.ephemeral_containers[0].env_files = true;
        let older = Pod::that_reports(Some(report(&[])));
        let able: Vec<_> = lacking(&older, &with_files, 5)
            .iter()
            .map(|it| it.name.as_str())
            .collect();
        assert_eq!(able, ["b"], "the shim reads no files");
        let mut ending = Pod::that_reports(Some(report(&[])));
        ending.deletion = Some(Deletion {
            grace: Duration::ZERO,
            reason: String::new(),
        });
        assert!(lacking(&ending, &spec, 5).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_container_that_waits_for_its_next_try_holds_up_no_other() {
        let mut adding = Adding::default();
        let found = |container: &str| Step::Given {
            container: container.to_owned(),
            result: Ok(()),
        };
        let step = |container: &'static str, pause: u64| async move {
            tokio::time::sleep(Duration::from_secs(pause)).await;
            found(container)
        };
        adding.fails("a".to_owned(), "ErrImagePull".to_owned(), "no".to_owned());
        adding.tasks.start("a".to_owned(), step("a", 300));
        adding.tasks.start("b".to_owned(), step("b", 1));
        let next = adding.next().await;
        assert!(
            matches!(&next, Some(Step::Given { container, .. }) if container == "b"),
            "{next:?}"
        );
        // New credentials: the one that failed is tried again, and what goes well is not disturbed.
        adding.tasks.start("c".to_owned(), step("c", 10));
        adding.retry_now();
        assert!(!adding.tasks.is_busy("a") && adding.tasks.is_busy("c"));
        adding.tasks.start("a".to_owned(), step("a", 0));
        let mut ended = Vec::new();
        while let Some(Step::Given { container, .. }) = adding.next().await {
            ended.push(container);
        }
        assert_eq!(ended, ["a", "c"]);
    }

    #[test]
    fn a_job_of_an_older_version_says_why_the_container_does_not_run() {
        let old = pb::Report {
            capabilities: Vec::new(),
            ..report(&[])
        };
        let mut adding = Adding::default();
        let shown = |adding: &Adding, report| {
            adding
                .statuses(&Pod::that_reports(report), &spec())
                .remove(0)
                .state
        };
        match shown(&adding, Some(old)) {
            Some(State::Terminated(ended)) => {
                assert!(ended.message.contains("1.2.3"), "{ended:?}");
            }
            other => panic!("{other:?}"),
        }
        adding.fails("a".to_owned(), "ErrImagePull".to_owned(), "no".to_owned());
        match shown(&adding, Some(report(&[]))) {
            Some(State::Waiting(waiting)) => assert_eq!(waiting.reason, "ErrImagePull"),
            other => panic!("{other:?}"),
        }
    }
}
