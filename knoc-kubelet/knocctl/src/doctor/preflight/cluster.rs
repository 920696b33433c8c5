//! The Kubernetes cluster, by kubectl: versions and rights. Rights are asked for by `kubectl auth can-i`, which creates a
//! `SelfSubjectAccessReview`, except those that the chart grants ([`grants`]).

use std::collections::BTreeSet;

use futures::future::join_all;
use knoc_proto::error::chain;
use serde_json::Value;

use super::{Report, TIMEOUT, grants, program};
use crate::CtlError;

/// The oldest minor version of Kubernetes 1 that the chart accepts.
const OLDEST: u32 = 29;
/// The oldest one whose API says which addresses Services have (`ServiceCIDR`).
const WITH_RANGES: u32 = 33;
/// The oldest version of helm that knows the chart's functions.
const OLDEST_HELM: (u32, u32) = (3, 14);
/// The namespace into which the chart is installed.
const NAMESPACE: &str = "knoc-system";

/// What the installation of the chart creates in the cluster.
const INSTALL: [&[&str]; 10] = [
    &["create", "namespaces"],
    &["create", "clusterroles.rbac.authorization.k8s.io"],
    &["create", "clusterrolebindings.rbac.authorization.k8s.io"],
    &["create", "runtimeclasses.node.k8s.io"],
    &[
        "create",
        "roles.rbac.authorization.k8s.io",
        "-n",
        "kube-node-lease",
    ],
    &[
        "create",
        "rolebindings.rbac.authorization.k8s.io",
        "-n",
        "kube-system",
    ],
    &["create", "deployments.apps", "-n", NAMESPACE],
    &["create", "secrets", "-n", NAMESPACE],
    &["create", "configmaps", "-n", NAMESPACE],
    &["create", "serviceaccounts", "-n", NAMESPACE],
];

/// What the user of a namespace does; the namespace follows.
const USE: [&[&str]; 4] = [
    &["create", "pods"],
    &["get", "pods", "--subresource=log"],
    &["create", "pods", "--subresource=exec"],
    &["create", "pods", "--subresource=portforward"],
];

/// Checks the cluster. Returns false if there is no kubectl.
pub(super) async fn check(report: &mut Report, namespace: Option<&str>) -> Result<bool, CtlError> {
    let Some(asked) = program("kubectl", &["version", "-o", "json", TIMEOUT]).await else {
        return Ok(false);
    };
    let cure = "check the kubeconfig: `kubectl cluster-info` shows why the cluster is not reached";
    let said = match asked {
        Ok(said) if said.ok => said,
        Ok(said) => {
            report.bad("cluster: version", &said.last(), cure)?;
            return Ok(true);
        }
        Err(error) => {
            report.bad("cluster: version", &chain(&error), cure)?;
            return Ok(true);
        }
    };
    match judge_versions(&said.text()) {
        Ok(text) => report.good("cluster: version", text)?,
        Err(text) => {
            let cure = "KNoC needs Kubernetes 1.29 or later; docs/guide/support-matrix.md says what was tested";
            report.bad("cluster: version", &text, cure)?;
        }
    }
    let install = lacking(&INSTALL, None).await;
    note_rights(
        report,
        "cluster: rights to install",
        &install,
        "ask a cluster administrator to apply the bundle and to install the chart; everything else needs the rights of one namespace",
    )?;
    if !install
        .iter()
        .any(|right| right.starts_with("create clusterroles."))
    {
        grants::check(report).await?;
    }
    let what = format!(
        "cluster: rights to run pods in {}",
        namespace.unwrap_or("the namespace of kubectl's context")
    );
    let run = lacking(&USE, namespace).await;
    let cure = "ask an administrator of that namespace, or name another one by -n NAMESPACE";
    note_rights(report, &what, &run, cure)?;
    relayed(report).await?;
    names(report).await?;
    helm(report).await?;
    Ok(true)
}

