//! The Helm chart on the real control plane: which values it rejects, which permissions it grants, and the examples; and a chart of a user, whose
//! hooks and test run on the node.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::{batch::v1::Job, core::v1::Secret};
use knoc_tests::{Run, World, wait_for, world::SOON};

/// The time that helm waits for the pods of a release, beside those of other tests.
const WAIT: &str = "--timeout=4m";
/// A little more than that.
const WAITED: Duration = Duration::from_mins(5);

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn helm<const N: usize>(args: [&str; N]) -> Run {
    Run::new("helm").args(args)
}

#[tokio::test]
async fn the_plain_manifests_equal_what_the_chart_renders() -> anyhow::Result<()> {
    Run::new(deploy().join("render.sh"))
        .arg("--check")
        .ok()
        .await?;
    Ok(())
}

#[tokio::test]
async fn mistakes_in_values_are_named() -> anyhow::Result<()> {
    let cases = [
        ("agent.address=nowhere", "/agent/address"),
        ("agent.site=Not_A_Name", "/agent/site"),
        ("node.pod=3", "'pod' not allowed"),
        ("node.queueFactor=0", "/node/queueFactor"),
        ("node.podIP=mine", "'none', 'node', 'own'"),
        ("node.podRange=10.200.0.0", "/node/podRange"),
        ("server.port=80", "/server/port"),
        ("log.format=xml", "'text', 'json'"),
        ("image.digest=md5:1", "/image/digest"),
        ("server.certificate=acme", "'self-signed', 'csr', 'files'"),
        ("identity.kind=root", "'serviceaccount', 'node'"),
        ("identity.approve=1", "/identity/approve"),
        ("agent.address=ssh:", "agent.ssh.secret is missing"),
        ("agent.ssh.secret=s", "names no ssh: address"),
        ("agent.address={accept,a:1}", "/agent/address"),
        ("agent.proxy=https://p:1", "/agent/proxy"),
        ("dialIn.service.type=ExternalName", "/dialIn/service/type"),
        ("relay.ports=80-90", "/relay/ports"),
        ("relay.allow={web}", "/relay/allow"),
        (
            "node.podListeners=true",
            "node.podListeners needs node.podIP=own",
        ),
        ("hostNetwork=1", "/hostNetwork"),
        (
            "hostNetwork=true,relay.allow={team/web},relay.networkPolicy.from[0].podSelector.matchLabels.a=b",
            "relay.networkPolicy.from is of no effect with hostNetwork",
        ),
        (
            "relay.allow={team/web},node.podIP=node",
            "relay.allow needs node.podIP=none",
        ),
        (
            "relay.allow={team/web},node.podIP=own",
            "relay.allow needs node.podIP=none",
        ),
    ];
    for (mistake, named) in cases {
        let output = helm(["template", "x", "--kube-version", "1.36.0"])
            .arg(deploy().join("chart/knoc"))
            .args([
                "--set",
                "agent.address=login:10350",
                "--set",
                "agent.site=s",
            ])
            .args(["--set", mistake])
            .output()
            .await?;
        ensure!(output.code != 0, "{mistake} was taken");
        ensure!(output.stderr.contains(named), "{mistake}: {output}");
    }
    Ok(())
}

#[tokio::test]
async fn each_way_to_the_agent_is_rendered() -> anyhow::Result<()> {
    let cases = [
        (
            vec!["agent.address=ssh:", "agent.ssh.secret=login"],
            vec!["-ssh\"", "sshFolder: /etc/knoc/ssh", "secretName: login"],
        ),
        (
            vec!["agent.address={ssh:a,exec:b c}", "agent.ssh.secret=login"],
            vec!["address: [\"ssh:a\",\"exec:b c\"]"],
        ),
        (
            vec!["agent.address=accept", "dialIn.service.type=NodePort"],
            vec!["address: \"accept\"", "type: NodePort", "targetPort: agent"],
        ),
        (
            vec![
                "agent.address=a:1",
                "agent.proxy=p:2",
                "agent.proxySecret=s",
            ],
            vec![
                "proxy: \"p:2\"",
                "proxyCredentials: /etc/knoc/proxy/credentials",
                "secretName: s",
            ],
        ),
    ];
    for (values, expected) in cases {
        let mut run = helm([
            "template",
            "x",
            "--kube-version",
            "1.36.0",
            "--set",
            "agent.site=s",
        ])
        .arg(deploy().join("chart/knoc"));
        for value in &values {
            run = run.args(["--set", *value]);
        }
        let rendered = run.ok().await?;
        for text in expected {
            ensure!(
                rendered.text().contains(text),
                "{values:?}: no {text} in {rendered}"
            );
        }
    }
    Ok(())
}

