//! Task: writes Events, with one POST each, aggregated and rate-limited. It never delays a status, and while statuses are
//! being written it writes one Event at a time.
//!
//! In: a bounded channel. If it is full, or if an object exceeds its rate, the Event is dropped and logged. The name of
//! an Event is derived from its contents: after a restart the same Event is not written twice (the API server answers
//! `AlreadyExists`), and a repetition within this process increases its count instead, or
//! creates it again if the API server has removed it meanwhile.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{Event, EventSource, ObjectReference, Pod},
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

/// Events that may wait to be written. A burst of 50 pods brings about 400.
const WAITING: usize = 4096;
/// Events of one object in a row; then one every [`REFILL`], as in the kubelet.
const BURST: u32 = 25;
const REFILL: Duration = Duration::from_mins(5);
/// Objects and Events that are remembered for rate limits and counts.
const REMEMBERED: usize = 4096;
const DEADLINE: Duration = Duration::from_secs(10);
/// The longest message that the API server accepts.
const MESSAGE: usize = 1024;
/// How much of its object's name an Event's name takes. The limit is 253, and a dot and 16 digits follow.
const NAME: usize = 200;
/// Writes at a time.
const AT_ONCE: usize = 4;
/// Writes at a time while statuses are being written, for which somebody may wait.
const BESIDE_STATUSES: usize = 1;

/// An Event to be written.
#[derive(Clone, Debug)]
pub struct Note {
    /// The object that the Event is about.
    pub object: ObjectReference,
    /// Whether its type is Warning instead of Normal.
    pub warning: bool,
    /// The reason, in `CamelCase`.
    pub reason: String,
    /// The message, which is cut to what the API server accepts.
    pub message: String,
    /// When it happened.
    pub at: Timestamp,
    /// Notes with the same text and different salts are different Events.
    pub salt: u64,
    /// How often it happened: what the Event's count grows by, at least 1.
    pub times: i32,
}

impl Note {
    /// A Warning of what has happened now, once.
    pub(crate) fn warning(object: ObjectReference, reason: &str, message: String) -> Self {
        Self {
            object,
            warning: true,
            reason: reason.to_owned(),
            message,
            at: Timestamp::now(),
            salt: 0,
            times: 1,
        }
    }
}

/// The sending end of the channel of Events; clones share the channel.
#[derive(Clone, Debug)]
pub struct Events {
    notes: mpsc::Sender<Note>,
    /// How many statuses are being written.
    statuses: Arc<AtomicUsize>,
}

/// The task's end of the channel.
#[derive(Debug)]
pub struct Notes {
    notes: mpsc::Receiver<Note>,
    statuses: Arc<AtomicUsize>,
}

impl Notes {
    /// The next Event that was recorded; None if nobody can record another one.
    pub async fn recv(&mut self) -> Option<Note> {
        self.notes.recv().await
    }
}

/// A status that is being written, until this is dropped.
#[derive(Debug)]
pub struct StatusWrite(Arc<AtomicUsize>);

impl Drop for StatusWrite {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Events {
    /// The sender, and the task's end of the channel.
    #[must_use]
    pub fn channel() -> (Self, Notes) {
        let (sender, receiver) = mpsc::channel(WAITING);
        let statuses = Arc::<AtomicUsize>::default();
        let events = Self {
            notes: sender,
            statuses: Arc::clone(&statuses),
        };
        let notes = Notes {
            notes: receiver,
            statuses,
        };
        (events, notes)
    }

    /// A status is written now, for which Events make room.
    #[must_use]
    pub fn status_write(&self) -> StatusWrite {
        self.statuses.fetch_add(1, Ordering::Relaxed);
        StatusWrite(Arc::clone(&self.statuses))
    }

