//! PURE: parses the output of squeue, sacct and scontrol into [`Row`]s.
//!
//! The formats are given explicitly, so that the columns are the same in every version. They use a
//! delimiter, and the only columns into which users can put a delimiter come last. All times are
//! UTC, because the commands run with `TZ=UTC`. Names and comments may contain line breaks, so a job
//! whose columns are not complete goes on in the next lines. Other lines are skipped; an output
//! without any job in the expected form is an error.

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
/// The most lines of one job.
const JOB_LINES: usize = 64;
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

fn rows(text: &str, parse: impl Fn(&str) -> Option<Row>) -> Result<Vec<Row>, String> {
    let mut found = Vec::new();
    // The beginning of a job that is not complete yet, and how many lines it has.
    let mut begun: Option<(String, usize)> = None;
    for line in text.lines() {
        begun = match begun.take() {
            _ if begins_job(line) => Some((line.to_owned(), 1)),
            Some((mut job, lines)) if lines < JOB_LINES => {
                job.push('\n');
                job.push_str(line);
                Some((job, lines + 1))
            }
            Some(_) | None => None,
        };
        if let Some(row) = begun.as_ref().and_then(|(job, _)| parse(job)) {
            found.push(row);
            begun = None;
        }
    }
    match text.lines().find(|line| !line.trim().is_empty()) {
        Some(first) if found.is_empty() => Err(unexpected(first)),
        Some(_) | None => Ok(found),
    }
}

/// Whether a line has the first two columns of a job: its ID and its state.
fn begins_job(line: &str) -> bool {
    let mut columns = line.split('|');
    let id = columns.next().unwrap_or_default();
    id.starts_with(|first: char| first.is_ascii_digit())
        && JobId::try_from(id).is_ok()
        && columns.next().and_then(known_state).is_some()
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
    let (own, behind) = parts(scontrol_line(text, id)?);
    let field = |key: &str| {
        let prefix = format!("{key}=");
        let words = own.split([' ', '\n']).rev();
        let mut values = words.filter_map(|word| word.strip_prefix(prefix.as_str()));
        values.next()
    };
    let state = JobState::parse(field("JobState")?);
    let exit = exit(field("ExitCode")?).filter(|_| state.phase() == JobPhase::Ended);
    let behind = behind.split_once(" WorkDir=").map(|(_, behind)| behind);
    let directory = behind.map(|behind| {
        let ends = [
            " Comment=",
            " StdErr=",
            " AdminComment=",
            " SystemComment=",
            "\n",
        ];
        let end = ends.iter().filter_map(|end| behind.find(end)).min();
        PathBuf::from(behind.get(..end.unwrap_or(behind.len())).unwrap_or(behind))
    });
    Some(Detail {
        state,
        exit,
        restarts: field("Restarts").and_then(|n| n.parse().ok()).unwrap_or(0),
        directory,
        submitted_at: field("SubmitTime").and_then(time),
    })
}

/// The line of a job in the output of `scontrol show job -o`, with the line breaks that its name
/// may contain.
fn scontrol_line<'a>(text: &'a str, id: &JobId) -> Option<&'a str> {
    let head = format!("JobId={id} ");
    let start = if text.starts_with(&head) {
        0
    } else {
        text.find(&format!("\n{head}"))? + 1
    };
    let line = text.get(start..)?;
    let end = line.find("\nJobId=").unwrap_or(line.len());
    line.get(..end)
}

/// The line of a job, before and after Slurm's own ` Command=`; all of it twice, if there is none. Values may contain
/// blanks and further `key=value` texts. Of the keys that users can set, only JobName comes before
/// the state, so the last match of a key in the first part is Slurm's own; and a name with
/// ` Command=` comes before the last key of that part.
fn parts(line: &str) -> (&str, &str) {
    const COMMAND: &str = " Command=";
    let mut places = line.match_indices(COMMAND).map(|(at, _)| at);
    let own = places.find(|at| {
        let before = line.get(..*at).unwrap_or_default();
        [" JobState=", " SubmitTime="]
            .iter()
            .all(|key| before.contains(key))
    });
    own.map_or((line, line), |at| line.split_at(at))
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
