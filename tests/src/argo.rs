//! Argo Workflows as the tests use it: namespaces for workflows, their phases, pods and logs, and the store.
//!
//! `tests/testbed/argo.sh up` starts the controller and the store.

use std::{fs, time::Duration};

use anyhow::{Context as _, bail, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::{ResourceExt as _, api::ListParams};
use serde_json::{Value, json};

use crate::{PodBuilder, World, guide::root, wait_for, world::why};

/// The time for a workflow of some steps beside those of other tests.
pub const LIMIT: Duration = Duration::from_mins(5);
/// The folder of the compute nodes that `argo.sh` lets pods write to.
pub const SHARED: &str = "/scratch/argo";
/// The RuntimeClass of the test bed, for all pods of a workflow.
const PATCH: &str = r#"{"runtimeClassName": "knoc"}"#;
/// The label with the name of a pod's workflow.
const OF_WORKFLOW: &str = "workflows.argoproj.io/workflow";
/// The store, as all nodes of the site reach it, with the bucket of the tests.
const BUCKET: &str = "http://10.78.0.2:9000/artifacts";

/// What a namespace with workflows needs: the executor may report results, and it has credentials for the store, which asks for none.
const NAMESPACE: &str = "
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: executor}
rules:
  - {apiGroups: [argoproj.io], resources: [workflowtaskresults], verbs: [create, patch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: executor}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: executor}
subjects: [{kind: ServiceAccount, name: default}]
---
apiVersion: v1
kind: Secret
metadata: {name: argo-store}
stringData: {accesskey: testbed, secretkey: testbed-store}
";

/// A namespace in which workflows run.
#[derive(Debug)]
pub struct Argo {
    /// The namespace, and the tools.
    pub world: World,
}

impl Argo {
    /// Creates the namespace, with what the executor needs in it.
    pub async fn new(test: &str) -> anyhow::Result<Self> {
        let world = World::new(test).await?;
        let apply = world.kubectl(["apply", "-f", "-"]).stdin(NAMESPACE);
        apply.ok().await?;
        Ok(Self { world })
    }

    /// Creates the workflow of a manifest; returns its name.
    async fn submit(&self, manifest: String) -> anyhow::Result<String> {
        let create = ["create", "-o", "jsonpath={.metadata.name}", "-f", "-"];
        let created = self.world.kubectl(create).stdin(manifest).ok().await?;
        Ok(created.text())
    }

    /// Creates the workflow of a file in `deploy/examples/argo`; returns its name.
    pub async fn example(&self, file: &str) -> anyhow::Result<String> {
        let path = root().join("deploy/examples/argo").join(file);
        let manifest = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        self.submit(manifest).await
    }

    /// Creates a workflow whose pods run on our node; returns its name.
    pub async fn workflow(&self, name: &str, mut spec: Value) -> anyhow::Result<String> {
        spec["podSpecPatch"] = json!(PATCH);
        let manifest = json!({
            "apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow",
            "metadata": {"generateName": format!("{name}-")}, "spec": spec,
        });
        self.submit(manifest.to_string()).await
    }

    /// The workflow as it is now.
    pub async fn get(&self, name: &str) -> anyhow::Result<Value> {
        let namespace = &self.world.namespace;
        let path = format!("/apis/argoproj.io/v1alpha1/namespaces/{namespace}/workflows/{name}");
        self.world.get_json(&path).await
    }

    /// Waits until the workflow is in that phase; returns it. Fails at once if it ends in another phase.
    pub async fn phase(&self, name: &str, phase: &str, limit: Duration) -> anyhow::Result<Value> {
        let workflow = wait_for(&format!("workflow {name}: {phase}"), limit, async || {
            let workflow = self.get(name).await?;
            let now = phase_of(&workflow);
            let ended = matches!(now, "Succeeded" | "Failed" | "Error");
            ensure!(now == phase || ended, "{}", summary(&workflow));
            anyhow::Ok(workflow)
        })
        .await?;
        if phase_of(&workflow) != phase {
            let pods = self.pods(name).await?;
            let pods: Vec<_> = pods.iter().map(|pod| (pod.name_any(), why(pod))).collect();
            bail!(
                "workflow {name}: {phase} was expected: {}; pods: {pods:?}",
                summary(&workflow)
            );
        }
        Ok(workflow)
    }

