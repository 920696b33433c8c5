use std::collections::BTreeSet;

use k8s_openapi::api::core::v1 as core;
use serde::de::{self, DeserializeOwned, Deserializer, Visitor};
use serde_json::json;

use super::*;

/// Records the fields that a generated `Deserialize` asks for.
struct Fields<'a>(&'a mut Vec<&'static str>);

impl<'de> Deserializer<'de> for Fields<'_> {
    type Error = de::value::Error;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
        Err(de::Error::custom("only structs"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Self::Error> {
        self.0.extend(fields);
        Err(de::Error::custom("seen"))
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

fn check<T: DeserializeOwned>(kind: &str, problems: &mut Vec<String>) {
    let mut fields = Vec::new();
    T::deserialize(Fields(&mut fields)).map(drop).unwrap_err();
    assert!(!fields.is_empty(), "{kind}: no fields seen");
    let known: BTreeSet<_> = rows(kind)
        .iter()
        .flat_map(|row| row.fields.split(' '))
        .collect();
    for field in &fields {
        if !known.contains(field) {
            problems.push(format!("{kind}.{field} has no verdict"));
        }
    }
    for field in known.iter().filter(|field| !fields.contains(field)) {
        problems.push(format!("{kind}.{field} is not a field of Kubernetes"));
    }
}

#[test]
fn every_field_of_a_pod_has_a_verdict() {
    let mut problems = Vec::new();
    let p = &mut problems;
    check::<core::PodSpec>("PodSpec", p);
    check::<core::Container>("Container", p);
    check::<core::EnvVar>("EnvVar", p);
    check::<core::EnvVarSource>("EnvVarSource", p);
    check::<core::FileKeySelector>("FileKeySelector", p);
    check::<core::ConfigMapKeySelector>("KeySelector", p);
    check::<core::SecretKeySelector>("KeySelector", p);
    check::<core::ObjectFieldSelector>("EnvFieldRef", p);
    check::<core::ObjectFieldSelector>("FileFieldRef", p);
    check::<core::ResourceFieldSelector>("ResourceFieldSelector", p);
    check::<core::EnvFromSource>("EnvFromSource", p);
    check::<core::ConfigMapEnvSource>("Reference", p);
    check::<core::SecretEnvSource>("Reference", p);
    check::<core::ResourceRequirements>("ResourceRequirements", p);
    check::<core::ContainerPort>("ContainerPort", p);
    check::<core::Probe>("Probe", p);
    check::<core::Lifecycle>("Lifecycle", p);
    check::<core::LifecycleHandler>("LifecycleHandler", p);
    check::<core::ExecAction>("ExecAction", p);
    check::<core::HTTPGetAction>("HTTPGetAction", p);
    check::<core::HTTPHeader>("HTTPHeader", p);
    check::<core::TCPSocketAction>("TCPSocketAction", p);
    check::<core::GRPCAction>("GRPCAction", p);
    check::<core::SleepAction>("SleepAction", p);
    check::<core::VolumeMount>("VolumeMount", p);
    check::<core::PodSecurityContext>("PodSecurityContext", p);
    check::<core::SecurityContext>("SecurityContext", p);
    check::<core::Sysctl>("Sysctl", p);
    check::<core::Capabilities>("Capabilities", p);
    check::<core::SeccompProfile>("Profile", p);
    check::<core::AppArmorProfile>("Profile", p);
    check::<core::HostAlias>("HostAlias", p);
    check::<core::PodDNSConfig>("PodDNSConfig", p);
    check::<core::PodDNSConfigOption>("PodDNSConfigOption", p);
    check::<core::PodReadinessGate>("ReadinessGate", p);
    check::<core::PodOS>("PodOS", p);
    check::<core::Volume>("Volume", p);
    check::<core::EmptyDirVolumeSource>("EmptyDirVolumeSource", p);
    check::<core::PersistentVolumeClaimVolumeSource>("PersistentVolumeClaimVolumeSource", p);
    check::<core::NFSVolumeSource>("NFSVolumeSource", p);
    check::<core::ImageVolumeSource>("ImageVolumeSource", p);
    check::<core::HostPathVolumeSource>("HostPathVolumeSource", p);
    check::<core::ConfigMapVolumeSource>("ConfigMapVolumeSource", p);
    check::<core::SecretVolumeSource>("SecretVolumeSource", p);
    check::<core::SecretProjection>("SecretProjection", p);
    check::<core::KeyToPath>("KeyToPath", p);
    check::<core::DownwardAPIVolumeSource>("DownwardAPIVolumeSource", p);
    check::<core::DownwardAPIVolumeFile>("DownwardAPIVolumeFile", p);
    check::<core::ProjectedVolumeSource>("ProjectedVolumeSource", p);
    check::<core::VolumeProjection>("VolumeProjection", p);
    check::<core::ServiceAccountTokenProjection>("ServiceAccountTokenProjection", p);
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn every_type_that_a_row_points_to_exists() {
    for kind in TABLE {
        for row in kind.rows {
            if let Verdict::Inside(inner) = row.verdict {
                assert!(
                    !rows(inner).is_empty(),
                    "{}: {inner} has no rows",
                    kind.name
                );
            }
        }
    }
}

#[test]
fn the_guide_is_the_table() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../docs/guide/pod-support.md"
    );
    if std::env::var_os("KNOC_UPDATE_DOCS").is_some() {
        #[expect(
            clippy::disallowed_methods,
            reason = "a test that updates a document of the repository"
        )]
        std::fs::write(path, table()).unwrap();
    }
    let guide = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        guide == table(),
        "update it: KNOC_UPDATE_DOCS=1 cargo test -p knoc-translate the_guide"
    );
}

