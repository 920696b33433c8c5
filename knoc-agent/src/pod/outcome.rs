//! PURE: how a pod ended, from the shim's report, Slurm's state and the party that asked for the
//! end.
//!
//! A synced final report beats every Slurm state: one OOM-killed child makes a *job* OUT_OF_MEMORY
//! although its containers succeeded. If a signal from outside ended the containers, the exit codes
//! come from the report and the reason from Slurm, and so they do if a rank was lost. Without a report
//! the pod never counts as succeeded.
//!
//! As with a kubelet, the pod's deadline counts until its last container has ended: it fails a pod whose sidecars were
//! still stopping then, or one that was being deleted, however well its containers ended.

use std::time::Duration;

use jiff::Timestamp;
use knoc_contract::exit_codes::ShimExit;
use knoc_proto::pb;

use crate::scheduler::{JobPhase, JobState, JobView};

/// slurmd's exit code (as a signal) if the script's output file cannot be opened.
const SIGNAL_UNWRITABLE: i32 = 53;

/// By how many seconds a job that reached its time limit may seem to have ended before it.
const EARLY: i64 = 180;

/// Kubernetes' reason for a pod whose `activeDeadlineSeconds` have passed …
pub const DEADLINE_EXCEEDED: &str = "DeadlineExceeded";

/// … and its message.
pub const OVERDUE: &str = "Pod was active on the node longer than the specified deadline";

/// How a pod ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Whether the pod succeeded.
    pub succeeded: bool,
    /// A reason in CamelCase; empty if the containers' exit codes say enough.
    pub reason: String,
    /// The message for users.
    pub message: String,
    /// Whether the infrastructure is at fault.
    pub disruption: bool,
    /// When the pod ended.
    pub finished_at: Timestamp,
}

/// Why the agent itself ended a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// `DeletePod`, with its message.
    Deleted(String),
    /// The job waited for a reason that never ends.
    NeverStarts(String),
    /// The pod's own deadline has passed, and its shim did not know it.
    Deadline,
}

/// Everything that is known about the end.
#[derive(Debug)]
pub struct Evidence<'a> {
    /// The newest view from the scheduler.
    pub view: Option<&'a JobView>,
    /// The newest report, final or not.
    pub report: Option<&'a pb::Report>,
    /// Why the agent ended the job, if it did.
    pub cause: Option<&'a Cause>,
    /// The pod's own deadline.
    pub deadline: Option<Duration>,
    /// The termination grace period.
    pub grace: Duration,
    /// The end of `batch.out`.
    pub batch_tail: &'a str,
    /// No shim had claimed the job directory when the files were read.
    pub unclaimed: bool,
}

/// Decides how the pod ended.
#[must_use]
pub fn decide(evidence: &Evidence<'_>, now: Timestamp) -> Outcome {
    match evidence.report.filter(|report| report.r#final) {
        Some(report) => with_report(evidence, report, now),
        None => without_report(evidence, now),
    }
}

fn with_report(evidence: &Evidence<'_>, report: &pb::Report, now: Timestamp) -> Outcome {
    let own = Outcome {
        succeeded: report.outcome() == pb::OutcomeKind::Succeeded,
        reason: report.reason.clone(),
        message: report.message.clone(),
        disruption: false,
        finished_at: last_end(report).unwrap_or(now),
    };
    match report.ended_by() {
        pb::EndedBy::Unspecified | pb::EndedBy::Themselves | pb::EndedBy::Stop
            if outlived_deadline(evidence, report) =>
        {
            failed(&Cause::Deadline, own.finished_at)
        }
        // As in Kubernetes, an eviction for the pod's own limits is no disruption: it would come again with the next pod.
        pb::EndedBy::Unspecified
        | pb::EndedBy::Themselves
        | pb::EndedBy::NoValues
        | pb::EndedBy::Evicted => own,
        pb::EndedBy::Stop => match evidence.cause {
            // Failed even if its containers still succeed.
            Some(cause @ Cause::Deadline) => failed(cause, own.finished_at),
            Some(cause) if !own.succeeded => failed(cause, own.finished_at),
            Some(_) | None => own,
        },
        pb::EndedBy::Deadline => Outcome {
            succeeded: false,
            reason: DEADLINE_EXCEEDED.to_owned(),
            message: if own.message.is_empty() {
                OVERDUE.to_owned()
            } else {
                own.message
            },
            ..own
        },
        // As with a signal, Slurm may have ended the job, and killed the helper of the rank on the way.
        pb::EndedBy::Signal | pb::EndedBy::LostRank => by_signal(evidence, own),
        pb::EndedBy::LostNode => by_signal(evidence, node_lost(own.finished_at)),
        pb::EndedBy::TimeLimit => at_time_limit(evidence, own),
    }
}

