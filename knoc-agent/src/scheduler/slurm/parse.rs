//! PURE: parses the output of squeue, sacct and scontrol into [`Row`]s.
//!
//! The formats are given explicitly, so that the columns are the same in every version. They use a
//! delimiter, and the only columns into which users can put a delimiter come last. All times are
//! UTC, because the commands run with `TZ=UTC`. A line of another form is skipped, because names
//! and comments may contain line breaks; an output without any line of the expected form is an
//! error.

use std::path::{Path, PathBuf};

use jiff::{civil::DateTime, tz::TimeZone};
use knoc_proto::ids::{JobId, PodUid};

use super::script::{parse_comment, uid_of_comment, uid_of_name};
use crate::scheduler::{JobExit, JobPhase, JobState, JobView, Marks};

/// `squeue -o`: ID, state, reason, partition, nodes, submitted, start, end, limit, name, comment.
pub(super) const SQUEUE_FORMAT: &str = "%i|%T|%r|%P|%N|%V|%S|%e|%l|%j|%k";
/// The same with the working directory at the end, for few jobs or rare queries.
pub(super) const SQUEUE_FORMAT_DIRECTORY: &str = "%i|%T|%r|%P|%N|%V|%S|%e|%l|%j|%k|%Z";
/// `sacct -o`: the same columns from the accounting database.
pub(super) const SACCT_FORMAT: &str = "JobIDRaw,State,Reason,ExitCode,Partition,NodeList,Submit,Start,End,TimelimitRaw,JobName,Comment";
/// The same with the working directory at the end.
pub(super) const SACCT_FORMAT_DIRECTORY: &str = "JobIDRaw,State,Reason,ExitCode,Partition,NodeList,Submit,Start,End,TimelimitRaw,JobName,Comment,WorkDir";
/// How many characters are shown of output that cannot be parsed.
const EXCERPT: usize = 120;

/// One of this user's jobs as Slurm shows it. Which pod it belongs to is decided elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) id: JobId,
    pub(super) name: String,
    pub(super) comment: String,
    /// The working directory, if the format contains it.
    pub(super) directory: Option<PathBuf>,
    pub(super) state: JobState,
    pub(super) submitted_at: Option<i64>,
    reason: String,
    exit: Option<JobExit>,
    nodes: String,
    partition: String,
    started_at: Option<i64>,
    ended_at: Option<i64>,
    estimated_start: Option<i64>,
    time_limit_minutes: Option<i64>,
}

impl Row {
    /// Which properties of the job name the pod; `pods` is the directory of the job directories.
    #[must_use]
    pub(super) fn marks(&self, uid: &PodUid, pods: &Path) -> Marks {
        let directory = |directory: &PathBuf| *directory == pods.join(uid.as_str());
        Marks {
            name: uid_of_name(&self.name).as_ref() == Some(uid),
            comment: parse_comment(&self.comment, uid).is_some(),
            directory: self.directory.as_ref().is_some_and(directory),
        }
    }

    /// The pod that the job names: by its name, else by its comment, else by its working directory.
    #[must_use]
    pub(super) fn names(&self, pods: &Path) -> Option<PodUid> {
        let by_directory = || {
            let inside = self.directory.as_ref()?.strip_prefix(pods).ok()?;
            PodUid::try_from(inside.to_str()?).ok()
        };
        uid_of_name(&self.name)
            .or_else(|| uid_of_comment(&self.comment))
            .or_else(by_directory)
    }

    /// The job as a job of the pod `uid`.
    #[must_use]
    pub(super) fn view(&self, uid: PodUid, marks: Marks) -> JobView {
        let (cluster_id, attempt) = parse_comment(&self.comment, &uid).unwrap_or_default();
        JobView {
            id: self.id.clone(),
            uid,
            marks,
            cluster_id,
            attempt,
            state: self.state.clone(),
            reason: self.reason.clone(),
            exit: self.exit,
            nodes: self.nodes.clone(),
            partition: self.partition.clone(),
            submitted_at: self.submitted_at,
            started_at: self.started_at,
            ended_at: self.ended_at,
            estimated_start: self.estimated_start,
            time_limit_minutes: self.time_limit_minutes,
            restarts: 0,
        }
    }
}

