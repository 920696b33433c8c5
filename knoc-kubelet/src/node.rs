//! Task: the Node object, with its registration, labels, taints and status. The task never deletes the object.
//!
//! In: link and capacity (watch channels). Out: the labels and taints as last seen, for the [`mod@unit`], which has
//! everything that exists once for each node. The status is computed ([`status`], which is pure) at every change and
//! every 10 s. It is sent if it differs from the last one, if the API server has other conditions, or if it is 5
//! minutes old. While the link is down the node stays Ready; a condition and a taint say that the agent is
//! disconnected.

pub(crate) mod allocations;
pub mod api_names;
mod condition;
mod expiry;
pub mod features;
pub(crate) mod foreign;
mod identity;
mod lease;
pub mod predicates;
pub mod release;
pub mod status;
mod told;
pub mod unit;

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Taint};
use kube::{
    Api,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use tokio::{sync::watch, task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    agent::{Link, renew::LinkCertificate},
    certs::{Health, Purpose},
    identity::Clients,
    pods::events::{Events, Note, about_node},
};
use predicates::NodeAttributes;
use release::Release;
use status::Facts;
use told::LastSeen;
use unit::Unit;

pub use identity::{Identity, PodIp};

/// How often the status is computed.
const UPDATE: Duration = Duration::from_secs(10);
/// When an unchanged status is sent again.
const REPORT: Duration = Duration::from_mins(5);
const DEADLINE: Duration = Duration::from_secs(10);
/// How often the API server is asked for its version, which changes if it is upgraded or downgraded.
const VERSION: Duration = Duration::from_mins(5);
/// The taint is set only after the link was down for this long: a restarted agent is back sooner.
const TAINT_AFTER: Duration = Duration::from_secs(5);

const DISCONNECTED: &str = "knoc.io/agent-disconnected";
const PROVIDER: &str = "virtual-kubelet.io/provider";
/// The label of the role `knoc`. NodeRestriction allows no node to set it on itself.
const ROLE: &str = "node-role.kubernetes.io/knoc";

/// Why the Node could not be written.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The API server denied the request or failed.
    #[error("{what} node {name}")]
    Api {
        /// What was tried.
        what: &'static str,
        /// The node's name.
        name: String,
        /// The error of the API server.
        #[source]
        source: kube::Error,
    },
    /// The API server did not answer in time.
    #[error("{what} node {name}: no answer within {} s", DEADLINE.as_secs())]
    Late {
        /// What was tried.
        what: &'static str,
        /// The node's name.
        name: String,
    },
}

/// What the task watches.
#[derive(Debug)]
pub struct Watched {
    /// The health of our own certificates.
    pub certificates: Certificates,
    /// The state of our certificate on the link.
    pub link_certificate: watch::Receiver<LinkCertificate>,
    /// The link to the agent.
    pub link: watch::Receiver<Link>,
    /// How many jobs have no pod and wait for the operator.
    pub orphans: watch::Receiver<usize>,
    /// Where Events of the node are recorded.
    pub events: Events,
}

/// The health of our own certificates, each with its purpose.
pub type Certificates = Vec<(Purpose, watch::Receiver<Health>)>;

/// The task that keeps the Node object.
struct NodeTask {
    api: Api<Node>,
    /// Changes taints and the label of the role, which a node may not do itself once its object exists.
    account: Api<Node>,
    certificates: Certificates,
    link_certificate: watch::Receiver<LinkCertificate>,
    client: kube::Client,
    unit: Arc<Unit>,
    link: watch::Receiver<Link>,
    capacity: unit::Capacity,
    orphans: watch::Receiver<usize>,
    events: Events,
    seen: LastSeen,
    /// When this task began, which distinguishes its Events from those of an earlier process.
    began: Timestamp,
    /// The API server's release as last read, and when; None inside if the answer could not be parsed.
    server: Option<(Option<Release>, Instant)>,
    sent: Option<(Value, Instant)>,
}

/// Registers the Node of this unit, and starts the tasks that keep its status and its Lease until `shutdown`.
///
/// # Errors
/// Returns an error if the Node cannot be written.
pub async fn start(
    unit: &Arc<Unit>,
    clients: Clients,
    watched: Watched,
    tasks: &mut JoinSet<()>,
    shutdown: &CancellationToken,
) -> Result<(), NodeError> {
    let client = clients.node.clone();
    let task = NodeTask::new(unit.clone(), clients, watched);
    task.register().await?;
    let name = unit.name().to_owned();
    tasks.spawn(lease::run(client, name, shutdown.clone()));
    tasks.spawn(task.run(shutdown.clone()));
    Ok(())
}

