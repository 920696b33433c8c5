//! The values of a pod. The newest accepted revision reaches the shim, whatever is interrupted or
//! restarted in between.
//!
//! The actor compares levels, not edges: the newest accepted revision and the revision in the
//! shim's report. While the shim's is older and its link is up, a task pushes the values and
//! repeats that after pauses. Until the shim has them, they are in `JOBDIR/values`, which a shim
//! reads at its start and polls while it has no link, or (`at_rest = "none"`) in memory. If an
//! agent's restart loses values in memory, the pod is published as wanting values, and the kubelet
//! sends its newest.

use std::{sync::Arc, time::Duration};

use knoc_contract::{capability, jobdir::JobDir};
use knoc_proto::{error::chain, ids::PodUid, pb, pod::PodValues, reason::ErrorReason};
use tokio::task::AbortHandle;
use tonic::Request;

use super::Actor;
use crate::{
    config::AtRest,
    pod::{
        input::RequestError,
        state::{Effect, Event, Pod},
    },
    shim_links::{Client, DEADLINE},
    site::Site,
};

/// The first and the longest pause after a shim did not take its values.
const PUSH_AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_mins(1)];

/// The pause after no job step could carry the link for values.
const CARRY_AGAIN: Duration = Duration::from_secs(15);

/// The newest accepted values, and the push to the shim.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// Their revision.
    pub(super) revision: i64,
    /// The values themselves; kept only if values must not lie on disk.
    memory: Option<PodValues>,
    push: Option<ValuesPush>,
    /// The task that has a job step carry the link.
    carrying: Option<AbortHandle>,
}

/// The task that pushes values to the shim until it has them.
#[derive(Debug)]
struct ValuesPush {
    /// The revision that it pushes, or a newer one.
    revision: i64,
    task: AbortHandle,
}

impl Actor {
    /// Handles `UpdateValues`: checks newer values against the pod's shape before they are used.
    pub(super) async fn check_and_update_values(
        &mut self,
        pod: &Pod,
        values: pb::PodValues,
    ) -> Result<(), RequestError> {
        if pod.is_finished() || values.revision <= self.values.revision {
            return Ok(());
        }
        let checked = PodValues::check(values, &self.spec);
        let values = checked
            .map_err(|error| RequestError::new(ErrorReason::InvalidSpec, error.to_string()))?;
        self.update_values(pod, values).await
    }

    /// Pushes newer values to the shim if its link is up; keeps them for it otherwise.
    pub(super) async fn update_values(
        &mut self,
        pod: &Pod,
        values: PodValues,
    ) -> Result<(), RequestError> {
        if pod.is_finished() || values.revision <= self.values.revision {
            return Ok(());
        }
        let given = match self.site.shim_links.client(&self.uid) {
            Some(client) => give(client, (*values).clone()).await,
            None => Err("the pod runs, and its shim has no link to the agent now".to_owned()),
        };
        match given {
            Ok(()) => {
                self.values.revision = values.revision;
                unstage(&self.dir, values.revision).await;
                self.hold(values);
                Ok(())
            }
            // An older shim does not report its revision, and never polls for staged values.
            Err(message) if pod.report.is_some() && revision_of_shim(pod).is_none() => {
                Err(RequestError::new(ErrorReason::ShimUnreachable, message))
            }
            Err(_) => self.keep(pod, values).await,
        }
    }

    /// Keeps values for a shim that cannot be reached now: on disk, or in memory with a record of
    /// the revision.
    async fn keep(&mut self, pod: &Pod, values: PodValues) -> Result<(), RequestError> {
        let revision = values.revision;
        let failed = |error: &(dyn std::error::Error + 'static)| {
            let message = format!("stage values: {}", chain(error));
            RequestError::new(ErrorReason::Internal, message)
        };
        if self.site.config.values.at_rest == AtRest::File {
            let dir = self.dir.clone();
            let written = tokio::task::spawn_blocking(move || dir.write_values(&values)).await;
            written.map_err(|e| failed(&e))?.map_err(|e| failed(&e))?;
            self.values.revision = revision;
        } else {
            self.values.revision = revision;
            self.hold(values);
            self.perform(pod, vec![Effect::Persist]).await;
            self.saved()?;
        }
        self.push_values(pod, false);
        Ok(())
    }