    /// Runs an example to its success; returns its name.
    pub async fn run_example(&self, file: &str) -> anyhow::Result<String> {
        let name = self.example(file).await?;
        self.phase(&name, "Succeeded", LIMIT).await?;
        Ok(name)
    }

    /// The pods of the workflow.
    pub async fn pods(&self, name: &str) -> anyhow::Result<Vec<Pod>> {
        let of = ListParams::default().labels(&format!("{OF_WORKFLOW}={name}"));
        Ok(self.world.api::<Pod>().list(&of).await?.items)
    }

    /// The only pod of the workflow, once it has that phase.
    pub async fn only_pod(&self, name: &str, phase: &str) -> anyhow::Result<Pod> {
        let only = wait_for(&format!("a pod of {name}"), LIMIT, async || {
            let pods = self.pods(name).await?;
            let first = pods.first().map(Pod::name_any);
            first.with_context(|| format!("{} pods", pods.len()))
        })
        .await?;
        self.world.wait_phase(&only, phase, LIMIT).await
    }

    /// The logs of the containers `main` of all pods of the workflow.
    pub async fn logs(&self, name: &str) -> anyhow::Result<String> {
        let selector = format!("{OF_WORKFLOW}={name}");
        let logs = ["logs", "-c", "main", "--tail=-1", "-l", &selector];
        Ok(self.world.kubectl(logs).ok().await?.text())
    }

    /// Changes the spec of the workflow, as `argo stop` and `argo resume` do.
    pub async fn change(&self, name: &str, spec: &Value) -> anyhow::Result<()> {
        let patch = json!({"spec": spec}).to_string();
        let change = ["patch", "workflow", name, "--type=merge", "-p", &patch];
        self.world.kubectl(change).ok().await.map(drop)
    }

    /// An object of the store, read on the login node.
    pub async fn stored(&self, key: &str) -> anyhow::Result<String> {
        let url = format!("{BUCKET}/{key}");
        let read = self.world.on("login", ["curl", "-sSf", &url]);
        Ok(read.ok().await?.text())
    }

    /// Deletes the namespace. A test that fails leaves it for inspection.
    pub async fn finish(self) -> anyhow::Result<()> {
        self.world.finish().await
    }
}

fn phase_of(workflow: &Value) -> &str {
    workflow["status"]["phase"].as_str().unwrap_or_default()
}

/// The nodes of the workflow's graph.
pub fn nodes(workflow: &Value) -> impl Iterator<Item = &Value> {
    let nodes = workflow["status"]["nodes"].as_object();
    nodes.into_iter().flat_map(serde_json::Map::values)
}

/// The node of this name.
pub fn node<'a>(workflow: &'a Value, name: &str) -> anyhow::Result<&'a Value> {
    let found = nodes(workflow).find(|node| node["displayName"] == name);
    found.with_context(|| format!("no node {name}: {}", summary(workflow)))
}

/// How many nodes of this template are in that phase.
#[must_use]
pub fn count(workflow: &Value, template: &str, phase: &str) -> usize {
    let of = |node: &&Value| node["templateName"] == template && node["phase"] == phase;
    nodes(workflow).filter(of).count()
}

/// The phases and messages of the workflow and of its nodes.
#[must_use]
pub fn summary(workflow: &Value) -> String {
    let said = |of: &Value| format!("{} {}", of["phase"], of["message"]);
    let nodes = nodes(workflow).map(|node| format!("{} {}", node["displayName"], said(node)));
    let nodes: Vec<_> = nodes.collect();
    format!("{}: {}", said(&workflow["status"]), nodes.join("; "))
}

/// A template with one container of the test image that runs a shell script.
#[must_use]
pub fn sh(name: &str, script: &str) -> Value {
    json!({"name": name, "container": {"image": PodBuilder::image_name(), "command": ["sh", "-c", script]}})
}

/// A template whose steps run one after the other, each a template of its name.
#[must_use]
pub fn in_turn(name: &str, steps: &[&str]) -> Value {
    let steps = steps
        .iter()
        .map(|step| json!([{"name": step, "template": step}]));
    json!({"name": name, "steps": steps.collect::<Vec<_>>()})
}
