//! Task: Events, one POST each, aggregated and rate-limited; never in the way of a status.
//!
//! In: a bounded channel; where it is full the Event is dropped and counted in the log; so is one beyond its object's
//! rate. The name of an Event is made from what
//! it tells, so after a restart the same one is not told twice (the API server answers `AlreadyExists`), and a
//! repetition in this process counts up instead.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{Event, EventSource, Node, ObjectReference, Pod},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
};
use knoc_proto::text;
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::json;
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;

/// Events that wait to be written. A burst of 50 pods brings about 400.
const WAITING: usize = 4096;
/// Events of one object in a row; then one every [`REFILL`]. As the kubelet does.
const BURST: u32 = 25;
const REFILL: Duration = Duration::from_mins(5);
/// Objects and Events remembered for limits and counts.
const REMEMBERED: usize = 4096;
const DEADLINE: Duration = Duration::from_secs(10);
/// The API server takes messages of at most 1 KiB.
const MESSAGE: usize = 1024;
/// How much of its object's name an Event's name has. The limit is 253, and a dot and 16 digits follow.
const NAME: usize = 200;
/// Writes under way at a time.
const AT_ONCE: usize = 4;

/// Something worth an Event.
#[derive(Clone, Debug)]
pub struct Note {
    /// What it is about.
    pub object: ObjectReference,
    /// Warning instead of Normal.
    pub warning: bool,
    /// `CamelCase`.
    pub reason: String,
    /// For people.
    pub message: String,
    /// When it happened.
    pub at: Timestamp,
    /// Notes with the same text and different salts are different Events.
    pub salt: u64,
}

/// Where Events are handed in; clones share the channel.
#[derive(Clone, Debug)]
pub struct Events(mpsc::Sender<Note>);

impl Events {
    /// The sender, and the task's end of the channel.
    #[must_use]
    pub fn channel() -> (Self, mpsc::Receiver<Note>) {
        let (sender, receiver) = mpsc::channel(WAITING);
        (Self(sender), receiver)
    }

    /// Hands in an Event; never waits.
    pub fn tell(&self, note: Note) {
        if let Err(error) = self.0.try_send(note) {
            tracing::warn!(%error, "an Event was dropped");
        }
    }
}

/// A pod, or a container of it, as the object of an Event.
#[must_use]
pub fn about_pod(pod: &Pod, container: &str) -> ObjectReference {
    let init = pod.spec.as_ref().is_some_and(|spec| {
        spec.init_containers
            .iter()
            .flatten()
            .any(|candidate| candidate.name == container)
    });
    let kind = if init { "initContainers" } else { "containers" };
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        name: pod.metadata.name.clone(),
        namespace: pod.metadata.namespace.clone(),
        uid: pod.metadata.uid.clone(),
        resource_version: pod.metadata.resource_version.clone(),
        field_path: (!container.is_empty()).then(|| format!("spec.{kind}{{{container}}}")),
    }
}

/// The node as the object of an Event. As kubelets do, the UID is the name.
#[must_use]
pub fn about_node(node: &Node) -> ObjectReference {
    ObjectReference {
        kind: Some("Node".to_owned()),
        name: node.metadata.name.clone(),
        uid: node.metadata.name.clone(),
        ..ObjectReference::default()
    }
}

/// The task's own state.
#[expect(missing_debug_implementations, reason = "kube::Client has none")]
pub struct Recorder {
    client: Client,
    node: String,
    /// Tokens left, and when they were counted.
    limits: HashMap<String, (u32, Instant)>,
    /// How often an Event was told, by its name.
    counts: HashMap<String, i32>,
}

impl Recorder {
    /// A recorder that speaks for this node.
    #[must_use]
    pub fn new(client: Client, node: &str) -> Self {
        Self {
            client,
            node: node.to_owned(),
            limits: HashMap::new(),
            counts: HashMap::new(),
        }
    }

    /// Writes until `shutdown`, then what is in the channel still.
    pub async fn run(mut self, mut notes: mpsc::Receiver<Note>, shutdown: CancellationToken) {
        let mut writes = tokio::task::JoinSet::new();
        loop {
            let note = tokio::select! {
                biased;
                note = notes.recv() => note,
                () = shutdown.cancelled() => None,
            };
            let Some(note) = note else { break };
            if !self.may(&note) {
                tracing::info!(
                    object = note.object.name,
                    reason = note.reason,
                    message = note.message,
                    "an Event was dropped: there were too many of its object"
                );
                continue;
            }
            if writes.len() >= AT_ONCE {
                writes.join_next().await;
            }
            let (namespace, name, body) = self.event(&note);
            let client = self.client.clone();
            writes.spawn(async move { write(client, &namespace, &name, body).await });
        }
        while writes.join_next().await.is_some() {}
    }

