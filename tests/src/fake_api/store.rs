//! The objects of the fake API server: one map, one counter of resource versions, one history that
//! watches read. All changes happen under one lock and immediately.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};

use super::patch::{self, Kind};

/// An error: the HTTP status, the machine-readable reason, and a message.
#[derive(Debug)]
pub(super) struct ApiError {
    pub(super) code: u16,
    pub(super) reason: &'static str,
    pub(super) message: String,
}

/// The object or collection of a request.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Target {
    /// The API group and version, such as `v1` or `coordination.k8s.io/v1`.
    pub(super) version: String,
    /// The plural name of the kind, as in the path.
    pub(super) resource: String,
    pub(super) namespace: String,
    /// The object's name, or an empty string for a collection.
    pub(super) name: String,
}

/// A change of an object, as watches report it.
#[derive(Debug, Clone)]
pub(super) struct Change {
    pub(super) version: u64,
    pub(super) kind: &'static str,
    pub(super) target: Target,
    /// `None` if it was discarded; a watch that is far behind then sees the next change of the object instead.
    pub(super) object: Option<Arc<Value>>,
}

/// How many changes keep their object although there is a newer one. The number is limited because pods can be large.
const REMEMBERED: usize = 64;

#[derive(Debug, Default)]
pub(super) struct Store {
    objects: BTreeMap<Target, Arc<Value>>,
    pub(super) history: Vec<Change>,
    pub(super) version: u64,
}

impl Store {
    pub(super) fn get(&self, target: &Target) -> Result<Value, ApiError> {
        let found = self.objects.get(target).map(|object| Value::clone(object));
        found.ok_or_else(|| ApiError {
            code: 404,
            reason: "NotFound",
            message: format!("{} {:?} not found", target.resource, target.name),
        })
    }

    /// All objects of a collection; an empty namespace means all.
    pub(super) fn list(&self, collection: &Target) -> Vec<Value> {
        let items = self
            .objects
            .iter()
            .filter(|(target, _)| belongs(target, collection));
        items.map(|(_, object)| Value::clone(object)).collect()
    }

    pub(super) fn create(&mut self, target: &Target, mut object: Value) -> Result<Value, ApiError> {
        let mut target = target.clone();
        if target.name.is_empty() {
            let given = object["metadata"]["name"].as_str().map(str::to_owned);
            let prefix = object["metadata"]["generateName"]
                .as_str()
                .unwrap_or("object-");
            target.name = given.unwrap_or_else(|| format!("{prefix}{:05}", self.version));
        }
        if self.objects.contains_key(&target) {
            return Err(ApiError {
                code: 409,
                reason: "AlreadyExists",
                message: format!("{} {:?} already exists", target.resource, target.name),
            });
        }
        let metadata = &mut object["metadata"];
        metadata["name"] = json!(target.name);
        if !target.namespace.is_empty() {
            metadata["namespace"] = json!(target.namespace);
        }
        // A version 4 UUID in form; its number makes it unique.
        metadata["uid"] = json!(format!("00000000-0000-4000-8000-{:012x}", self.version + 1));
        metadata["creationTimestamp"] = json!(now());
        metadata["generation"] = json!(1);
        Ok(self.put("ADDED", target, object))
    }

    pub(super) fn replace(
        &mut self,
        target: &Target,
        mut object: Value,
        part: &str,
    ) -> Result<Value, ApiError> {
        let old = self.get(target)?;
        let wanted = object["metadata"]["resourceVersion"].as_str();
        if wanted.is_some_and(|wanted| Some(wanted) != old["metadata"]["resourceVersion"].as_str())
        {
            return Err(conflict(target, "the object has been modified"));
        }
        if part == "status" {
            let status = object["status"].take();
            object = old;
            object["status"] = status;
        } else {
            for field in [
                "uid",
                "creationTimestamp",
                "deletionTimestamp",
                "generation",
            ] {
                if let Some(value) = old["metadata"].get(field) {
                    object["metadata"][field] = value.clone();
                }
            }
            if let Some(status) = old.get("status") {
                object["status"] = status.clone();
            }
        }
        Ok(self.put("MODIFIED", target.clone(), object))
    }

