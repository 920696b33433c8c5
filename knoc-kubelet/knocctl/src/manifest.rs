//! PURE: translates a Kubernetes pod manifest to the agent's messages by the same rules as the kubelet.
//!
//! Objects of the API server (`ConfigMap`s, Secrets, service account tokens) cannot be resolved here, so a manifest that
//! needs them is rejected, and the error names them. The same applies to every field that the kubelet rejects.

use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::Pod;
use knoc_proto::pb;
use serde_json::Value;

use knoc_translate::{self as translate, verdict};

/// How many bytes of `generateName` are used, as in the API server.
const GENERATED_PREFIX: usize = 58;

/// Why a manifest cannot be run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ManifestError {
    /// The text is not YAML or JSON, or not exactly one document.
    #[error("{} is not a manifest: {message}", path.display())]
    Syntax {
        path: PathBuf,
        /// The parser's message, with line and column.
        message: String,
    },
    #[error("{} holds {found}, not a v1 Pod", path.display())]
    Kind {
        path: PathBuf,
        /// The object's apiVersion and kind.
        found: String,
    },
    /// Fields that are not supported or invalid; all are reported at once.
    #[error("{} cannot run here: {}", path.display(), problems.join("; "))]
    Refused {
        path: PathBuf,
        /// `path: reason` of each.
        problems: Vec<String>,
    },
    /// The pod refers to objects that only the API server has.
    #[error("{} needs {}, which only Kubernetes can give", path.display(), needs.join(", "))]
    Needs {
        path: PathBuf,
        /// The `ConfigMap`s, Secrets and tokens by name.
        needs: Vec<String>,
    },
}

impl ManifestError {
    /// What to do next.
    #[must_use]
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::Needs { .. } => Some(
                "give the values in the manifest itself (env value), or run the pod through Kubernetes"
                    .to_owned(),
            ),
            Self::Kind { .. } => {
                Some("knocctl runs single pods; Deployments and Jobs need Kubernetes".to_owned())
            }
            Self::Syntax { .. } | Self::Refused { .. } => None,
        }
    }
}

/// Values that complete or override the manifest.
#[derive(Debug, Clone, Default)]
pub(crate) struct Given<'a> {
    /// `--namespace`
    pub namespace: Option<&'a str>,
    /// `--name`
    pub name: Option<&'a str>,
    /// `--uid`
    pub uid: Option<&'a str>,
    /// Random lower-case letters and digits, for a generated name and for the uid.
    pub random: &'a str,
}

/// A manifest that can be run.
#[derive(Debug, Clone)]
pub(crate) struct Manifest {
    /// The part of the pod that does not change.
    pub spec: pb::PodSpec,
    /// The part of the pod that can be updated: variables and file contents.
    pub values: pb::PodValues,
    /// Notes about fields that have another meaning here than on other nodes.
    pub mapped: Vec<String>,
}

/// Reads the manifest in `text`, which came from `path`.
pub(crate) fn parse(text: &str, path: &Path, given: &Given<'_>) -> Result<Manifest, ManifestError> {
    let syntax = |message: String| ManifestError::Syntax {
        path: path.to_owned(),
        message,
    };
    let mut value: Value =
        serde_saphyr::from_str(text).map_err(|error| syntax(error.to_string()))?;
    check_kind(&value, path)?;
    complete(&mut value, given);
    let refused = |problems| ManifestError::Refused {
        path: path.to_owned(),
        problems,
    };
    let findings = verdict::judge(&value);
    if !findings.rejected.is_empty() {
        return Err(refused(findings.rejected));
    }
    let mut pod: Pod = serde_json::from_value(value).map_err(|error| syntax(error.to_string()))?;
    pod.metadata.generation.get_or_insert(1);
    check_needs(&pod, path)?;
    let spec = translate::shape(&pod).map_err(refused)?;
    let values = translate::values(&pod, &translate::Resolved::default())
        .map_err(|missing| refused(vec![missing.to_string()]))?;
    if !values.skipped.is_empty() {
        let names = values
            .skipped
            .iter()
            .map(|name| format!("{name:?} is not the name of a variable"));
        return Err(refused(names.collect()));
    }
    let mut values = values.values;
    values.revision = 1;
    let checked =
        knoc_proto::pod::PodSpec::try_from(spec).map_err(|error| refused(error.problems))?;
    Ok(Manifest {
        spec: checked.into_inner(),
        values,
        mapped: findings.mapped,
    })
}