/// The pod that the API server stores for `kubectl run`.
fn ordinary() -> Value {
    json!({
        "metadata": {"name": "p", "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}"}},
        "spec": {
            "containers": [{
                "name": "main", "image": "busybox", "imagePullPolicy": "Always", "resources": {},
                "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
                "resizePolicy": [{"resourceName": "cpu", "restartPolicy": "NotRequired"}],
                "volumeMounts": [{"mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "name": "token", "readOnly": true}],
            }],
            "dnsPolicy": "ClusterFirst", "enableServiceLinks": true, "nodeName": "knoc-x",
            "preemptionPolicy": "PreemptLowerPriority", "priority": 0, "restartPolicy": "Always",
            "schedulerName": "default-scheduler", "securityContext": {}, "serviceAccount": "default",
            "serviceAccountName": "default", "terminationGracePeriodSeconds": 30,
            "tolerations": [{"effect": "NoExecute", "key": "node.kubernetes.io/not-ready", "operator": "Exists", "tolerationSeconds": 300}],
            "volumes": [{"name": "token", "projected": {"defaultMode": 420, "sources": [
                {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
                {"configMap": {"items": [{"key": "ca.crt", "path": "ca.crt"}], "name": "kube-root-ca.crt"}},
                {"downwardAPI": {"items": [{"fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}, "path": "namespace"}]}},
            ]}}],
        },
    })
}

#[test]
fn an_ordinary_pod_is_admitted_without_findings() {
    assert_eq!(judge(&ordinary()), Findings::default());
}

#[test]
fn all_rejected_fields_are_reported_at_once() {
    let mut pod = ordinary();
    pod["spec"]["hostPID"] = json!(true);
    pod["spec"]["fromTheFuture"] = json!({"a": 1});
    pod["spec"]["containers"][0]["livenessProbe"] =
        json!({"httpGet": {"port": 80, "host": "10.0.0.1"}});
    pod["spec"]["containers"][0]["lifecycle"] = json!({"preStop": {"tcpSocket": {"port": 80}}});
    pod["spec"]["containers"][0]["securityContext"] = json!({"privileged": true, "runAsUser": 0, "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN"]}});
    pod["spec"]["volumes"]
        .as_array_mut()
        .unwrap()
        .push(json!({"name": "h", "hostPath": {"path": "/", "type": "Pipe"}}));
    pod["metadata"]["annotations"]["knoc.io/colour"] = json!("blue");
    let findings = judge(&pod);
    insta::assert_snapshot!(findings.rejected.join("\n"));
    let [privileged] = findings.mapped.as_slice() else {
        panic!("{:?}", findings.mapped);
    };
    assert!(
        privileged.contains("securityContext.privileged: the container runs without privileges")
    );
}

#[test]
fn the_capability_to_bind_low_ports_is_not_granted_and_does_not_reject_a_pod() {
    let with = |add: Value| {
        let mut pod = ordinary();
        pod["spec"]["containers"][0]["securityContext"] =
            json!({"capabilities": {"drop": ["ALL"], "add": add}});
        judge(&pod)
    };
    let findings = with(json!(["NET_BIND_SERVICE"]));
    assert_eq!(findings.rejected, Vec::<String>::new());
    let [mapped] = findings.mapped.as_slice() else {
        panic!("{:?}", findings.mapped);
    };
    assert!(mapped.contains("capabilities.add: not granted"), "{mapped}");
    // What the charts of Grafana (`initChownData`) and JupyterHub (`blockWithIptables`) ask for by default.
    for add in ["CHOWN", "NET_ADMIN"] {
        let rejected = with(json!(["NET_BIND_SERVICE", add])).rejected;
        assert_eq!(rejected.len(), 1, "{rejected:?}");
    }
}

#[test]
fn the_kernel_parameter_for_low_ports_is_not_set_and_does_not_reject_a_pod() {
    let with = |sysctls: Value| {
        let mut pod = ordinary();
        pod["spec"]["securityContext"]["sysctls"] = sysctls;
        judge(&pod)
    };
    // As the chart of Istio's gateway asks for it.
    let ports = json!({"name": "net.ipv4.ip_unprivileged_port_start", "value": "0"});
    let findings = with(json!([ports]));
    assert_eq!(findings.rejected, Vec::<String>::new());
    let [mapped] = findings.mapped.as_slice() else {
        panic!("{:?}", findings.mapped);
    };
    assert!(mapped.contains("sysctls[net.ipv4.ip_unprivileged_port_start].name: not set"));
    let other = json!({"name": "net.ipv4.tcp_syncookies", "value": "1"});
    let rejected = with(json!([ports, other])).rejected;
    assert_eq!(rejected.len(), 1, "{rejected:?}");
    assert_eq!(with(json!([])), Findings::default());
}

#[test]
fn fields_that_request_nothing_special_are_admitted() {
    let mut pod = ordinary();
    pod["spec"]["hostNetwork"] = json!(false);
    pod["spec"]["imagePullSecrets"] = json!([]);
    pod["spec"]["containers"][0]["securityContext"] = json!({
        "privileged": false, "allowPrivilegeEscalation": false, "runAsNonRoot": true,
        "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"},
    });
    pod["spec"]["containers"][0]["lifecycle"] = json!({});
    pod["spec"]["securityContext"]["seLinuxOptions"] = json!({"level": "s0:c1"});
    pod["spec"]["containers"][0]["securityContext"]["seLinuxOptions"] = json!({"type": "t"});
    pod["spec"]["subdomain"] = json!("web");
    pod["spec"]["setHostnameAsFQDN"] = json!(true);
    pod["spec"]["dnsPolicy"] = json!("None");
    pod["spec"]["dnsConfig"] =
        json!({"nameservers": ["1.1.1.1"], "options": [{"name": "ndots", "value": "2"}]});
    pod["spec"]["containers"][0]["volumeMounts"][0]["subPathExpr"] = json!("$(A)");
    pod["metadata"]["annotations"]["knoc.io/partition"] = json!("gpu");
    let resources = &mut pod["spec"]["containers"][0]["resources"];
    resources["limits"] = json!({"hugepages-2Mi": "0", "nvidia.com/gpu": "0"});
    assert_eq!(judge(&pod), Findings::default());
    pod["spec"]["containers"][0]["resources"]["limits"] = json!({"hugepages-2Mi": "4Mi"});
    assert_eq!(judge(&pod).rejected.len(), 1);
}