/// Whether the last container ended after the pod's deadline, which counts from when the shim began.
fn outlived_deadline(evidence: &Evidence<'_>, report: &pb::Report) -> bool {
    let (Some(deadline), Some(end)) = (evidence.deadline, last_end(report)) else {
        return false;
    };
    let began = Timestamp::from_nanosecond(report.started_at.into()).ok();
    let limit = began.and_then(|began| began.checked_add(deadline).ok());
    report.started_at > 0 && limit.is_some_and(|limit| end >= limit)
}

/// The shim ended the containers because the job's time limit was near. The job then ends by
/// itself, before Slurm could report a timeout.
fn at_time_limit(evidence: &Evidence<'_>, own: Outcome) -> Outcome {
    match evidence.cause {
        Some(_) if own.succeeded => own,
        Some(cause) => failed(cause, own.finished_at),
        None => time_limit(evidence, own.finished_at),
    }
}

/// A signal from outside ended the containers: the reason is Slurm's, or the agent's if it sent the
/// signal.
fn by_signal(evidence: &Evidence<'_>, own: Outcome) -> Outcome {
    if let Some(cause) = evidence.cause {
        return if own.succeeded {
            own
        } else {
            failed(cause, own.finished_at)
        };
    }
    let view = evidence.view;
    let slurm = view.and_then(|view| by_state(evidence, view).or_else(|| requeued(evidence, view)));
    match slurm {
        Some(slurm) => Outcome {
            finished_at: own.finished_at,
            ..slurm
        },
        // Slurm knows nothing about it (the job went on and completed), so the report stands.
        None => own,
    }
}

/// The shim has noticed that a node does not answer any more before Slurm has, or the job ended before Slurm could say so.
fn node_lost(finished_at: Timestamp) -> Outcome {
    disrupted(
        "NodeFailed",
        "a compute node of the job, or the network to it, does not answer any more; the message of the container names it",
        finished_at,
    )
}

fn failed(cause: &Cause, finished_at: Timestamp) -> Outcome {
    let (reason, message) = match cause {
        Cause::Deleted(message) => ("Deleted", message.clone()),
        Cause::NeverStarts(reason) => (
            "SlurmJobNeverStarts",
            format!("the job would have waited forever: {reason}"),
        ),
        Cause::Deadline => (DEADLINE_EXCEEDED, OVERDUE.to_owned()),
    };
    plain(reason, &message, finished_at)
}

fn without_report(evidence: &Evidence<'_>, now: Timestamp) -> Outcome {
    let ended = evidence.view.and_then(|view| view.ended_at);
    let at = ended
        .and_then(|seconds| Timestamp::from_second(seconds).ok())
        .unwrap_or(now);
    if let Some(cause) = evidence.cause {
        return failed(cause, at);
    }
    let Some(view) = evidence.view else {
        return unknown(
            "the scheduler does not know the job, and it left no report",
            evidence,
            at,
        );
    };
    // The shim's exit code comes before the state, which only repeats that the code was not zero.
    let decided = by_exit(evidence, view)
        .or_else(|| before_shim(evidence, view))
        .or_else(|| by_state(evidence, view))
        .or_else(|| requeued(evidence, view));
    let decided = decided.unwrap_or_else(|| {
        let how = view.exit.map_or_else(String::new, |exit| {
            format!(", exit code {}, signal {}", exit.code, exit.signal)
        });
        unknown(
            &format!("the job ended ({}{how}) without a report", view.state),
            evidence,
            at,
        )
    });
    Outcome {
        finished_at: at,
        ..decided
    }
}

