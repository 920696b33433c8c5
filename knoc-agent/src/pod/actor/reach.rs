//! What the tasks that bring something to a running shim have in common.

use std::{collections::HashMap, time::Duration};

use knoc_proto::{error::chain, ids::PodUid, pb};
use tokio::task::{self, AbortHandle, JoinSet};

use super::Actor;
use crate::{
    pod::{stage, state::Pod},
    shim_links::Client,
    shim_steps::Use,
    site::Site,
};

/// The first and the longest pause after an image could not be found, as in Kubernetes.
pub(super) const IMAGE_AGAIN: [Duration; 2] = [Duration::from_secs(10), Duration::from_mins(5)];
/// The first and the longest pause after the shim did not take something.
pub(super) const GIVE_AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_mins(1)];
/// How many images of one container the job file names, beside those that the shim's report names.
const KEPT_IMAGES: usize = 8;

/// The pause before the next try; none before the first one.
pub(super) fn pause(tries: u32, [first, longest]: [Duration; 2]) -> Duration {
    let Some(earlier) = tries.checked_sub(1) else {
        return Duration::ZERO;
    };
    let pause = first.saturating_mul(1 << earlier.min(10)).min(longest);
    pause.mul_f64(rand::random_range(0.75..1.25))
}

/// The tasks of containers, at most one for each: a pause or a long pull of one holds up no other.
#[derive(Debug)]
pub(super) struct Tasks<T> {
    tasks: JoinSet<T>,
    /// The container of each task whose result counts.
    busy: HashMap<task::Id, (String, AbortHandle)>,
}

impl<T> Default for Tasks<T> {
    fn default() -> Self {
        Self {
            tasks: JoinSet::new(),
            busy: HashMap::new(),
        }
    }
}

impl<T: Send + 'static> Tasks<T> {
    /// What the next task has done, once it has; `None` if there is no task. A task that was aborted does not count, even if it
    /// had ended already. Cancel safe.
    pub(super) async fn next(&mut self) -> Option<T> {
        loop {
            match self.tasks.join_next_with_id().await? {
                Ok((id, step)) => {
                    if self.busy.remove(&id).is_some() {
                        return Some(step);
                    }
                }
                Err(error) => {
                    self.busy.remove(&error.id());
                    if !error.is_cancelled() {
                        tracing::error!(error = chain(&error), "a task of a container");
                    }
                }
            }
        }
    }

    /// Runs the next step of this container.
    pub(super) fn start(
        &mut self,
        container: String,
        step: impl Future<Output = T> + Send + 'static,
    ) {
        let task = self.tasks.spawn(step);
        self.busy.insert(task.id(), (container, task));
    }

    /// Whether a task of this container is under way.
    pub(super) fn is_busy(&self, container: &str) -> bool {
        self.busy.values().any(|(name, _)| name == container)
    }

    /// Gives up the tasks of these containers.
    pub(super) fn abort_those(&mut self, those: impl Fn(&str) -> bool) {
        self.busy.retain(|_, (container, task)| {
            let ends = those(container);
            if ends {
                task.abort();
            }
            !ends
        });
    }

    /// Gives up all tasks.
    pub(super) fn abort(&mut self) {
        self.tasks.abort_all();
        self.busy.clear();
    }

    /// Ends the tasks.
    pub(super) async fn end(&mut self) {
        self.tasks.shutdown().await;
        self.busy.clear();
    }
}

/// The shim of a pod, if it can do that. If compute nodes cannot reach the agent, a job step carries the link while the
/// second value, if there is one, is held.
pub(super) async fn client(
    site: &Site,
    uid: &PodUid,
    capability: &'static str,
) -> Result<(Client, Option<Use>), String> {
    let text = |status: tonic::Status| status.message().to_owned();
    let used = match site.shim_links.client(uid) {
        Some(_) => site.shim_steps.held(uid),
        None => site.shim_steps.reach(uid).await.map_err(text)?,
    };
    let able = site.shim_links.able(uid, capability);
    let no_link = || {
        Err(tonic::Status::unavailable(
            "the shim has no link to the agent now",
        ))
    };
    Ok((able.unwrap_or_else(no_link).map_err(text)?, used))
}

impl Actor {
    /// Notes the image in `job.pb`: while it is named there, it stays in the cache.
    pub(super) async fn note_image(&self, pod: &Pod, found: &stage::Found) -> Result<(), String> {
        let (dir, images) = (self.dir.clone(), found.images().to_vec());
        let in_use = in_use(pod);
        let written = tokio::task::spawn_blocking(move || {
            let mut job = dir.spec()?;
            job.images = with_new(images, job.images, &in_use);
            dir.write_spec(&job)?;
            Ok::<_, knoc_contract::jobdir::JobDirError>(())
        });
        match written.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(format!("write the job file: {}", chain(&error))),
            Err(error) => Err(format!("write the job file: {}", chain(&error))),
        }
    }
}

/// The image of a container as the shim reports it.
#[derive(Debug, PartialEq)]
struct InUse {
    container: String,
    image: String,
    /// Empty: it is the next one, or its identity is not known.
    image_id: String,
}

impl InUse {
    fn is(&self, image: &pb::ResolvedImage) -> bool {
        let same_id = self.image_id.is_empty() || self.image_id == image.image_id;
        image.volume.is_empty()
            && self.container == image.container
            && self.image == image.image
            && same_id
    }
}

