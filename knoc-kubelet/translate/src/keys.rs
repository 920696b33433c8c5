//! PURE: which keys of its `ConfigMaps` and Secrets a pod asks for. The others are not kept, because an object has up to a megabyte
//! and a pod may name hundreds of them.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::{
    api::core::v1::{self as core, ConfigMap, Pod, Secret},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use super::{
    carried::{
        ConfigMapEnv, ConfigMapKey, ConfigMapProjection, Container, EnvFromSource, EnvVar,
        EnvVarSource, KeyToPath, PodSpec, SecretEnv, SecretKey, SecretProjection, VolumeProjection,
    },
    ephemeral, keyring,
    size::EACH,
    volume::{self, FilesSource, Source},
};

/// The keys of one object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Wanted {
    /// All of them, as files.
    all: bool,
    /// All that are text, as variables.
    text: bool,
    /// Those that are named.
    named: BTreeSet<String>,
}

impl Wanted {
    fn items(&mut self, items: Option<&[core::KeyToPath]>) {
        match items.filter(|items| !items.is_empty()) {
            None => self.all = true,
            Some(items) => {
                let keys = items.iter().map(|item| KeyToPath::from(item).key.clone());
                self.named.extend(keys);
            }
        }
    }

    fn has(&self, key: &str, text: bool) -> bool {
        self.all || (text && self.text) || self.named.contains(key)
    }
}

/// The keys that a pod asks for, by object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Keys {
    config_maps: BTreeMap<String, Wanted>,
    secrets: BTreeMap<String, Wanted>,
}

/// The keys that become files and variables of the pod.
#[must_use]
pub fn keys(pod: &Pod) -> Keys {
    let mut keys = Keys::default();
    let Some(spec) = pod.spec.as_ref().map(PodSpec::from) else {
        return keys;
    };
    for container in spec.all_containers() {
        keys.of_variables(container);
    }
    for one in ephemeral::containers(spec) {
        keys.of_variables((&one.container).into());
    }
    for volume in spec.volumes.iter().flatten() {
        if let Ok(Source::Files(source)) = volume::source(volume) {
            keys.of_files(source);
        }
    }
    keys
}

impl Keys {
    /// The keys of these pull secrets.
    #[must_use]
    pub fn of_pull_secrets(names: &[String]) -> Self {
        let wanted = Wanted {
            named: keyring::KEYS.map(str::to_owned).into(),
            ..Wanted::default()
        };
        let secrets = names.iter().map(|name| (name.clone(), wanted.clone()));
        Self {
            secrets: secrets.collect(),
            ..Self::default()
        }
    }

    /// Removes what the pod does not ask for. Returns how many bytes are left.
    pub fn trim_config_map(&self, name: &str, map: &mut ConfigMap) -> usize {
        let wanted = self.config_maps.get(name);
        let has = |key: &str, text| wanted.is_some_and(|wanted| wanted.has(key, text));
        trim_metadata(&mut map.metadata);
        let mut left = 0;
        if let Some(data) = &mut map.data {
            data.retain(|key, _| has(key, true));
            left += data
                .iter()
                .map(|(key, one)| size(key, one.as_bytes()))
                .sum::<usize>();
        }
        if let Some(data) = &mut map.binary_data {
            data.retain(|key, _| has(key, false));
            left += data
                .iter()
                .map(|(key, one)| size(key, &one.0))
                .sum::<usize>();
        }
        left
    }

    /// Removes what the pod does not ask for. Returns how many bytes are left.
    pub fn trim_secret(&self, name: &str, secret: &mut Secret) -> usize {
        let wanted = self.secrets.get(name);
        trim_metadata(&mut secret.metadata);
        let Some(data) = &mut secret.data else {
            return 0;
        };
        data.retain(|key, _| wanted.is_some_and(|wanted| wanted.has(key, true)));
        data.iter().map(|(key, one)| size(key, &one.0)).sum()
    }

    fn of_variables(&mut self, container: Container<'_>) {
        for from in container.env_from.iter().flatten().map(EnvFromSource::from) {
            if let Some(map) = from.config_map_ref.as_ref().map(ConfigMapEnv::from) {
                self.config_map(map.name).text = true;
            }
            if let Some(secret) = from.secret_ref.as_ref().map(SecretEnv::from) {
                self.secret(secret.name).text = true;
            }
        }
        let variables = container.env.iter().flatten().map(EnvVar::from);
        for source in variables.filter_map(|var| var.value_from.as_ref()) {
            let source = EnvVarSource::from(source);
            if let Some(of) = source.config_map_key_ref.as_ref().map(ConfigMapKey::from) {
                self.config_map(of.name).named.insert(of.key.clone());
            }
            if let Some(of) = source.secret_key_ref.as_ref().map(SecretKey::from) {
                self.secret(of.name).named.insert(of.key.clone());
            }
        }
    }

    fn of_files(&mut self, source: FilesSource<'_>) {
        match source {
            FilesSource::ConfigMap(map) => self.config_map(map.name).items(map.items.as_deref()),
            FilesSource::Secret(secret) => {
                if let Some(name) = secret.secret_name {
                    self.secret(name).items(secret.items.as_deref());
                }
            }
            FilesSource::DownwardApi(_) => {}
            FilesSource::Projected(projected) => {
                for source in projected.sources.iter().flatten() {
                    self.of_projection(source.into());
                }
            }
        }
    }

