//! PURE: translates the files of configMap, secret, downwardAPI and projected volumes.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{self as core, Pod};
use knoc_proto::{paths, pb};

use super::{
    Needs, Resolved, Size, TokenRequestKey, TrustBundleKey,
    carried::{
        ConfigMapProjection, DownwardApiFile, DownwardApiProjection, EphemeralContainer,
        FileFieldRef, KeyToPath, PodSecurityContext, PodSpec, ResourceFieldSelector,
        ResourceRequirements, SecretProjection, SecurityContext, TokenProjection,
        TrustBundleProjection, VolumeProjection,
    },
    quantity,
    volume::FilesSource,
};

/// The default mode of a file, as in the Kubernetes API.
const DEFAULT_MODE: i32 = 0o644;
/// What `fsGroup` adds to the mode of a file: its group reads it.
const OF_GROUP: u32 = 0o440;
/// The mode of what only the pod's programs may read, if it says as whom they run.
const OF_OWNER: i32 = 0o600;
/// The default lifetime of a token in seconds, as in the Kubernetes API.
const DEFAULT_EXPIRATION: i64 = 3600;

/// Adds the objects to which a volume refers.
pub(super) fn needs(source: FilesSource<'_>, needs: &mut Needs) {
    match source {
        FilesSource::ConfigMap(map) => needs.config_maps.push(map.name.clone()),
        FilesSource::Secret(secret) => needs.secrets.extend(secret.secret_name.clone()),
        FilesSource::DownwardApi(_) => {}
        FilesSource::Projected(projected) => {
            for source in projected.sources.iter().flatten() {
                projection_needs(source.into(), needs);
            }
        }
    }
}

fn projection_needs(source: VolumeProjection<'_>, needs: &mut Needs) {
    let map = source.config_map.as_ref().map(ConfigMapProjection::from);
    let secret = source.secret.as_ref().map(SecretProjection::from);
    let token = source.service_account_token.as_ref();
    needs.config_maps.extend(map.map(|map| map.name.clone()));
    needs
        .secrets
        .extend(secret.map(|secret| secret.name.clone()));
    needs
        .tokens
        .extend(token.map(|token| token_request(token.into())));
    let trust = source.cluster_trust_bundle.as_ref();
    let trust = trust.map(|trust| TrustBundleKey::of(trust.into()));
    needs.trust_bundles.extend(trust);
}

fn token_request(token: TokenProjection<'_>) -> TokenRequestKey {
    TokenRequestKey {
        audience: token.audience.clone().unwrap_or_default(),
        expiration: token.expiration_seconds.unwrap_or(DEFAULT_EXPIRATION),
    }
}

/// Collects the files of a volume.
pub(super) fn files(
    pod: &Pod,
    source: FilesSource<'_>,
    resolved: &Resolved,
    missing: &mut Vec<String>,
    size: &mut Size,
) -> Vec<pb::VolumeFile> {
    let mode = match source {
        FilesSource::ConfigMap(map) => map.default_mode,
        FilesSource::Secret(secret) => secret.default_mode,
        FilesSource::DownwardApi(downward) => downward.default_mode,
        FilesSource::Projected(projected) => projected.default_mode,
    };
    let mut out = Files {
        pod,
        resolved,
        missing,
        size,
        mode: mode.unwrap_or(DEFAULT_MODE),
        has_group: fs_group(pod).is_some(),
        by_path: BTreeMap::new(),
    };
    match source {
        FilesSource::ConfigMap(map) => {
            out.config_map(map.name, map.items.as_deref(), *map.optional);
        }
        FilesSource::Secret(secret) => {
            let name = secret.secret_name.as_deref().unwrap_or_default();
            out.secret(name, secret.items.as_deref(), *secret.optional);
        }
        FilesSource::DownwardApi(downward) => out.downward(downward.items.iter().flatten()),
        FilesSource::Projected(projected) => {
            for source in projected.sources.iter().flatten() {
                out.projection(source.into());
            }
        }
    }
    out.reject_files_as_folders();
    out.by_path.into_values().collect()
}

struct Files<'a> {
    pod: &'a Pod,
    resolved: &'a Resolved,
    missing: &'a mut Vec<String>,
    size: &'a mut Size,
    mode: i32,
    /// Whether the pod has an `fsGroup`.
    has_group: bool,
    /// The files by path: if sources of a projected volume have the same path, the last one wins.
    by_path: BTreeMap<String, pb::VolumeFile>,
}

