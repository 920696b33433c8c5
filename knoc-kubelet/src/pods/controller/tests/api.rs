//! A fake API server behind `tower_test::mock`, which answers only what the controller asks.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use futures::StreamExt as _;
use http::{Method, Request, Response};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Frame;
use kube::{Client, client::Body};
use serde_json::{Value, json};
use tokio::{sync::mpsc, task::JoinSet};
use tokio_stream::wrappers::ReceiverStream;

type Answer = UnsyncBoxBody<Bytes, Infallible>;

#[derive(Default)]
struct State {
    calls: Vec<String>,
    config_maps: Vec<(String, Value)>,
    /// The versions of ConfigMaps.
    version: u64,
    /// The open watches, by the name of their object.
    watches: Vec<(String, mpsc::Sender<Bytes>)>,
    denies_watches: bool,
    /// A ConfigMap that is deleted once it has been read.
    read_once: Option<String>,
    /// The Secrets by name, complete.
    secrets: Vec<(String, Value)>,
    pod: Value,
    node: Value,
    refuses: bool,
    /// A field of a status that is not stored.
    unknown: Option<&'static str>,
}

pub(super) struct FakeApi {
    state: Arc<Mutex<State>>,
    _task: JoinSet<()>,
}

impl FakeApi {
    pub(super) fn start() -> (Self, Client) {
        let (service, mut handle) = tower_test::mock::pair::<Request<Body>, Response<Answer>>();
        let state: Arc<Mutex<State>> = Arc::default();
        state
            .lock()
            .unwrap()
            .config_maps
            .push(("kube-root-ca.crt".to_owned(), json!({"ca.crt": "CA"})));
        let shared = state.clone();
        let mut task = JoinSet::new();
        task.spawn(async move {
            while let Some((request, send)) = handle.next_request().await {
                let (parts, body) = request.into_parts();
                let body = body.collect().await.unwrap().to_bytes();
                let watch = shared.lock().unwrap().watch(&parts.uri);
                if let Some(events) = watch {
                    let events = events.map(|line| Ok(Frame::data(line)));
                    send.send_response(Response::new(StreamBody::new(events).boxed_unsync()));
                    continue;
                }
                let answer = shared
                    .lock()
                    .unwrap()
                    .answer(&parts.method, parts.uri.path(), &body);
                let (code, json) = answer;
                let body = Full::from(serde_json::to_vec(&json).unwrap()).boxed_unsync();
                send.send_response(Response::builder().status(code).body(body).unwrap());
            }
        });
        (Self { state, _task: task }, Client::new(service, "default"))
    }

    pub(super) fn calls(&self) -> Vec<String> {
        self.state.lock().unwrap().calls.clone()
    }

    /// Sets the pod to `pod`.
    pub(super) fn pod(&self, pod: &Value) {
        self.state.lock().unwrap().pod = pod.clone();
    }

    /// Sets the Node; null makes it unreadable.
    pub(super) fn node(&self, node: Value) {
        self.state.lock().unwrap().node = node;
    }

    /// Fails all further status patches.
    pub(super) fn refuse_statuses(&self) {
        self.state.lock().unwrap().refuses = true;
    }

    /// Does not store this field of a status, as an API server that is older than the field.
    pub(super) fn does_not_know(&self, field: &'static str) {
        self.state.lock().unwrap().unknown = Some(field);
    }

    /// Removes the pod.
    pub(super) fn no_pod(&self) {
        self.state.lock().unwrap().pod = Value::Null;
    }

    /// Sets a pull secret of that content.
    pub(super) fn pull_secret(&self, name: &str, content: &str) {
        let content = BASE64_STANDARD.encode(content);
        let secret = json!({
            "metadata": {"name": name, "uid": format!("uid of {name}")},
            "type": "kubernetes.io/dockerconfigjson", "data": {".dockerconfigjson": content},
        });
        self.state
            .lock()
            .unwrap()
            .secrets
            .push((name.to_owned(), secret));
    }

    /// Creates or changes a ConfigMap.
    pub(super) fn config_map(&self, name: &str, data: Value) {
        self.state.lock().unwrap().set(name, Some(data));
    }

    /// Removes a ConfigMap.
    pub(super) fn no_config_map(&self, name: &str) {
        self.state.lock().unwrap().set(name, None);
    }

    /// Deletes a ConfigMap as soon as it has been read, and before it is watched.
    pub(super) fn read_once(&self, name: &str) {
        self.state.lock().unwrap().read_once = Some(name.to_owned());
    }

    /// Denies all further watches.
    pub(super) fn deny_watches(&self) {
        self.state.lock().unwrap().denies_watches = true;
    }
}