    /// The rate limit of the object.
    fn may(&mut self, note: &Note) -> bool {
        let now = Instant::now();
        if self.limits.len() >= REMEMBERED {
            self.limits
                .retain(|_, (_, at)| now.duration_since(*at) < REFILL);
        }
        let key = note.object.uid.clone().unwrap_or_default();
        let (left, at) = self.limits.entry(key).or_insert((BURST, now));
        let refills = now.duration_since(*at).as_secs() / REFILL.as_secs();
        if refills > 0 {
            *left = left
                .saturating_add(u32::try_from(refills).unwrap_or(BURST))
                .min(BURST);
            *at = now;
        }
        let may = *left > 0;
        *left = left.saturating_sub(1);
        may
    }

    /// The Event, or the patch that counts it up.
    fn event(&mut self, note: &Note) -> (String, String, Body) {
        let namespace = note
            .object
            .namespace
            .clone()
            .unwrap_or_else(|| "default".to_owned());
        let name = name(note);
        if self.counts.len() >= REMEMBERED {
            self.counts.clear();
        }
        let count = self.counts.entry(name.clone()).or_default();
        *count += 1;
        if *count > 1 {
            let patch = json!({"count": *count, "lastTimestamp": Time(note.at)});
            return (namespace, name, Body::Count(patch));
        }
        let event = Event {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                namespace: Some(namespace.clone()),
                ..ObjectMeta::default()
            },
            involved_object: note.object.clone(),
            reason: Some(note.reason.clone()),
            message: Some(text::message(&note.message, MESSAGE)),
            type_: Some(if note.warning { "Warning" } else { "Normal" }.to_owned()),
            source: Some(EventSource {
                component: Some("kubelet".to_owned()),
                host: Some(self.node.clone()),
            }),
            reporting_component: Some("kubelet".to_owned()),
            reporting_instance: Some(self.node.clone()),
            first_timestamp: Some(Time(note.at)),
            last_timestamp: Some(Time(note.at)),
            count: Some(1),
            ..Event::default()
        };
        (namespace, name, Body::New(Box::new(event)))
    }
}

enum Body {
    New(Box<Event>),
    Count(serde_json::Value),
}

fn name(note: &Note) -> String {
    let mut hasher = DefaultHasher::new();
    let object = &note.object;
    (
        &object.uid,
        &object.field_path,
        &note.reason,
        &note.message,
        note.salt,
    )
        .hash(&mut hasher);
    let base = object.name.as_deref().unwrap_or_default();
    // The part before the dot must end as any part of a subdomain does.
    let base = base[..base.floor_char_boundary(NAME)].trim_end_matches(['-', '.']);
    format!("{base}.{:016x}", hasher.finish())
}

async fn write(client: Client, namespace: &str, name: &str, body: Body) {
    let api: Api<Event> = Api::namespaced(client, namespace);
    let written = async {
        match body {
            Body::New(event) => api.create(&PostParams::default(), &event).await.map(drop),
            Body::Count(patch) => api
                .patch(name, &PatchParams::default(), &Patch::Merge(patch))
                .await
                .map(drop),
        }
    };
    match tokio::time::timeout(DEADLINE, written).await {
        Ok(Ok(())) => {}
        // Told before a restart, or in a namespace that is being removed.
        Ok(Err(kube::Error::Api(status))) if matches!(status.code, 403 | 404 | 409) => {
            tracing::debug!(name, %status.message, "an Event was not written");
        }
        Ok(Err(error)) => {
            let error = knoc_proto::error::chain(&error);
            tracing::warn!(name, %error, "an Event was not written");
        }
        Err(_) => tracing::warn!(name, "an Event was not written in time"),
    }
}

#[cfg(test)]
mod tests {
    use knoc_proto::names;

    use super::*;

    #[test]
    fn an_event_of_a_long_name_has_a_valid_name() {
        let cut_at = |end: &str| format!("{}{end}{}", "a".repeat(200 - end.len()), "b".repeat(50));
        for object in [
            "p".to_owned(),
            cut_at(""),
            cut_at("-"),
            cut_at("."),
            cut_at("b.-"),
            "a".repeat(253),
        ] {
            let note = Note {
                object: ObjectReference {
                    name: Some(object),
                    ..ObjectReference::default()
                },
                warning: false,
                reason: String::new(),
                message: String::new(),
                at: Timestamp::UNIX_EPOCH,
                salt: 0,
            };
            let name = name(&note);
            assert_eq!(names::dns_subdomain(&name), Ok(()), "{name}");
        }
    }
}
