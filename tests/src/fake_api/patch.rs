//! Merging of patches: JSON merge patch, and the part of strategic merge patch that a kubelet uses.

use serde_json::{Map, Value};

/// Lists whose elements strategic merge joins by a key; all others are replaced.
const MERGED: [(&str, &str); 4] = [
    ("conditions", "type"),
    ("addresses", "type"),
    ("podIPs", "ip"),
    ("ownerReferences", "uid"),
];

/// How lists are treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// `application/merge-patch+json`: a list replaces a list.
    Json,
    /// `application/strategic-merge-patch+json`, and server-side apply: some lists are joined.
    Strategic,
}

/// Merges `patch` into `target`; null removes a value.
pub(super) fn merge(target: &mut Value, patch: &Value, kind: Kind) {
    let Value::Object(patch) = patch else {
        target.clone_from(patch);
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(target) = target else {
        return;
    };
    for (name, value) in patch.iter().filter(|(name, _)| !name.starts_with('$')) {
        let key = MERGED
            .iter()
            .find(|(list, _)| list == name)
            .map(|(_, key)| *key);
        match (value, target.get_mut(name), key) {
            (Value::Null, _, _) => {
                target.remove(name);
            }
            (Value::Array(items), Some(Value::Array(old)), Some(key))
                if kind == Kind::Strategic =>
            {
                join(old, items, key);
            }
            (_, Some(old), _) => merge(old, value, kind),
            (_, None, _) => {
                let mut fresh = Value::Null;
                merge(&mut fresh, value, kind);
                target.insert(name.clone(), fresh);
            }
        }
    }
}

fn join(old: &mut Vec<Value>, items: &[Value], key: &str) {
    for item in items {
        let same = old
            .iter_mut()
            .find(|candidate| candidate.get(key) == item.get(key));
        if item.get("$patch").and_then(Value::as_str) == Some("delete") {
            old.retain(|candidate| candidate.get(key) != item.get(key));
        } else if let Some(same) = same {
            merge(same, item, Kind::Strategic);
        } else {
            old.push(item.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Kind, merge};

    #[test]
    fn strategic_merge_joins_conditions_and_json_merge_replaces_them() {
        let old = json!({"status": {"phase": "Pending", "conditions": [{"type": "A", "status": "True"}]}});
        let patch =
            json!({"status": {"phase": null, "conditions": [{"type": "B", "status": "False"}]}});
        let mut joined = old.clone();
        merge(&mut joined, &patch, Kind::Strategic);
        assert_eq!(
            joined,
            json!({"status": {"conditions": [
                {"type": "A", "status": "True"}, {"type": "B", "status": "False"}]}})
        );
        let mut replaced = old;
        merge(&mut replaced, &patch, Kind::Json);
        assert_eq!(
            replaced,
            json!({"status": {"conditions": [{"type": "B", "status": "False"}]}})
        );
    }
}
