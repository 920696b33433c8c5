//! Level 3: the stack that `make up` brought up. Every test has a namespace of its own.
//!
//! The environment says where things are (`eval "$(make -s env)"`; `make test` does it).

use std::{fmt, path::PathBuf, time::Duration};

use anyhow::{Context as _, bail, ensure};
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{Event, Namespace, Node, NodeCondition, Pod};
use knoc_kubelet::api_client;
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, ListParams, LogParams, PostParams, WatchEvent, WatchParams},
};
use serde_json::{Value, json};

use crate::{PodBuilder, Run, stays, wait_for};

mod jobs;

/// How long a pod that does almost nothing may take from its creation to its end on a busy machine.
pub const SOON: Duration = Duration::from_mins(2);

/// How long a script of the test bed may take on a busy machine.
const SCRIPT: Duration = Duration::from_mins(5);

/// The agent's state directory, as the nodes of the cluster see it.
pub const STATE: &str = "/home/hpcuser/.local/state/knoc";

/// The stack as one test uses it.
#[derive(Clone)]
pub struct World {
    /// The test's own namespace.
    pub namespace: String,
    /// The name of our virtual node.
    pub node: String,
    client: Client,
    testbed: PathBuf,
    hpc: PathBuf,
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("World")
            .field("namespace", &self.namespace)
            .finish_non_exhaustive()
    }
}

impl World {
    /// Connects to the running stack and creates a namespace for the test.
    pub async fn new(test: &str) -> anyhow::Result<Self> {
        let variable = |name: &str| {
            std::env::var(name).with_context(|| {
                format!("{name} is not set; bring the stack up and load it: make up && eval \"$(make -s env)\"")
            })
        };
        let node = variable("KNOC_NODE")?;
        let hpc = PathBuf::from(variable("HPC_PREFIX")?).join("bin/hpc");
        // The provider is set once per process, by the first test.
        drop(rustls::crypto::ring::default_provider().install_default());
        let config = kube::Config::infer().await.context("no kubeconfig")?;
        let client = api_client::connect(config).context("connect to the API server")?;
        let namespace = format!("t-{test}-{:05x}", rand::random::<u32>() & 0xf_ffff);
        let api: Api<Namespace> = Api::all(client.clone());
        let object = serde_json::from_value(json!({
            "metadata": {"name": namespace, "labels": {"knoc-test": test}}
        }))?;
        api.create(&PostParams::default(), &object)
            .await
            .context("create the test's namespace")?;
        let testbed = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testbed");
        let world = Self {
            namespace,
            node,
            client,
            testbed,
            hpc,
        };
        wait_for("the default ServiceAccount", SOON, async || {
            world
                .kubectl(["get", "serviceaccount", "default"])
                .ok()
                .await
        })
        .await?;
        Ok(world)
    }

    /// Deletes the namespace and everything in it. A test that fails leaves it for inspection.
    pub async fn finish(self) -> anyhow::Result<()> {
        let api: Api<Namespace> = Api::all(self.client.clone());
        api.delete(&self.namespace, &DeleteParams::background())
            .await?;
        Ok(())
    }

