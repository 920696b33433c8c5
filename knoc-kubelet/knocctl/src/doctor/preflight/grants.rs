//! The rights that the chart's ClusterRole grants.
//!
//! RBAC lets nobody grant rights that he does not have himself, unless he may `escalate`, and `kubectl auth can-i create
//! clusterroles` does not know about that. So the API server is asked to create such a role without storing it
//! (`--dry-run=server`), which makes the same check.

use std::{ffi::OsStr, time::Duration};

use knoc_proto::error::chain;
use serde_json::{Value, json};

use super::{Report, TIMEOUT};
use crate::{CtlError, command};

/// The finding.
const WHAT: &str = "cluster: rights to grant";
/// How long kubectl may take.
const LIMIT: Duration = Duration::from_secs(20);
/// How many of the rights that are not held a finding names.
const NAMED: usize = 4;
/// How much of one of them it shows.
const SHOWN: usize = 200;
/// The name of the node in the rules for a single object; any name shows the same.
const NODE: &str = "knoc-example";

/// A rule of the role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    group: &'static str,
    resources: &'static [&'static str],
    /// Empty: all objects.
    name: &'static str,
    verbs: &'static [&'static str],
}

const fn rule(
    group: &'static str,
    resources: &'static [&'static str],
    verbs: &'static [&'static str],
) -> Rule {
    named(group, resources, "", verbs)
}

const fn named(
    group: &'static str,
    resources: &'static [&'static str],
    name: &'static str,
    verbs: &'static [&'static str],
) -> Rule {
    Rule {
        group,
        resources,
        name,
        verbs,
    }
}

/// The rules with the chart's default values.
const RULES: [Rule; 18] = [
    rule("", &["nodes"], &["create"]),
    named("", &["nodes"], NODE, &["get", "patch"]),
    named("", &["nodes/status"], NODE, &["patch"]),
    rule("", &["pods"], &["get", "list", "watch", "delete"]),
    rule("", &["pods/status"], &["patch"]),
    rule("", &["services"], &["list", "watch"]),
    rule(
        "certificates.k8s.io",
        &["clustertrustbundles"],
        &["get", "list", "watch"],
    ),
    rule("", &["persistentvolumes"], &["get"]),
    rule("authentication.k8s.io", &["tokenreviews"], &["create"]),
    rule(
        "authorization.k8s.io",
        &["subjectaccessreviews"],
        &["create"],
    ),
    rule("", &["configmaps", "secrets"], &["get", "watch"]),
    rule("", &["persistentvolumeclaims"], &["get"]),
    rule("", &["serviceaccounts/token"], &["create"]),
    rule("", &["nodes"], &["list", "watch"]),
    rule("discovery.k8s.io", &["endpointslices"], &["list", "watch"]),
    rule("networking.k8s.io", &["servicecidrs"], &["list"]),
    rule("", &["events"], &["create", "patch"]),
    named("", &["namespaces"], "kube-system", &["get"]),
];

/// Checks whether the user may grant them.
pub(super) async fn check(report: &mut Report) -> Result<(), CtlError> {
    let args = ["create", "--dry-run=server", "-f", "-", TIMEOUT];
    let role = role().to_string();
    let asked = command::run(OsStr::new("kubectl"), &args, role.as_bytes(), LIMIT).await;
    let why = match asked {
        Ok(said) if said.ok => return report.good(WHAT, "all that the kubelet gets"),
        Ok(said) => {
            let stderr = String::from_utf8_lossy(&said.stderr);
            not_held(&stderr).unwrap_or_else(|| said.last())
        }
        Err(error) => chain(&error),
    };
    let cure = "ask a cluster administrator to install the chart, or to let you `escalate` and `bind` clusterroles";
    report.bad(WHAT, &why, cure)
}

/// PURE: a role that grants the same.
fn role() -> Value {
    let rules = RULES.iter().map(|rule| {
        let mut of =
            json!({"apiGroups": [rule.group], "resources": rule.resources, "verbs": rule.verbs});
        if !rule.name.is_empty() {
            of["resourceNames"] = json!([rule.name]);
        }
        of
    });
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"generateName": "knoc-preflight-"},
        "rules": rules.collect::<Vec<_>>(),
    })
}