    /// A job that runs again asks for its values again.
    pub(super) fn hold(&mut self, values: PodValues) {
        let held = self.site.config.values.at_rest == AtRest::None;
        self.values.memory = held.then_some(values);
    }

    /// A link came up, and nothing has been pushed on it yet.
    pub(super) fn linked(&mut self) {
        self.values.push.take_if(|push| push.task.is_finished());
    }

    /// Pushes the values that the shim lacks, if its link is up and no push is under way.
    /// `reported`: the shim has just reported its revision.
    pub(super) fn push_values(&mut self, pod: &Pod, reported: bool) {
        let given = self.values.push.as_ref().map(|push| push.revision);
        let busy = self.values.push.as_ref();
        let busy = busy.is_some_and(|push| !push.task.is_finished());
        let has = revision_of_shim(pod);
        let held = self.values.memory.is_some();
        if busy || pod.is_finished() || !due(has, self.values.revision, held, reported, given) {
            return;
        }
        if self.site.shim_links.client(&self.uid).is_none() {
            return self.have_link_carried();
        }
        let (site, uid, dir) = (Arc::clone(&self.site), self.uid.clone(), self.dir.clone());
        let work = push_until_acked(site, uid, dir, self.values.memory.clone());
        self.values.push = Some(ValuesPush {
            revision: self.values.revision,
            task: self.effects.spawn(work),
        });
    }

    /// Values that are in memory only can reach the shim over its link alone. If compute nodes cannot
    /// reach the agent, a job step carries it; the push follows once it is up.
    fn have_link_carried(&mut self) {
        let busy = self.values.carrying.as_ref();
        if self.values.memory.is_none() || busy.is_some_and(|task| !task.is_finished()) {
            return;
        }
        let (site, uid) = (Arc::clone(&self.site), self.uid.clone());
        self.values.carrying = Some(self.effects.spawn(async move {
            match site.shim_steps.reach(&uid).await {
                // The step goes on for `srun_idle` after this use, which is enough for the push.
                Ok(_used) => {}
                Err(status) => {
                    tracing::warn!(%uid, error = status.message(), "the shim lacks its values");
                    tokio::time::sleep(CARRY_AGAIN).await;
                }
            }
            Event::Tick
        }));
    }

    /// Whether the shim lacks the accepted values, or has none, and the agent has lost them.
    pub(super) fn wants_values(&self, pod: &Pod) -> bool {
        if self.values.memory.is_some() {
            return false;
        }
        // Staged values stay on disk until the shim has them.
        let lost = self.site.config.values.at_rest == AtRest::None
            && revision_of_shim(pod).is_some_and(|has| has < self.values.revision);
        let waits = |report: &pb::Report| report.waits_for_values;
        lost || pod.report.as_ref().is_some_and(waits)
    }

    /// Removes the values: nothing secret outlives the pod.
    pub(super) async fn clean_up(&mut self) {
        self.values.memory = None;
        self.values.push.take().inspect(|push| push.task.abort());
        self.values.carrying.take().inspect(AbortHandle::abort);
        let dir = self.dir.clone();
        match tokio::task::spawn_blocking(move || dir.remove_values()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(uid = %self.uid, error = chain(&error), "values"),
            Err(error) => tracing::warn!(uid = %self.uid, error = chain(&error), "values"),
        }
    }
}

/// The revision that the shim has reported; `None` if there is no report, or an older shim wrote
/// it.
pub(super) fn revision_of_shim(pod: &Pod) -> Option<i64> {
    pod.report.as_ref()?.values_revision
}

/// PURE: whether to push `newest` to the shim, which has revision `has`. A shim that does not
/// report its revision gets what is `held` in memory, once for each link. The revision `given` is
/// not pushed again before a report shows that the shim lacks it.
fn due(has: Option<i64>, newest: i64, held: bool, reported: bool, given: Option<i64>) -> bool {
    let lacks = has.map_or(held, |has| has < newest);
    let contradicted = reported && has.is_some();
    lacks && (contradicted || given.is_none_or(|given| given < newest))
}

/// PURE: the values as older shims take them. Only an ephemeral container can have variables from files there, and it is not
/// given to such a shim.
fn without_files(mut values: pb::PodValues) -> pb::PodValues {
    for env in values.env.iter_mut().chain(&mut values.ephemeral_env) {
        env.vars
            .retain(|var| !matches!(var.value, Some(pb::env_var::Value::File(_))));
    }
    values
}