/// All jobs of this user in squeue's output. An output without any line of the requested form is an
/// error: a program that exits with 0 may have printed its help, or a wrapper's own message.
pub(super) fn squeue(text: &str) -> Result<Vec<Row>, String> {
    rows(text, squeue_line)
}

/// The same for output in the format [`SQUEUE_FORMAT_DIRECTORY`].
pub(super) fn squeue_with_directory(text: &str) -> Result<Vec<Row>, String> {
    rows(text, |line| with_directory(line, squeue_line))
}

/// All jobs of this user in sacct's output. For a job that was requeued, or an ID that was reused,
/// it contains every run, the oldest first.
pub(super) fn sacct(text: &str) -> Result<Vec<Row>, String> {
    rows(text, sacct_line)
}

/// The same for output in the format [`SACCT_FORMAT_DIRECTORY`].
pub(super) fn sacct_with_directory(text: &str) -> Result<Vec<Row>, String> {
    rows(text, |line| with_directory(line, sacct_line))
}

fn rows(text: &str, line: impl Fn(&str) -> Option<Row>) -> Result<Vec<Row>, String> {
    let found: Vec<Row> = text.lines().filter_map(line).collect();
    match text.lines().find(|line| !line.trim().is_empty()) {
        Some(first) if found.is_empty() => Err(unexpected(first)),
        Some(_) | None => Ok(found),
    }
}

/// The error for output that does not have the requested form; `line` is its beginning.
pub(super) fn unexpected(line: &str) -> String {
    let begin: String = line.chars().take(EXCERPT).collect();
    format!("it does not have the requested form; it begins with {begin:?}")
}

/// Splits off the working directory, which is the last column; the column before it may contain
/// delimiters.
fn with_directory(line: &str, parse: impl Fn(&str) -> Option<Row>) -> Option<Row> {
    let (rest, directory) = line.rsplit_once('|')?;
    Some(Row {
        directory: Some(PathBuf::from(directory)),
        ..parse(rest)?
    })
}

fn squeue_line(line: &str) -> Option<Row> {
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
    let state = known_state(state)?;
    let phase = state.phase();
    let start = time(start);
    Some(Row {
        id: JobId::try_from(id).ok()?,
        name: name.to_owned(),
        comment: comment.to_owned(),
        directory: None,
        reason: word(reason),
        exit: None,
        nodes: word(nodes),
        partition: word(partition),
        submitted_at: time(submit),
        started_at: start.filter(|_| phase != JobPhase::Queued),
        ended_at: time(end).filter(|_| phase == JobPhase::Ended),
        estimated_start: start.filter(|_| phase == JobPhase::Queued),
        time_limit_minutes: minutes(limit),
        state,
    })
}

fn sacct_line(line: &str) -> Option<Row> {
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
    let state = known_state(state)?;
    let ended = state.phase() == JobPhase::Ended;
    Some(Row {
        id: JobId::try_from(id).ok()?,
        name: name.to_owned(),
        comment: comment.to_owned(),
        directory: None,
        reason: word(reason),
        exit: exit(exit_code).filter(|_| ended),
        nodes: word(nodes),
        partition: word(partition),
        submitted_at: time(submit),
        started_at: time(start),
        ended_at: time(end).filter(|_| ended),
        estimated_start: None,
        time_limit_minutes: minutes(limit),
        state,
    })
}

/// Parses a state, including unknown ones; `None` if the column is something else.
fn known_state(text: &str) -> Option<JobState> {
    let first = text.chars().next()?;
    first.is_ascii_uppercase().then(|| JobState::parse(text))
}

