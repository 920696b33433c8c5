//! Translates requests of the Kubernetes API to calls of the store, and back.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt as _, stream};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::{Method, Request, Response};
use serde_json::{Value, json};

use super::Shared;
use super::patch::Kind;
use super::store::{ApiError, Change, Target, belongs};

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// The maximum duration of a watch; the real server has a similar limit.
const WATCH_LIMIT: Duration = Duration::from_mins(10);

/// Handles one request and returns its response.
pub(super) async fn answer(shared: Arc<Shared>, request: Request<Incoming>) -> Response<Body> {
    let method = request.method().clone();
    let query: BTreeMap<String, String> = query(request.uri().query().unwrap_or(""));
    let path = request.uri().path().to_owned();
    let content = request
        .headers()
        .get("content-type")
        .and_then(|value| value.to_str().ok());
    let strategic = content.is_none_or(|content| !content.contains("application/merge-patch"));
    let kind = if strategic {
        Kind::Strategic
    } else {
        Kind::Json
    };
    let apply = content.is_some_and(|content| content.contains("apply-patch"));
    let body = match request.into_body().collect().await {
        Ok(body) => serde_json::from_slice(&body.to_bytes()).unwrap_or(Value::Null),
        Err(_) => Value::Null,
    };
    if path == "/version" {
        let version = json!({"major": "1", "minor": "36", "gitVersion": "v1.36.3",
            "gitCommit": "", "gitTreeState": "", "buildDate": "", "goVersion": "", "compiler": "",
            "platform": "linux/amd64"});
        return reply(200, &version);
    }
    let Some((target, part)) = parse(&path) else {
        let message = format!("no such path: {path}");
        return error_response(&ApiError {
            code: 404,
            reason: "NotFound",
            message,
        });
    };
    if let Some(message) = forbidden(&shared, &method, &target) {
        return error_response(&ApiError {
            code: 403,
            reason: "Forbidden",
            message,
        });
    }
    if method == Method::GET && target.name.is_empty() && is_set(&query, "watch") {
        return watch(shared, target, &query);
    }
    match act(
        &shared,
        &method,
        &target,
        &part,
        &query,
        (&body, kind, apply),
    ) {
        Ok((code, object)) => reply(code, &typed(&target, object)),
        Err(error) => error_response(&error),
    }
}

/// Why a test wants the request to be rejected, if it does.
fn forbidden(shared: &Shared, method: &Method, target: &Target) -> Option<String> {
    let resource = &target.resource;
    if method == Method::GET && target.name.is_empty() && shared.denied().contains(resource) {
        return Some(format!("{resource} may not be listed"));
    }
    (method == Method::POST && shared.full().contains(resource))
        .then(|| format!("{resource} is forbidden: exceeded quota: few"))
}

fn act(
    shared: &Shared,
    method: &Method,
    target: &Target,
    part: &str,
    query: &BTreeMap<String, String>,
    (body, kind, apply): (&Value, Kind, bool),
) -> Result<(u16, Value), ApiError> {
    match (method.as_str(), part) {
        ("GET", _) if target.name.is_empty() => Ok((200, list(shared, target, query))),
        ("GET", _) => shared.store().get(target).map(|object| (200, object)),
        ("POST", "token") => Ok((201, shared.tokens().answer(target, body))),
        ("POST", _) if target.resource.ends_with("reviews") => {
            let mut review = body.clone();
            review["status"] = json!({"allowed": true});
            Ok((201, review))
        }
        ("POST", _) => shared
            .change(|store| store.create(target, body.clone()))
            .map(created),
        ("PUT", _) => shared
            .change(|store| store.replace(target, body.clone(), part))
            .map(|object| (200, object)),
        ("PATCH", _) => shared.change(|store| match store.patch(target, body, kind, part) {
            Err(ApiError { code: 404, .. }) if apply => {
                store.create(target, body.clone()).map(created)
            }
            answer => answer.map(|object| (200, object)),
        }),
        ("DELETE", _) => {
            let mut options = body.clone();
            if let Some(grace) = query
                .get("gracePeriodSeconds")
                .and_then(|text| text.parse::<i64>().ok())
            {
                options["gracePeriodSeconds"] = json!(grace);
            }
            shared
                .change(|store| store.delete(target, &options))
                .map(|object| (200, object))
        }
        _ => Err(ApiError {
            code: 405,
            reason: "MethodNotAllowed",
            message: format!("{method} is not known here"),
        }),
    }
}

fn created(object: Value) -> (u16, Value) {
    (201, object)
}

fn list(shared: &Shared, target: &Target, query: &BTreeMap<String, String>) -> Value {
    let store = shared.store();
    let mut items = store.list(target);
    items.retain(|object| matches(object, query));
    json!({
        "kind": "List", "apiVersion": target.version,
        "metadata": {"resourceVersion": store.version.to_string()}, "items": items,
    })
}

fn watch(shared: Arc<Shared>, target: Target, query: &BTreeMap<String, String>) -> Response<Body> {
    let from = query
        .get("resourceVersion")
        .and_then(|text| text.parse().ok())
        .unwrap_or(0);
    let seconds = query
        .get("timeoutSeconds")
        .and_then(|text| text.parse().ok());
    let limit = seconds.map_or(WATCH_LIMIT, Duration::from_secs);
    let mut initial = VecDeque::new();
    let mut seen = from;
    if from == 0 {
        let store = shared.store();
        seen = store.version;
        let items = store
            .list(&target)
            .into_iter()
            .filter(|object| matches(object, query));
        initial.extend(items.map(|object| event("ADDED", &typed(&target, object))));
        if is_set(query, "sendInitialEvents") {
            let bookmark = json!({"metadata": {"resourceVersion": seen.to_string(),
                "annotations": {"k8s.io/initial-events-end": "true"}}});
            initial.push_back(event("BOOKMARK", &typed(&target, bookmark)));
        }
    }
    let later = changes(shared, target, query.clone(), seen);
    let frames = stream::iter(initial)
        .chain(later)
        .map(|line| Ok(Frame::data(line)));
    let frames = frames.take_until(tokio::time::sleep(limit));
    response(200, StreamBody::new(frames).boxed_unsync())
}