impl Files<'_> {
    fn projection(&mut self, source: VolumeProjection<'_>) {
        if let Some(map) = source.config_map.as_ref().map(ConfigMapProjection::from) {
            self.config_map(map.name, map.items.as_deref(), *map.optional);
        }
        if let Some(secret) = source.secret.as_ref().map(SecretProjection::from) {
            self.secret(secret.name, secret.items.as_deref(), *secret.optional);
        }
        if let Some(downward) = source
            .downward_api
            .as_ref()
            .map(DownwardApiProjection::from)
        {
            self.downward(downward.items.iter().flatten());
        }
        if let Some(token) = source
            .service_account_token
            .as_ref()
            .map(TokenProjection::from)
        {
            match self.resolved.tokens.get(&token_request(token)) {
                Some(found) => self.put(token.path, found.token.as_bytes(), self.private_mode()),
                None => self
                    .missing
                    .push("the service account token was not issued".to_owned()),
            }
        }
        let trust = source.cluster_trust_bundle.as_ref();
        if let Some(trust) = trust.map(TrustBundleProjection::from) {
            self.trust_bundle(trust);
        }
    }

    /// As on any node, an optional bundle that does not exist is an empty file.
    fn trust_bundle(&mut self, trust: TrustBundleProjection<'_>) {
        let key = TrustBundleKey::of(trust);
        let resolved = self.resolved;
        let found = resolved.trust_bundles.get(&key);
        if found.is_none() && *trust.optional != Some(true) {
            return self.missing.push(format!("{key} not found"));
        }
        let certificates = found.map_or(&[][..], String::as_bytes);
        self.put(trust.path, certificates, self.private_mode());
    }

    fn config_map(
        &mut self,
        name: &str,
        items: Option<&[core::KeyToPath]>,
        optional: Option<bool>,
    ) {
        let resolved = self.resolved;
        let data = resolved.config_maps.get(name).map(|map| {
            let text = map.data.iter().flatten();
            let text = text.map(|(key, value)| (key.as_str(), value.as_bytes()));
            let binary = map.binary_data.iter().flatten();
            text.chain(binary.map(|(key, value)| (key.as_str(), value.0.as_slice())))
                .collect()
        });
        self.keys("configmap", name, data, items, optional);
    }

    fn secret(&mut self, name: &str, items: Option<&[core::KeyToPath]>, optional: Option<bool>) {
        let resolved = self.resolved;
        let data = resolved.secrets.get(name).map(|secret| {
            let data = secret.data.iter().flatten();
            data.map(|(key, value)| (key.as_str(), value.0.as_slice()))
                .collect()
        });
        self.keys("secret", name, data, items, optional);
    }

    fn keys(
        &mut self,
        kind: &str,
        name: &str,
        data: Option<BTreeMap<&str, &[u8]>>,
        items: Option<&[core::KeyToPath]>,
        optional: Option<bool>,
    ) {
        let optional = optional == Some(true);
        let Some(data) = data else {
            if !optional {
                self.missing.push(format!("{kind} \"{name}\" not found"));
            }
            return;
        };
        let Some(items) = items.filter(|items| !items.is_empty()) else {
            for (key, value) in data {
                self.put(key, value, None);
            }
            return;
        };
        for item in items.iter().map(KeyToPath::from) {
            // One key may be written to several files.
            match data.get(item.key.as_str()) {
                Some(value) => self.put(item.path, value, *item.mode),
                None if optional => {}
                None => {
                    let key = item.key;
                    self.missing
                        .push(format!("couldn't find key {key} in {kind} {name}"));
                }
            }
        }
    }

    fn downward<'i>(&mut self, items: impl Iterator<Item = &'i core::DownwardAPIVolumeFile>) {
        for item in items.map(DownwardApiFile::from) {
            if self.size.is_too_much() {
                return;
            }
            let text = if let Some(reference) = item.field_ref.as_ref().map(FileFieldRef::from) {
                available_field(self.pod, reference.field_path, self.missing)
            } else if let Some(selector) = item.resource_field_ref {
                let allocatable = &self.resolved.allocatable;
                Some(resource(self.pod, None, selector.into(), allocatable))
            } else {
                None
            };
            if let Some(text) = text {
                self.put(item.path, text.as_bytes(), *item.mode);
            }
        }
    }

    fn put(&mut self, path: &str, data: &[u8], mode: Option<i32>) {
        if !self.size.add(path, data) {
            return;
        }
        let mode = u32::try_from(mode.unwrap_or(self.mode)).unwrap_or(0o644) & 0o777;
        let mode = if self.has_group {
            mode | OF_GROUP
        } else {
            mode
        };
        let clean = match paths::of_file(path) {
            Ok(clean) => clean,
            Err(error) => {
                return self
                    .missing
                    .push(format!("invalid path \"{path}\": {error}"));
            }
        };
        let file = pb::VolumeFile {
            path: clean.clone(),
            data: data.to_vec().into(),
            mode,
        };
        self.by_path.insert(clean, file);
    }

    /// As in a kubelet, the `defaultMode` does not count for tokens and trust bundles if the pod says whose they are.
    fn private_mode(&self) -> Option<i32> {
        let known = self.has_group || has_one_user(self.pod);
        known.then_some(OF_OWNER)
    }

    /// Rejects paths of which one is a file and the other needs it as a folder.
    fn reject_files_as_folders(&mut self) {
        for path in self.by_path.keys() {
            let parents = path.match_indices('/').map(|(end, _)| &path[..end]);
            for parent in parents.filter(|parent| self.by_path.contains_key(*parent)) {
                self.missing.push(format!(
                    "\"{parent}\" is a file, so there can be no \"{path}\""
                ));
            }
        }
    }
}

