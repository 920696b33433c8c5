//! PURE: what the suite's output says about the one test that it ran.

/// How the test ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It ran, and passed.
    Passed,
    /// It did not pass, and why.
    Failed(String),
}

/// Longer reasons are cut.
const REASON: usize = 240;

/// Reads the output of a run with one test.
pub(super) fn of(code: i32, output: &str) -> Outcome {
    let passed = output
        .lines()
        .any(|line| line.contains("1 Passed | 0 Failed"));
    if code == 0 && passed {
        return Outcome::Passed;
    }
    if output.lines().any(|line| line.contains("Ran 0 of")) {
        let skipped = output.lines().map(str::trim);
        let mut skipped = skipped.filter_map(|line| line.strip_prefix("[SKIPPED] "));
        return Outcome::Failed(match skipped.find(|reason| !reason.starts_with("in [")) {
            Some(reason) => cut(&format!("the suite skips it: {reason}")),
            None => "the suite has no test of this name".to_owned(),
        });
    }
    let reason = refusal(output).or_else(|| failure(output));
    let reason = reason.unwrap_or_else(|| format!("the suite exited with code {code}"));
    Outcome::Failed(cut(&reason))
}

/// Why a pod of the test was not admitted: the Event or message of KNoC, which the suite prints.
fn refusal(output: &str) -> Option<String> {
    let (_, after) = output.split_once("UnsupportedPodSpec: ")?;
    let words = after.lines().next().unwrap_or_default();
    Some(words.trim_start_matches("Pod was rejected: ").to_owned())
}

/// The suite's own words.
fn failure(output: &str) -> Option<String> {
    let mut lines = output.lines().map(str::trim);
    let first = lines.find_map(|line| {
        let words = line
            .strip_prefix("[FAILED] ")
            .or_else(|| line.strip_prefix("[TIMEDOUT] "))
            .or_else(|| line.strip_prefix("[PANICKED] "))
            .or_else(|| line.strip_prefix("[INTERRUPTED] "))?;
        let place = words.starts_with("in [") || words.starts_with("[sig-");
        let time = words.starts_with('[') && words.ends_with(" seconds]");
        (!place && !time).then(|| words.to_owned())
    })?;
    // The reason of an error that only says where it was noticed is on the next lines.
    if !first.ends_with(':') {
        return Some(first);
    }
    let next = lines.find(|line| !line.is_empty()).unwrap_or_default();
    Some(format!("{first} {next}"))
}

fn cut(reason: &str) -> String {
    match reason.char_indices().nth(REASON) {
        Some((end, _)) => format!("{}…", &reason[..end]),
        None => reason.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_passes_only_if_the_suite_says_so() {
        let passed = "Ran 1 of 7000 Specs in 9.1 seconds\nSUCCESS! -- 1 Passed | 0 Failed | 0 Pending | 6999 Skipped\nPASS\n";
        assert_eq!(of(0, passed), Outcome::Passed);
        assert!(matches!(of(1, passed), Outcome::Failed(_)));
        let none = "Ran 0 of 7000 Specs in 0.1 seconds\nSUCCESS! -- 0 Passed | 0 Failed | 0 Pending | 7000 Skipped\n";
        assert_eq!(
            of(0, none),
            Outcome::Failed("the suite has no test of this name".to_owned())
        );
        assert_eq!(
            of(137, ""),
            Outcome::Failed("the suite exited with code 137".to_owned())
        );
    }

    #[test]
    fn the_reason_is_that_of_the_suite_without_its_places() {
        let output = "  [FAILED] in [It] - k8s.io/kubernetes/test/e2e/a.go:1 @ 01/02/26\n\
            • [FAILED] [300.1 seconds]\n[sig-node] Pods\n\n  [FAILED] Timed out after 300.0s.\n  Expected Pod to be running\n";
        assert_eq!(
            of(1, output),
            Outcome::Failed("Timed out after 300.0s.".to_owned())
        );
        let colon = "  [FAILED] failed to create pod:\n\n   it is refused\n";
        assert_eq!(
            of(1, colon),
            Outcome::Failed("failed to create pod: it is refused".to_owned())
        );
        let long = format!("[FAILED] {}", "ä".repeat(500));
        let Outcome::Failed(reason) = of(1, &long) else {
            panic!("passed");
        };
        assert_eq!(reason.chars().count(), REASON + 1);
    }

    #[test]
    fn a_test_that_somebody_interrupted_says_so() {
        let output = "  [INTERRUPTED] in [It] - k8s.io/kubernetes/test/e2e/a.go:1 @ 01/02/26\n  Interrupted by User\n\
            • [INTERRUPTED] [84.0 seconds]\n[sig-network] Proxy\n\n  [INTERRUPTED] Interrupted by User\n  In [It] at: a.go:1\n";
        assert_eq!(
            of(1, output),
            Outcome::Failed("Interrupted by User".to_owned())
        );
    }

    #[test]
    fn a_refused_field_is_the_reason() {
        let output = "  [FAILED] Told to stop trying\n  event for p: {knoc n} UnsupportedPodSpec: Pod was rejected: spec.hostPID: no\nmore\n";
        assert_eq!(
            of(1, output),
            Outcome::Failed("spec.hostPID: no".to_owned())
        );
    }
}