impl State {
    fn set(&mut self, name: &str, data: Option<Value>) {
        self.version += 1;
        let kind = if data.is_some() {
            "MODIFIED"
        } else {
            "DELETED"
        };
        self.config_maps.retain(|(known, _)| known != name);
        self.config_maps
            .extend(data.map(|data| (name.to_owned(), data)));
        let object =
            json!({"metadata": {"name": name, "resourceVersion": self.version.to_string()}});
        let line = line(kind, &object);
        let watches = self.watches.iter().filter(|(of, _)| of == name);
        for (_, watch) in watches {
            drop(watch.try_send(line.clone()));
        }
    }

    /// If it is a watch that is allowed: the events of the ConfigMap that it names.
    fn watch(&mut self, uri: &http::Uri) -> Option<ReceiverStream<Bytes>> {
        let query = uri.query().filter(|query| query.contains("watch=true"))?;
        if self.denies_watches {
            return None;
        }
        self.calls.push(format!("WATCH {uri}"));
        let (_, name) = query.split_once("metadata.name%3D")?;
        let name = name.split('&').next().unwrap_or_default();
        let (send, events) = mpsc::channel(16);
        if self.config_maps.iter().any(|(known, _)| known == name) {
            let version = self.version.to_string();
            let object = json!({"metadata": {"name": name, "resourceVersion": version}});
            drop(send.try_send(line("ADDED", &object)));
        }
        self.watches.push((name.to_owned(), send));
        Some(ReceiverStream::new(events))
    }

    fn answer(&mut self, method: &Method, path: &str, body: &[u8]) -> (u16, Value) {
        let text = String::from_utf8_lossy(body);
        self.calls.push(format!("{method} {path} {text}"));
        let last = path.rsplit('/').next().unwrap_or_default();
        if last == "configmaps" {
            return (403, failure(403, "Forbidden"));
        }
        if path.ends_with("/token") {
            return (
                201,
                json!({
                    "metadata": {}, "spec": {"audiences": []},
                    "status": {"token": "t0k3n", "expirationTimestamp": "2099-01-01T00:00:00Z"},
                }),
            );
        }
        if path.contains("/configmaps/") {
            let found = self.config_maps.iter().find(|(name, _)| name == last);
            let answer = match found {
                Some((name, data)) => {
                    let version = self.version.to_string();
                    let metadata = json!({"name": name, "resourceVersion": version});
                    (200, json!({"metadata": metadata, "data": data}))
                }
                None => (404, failure(404, "NotFound")),
            };
            if self.read_once.take_if(|name| *name == last).is_some() {
                self.config_maps.retain(|(name, _)| name != last);
            }
            return answer;
        }
        if path.contains("/secrets/") {
            let found = self.secrets.iter().rfind(|(name, _)| name == last);
            return match found {
                Some((_, secret)) => (200, secret.clone()),
                None => (404, failure(404, "NotFound")),
            };
        }
        if path.contains("/nodes/") {
            if self.node.is_null() {
                return (500, failure(500, "InternalError"));
            }
            return (200, self.node.clone());
        }
        if path.contains("/pods/") && !self.has_pod(path) {
            return (404, failure(404, "NotFound"));
        }
        if *method == Method::GET && path.contains("/pods/") {
            return (200, self.pod.clone());
        }
        if *method == Method::PATCH && path.ends_with("/status") {
            if self.refuses {
                return (422, failure(422, "Invalid"));
            }
            let change: Value = serde_json::from_slice(body).unwrap();
            self.merge(&change["status"]);
            return (200, self.pod.clone());
        }
        (200, json!({"metadata": {"name": "p"}}))
    }

    /// Is it the pod that was set last?
    fn has_pod(&self, path: &str) -> bool {
        let name = path.split("/pods/").nth(1).unwrap_or_default();
        let name = name.split('/').next().unwrap_or_default();
        self.pod["metadata"]["name"] == name
    }

    /// Merges field by field, and conditions by their type.
    fn merge(&mut self, patch: &Value) {
        let unknown = self.unknown;
        let status = &mut self.pod["status"];
        let fields = patch.as_object().unwrap().iter();
        for (field, value) in fields.filter(|(field, _)| unknown != Some(field.as_str())) {
            if value.is_null() {
                status.as_object_mut().unwrap().remove(field);
            } else if field == "conditions" {
                let mut list = status[field].as_array().cloned().unwrap_or_default();
                for one in value.as_array().unwrap() {
                    list.retain(|known| known["type"] != one["type"]);
                    list.push(one.clone());
                }
                status[field] = list.into();
            } else {
                status[field] = value.clone();
            }
        }
    }
}

/// A line of a watch.
fn line(kind: &str, object: &Value) -> Bytes {
    let event = json!({"type": kind, "object": object});
    Bytes::from(format!("{event}\n"))
}

fn failure(code: u16, reason: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason,
           "message": reason, "metadata": {}})
}