fn fs_group(pod: &Pod) -> Option<i64> {
    let spec = pod.spec.as_ref().map(PodSpec::from)?;
    *PodSecurityContext::from(spec.security_context.as_ref()?).fs_group
}

/// Whether the pod names one user for all its containers (`FsUserFrom` of the kubelet).
fn has_one_user(pod: &Pod) -> bool {
    let Some(spec) = pod.spec.as_ref().map(PodSpec::from) else {
        return false;
    };
    let of_pod = spec.security_context.as_ref().map(PodSecurityContext::from);
    let of_pod = of_pod.and_then(|context| *context.run_as_user);
    let own = |context: Option<&core::SecurityContext>| {
        let own = context.map(SecurityContext::from);
        own.and_then(|context| *context.run_as_user).or(of_pod)
    };
    let ephemeral = spec.ephemeral_containers.iter().flatten();
    let ephemeral =
        ephemeral.map(|one| own(EphemeralContainer::from(one).security_context.as_ref()));
    let containers = spec.all_containers();
    let users: BTreeSet<_> = containers
        .map(|container| own(container.security_context.as_ref()))
        .chain(ephemeral)
        .collect();
    users.len() == 1 && !users.contains(&None)
}

/// A field of the pod for the downward API; `None` if this field is not available to containers.
pub(super) fn field(pod: &Pod, path: &str) -> Option<String> {
    let meta = &pod.metadata;
    let spec = pod.spec.as_ref();
    let text = match path {
        "metadata.name" => meta.name.clone(),
        "metadata.namespace" => meta.namespace.clone(),
        "metadata.uid" => meta.uid.clone(),
        "metadata.labels" => meta.labels.as_ref().map(map_lines),
        "metadata.annotations" => meta.annotations.as_ref().map(map_lines),
        "spec.nodeName" => spec.and_then(|spec| spec.node_name.clone()),
        "spec.serviceAccountName" => spec.and_then(|spec| spec.service_account_name.clone()),
        _ => {
            let labels = subscript(path, "metadata.labels").map(|key| (&meta.labels, key));
            let annotations =
                || Some((&meta.annotations, subscript(path, "metadata.annotations")?));
            let (map, key) = labels.or_else(annotations)?;
            map.as_ref().and_then(|map| map.get(key).cloned())
        }
    };
    Some(text.unwrap_or_default())
}

/// Returns the field, or records why it is missing.
pub(super) fn available_field(pod: &Pod, path: &str, missing: &mut Vec<String>) -> Option<String> {
    let text = field(pod, path);
    if text.is_none() {
        missing.push(format!(
            "fieldPath \"{path}\" is not available to containers"
        ));
    }
    text
}

/// The key in `metadata.labels['key']`.
fn subscript<'a>(path: &'a str, of: &str) -> Option<&'a str> {
    path.strip_prefix(of)?
        .strip_prefix("['")?
        .strip_suffix("']")
}

