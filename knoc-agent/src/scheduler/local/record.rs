//! PURE apart from the file paths: the files of one local job, and how their contents are
//! interpreted.
//!
//! ```text
//! JOBDIR/local-job.<id>.json   the agent's: what was submitted, and why it was ended
//! JOBDIR/local-job.<id>.sh     the batch script
//! JOBDIR/local-job.<id>.run/   created by the job itself as its first step: a second start finds it and exits
//!                       id     its line of /proc/PID/stat and the host's boot ID, so that a reused
//!                              process ID is never taken for the job
//!                       exit   the batch script's exit code
//! ```

use std::path::{Path, PathBuf};

use knoc_proto::ids::{JobId, PodUid};
use serde::{Deserialize, Serialize};

use crate::scheduler::{JobExit, JobRef, JobState, JobView, Marks};

/// The only partition.
pub(super) const PARTITION: &str = "local";

/// The program of a job: `$1` is the batch script, `$2` the run directory. The traps let it survive
/// a TERM to the session and write the exit code; the batch script gets the default handlers.
pub(super) const WRAPPER: &str = r#"trap : TERM INT HUP
mkdir "$2" 2>/dev/null || exit 66
read -r stat </proc/$$/stat && read -r boot </proc/sys/kernel/random/boot_id || exit 66
printf '%s\n%s\n' "$stat" "$boot" >"$2/id.new" && mv "$2/id.new" "$2/id" || exit 66
/bin/sh "$1"
code=$?
printf '%s\n' "$code" >"$2/exit.new" && mv "$2/exit.new" "$2/exit"
exit "$code"
"#;

/// Why a job was ended from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum EndingKind {
    Cancelled,
    Timeout,
}

/// Set when TERM is sent; KILL follows after the wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ending {
    pub(super) kind: EndingKind,
    pub(super) at: i64,
}

/// The agent's file of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) id: JobId,
    pub(super) uid: PodUid,
    pub(super) cluster_id: String,
    pub(super) attempt: u32,
    pub(super) jobdir: PathBuf,
    pub(super) submitted_at: i64,
    pub(super) time_limit_minutes: Option<i64>,
    pub(super) ending: Option<Ending>,
}

impl Record {
    pub(super) fn path(&self) -> PathBuf {
        self.file("json")
    }

    pub(super) fn script(&self) -> PathBuf {
        self.file("sh")
    }

    pub(super) fn run(&self) -> PathBuf {
        self.file("run")
    }

    fn file(&self, suffix: &str) -> PathBuf {
        self.jobdir.join(format!("local-job.{}.{suffix}", self.id))
    }

    /// Whether this is the record of `job`.
    pub(super) fn is_of(&self, job: &JobRef) -> bool {
        self.id == job.id && self.uid == job.uid
    }

    /// Whether `path` is the name of a record file.
    pub(super) fn is_record(path: &Path) -> bool {
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        let id = name
            .strip_prefix("local-job.")
            .and_then(|rest| rest.strip_suffix(".json"));
        id.is_some_and(|id| !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_digit()))
    }

    /// The time at which the time limit is reached.
    pub(super) fn deadline(&self, started_at: i64) -> Option<i64> {
        let minutes = self.time_limit_minutes?;
        Some(started_at.saturating_add(minutes.saturating_mul(60)))
    }
}

/// The identity of a process; a later process with the same ID does not match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) pid: i32,
    pub(super) start: u64,
    pub(super) boot: String,
}

impl Identity {
    /// Parses the run directory's `id` file.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (stat, boot) = text.split_once('\n')?;
        let stat = Stat::parse(stat)?;
        Some(Self {
            pid: stat.pid,
            start: stat.start,
            boot: boot.trim().to_owned(),
        })
    }
}

/// The fields of /proc/PID/stat that are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stat {
    pub(super) pid: i32,
    pub(super) state: char,
    pub(super) parent: i32,
    pub(super) session: i32,
    pub(super) start: u64,
}