/// What the controller knows about one job beyond a [`Row`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Detail {
    pub(super) state: JobState,
    pub(super) exit: Option<JobExit>,
    pub(super) restarts: u32,
    pub(super) directory: Option<PathBuf>,
    pub(super) submitted_at: Option<i64>,
}

/// `scontrol show job -o ID`: the job with this ID.
#[must_use]
pub(super) fn scontrol_job(text: &str, id: &JobId) -> Option<Detail> {
    let head = format!("JobId={id} ");
    let line = text.lines().find(|line| line.starts_with(&head))?;
    // Values may contain blanks and further `key=value` texts. Of the keys that users can set, only
    // JobName comes before the keys that are read here, so the last match before ` Command=` is
    // Slurm's own.
    let own = line.split(" Command=").next()?;
    let field = |text: &str, key: &str| {
        let prefix = format!("{key}=");
        let words = text.split(' ').rev();
        let mut values = words.filter_map(|word| word.strip_prefix(prefix.as_str()));
        values.next().map(str::to_owned)
    };
    let state = JobState::parse(&field(own, "JobState")?);
    let exit = exit(&field(own, "ExitCode")?).filter(|_| state.phase() == JobPhase::Ended);
    let behind = line.split_once(" WorkDir=").map(|(_, behind)| behind);
    let directory = behind.map(|behind| {
        let ends = [" Comment=", " StdErr=", " AdminComment=", " SystemComment="];
        let end = ends.iter().filter_map(|end| behind.find(end)).min();
        PathBuf::from(behind.get(..end.unwrap_or(behind.len())).unwrap_or(behind))
    });
    let number = |key: &str| field(own, key).and_then(|n| n.parse().ok());
    Some(Detail {
        state,
        exit,
        restarts: number("Restarts").unwrap_or(0),
        directory,
        submitted_at: field(own, "SubmitTime").and_then(|text| time(&text)),
    })
}

/// `scontrol show config`: the controller's clock in Unix seconds.
#[must_use]
pub(super) fn controller_time(text: &str) -> Option<i64> {
    let line = text.lines().next()?;
    time(line.strip_prefix("Configuration data as of ")?.trim())
}

/// `scontrol show config`: what Slurm hides from plain users; `None` if the output does not say.
#[must_use]
pub(super) fn private_data(text: &str) -> Option<Vec<String>> {
    let mut lines = text.lines().filter_map(|line| line.split_once('='));
    let (_, value) = lines.find(|(key, _)| key.trim() == "PrivateData")?;
    let words = value.trim().split(',').map(str::to_owned);
    Some(words.collect())
}

/// The columns of a line; the last one takes the rest.
fn columns<const N: usize>(line: &str) -> Option<[&str; N]> {
    let columns: Vec<&str> = line.splitn(N, '|').collect();
    columns.try_into().ok()
}

/// Replaces Slurm's various words for "no value" with an empty string.
fn word(text: &str) -> String {
    match text.trim() {
        "None" | "N/A" | "(null)" | "Unknown" | "None assigned" | "n/a" => String::new(),
        word => word.to_owned(),
    }
}

/// Parses `2026-11-22T18:11:03` as UTC.
fn time(text: &str) -> Option<i64> {
    let civil: DateTime = text.parse().ok()?;
    let zoned = TimeZone::UTC.to_timestamp(civil).ok()?;
    Some(zoned.as_second()).filter(|seconds| *seconds > 0)
}

/// Parses an exit status such as `64:0`.
fn exit(text: &str) -> Option<JobExit> {
    let (code, signal) = text.split_once(':')?;
    Some(JobExit {
        code: code.parse().ok()?,
        signal: signal.parse().ok()?,
    })
}

/// Parses `7-00:00:00`, `1:00:00`, `2:00`, or plain minutes as in `TimelimitRaw`. `None` if there
/// is no limit.
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