    /// Queues an Event; never waits.
    pub fn record(&self, note: Note) {
        if let Err(error) = self.notes.try_send(note) {
            tracing::warn!(%error, "an Event was dropped, too many wait to be written");
        }
    }
}

/// A pod, or a container of it, as the object of an Event.
#[must_use]
pub fn about_pod(pod: &Pod, container: &str) -> ObjectReference {
    let spec = pod.spec.as_ref();
    let mut init = spec
        .into_iter()
        .flat_map(|spec| spec.init_containers.iter().flatten());
    let mut ephemeral = spec
        .into_iter()
        .flat_map(|spec| spec.ephemeral_containers.iter().flatten());
    let kind = if init.any(|one| one.name == container) {
        "initContainers"
    } else if ephemeral.any(|one| one.name == container) {
        "ephemeralContainers"
    } else {
        "containers"
    };
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

/// The node with this name as the object of an Event. As kubelets do, it takes the name for the UID.
#[must_use]
pub fn about_node(name: &str) -> ObjectReference {
    ObjectReference {
        kind: Some("Node".to_owned()),
        name: Some(name.to_owned()),
        uid: Some(name.to_owned()),
        ..ObjectReference::default()
    }
}

/// The task that writes Events.
#[expect(missing_debug_implementations, reason = "kube::Client has none")]
pub struct Recorder {
    client: Client,
    node: String,
    /// Tokens left for each object, and when they were counted.
    limits: HashMap<String, (u32, Instant)>,
    /// How often each Event was recorded, by its name.
    counts: HashMap<String, i32>,
}

impl Recorder {
    /// A recorder for the Events of this node.
    #[must_use]
    pub fn new(client: Client, node: &str) -> Self {
        Self {
            client,
            node: node.to_owned(),
            limits: HashMap::new(),
            counts: HashMap::new(),
        }
    }

    /// Writes until `shutdown`, and then finishes the writes that are running.
    pub async fn run(mut self, mut from: Notes, shutdown: CancellationToken) {
        let mut writes = tokio::task::JoinSet::new();
        loop {
            let note = tokio::select! {
                biased;
                note = from.recv() => note,
                () = shutdown.cancelled() => None,
            };
            let Some(note) = note else { break };
            if !self.may(&note) {
                tracing::info!(
                    object = note.object.name,
                    reason = note.reason,
                    message = note.message,
                    "an Event was dropped, there were too many about its object"
                );
                continue;
            }
            let beside = from.statuses.load(Ordering::Relaxed) > 0;
            let most = if beside { BESIDE_STATUSES } else { AT_ONCE };
            while writes.len() >= most {
                writes.join_next().await;
            }
            let (namespace, name, body) = self.event(&note);
            let client = self.client.clone();
            writes.spawn(async move { write(client, &namespace, &name, body).await });
        }
        while writes.join_next().await.is_some() {}
    }

    /// Applies the rate limit of the object: may the Event be written?
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

    /// The new Event, or the patch that increases the count of an earlier one.
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
        let known = *count > 0;
        *count = count.saturating_add(note.times.max(1));
        let count = *count;
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
            count: Some(count),
            ..Event::default()
        };
        let event = Box::new(event);
        if known {
            let patch = json!({"count": count, "lastTimestamp": Time(note.at)});
            return (namespace, name, Body::Count(patch, event));
        }
        (namespace, name, Body::New(event))
    }
}

enum Body {
    New(Box<Event>),
    /// The Event is created again if the API server has removed it, usually an hour after the last write.
    Count(serde_json::Value, Box<Event>),
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
    // The part before the dot must end like any label of a DNS subdomain.
    let base = base[..base.floor_char_boundary(NAME)].trim_end_matches(['-', '.']);
    format!("{base}.{:016x}", hasher.finish())
}

async fn write(client: Client, namespace: &str, name: &str, body: Body) {
    let api: Api<Event> = Api::namespaced(client, namespace);
    let written = async {
        match body {
            Body::New(event) => api.create(&PostParams::default(), &event).await,
            Body::Count(patch, event) => {
                let params = PatchParams::default();
                match api.patch(name, &params, &Patch::Merge(patch)).await {
                    Err(kube::Error::Api(status)) if status.code == 404 => {
                        api.create(&PostParams::default(), &event).await
                    }
                    other => other,
                }
            }
        }
    };
    match tokio::time::timeout(DEADLINE, written).await {
        Ok(Ok(_)) => {}
        // Written before a restart, or its namespace is being removed.
        Ok(Err(kube::Error::Api(status))) if matches!(status.code, 403 | 404 | 409) => {
            tracing::debug!(name, %status.message, "could not write an Event");
        }
        Ok(Err(error)) => {
            let error = knoc_proto::error::chain(&error);
            tracing::warn!(name, %error, "could not write an Event");
        }
        Err(_) => tracing::warn!(name, "could not write an Event in time"),
    }
}

#[cfg(test)]
mod tests {
    use http::{Request, Response};
    use knoc_proto::names;
    use kube::client::Body as HttpBody;

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
                times: 1,
            };
            let name = name(&note);
            assert_eq!(names::dns_subdomain(&name), Ok(()), "{name}");
        }
    }
    /// A probe that fails again after hours has an Event then too.
    #[tokio::test]
    async fn a_repetition_of_a_removed_event_is_a_new_one() {
        let (service, mut server) =
            tower_test::mock::pair::<Request<HttpBody>, Response<HttpBody>>();
        let mut recorder = Recorder::new(Client::new(service, "default"), "n");
        let note = Note {
            object: ObjectReference::default(),
            warning: true,
            reason: "Unhealthy".to_owned(),
            message: "it failed".to_owned(),
            at: Timestamp::UNIX_EPOCH,
            salt: 0,
            times: 2,
        };
        recorder.event(&note);
        let (namespace, name, body) = recorder.event(&note);
        let writing = write(recorder.client.clone(), &namespace, &name, body);
        let answering = async {
            let mut methods = Vec::new();
            for code in [404, 201] {
                let (request, send) = server.next_request().await.unwrap();
                methods.push(request.method().clone());
                let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code,
                    "reason": "NotFound", "message": "m", "metadata": {}, "involvedObject": {}});
                let body = HttpBody::from(serde_json::to_vec(&status).unwrap());
                send.send_response(Response::builder().status(code).body(body).unwrap());
                if code == 201 {
                    let posted = request.into_body().collect_bytes().await.unwrap();
                    let posted: serde_json::Value = serde_json::from_slice(&posted).unwrap();
                    assert_eq!(posted["count"], 4);
                }
            }
            methods
        };
        let ((), methods) = tokio::join!(writing, answering);
        assert_eq!(methods, ["PATCH", "POST"]);
    }
}
