//! PURE: which containers are sidecars; restart policies and rules of containers, and their bounds.

use crate::pb;

/// Kubernetes' reason of a container that has ended while all containers of its pod are ended, because they begin anew. The shim
/// reports it, and the kubelet tells the pod's condition from it.
pub const RESTARTING_ALL: &str = "RestartingAllContainers";

/// Kubernetes' bounds: how many rules a container may have, and how many exit codes a rule.
const MAX_RULES: usize = 20;
const MAX_CODES: usize = 255;

impl pb::Container {
    /// Whether an init container is a sidecar: it runs beside the containers, for which it makes way once it has started.
    #[must_use]
    pub fn is_sidecar(&self) -> bool {
        self.restart_policy() == pb::RestartPolicy::Always
    }
}

impl pb::RestartRule {
    /// Whether the rule is about this exit code.
    #[must_use]
    pub fn names(&self, code: i32) -> bool {
        self.exit_codes.contains(&code) != self.not_in
    }
}

/// Records what is wrong with the restart policy and the rules of a container.
pub(super) fn check(container: &pb::Container, problems: &mut Vec<String>) {
    let name = &container.name;
    if pb::RestartPolicy::try_from(container.restart_policy).is_err() {
        problems.push(format!(
            "container {name:?}: restartPolicy {} is not known to this version; give Always, OnFailure or Never",
            container.restart_policy
        ));
    }
    let rules = container.restart_rules.len();
    if rules > MAX_RULES {
        problems.push(format!(
            "container {name:?}: restartPolicyRules has {rules} rules; {MAX_RULES} are possible"
        ));
    }
    for (index, rule) in container.restart_rules.iter().enumerate() {
        let codes = rule.exit_codes.len();
        if !(1..=MAX_CODES).contains(&codes) {
            problems.push(format!(
                "container {name:?}: restartPolicyRules[{index}].exitCodes.values has {codes} values; give 1 to {MAX_CODES}"
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(not_in: bool, exit_codes: &[i32]) -> pb::RestartRule {
        pb::RestartRule {
            not_in,
            exit_codes: exit_codes.to_vec(),
            restart_all: false,
        }
    }

    #[test]
    fn a_rule_is_about_the_codes_that_it_names_or_about_all_others() {
        assert!(rule(false, &[42, 43]).names(43));
        assert!(!rule(false, &[42]).names(0));
        assert!(rule(true, &[42]).names(0));
        assert!(!rule(true, &[42]).names(42));
    }

    #[test]
    fn bounds_of_restart_rules_are_named() {
        let problems = |change: fn(&mut pb::Container)| {
            let mut container = pb::Container {
                name: "a".to_owned(),
                ..pb::Container::default()
            };
            change(&mut container);
            let mut problems = Vec::new();
            check(&container, &mut problems);
            problems.join("; ")
        };
        assert_eq!(problems(|_| {}), "");
        assert_eq!(
            problems(|one| one.restart_rules = vec![rule(true, &[1]); 20]),
            ""
        );
        for (change, field) in [
            (
                (|one| one.restart_policy = 77) as fn(&mut pb::Container),
                "restartPolicy 77",
            ),
            (
                |one| one.restart_rules = vec![rule(true, &[1]); 21],
                "restartPolicyRules has 21",
            ),
            (
                |one| one.restart_rules = vec![rule(true, &[])],
                "restartPolicyRules[0].exitCodes.values has 0",
            ),
        ] {
            let found = problems(change);
            assert!(
                found.starts_with(&format!("container \"a\": {field}")),
                "{found}"
            );
        }
    }
}
