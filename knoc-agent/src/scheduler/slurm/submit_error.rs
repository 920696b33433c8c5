//! PURE: classifies sbatch's failures, by a table of Slurm's own messages.
//!
//! The messages are those of `slurm_strerror` in 22.05 to 26.05; those that could be provoked are
//! recorded in the fixtures. A message that matches no row is permanent: it is better that a pod
//! fails with Slurm's message than that it is submitted forever.
//!
//! Besides its own words, sbatch prints what the pod asks for: `invalid partition specified: gpu-maintenance`. So the last line,
//! which has the answer and no word of the pod, comes first, and in the others what sbatch was given does not count.

use std::io;

use crate::{
    command::{CommandError, CommandErrorKind},
    scheduler::{SubmitError, SubmitErrorKind},
};

use SubmitErrorKind::{Ambiguous, ControllerAway, Permanent, Throttled};

/// The beginning of the line with the answer of Slurm.
const ANSWER: &str = "batch job submission failed: ";

/// The answer for every limit. Which one it is, another line says.
const POLICY: &str = "accounting/qos policy";

/// A longer line is not Slurm's alone: it has a value of the pod, which may be cut.
const LONGEST_LINE: usize = 1024;

/// What the pod must not ask for, at whatever time.
const REFUSED: &[&str] = &[
    "invalid partition",
    "invalid account",
    "invalid qos",
    "invalid wckey",
    "invalid feature",
    "invalid license",
    "invalid generic resource",
    "invalid node name",
    "reservation is invalid",
    "time limit is invalid",
    "job dependency problem",
    "node count specification invalid",
    "node configuration is not available",
    "unrecognized option",
];

/// The first match wins.
const TABLE: &[(&str, SubmitErrorKind)] = &[
    // The request may have reached the controller.
    ("socket timed out", Ambiguous),
    ("zero bytes were transmitted", Ambiguous),
    ("(receive failure)", Ambiguous),
    ("(shutdown failure)", Ambiguous),
    ("(send failure)", Ambiguous),
    ("connection timed out", Ambiguous),
    ("connection reset", Ambiguous),
    ("unexpected message received", Ambiguous),
    ("insane message length", Ambiguous),
    // The request has not reached the controller.
    ("unable to contact slurm controller", ControllerAway),
    ("connection refused", ControllerAway),
    ("no route to host", ControllerAway),
    ("network is unreachable", ControllerAway),
    ("backup controller in standby", ControllerAway),
    ("slurm backup controller", ControllerAway),
    ("unable to resolve", ControllerAway),
    ("configuration source", ControllerAway),
    ("unable to process configuration file", ControllerAway),
    ("could not open/read/stat slurm.conf", ControllerAway),
    ("munge", ControllerAway),
    ("authentication", ControllerAway),
    ("auth_g_create", ControllerAway),
    // A limit that may pass. Messages about limits that waiting does not lift come first.
    ("maxsubmit", Throttled),
    ("grpsubmit", Throttled),
    ("perjoblimit", Permanent),
    ("maxwalldurationperjob", Permanent),
    ("maxcpuperjob", Permanent),
    ("maxmemoryperjob", Permanent),
    ("maxmemperjob", Permanent),
    ("maxnodeperjob", Permanent),
    ("maxgresperjob", Permanent),
    ("mincpunotsatisfied", Permanent),
    (POLICY, Throttled),
    ("temporarily unable to accept", Throttled),
    ("resource temporarily unavailable", Throttled),
    ("unable to create job record, try again", Throttled),
    ("rate limit", Throttled),
    ("presently disabled", Throttled),
    ("partition not available", Throttled),
    ("inactive or drain", Throttled),
    ("reservation not usable now", Throttled),
    ("maintenance", Throttled),
    ("maximum job count", Throttled),
    ("slurmdbd", Throttled),
    ("no space left", Throttled),
];