impl Stat {
    /// Parses a line. The second field is the program's name in brackets, and may contain any
    /// characters.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (pid, rest) = text.split_once(" (")?;
        let (_name, rest) = rest.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        Some(Self {
            pid: pid.trim().parse().ok()?,
            state: fields.first()?.chars().next()?,
            parent: fields.get(1)?.parse().ok()?,
            session: fields.get(3)?.parse().ok()?,
            start: fields.get(19)?.parse().ok()?,
        })
    }
}

/// How far a job has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Progress {
    /// It waits for its turn.
    Queued,
    /// It was spawned; its run directory does not exist yet.
    Starting { pid: i32, at: i64 },
    /// It runs.
    Running { identity: Identity, at: i64 },
    /// It has ended.
    Ended {
        state: JobState,
        reason: &'static str,
        exit: Option<JobExit>,
        started: Option<i64>,
        at: i64,
    },
}

/// The state of an ended job, from its exit code and from why it was ended.
pub(super) fn ended_state(record: &Record, code: Option<i32>) -> (JobState, Option<JobExit>) {
    // A shell reports 128 + n for a program that was killed by signal n.
    let exit = code.map(|code| match code {
        129..=192 => JobExit {
            code: 0,
            signal: code - 128,
        },
        code => JobExit { code, signal: 0 },
    });
    let state = match (record.ending.map(|ending| ending.kind), code) {
        (Some(EndingKind::Cancelled), _) => JobState::Cancelled { by: None },
        (Some(EndingKind::Timeout), _) => JobState::Timeout,
        (None, Some(0)) => JobState::Completed,
        (None, _) => JobState::Failed,
    };
    (state, exit)
}

/// The scheduler's view of a job.
pub(super) fn view(record: &Record, progress: &Progress, host: &str) -> JobView {
    let mut view = JobView {
        id: record.id.clone(),
        uid: record.uid.clone(),
        marks: Marks::ALL,
        cluster_id: record.cluster_id.clone(),
        attempt: record.attempt,
        state: JobState::Pending,
        reason: String::new(),
        exit: None,
        nodes: host.to_owned(),
        partition: PARTITION.to_owned(),
        submitted_at: Some(record.submitted_at),
        started_at: None,
        ended_at: None,
        estimated_start: None,
        time_limit_minutes: record.time_limit_minutes,
        restarts: 0,
    };
    match progress {
        Progress::Queued => {
            view.nodes.clear();
            "Resources".clone_into(&mut view.reason);
        }
        Progress::Starting { at, .. } => {
            view.state = JobState::Configuring;
            view.started_at = Some(*at);
        }
        Progress::Running { at, .. } => {
            view.state = JobState::Running;
            view.started_at = Some(*at);
        }
        Progress::Ended {
            state,
            reason,
            exit,
            started,
            at,
        } => {
            view.state = state.clone();
            (*reason).clone_into(&mut view.reason);
            view.exit = *exit;
            view.started_at = *started;
            view.ended_at = Some(*at);
        }
    }
    view
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_lines_with_any_name() {
        let line = "42 (a) b (c)) S 7 42 41 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 98765 1 2 3";
        let stat = Stat::parse(line).unwrap();
        let expected = Stat {
            pid: 42,
            state: 'S',
            parent: 7,
            session: 41,
            start: 98765,
        };
        assert_eq!(stat, expected);
        let identity = Identity::parse(&format!("{line}\nboot-1\n")).unwrap();
        assert_eq!(
            (identity.pid, identity.start, identity.boot.as_str()),
            (42, 98765, "boot-1")
        );
        for bad in ["", "42", "42 (x", "42 (x) S", "x (x) S 1 1 1"] {
            assert_eq!(Stat::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn only_whole_names_are_records() {
        assert!(Record::is_record(Path::new("/x/local-job.12.json")));
        for name in [
            "local-job.json",
            "local-job..json",
            "local-job.1.sh",
            ".local-job.1.json.9.ab",
        ] {
            assert!(!Record::is_record(Path::new(name)), "{name}");
        }
    }
}