    fn of_projection(&mut self, source: VolumeProjection<'_>) {
        if let Some(map) = source.config_map.as_ref().map(ConfigMapProjection::from) {
            self.config_map(map.name).items(map.items.as_deref());
        }
        if let Some(secret) = source.secret.as_ref().map(SecretProjection::from) {
            self.secret(secret.name).items(secret.items.as_deref());
        }
    }

    fn config_map(&mut self, name: &str) -> &mut Wanted {
        self.config_maps.entry(name.to_owned()).or_default()
    }

    fn secret(&mut self, name: &str) -> &mut Wanted {
        self.secrets.entry(name.to_owned()).or_default()
    }
}

fn size(key: &str, contents: &[u8]) -> usize {
    key.len() + contents.len() + EACH
}

/// Annotations and the like may be as large as the data.
fn trim_metadata(metadata: &mut ObjectMeta) {
    *metadata = ObjectMeta {
        name: metadata.name.take(),
        namespace: metadata.namespace.take(),
        uid: metadata.uid.take(),
        resource_version: metadata.resource_version.take(),
        ..ObjectMeta::default()
    };
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(container: &Value, volumes: &Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": {
            "containers": [container], "volumes": volumes,
        }}))
        .unwrap()
    }

    fn map() -> ConfigMap {
        serde_json::from_value(json!({
            "metadata": {"name": "m", "uid": "u", "resourceVersion": "7", "annotations": {"large": "x"}},
            "data": {"a": "1", "b": "22"}, "binaryData": {"c": "MzMz"},
        }))
        .unwrap()
    }

    /// The keys that are left of a `ConfigMap` for the pod, and how many bytes they are counted with beside the fixed part.
    fn left(pod: &Pod) -> (String, usize) {
        let mut map = map();
        let bytes = keys(pod).trim_config_map("m", &mut map);
        let text = map.data.unwrap().into_keys();
        let names: Vec<_> = text.chain(map.binary_data.unwrap().into_keys()).collect();
        let fixed = names.len() * EACH;
        (names.concat(), bytes - fixed)
    }

    #[test]
    fn only_the_keys_that_a_pod_asks_for_are_kept() {
        let plain = json!({"name": "main", "image": "busybox"});
        let variable = json!({"name": "main", "image": "busybox", "env": [
            {"name": "A", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "a"}}},
        ]});
        let all_variables = json!({"name": "main", "image": "busybox", "envFrom": [{"configMapRef": {"name": "m"}}]});
        let none = json!([]);
        let item = json!([{"name": "v", "configMap": {"name": "m", "items": [{"key": "c", "path": "a"}]}}]);
        let all = json!([{"name": "v", "configMap": {"name": "m", "items": []}}]);
        let projected =
            json!([{"name": "v", "projected": {"sources": [{"configMap": {"name": "m"}}]}}]);
        let other = json!([{"name": "v", "configMap": {"name": "other"}}]);
        for (container, volumes, names, bytes) in [
            (&plain, &none, "", 0),
            (&plain, &other, "", 0),
            (&variable, &none, "a", 2),
            (&all_variables, &none, "ab", 5),
            (&plain, &item, "c", 4),
            (&variable, &item, "ac", 6),
            (&plain, &all, "abc", 9),
            (&plain, &projected, "abc", 9),
        ] {
            let left = left(&pod(container, volumes));
            assert_eq!(left, (names.to_owned(), bytes), "{container} {volumes}");
        }
    }

    #[test]
    fn what_identifies_an_object_is_kept_and_its_annotations_are_not() {
        let mut map = map();
        Keys::default().trim_config_map("m", &mut map);
        let expected = ObjectMeta {
            name: Some("m".to_owned()),
            uid: Some("u".to_owned()),
            resource_version: Some("7".to_owned()),
            ..ObjectMeta::default()
        };
        assert_eq!(map.metadata, expected);
    }

    #[test]
    fn of_a_secret_too_and_of_a_pull_secret_only_the_credentials() {
        let secret = || -> Secret {
            serde_json::from_value(
                json!({"metadata": {}, "type": "kubernetes.io/dockerconfigjson", "data": {
                    ".dockerconfigjson": "e30=", "other": "MzMz", "third": "MzMz",
                }}),
            )
            .unwrap()
        };
        let names = |secret: Secret| secret.data.unwrap().into_keys().collect::<Vec<_>>();
        let volumes = json!([{"name": "v", "secret": {"secretName": "s", "items": [{"key": "other", "path": "o"}]}}]);
        let pod = pod(&json!({"name": "main", "image": "busybox"}), &volumes);
        let mut trimmed = secret();
        assert_eq!(keys(&pod).trim_secret("s", &mut trimmed), 8 + EACH);
        assert_eq!(names(trimmed), ["other"]);
        let mut trimmed = secret();
        Keys::of_pull_secrets(&["s".to_owned()]).trim_secret("s", &mut trimmed);
        assert_eq!(names(trimmed), [".dockerconfigjson"]);
    }
}