/// Whether the job waits in the queue. `false` if the state is not known.
#[must_use]
pub fn is_in_queue(view: &JobView) -> bool {
    view.state.phase() == JobPhase::Queued && !matches!(view.state, JobState::Unknown(_))
}

/// The job was requeued after its containers had begun. They are not started again, because the
/// claim is taken.
fn requeued(evidence: &Evidence<'_>, view: &JobView) -> Option<Outcome> {
    let report = evidence.report?;
    let later_life = i64::from(view.restarts) > i64::from(report.restart);
    let waits = is_in_queue(view);
    (later_life || waits).then(|| {
        let how = match (waits, view.reason.as_str()) {
            (false, _) => String::new(),
            (true, "") => format!(" ({})", view.state),
            (true, reason) => format!(" ({}: {reason})", view.state),
        };
        let message = format!(
            "Slurm requeued the job{how}, whose containers had begun: they are not started again"
        );
        disrupted("SlurmJobRequeued", &message, Timestamp::UNIX_EPOCH)
    })
}

fn by_exit(evidence: &Evidence<'_>, view: &JobView) -> Option<Outcome> {
    let at = Timestamp::UNIX_EPOCH;
    let exit = view.exit?;
    match (ShimExit::of(exit.code), exit.signal) {
        (Some(ShimExit::NotReported), _) => {
            Some(unknown("the shim could not write its report", evidence, at))
        }
        (Some(ShimExit::CannotStart), _) => Some(plain(
            "CannotStart",
            &with_tail("the shim could not start", evidence),
            at,
        )),
        (Some(ShimExit::Surplus), _) => requeued(evidence, view).or_else(|| {
            let taken = "the claim of the job directory is another job's";
            Some(unknown(taken, evidence, at))
        }),
        (Some(ShimExit::Succeeded), SIGNAL_UNWRITABLE) => Some(plain(
            "CannotStart",
            "slurmd could not open the job's output file (exit 0:53): the state directory is not \
             there or not writable on the compute node; is it on a shared file system?",
            at,
        )),
        (Some(ShimExit::Succeeded | ShimExit::Failed) | None, _) => None,
    }
}

/// The batch script ended before it became the shim, so a command before that failed: the site's
/// prelude. A shim ends with few exit codes, and it reports a success or a failure of its
/// containers only after it has claimed the job directory.
fn before_shim(evidence: &Evidence<'_>, view: &JobView) -> Option<Outcome> {
    let exit = view.exit.filter(|exit| exit.signal == 0)?;
    let by_itself = matches!(view.state, JobState::Completed | JobState::Failed);
    let own_code = ShimExit::of(exit.code).is_some_and(ShimExit::promises_report);
    if !by_itself || evidence.report.is_some() || (own_code && !evidence.unclaimed) {
        return None;
    }
    let message = format!(
        "the batch script ended with code {} before it could start the shim: look at `prelude` in the site file, and \
         whether compute nodes see the state directory",
        exit.code
    );
    let message = with_tail(&message, evidence);
    Some(plain("CannotStart", &message, Timestamp::UNIX_EPOCH))
}

/// What Slurm's state alone says. `None` if it does not say why the job ended.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the states that end a job for a reason of their own are all above"
)]
fn by_state(evidence: &Evidence<'_>, view: &JobView) -> Option<Outcome> {
    let at = Timestamp::UNIX_EPOCH;
    let outcome = match &view.state {
        JobState::Timeout => time_limit(evidence, at),
        JobState::Deadline => plain("SlurmDeadline", "the job's --deadline passed", at),
        JobState::OutOfMemory => plain(
            "OOMKilled",
            &with_tail(
                "the job was killed for using more memory than it asked for",
                evidence,
            ),
            at,
        ),
        JobState::Preempted => disrupted("Preempted", "a more important job took the nodes", at),
        state if state.is_disruption() => {
            disrupted("NodeFailed", &format!("Slurm ended the job: {state}"), at)
        }
        JobState::Cancelled { by } => {
            let who = by.map_or_else(String::new, |uid| format!(" by user id {uid}"));
            plain(
                "Cancelled",
                &format!("the job was cancelled{who}, not through Kubernetes"),
                at,
            )
        }
        // The job has not ended, or its state does not say why.
        _ => return None,
    };
    Some(outcome)
}