/// Classifies the output of an sbatch that failed; `argv` is what it was given, with the program.
#[must_use]
pub(super) fn classify(message: &str, argv: &[String]) -> SubmitErrorKind {
    let message = message.to_lowercase();
    let lines: Vec<&str> = message
        .lines()
        .map(bare)
        .filter(|line| line.len() <= LONGEST_LINE)
        .collect();
    let all = without_values(lines.join("\n"), argv);
    let mut backwards = lines.iter().rev();
    let answer = backwards
        .find_map(|line| line.strip_prefix(ANSWER))
        .unwrap_or(&all);
    if REFUSED.iter().any(|text| answer.contains(text)) {
        return Permanent;
    }
    let kind = of_table(&all);
    match of_table(answer) {
        // An earlier try of the same sbatch may have reached the controller, whatever the last one says.
        Some(last) if kind != Some(Ambiguous) && !answer.contains(POLICY) => last,
        Some(_) | None => kind.unwrap_or(Permanent),
    }
}

fn of_table(text: &str) -> Option<SubmitErrorKind> {
    let row = TABLE.iter().find(|(words, _)| text.contains(words));
    row.map(|(_, kind)| *kind)
}

/// Removes from `text`, which is in lower case, those arguments, their values and the names in them that contain words of the
/// table. All others stay: they change nothing, and may be part of Slurm's own words.
fn without_values(mut text: String, argv: &[String]) -> String {
    let within_name = |c: char| c.is_alphanumeric() || "-_.".contains(c);
    for argument in argv.iter().skip(1) {
        let argument = argument.to_lowercase();
        // `--name=value`, or `-xvalue`.
        let value = argument
            .split_once('=')
            .map_or_else(|| argument.get(2..).unwrap_or_default(), |(_, value)| value);
        let names = value.split(|c: char| !within_name(c));
        for printed in [argument.as_str(), value].into_iter().chain(names) {
            if of_table(printed).is_some() {
                text = text.replace(printed, "");
            }
        }
    }
    text
}

/// The error for a failed sbatch with these arguments, the first of which is the program.
#[must_use]
pub(super) fn of_command(err: CommandError, argv: &[String]) -> SubmitError {
    let kind = match (&err.kind, err.message()) {
        (CommandErrorKind::Spawn(error), _) if is_of_arguments(error) => Permanent,
        (CommandErrorKind::NotFound | CommandErrorKind::Spawn(_), _) => ControllerAway,
        (CommandErrorKind::Exit { code: Some(_), .. }, Some(message)) => classify(message, argv),
        (CommandErrorKind::Timeout { .. } | CommandErrorKind::Exit { .. }, _) => Ambiguous,
    };
    let message = err.message().map(trim_message);
    let message = message
        .filter(|_| kind != Ambiguous)
        .unwrap_or_else(|| err.to_string());
    SubmitError {
        kind,
        message,
        command: Some(err),
    }
}

/// Whether the kernel takes no such arguments: they are too long, or one has a NUL byte. They are the same the next time.
fn is_of_arguments(error: &io::Error) -> bool {
    let kinds = [
        io::ErrorKind::InvalidInput,
        io::ErrorKind::ArgumentListTooLong,
    ];
    kinds.contains(&error.kind())
}

/// sbatch reports that no node has what a job requests, but not which request. Users rarely suspect
/// local disk, so the message mentions it.
#[must_use]
pub(super) fn explain(mut error: SubmitError, argv: &[String]) -> SubmitError {
    let tmp = argv.iter().find_map(|arg| arg.strip_prefix("--tmp="));
    if let Some(tmp) = tmp
        && error.kind == Permanent
        && error
            .message
            .contains("node configuration is not available")
    {
        let hint = format!(
            " (among other things the pod asks for {tmp} of ephemeral-storage, which TmpDisk of a node in slurm.conf \
             must grant)"
        );
        error.message.push_str(&hint);
    }
    error
}

/// Removes `sbatch: error: ` from the start of each line, and sbatch's progress notes.
fn trim_message(message: &str) -> String {
    message
        .lines()
        .map(bare)
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join("; ")
}

