//! Pods for tests, with the simplest defaults that work.

use std::collections::BTreeMap;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

/// A description of a pod. `command`, `env` and similar methods change the container that was added last.
#[derive(Clone, Debug)]
pub struct PodBuilder {
    name: String,
    annotations: BTreeMap<String, String>,
    labels: BTreeMap<String, String>,
    spec: Value,
    init: bool,
}

impl PodBuilder {
    /// One container `main` of the test image, which never restarts, on our node.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let node = std::env::var("KNOC_NODE").unwrap_or_else(|_| "knoc-testbed".into());
        let spec = json!({
            "restartPolicy": "Never",
            "nodeName": null,
            "nodeSelector": {"kubernetes.io/hostname": node},
            "tolerations": [{"operator": "Exists"}],
            "terminationGracePeriodSeconds": 5,
            "automountServiceAccountToken": false,
            "containers": [],
        });
        Self {
            name: name.into(),
            annotations: BTreeMap::new(),
            labels: BTreeMap::new(),
            spec,
            init: false,
        }
        .container("main")
    }

    /// The test image as pods name it.
    #[must_use]
    pub fn image_name() -> String {
        let registry = std::env::var("KNOC_REGISTRY").unwrap_or_else(|_| "ctl:5000".into());
        format!("{registry}/library/busybox:latest")
    }

    /// Adds a container.
    #[must_use]
    pub fn container(self, name: &str) -> Self {
        self.add("containers", name)
    }

    /// Adds an init container.
    #[must_use]
    pub fn init_container(self, name: &str) -> Self {
        self.add("initContainers", name)
    }

    fn add(mut self, list: &str, name: &str) -> Self {
        self.init = list == "initContainers";
        let container = json!({
            "name": name, "image": Self::image_name(), "command": ["true"],
            "resources": {"requests": {"cpu": "1"}, "limits": {"memory": "64Mi"}},
        });
        let containers = &mut self.spec[list];
        if let Some(all) = containers.as_array_mut() {
            all.push(container);
        } else {
            *containers = json!([container]);
        }
        self
    }

    /// Sets a field of the container, such as `("workingDir", json!("/tmp"))`.
    #[must_use]
    pub fn set(mut self, field: &str, value: Value) -> Self {
        let kind = if self.init {
            "initContainers"
        } else {
            "containers"
        };
        let last = self.spec[kind]
            .as_array_mut()
            .and_then(|all| all.last_mut());
        if let Some(container) = last {
            container[field] = value;
        }
        self
    }

    /// Sets a field of the pod's spec.
    #[must_use]
    pub fn spec(mut self, field: &str, value: Value) -> Self {
        self.spec[field] = value;
        self
    }

    /// Sets the container's command.
    #[must_use]
    pub fn command<const N: usize>(self, command: [&str; N]) -> Self {
        self.set("command", json!(command.as_slice()))
    }

    /// Mounts an emptyDir at this path of the container, as the pod's only volume.
    #[must_use]
    pub fn empty_dir(self, path: &str) -> Self {
        self.set("volumeMounts", json!([{"name": "data", "mountPath": path}]))
            .spec("volumes", json!([{"name": "data", "emptyDir": {}}]))
    }

    /// Makes the container run a shell script.
    #[must_use]
    pub fn sh(self, script: &str) -> Self {
        self.command(["sh", "-c", script])
    }

    /// Sets the container's image.
    #[must_use]
    pub fn image(self, image: &str) -> Self {
        self.set("image", json!(image))
    }

    /// Sets the container's memory limit.
    #[must_use]
    pub fn memory(self, limit: &str) -> Self {
        self.set(
            "resources",
            json!({"requests": {"cpu": "1"}, "limits": {"memory": limit}}),
        )
    }

    /// Sets the restart policy: `Always`, `OnFailure` or `Never`.
    #[must_use]
    pub fn restart(self, policy: &str) -> Self {
        self.spec("restartPolicy", json!(policy))
    }

    /// Adds an annotation to the pod.
    #[must_use]
    pub fn annotation(mut self, name: &str, value: &str) -> Self {
        self.annotations.insert(name.into(), value.into());
        self
    }

    /// Adds a label to the pod.
    #[must_use]
    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.labels.insert(name.into(), value.into());
        self
    }

    /// The pod's own name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The manifest as JSON, which is also valid YAML.
    #[must_use]
    pub fn manifest(&self) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": self.name, "annotations": self.annotations, "labels": self.labels},
            "spec": self.spec,
        })
    }

    /// The pod as an object of the client library.
    pub fn build(&self) -> anyhow::Result<Pod> {
        serde_json::from_value(self.manifest()).context("a test's pod")
    }
}