    /// The client library's API for a kind in the test's namespace.
    #[must_use]
    pub fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        self.api_in(&self.namespace)
    }

    /// The client library's API for a kind in another namespace.
    #[must_use]
    pub fn api_in<K>(&self, namespace: &str) -> Api<K>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// The client library's API for a kind without namespaces.
    #[must_use]
    pub fn cluster_api<K>(&self) -> Api<K>
    where
        K: kube::Resource,
        K::DynamicType: Default,
    {
        Api::all(self.client.clone())
    }

    // ---- pods ----

    /// Creates the pod and returns its UID.
    pub async fn create(&self, pod: &PodBuilder) -> anyhow::Result<String> {
        let created = self
            .api::<Pod>()
            .create(&PostParams::default(), &pod.build()?)
            .await
            .with_context(|| format!("create pod {}", pod.name()))?;
        created.uid().context("a pod without UID")
    }

    /// The pod as it is now.
    pub async fn pod(&self, name: &str) -> anyhow::Result<Pod> {
        Ok(self.api::<Pod>().get(name).await?)
    }

    /// Waits until `is` returns a value for the pod; returns that value.
    pub async fn wait_for_state<T>(
        &self,
        name: &str,
        what: &str,
        limit: Duration,
        is: impl Fn(&Pod) -> Option<T>,
    ) -> anyhow::Result<T> {
        let outcome = wait_for(&format!("pod {name}: {what}"), limit, async || {
            let pod = self.pod(name).await.map_err(|error| format!("{error:#}"))?;
            is(&pod).ok_or_else(|| serde_json::to_string(&pod.status).unwrap_or_default())
        })
        .await;
        match outcome {
            Ok(value) => Ok(value),
            Err(error) => {
                Err(error.context(format!("events: {}", self.events(name).await?.join("; "))))
            }
        }
    }

    /// The newest version of the pods in the namespace, from which [`World::saw`] looks on.
    pub async fn version(&self) -> anyhow::Result<String> {
        let list = self.api::<Pod>().list(&ListParams::default()).await?;
        list.metadata.resource_version.context("no version")
    }

    /// Waits until `is` returns a value for a state of the pod since that version, even one that has passed already; returns that value.
    pub async fn saw<T>(
        &self,
        name: &str,
        version: &str,
        limit: Duration,
        is: impl Fn(&Pod) -> Option<T>,
    ) -> anyhow::Result<T> {
        let only = WatchParams::default().fields(&format!("metadata.name={name}"));
        let mut last = None;
        let looking = async {
            let changes = self.api::<Pod>().watch(&only, version).await?;
            let mut changes = std::pin::pin!(changes);
            while let Some(change) = changes.next().await {
                let pod = match change? {
                    WatchEvent::Added(pod) | WatchEvent::Modified(pod) => pod,
                    WatchEvent::Bookmark(_) => continue,
                    other @ (WatchEvent::Deleted(_) | WatchEvent::Error(_)) => bail!("{other:?}"),
                };
                if let Some(value) = is(&pod) {
                    return Ok(value);
                }
                last = pod.status;
            }
            bail!("the watch has ended")
        };
        let seen = match tokio::time::timeout(limit, Box::pin(looking)).await {
            Ok(seen) => seen,
            Err(late) => Err(late.into()),
        };
        seen.with_context(|| format!("pod {name}: its last state was {last:?}"))
    }

    /// Waits until the pod is in that phase; returns the pod. Fails at once if the pod ends in another phase.
    pub async fn wait_phase(
        &self,
        name: &str,
        phase: &str,
        limit: Duration,
    ) -> anyhow::Result<Pod> {
        let pod = self
            .wait_for_state(name, &format!("phase {phase}"), limit, |pod| {
                let now = phase_of(pod);
                let ended = matches!(now, "Succeeded" | "Failed");
                (now == phase || ended).then(|| pod.clone())
            })
            .await?;
        if phase_of(&pod) != phase {
            let status = serde_json::to_string(&pod.status)?;
            let events = self.events(name).await?.join("; ");
            bail!("pod {name}: {phase} was expected; status {status}; events: {events}");
        }
        Ok(pod)
    }

    /// Creates the pod and waits for a phase.
    pub async fn run(&self, pod: &PodBuilder, phase: &str) -> anyhow::Result<Pod> {
        self.create(pod).await?;
        self.wait_phase(pod.name(), phase, SOON).await
    }

    /// Creates the pod, waits until it runs and returns its UID.
    pub async fn running(&self, pod: &PodBuilder) -> anyhow::Result<String> {
        let uid = self.create(pod).await?;
        self.wait_phase(pod.name(), "Running", SOON).await?;
        Ok(uid)
    }

    /// Checks for the whole `span` that the pod stays in that phase.
    pub async fn stays_in_phase(
        &self,
        name: &str,
        phase: &str,
        span: Duration,
    ) -> anyhow::Result<()> {
        stays(&format!("pod {name}: phase {phase}"), span, async || {
            let pod = self.pod(name).await?;
            if phase_of(&pod) == phase {
                Ok(())
            } else {
                bail!("{}", serde_json::to_string(&pod.status)?)
            }
        })
        .await
    }

    /// Waits until the pod object is gone.
    pub async fn wait_gone(&self, name: &str, limit: Duration) -> anyhow::Result<()> {
        wait_for(&format!("pod {name} gone"), limit, async || {
            match self.api::<Pod>().get_opt(name).await {
                Ok(None) => Ok(()),
                Ok(Some(pod)) => Err(serde_json::to_string(&pod.status).unwrap_or_default()),
                Err(error) => Err(error.to_string()),
            }
        })
        .await
    }

    /// Deletes the pod with that grace period, or with its own if `None`.
    pub async fn delete(&self, name: &str, grace: Option<u32>) -> anyhow::Result<()> {
        let how = DeleteParams {
            grace_period_seconds: grace,
            ..DeleteParams::default()
        };
        self.api::<Pod>()
            .delete(name, &how)
            .await
            .with_context(|| format!("delete pod {name}"))?;
        Ok(())
    }

    /// The whole log of a container, read through the API server.
    pub async fn logs(&self, name: &str, container: &str) -> anyhow::Result<String> {
        let what = LogParams {
            container: Some(container.into()),
            ..LogParams::default()
        };
        self.api::<Pod>()
            .logs(name, &what)
            .await
            .with_context(|| format!("logs of {name}/{container}"))
    }

    /// Waits until the log of a container contains the text.
    pub async fn wait_log(&self, name: &str, container: &str, text: &str) -> anyhow::Result<()> {
        let what = format!("{text:?} in the log of {name}/{container}");
        wait_for(&what, SOON, async || {
            let log = self.logs(name, container).await?;
            ensure!(log.contains(text), "{log:?}");
            Ok(())
        })
        .await
    }

    /// Waits until a program in the container's network listens on that TCP port. That the pod runs does not say so.
    pub async fn wait_listens(&self, name: &str, container: &str, port: u16) -> anyhow::Result<()> {
        let end = format!(":{port}");
        wait_for(&format!("{name} listens on {port}"), SOON, async || {
            let list = ["exec", name, "-c", container, "--", "netstat", "-tln"];
            let list = self.kubectl(list).ok().await?.text();
            // Protocol, two queues, local address.
            let mut addresses = list
                .lines()
                .filter_map(|line| line.split_whitespace().nth(3));
            ensure!(addresses.any(|local| local.ends_with(&end)), "{list}");
            Ok(())
        })
        .await
    }

    /// A condition of a node.
    pub async fn condition(&self, node: &str, kind: &str) -> anyhow::Result<NodeCondition> {
        let status = self.cluster_api::<Node>().get(node).await?.status;
        let conditions = status.and_then(|status| status.conditions);
        conditions
            .unwrap_or_default()
            .into_iter()
            .find(|one| one.type_ == kind)
            .with_context(|| format!("the node {node} has no condition {kind}"))
    }

    /// Waits until a condition of our node has that status.
    pub async fn wait_node_condition(&self, kind: &str, status: &str) -> anyhow::Result<()> {
        wait_for(&format!("condition {kind}={status}"), SOON, async || {
            let now = self.condition(&self.node, kind).await?;
            ensure!(now.status == status, "{now:?}");
            Ok::<_, anyhow::Error>(())
        })
        .await
    }

    /// Our kubelet's answer to a GET of that path, through the API server's proxy.
    pub async fn kubelet(&self, path: &str) -> anyhow::Result<String> {
        let uri = format!("/api/v1/nodes/{}/proxy/{path}", self.node);
        let request = http::Request::get(&uri).body(Vec::new())?;
        self.client.request_text(request).await.context(uri)
    }

    /// The object at that path of the API server, for kinds that the client library does not know.
    pub async fn get_json(&self, path: &str) -> anyhow::Result<Value> {
        let request = http::Request::get(path).body(Vec::new())?;
        let answer = self.client.request::<Value>(request).await;
        answer.with_context(|| path.to_owned())
    }

    /// The version of the API server, such as `v1.36.3`.
    pub async fn server_version(&self) -> anyhow::Result<String> {
        Ok(self.client.apiserver_version().await?.git_version)
    }

    /// Each event of the object, as "Reason: message".
    pub async fn events(&self, name: &str) -> anyhow::Result<Vec<String>> {
        let of = ListParams::default().fields(&format!("involvedObject.name={name}"));
        let events = self.api::<Event>().list(&of).await?;
        let text = |event: Event| {
            format!(
                "{}: {}",
                event.reason.unwrap_or_default(),
                event.message.unwrap_or_default()
            )
        };
        Ok(events.items.into_iter().map(text).collect())
    }

    // ---- the tools ----

    /// kubectl in the test's namespace.
    #[must_use]
    pub fn kubectl<S: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Run {
        Run::new("kubectl")
            .args(["--namespace", &self.namespace])
            .args(args)
    }

    /// knocctl, over mutual TLS.
    #[must_use]
    pub fn knocctl<S: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Run {
        Run::new("knocctl").args(args)
    }

    /// `knocctl exec` without a terminal.
    #[must_use]
    pub fn exec<const N: usize>(&self, uid: &str, container: &str, command: [&str; N]) -> Run {
        self.knocctl(["exec", "-i", uid, "-c", container, "--"])
            .args(command)
    }

    /// A command on a node of the cluster, as the user of the agent.
    #[must_use]
    pub fn on<const N: usize>(&self, node: &str, command: [&str; N]) -> Run {
        self.on_as("hpcuser", node, command)
    }

    /// A command on a node of the cluster, as this user.
    #[must_use]
    pub fn on_as<const N: usize>(&self, user: &str, node: &str, command: [&str; N]) -> Run {
        Run::new(&self.hpc)
            .args(["exec", node, "-u", user])
            .args(command)
    }

    /// A command on a node of the cluster, as root.
    #[must_use]
    pub fn on_as_root<const N: usize>(&self, node: &str, command: [&str; N]) -> Run {
        Run::new(&self.hpc).args(["exec", node]).args(command)
    }

    /// Cuts the power of a node (`node-down`), or restores it (`node-up`).
    #[must_use]
    pub fn power(&self, action: &str, node: &str) -> Run {
        Run::new(&self.hpc).args([action, node])
    }

    /// `agent.sh` or `kubelet.sh` of the test bed: up, down, kill.
    #[must_use]
    pub fn service(&self, script: &str, action: &str) -> Run {
        Run::new(self.testbed.join(script))
            .arg(action)
            .deadline(SCRIPT)
    }
}

