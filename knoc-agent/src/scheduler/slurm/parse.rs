//! What squeue, sacct and scontrol print, as [`JobView`]s. Pure.
//!
//! The formats are ours, so that the columns are the same in every version: a delimiter, and last the
//! only columns that people can put a delimiter into. All times are UTC, since the commands run with
//! `TZ=UTC`. A line that is not as asked for, or of a job that is not ours, is no error: other jobs of
//! the same user may have any name.

use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use knoc_proto::ids::JobId;

use super::script::{parse_comment, uid_of_name};
use crate::scheduler::{JobExit, JobPhase, JobState, JobView};

/// `squeue -o`: id, state, reason, partition, nodes, submitted, start, end, limit, name, comment.
pub(super) const SQUEUE_FORMAT: &str = "%i|%T|%r|%P|%N|%V|%S|%e|%l|%j|%k";
/// `sacct -o`.
pub(super) const SACCT_FORMAT: &str = "JobIDRaw,State,Reason,ExitCode,Partition,NodeList,Submit,Start,End,TimelimitRaw,JobName,Comment";

/// All jobs of ours in squeue's answer.
#[must_use]
pub(super) fn squeue(text: &str) -> Vec<JobView> {
    text.lines().filter_map(squeue_line).collect()
}

fn squeue_line(line: &str) -> Option<JobView> {
    let [
        id,
        state,
        reason,
        partition,
        nodes,
        submit,
        start,
        end,
        limit,
        name,
        comment,
    ] = columns(line)?;
    let uid = uid_of_name(name)?;
    let (cluster_id, attempt) = parse_comment(comment, &uid)?;
    let state = JobState::parse(state);
    let phase = state.phase();
    let start = time(start);
    Some(JobView {
        id: JobId::try_from(id).ok()?,
        uid,
        cluster_id,
        attempt,
        reason: word(reason),
        exit: None,
        nodes: word(nodes),
        partition: word(partition),
        submitted_at: time(submit),
        started_at: start.filter(|_| phase != JobPhase::Queued),
        ended_at: time(end).filter(|_| phase == JobPhase::Ended),
        estimated_start: start.filter(|_| phase == JobPhase::Queued),
        time_limit_minutes: minutes(limit),
        restarts: 0,
        state,
    })
}

/// All jobs of ours in the accounting's answer; of a job that was requeued, or an id that was given
/// twice, every life, the oldest first.
#[must_use]
pub(super) fn sacct(text: &str) -> Vec<JobView> {
    text.lines().filter_map(sacct_line).collect()
}

fn sacct_line(line: &str) -> Option<JobView> {
    let [
        id,
        state,
        reason,
        exit_code,
        partition,
        nodes,
        submit,
        start,
        end,
        limit,
        name,
        comment,
    ] = columns(line)?;
    let uid = uid_of_name(name)?;
    // Sites need not keep comments; one that is there must agree.
    let (cluster_id, attempt) = match comment {
        "" => (String::new(), 0),
        comment => parse_comment(comment, &uid)?,
    };
    let state = JobState::parse(state);
    let ended = state.phase() == JobPhase::Ended;
    Some(JobView {
        id: JobId::try_from(id).ok()?,
        uid,
        cluster_id,
        attempt,
        reason: word(reason),
        exit: exit(exit_code).filter(|_| ended),
        nodes: word(nodes),
        partition: word(partition),
        submitted_at: time(submit),
        started_at: time(start),
        ended_at: time(end).filter(|_| ended),
        estimated_start: None,
        time_limit_minutes: minutes(limit),
        restarts: 0,
        state,
    })
}

/// `scontrol show job -o ID`: exit and restarts of a job, where its name agrees.
#[must_use]
pub(super) fn scontrol_job(text: &str, name: &str) -> Option<(JobState, Option<JobExit>, u32)> {
    let line = text.lines().find(|line| line.starts_with("JobId="))?;
    // Values may hold blanks and more `key=value`, but the first of each key is Slurm's own: what
    // people can write stands behind (Comment, Command, SubmitLine), only JobName stands before.
    let field = |key: &str| {
        let prefix = format!("{key}=");
        line.split(' ')
            .find_map(|word| word.strip_prefix(prefix.as_str()))
    };
    if field("JobName") != Some(name) {
        return None;
    }
    let state = JobState::parse(field("JobState")?);
    let exit = exit(field("ExitCode")?).filter(|_| state.phase() == JobPhase::Ended);
    Some((
        state,
        exit,
        field("Restarts").and_then(|n| n.parse().ok()).unwrap_or(0),
    ))
}

/// The columns of a line; the last one takes what is left.
fn columns<const N: usize>(line: &str) -> Option<[&str; N]> {
    let columns: Vec<&str> = line.splitn(N, '|').collect();
    columns.try_into().ok()
}

/// Slurm's many words for nothing.
fn word(text: &str) -> String {
    match text.trim() {
        "None" | "N/A" | "(null)" | "Unknown" | "None assigned" | "n/a" => String::new(),
        word => word.to_owned(),
    }
}

/// `2026-11-22T18:11:03`, UTC.
fn time(text: &str) -> Option<i64> {
    let civil: DateTime = text.parse().ok()?;
    let zoned = TimeZone::UTC.to_timestamp(civil).ok()?;
    Some(zoned.as_second()).filter(|seconds| *seconds > 0)
}

/// `64:0`.
fn exit(text: &str) -> Option<JobExit> {
    let (code, signal) = text.split_once(':')?;
    Some(JobExit {
        code: code.parse().ok()?,
        signal: signal.parse().ok()?,
    })
}

/// `7-00:00:00`, `1:00:00`, `2:00`, or plain minutes as in `TimelimitRaw`. `None` for no limit.
#[must_use]
pub(super) fn minutes(text: &str) -> Option<i64> {
    let (days, rest) = match text.trim().split_once('-') {
        Some((days, rest)) => (days.parse::<i64>().ok()?, rest),
        None => (0, text.trim()),
    };
    let parts: Option<Vec<i64>> = rest.split(':').map(|part| part.parse().ok()).collect();
    let (hours, minutes, seconds) = match *parts? {
        [minutes] if days == 0 => (0, minutes, 0),
        [hours] => (hours, 0, 0),
        [minutes, seconds] if days == 0 => (0, minutes, seconds),
        [hours, minutes] => (hours, minutes, 0),
        [hours, minutes, seconds] => (hours, minutes, seconds),
        _ => return None,
    };
    let total = days
        .checked_mul(1440)?
        .checked_add(hours.checked_mul(60)?)?;
    total
        .checked_add(minutes)?
        .checked_add(i64::from(seconds > 0))
}

#[cfg(test)]
mod tests;
