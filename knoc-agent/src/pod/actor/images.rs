//! Other images for the containers of a pod that is staged already: how each one reaches the job.
//!
//! The actor compares levels, not edges: the image that the shape names with the one in `job.pb`, from which a job starts, and
//! with the one in the shim's report. While one of them differs, a task looks up the image, the actor notes it in `job.pb`, and
//! another task tells the shim, which restarts the container. A container goes on with the image that it has until the
//! other one is there. What fails is tried again after a pause, and is an Event (ADR 0117).

use std::{collections::BTreeMap, sync::Arc};

use knoc_contract::capability;
use knoc_proto::{error::chain, ids::PodUid, pb};
use tokio::task::JoinSet;
use tonic::Request;

use super::{
    Actor,
    reach::{self, GIVE_AGAIN, IMAGE_AGAIN, pause},
};
use crate::{
    pod::{
        stage::{self, StageError},
        state::{Event, Note, Pod},
    },
    shim_links::DEADLINE,
    site::Site,
};

/// The images on their way to the job.
#[derive(Debug, Default)]
pub(super) struct Updates {
    /// At most one task.
    task: JoinSet<Step>,
    /// Whether the task tells the shim something.
    tells: bool,
    /// By container: what the shim was told on this link, which its report names soon.
    told: BTreeMap<String, String>,
    /// By container: what `job.pb` names; empty until the pod is staged.
    staged: BTreeMap<String, String>,
    /// By container: the images that were found for it.
    found: BTreeMap<String, pb::ResolvedImage>,
    /// By container: what has failed last, and how often in a row something did.
    troubles: BTreeMap<String, (String, u32)>,
}

/// What the task has done.
#[derive(Debug)]
pub(super) enum Step {
    /// It looked for the image of a container.
    Found {
        container: String,
        image: Result<stage::Found, StageError>,
    },
    /// It told the shim.
    Told {
        container: String,
        result: Result<(), String>,
    },
}

/// What is to be done next for a container.
#[derive(Debug, PartialEq)]
enum Next<'a> {
    Find(&'a pb::Container),
    Tell(&'a pb::Container),
    /// The shim is of a version that cannot.
    Impossible(&'a pb::Container),
}

impl<'a> Next<'a> {
    fn container(&self) -> &'a pb::Container {
        match *self {
            Self::Find(container) | Self::Tell(container) | Self::Impossible(container) => {
                container
            }
        }
    }
}

impl Updates {
    /// What the task has done, once it has; `None` if there is none. A task that was aborted does not count.
    pub(super) async fn next(&mut self) -> Option<Step> {
        loop {
            match self.task.join_next().await? {
                Ok(step) => return Some(step),
                Err(error) if error.is_cancelled() => {}
                Err(error) => tracing::error!(error = chain(&error), "a task of an image"),
            }
        }
    }

    /// Gives up: the pod is not to start anything any more.
    pub(super) fn abort(&mut self) {
        self.task.abort_all();
    }

    /// Ends the task.
    pub(super) async fn end(&mut self) {
        self.task.shutdown().await;
    }

    /// Ends the pause after a failure, or a further try, so that the next one begins at once.
    pub(super) async fn retry_now(&mut self) {
        self.task.shutdown().await;
        self.troubles.clear();
    }

    /// The shim has a link now: what it could not be told before, it is told at once.
    pub(super) async fn linked(&mut self) {
        self.told.clear();
        if self.tells {
            self.retry_now().await;
        }
    }

    /// `job.pb` names these images now.
    pub(super) fn staged<'a>(&mut self, images: impl IntoIterator<Item = &'a pb::ResolvedImage>) {
        let images = images.into_iter().filter(|image| image.volume.is_empty());
        self.staged
            .extend(images.map(|image| (image.container.clone(), image.image.clone())));
    }

    /// Before the shim's first report: names the images with which the containers will start. If the shape names others, the
    /// kubelet sees by that that the pod waits for images, and sends the credentials for them.
    pub(super) fn show(&self, pod: &Pod, observed: &mut pb::PodObserved) {
        if pod.report.is_some() {
            return;
        }
        let all = observed.init_containers.iter_mut();
        for status in all.chain(&mut observed.containers) {
            if let Some(image) = self.staged.get(&status.name) {
                status.image.clone_from(image);
            }
        }
    }

    /// PURE: what is to be done next, if anything. A container that fails again and again holds up no other.
    fn due<'a>(&self, pod: &Pod, spec: &'a pb::PodSpec) -> Option<Next<'a>> {
        let all = self.all_due(pod, spec);
        all.min_by_key(|next| self.tries(&next.container().name))
    }

    /// PURE: what is to be done for each container.
    fn all_due<'a>(&self, pod: &Pod, spec: &'a pb::PodSpec) -> impl Iterator<Item = Next<'a>> {
        let ending = pod.report.as_ref().is_some_and(|report| report.r#final);
        let over = ending || pod.is_finished() || pod.deletion.is_some();
        let all = spec.init_containers.iter().chain(&spec.containers);
        let all = all.filter(move |_| !over);
        all.filter_map(move |container| self.due_for(pod, container))
    }

    fn due_for<'a>(&self, pod: &Pod, container: &'a pb::Container) -> Option<Next<'a>> {
        let staged = self.staged.get(&container.name)?;
        let reported = pod.report.as_ref();
        let old = reported.filter(|report| is_outdated(report, container));
        if *staged == container.image && old.is_none() {
            return None;
        }
        if old.is_some_and(|report| !takes_images(report)) {
            let known = self.troubles.contains_key(&container.name);
            return (!known).then_some(Next::Impossible(container));
        }
        if *staged == container.image && self.told.get(&container.name) == Some(&container.image) {
            return None;
        }
        let found = self.found.get(&container.name);
        if *staged == container.image && found.is_some_and(|it| it.image == container.image) {
            Some(Next::Tell(container))
        } else {
            Some(Next::Find(container))
        }
    }

    /// Whether an image is to be looked up.
    pub(super) fn looks_for_image(&self, pod: &Pod, spec: &pb::PodSpec) -> bool {
        let mut all = self.all_due(pod, spec);
        all.any(|next| matches!(next, Next::Find(_)))
    }

    /// Notes a failure. Returns whether it is another one than before.
    fn fails(&mut self, container: &str, message: &str) -> bool {
        let (known, tries) = self.troubles.entry(container.to_owned()).or_default();
        let news = *tries == 0 || known != message;
        *tries = tries.saturating_add(1);
        message.clone_into(known);
        news
    }

    fn tries(&self, container: &str) -> u32 {
        self.troubles.get(container).map_or(0, |(_, tries)| *tries)
    }
}