    pub(super) fn patch(
        &mut self,
        target: &Target,
        body: &Value,
        kind: Kind,
        part: &str,
    ) -> Result<Value, ApiError> {
        let old = self.get(target)?;
        let uid = body["metadata"]["uid"].as_str();
        if uid.is_some_and(|uid| Some(uid) != old["metadata"]["uid"].as_str()) {
            return Err(conflict(target, "the UID is another"));
        }
        let mut object = old.clone();
        let mut body = body.clone();
        if let Some(fields) = body.as_object_mut() {
            fields.retain(|name, _| (name == "status") == (part == "status") || name == "metadata");
        }
        patch::merge(&mut object, &body, kind);
        object["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"].clone();
        if object == old {
            return Ok(old);
        }
        Ok(self.put("MODIFIED", target.clone(), object))
    }

    /// Deletes an object: pods on a node in two steps, as in a real API server, and all other objects at once.
    pub(super) fn delete(&mut self, target: &Target, options: &Value) -> Result<Value, ApiError> {
        let mut object = self.get(target)?;
        let uid = options["preconditions"]["uid"].as_str();
        if uid.is_some_and(|uid| Some(uid) != object["metadata"]["uid"].as_str()) {
            return Err(conflict(target, "the UID in the precondition is another"));
        }
        let own = object["spec"]["terminationGracePeriodSeconds"]
            .as_i64()
            .unwrap_or(30);
        let grace = options["gracePeriodSeconds"].as_i64().unwrap_or(own);
        let on_a_node = object["spec"]["nodeName"]
            .as_str()
            .is_some_and(|node| !node.is_empty());
        if target.resource == "pods" && on_a_node && grace > 0 {
            object["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
            if object["metadata"]["deletionTimestamp"].is_null() {
                object["metadata"]["deletionTimestamp"] = json!(now());
            }
            return Ok(self.put("MODIFIED", target.clone(), object));
        }
        self.objects.remove(target);
        self.record("DELETED", target.clone(), object.clone());
        Ok(object)
    }

    fn put(&mut self, kind: &'static str, target: Target, object: Value) -> Value {
        let object = self.record(kind, target.clone(), object);
        self.objects.insert(target, Arc::clone(&object));
        Value::clone(&object)
    }

    fn record(&mut self, kind: &'static str, target: Target, mut object: Value) -> Arc<Value> {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let object = Arc::new(object);
        self.history.push(Change {
            version: self.version,
            kind,
            target,
            object: Some(Arc::clone(&object)),
        });
        let forgotten = self.history.len().checked_sub(REMEMBERED + 1);
        if let Some(old) = forgotten.and_then(|at| self.history.get_mut(at)) {
            let newest = self.objects.get(&old.target);
            let is_newest = match (newest, &old.object) {
                (Some(newest), Some(object)) => Arc::ptr_eq(newest, object),
                _ => false,
            };
            if old.kind != "DELETED" && !is_newest {
                old.object = None;
            }
        }
        object
    }
}

/// Whether the object belongs to the collection.
pub(super) fn belongs(target: &Target, collection: &Target) -> bool {
    target.version == collection.version
        && target.resource == collection.resource
        && (collection.namespace.is_empty() || target.namespace == collection.namespace)
}

fn conflict(target: &Target, detail: &str) -> ApiError {
    let message = format!("{} {:?}: {detail}", target.resource, target.name);
    ApiError {
        code: 409,
        reason: "Conflict",
        message,
    }
}

fn now() -> String {
    let now = jiff::Timestamp::now();
    now.round(jiff::Unit::Second).unwrap_or(now).to_string()
}