/// PURE: the images with which containers run, or will start next, as the shim's report has them.
fn in_use(pod: &Pod) -> Vec<InUse> {
    let reports = pod.report.iter();
    let statuses = reports.flat_map(|it| it.init_containers.iter().chain(&it.containers));
    let both = statuses.flat_map(|status| {
        let of = |image: &str, image_id: &str| InUse {
            container: status.name.clone(),
            image: image.to_owned(),
            image_id: image_id.to_owned(),
        };
        [
            of(&status.image, &status.image_id),
            of(&status.next_image, ""),
        ]
    });
    both.filter(|it| !it.image.is_empty()).collect()
}

/// PURE: the images of the job file with the new ones, which come first. The older ones of a container stay, so that they stay in
/// the cache: it may still run with one of them. What the report names stays however many newer ones there are.
fn with_new(
    new: Vec<pb::ResolvedImage>,
    known: Vec<pb::ResolvedImage>,
    in_use: &[InUse],
) -> Vec<pb::ResolvedImage> {
    let mut all = new;
    for image in known {
        let same = |one: &&pb::ResolvedImage| {
            (&one.container, &one.volume) == (&image.container, &image.volume)
        };
        let is_used = |one: &pb::ResolvedImage| in_use.iter().any(|used| used.is(one));
        let known = all.iter().filter(same).any(|one| one.path == image.path);
        // A tag that is in use may have been pushed again and again, so each has the limit, too.
        let used = is_used(&image);
        let alike =
            |one: &&pb::ResolvedImage| is_used(one) == used && (!used || one.image == image.image);
        let count = all.iter().filter(same).filter(alike).count();
        if !known && count < KEPT_IMAGES {
            all.push(image);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn after(container: &'static str, pause: u64) -> &'static str {
        tokio::time::sleep(Duration::from_secs(pause)).await;
        container
    }

    #[tokio::test(start_paused = true)]
    async fn each_container_has_a_task_of_its_own() {
        let mut tasks = Tasks::default();
        tasks.start("a".to_owned(), after("a", 300));
        tasks.start("b".to_owned(), after("b", 1));
        assert!(tasks.is_busy("a") && tasks.is_busy("b"));
        assert_eq!(tasks.next().await, Some("b"));
        assert!(tasks.is_busy("a") && !tasks.is_busy("b"));
        assert_eq!(tasks.next().await, Some("a"));
        assert_eq!(tasks.next().await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_given_up_does_not_count_even_if_it_had_ended() {
        let mut tasks = Tasks::default();
        tasks.start("a".to_owned(), after("old", 1));
        tasks.start("b".to_owned(), after("b", 9));
        tokio::time::sleep(Duration::from_secs(2)).await;
        tasks.abort_those(|container| container == "a");
        assert!(!tasks.is_busy("a") && tasks.is_busy("b"));
        tasks.start("a".to_owned(), after("new", 1));
        assert_eq!(tasks.next().await, Some("new"));
        tasks.abort();
        assert!(!tasks.is_busy("b"));
        assert_eq!(tasks.next().await, None);
    }

    #[test]
    fn older_images_of_a_container_stay_in_the_cache_behind_the_new_one() {
        let image = |container: &str, path: &str| pb::ResolvedImage {
            container: container.to_owned(),
            path: path.to_owned(),
            ..pb::ResolvedImage::default()
        };
        let mut all = vec![image("a", "0"), image("b", "0")];
        for number in 1..20 {
            all = with_new(vec![image("a", &number.to_string())], all, &[]);
        }
        assert_eq!(all.first(), Some(&image("a", "19")));
        assert!(all.contains(&image("b", "0")));
        assert_eq!(all.len(), KEPT_IMAGES + 1);
        let again = with_new(vec![image("a", "18")], all, &[]);
        assert_eq!((&*again[0].path, &*again[1].path), ("18", "19"));
        assert_eq!(again.len(), KEPT_IMAGES + 1);
    }

    #[test]
    fn the_image_that_the_report_names_stays_however_often_it_changes() {
        let image = |name: &str, digest: &str| pb::ResolvedImage {
            container: "main".to_owned(),
            image: name.to_owned(),
            image_id: digest.to_owned(),
            path: digest.to_owned(),
            ..pb::ResolvedImage::default()
        };
        let status = pb::ContainerStatus {
            name: "main".to_owned(),
            image: "app:1".to_owned(),
            image_id: "first".to_owned(),
            next_image: "app:2".to_owned(),
            ..pb::ContainerStatus::default()
        };
        let report = pb::Report {
            containers: vec![status],
            ..pb::Report::default()
        };
        let in_use = in_use(&Pod::that_reports(Some(report)));
        assert_eq!(in_use.len(), 2, "{in_use:?}");
        let mut all = vec![image("app:2", "next"), image("app:1", "first")];
        for number in 0..20 {
            let name = format!("app:{}", 3 + number);
            all = with_new(vec![image(&name, &number.to_string())], all, &in_use);
        }
        assert!(all.contains(&image("app:1", "first")), "it runs");
        assert!(all.contains(&image("app:2", "next")), "it is next");
        assert_eq!(all.len(), KEPT_IMAGES + 2);
        // A tag that is pushed again and again is bounded, too.
        for number in 0..20 {
            let digest = format!("d{number}");
            all = with_new(vec![image("app:2", &digest)], all, &in_use);
        }
        assert!(all.contains(&image("app:1", "first")), "it runs");
        assert!(all.len() <= 2 * KEPT_IMAGES + 1, "{}", all.len());
        assert!(super::in_use(&Pod::that_reports(None)).is_empty());
    }
}