/// PURE: names the image of each location in the job file of an older agent, which did not: it is the one of the shape there.
pub(super) fn name_images(job: &mut pb::JobFile) {
    let Some(spec) = &job.spec else {
        return;
    };
    for image in job.images.iter_mut().filter(|image| image.image.is_empty()) {
        let mut all = spec.init_containers.iter().chain(&spec.containers);
        if let Some(container) = all.find(|one| one.name == image.container) {
            image.image.clone_from(&container.image);
        }
    }
}

/// Whether the shim would start the container with another image than the shape names.
fn is_outdated(report: &pb::Report, container: &pb::Container) -> bool {
    let mut all = report.init_containers.iter().chain(&report.containers);
    let status = all.find(|status| status.name == container.name);
    status.is_some_and(|status| status.image_of_next_start() != container.image)
}

/// Whether the shim serves `UpdateImage`.
fn takes_images(report: &pb::Report) -> bool {
    let mut all = report.capabilities.iter();
    all.any(|name| name == capability::IMAGE_UPDATES)
}

impl Actor {
    /// Takes the next step towards the images that the shape names, unless one is under way.
    pub(super) async fn update_images(&mut self, pod: Pod) -> Pod {
        if !self.updates.task.is_empty() {
            return pod;
        }
        match self.updates.due(&pod, &self.spec) {
            None => pod,
            // It goes on once they are there.
            Some(Next::Find(_)) if self.lacks_credentials() => pod,
            Some(Next::Find(container)) => {
                let container = container.clone();
                let wait = pause(self.updates.tries(&container.name), IMAGE_AGAIN);
                let (site, spec) = (Arc::clone(&self.site), Arc::clone(&self.spec));
                let (own, credentials) = (self.own.clone(), self.known_credentials());
                self.updates.tells = false;
                self.updates.task.spawn(async move {
                    tokio::time::sleep(wait).await;
                    let name = container.name.clone();
                    let image = match stage::allowed(&site, &container) {
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
                pod
            }
            Some(Next::Tell(container)) => {
                let name = container.name.clone();
                let wait = pause(self.updates.tries(&name), GIVE_AGAIN);
                let image = self.updates.found.get(&name).cloned();
                let (site, uid) = (Arc::clone(&self.site), self.uid.clone());
                self.updates.tells = true;
                self.updates.task.spawn(async move {
                    tokio::time::sleep(wait).await;
                    let result = tell(&site, &uid, image).await;
                    Step::Told {
                        container: name,
                        result,
                    }
                });
                pod
            }
            Some(Next::Impossible(container)) => {
                let name = container.name.clone();
                let version = pod.report.as_ref().map(|report| report.version.clone());
                let message = format!(
                    "the job of the pod runs version {} of KNoC, which cannot change images: create the pod again to use it",
                    version.unwrap_or_default()
                );
                self.image_fails(pod, &name, &message).await
            }
        }
    }

    /// The task has done something: takes the next step.
    pub(super) async fn image_step(&mut self, pod: Pod, step: Step) -> Pod {
        let pod = match step {
            Step::Found {
                container,
                image: Ok(found),
            } => match self.note_image(&found).await {
                Ok(()) => {
                    self.updates.troubles.remove(&container);
                    self.updates.staged(found.images());
                    let image = found.images().first().cloned().unwrap_or_default();
                    self.updates.found.insert(container, image);
                    if !self.needs_credentials(&pod) {
                        self.credentials = None;
                    }
                    self.show(&pod);
                    pod
                }
                Err(message) => self.image_fails(pod, &container, &message).await,
            },
            Step::Found {
                container,
                image: Err(StageError {
                    reason, message, ..
                }),
            } => {
                let message = format!("{reason}: {message}");
                self.image_fails(pod, &container, &message).await
            }
            Step::Told {
                container,
                result: Ok(()),
            } => {
                self.updates.troubles.remove(&container);
                if let Some(image) = self.updates.found.get(&container) {
                    let image = image.image.clone();
                    self.updates.told.insert(container, image);
                }
                pod
            }
            Step::Told {
                container,
                result: Err(message),
            } => self.image_fails(pod, &container, &message).await,
        };
        let pod = self.update_images(pod).await;
        self.show(&pod);
        pod
    }

    async fn image_fails(&mut self, pod: Pod, container: &str, message: &str) -> Pod {
        if !self.updates.fails(container, message) {
            return pod;
        }
        let image = {
            let mut all = self.spec.all_containers();
            all.find(|one| one.name == container)
                .map_or_else(String::new, |one| one.image.clone())
        };
        let message = format!(
            "the container goes on with the image that it has, because image {image:?} cannot be used: {message}"
        );
        let note = Note {
            warning: true,
            reason: "Failed",
            message,
            container: container.to_owned(),
        };
        self.apply(pod, Event::Note(note)).await
    }
}

/// Tells the shim. If compute nodes cannot reach the agent, a job step carries the link.
async fn tell(site: &Site, uid: &PodUid, image: Option<pb::ResolvedImage>) -> Result<(), String> {
    let (mut client, _used) = reach::client(site, uid, capability::IMAGE_UPDATES).await?;
    let mut request = Request::new(pb::UpdateImageRequest { image });
    request.set_timeout(DEADLINE);
    let answer = client.update_image(request).await;
    answer
        .map(drop)
        .map_err(|status| status.message().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(image: &str) -> pb::PodSpec {
        pb::PodSpec {
            containers: vec![pb::Container {
                name: "main".to_owned(),
                image: image.to_owned(),
                ..pb::Container::default()
            }],
            ..pb::PodSpec::default()
        }
    }

    fn report(image: &str, next: &str) -> pb::Report {
        pb::Report {
            capabilities: vec![capability::IMAGE_UPDATES.to_owned()],
            containers: vec![pb::ContainerStatus {
                name: "main".to_owned(),
                image: image.to_owned(),
                next_image: next.to_owned(),
                ..pb::ContainerStatus::default()
            }],
            ..pb::Report::default()
        }
    }

    fn resolved(image: &str) -> pb::ResolvedImage {
        pb::ResolvedImage {
            container: "main".to_owned(),
            image: image.to_owned(),
            ..pb::ResolvedImage::default()
        }
    }

    fn due(updates: &Updates, report: Option<pb::Report>, image: &str) -> &'static str {
        match updates.due(&Pod::that_reports(report), &spec(image)) {
            None => "nothing",
            Some(Next::Find(_)) => "find",
            Some(Next::Tell(_)) => "tell",
            Some(Next::Impossible(_)) => "impossible",
        }
    }

    #[test]
    fn an_image_is_looked_up_then_staged_then_told_until_the_shim_has_it() {
        let mut updates = Updates::default();
        assert_eq!(due(&updates, None, "b"), "nothing", "it is not staged yet");
        updates.staged([&resolved("a")]);
        assert_eq!(due(&updates, None, "a"), "nothing");
        assert_eq!(
            due(&updates, None, "b"),
            "find",
            "the job waits in the queue"
        );
        assert_eq!(due(&updates, Some(report("a", "")), "b"), "find");
        updates.found.insert("main".to_owned(), resolved("b"));
        updates.staged([&resolved("b")]);
        assert_eq!(
            due(&updates, None, "b"),
            "nothing",
            "the job starts with it"
        );
        assert_eq!(due(&updates, Some(report("a", "")), "b"), "tell");
        assert_eq!(due(&updates, Some(report("a", "b")), "b"), "nothing");
        assert_eq!(due(&updates, Some(report("b", "")), "b"), "nothing");
        updates.told.insert("main".to_owned(), "b".to_owned());
        assert_eq!(
            due(&updates, Some(report("a", "")), "b"),
            "nothing",
            "its report is awaited"
        );
        updates.told.clear();
        // It changes once more.
        assert_eq!(due(&updates, Some(report("a", "b")), "c"), "find");
        // After a restart of the agent.
        updates.found.clear();
        assert_eq!(due(&updates, Some(report("a", "")), "b"), "find");
    }

    #[test]
    fn locations_of_an_older_agent_keep_the_image_of_the_shape_that_they_were_found_for() {
        let mut job = pb::JobFile {
            spec: Some(spec("a")),
            images: vec![resolved(""), pb::ResolvedImage::default()],
            ..pb::JobFile::default()
        };
        name_images(&mut job);
        let names: Vec<_> = job.images.iter().map(|one| one.image.as_str()).collect();
        assert_eq!(names, ["a", ""]);
        job.spec = Some(spec("b"));
        name_images(&mut job);
        assert_eq!(job.images[0].image, "a");
    }

    #[test]
    fn a_container_whose_image_cannot_be_used_holds_up_no_other() {
        let mut updates = Updates::default();
        let mut spec = spec("b");
        let other = pb::Container {
            name: "other".to_owned(),
            ..spec.containers[0].clone()
        };
        spec.containers.push(other);
        let resolved_other = |image: &str| pb::ResolvedImage {
            container: "other".to_owned(),
            ..resolved(image)
        };
        updates.staged([&resolved("a"), &resolved_other("a")]);
        let next = |updates: &Updates| {
            let next = updates.due(&Pod::that_reports(None), &spec);
            next.map_or_else(String::new, |next| next.container().name.clone())
        };
        assert_eq!(next(&updates), "main");
        assert!(updates.fails("main", "no"));
        assert_eq!(next(&updates), "other");
        assert!(updates.looks_for_image(&Pod::that_reports(None), &spec));
        updates.staged([&resolved_other("b")]);
        assert_eq!(next(&updates), "main", "it is tried again");
        updates.staged([&resolved("b")]);
        assert!(!updates.looks_for_image(&Pod::that_reports(None), &spec));
    }

    #[test]
    fn a_job_of_an_older_version_is_told_nothing_and_that_is_said_once() {
        let mut updates = Updates::default();
        updates.staged([&resolved("a")]);
        let old = pb::Report {
            capabilities: Vec::new(),
            ..report("a", "")
        };
        assert_eq!(due(&updates, Some(old.clone()), "b"), "impossible");
        assert!(updates.fails("main", "no"));
        assert_eq!(due(&updates, Some(old), "b"), "nothing");
        assert!(!updates.fails("main", "no"));
        assert!(updates.fails("main", "another reason"));
    }

    #[test]
    fn a_job_that_waits_is_shown_with_the_image_from_which_it_would_start() {
        let mut updates = Updates::default();
        let shown = |updates: &Updates, report: Option<pb::Report>| {
            let status = pb::ContainerStatus {
                name: "main".to_owned(),
                image: "b".to_owned(),
                ..pb::ContainerStatus::default()
            };
            let mut observed = pb::PodObserved {
                containers: vec![status],
                ..pb::PodObserved::default()
            };
            updates.show(&Pod::that_reports(report), &mut observed);
            observed.containers[0].image.clone()
        };
        assert_eq!(shown(&updates, None), "b", "nothing is staged yet");
        updates.staged([&resolved("a")]);
        assert_eq!(shown(&updates, None), "a", "the other one is not there yet");
        updates.staged([&resolved("b")]);
        assert_eq!(shown(&updates, None), "b");
        updates.staged([&resolved("c")]);
        let said = Some(report("b", "c"));
        assert_eq!(shown(&updates, said), "b", "the shim knows what runs");
    }

    #[test]
    fn nothing_is_done_for_a_pod_that_ends() {
        let mut updates = Updates::default();
        updates.staged([&resolved("a")]);
        let last = pb::Report {
            r#final: true,
            ..report("a", "")
        };
        assert_eq!(due(&updates, Some(last), "b"), "nothing");
    }
}