/// The job reached its time limit: the pod's own or the partition's. Slurm says the same of a job whose reservation has ended.
fn time_limit(evidence: &Evidence<'_>, at: Timestamp) -> Outcome {
    let view = evidence.view;
    let limit = view
        .and_then(|view| view.time_limit_minutes)
        .map_or_else(String::new, |m| format!(" of {m} minutes"));
    // The shim is warned ahead of the time limit, and never of the end of a reservation.
    let warned = evidence
        .report
        .is_some_and(|report| report.ended_by() == pb::EndedBy::TimeLimit);
    if !warned && view.is_some_and(ended_early) {
        let message = format!(
            "Slurm ended the job before its time limit{limit}, as it does if a reservation ends"
        );
        return plain("SlurmTimeLimit", &message, at);
    }
    if view.is_some_and(|view| deadline_was_the_limit(evidence, view)) {
        return plain(DEADLINE_EXCEEDED, OVERDUE, at);
    }
    plain(
        "SlurmTimeLimit",
        &format!("the job reached its time limit{limit}"),
        at,
    )
}

/// Whether the job ended well before its time limit. If it was suspended it seems to have run for longer than it did.
fn ended_early(view: &JobView) -> bool {
    let (Some(limit), Some(start), Some(end)) =
        (view.time_limit_minutes, view.started_at, view.ended_at)
    else {
        return false;
    };
    end.saturating_sub(start).saturating_add(EARLY) < limit.saturating_mul(60)
}

/// Whether the job's time limit was derived from the pod's own deadline (plus its grace period,
/// rounded up to minutes).
fn deadline_was_the_limit(evidence: &Evidence<'_>, view: &JobView) -> bool {
    let (Some(deadline), Some(minutes)) = (evidence.deadline, view.time_limit_minutes) else {
        return false;
    };
    let seconds = u64::try_from(minutes).unwrap_or(0).saturating_mul(60);
    // A shorter explicit time limit is Slurm's. The slack covers the warning ahead of the limit and
    // the rounding.
    deadline.as_secs() <= seconds
        && seconds <= (deadline + evidence.grace).as_secs().saturating_add(180)
}

fn plain(reason: &str, message: &str, finished_at: Timestamp) -> Outcome {
    let (reason, message) = (reason.to_owned(), message.to_owned());
    Outcome {
        succeeded: false,
        reason,
        message,
        disruption: false,
        finished_at,
    }
}

fn disrupted(reason: &str, message: &str, finished_at: Timestamp) -> Outcome {
    Outcome {
        disruption: true,
        ..plain(reason, message, finished_at)
    }
}

fn unknown(message: &str, evidence: &Evidence<'_>, at: Timestamp) -> Outcome {
    plain("ContainerStatusUnknown", &with_tail(message, evidence), at)
}

fn with_tail(message: &str, evidence: &Evidence<'_>) -> String {
    match evidence.batch_tail.trim() {
        "" => message.to_owned(),
        tail => format!("{message}; the job's output ends with: {tail}"),
    }
}

/// When the last container ended.
fn last_end(report: &pb::Report) -> Option<Timestamp> {
    let all = report.init_containers.iter().chain(&report.containers);
    let ends = all.filter_map(|container| match &container.state {
        Some(pb::container_status::State::Terminated(terminated)) => Some(terminated.finished_at),
        Some(pb::container_status::State::Waiting(_) | pb::container_status::State::Running(_))
        | None => None,
    });
    Timestamp::from_nanosecond(ends.max().filter(|at| *at > 0)?.into()).ok()
}

#[cfg(test)]
mod tests;
