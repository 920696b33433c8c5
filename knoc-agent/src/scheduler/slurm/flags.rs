//! PURE: checks a pod's additional sbatch flags against the site's allow-list.
//!
//! Each element is one whole flag: `--name=value`, `--name` or `-xvalue`. A word without a dash is
//! rejected, because sbatch would take it for the script's path.

/// Flags that the agent sets itself; no site can allow them.
const RESERVED: &[&str] = &[
    "array",
    "batch",
    "begin",
    "bcast",
    "chdir",
    "cluster",
    "clusters",
    "comment",
    "deadline",
    "error",
    "export",
    "export-file",
    "get-user-env",
    "gid",
    "help",
    "hold",
    "input",
    "job-name",
    "kill-on-invalid-dep",
    "no-requeue",
    "open-mode",
    "output",
    "parsable",
    "propagate",
    "requeue",
    "signal",
    "test-only",
    "time",
    "uid",
    "usage",
    "version",
    "wait",
    "wrap",
];

/// Short forms of sbatch's flags.
const SHORT: &[(char, &str)] = &[
    ('A', "account"),
    ('B', "extra-node-info"),
    ('C', "constraint"),
    ('D', "chdir"),
    ('F', "nodefile"),
    ('G', "gpus"),
    ('H', "hold"),
    ('I', "immediate"),
    ('J', "job-name"),
    ('L', "licenses"),
    ('M', "clusters"),
    ('N', "nodes"),
    ('O', "overcommit"),
    ('S', "core-spec"),
    ('W', "wait"),
    ('a', "array"),
    ('b', "begin"),
    ('c', "cpus-per-task"),
    ('d', "dependency"),
    ('e', "error"),
    ('i', "input"),
    ('k', "no-kill"),
    ('m', "distribution"),
    ('n', "ntasks"),
    ('o', "output"),
    ('p', "partition"),
    ('q', "qos"),
    ('s', "oversubscribe"),
    ('t', "time"),
    ('w', "nodelist"),
    ('x', "exclude"),
];

/// Short flags without a value: sbatch parses a letter after them as the next flag.
const WITHOUT_VALUE: &[char] = &['H', 'I', 'O', 'W', 'k', 's'];

/// Flags of sbatch (or of srun, to which a wrapper may pass them) that print a help text or a list
/// for some values and then exit with success. None of these values has another meaning for any of
/// them.
const EXPLAINED: &[&str] = &[
    "accel-bind",
    "acctg-freq",
    "core-spec",
    "cpu-bind",
    "cpu-freq",
    "distribution",
    "gpu-bind",
    "gpu-freq",
    "gpus",
    "gpus-per-node",
    "gpus-per-socket",
    "gpus-per-task",
    "gres",
    "gres-flags",
    "hint",
    "mem-bind",
    "mpi",
    "profile",
    "propagate",
    "tres-bind",
    "tres-per-task",
];
/// The values that print a help text for [`EXPLAINED`] flags; Slurm ignores their case.
const EXPLAIN: &[&str] = &["help", "list", "?"];

/// Whether sbatch prints a help text for `--name=value` instead of submitting a job.
pub(super) fn prints_help(name: &str, value: &str) -> bool {
    let explains = |word: &str| {
        let word = word.trim();
        EXPLAIN.iter().any(|known| word.eq_ignore_ascii_case(known))
    };
    EXPLAINED.contains(&name) && value.split([',', ';']).any(explains)
}

/// Checks that every flag is allowed; the error names all that are not.
pub(super) fn check(flags: &[String], allowed: &[String]) -> Result<(), String> {
    let problems: Vec<String> = flags
        .iter()
        .filter_map(|flag| problem(flag, allowed))
        .collect();
    if problems.is_empty() {
        Ok(())
    } else {
        Err(problems.join("; "))
    }
}

