//! PURE: constant functions that query the table about a field, so that `carried` can check the translation against it
//! at compile time.

use super::{Row, Verdict, table::TABLE};

/// Whether a row of this type names the field. `field` is its name in Rust: `host_pid` for `hostPID`.
pub(crate) const fn has_verdict(kind: &str, field: &str) -> bool {
    has(kind, field, Question::Judged)
}

/// Whether the field is admitted with at least one value.
pub(crate) const fn is_admitted(kind: &str, field: &str) -> bool {
    has(kind, field, Question::Admitted)
}

/// Whether the field, or a field inside it, is honoured with at least one value.
pub(crate) const fn is_honoured(kind: &str, field: &str) -> bool {
    has(kind, field, Question::Honoured)
}

#[derive(Clone, Copy)]
enum Question {
    Judged,
    Admitted,
    Honoured,
}

impl Question {
    const fn answered_by(self, row: &Row) -> bool {
        match (self, row.verdict) {
            (Self::Judged, _) => true,
            (Self::Admitted, verdict) => !matches!(verdict, Verdict::Rejected),
            (Self::Honoured, Verdict::Inside(inner)) => any_honoured(inner),
            (Self::Honoured, verdict) => matches!(verdict, Verdict::Honoured),
        }
    }
}

const fn has(kind: &str, field: &str, question: Question) -> bool {
    let rows = rows(kind);
    let mut at = 0;
    while at < rows.len() {
        if names(rows[at].fields, field) && question.answered_by(&rows[at]) {
            return true;
        }
        at += 1;
    }
    false
}

const fn any_honoured(kind: &str) -> bool {
    let rows = rows(kind);
    let mut at = 0;
    while at < rows.len() {
        if Question::Honoured.answered_by(&rows[at]) {
            return true;
        }
        at += 1;
    }
    false
}

const fn rows(kind: &str) -> &'static [Row] {
    let mut at = 0;
    while at < TABLE.len() {
        let name = TABLE[at].name;
        if name.len() == kind.len() && same(name.as_bytes(), 0, name.len(), kind.as_bytes()) {
            return TABLE[at].rows;
        }
        at += 1;
    }
    &[]
}

/// Whether `field` is one of `fields`, which are separated by blanks.
const fn names(fields: &str, field: &str) -> bool {
    let fields = fields.as_bytes();
    let (mut start, mut at) = (0, 0);
    while at <= fields.len() {
        if at == fields.len() || fields[at] == b' ' {
            if same(fields, start, at, field.as_bytes()) {
                return true;
            }
            start = at + 1;
        }
        at += 1;
    }
    false
}

/// Whether `json[from..to]` is the name of the Rust field. The comparison ignores case and `_`.
const fn same(json: &[u8], mut from: usize, to: usize, rust: &[u8]) -> bool {
    let mut at = 0;
    while at < rust.len() {
        if rust[at] != b'_' {
            if from >= to || !json[from].eq_ignore_ascii_case(&rust[at]) {
                return false;
            }
            from += 1;
        }
        at += 1;
    }
    from == to
}

/// The values of `fieldPath` that are honoured, with their types; one key stands for all keys.
#[cfg(test)]
pub(crate) fn honoured_field_paths() -> Vec<(&'static str, String)> {
    use super::When;
    let mut found = Vec::new();
    for kind in ["EnvFieldRef", "FileFieldRef"] {
        for row in rows(kind).iter().filter(|row| row.fields == "fieldPath") {
            let paths: Vec<String> = match (row.verdict, row.when) {
                (Verdict::Honoured, When::Is(paths)) => {
                    paths.iter().map(|path| (*path).to_owned()).collect()
                }
                (Verdict::Honoured, When::Starts(starts)) => {
                    starts.iter().map(|start| format!("{start}key']")).collect()
                }
                _ => Vec::new(),
            };
            found.extend(paths.into_iter().map(|path| (kind, path)));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_name_in_rust() {
        assert!(has_verdict("PodSpec", "host_pid"), "hostPID");
        assert!(has_verdict("PodSpec", "set_hostname_as_fqdn"));
        assert!(!has_verdict("PodSpec", "host"));
        assert!(!has_verdict("PodSpec", "host_pid_x"));
        assert!(!has_verdict("NoSuchType", "name"));
    }

    #[test]
    fn a_field_is_honoured_if_a_field_inside_it_is() {
        assert!(is_honoured("Container", "resources"));
        assert!(is_honoured("Container", "ports"));
        assert!(!is_honoured("ContainerPort", "protocol"), "informative");
        assert!(is_admitted("ContainerPort", "protocol"));
        assert!(is_honoured("Container", "liveness_probe"));
        assert!(!is_admitted("LifecycleHandler", "tcp_socket"));
        assert!(!is_honoured("PodSpec", "host_pid"));
        assert!(is_admitted("PodSpec", "host_pid"), "false is admitted");
    }
}