/// Pushes the values, from memory or from the job directory, until the shim acknowledges them or
/// its link is gone.
async fn push_until_acked(
    site: Arc<Site>,
    uid: PodUid,
    dir: JobDir,
    held: Option<PodValues>,
) -> Event {
    let [mut pause, longest] = PUSH_AGAIN;
    loop {
        let values = match &held {
            Some(values) => Some((**values).clone()),
            None => staged(&dir).await,
        };
        let (Some(values), Some(client)) = (values, site.shim_links.client(&uid)) else {
            break;
        };
        let reads_files = site.shim_links.able(&uid, capability::ENV_FILES);
        let values = match reads_files {
            Some(Ok(_)) => values,
            Some(Err(_)) | None => without_files(values),
        };
        let revision = values.revision;
        match give(client, values).await {
            Ok(()) => {
                unstage(&dir, revision).await;
                break;
            }
            Err(error) => tracing::warn!(%uid, error, "give the shim its values"),
        }
        let jittered = pause.mul_f64(rand::random_range(0.5..1.5));
        tokio::time::sleep(jittered).await;
        pause = (pause * 2).min(longest);
    }
    // The shim's report says what it has.
    Event::Tick
}

async fn give(mut client: Client, values: pb::PodValues) -> Result<(), String> {
    let mut request = Request::new(values);
    request.set_timeout(DEADLINE);
    let answer = client.update_values(request).await;
    answer
        .map(|_| ())
        .map_err(|status| status.message().to_owned())
}

/// Reads the staged values. Values that cannot be read count as missing.
async fn staged(dir: &JobDir) -> Option<pb::PodValues> {
    let dir = dir.clone();
    let error = match tokio::task::spawn_blocking(move || dir.values()).await {
        Ok(Ok(values)) => return values,
        Ok(Err(error)) => chain(&error),
        Err(error) => chain(&error),
    };
    tracing::warn!(error, "staged values");
    None
}

/// The shim has the values, so they need not stay on disk.
async fn unstage(dir: &JobDir, revision: i64) {
    let dir = dir.clone();
    let removed = tokio::task::spawn_blocking(move || dir.remove_values_up_to(revision)).await;
    let error = match removed {
        Ok(Ok(())) => return,
        Ok(Err(error)) => chain(&error),
        Err(error) => chain(&error),
    };
    tracing::warn!(error, "staged values stay");
}

#[cfg(test)]
mod tests {
    use knoc_proto::pb::{self, env_var::Value};

    use super::{due, without_files};

    #[test]
    fn an_older_shim_gets_no_variable_from_a_file() {
        let var = |name: &str, value| pb::EnvVar {
            name: name.to_owned(),
            value: Some(value),
        };
        let vars = vec![
            var("A", Value::File(pb::FileKey::default())),
            var("B", Value::Template("b".to_owned())),
        ];
        let values = pb::PodValues {
            revision: 7,
            ephemeral_env: vec![pb::ContainerEnv {
                container: "debugger".to_owned(),
                vars,
            }],
            ..pb::PodValues::default()
        };
        let values = without_files(values);
        let names = values.ephemeral_env[0].vars.iter();
        let names: Vec<_> = names.map(|var| var.name.as_str()).collect();
        assert_eq!((names, values.revision), (vec!["B"], 7));
    }

    #[test]
    fn a_shim_gets_the_values_that_it_lacks_and_none_twice() {
        let reports = |has| move |given| due(Some(has), 2, false, true, given);
        assert!(reports(1)(None), "it took what was staged first");
        assert!(reports(0)(Some(2)), "it runs again and has none");
        assert!(!reports(2)(None));
        assert!(!reports(3)(Some(1)));
        // Between two reports of the shim.
        assert!(due(Some(1), 2, false, false, None));
        assert!(due(Some(1), 2, false, false, Some(1)), "newer ones came");
        assert!(
            !due(Some(1), 2, false, false, Some(2)),
            "its report is awaited"
        );
    }

    #[test]
    fn a_shim_that_does_not_say_what_it_has_gets_what_is_in_memory_once() {
        assert!(due(None, 1, true, false, None));
        assert!(!due(None, 1, true, true, Some(1)));
        assert!(due(None, 2, true, true, Some(1)));
        assert!(!due(None, 1, false, true, None));
    }
}
