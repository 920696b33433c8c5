//! PURE: what the shim's reports mean for a pod.

use jiff::Timestamp;
use knoc_proto::{ids::JobId, pb};

use super::{
    ending,
    event::Effect,
    pod::Pod,
    states::{BeforeJob, JobStage, State},
    transition::{conclude, job_ended, run},
};
use crate::pod::{outcome::Cause, placement::Placement};

/// A report of the shim. Reports come only from the job that holds the claim.
pub(super) fn report(pod: &mut Pod, report: pb::Report, now: Timestamp) -> Vec<Effect> {
    let newer = pod.report.as_ref().is_none_or(|known| {
        (report.restart, report.sequence, report.r#final)
            > (known.restart, known.sequence, known.r#final)
    });
    if !newer || report.uid != pod.facts.uid.as_str() || pod.is_finished() {
        return Vec::new();
    }
    let Ok(job) = JobId::try_from(report.job_id.as_str()) else {
        return Vec::new();
    };
    adopt(pod, &job, now);
    take_notes(pod, &report);
    let is_final = report.r#final;
    pod.report = Some(report);
    pod.read_soon(now);
    job_reported(pod, job, is_final, now)
}

/// After a restart of the agent: the report on disk goes before any question to the scheduler.
pub(super) fn resume(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    let Some(report) = &pod.report else {
        return Vec::new();
    };
    let is_final = report.r#final;
    let Ok(job) = JobId::try_from(report.job_id.as_str()) else {
        return Vec::new();
    };
    job_reported(pod, job, is_final, now)
}

/// The shim of `job` holds the claim, so the job runs; with its final report it is about to end.
fn job_reported(pod: &mut Pod, job: JobId, is_final: bool, now: Timestamp) -> Vec<Effect> {
    let mut effects = if is_news(&pod.state) {
        // During a submission this is the answer that sbatch, or the search by name, has not given yet.
        let submitting = matches!(pod.state, State::BeforeJob(_));
        let mut effects = run(pod, Placement::own_job(job), now);
        if submitting {
            // Does nothing unless the pod is being deleted.
            effects.extend(ending::tell(pod, now));
        }
        effects
    } else {
        Vec::new()
    };
    if is_final {
        effects.extend(final_report(pod, now));
    }
    effects
}

/// Whether it is news to a pod in this state that its job runs.
fn is_news(state: &State) -> bool {
    match state {
        State::BeforeJob(before) => match before {
            BeforeJob::Submitting { .. } => true,
            BeforeJob::Accepted | BeforeJob::Staging { .. } | BeforeJob::Throttled { .. } => false,
        },
        State::WithJob { stage, .. } => match stage {
            JobStage::Queued { .. } | JobStage::Lost { .. } => true,
            JobStage::Stopping { cause, .. } => matches!(cause, Cause::NeverStarts(_)),
            JobStage::Running | JobStage::Settling { .. } => false,
        },
        State::Finished { .. } | State::Forgotten => false,
    }
}

/// If another job than the placement's holds the claim, the placement follows the claim.
fn adopt(pod: &mut Pod, claimant: &JobId, now: Timestamp) {
    let State::WithJob { placement, .. } = &mut pod.state else {
        return;
    };
    let Some(replaced) = placement.follow_claim(claimant) else {
        return;
    };
    let text = format!("job {claimant} holds the claim; it is the pod's instead of {replaced}");
    pod.view = None;
    pod.sbatch = None;
    pod.note(true, "SlurmJobSurplus", text, now);
}

/// Takes each note of the shim once.
fn take_notes(pod: &mut Pod, report: &pb::Report) {
    let known = pod
        .report
        .as_ref()
        .and_then(|known| known.notes.last())
        .map_or(0, |n| n.sequence);
    for note in report.notes.iter().filter(|note| note.sequence > known) {
        pod.push_note(note.clone());
    }
}

/// All containers have ended, and the report of it is synced to disk.
fn final_report(pod: &mut Pod, now: Timestamp) -> Vec<Effect> {
    // What ended the program may have been the end of the job, and so may what broke the connection to a rank.
    let from_outside = pod.report.as_ref().is_some_and(|report| {
        let by = report.ended_by();
        matches!(by, pb::EndedBy::Signal | pb::EndedBy::LostRank)
    });
    let Some(stage) = pod.stage() else {
        return Vec::new();
    };
    match stage {
        // Only Slurm knows why; and only the end of the job finishes a pod that is being deleted.
        JobStage::Running if from_outside => {
            let until = now + pod.facts.timeouts.report_grace;
            let settling = JobStage::Settling {
                cause: None,
                until,
                look_at: until,
            };
            pod.enter_stage(settling, now);
            vec![Effect::Persist, Effect::PollSoon]
        }
        JobStage::Running => conclude(pod, None, now),
        JobStage::Settling { cause: None, .. } if from_outside && !job_ended(pod) => {
            vec![Effect::PollSoon]
        }
        JobStage::Settling { cause, .. } => {
            let cause = cause.clone();
            conclude(pod, cause.as_ref(), now)
        }
        JobStage::Stopping { .. } => vec![Effect::PollSoon],
        JobStage::Queued { .. } | JobStage::Lost { .. } => Vec::new(),
    }
}