/// Formats a map as lines `key="value"`, quoted as by Go.
fn map_lines(map: &BTreeMap<String, String>) -> String {
    let lines: Vec<_> = map
        .iter()
        .map(|(key, value)| format!("{key}={}", quote(value)))
        .collect();
    lines.join("\n")
}

/// As `strconv.Quote` of Go.
fn quote(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        let number = u32::from(c);
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            '\x07' => quoted.push_str("\\a"),
            '\x08' => quoted.push_str("\\b"),
            '\x0b' => quoted.push_str("\\v"),
            '\x0c' => quoted.push_str("\\f"),
            c if is_printed(c) => quoted.push(c),
            c if c.is_ascii() => quoted.extend(format!("\\x{number:02x}").chars()),
            _ if number < 0x1_0000 => quoted.extend(format!("\\u{number:04x}").chars()),
            _ => quoted.extend(format!("\\U{number:08x}").chars()),
        }
    }
    quoted.push('"');
    quoted
}

/// Whether Go writes the character as it is (`unicode.IsPrint`). Rust has the same rule, except for a mark that begins a text:
/// it writes the number of any other character in braces.
fn is_printed(c: char) -> bool {
    let in_braces = || format!("x{c}").escape_debug().any(|one| one == '{');
    c == '{' || c != '\0' && !in_braces()
}

