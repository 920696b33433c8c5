//! PURE: translates the environment of a container: service variables, envFrom, env. The last variable of a name wins.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Pod, Service};
use knoc_proto::{
    expand::{self, Known, RuntimeFields},
    names,
    pb::{self, env_var::Value},
};

use super::carried::{
    ConfigMapEnv, ConfigMapKey, Container, EnvFieldRef, EnvFromSource, EnvVar, EnvVarSource,
    FileKey, ResourceFieldSelector, SecretEnv, SecretKey, VolumeMount,
};
use super::{Needs, Resolved, Size, files};

/// Adds the objects to which a container's variables refer.
pub(super) fn needs(container: Container<'_>, needs: &mut Needs) {
    for from in env_from_sources(container) {
        let map = from.config_map_ref.as_ref().map(ConfigMapEnv::from);
        let secret = from.secret_ref.as_ref().map(SecretEnv::from);
        needs.config_maps.extend(map.map(|from| from.name.clone()));
        needs.secrets.extend(secret.map(|from| from.name.clone()));
    }
    let variables = container.env.iter().flatten().map(EnvVar::from);
    for source in variables.filter_map(|var| var.value_from.as_ref()) {
        let source = EnvVarSource::from(source);
        let key = source.config_map_key_ref.as_ref().map(ConfigMapKey::from);
        let secret = source.secret_key_ref.as_ref().map(SecretKey::from);
        needs.config_maps.extend(key.map(|key| key.name.clone()));
        needs.secrets.extend(secret.map(|key| key.name.clone()));
    }
}

fn env_from_sources(container: Container<'_>) -> impl Iterator<Item = EnvFromSource<'_>> {
    container.env_from.iter().flatten().map(EnvFromSource::from)
}

pub(super) fn variables(
    pod: &Pod,
    container: Container<'_>,
    resolved: &Resolved,
    skipped: &mut Vec<String>,
    missing: &mut Vec<String>,
    size: &mut Size,
) -> Vec<pb::EnvVar> {
    let mut vars = Vec::new();
    for (name, value) in &resolved.services {
        if !size.add(name, value.as_bytes()) {
            return vars;
        }
        push(&mut vars, name, Value::Literal(value.clone().into()));
    }
    for from in env_from_sources(container) {
        let prefix = from.prefix.as_deref().unwrap_or_default();
        for (key, data) in env_from(from, resolved, missing) {
            let name = format!("{prefix}{key}");
            if !size.add(&name, data) {
                return vars;
            }
            if names::environment_variable(&name).is_ok() && !data.contains(&0) {
                push(&mut vars, &name, Value::Literal(data.to_vec().into()));
            } else {
                skipped.push(name);
            }
        }
    }
    for var in container.env.iter().flatten().map(EnvVar::from) {
        let value = match var.value_from {
            None => Some(Value::Template(var.value.clone().unwrap_or_default())),
            Some(source) => from_source(pod, container, source.into(), resolved, missing),
        };
        if let Some(Value::Literal(contents)) = &value
            && !size.add(var.name, contents)
        {
            return vars;
        }
        if let Some(value) = value {
            push(&mut vars, var.name, value);
        }
    }
    vars
}

/// What is wrong with the container's `subPathExpr`s, in the words of a kubelet. Placeholders stand for addresses that only
/// the compute node knows, because any address is a valid path, and for what comes from files, which the shim checks.
pub(super) fn bad_sub_paths(container: Container<'_>, vars: &[pb::EnvVar]) -> Vec<String> {
    let mounts = container.volume_mounts.iter().flatten();
    let templates = mounts.filter_map(|mount| VolumeMount::from(mount).sub_path_expr.as_deref());
    let mut templates = templates.filter(|template| !template.is_empty()).peekable();
    if templates.peek().is_none() {
        return Vec::new();
    }
    let unknown = RuntimeFields {
        host_ip: "hostIP".to_owned(),
        pod_ip: "podIP".to_owned(),
    };
    let mut vars = vars.to_vec();
    for var in &mut vars {
        if matches!(var.value, Some(Value::File(_))) {
            var.value = Some(Value::Literal("file".into()));
        }
    }
    let env = expand::pod_environment(&vars, &unknown);
    let known = Known::of(&env);
    templates
        .filter_map(|template| expand::sub_path(template, &known).err())
        .map(|error| knoc_proto::error::chain(&error))
        .collect()
}

fn push(vars: &mut Vec<pb::EnvVar>, name: &str, value: Value) {
    vars.push(pb::EnvVar {
        name: name.to_owned(),
        value: Some(value),
    });
}

fn env_from<'r>(
    from: EnvFromSource<'_>,
    resolved: &'r Resolved,
    missing: &mut Vec<String>,
) -> Vec<(&'r str, &'r [u8])> {
    let mut found = Vec::new();
    if let Some(reference) = from.config_map_ref.as_ref().map(ConfigMapEnv::from) {
        match resolved.config_maps.get(reference.name) {
            // binaryData does not become variables.
            Some(map) => found.extend(
                map.data
                    .iter()
                    .flatten()
                    .map(|(key, value)| (key.as_str(), value.as_bytes())),
            ),
            None if *reference.optional == Some(true) => {}
            None => missing.push(format!("configmap \"{}\" not found", reference.name)),
        }
    }
    if let Some(reference) = from.secret_ref.as_ref().map(SecretEnv::from) {
        match resolved.secrets.get(reference.name) {
            Some(secret) => found.extend(
                secret
                    .data
                    .iter()
                    .flatten()
                    .map(|(key, value)| (key.as_str(), value.0.as_slice())),
            ),
            None if *reference.optional == Some(true) => {}
            None => missing.push(format!("secret \"{}\" not found", reference.name)),
        }
    }
    found
}