/// The rights that the user lacks, or could not be asked for.
async fn lacking(rights: &[&[&str]], namespace: Option<&str>) -> Vec<String> {
    let questions = rights.iter().map(|right| async move {
        let mut args = vec!["auth", "can-i"];
        args.extend(*right);
        args.push(TIMEOUT);
        if let Some(namespace) = namespace {
            args.extend(["-n", namespace]);
        }
        let may = matches!(program("kubectl", &args).await, Some(Ok(said)) if said.text() == "yes");
        (!may).then(|| right.join(" "))
    });
    join_all(questions).await.into_iter().flatten().collect()
}

fn note_rights(
    report: &mut Report,
    what: &str,
    lacking: &[String],
    cure: &str,
) -> Result<(), CtlError> {
    if lacking.is_empty() {
        return report.good(what, "all of them");
    }
    let text = format!(
        "`kubectl auth can-i` does not say yes to: {}",
        lacking.join("; ")
    );
    report.bad(what, &text, cure)
}

/// What kubectl prints; `None` if there is none, or if the user may not see it.
async fn listed(arguments: &[&str]) -> Option<String> {
    let said = program("kubectl", arguments).await?.ok()?;
    said.ok.then(|| said.text())
}

/// The most nodes whose pods are looked at. Anybody who can create EndpointSlices can name nodes in them.
const NODES: usize = 32;

/// If a kubelet relays Services to its pods, the pods must have no addresses, because Kubernetes' own controllers would publish them
/// as endpoints, too. There is no finding if no kubelet relays, or if the user may not see it.
async fn relayed(report: &mut Report) -> Result<(), CtlError> {
    let nodes = [
        "get",
        "endpointslices.discovery.k8s.io",
        "--all-namespaces",
        "--selector=endpointslice.kubernetes.io/managed-by=relay.knoc.io",
        r#"--output=jsonpath={range .items[*]}{.metadata.labels.knoc\.io/node}{"\n"}{end}"#,
        TIMEOUT,
    ];
    let Some(text) = listed(&nodes).await else {
        return Ok(());
    };
    let nodes: BTreeSet<&str> = text.lines().map(str::trim).collect();
    let nodes = nodes.into_iter().filter(|node| !node.is_empty());
    for node in nodes.take(NODES) {
        let of_node = format!("--field-selector=spec.nodeName={node}");
        let pods = [
            "get",
            "pods",
            "--all-namespaces",
            &of_node,
            r#"--output=jsonpath={range .items[*]}{.metadata.namespace}/{.metadata.name} {.status.podIP}{"\n"}{end}"#,
            TIMEOUT,
        ];
        let Some(text) = listed(&pods).await else {
            continue;
        };
        let check = format!("cluster: relayed pods of {node}");
        match published(&text) {
            None => report.good(&check, "none has an address of its own")?,
            Some(pod) => {
                let text = format!(
                    "pod {pod} has an address, which Kubernetes publishes beside the relayed ports"
                );
                let cure =
                    "set node.podIP to none in the values of the chart, or relay.allow to off";
                report.bad(&check, &text, cure)?;
            }
        }
    }
    Ok(())
}

/// PURE: the first pod of lines `NAMESPACE/NAME ADDRESS` that has an address.
fn published(lines: &str) -> Option<&str> {
    let mut pods = lines.lines().filter_map(|line| line.split_once(' '));
    let found = pods.find(|(_, address)| !address.trim().is_empty());
    found.map(|(pod, _)| pod)
}

/// What the nodes of KNoC say about the API server's certificate. There is no finding if there is no such node, or if the user may not see
/// nodes.
async fn names(report: &mut Report) -> Result<(), CtlError> {
    let nodes = [
        "get",
        "nodes",
        "--selector=node.kubernetes.io/instance-type=knoc",
        r#"--output=jsonpath={range .items[*]}{.metadata.name}{"\t"}{range .status.conditions[?(@.type=="ApiServerCertificateMismatch")]}{.status}{"\t"}{.message}{end}{"\n"}{end}"#,
        TIMEOUT,
    ];
    let Some(text) = listed(&nodes).await else {
        return Ok(());
    };
    for (node, status, message) in text.lines().filter_map(condition).take(NODES) {
        let check = format!("cluster: API server's certificate, for pods of {node}");
        if status == "False" {
            report.good(&check, message)?;
        } else {
            let cure =
                "docs/guide/networks.md, \"The API server's certificate\", says what else helps";
            report.bad(&check, message, cure)?;
        }
    }
    Ok(())
}