#[tokio::test]
async fn the_right_to_watch_secrets_can_be_left_out() -> anyhow::Result<()> {
    let rules = |may: &str| {
        let values = format!("agent.site=s,agent.address=a:1,rbac.watchSecrets={may}");
        helm(["template", "x", "--kube-version", "1.36.0", "--set"])
            .arg(values)
            .arg(deploy().join("chart/knoc"))
            .ok()
    };
    let both = "resources: [configmaps, secrets]\n    verbs: [get, watch]\n";
    let (with, without) = (rules("true").await?, rules("false").await?);
    ensure!(with.text().contains(both), "{with}");
    ensure!(!without.text().contains(both), "{without}");
    for (kind, verbs) in [("configmaps", "get, watch"), ("secrets", "get")] {
        let rule = format!("resources: [{kind}]\n    verbs: [{verbs}]\n");
        ensure!(without.text().contains(&rule), "{rule} in {without}");
    }
    Ok(())
}

#[tokio::test]
async fn what_relaying_needs_is_rendered_only_if_it_is_on() -> anyhow::Result<()> {
    let rendered = |more: &str| {
        let values = format!("agent.site=s,agent.address=accept{more}");
        helm(["template", "x", "--kube-version", "1.36.0", "--set"])
            .arg(values)
            .arg(deploy().join("chart/knoc"))
            .ok()
    };
    let rights = "resources: [endpointslices]\n    verbs: [list, watch, create, patch, delete]";
    let off = rendered("").await?;
    ensure!(!off.text().contains(rights), "{off}");
    ensure!(!off.text().contains("kind: NetworkPolicy"), "{off}");
    let on = rendered(",relay.allow={team/*},relay.ports=12000-12100").await?;
    for text in [
        rights,
        "resources: [networkpolicies]\n    verbs: [list, watch]",
        "allow: [\"team/*\"]",
        "ports: \"12000-12100\"",
        "name: KNOC_RELAY_ADDRESS",
        "kind: NetworkPolicy",
        "{port: 10250, protocol: TCP}",
        "{port: 10350, protocol: TCP}",
        "{port: 12000, endPort: 12100, protocol: TCP}",
    ] {
        ensure!(on.text().contains(text), "no {text} in {on}");
    }
    let own = rendered(",relay.allow={team/*},relay.networkPolicy.create=false").await?;
    ensure!(!own.text().contains("kind: NetworkPolicy"), "{own}");
    Ok(())
}

#[tokio::test]
async fn what_listening_for_pods_needs_is_rendered_only_if_it_is_on() -> anyhow::Result<()> {
    let rendered = |more: &str| {
        let values = format!("agent.site=s,agent.address=a:1,node.podIP=own{more}");
        helm(["template", "x", "--kube-version", "1.36.0", "--set"])
            .arg(values)
            .arg(deploy().join("chart/knoc"))
            .ok()
    };
    let texts = [
        "podListeners: true",
        "resources: [networkpolicies]\n    verbs: [list, watch]",
        "hostNetwork: true",
        "dnsPolicy: ClusterFirstWithHostNet",
    ];
    let off = rendered("").await?;
    let on = rendered(",node.podListeners=true,hostNetwork=true").await?;
    for text in texts {
        ensure!(!off.text().contains(text), "{text} in {off}");
        ensure!(on.text().contains(text), "no {text} in {on}");
    }
    let slices = "verbs: [list, watch, create, patch, delete]";
    ensure!(!on.text().contains(slices), "{on}");
    ensure!(on.text().contains("capabilities: {drop: [ALL]}"), "{on}");
    Ok(())
}

/// The permissions that the `ServiceAccount` has and those that it does not have, as arguments of `kubectl auth can-i`.
const MAY: [&str; 19] = [
    "create nodes",
    "get nodes/knoc-chart",
    "patch nodes/knoc-chart --subresource=status",
    // What pods reach in the cluster, and what they do not reach there.
    "list nodes",
    "watch endpointslices.discovery.k8s.io --all-namespaces",
    "list servicecidrs.networking.k8s.io",
    "list pods --all-namespaces",
    "patch pods/x --subresource=status --all-namespaces",
    "delete pods/x --all-namespaces",
    "create events --all-namespaces",
    "get secrets/x --all-namespaces",
    "get configmaps/x --all-namespaces",
    "watch configmaps/x --all-namespaces",
    "watch secrets/x --all-namespaces",
    "create serviceaccounts/x --subresource=token --all-namespaces",
    "create subjectaccessreviews.authorization.k8s.io",
    "create tokenreviews.authentication.k8s.io",
    "patch leases/knoc-chart --namespace=kube-node-lease",
    "get configmaps/extension-apiserver-authentication --namespace=kube-system",
];
const MAY_NOT: [&str; 11] = [
    // Relaying is off.
    "create endpointslices.discovery.k8s.io --all-namespaces",
    "list networkpolicies.networking.k8s.io --all-namespaces",
    "delete nodes/knoc-chart",
    "patch nodes/other",
    "create pods --all-namespaces",
    "create pods/x --subresource=exec --all-namespaces",
    "list secrets --all-namespaces",
    "patch leases/other --namespace=kube-node-lease",
    "get namespaces/default",
    "get nodes/knoc-chart --subresource=proxy",
    "create clusterrolebindings",
];