fn from_source(
    pod: &Pod,
    container: Container<'_>,
    source: EnvVarSource<'_>,
    resolved: &Resolved,
    missing: &mut Vec<String>,
) -> Option<Value> {
    if let Some(key) = source.config_map_key_ref.as_ref().map(ConfigMapKey::from) {
        let map = resolved.config_maps.get(key.name);
        let data = map.and_then(|map| map.data.as_ref()?.get(key.key));
        return key_value(
            ("configmap", key.name, key.key),
            map.is_some(),
            data.map(String::as_bytes),
            *key.optional,
            missing,
        );
    }
    if let Some(key) = source.secret_key_ref.as_ref().map(SecretKey::from) {
        let secret = resolved.secrets.get(key.name);
        let data = secret.and_then(|secret| secret.data.as_ref()?.get(key.key));
        return key_value(
            ("secret", key.name, key.key),
            secret.is_some(),
            data.map(|data| data.0.as_slice()),
            *key.optional,
            missing,
        );
    }
    if let Some(file) = source.file_key_ref.as_ref().map(FileKey::from) {
        return Some(Value::File(pb::FileKey {
            volume: file.volume_name.clone(),
            path: file.path.clone(),
            key: file.key.clone(),
            optional: *file.optional == Some(true),
        }));
    }
    if let Some(field) = source.field_ref.as_ref().map(EnvFieldRef::from) {
        return Some(match field.field_path.as_str() {
            "status.hostIP" | "status.hostIPs" => Value::Runtime(pb::RuntimeField::HostIp.into()),
            "status.podIP" | "status.podIPs" => Value::Runtime(pb::RuntimeField::PodIp.into()),
            path => Value::Literal(files::available_field(pod, path, missing)?.into()),
        });
    }
    let resource = ResourceFieldSelector::from(source.resource_field_ref.as_ref()?);
    let text = files::resource(pod, Some(container.name), resource, &resolved.allocatable);
    Some(Value::Literal(text.into()))
}

fn key_value(
    (kind, name, key): (&str, &str, &str),
    object_found: bool,
    data: Option<&[u8]>,
    optional: Option<bool>,
    missing: &mut Vec<String>,
) -> Option<Value> {
    if data.is_none() && optional != Some(true) {
        missing.push(if object_found {
            format!("couldn't find key {key} in {kind} {name}")
        } else {
            format!("{kind} \"{name}\" not found")
        });
    }
    let data = data?;
    if data.contains(&0) {
        missing.push(format!(
            "the value of key {key} in {kind} {name} contains a NUL byte"
        ));
        return None;
    }
    Some(Value::Literal(data.to_vec().into()))
}