impl NodeTask {
    fn new(unit: Arc<Unit>, clients: Clients, watched: Watched) -> Self {
        Self {
            client: clients.node.clone(),
            api: Api::all(clients.node),
            account: Api::all(clients.account),
            certificates: watched.certificates,
            link_certificate: watched.link_certificate,
            link: watched.link,
            capacity: unit.capacity(),
            orphans: watched.orphans,
            events: watched.events,
            seen: LastSeen::default(),
            began: Timestamp::now(),
            unit,
            server: None,
            sent: None,
        }
    }

    /// Creates the Node or updates its labels, and returns it.
    async fn register(&self) -> Result<Node, NodeError> {
        let node = self.ensure_exists().await?;
        if let Err(error) = self.role(&node).await {
            let error = knoc_proto::error::chain(&error);
            tracing::warn!(%error, "could not label the node with its role, which `kubectl get nodes` then does not show");
        }
        self.unit.set_attributes(NodeAttributes::of(&node));
        self.unit.see_range(&node);
        Ok(node)
    }

    async fn ensure_exists(&self) -> Result<Node, NodeError> {
        let labels = status::labels(self.unit.identity());
        let found = self
            .within("get", self.api.get_opt(self.unit.name()))
            .await?;
        if found.is_some() {
            let patch = json!({"metadata": {"labels": labels}});
            return self.patch(&self.api, &patch).await;
        }
        let taints: Vec<Taint> = self.provider_taint().into_iter().collect();
        let node = json!({
            "metadata": {"name": self.unit.name(), "labels": labels},
            "spec": {"taints": taints},
        });
        let Ok(node) = serde_json::from_value::<Node>(node) else {
            return Ok(Node::default());
        };
        let params = PostParams::default();
        let node = self
            .within("create", self.api.create(&params, &node))
            .await?;
        tracing::info!(node = self.unit.name(), "registered the node");
        Ok(node)
    }