/// The amount of a container's resource in units of the divisor, rounded up. A limit that is not set is the node's
/// allocatable amount.
pub(super) fn resource(
    pod: &Pod,
    container: Option<&str>,
    selector: ResourceFieldSelector<'_>,
    allocatable: &pb::Resources,
) -> String {
    let name = selector
        .container_name
        .as_deref()
        .filter(|name| !name.is_empty())
        .or(container);
    let spec = pod.spec.as_ref().map(PodSpec::from);
    let mut all = spec.into_iter().flat_map(PodSpec::all_containers);
    let found = all.find(|candidate| Some(candidate.name.as_str()) == name);
    let (of, resource) = selector.resource.split_once('.').unwrap_or(("limits", ""));
    let resources = found.and_then(|container| container.resources.as_ref());
    let resources = resources.map(ResourceRequirements::from);
    let list = |of: &str| match of {
        "requests" => resources.and_then(|resources| resources.requests.as_ref()),
        _ => resources.and_then(|resources| resources.limits.as_ref()),
    };
    // A container without a limit has that of the pod as a whole.
    let whole = spec.and_then(|spec| spec.resources.as_ref());
    let whole = whole.map(ResourceRequirements::from);
    let whole = whole.and_then(|whole| whole.limits.as_ref()?.get(resource));
    let of_pod = whole.and_then(|quantity| quantity::millis(quantity).ok());
    let of_pod = of_pod.filter(|millis| *millis > 0);
    let set = list(of).and_then(|list| list.get(resource));
    let set = set.and_then(|quantity| quantity::millis(quantity).ok());
    // As in Kubernetes, a limit of 0 is none.
    let millis = match set.filter(|millis| *millis > 0) {
        Some(millis) => millis,
        None if of == "requests" => 0,
        None => match resource {
            "cpu" | "memory" if of_pod.is_some() => of_pod.unwrap_or_default(),
            "cpu" => allocatable.cpu_millis,
            "memory" => allocatable.memory_bytes.saturating_mul(1000),
            _ => allocatable.ephemeral_storage_bytes.saturating_mul(1000),
        },
    };
    let divisor = selector
        .divisor
        .as_ref()
        .and_then(|divisor| quantity::millis(divisor).ok());
    let divisor = divisor.filter(|divisor| *divisor > 0).unwrap_or(1000);
    quantity::ceil_div(millis, divisor).to_string()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn annotations_are_quoted_as_by_go() {
        for (text, quoted) in [
            ("a \"b\" \\ {'c'} $(D)", r#""a \"b\" \\ {'c'} $(D)""#),
            ("\n\r\t\x07\x08\x0b\x0c", r#""\n\r\t\a\b\v\f""#),
            ("\0\x01\x1b\x7f", r#""\x00\x01\x1b\x7f""#),
            // Letters and marks of any language are printed, blanks other than the usual one and what has no shape are not.
            (
                "é e\u{301} \u{4f60} \u{1f600}",
                "\"é e\u{301} \u{4f60} \u{1f600}\"",
            ),
            (
                "\u{85}\u{a0}\u{ad}\u{200b}",
                r#""\u0085\u00a0\u00ad\u200b""#,
            ),
            ("\u{2028}\u{feff}\u{e0001}", r#""\u2028\ufeff\U000e0001""#),
        ] {
            assert_eq!(quote(text), quoted, "{text:?}");
        }
    }

    /// The modes of a key, of a key with a mode of its own, and of a token, for the `securityContext` of the pod and of its second
    /// container.
    fn modes(of_pod: &serde_json::Value, of_container: &serde_json::Value) -> Vec<u32> {
        let sources = json!([
            {"secret": {"name": "s", "items": [{"key": "a", "path": "a"}, {"key": "a", "path": "b", "mode": 0o500}]}},
            {"serviceAccountToken": {"path": "c"}},
        ]);
        let pod: Pod = serde_json::from_value(json!({"spec": {
            "securityContext": of_pod,
            "containers": [{"name": "one"}, {"name": "two", "securityContext": of_container}],
            "volumes": [{"name": "v", "projected": {"defaultMode": 0o400, "sources": sources}}],
        }}))
        .unwrap();
        let secret = json!({"metadata": {}, "data": {"a": "MQ=="}});
        let token = crate::Token {
            token: "t".to_owned(),
            expires: jiff::Timestamp::MAX,
        };
        let ask = TokenRequestKey {
            audience: String::new(),
            expiration: DEFAULT_EXPIRATION,
        };
        let resolved = Resolved {
            secrets: [("s".to_owned(), serde_json::from_value(secret).unwrap())].into(),
            tokens: [(ask, token)].into(),
            ..Resolved::default()
        };
        let values = crate::values(&pod, &resolved).unwrap().values;
        let files = &values.files[0].files;
        files.iter().map(|file| file.mode).collect()
    }

    #[test]
    fn modes_are_those_of_a_kubelet_with_and_without_a_group_and_a_user() {
        let (none, user) = (json!({}), json!({"runAsUser": 1000}));
        let group = json!({"fsGroup": 2000});
        assert_eq!(modes(&none, &none), [0o400, 0o500, 0o400]);
        // The group may read what only the owner could.
        assert_eq!(modes(&group, &none), [0o440, 0o540, 0o640]);
        assert_eq!(modes(&user, &none), [0o400, 0o500, 0o600]);
        let same = json!({"runAsUser": 1000});
        assert_eq!(modes(&user, &same), [0o400, 0o500, 0o600]);
        // Not all containers run as the same user.
        let other = json!({"runAsUser": 1001});
        assert_eq!(modes(&user, &other), [0o400, 0o500, 0o400]);
        assert_eq!(modes(&none, &user), [0o400, 0o500, 0o400]);
    }

    #[test]
    fn a_container_without_a_limit_has_that_of_the_pod_and_then_that_of_the_node() {
        let pod: Pod = serde_json::from_value(json!({"spec": {
            "containers": [
                {"name": "own", "resources": {"limits": {"memory": "1Mi"}}},
                {"name": "none"},
                {"name": "zero", "resources": {"limits": {"cpu": "0", "ephemeral-storage": "0"}}},
            ],
            "resources": {"limits": {"cpu": "1500m", "memory": "4Mi"}},
        }}))
        .unwrap();
        let node = pb::Resources {
            cpu_millis: 64_000,
            memory_bytes: 1 << 30,
            ephemeral_storage_bytes: 7,
            ..pb::Resources::default()
        };
        let of = |container: &str, name: &str| {
            let selector = json!({"resource": name});
            let selector: k8s_openapi::api::core::v1::ResourceFieldSelector =
                serde_json::from_value(selector).unwrap();
            resource(&pod, Some(container), (&selector).into(), &node)
        };
        assert_eq!(of("own", "limits.memory"), "1048576");
        assert_eq!(of("none", "limits.memory"), "4194304");
        assert_eq!(of("none", "limits.cpu"), "2");
        assert_eq!(of("none", "limits.ephemeral-storage"), "7");
        assert_eq!(of("none", "requests.cpu"), "0");
        assert_eq!(of("zero", "limits.cpu"), "2");
        assert_eq!(of("zero", "limits.ephemeral-storage"), "7");
    }
}
