//! What the tasks that bring something to a running shim have in common.

use std::{collections::HashMap, time::Duration};

use knoc_proto::{error::chain, ids::PodUid};
use tokio::task::{self, AbortHandle, JoinSet};

use crate::{shim_links::Client, shim_steps::Use, site::Site};

/// The first and the longest pause after an image could not be found, as in Kubernetes.
pub(super) const IMAGE_AGAIN: [Duration; 2] = [Duration::from_secs(10), Duration::from_mins(5)];
/// The first and the longest pause after the shim did not take something.
pub(super) const GIVE_AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_mins(1)];

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
}