/// The pod's phase, or an empty string if it has none.
#[must_use]
pub fn phase_of(pod: &Pod) -> &str {
    pod.status
        .as_ref()
        .and_then(|status| status.phase.as_deref())
        .unwrap_or_default()
}

/// The exit code of a container or init container, if it has ended.
#[must_use]
pub fn exit_code(pod: &Pod, container: &str) -> Option<i32> {
    let status = pod.status.as_ref()?;
    let all = status
        .container_statuses
        .iter()
        .chain(&status.init_container_statuses)
        .flatten();
    let state = all
        .into_iter()
        .find(|one| one.name == container)?
        .state
        .as_ref()?;
    Some(state.terminated.as_ref()?.exit_code)
}

/// The pod's reason, and its message.
#[must_use]
pub fn why(pod: &Pod) -> (String, String) {
    let status = pod.status.clone().unwrap_or_default();
    (
        status.reason.unwrap_or_default(),
        status.message.unwrap_or_default(),
    )
}

/// The waiting or terminated reason of a container and its message.
#[must_use]
pub fn container_reason(pod: &Pod, container: &str) -> Option<(String, String)> {
    let statuses = pod.status.as_ref()?.container_statuses.as_ref()?;
    let state = statuses
        .iter()
        .find(|one| one.name == container)?
        .state
        .clone()?;
    if let Some(waiting) = state.waiting {
        return Some((
            waiting.reason.unwrap_or_default(),
            waiting.message.unwrap_or_default(),
        ));
    }
    let ended = state.terminated?;
    Some((
        ended.reason.unwrap_or_default(),
        ended.message.unwrap_or_default(),
    ))
}

/// Whether a condition of the pod is True.
#[must_use]
pub fn has_condition(pod: &Pod, kind: &str) -> bool {
    let conditions = pod
        .status
        .as_ref()
        .and_then(|status| status.conditions.as_ref());
    conditions.is_some_and(|all| {
        all.iter()
            .any(|one| one.type_ == kind && one.status == "True")
    })
}