fn bare(line: &str) -> &str {
    let line = line.trim();
    line.strip_prefix("sbatch: error: ")
        .or_else(|| line.strip_prefix("sbatch: "))
        .unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{path::PathBuf, time::Duration};

    #[test]
    fn messages_of_slurm_are_classified() {
        let cases = [
            ("Invalid partition name specified", Permanent),
            (
                "Invalid account or account/partition combination specified",
                Permanent,
            ),
            ("Invalid qos specification", Permanent),
            ("Requested node configuration is not available", Permanent),
            ("Invalid generic resource (gres) specification", Permanent),
            (
                "Pathname of a file, directory or other parameter too long",
                Permanent,
            ),
            ("Job dependency problem", Permanent),
            ("unrecognized option '--nonsense'", Permanent),
            ("Access/permission denied", Permanent),
            (
                "QOSMaxSubmitJobPerUserLimit; Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
                Throttled,
            ),
            (
                "AssocMaxSubmitJobLimit; Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
                Throttled,
            ),
            (
                "QOSMaxWallDurationPerJobLimit; Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
                Permanent,
            ),
            (
                "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
                Throttled,
            ),
            (
                "Slurm temporarily unable to accept job, sleeping and retrying",
                Throttled,
            ),
            (
                "Required partition not available (inactive or drain)",
                Throttled,
            ),
            (
                "Unable to contact slurm controller (connect failure)",
                ControllerAway,
            ),
            (
                "Unable to contact slurm controller (receive failure)",
                Ambiguous,
            ),
            ("Socket timed out on send/recv operation", Ambiguous),
            ("Zero Bytes were transmitted or received", Ambiguous),
            (
                "Munge encode failed: Failed to access \"/run/munge/munge.socket.2\"",
                ControllerAway,
            ),
        ];
        for (message, kind) in cases {
            assert_eq!(classify(message, &[]), kind, "{message}");
        }
    }

    /// What sbatch says: a line with a value, and the answer of slurmctld.
    fn refused(value: &str, answer: &str) -> String {
        format!("sbatch: error: {value}\nsbatch: error: Batch job submission failed: {answer}")
    }

    fn check(cases: &[(&str, String, SubmitErrorKind)]) {
        for (argument, message, kind) in cases {
            let argv = ["sbatch", argument].map(str::to_owned);
            assert_eq!(classify(message, &argv), *kind, "{argument}: {message}");
        }
    }

    #[test]
    fn what_the_pod_asks_for_is_not_a_word_of_slurm() {
        check(&[
            (
                "--partition=gpu-maintenance",
                refused(
                    "invalid partition specified: gpu-maintenance",
                    "Invalid partition name specified",
                ),
                Permanent,
            ),
            (
                "--account=Munge",
                refused(
                    "account Munge is unknown here",
                    "Invalid account or account/partition combination specified",
                ),
                Permanent,
            ),
            // The words of a site's own plugin.
            (
                "--partition=a,slurmdbd-tests",
                refused(
                    "use another partition than slurmdbd-tests",
                    "Unspecified error",
                ),
                Permanent,
            ),
            (
                "-pmaintenance",
                refused("no maintenance for you", "Unspecified error"),
                Permanent,
            ),
            // Nothing was asked of Slurm yet.
            (
                "--constraint=[authentication",
                "sbatch: error: bad --constraint: [authentication".to_owned(),
                Permanent,
            ),
            (
                "--gres=x",
                format!(
                    "sbatch: error: Invalid --gres: {}munge",
                    "x".repeat(LONGEST_LINE)
                ),
                Permanent,
            ),
        ]);
    }

    #[test]
    fn slurms_own_words_count_whatever_the_pod_asks_for() {
        check(&[
            (
                "--partition=maintenance",
                refused("wait", "Requested node is in maintenance"),
                Throttled,
            ),
            (
                "--partition=munge",
                refused("Munge encode failed", "Protocol authentication error"),
                ControllerAway,
            ),
            (
                "--partition=a",
                refused(
                    "Zero Bytes were transmitted or received",
                    "Unable to contact slurm controller (connect failure)",
                ),
                Ambiguous,
            ),
            (
                "--qos=maxsubmit",
                refused(
                    "QOSMaxWallDurationPerJobLimit",
                    "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
                ),
                Permanent,
            ),
        ]);
    }

    #[test]
    fn arguments_that_the_kernel_does_not_take_are_permanent() {
        let of = |error| failed(CommandErrorKind::Spawn(error));
        let too_long = of(io::Error::from_raw_os_error(7));
        assert_eq!(too_long.kind, Permanent);
        let message = too_long.to_string();
        assert!(message.contains("Argument list too long"), "{message}");
        let nul = io::Error::new(io::ErrorKind::InvalidInput, "nul byte found");
        assert_eq!(of(nul).kind, Permanent);
        // EAGAIN: too many processes at the moment.
        assert_eq!(of(io::Error::from_raw_os_error(11)).kind, ControllerAway);
    }

    fn failed(kind: CommandErrorKind) -> SubmitError {
        let error = CommandError {
            program: PathBuf::from("/usr/bin/sbatch"),
            kind,
        };
        of_command(error, &[])
    }

    #[test]
    fn a_job_that_may_have_been_accepted_is_ambiguous() {
        let timeout = CommandErrorKind::Timeout {
            after: Duration::from_secs(1),
            stderr: String::new(),
        };
        assert_eq!(failed(timeout).kind, Ambiguous);
        let exit = |code, signal, stderr: &str| CommandErrorKind::Exit {
            code,
            signal,
            stdout: String::new(),
            stderr: stderr.to_owned(),
        };
        assert_eq!(
            failed(exit(None, Some(9), "Invalid partition name")).kind,
            Ambiguous
        );
        assert_eq!(failed(exit(Some(1), None, "")).kind, Ambiguous);
        let message = "sbatch: error: invalid partition specified: nix\nsbatch: error: Batch job submission failed: Invalid partition name specified\n";
        let error = failed(exit(Some(1), None, message));
        assert_eq!(error.kind, Permanent);
        assert_eq!(
            error.to_string(),
            "invalid partition specified: nix; Batch job submission failed: Invalid partition name specified"
        );
        assert_eq!(failed(CommandErrorKind::NotFound).kind, ControllerAway);
    }

    #[test]
    fn an_error_for_what_no_node_has_names_the_disk() {
        let explained = |argv: &[&str], message: &str| {
            let argv: Vec<String> = argv.iter().map(ToString::to_string).collect();
            explain(SubmitError::permanent(message), &argv).message
        };
        let message = "Batch job submission failed: Requested node configuration is not available";
        let with = explained(&["sbatch", "--tmp=1024M"], message);
        assert!(with.contains("1024M") && with.contains("TmpDisk"), "{with}");
        assert_eq!(explained(&["sbatch"], message), message);
        assert_eq!(
            explained(&["--tmp=1M"], "Invalid qos specification"),
            "Invalid qos specification"
        );
    }

    /// Checks the messages that the real programs printed: `tests/testbed/record-slurm.sh`.
    #[test]
    fn recorded_messages_are_classified() {
        let cases = [
            ("partition", Permanent),
            ("account", Permanent),
            ("qos", Permanent),
            ("cpus", Permanent),
            ("memory", Permanent),
            ("nodes", Permanent),
            ("gres-unknown", Permanent),
            ("gres-too-many", Permanent),
            ("constraint", Permanent),
            ("reservation", Permanent),
            ("licenses", Permanent),
            ("dependency", Permanent),
            ("flag", Permanent),
            ("time", Permanent),
            ("comment-too-long", Permanent),
            ("script-too-long", Permanent),
            ("qos-submit-limit", Throttled),
            ("qos-wall-limit", Permanent),
            ("association-submit-limit", Throttled),
            ("partition-down", Throttled),
            ("partition-inactive", Throttled),
            ("partition-drain", Throttled),
            ("controller-away", ControllerAway),
            ("controller-unknown", ControllerAway),
            ("no-configuration", ControllerAway),
            ("munge-away", ControllerAway),
            ("controller-hangs", Ambiguous),
        ];
        let mut checked = 0;
        for version in ["22.05", "24.11", "26.05"] {
            let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
            let root = root.join(format!("tests/fixtures/slurm-{version}/refusals"));
            for (case, kind) in cases {
                let text = std::fs::read_to_string(root.join(format!("{case}.txt"))).unwrap();
                let (head, message) = text.split_once('\n').unwrap();
                // Some versions accept what others refuse; 124 means that the recorder's own
                // time-out expired.
                if ["exit 0", "exit 124"].contains(&head) {
                    continue;
                }
                assert_eq!(classify(message, &[]), kind, "{version} {case}: {message}");
                checked += 1;
            }
        }
        assert!(checked > 70, "{checked}");
    }
}