/// The environment variables of Services: those of the pod's namespace (if `links`), and always `KUBERNETES_*` of
/// default/kubernetes. See <https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables>.
pub fn service_variables<'a>(
    services: impl Iterator<Item = &'a Service>,
    namespace: &str,
    links: bool,
) -> Vec<(String, String)> {
    let mut by_name = BTreeMap::new();
    for service in services {
        let meta = &service.metadata;
        let (Some(name), Some(of)) = (&meta.name, &meta.namespace) else {
            continue;
        };
        let master = of == "default" && name == "kubernetes";
        let linked = links && of == namespace;
        // A Service `kubernetes` in the pod's own namespace overrides the one in `default`.
        if linked || (master && !by_name.contains_key(name)) {
            by_name.insert(name.clone(), service);
        }
    }
    by_name
        .iter()
        .flat_map(|(name, service)| of_service(name, service))
        .collect()
}

fn of_service(name: &str, service: &Service) -> Vec<(String, String)> {
    let Some(spec) = &service.spec else {
        return Vec::new();
    };
    let ip = match spec.cluster_ip.as_deref() {
        None | Some("" | "None") => return Vec::new(),
        Some(ip) => ip,
    };
    let Some(ports) = spec.ports.as_ref().filter(|ports| !ports.is_empty()) else {
        return Vec::new();
    };
    let name = name.to_uppercase().replace('-', "_");
    let host = if ip.contains(':') {
        format!("[{ip}]")
    } else {
        ip.to_owned()
    };
    let mut vars = vec![
        (format!("{name}_SERVICE_HOST"), ip.to_owned()),
        (format!("{name}_SERVICE_PORT"), ports[0].port.to_string()),
    ];
    for port in ports {
        if let Some(port_name) = port.name.as_deref().filter(|name| !name.is_empty()) {
            let port_name = port_name.to_uppercase().replace('-', "_");
            vars.push((
                format!("{name}_SERVICE_PORT_{port_name}"),
                port.port.to_string(),
            ));
        }
    }
    for (index, port) in ports.iter().enumerate() {
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        let url = format!("{}://{host}:{}", protocol.to_lowercase(), port.port);
        if index == 0 {
            vars.push((format!("{name}_PORT"), url.clone()));
        }
        let prefix = format!("{name}_PORT_{}_{protocol}", port.port);
        vars.push((prefix.clone(), url));
        vars.push((format!("{prefix}_PROTO"), protocol.to_lowercase()));
        vars.push((format!("{prefix}_PORT"), port.port.to_string()));
        vars.push((format!("{prefix}_ADDR"), ip.to_owned()));
    }
    vars
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_variable_from_a_file_is_read_by_the_shim() {
        let key =
            json!({"volumeName": "v", "path": "a/config.env", "key": "ADDRESS", "optional": true});
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "ns", "uid": "u-1"},
            "spec": {
                "containers": [
                    {
                        "name": "main", "image": "busybox",
                        "env": [{"name": "A", "valueFrom": {"fileKeyRef": key}}],
                        // Its value is checked once it is known.
                        "volumeMounts": [{"name": "v", "mountPath": "/v", "subPathExpr": "$(A)"}],
                    },
                    {"name": "other", "image": "busybox"},
                ],
                "volumes": [{"name": "v", "emptyDir": {}}],
            },
        }))
        .unwrap();
        let shape = crate::shape(&pod).unwrap();
        assert!(shape.containers[0].env_files && !shape.containers[1].env_files);
        let values = crate::values(&pod, &Resolved::default()).unwrap().values;
        let file = pb::FileKey {
            volume: "v".to_owned(),
            path: "a/config.env".to_owned(),
            key: "ADDRESS".to_owned(),
            optional: true,
        };
        let value = values.env[0].vars[0].value.clone();
        assert_eq!(value, Some(pb::env_var::Value::File(file)));
    }
}