fn problem(flag: &str, allowed: &[String]) -> Option<String> {
    if flag.contains('\0') {
        return Some(format!("sbatch flag {flag:?} contains NUL"));
    }
    let mut letters = flag.chars().skip(1);
    if letters.next().is_some_and(|c| WITHOUT_VALUE.contains(&c)) && letters.next().is_some() {
        return Some(format!(
            "{flag:?} is more than one sbatch flag: give each as an element of its own"
        ));
    }
    let Some(name) = name(flag) else {
        return Some(format!(
            "{flag:?} is not an sbatch flag: write --name=value"
        ));
    };
    if RESERVED.contains(&name) {
        return Some(format!("sbatch flag --{name} is set by the agent"));
    }
    if prints_help(name, value(flag)) {
        return Some(format!(
            "{flag:?} makes sbatch print a help text and submit no job"
        ));
    }
    let mut allowed = allowed.iter().map(|name| name.trim_start_matches('-'));
    if allowed.any(|allowed| allowed == name) {
        return None;
    }
    Some(format!(
        "sbatch flag --{name} is not on this site's list of allowed flags"
    ))
}

/// The long name of a flag.
fn name(flag: &str) -> Option<&str> {
    if let Some(long) = flag.strip_prefix("--") {
        let name = long.split('=').next().unwrap_or_default();
        // sbatch also accepts unambiguous prefixes of names. The lists contain only whole names, so
        // a prefix is never allowed.
        return Some(name).filter(|name| !name.is_empty());
    }
    let short = flag.strip_prefix('-')?.chars().next()?;
    SHORT
        .iter()
        .find(|(c, _)| *c == short)
        .map(|(_, name)| *name)
}

/// The value of a flag.
fn value(flag: &str) -> &str {
    if flag.starts_with("--") {
        return flag.split_once('=').map_or("", |(_, value)| value);
    }
    let value = flag.char_indices().nth(2).map(|(at, _)| at);
    let value = value.and_then(|at| flag.get(at..)).unwrap_or_default();
    value.trim_start_matches('=')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_allowed_flags_pass() {
        let allowed = [
            "--mail-type".to_owned(),
            "hint".to_owned(),
            "exclude".to_owned(),
            "oversubscribe".to_owned(),
        ];
        let cases = [
            ("-s", true),
            ("-so/home/u/.bashrc", false),
            ("-sW", false),
            ("--mail-type=ALL", true),
            ("--hint=nomultithread", true),
            ("-xc3", true),
            ("--mail-typ=ALL", false),
            ("--wrap=rm -rf /", false),
            ("--output=/etc/passwd", false),
            ("-o/x", false),
            ("script.sh", false),
            ("--", false),
            ("-", false),
            ("", false),
            ("-Z", false),
        ];
        for (flag, good) in cases {
            assert_eq!(check(&[flag.to_owned()], &allowed).is_ok(), good, "{flag}");
        }
        let both = check(&["--wrap=x".to_owned(), "a".to_owned()], &allowed).unwrap_err();
        assert!(both.contains("--wrap") && both.contains("\"a\""), "{both}");
    }

    #[test]
    fn values_that_print_help_are_rejected_by_name() {
        let allowed = ["hint", "mem-bind", "gpus", "distribution", "constraint"];
        let allowed = allowed.map(str::to_owned);
        for flag in [
            "--hint=help",
            "--hint=HELP",
            "--mem-bind=verbose,help",
            "-Ghelp",
            "-mHelp",
        ] {
            let problem = check(&[flag.to_owned()], &allowed).unwrap_err();
            assert!(
                problem.contains(flag) && problem.contains("help text"),
                "{problem}"
            );
        }
        for flag in ["--hint=multithread", "--constraint=help", "-G2"] {
            check(&[flag.to_owned()], &allowed).unwrap();
        }
    }

    #[test]
    fn reserved_flags_cannot_be_allowed() {
        let err = check(&["--output=x".to_owned()], &["output".to_owned()]).unwrap_err();
        assert_eq!(err, "sbatch flag --output is set by the agent");
    }
}
