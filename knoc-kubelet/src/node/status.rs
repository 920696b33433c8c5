//! PURE: the Node's labels and status, from the link and the capacity.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::NodeStatus;
use knoc_proto::{pb, text};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use super::{
    Identity,
    api_names::{self, ApiNames},
    condition::Condition,
    expiry, features, foreign,
    release::{self, Release},
};
use crate::{
    agent::{Link, renew::LinkCertificate, tells_capacity},
    certs::{Health, Purpose},
};

/// The longest message of a condition in bytes: an error of the link may contain text of the peer.
const MESSAGE: usize = 1024;
/// The longest text of the agent in the Node's `nodeInfo`, in bytes.
const INFO: usize = 256;
/// The local disk of a node whose site does not tell Slurm about any (TmpDisk, which most sites leave at 0): 1 PiB. The
/// scheduler would not place any pod that requests local disk on a node without the resource; Slurm does not account
/// for it.
const UNKNOWN_STORAGE: i64 = 1 << 50;

/// What a status is computed from.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// The properties that do not change.
    pub identity: &'a Identity,
    /// The link to the agent.
    pub link: &'a Link,
    /// Slurm's capacity, as the agent last reported it.
    pub capacity: Option<&'a pb::NodeInfo>,
    /// How many jobs without a pod wait for the operator.
    pub orphans: usize,
    /// The health of our own certificates.
    pub certificates: &'a [(Purpose, Health)],
    /// The state of our certificate on the link.
    pub link_certificate: &'a LinkCertificate,
    /// Whether the API server's certificate names what pods are told to use.
    pub api_names: &'a ApiNames,
    /// The API server's release; None while it is not known.
    pub server: Option<Release>,
    /// The status in the API server.
    pub previous: Option<&'a NodeStatus>,
    /// The current time.
    pub now: Timestamp,
}