/// PURE: node, status and message of a line `NODE STATUS MESSAGE` with tabs between them; `None` without a status that is known.
fn condition(line: &str) -> Option<(&str, &str, &str)> {
    let (node, condition) = line.split_once('\t')?;
    let (status, message) = condition.split_once('\t')?;
    matches!(status, "True" | "False").then_some((node, status, message))
}

async fn helm(report: &mut Report) -> Result<(), CtlError> {
    let cure = "install helm 3.14 or later, or apply deploy/manifests/knoc.yaml, which is rendered from the chart";
    let text = match program("helm", &["version", "--template={{.Version}}"]).await {
        Some(Ok(said)) if said.ok => said.text(),
        Some(Ok(said)) => return report.bad("helm", &said.last(), cure),
        Some(Err(error)) => return report.bad("helm", &chain(&error), cure),
        None => return report.bad("helm", "there is no helm in PATH", cure),
    };
    if version(&text).is_some_and(|found| found >= OLDEST_HELM) {
        report.good("helm", text)
    } else {
        report.bad("helm", &format!("{text} is not 3.14 or later"), cure)
    }
}

/// PURE: the two first numbers of a version such as `v1.36.0+k3s1`.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.trim_start_matches('v').split('.');
    let number = |part: &str| {
        let digits: String = part.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    };
    Some((number(parts.next()?)?, number(parts.next()?)?))
}

/// PURE: judges what `kubectl version -o json` prints.
fn judge_versions(json: &str) -> Result<String, String> {
    let said: Value = serde_json::from_str(json).map_err(|error| error.to_string())?;
    let of = |side: &str| said.get(side)?.get("gitVersion")?.as_str();
    let Some(server) = of("serverVersion") else {
        return Err("kubectl has not said which version the API server has".to_owned());
    };
    let text = format!(
        "API server {server}, kubectl {}",
        of("clientVersion").unwrap_or("of an unknown version")
    );
    match version(server) {
        Some(found) if found >= (1, WITH_RANGES) => Ok(text),
        Some(found) if found >= (1, OLDEST) => Ok(format!(
            "{text}; its API does not say which addresses Services have, so pods reach them only with egress.serviceRanges in the values \
             of the chart"
        )),
        Some(_) | None => Err(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relayed_pod_with_an_address_is_found() {
        assert_eq!(
            published("team/a \nteam/b 10.1.2.3\nteam/c fd00::1\n"),
            Some("team/b")
        );
        assert_eq!(published("team/a \nteam/b \n"), None);
        assert_eq!(published(""), None);
    }

    #[test]
    fn a_condition_of_a_node_is_read_if_it_is_known() {
        let lacks = "knoc-a\tTrue\tit does not name 10.96.0.1";
        let expected = ("knoc-a", "True", "it does not name 10.96.0.1");
        assert_eq!(condition(lacks), Some(expected));
        assert_eq!(
            condition("knoc-b\tFalse\tfine"),
            Some(("knoc-b", "False", "fine"))
        );
        for other in ["knoc-c\t", "knoc-d\tUnknown\tnot looked at", "yes", ""] {
            assert_eq!(condition(other), None, "{other}");
        }
    }

    #[test]
    fn an_old_cluster_is_named() {
        let of = |server: &str| {
            judge_versions(&format!(
                r#"{{"clientVersion": {{"gitVersion": "v1.37.0"}}, "serverVersion": {{"gitVersion": "{server}"}}}}"#
            ))
        };
        assert_eq!(
            of("v1.36.0").unwrap(),
            "API server v1.36.0, kubectl v1.37.0"
        );
        for (server, is_told) in [
            ("v1.29.4+k3s1", true),
            ("v1.32.9", true),
            ("v1.33.0", false),
        ] {
            let said = of(server).unwrap();
            assert_eq!(said.contains("egress.serviceRanges"), is_told, "{said}");
        }
        of("v1.28.9").unwrap_err();
        judge_versions(r#"{"clientVersion": {"gitVersion": "v1.37.0"}}"#).unwrap_err();
        assert_eq!(version("v3.14.0"), Some((3, 14)));
        assert_eq!(version("nothing"), None);
    }
}