/// The changes of the collection after that version, one line of JSON each.
fn changes(
    shared: Arc<Shared>,
    target: Target,
    query: BTreeMap<String, String>,
    seen: u64,
) -> impl Stream<Item = Bytes> {
    let newest = shared.newest.subscribe();
    let start = (shared, newest, seen);
    let batches = stream::unfold(start, move |(shared, mut newest, seen)| {
        let (target, query) = (target.clone(), query.clone());
        async move {
            newest.wait_for(|version| *version > seen).await.ok()?;
            let (lines, seen) = {
                let store = shared.store();
                let fresh = store.history.iter().filter(|change| change.version > seen);
                let mine = fresh.filter(|change| belongs(&change.target, &target));
                let line = |change: &Change| {
                    let object = change.object.as_deref()?;
                    let object = matches(object, &query).then(|| object.clone())?;
                    Some(event(change.kind, &typed(&target, object)))
                };
                (mine.filter_map(line).collect::<Vec<_>>(), store.version)
            };
            Some((stream::iter(lines), (shared, newest, seen)))
        }
    });
    batches.flatten()
}

fn event(kind: &str, object: &Value) -> Bytes {
    Bytes::from(format!("{}\n", json!({"type": kind, "object": object})))
}

/// Adds apiVersion and kind, which stored objects lack and clients expect in a single object.
fn typed(target: &Target, mut object: Value) -> Value {
    if object.get("kind").is_none() {
        let kind = match target.resource.as_str() {
            "configmaps" => "ConfigMap",
            "serviceaccounts" => "ServiceAccount",
            "endpointslices" => "EndpointSlice",
            "networkpolicies" => "NetworkPolicy",
            "replicasets" => "ReplicaSet",
            "priorityclasses" => "PriorityClass",
            "runtimeclasses" => "RuntimeClass",
            "persistentvolumeclaims" => "PersistentVolumeClaim",
            "persistentvolumes" => "PersistentVolume",
            other => {
                let singular = other.strip_suffix('s').unwrap_or(other);
                let mut letters = singular.chars();
                let first = letters.next().map(|letter| letter.to_ascii_uppercase());
                object["kind"] = json!(first.into_iter().chain(letters).collect::<String>());
                object["apiVersion"] = json!(target.version);
                return object;
            }
        };
        object["kind"] = json!(kind);
        object["apiVersion"] = json!(target.version);
    }
    object
}

/// Parses `/api/v1/…` and `/apis/GROUP/VERSION/…`; returns the target and its subresource.
fn parse(path: &str) -> Option<(Target, String)> {
    let mut parts: VecDeque<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let mut target = Target::default();
    match parts.pop_front()? {
        "api" => parts.pop_front()?.clone_into(&mut target.version),
        "apis" => target.version = format!("{}/{}", parts.pop_front()?, parts.pop_front()?),
        _ => return None,
    }
    if parts.front() == Some(&"namespaces") && parts.len() > 2 {
        parts.pop_front();
        parts.pop_front()?.clone_into(&mut target.namespace);
    }
    parts.pop_front()?.clone_into(&mut target.resource);
    parts
        .pop_front()
        .unwrap_or_default()
        .clone_into(&mut target.name);
    Some((target, parts.pop_front().unwrap_or_default().to_owned()))
}

/// Whether the object matches the field selector (`a.b=c`, separated by commas); label selectors are ignored.
fn matches(object: &Value, query: &BTreeMap<String, String>) -> bool {
    let selector = query.get("fieldSelector").map_or("", String::as_str);
    selector
        .split(',')
        .filter(|term| !term.is_empty())
        .all(|term| {
            let (path, wanted, equal) = match term.split_once("!=") {
                Some((path, wanted)) => (path, wanted, false),
                None => match term.split_once('=') {
                    Some((path, wanted)) => (path, wanted.trim_start_matches('='), true),
                    None => return false,
                },
            };
            let pointer = format!("/{}", path.replace('.', "/"));
            let found = object
                .pointer(&pointer)
                .and_then(Value::as_str)
                .unwrap_or("");
            (found == wanted) == equal
        })
}

fn is_set(query: &BTreeMap<String, String>, name: &str) -> bool {
    query
        .get(name)
        .is_some_and(|value| value == "true" || value == "1")
}

fn query(text: &str) -> BTreeMap<String, String> {
    let pairs = text.split('&').filter_map(|pair| pair.split_once('='));
    pairs
        .map(|(name, value)| (decode(name), decode(value)))
        .collect()
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digits: String = rest.by_ref().take(2).map(char::from).collect();
            bytes.extend(u8::from_str_radix(&digits, 16));
        } else {
            bytes.push(if byte == b'+' { b' ' } else { byte });
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn reply(code: u16, object: &Value) -> Response<Body> {
    response(code, Full::from(object.to_string()).boxed_unsync())
}

fn error_response(error: &ApiError) -> Response<Body> {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": error.message, "reason": error.reason, "code": error.code,
    });
    reply(error.code, &status)
}

fn response(code: u16, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = hyper::StatusCode::from_u16(code).unwrap_or_default();
    let json = hyper::header::HeaderValue::from_static("application/json");
    response
        .headers_mut()
        .insert(hyper::header::CONTENT_TYPE, json);
    response
}