    /// Keeps the status current until `shutdown`.
    async fn run(mut self, shutdown: CancellationToken) {
        loop {
            // Marked before the update, so that a change during the update starts another one.
            self.link.mark_unchanged();
            self.capacity.mark_unchanged();
            if let Err(error) = self.update().await {
                let error = knoc_proto::error::chain(&error);
                tracing::warn!(%error, "could not update the node, trying again");
            }
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                Ok(()) = self.link.changed() => {}
                Ok(()) = self.capacity.changed() => {}
                () = tokio::time::sleep(UPDATE) => {}
            }
        }
    }

    async fn update(&mut self) -> Result<(), NodeError> {
        let node = match self
            .within("get", self.api.get_opt(self.unit.name()))
            .await?
        {
            Some(node) => node,
            None => self.register().await?,
        };
        self.unit.set_attributes(NodeAttributes::of(&node));
        self.unit.see_range(&node);
        let news = self.seen.news(&node);
        self.tell(news);
        self.ask_version().await;
        let link = self.link.borrow().clone();
        self.taint(&node, link.down_for() >= TAINT_AFTER).await?;
        let capacity = self.capacity.borrow().clone();
        let foreign = foreign::resources(node.status.as_ref(), capacity.as_deref());
        self.unit.set_foreign(foreign);
        let orphans = *self.orphans.borrow();
        let certificates: Vec<_> = self
            .certificates
            .iter()
            .map(|(purpose, health)| (*purpose, health.borrow().clone()))
            .collect();
        let link_certificate = self.link_certificate.borrow().clone();
        let api_names = self.unit.api_names();
        let facts = Facts {
            identity: self.unit.identity(),
            link: &link,
            capacity: capacity.as_deref(),
            orphans,
            certificates: &certificates,
            link_certificate: &link_certificate,
            api_names: &api_names,
            server: self.server.and_then(|(release, _)| release),
            previous: node.status.as_ref(),
            now: Timestamp::now(),
        };
        let wanted = status::status(&facts);
        let same = self
            .sent
            .as_ref()
            .is_some_and(|(sent, at)| status::same(sent, &wanted) && at.elapsed() < REPORT);
        // Others write the status too: the node controller while our Lease is old, and a client that recreates the
        // Node.
        if same && status::stands(&wanted, node.status.as_ref()) {
            return Ok(());
        }
        let patch = Patch::Strategic(json!({"status": wanted}));
        let params = PatchParams::default();
        let write = self.api.patch_status(self.unit.name(), &params, &patch);
        self.within("patch the status of", write).await?;
        self.sent = Some((wanted, Instant::now()));
        self.tell(told::written(&node));
        Ok(())
    }

    /// Records Events of the node.
    fn tell(&self, news: impl IntoIterator<Item = told::News>) {
        for (reason, message) in news {
            self.events.record(Note {
                object: about_node(self.unit.name()),
                warning: false,
                reason: reason.to_owned(),
                message,
                at: Timestamp::now(),
                salt: self.began.as_second().unsigned_abs(),
                times: 1,
            });
        }
    }

    /// Asks the API server for its release, if the last answer is old. If this fails the last answer stays. If several
    /// API servers have different releases during an upgrade, the one that answers counts.
    async fn ask_version(&mut self) {
        if self.server.is_some_and(|(_, at)| at.elapsed() < VERSION) {
            return;
        }
        let asked = self.client.apiserver_version();
        match self.within("ask the API server's version for", asked).await {
            Ok(info) => self.server = Some((Release::of(&info), Instant::now())),
            Err(error) => {
                let error = knoc_proto::error::chain(&error);
                tracing::info!(%error, "could not read the API server's version, the node's version and features do not change");
            }
        }
    }

    /// Sets the label from which `kubectl get nodes` reads the role.
    async fn role(&self, node: &Node) -> Result<(), NodeError> {
        let labels = node.metadata.labels.as_ref();
        if labels.is_some_and(|labels| labels.contains_key(ROLE)) {
            return Ok(());
        }
        let patch = json!({"metadata": {"labels": {ROLE: ""}}});
        self.patch(&self.account, &patch).await.map(drop)
    }

    /// Sets or removes our taints; those of others stay.
    async fn taint(&self, node: &Node, disconnected: bool) -> Result<(), NodeError> {
        let before = node
            .spec
            .as_ref()
            .and_then(|spec| spec.taints.clone())
            .unwrap_or_default();
        let ours = |taint: &Taint| taint.key == DISCONNECTED || taint.key == PROVIDER;
        let mut taints: Vec<Taint> = before
            .iter()
            .filter(|taint| !ours(taint))
            .cloned()
            .collect();
        taints.extend(self.provider_taint());
        if disconnected {
            taints.push(Taint {
                key: DISCONNECTED.to_owned(),
                effect: "NoSchedule".to_owned(),
                ..Taint::default()
            });
        }
        let key = |taint: &Taint| (taint.key.clone(), taint.effect.clone(), taint.value.clone());
        let set = |list: &[Taint]| {
            list.iter()
                .map(key)
                .collect::<std::collections::BTreeSet<_>>()
        };
        if set(&before) == set(&taints) {
            return Ok(());
        }
        let version = &node.metadata.resource_version;
        let patch = json!({"metadata": {"resourceVersion": version}, "spec": {"taints": taints}});
        self.patch(&self.account, &patch).await.map(drop)
    }

    fn provider_taint(&self) -> Option<Taint> {
        self.unit.identity().taint.then(|| Taint {
            key: PROVIDER.to_owned(),
            value: Some("knoc".to_owned()),
            effect: "NoSchedule".to_owned(),
            ..Taint::default()
        })
    }

    async fn patch(&self, api: &Api<Node>, patch: &Value) -> Result<Node, NodeError> {
        let params = PatchParams::default();
        let patch = Patch::Merge(patch);
        let write = api.patch(self.unit.name(), &params, &patch);
        self.within("patch", write).await
    }

    async fn within<T>(
        &self,
        what: &'static str,
        call: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, NodeError> {
        within(self.unit.name(), what, call).await
    }
}

/// Reads the attributes of the Node that decide which pods fit it.
pub async fn attributes(client: kube::Client, name: &str) -> Result<NodeAttributes, NodeError> {
    Ok(NodeAttributes::of(&read(client, name).await?))
}

/// Reads the Node.
pub(crate) async fn read(client: kube::Client, name: &str) -> Result<Node, NodeError> {
    let api: Api<Node> = Api::all(client);
    within(name, "get", api.get(name)).await
}

async fn within<T>(
    name: &str,
    what: &'static str,
    call: impl Future<Output = kube::Result<T>>,
) -> Result<T, NodeError> {
    let name = name.to_owned();
    match tokio::time::timeout(DEADLINE, call).await {
        Err(_) => Err(NodeError::Late { what, name }),
        Ok(Err(source)) => Err(NodeError::Api { what, name, source }),
        Ok(Ok(answer)) => Ok(answer),
    }
}