fn check_kind(value: &Value, path: &Path) -> Result<(), ManifestError> {
    let text = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or("nothing");
    if (text("apiVersion"), text("kind")) == ("v1", "Pod") {
        return Ok(());
    }
    let found = format!("{} {}", text("apiVersion"), text("kind"));
    Err(ManifestError::Kind {
        path: path.to_owned(),
        found,
    })
}

/// Fills in what the API server would: the namespace, a generated name and the uid.
fn complete(value: &mut Value, given: &Given<'_>) {
    let Some(root) = value.as_object_mut() else {
        return;
    };
    let metadata = root
        .entry("metadata")
        .or_insert_with(|| Value::Object(serde_json::Map::new()));
    let Some(metadata) = metadata.as_object_mut() else {
        return;
    };
    let mut set = |name: &str, text: Option<String>| {
        if let Some(text) = text {
            metadata.insert(name.to_owned(), Value::String(text));
        }
    };
    set("namespace", given.namespace.map(str::to_owned));
    set("name", given.name.map(str::to_owned));
    let short: String = given.random.chars().take(5).collect();
    if metadata.get("name").is_none()
        && let Some(prefix) = metadata.get("generateName").and_then(Value::as_str)
    {
        // The API server cuts the prefix in the same way, so that the name is a valid host name.
        let prefix = &prefix[..prefix.floor_char_boundary(GENERATED_PREFIX)];
        let name = format!("{prefix}{short}");
        metadata.insert("name".to_owned(), Value::String(name));
    }
    metadata
        .entry("namespace")
        .or_insert_with(|| Value::String("default".to_owned()));
    let uid = given
        .uid
        .map_or_else(|| format!("ctl-{}", given.random), str::to_owned);
    metadata.insert("uid".to_owned(), Value::String(uid));
    let volumes = root
        .get_mut("spec")
        .and_then(|spec| spec.get_mut("volumes")?.as_array_mut());
    for volume in volumes.into_iter().flatten() {
        name_empty_dir(volume);
    }
}

/// A volume without a source becomes an `emptyDir`, as in the API server.
fn name_empty_dir(volume: &mut Value) {
    if let Some(volume) = volume.as_object_mut()
        && volume
            .iter()
            .all(|(key, value)| key == "name" || value.is_null())
    {
        volume.insert("emptyDir".to_owned(), Value::Object(serde_json::Map::new()));
    }
}

