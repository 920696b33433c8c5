//! PURE: what a pod may give to sbatch as text. The kubelet rejects a pod by these rules before it asks an agent, and the
//! agent checks what it receives by the same rules.

use super::{SHOWN, has_control};
use crate::{pb, text::quote};

/// The most bytes of one option of sbatch. The kernel takes no argument of more than 128 KiB, with the name of the option.
pub const MAX_OPTION: usize = 64 << 10;

/// Everything that sbatch could not be started with.
#[must_use]
pub fn option_problems(job: &pb::JobRequest) -> Vec<String> {
    let named = [
        ("partition", &job.partition),
        ("account", &job.account),
        ("qos", &job.qos),
        ("constraint", &job.constraint),
        ("reservation", &job.reservation),
        ("gres", &job.gres),
        ("licenses", &job.licenses),
        ("dependency", &job.dependency),
    ];
    let flags = job
        .flags
        .iter()
        .map(|flag| ("flags (or an older name of it)", flag));
    let problems = named.into_iter().chain(flags).filter_map(|(name, value)| {
        let length = value.len();
        let problem = if length > MAX_OPTION {
            format!("has {length} bytes, and {MAX_OPTION} are possible: shorten it")
        } else if has_control(value) {
            "must not contain control characters: remove them".to_owned()
        } else {
            return None;
        };
        let shown = quote(value, SHOWN);
        Some(format!("knoc.io/{name}: {shown} {problem}"))
    });
    problems.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::tests;

    fn problems(job: pb::JobRequest) -> Vec<String> {
        tests::problems(|spec| spec.job = Some(job))
    }

    #[test]
    fn what_sbatch_cannot_be_started_with_is_rejected_by_name() {
        let good = pb::JobRequest {
            dependency: "x".repeat(MAX_OPTION),
            constraint: "[a&b]*2".to_owned(),
            flags: vec!["--mail-user=ü".to_owned()],
            ..pb::JobRequest::default()
        };
        assert_eq!(option_problems(&good), Vec::<String>::new());
        let bad = pb::JobRequest {
            partition: "a\0b".to_owned(),
            constraint: "x".repeat(MAX_OPTION + 1),
            flags: vec!["--hint=compute".to_owned(), "--mail-user=a\nb".to_owned()],
            ..pb::JobRequest::default()
        };
        let found = problems(bad);
        let control = "must not contain control characters: remove them";
        assert_eq!(
            found[0],
            format!("knoc.io/partition: \"a\\u{{0}}b\" {control}")
        );
        assert!(
            found[1].starts_with("knoc.io/constraint: \"xxx"),
            "{found:?}"
        );
        assert!(
            found[1].ends_with("has 65537 bytes, and 65536 are possible: shorten it"),
            "{found:?}"
        );
        assert!(found[1].len() < 200, "{found:?}");
        assert_eq!(
            found[2],
            format!("knoc.io/flags (or an older name of it): \"--mail-user=a\\nb\" {control}")
        );
        assert_eq!(found.len(), 3, "{found:?}");
    }
}