/// PURE: the rights that the user does not have, from what kubectl prints; `None` if it is another error.
fn not_held(stderr: &str) -> Option<String> {
    let (_, after) = stderr.split_once("permissions not currently held")?;
    let rights = after.lines().map(str::trim);
    let mut rights = rights.filter(|line| line.starts_with('{'));
    let shown: Vec<String> = rights
        .by_ref()
        .take(NAMED)
        .map(|line| line.chars().take(SHOWN).collect())
        .collect();
    let more = match rights.count() {
        0 => String::new(),
        count => format!(" and {count} more"),
    };
    Some(format!(
        "nobody may grant rights that he does not have himself, and you lack {}{more}",
        shown.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rules of the first ClusterRole of the rendered chart: the group, and the other lines.
    fn rendered() -> Vec<Vec<String>> {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../deploy/manifests/knoc.yaml"
        );
        let text = std::fs::read_to_string(path).unwrap();
        let (_, role) = text.split_once("\nkind: ClusterRole\n").unwrap();
        let (role, _) = role.split_once("\n---\n").unwrap();
        let (_, rules) = role.split_once("\nrules:\n").unwrap();
        let mut found: Vec<Vec<String>> = Vec::new();
        for line in rules.lines().map(str::trim) {
            if let Some(group) = line.strip_prefix("- apiGroups: ") {
                found.push(vec![group.to_owned()]);
            } else if !line.is_empty() && !line.starts_with('#') {
                found.last_mut().unwrap().push(line.to_owned());
            }
        }
        found
    }

    #[test]
    fn the_rules_are_those_of_the_chart() {
        let list = |all: &[&str]| format!("[{}]", all.join(", "));
        let own = RULES.map(|rule| {
            let group = if rule.group.is_empty() {
                "[\"\"]".to_owned()
            } else {
                list(&[rule.group])
            };
            let mut lines = vec![group, format!("resources: {}", list(rule.resources))];
            if !rule.name.is_empty() {
                lines.push(format!("resourceNames: {}", list(&[rule.name])));
            }
            lines.push(format!("verbs: {}", list(rule.verbs)));
            lines
        });
        let rendered: Vec<Vec<String>> = rendered()
            .into_iter()
            .map(|lines| {
                let plain = |line: String| {
                    if line.starts_with("resourceNames") {
                        line.replace('"', "")
                    } else {
                        line
                    }
                };
                lines.into_iter().map(plain).collect()
            })
            .collect();
        assert_eq!(rendered, own);
    }

    #[test]
    fn the_role_is_one_that_the_api_server_reads() {
        let role: k8s_openapi::api::rbac::v1::ClusterRole = serde_json::from_value(role()).unwrap();
        let rules = role.rules.unwrap();
        assert_eq!(rules.len(), RULES.len());
        assert_eq!(
            rules[1].resource_names.as_deref(),
            Some(&[NODE.to_owned()][..])
        );
    }

    #[test]
    fn the_rights_that_are_not_held_are_named() {
        let head = "Error from server (Forbidden): error when creating \"STDIN\": clusterroles.rbac.authorization.k8s.io \"x\" is \
            forbidden: user \"ann\" (groups=[\"dev\"]) is attempting to grant RBAC permissions not currently held:\n";
        let right = "{APIGroups:[\"\"], Resources:[\"nodes\"], Verbs:[\"create\"]}\n";
        let one = not_held(&format!("{head}{right}")).unwrap();
        assert!(
            one.ends_with("you lack {APIGroups:[\"\"], Resources:[\"nodes\"], Verbs:[\"create\"]}"),
            "{one}"
        );
        let many = not_held(&format!("{head}{}", right.repeat(9))).unwrap();
        assert!(many.ends_with(" and 5 more"), "{many}");
        assert_eq!(not_held("Error from server (Forbidden): no"), None);
    }
}