#[tokio::test]
async fn the_chart_installs_and_grants_the_permissions_that_it_lists() -> anyhow::Result<()> {
    let world = World::new("chart").await?;
    let namespace = world.namespace.as_str();
    let chart = deploy().join("chart/knoc");
    // The names of cluster-wide objects contain the node's name, so this release does not conflict with that of the stack.
    helm(["install", "charttest", "--namespace", namespace])
        .arg(&chart)
        .args([
            "--set",
            "agent.address=login:10350",
            "--set",
            "agent.site=chart",
        ])
        .args(["--set", "runtimeClass.name=knoc-chart"])
        .ok()
        .await?;
    let account = format!("--as=system:serviceaccount:{namespace}:knoc-kubelet");
    for (questions, wanted) in [(&MAY[..], "yes"), (&MAY_NOT[..], "no")] {
        for question in questions {
            // The API server learns of new roles a moment later.
            wait_for(question, SOON, async || {
                let answer = Run::new("kubectl")
                    .args(["auth", "can-i", &account])
                    .args(question.split(' '))
                    .output()
                    .await?;
                ensure!(answer.text() == wanted, "{answer}");
                Ok(())
            })
            .await?;
        }
    }
    for entry in std::fs::read_dir(deploy().join("examples"))? {
        let path = entry?.path();
        // The folder `argo` has workflows, which l3_argo runs: this API server does not know their kind.
        if path.is_file() {
            let apply = world.kubectl(["apply", "--dry-run=server", "-f"]);
            apply.arg(path).ok().await?;
        }
    }
    helm(["uninstall", "charttest", "--namespace", namespace])
        .ok()
        .await?;
    world.finish().await
}

/// What follows on the first line of a text that begins so.
fn field<'a>(text: &'a str, start: &str) -> &'a str {
    let found = text.lines().find_map(|line| line.strip_prefix(start));
    found.unwrap_or_default().trim()
}

/// The kind, namespace and name of each object that the chart renders for this site, with the values that the guide asks for if there are
/// several sites.
async fn rendered(site: &str) -> anyhow::Result<BTreeSet<String>> {
    let values = format!(
        "agent.site={site},agent.address=a:1,runtimeClass.name=knoc-{site},agent.secret={site}-bundle,serviceAccount.name={site}"
    );
    let manifest = helm(["template", site, "--kube-version", "1.36.0"])
        .args(["--namespace", "knoc-system", "--set", &values])
        .arg(deploy().join("chart/knoc"))
        .ok()
        .await?
        .text();
    let objects = manifest
        .split("\n---")
        .filter(|object| !field(object, "kind:").is_empty());
    let named = objects.map(|object| {
        let metadata = object.split_once("\nmetadata:\n");
        let metadata = metadata.map(|(_, rest)| rest).unwrap_or_default();
        let (namespace, name) = (field(metadata, "  namespace:"), field(metadata, "  name:"));
        format!("{} {namespace}/{name}", field(object, "kind:"))
    });
    Ok(named.collect())
}

#[tokio::test]
async fn releases_of_two_sites_in_one_namespace_share_no_object() -> anyhow::Result<()> {
    let (first, second) = (rendered("one").await?, rendered("two").await?);
    ensure!(first.len() > 5, "{first:?}");
    let shared: Vec<_> = first.intersection(&second).collect();
    ensure!(shared.is_empty(), "{shared:?}");
    Ok(())
}

#[tokio::test]
async fn hooks_and_the_test_of_a_chart_run_on_the_node() -> anyhow::Result<()> {
    let world = World::new("hooks").await?;
    let namespace = world.namespace.as_str();
    let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("helm/hooks");
    let helm = |command: &str| {
        let run = helm([command, "app", "--namespace", namespace, WAIT]);
        run.deadline(WAITED)
    };
    let password = async || -> anyhow::Result<Vec<u8>> {
        let secret = world.api::<Secret>().get("app-password").await?;
        let password = secret.data.and_then(|mut data| data.remove("password"));
        Ok(password.context("no password")?.0)
    };
    let succeeded = async |job: &str| -> anyhow::Result<()> {
        let status = world.api::<Job>().get(job).await?.status;
        let status = status.unwrap_or_default();
        ensure!(status.succeeded == Some(1), "{job}: {status:?}");
        Ok(())
    };
    helm("install").arg("--wait").arg(&chart).ok().await?;
    succeeded("app-prepare").await?;
    let first = password().await?;
    let test = helm("test").arg("--logs").ok().await?.text();
    ensure!(test.contains("the password has 20 letters"), "{test}");
    helm("upgrade").arg("--wait").arg(&chart).ok().await?;
    ensure!(password().await? == first, "the upgrade made another one");
    helm("uninstall").arg("--wait").ok().await?;
    succeeded("app-clean").await?;
    world.finish().await
}