fn check_needs(pod: &Pod, path: &Path) -> Result<(), ManifestError> {
    let needs = translate::needs(pod);
    let mut list = Vec::new();
    list.extend(
        needs
            .config_maps
            .iter()
            .map(|name| format!("ConfigMap {name}")),
    );
    list.extend(needs.secrets.iter().map(|name| format!("Secret {name}")));
    list.extend(needs.trust_bundles.iter().map(ToString::to_string));
    let pull_secrets = translate::pull_secrets(pod).into_iter();
    list.extend(pull_secrets.map(|name| format!("image pull Secret {name}")));
    let claims = needs.claims.iter();
    list.extend(claims.map(|name| format!("PersistentVolumeClaim {name}")));
    if !needs.tokens.is_empty() {
        list.push("a service account token".to_owned());
    }
    if list.is_empty() {
        return Ok(());
    }
    Err(ManifestError::Needs {
        path: path.to_owned(),
        needs: list,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "
apiVersion: v1
kind: Pod
metadata:
  name: demo
  annotations: {knoc.io/partition: main}
spec:
  restartPolicy: Never
  containers:
  - name: main
    image: busybox:1.36
    command: [sh, -c, 'echo $(WHO)']
    env:
    - {name: WHO, value: world}
    volumeMounts:
    - {name: work, mountPath: /work}
  volumes:
  - name: work
    emptyDir: {}
";

    fn read(text: &str) -> Result<Manifest, ManifestError> {
        let given = Given {
            random: "k3jx9zzz",
            ..Given::default()
        };
        parse(text, Path::new("pod.yaml"), &given)
    }

    #[test]
    fn a_pod_becomes_the_agents_messages() {
        let manifest = read(POD).unwrap();
        let spec = manifest.spec;
        assert_eq!(
            (spec.namespace.as_str(), spec.name.as_str()),
            ("default", "demo")
        );
        assert_eq!(spec.uid, "ctl-k3jx9zzz");
        assert_eq!(spec.restart_policy(), pb::RestartPolicy::Never);
        assert_eq!(spec.job.unwrap().partition, "main");
        assert_eq!(manifest.values.revision, 1);
        assert_eq!(manifest.values.env[0].vars[0].name, "WHO");
    }

    #[test]
    fn names_are_given_or_generated() {
        let text = POD.replace("name: demo", "generateName: job-");
        assert_eq!(read(&text).unwrap().spec.name, "job-k3jx9");
        let given = Given {
            name: Some("other"),
            namespace: Some("team"),
            uid: Some("u-1"),
            random: "x",
        };
        let spec = parse(POD, Path::new("p"), &given).unwrap().spec;
        assert_eq!(
            (spec.namespace, spec.name, spec.uid),
            ("team".into(), "other".into(), "u-1".into())
        );
    }

    #[test]
    fn what_only_kubernetes_knows_is_refused_by_name() {
        let text = POD.replace("emptyDir: {}", "configMap: {name: settings}");
        let error = read(&text).unwrap_err();
        assert_eq!(
            error.to_string(),
            "pod.yaml needs ConfigMap settings, which only Kubernetes can give"
        );
        assert!(error.hint().is_some());
        let text = POD.replace(
            "value: world}",
            "valueFrom: {secretKeyRef: {name: db, key: password}}}",
        );
        assert!(read(&text).unwrap_err().to_string().contains("Secret db"));
        let text = POD.replace(
            "  restartPolicy: Never",
            "  restartPolicy: Never\n  imagePullSecrets: [{name: hub}]",
        );
        let error = read(&text).unwrap_err().to_string();
        assert!(error.contains("image pull Secret hub"), "{error}");
    }

    #[test]
    fn what_the_kubelet_refuses_is_refused_here() {
        let text = POD.replace("  restartPolicy", "  hostPID: true\n  restartPolicy");
        let error = read(&text).unwrap_err();
        assert!(matches!(error, ManifestError::Refused { .. }), "{error}");
        assert!(error.to_string().contains("spec.hostPID"), "{error}");
    }

    #[test]
    fn a_volume_without_a_source_is_an_empty_folder() {
        for text in ["    emptyDir: {}\n", "", "    hostPath: null\n"] {
            let manifest = read(&POD.replace("    emptyDir: {}\n", text)).unwrap();
            let source = manifest.spec.volumes[0].source.as_ref();
            assert!(
                matches!(source, Some(pb::volume::Source::EmptyDir(_))),
                "{text}"
            );
        }
    }

    #[test]
    fn other_kinds_and_invalid_yaml_are_errors() {
        let error = read(&POD.replace("kind: Pod", "kind: Job")).unwrap_err();
        assert_eq!(error.to_string(), "pod.yaml holds v1 Job, not a v1 Pod");
        let error = read("a: [1").unwrap_err();
        assert!(matches!(error, ManifestError::Syntax { .. }), "{error}");
        let error = read(&POD.replace("command: [sh", "command: [7")).unwrap_err();
        assert!(matches!(error, ManifestError::Syntax { .. }), "{error}");
    }
}