/// The labels of the Node that the kubelet sets.
#[must_use]
pub fn labels(identity: &Identity) -> BTreeMap<String, String> {
    let mut labels: BTreeMap<String, String> = [
        ("kubernetes.io/hostname", identity.name.as_str()),
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", arch()),
        // The old names of these labels, which kubelets still set, for selectors that use them.
        ("beta.kubernetes.io/os", "linux"),
        ("beta.kubernetes.io/arch", arch()),
        ("type", "virtual-kubelet"),
        ("node.kubernetes.io/instance-type", "knoc"),
        (
            "node.kubernetes.io/exclude-from-external-load-balancers",
            "true",
        ),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into();
    labels.extend(identity.labels.clone());
    labels
}

fn arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The status of the Node, as a strategic merge patch.
#[must_use]
pub fn status(facts: &Facts<'_>) -> Value {
    let identity = facts.identity;
    let mut status = json!({
        "addresses": [{"type": "InternalIP", "address": identity.internal_ip}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": identity.port}},
        "nodeInfo": node_info(facts),
        "conditions": conditions(facts),
    });
    if let (Some(features), Value::Object(fields)) = (declared(facts), &mut status) {
        fields.insert("declaredFeatures".to_owned(), features);
    }
    let told = facts.capacity.filter(|capacity| tells_capacity(capacity));
    if let (Some(capacity), Value::Object(fields)) = (told, &mut status) {
        fields.insert("capacity".to_owned(), resources(facts, capacity, 1));
        let factor = i64::from(identity.queue_factor);
        fields.insert("allocatable".to_owned(), resources(facts, capacity, factor));
    }
    status
}

/// The features to declare. An empty list is sent only to replace another one, since older API servers do not know the
/// field.
fn declared(facts: &Facts<'_>) -> Option<Value> {
    let features = features::declared(facts.identity.websockets, facts.server?);
    let before = facts.previous.and_then(|it| it.declared_features.as_ref());
    let said = !features.is_empty() || before.is_some_and(|before| !before.is_empty());
    said.then(|| json!(features))
}

/// Are two statuses the same except for heartbeats?
#[must_use]
pub fn same(one: &Value, other: &Value) -> bool {
    without_heartbeats(one) == without_heartbeats(other)
}

fn without_heartbeats(status: &Value) -> Value {
    let mut status = status.clone();
    let conditions = status.get_mut("conditions").and_then(Value::as_array_mut);
    for condition in conditions
        .into_iter()
        .flatten()
        .filter_map(Value::as_object_mut)
    {
        condition.remove("lastHeartbeatTime");
        condition.remove("lastTransitionTime");
    }
    status
}

/// Does the API server still have what was sent: each of our conditions, an address, the capacity? The node controller
/// changes Ready to Unknown, and a client may recreate the Node.
#[must_use]
pub fn stands(wanted: &Value, live: Option<&NodeStatus>) -> bool {
    let Some(live) = live else {
        return false;
    };
    let conditions = live.conditions.as_deref().unwrap_or_default();
    let stands = |condition: &Value| {
        let text = |key: &str| condition.get(key).and_then(Value::as_str);
        conditions.iter().any(|one| {
            Some(one.type_.as_str()) == text("type")
                && Some(one.status.as_str()) == text("status")
                && one.reason.as_deref() == text("reason")
        })
    };
    let ours = wanted.get("conditions").and_then(Value::as_array);
    let has_capacity = live.capacity.as_ref().is_some_and(|list| !list.is_empty());
    ours.into_iter().flatten().all(stands)
        && live.addresses.as_ref().is_some_and(|list| !list.is_empty())
        && (has_capacity || wanted.get("capacity").is_none())
}

/// The most pods of the node: as configured, but no more than the site allows in Slurm.
#[must_use]
pub fn pod_limit(configured: u32, capacity: &pb::NodeInfo) -> u32 {
    match u32::try_from(capacity.pod_limit) {
        Ok(limit) if limit > 0 => configured.min(limit),
        Ok(_) | Err(_) => configured,
    }
}

/// The local disk of the node: as Slurm reports it, or more than any pod requests.
#[must_use]
pub fn ephemeral_storage(capacity: &pb::NodeInfo) -> i64 {
    match capacity.ephemeral_storage_bytes {
        known if known > 0 => known,
        _ => UNKNOWN_STORAGE,
    }
}

fn resources(facts: &Facts<'_>, capacity: &pb::NodeInfo, factor: i64) -> Value {
    let pods = pod_limit(facts.identity.pods, capacity);
    let mut list = Map::new();
    let mut put = |name: &str, amount: i64| {
        list.insert(
            name.to_owned(),
            amount.saturating_mul(factor).to_string().into(),
        );
    };
    put("cpu", capacity.cpu);
    put("memory", capacity.memory_bytes);
    put("ephemeral-storage", ephemeral_storage(capacity));
    for (name, amount) in capacity.extended.iter().filter(|(_, amount)| **amount > 0) {
        put(name, *amount);
    }
    for name in foreign::gone(facts.previous, capacity) {
        list.insert(name, Value::Null);
    }
    // Without the queue factor, because they do not wait in Slurm's queue.
    for (name, amount) in foreign::resources(facts.previous, Some(capacity)) {
        list.insert(name, amount.to_string().into());
    }
    list.insert("pods".to_owned(), pods.to_string().into());
    list.into()
}

fn node_info(facts: &Facts<'_>) -> Value {
    let before = facts.previous.and_then(|status| status.node_info.as_ref());
    let runtime = match facts.link {
        Link::Up { info, .. } => format!("{}://{}", info.runtime, version(&info.runtime_version)),
        Link::Down { .. } => before
            .map(|info| info.container_runtime_version.clone())
            .filter(|text| !text.is_empty())
            .unwrap_or_else(|| "apptainer://unknown".to_owned()),
    };
    let of_agent = |up: fn(&pb::AgentInfo) -> String, before: Option<&String>| match facts.link {
        Link::Up { info, .. } => text::message(&up(info), INFO),
        Link::Down { .. } => before.cloned().unwrap_or_default(),
    };
    let image = of_agent(os_image, before.map(|info| &info.os_image));
    let kernel = of_agent(
        |info| info.kernel.clone(),
        before.map(|info| &info.kernel_version),
    );
    let id = machine_id(&facts.identity.name);
    let kubelet = match facts.server {
        Some(server) => release::kubelet_version(server),
        None => release::version_without_server(before.map(|info| info.kubelet_version.as_str())),
    };
    json!({
        "architecture": arch(),
        "bootID": "",
        "containerRuntimeVersion": runtime,
        "kernelVersion": kernel,
        "kubeProxyVersion": "",
        "kubeletVersion": kubelet,
        "machineID": id,
        "operatingSystem": "linux",
        "osImage": image,
        "systemUUID": uuid(&id),
    })
}

/// The operating system of the agent's host and the version of the scheduler.
fn os_image(info: &pb::AgentInfo) -> String {
    let parts = [&info.os, &info.scheduler_version];
    let known = parts.into_iter().filter(|part| !part.is_empty());
    known.map(String::as_str).collect::<Vec<_>>().join(", ")
}

/// A machine ID as in machine-id(5). No machine stands behind the Node, so it follows from the Node's name, and stays the same.
fn machine_id(name: &str) -> String {
    let digits = format!("{:x}", Sha256::digest(format!("knoc node {name}")));
    digits.chars().take(32).collect()
}

/// The 32 hexadecimal digits of a machine ID as a UUID.
fn uuid(id: &str) -> String {
    let mut rest = id;
    let parts = [8, 4, 4, 4, 12].map(|length| {
        let (part, after) = rest.split_at_checked(length).unwrap_or((rest, ""));
        rest = after;
        part
    });
    parts.join("-")
}

/// The number in `apptainer version 1.4.5`.
fn version(text: &str) -> &str {
    text.split_whitespace().last().unwrap_or("unknown")
}

fn conditions(facts: &Facts<'_>) -> Vec<Value> {
    let fine = |kind, reason, text: &str| (kind, "False", reason, text.to_owned());
    let mut list = vec![
        (
            "Ready",
            "True",
            "KubeletReady",
            "kubelet is posting ready status".to_owned(),
        ),
        fine(
            "MemoryPressure",
            "KubeletHasSufficientMemory",
            "kubelet has sufficient memory available",
        ),
        fine(
            "DiskPressure",
            "KubeletHasNoDiskPressure",
            "kubelet has no disk pressure",
        ),
        fine(
            "PIDPressure",
            "KubeletHasSufficientPID",
            "kubelet has sufficient PID available",
        ),
        fine(
            "NetworkUnavailable",
            "RouteCreated",
            "pods use the network of their compute nodes, or one of their own that leads through it",
        ),
        agent_connected(facts),
    ];
    list.extend(from_capacity(facts));
    let certificates = facts.certificates.iter();
    list.extend(certificates.filter_map(|(purpose, health)| {
        let (status, reason, message) = health.condition()?;
        Some((purpose.condition(), status, reason, message))
    }));
    let agents = facts.capacity.map_or(0, |node| node.certificate_until);
    list.extend(expiry::condition(facts.link_certificate, agents, facts.now));
    list.extend(facts.api_names.condition(has(facts, api_names::KIND)));
    if facts.orphans > 0 {
        let text = format!(
            "{} jobs have no pod; these are too many at once, so none is ended; end single jobs with `knocctl delete UID`",
            facts.orphans
        );
        list.push(("OrphansHalted", "True", "TooManyOrphans", text));
    } else if has(facts, "OrphansHalted") {
        list.push(fine("OrphansHalted", "NoOrphans", "no jobs without a pod"));
    }
    list.into_iter()
        .map(|condition| render(facts, &condition))
        .collect()
}

fn agent_connected(facts: &Facts<'_>) -> Condition {
    match facts.link {
        Link::Up { info, .. } => {
            let text = format!(
                "agent {} of site {} on {}",
                info.version, info.site, info.hostname
            );
            ("AgentConnected", "True", "LinkUp", text)
        }
        Link::Down { since, message, .. } => {
            let text = format!(
                "no link since {}: {}",
                since.strftime("%Y-%m-%dT%H:%M:%SZ"),
                knoc_link::ladder::explain(message)
            );
            ("AgentConnected", "False", "LinkDown", text)
        }
    }
}

/// The conditions that only the agent can report; Unknown while the link is down.
fn from_capacity(facts: &Facts<'_>) -> Vec<Condition> {
    let capacity = facts.capacity.filter(|_| facts.link.is_up());
    let Some(capacity) = capacity else {
        let unknown = |kind| {
            (
                kind,
                "Unknown",
                "LinkDown",
                "the link to the agent is down".to_owned(),
            )
        };
        return vec![unknown("SlurmReachable"), unknown("PidIsolation")];
    };
    let health = capacity.scheduler.clone().unwrap_or_default();
    let since = Timestamp::from_nanosecond(i128::from(health.since)).unwrap_or_default();
    let slurm = if health.reachable {
        let text = if health.message.is_empty() {
            "the controller answers".to_owned()
        } else {
            health.message
        };
        ("SlurmReachable", "True", "ControllerAnswers", text)
    } else {
        let since = since.strftime("%Y-%m-%dT%H:%M:%SZ");
        let text = format!("no answer since {since}: {}", health.message);
        ("SlurmReachable", "False", "ControllerDown", text)
    };
    let isolation = if capacity.pid_isolation {
        (
            "PidIsolation",
            "True",
            "PidNamespaces",
            "each container has its own PID namespace".to_owned(),
        )
    } else {
        (
            "PidIsolation",
            "False",
            "NoPidNamespaces",
            "containers see the job's processes".to_owned(),
        )
    };
    vec![slurm, isolation]
}

fn has(facts: &Facts<'_>, kind: &str) -> bool {
    let conditions = facts.previous.and_then(|status| status.conditions.as_ref());
    conditions.is_some_and(|list| list.iter().any(|one| one.type_ == kind))
}

fn render(facts: &Facts<'_>, (kind, status, reason, message): &Condition) -> Value {
    let previous = facts.previous.and_then(|status| status.conditions.as_ref());
    let since = previous
        .and_then(|list| {
            list.iter()
                .find(|one| one.type_ == *kind && one.status == *status)
        })
        .and_then(|one| one.last_transition_time.clone())
        .map_or(facts.now, |time| time.0);
    let whole = |at: Timestamp| at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    json!({
        "type": kind, "status": status, "reason": reason, "message": text::message(message, MESSAGE),
        "lastHeartbeatTime": whole(facts.now), "lastTransitionTime": whole(since),
    })
}

#[cfg(test)]
mod tests;
