//! Other images for the containers of a pod that is staged already: how each one reaches the job.
//!
//! The actor compares levels, not edges: the image that the shape names with the one in `job.pb`, from which a job starts, and
//! with the one in the shim's report. While one of them differs, a task looks up the image, the actor notes it in `job.pb`, and
//! another task tells the shim, which restarts the container. A container goes on with the image that it has until the
//! other one is there. What fails is tried again after a pause, and is an Event (ADR 0117). Each container has its own task, so
//! one whose image takes long or cannot be used holds up no other.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use knoc_contract::capability;
use knoc_proto::{ids::PodUid, pb};
use tonic::Request;

use super::{
    Actor,
    reach::{self, GIVE_AGAIN, IMAGE_AGAIN, Tasks, pause},
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
    /// At most one task for each container.
    tasks: Tasks<Step>,
    /// The containers whose newest task tells the shim something.
    telling: BTreeSet<String>,
    /// By container: what the shim was told on this link, which its report names soon.
    told: BTreeMap<String, String>,
    /// By container: what `job.pb` names; empty until the pod is staged.
    staged: BTreeMap<String, String>,
    /// By container: the images that were found for it.
    found: BTreeMap<String, pb::ResolvedImage>,
    /// By container: what has failed last, and how often in a row something did.
    troubles: BTreeMap<String, (String, u32)>,
    /// By container: the image that the job cannot take, of which the pod was told.
    impossible: BTreeMap<String, String>,
}

/// What a task has done.
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
    /// What the next task has done, once it has; `None` if there is no task.
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

    /// The shape names other images now than `before`: what is under way for the earlier ones ends.
    pub(super) fn renamed(&mut self, before: &pb::PodSpec, now: &pb::PodSpec) {
        let image = |spec: &pb::PodSpec, name: &str| {
            let mut all = spec.init_containers.iter().chain(&spec.containers);
            let container = all.find(|container| container.name == name);
            container.map(|container| container.image.clone())
        };
        let is_renamed = |name: &str| image(before, name) != image(now, name);
        self.troubles.retain(|name, _| !is_renamed(name));
        self.tasks.abort_those(is_renamed);
    }

    /// The shim has a link now: what it could not be told before, it is told at once.
    pub(super) fn linked(&mut self) {
        self.told.clear();
        let telling = std::mem::take(&mut self.telling);
        self.troubles.retain(|name, _| !telling.contains(name));
        self.tasks.abort_those(|name| telling.contains(name));
    }

    /// `job.pb` names these images now.
    pub(super) fn staged<'a>(&mut self, images: impl IntoIterator<Item = &'a pb::ResolvedImage>) {
        let images = images.into_iter().filter(|image| image.volume.is_empty());
        self.staged
            .extend(images.map(|image| (image.container.clone(), image.image.clone())));
    }

    /// Before the shim's first report: names the images with which the containers will start. If the shape names others, the
    /// kubelet sees by that that the pod waits for images, and sends the credentials for them, unless the job cannot take them.
    pub(super) fn show(&self, pod: &Pod, observed: &mut pb::PodObserved) {
        if let Some(report) = &pod.report {
            observed.images_are_fixed = !takes_images(report);
            return;
        }
        let all = observed.init_containers.iter_mut();
        for status in all.chain(&mut observed.containers) {
            if let Some(image) = self.staged.get(&status.name) {
                status.image.clone_from(image);
            }
        }
    }

    /// PURE: what is to be done for the containers of which no task is under way.
    fn due<'a>(&self, pod: &Pod, spec: &'a pb::PodSpec) -> Vec<Next<'a>> {
        let all = self.all_due(pod, spec);
        all.filter(|next| !self.tasks.is_busy(&next.container().name))
            .collect()
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
            let told = self.impossible.get(&container.name);
            return (told != Some(&container.image)).then_some(Next::Impossible(container));
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
    /// Takes the next step towards the images that the shape names for each container, unless it is under way.
    pub(super) async fn update_images(&mut self, mut pod: Pod) -> Pod {
        let spec = Arc::clone(&self.spec);
        for next in self.updates.due(&pod, &spec) {
            match next {
                // It goes on once they are there.
                Next::Find(_) if self.lacks_credentials() => {}
                Next::Find(container) => self.find_image(container.clone()),
                Next::Tell(container) => self.tell_image(&container.name),
                Next::Impossible(container) => {
                    let (name, image) = (container.name.clone(), container.image.clone());
                    self.updates.impossible.insert(name, image);
                    pod = self.image_is_impossible(pod, &container.name).await;
                }
            }
        }
        pod
    }

    fn find_image(&mut self, container: pb::Container) {
        let name = container.name.clone();
        let wait = pause(self.updates.tries(&name), IMAGE_AGAIN);
        let (site, spec) = (Arc::clone(&self.site), Arc::clone(&self.spec));
        let (own, credentials) = (self.own.clone(), self.known_credentials());
        self.updates.telling.remove(&name);
        self.updates.tasks.start(name.clone(), async move {
            tokio::time::sleep(wait).await;
            let find = stage::image_of(&site, &spec, container, &credentials, &own);
            Step::Found {
                container: name,
                image: Box::pin(find).await,
            }
        });
    }

    fn tell_image(&mut self, name: &str) {
        let name = name.to_owned();
        let wait = pause(self.updates.tries(&name), GIVE_AGAIN);
        let image = self.updates.found.get(&name).cloned();
        let (site, uid) = (Arc::clone(&self.site), self.uid.clone());
        self.updates.telling.insert(name.clone());
        self.updates.tasks.start(name.clone(), async move {
            tokio::time::sleep(wait).await;
            let result = tell(&site, &uid, image).await;
            Step::Told {
                container: name,
                result,
            }
        });
    }

    async fn image_is_impossible(&mut self, pod: Pod, name: &str) -> Pod {
        let version = pod.report.as_ref().map(|report| report.version.clone());
        let message = format!(
            "the job of the pod runs version {} of KNoC, which cannot change images: create the pod again to use it",
            version.unwrap_or_default()
        );
        self.image_fails(pod, name, &message).await
    }

    /// A task has done something: takes the next step.
    pub(super) async fn image_step(&mut self, pod: Pod, step: Step) -> Pod {
        let pod = match step {
            Step::Found {
                container,
                image: Ok(found),
            } => match self.note_image(&pod, &found).await {
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
mod tests;
