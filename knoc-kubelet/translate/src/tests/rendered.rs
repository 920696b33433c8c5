//! Pods as controllers and webhooks of well-known projects render them, reduced to what is particular to each: what is rejected by name,
//! what is mapped, and that the rest has a shape. docs/guide/charts.md says what users have to set.

use super::*;

/// The rejected and the mapped fields, sorted, without their values and reasons. If nothing is rejected, the pod must have a shape.
fn judged(spec: &Value) -> (Vec<String>, Vec<String>) {
    let json = json!({"metadata": {"name": "p", "namespace": "ns", "uid": "u-1"}, "spec": spec});
    let findings = verdict::judge(&json);
    if findings.rejected.is_empty() {
        let pod = serde_json::from_value(json).unwrap();
        shape(&pod).unwrap();
    }
    let fields = |texts: &[String]| -> Vec<String> {
        let field = |text: &String| text.split([' ', ':']).next().unwrap_or_default().to_owned();
        let mut fields: Vec<String> = texts.iter().map(field).collect();
        fields.sort();
        fields
    };
    (fields(&findings.rejected), fields(&findings.mapped))
}

/// Nothing is rejected and nothing has another meaning.
#[track_caller]
fn runs(what: &str, spec: &Value) {
    assert_eq!(judged(spec), (vec![], vec![]), "{what}");
}

#[test]
fn a_sidecar_of_istio_is_rejected_for_its_init_container_alone() {
    let proxy = json!({
        "name": "istio-proxy", "image": "istio/proxyv2:1.27", "restartPolicy": "Always",
        "args": ["proxy", "sidecar", "--domain", "$(POD_NAMESPACE).svc.cluster.local"],
        "env": [
            {"name": "POD_NAME", "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.name"}}},
            {"name": "POD_NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
            {"name": "INSTANCE_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "HOST_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}},
            {"name": "SERVICE_ACCOUNT", "valueFrom": {"fieldRef": {"fieldPath": "spec.serviceAccountName"}}},
            {"name": "ISTIO_CPU_LIMIT", "valueFrom": {"resourceFieldRef": {"divisor": "0", "resource": "limits.cpu"}}},
            {"name": "GOMEMLIMIT", "valueFrom": {"resourceFieldRef": {"divisor": "0", "resource": "limits.memory"}}},
        ],
        "ports": [{"name": "http-envoy-prom", "containerPort": 15090, "protocol": "TCP"}],
        "readinessProbe": {"httpGet": {"path": "/healthz/ready", "port": 15021}, "failureThreshold": 4},
        "startupProbe": {"httpGet": {"path": "/healthz/ready", "port": 15021}, "failureThreshold": 600, "periodSeconds": 1},
        "resources": {"limits": {"cpu": "2", "memory": "1Gi"}, "requests": {"cpu": "100m", "memory": "128Mi"}},
        "securityContext": {
            "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}, "privileged": false,
            "readOnlyRootFilesystem": true, "runAsGroup": 1337, "runAsNonRoot": true, "runAsUser": 1337,
        },
        "volumeMounts": [
            {"name": "istio-envoy", "mountPath": "/etc/istio/proxy"},
            {"name": "istio-token", "mountPath": "/var/run/secrets/tokens"},
            {"name": "istio-podinfo", "mountPath": "/etc/istio/pod"},
            {"name": "istiod-ca-cert", "mountPath": "/var/run/secrets/istio"},
        ],
    });
    let mut spec = json!({
        "initContainers": [
            {
                "name": "istio-init", "image": "istio/proxyv2:1.27", "args": ["istio-iptables", "-p", "15001"],
                "securityContext": {
                    "allowPrivilegeEscalation": false, "privileged": false, "readOnlyRootFilesystem": false,
                    "capabilities": {"add": ["NET_ADMIN", "NET_RAW"], "drop": ["ALL"]},
                    "runAsGroup": 0, "runAsNonRoot": false, "runAsUser": 0,
                },
            },
            proxy,
        ],
        "containers": [{"name": "main", "image": "busybox"}],
        "volumes": [
            {"name": "istio-envoy", "emptyDir": {"medium": "Memory"}},
            {"name": "istio-token", "projected": {"sources": [{"serviceAccountToken": {"audience": "istio-ca", "expirationSeconds": 43200, "path": "istio-token"}}]}},
            {"name": "istio-podinfo", "downwardAPI": {"items": [
                {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
                {"path": "annotations", "fieldRef": {"fieldPath": "metadata.annotations"}},
            ]}},
            {"name": "istiod-ca-cert", "configMap": {"name": "istio-ca-root-cert"}},
        ],
    });
    let (rejected, mapped) = judged(&spec);
    let capabilities =
        "spec.initContainers[istio-init].securityContext.capabilities.add".to_owned();
    assert_eq!((rejected, mapped), (vec![capabilities], vec![]));
    // With Istio's CNI plugin, the first container only looks whether the plugin was there.
    spec["initContainers"][0]["securityContext"]["capabilities"] = json!({"drop": ["ALL"]});
    runs("a sidecar with the CNI plugin", &spec);
}

#[test]
fn a_variable_of_a_resource_may_have_the_divisor_of_the_api_server() {
    let mut pod = pod();
    let spec = pod.spec.as_mut().unwrap();
    let of = |resource: &str, divisor: &str| json!({"name": resource, "valueFrom": {"resourceFieldRef": {"resource": resource, "divisor": divisor}}});
    // The API server fills in 0, which means 1.
    let env = json!([of("limits.memory", "0"), of("requests.cpu", "0")]);
    spec.containers[0].env = serde_json::from_value(env).unwrap();
    let values = values(&pod, &resolved()).unwrap().values;
    let main = values.env.iter().find(|env| env.container == "main");
    let literal = |name: &str| {
        let var = main.unwrap().vars.iter().find(|var| var.name == name);
        let Some(pb::env_var::Value::Literal(text)) = &var.unwrap().value else {
            panic!("{name}: {var:?}");
        };
        String::from_utf8_lossy(text).into_owned()
    };
    assert_eq!(literal("limits.memory"), (2_u64 << 30).to_string());
    assert_eq!(literal("requests.cpu"), "1");
}

#[test]
fn steps_of_tekton_run() {
    let mounts = json!([
        {"name": "tekton-internal-bin", "mountPath": "/tekton/bin"},
        {"name": "tekton-internal-downward", "mountPath": "/tekton/downward", "readOnly": true},
        {"name": "tekton-creds-init-home-0", "mountPath": "/tekton/creds"},
        {"name": "tekton-internal-workspace", "mountPath": "/workspace"},
    ]);
    let context = json!({"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}, "runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}});
    let spec = json!({
        "restartPolicy": "Never", "activeDeadlineSeconds": 5400,
        "initContainers": [{
            "name": "prepare", "image": "ghcr.io/tektoncd/entrypoint:v1@sha256:0000000000000000000000000000000000000000000000000000000000000000",
            "command": ["/ko-app/entrypoint", "init", "/ko-app/entrypoint", "/tekton/bin/entrypoint", "step-build"],
            "workingDir": "/", "securityContext": context, "volumeMounts": mounts,
        }],
        "containers": [{
            "name": "step-build", "image": "busybox", "command": ["/tekton/bin/entrypoint"],
            "args": ["-wait_file", "/tekton/downward/ready", "-wait_file_content", "-termination_path", "/tekton/termination", "--"],
            "terminationMessagePath": "/tekton/termination", "volumeMounts": mounts, "resources": {},
        }],
        "volumes": [
            {"name": "tekton-internal-bin", "emptyDir": {}},
            {"name": "tekton-internal-workspace", "emptyDir": {}},
            {"name": "tekton-creds-init-home-0", "emptyDir": {"medium": "Memory"}},
            {"name": "tekton-internal-downward", "downwardAPI": {"defaultMode": 420, "items": [
                {"path": "ready", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.annotations['tekton.dev/ready']"}},
            ]}},
        ],
    });
    runs("a TaskRun", &spec);
}

#[test]
fn an_agent_of_jenkins_and_a_driver_of_spark_run() {
    let agent = json!({
        "restartPolicy": "Never", "nodeSelector": {"kubernetes.io/os": "linux"},
        "containers": [
            {
                "name": "jnlp", "image": "jenkins/inbound-agent:3301", "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}},
                "env": [{"name": "JENKINS_URL", "value": "http://jenkins.ci:8080/"}, {"name": "REMOTING_OPTS", "value": "-noReconnectAfter 1d"}],
                "volumeMounts": [{"name": "workspace-volume", "mountPath": "/home/jenkins/agent", "readOnly": false}],
            },
            {
                "name": "maven", "image": "maven:3", "command": ["cat"], "tty": true, "workingDir": "/home/jenkins/agent",
                "volumeMounts": [{"name": "workspace-volume", "mountPath": "/home/jenkins/agent", "readOnly": false}],
            },
        ],
        "volumes": [{"name": "workspace-volume", "emptyDir": {"medium": ""}}],
    });
    runs("an agent of Jenkins", &agent);
    let driver = json!({
        "restartPolicy": "Never", "serviceAccountName": "spark", "hostname": "pi-driver", "subdomain": "pi-driver-svc",
        "containers": [{
            "name": "spark-kubernetes-driver", "image": "spark:4.0.0", "args": ["driver", "--properties-file", "/opt/spark/conf/spark.properties"],
            "env": [
                {"name": "SPARK_DRIVER_BIND_ADDRESS", "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "status.podIP"}}},
                {"name": "SPARK_LOCAL_DIRS", "value": "/var/data/spark-1"},
            ],
            "ports": [{"name": "driver-rpc-port", "containerPort": 7078}, {"name": "blockmanager", "containerPort": 7079}, {"name": "spark-ui", "containerPort": 4040}],
            "resources": {"limits": {"memory": "1408Mi"}, "requests": {"cpu": "1", "memory": "1408Mi"}},
            "volumeMounts": [{"name": "spark-local-dir-1", "mountPath": "/var/data/spark-1"}, {"name": "spark-conf-volume-driver", "mountPath": "/opt/spark/conf"}],
        }],
        "volumes": [
            {"name": "spark-local-dir-1", "emptyDir": {}},
            {"name": "spark-conf-volume-driver", "configMap": {"name": "spark-drv", "defaultMode": 420, "items": [{"key": "spark.properties", "path": "spark.properties", "mode": 420}]}},
        ],
    });
    runs("a driver of Spark", &driver);
}

#[test]
fn what_webhooks_add_runs_or_is_rejected_by_name() {
    let main = json!({"name": "main", "image": "busybox"});
    // The agent of Vault: one container before the program and one beside it, both as users of their own.
    let vault = json!({
        "name": "vault-agent-init", "image": "hashicorp/vault:1.20", "command": ["/bin/sh", "-ec"], "args": ["vault agent -config=/home/vault/config.json"],
        "env": [{"name": "HOST_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}}],
        "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": true, "runAsGroup": 1000, "runAsNonRoot": true, "runAsUser": 100},
        "volumeMounts": [{"name": "vault-secrets", "mountPath": "/vault/secrets"}, {"name": "home-init", "mountPath": "/home/vault"}],
    });
    let volumes = json!([{"name": "vault-secrets", "emptyDir": {"medium": "Memory"}}, {"name": "home-init", "emptyDir": {"medium": "Memory"}}]);
    runs(
        "the agent of Vault",
        &json!({"initContainers": [vault], "containers": [main], "volumes": volumes}),
    );
    // Roles for a cloud: a token for another audience.
    let token = json!([{"name": "aws-iam-token", "projected": {"sources": [{"serviceAccountToken": {"audience": "sts.amazonaws.com", "expirationSeconds": 86400, "path": "token"}}]}}]);
    runs("a role", &json!({"containers": [main], "volumes": token}));
    // What only an administrator of the node can give.
    for (field, mut spec) in [
        (
            "spec.volumes[secrets].csi",
            json!({"volumes": [{"name": "secrets", "csi": {"driver": "secrets-store.csi.k8s.io", "readOnly": true}}]}),
        ),
        (
            "spec.runtimeClassName",
            json!({"runtimeClassName": "gvisor"}),
        ),
    ] {
        spec["containers"] = json!([main]);
        assert_eq!(judged(&spec), (vec![field.to_owned()], vec![]));
    }
}

#[test]
fn a_pod_with_a_user_namespace_of_its_own_runs_and_is_told_what_it_has() {
    let spec = json!({"hostUsers": false, "containers": [{"name": "main", "image": "busybox"}]});
    assert_eq!(judged(&spec), (vec![], vec!["spec.hostUsers".to_owned()]));
}

#[test]
fn a_user_of_jupyterhub_is_rejected_for_what_the_chart_can_leave_out() {
    let mut spec = json!({
        "securityContext": {"fsGroup": 100},
        "initContainers": [{
            "name": "block-cloud-metadata", "image": "jupyterhub/k8s-network-tools:4", "command": ["iptables", "--append", "OUTPUT"],
            "securityContext": {"capabilities": {"add": ["NET_ADMIN"]}, "privileged": true, "runAsUser": 0},
        }],
        "containers": [{"name": "notebook", "image": "jupyterhub/k8s-singleuser-sample:4", "args": ["jupyterhub-singleuser"], "securityContext": {"allowPrivilegeEscalation": false, "runAsUser": 1000}}],
    });
    let (rejected, mapped) = judged(&spec);
    let of = |field: &str| {
        vec![format!(
            "spec.initContainers[block-cloud-metadata].securityContext.{field}"
        )]
    };
    assert_eq!(rejected, of("capabilities.add"));
    let fs_group = "spec.securityContext.fsGroup".to_owned();
    assert_eq!(mapped, [of("privileged"), vec![fs_group.clone()]].concat());
    spec["initContainers"] = json!([]);
    assert_eq!(judged(&spec), (vec![], vec![fs_group]));
}

#[test]
fn a_worker_of_a_job_set_runs() {
    let label =
        |name: &str| json!({"fieldRef": {"fieldPath": format!("metadata.annotations['{name}']")}});
    let spec = json!({
        "restartPolicy": "Never", "hostname": "train-node-0-0", "subdomain": "train", "setHostnameAsFQDN": false,
        "schedulingGates": [], "topologySpreadConstraints": [],
        "containers": [{
            "name": "node", "image": "pytorch/pytorch:2.9", "command": ["torchrun", "--nnodes=2", "train.py"],
            "env": [
                {"name": "PET_NODE_RANK", "valueFrom": label("batch.kubernetes.io/job-completion-index")},
                {"name": "JOB_INDEX", "valueFrom": label("jobset.sigs.k8s.io/job-index")},
                {"name": "PET_MASTER_ADDR", "value": "train-node-0-0.train"},
            ],
            "ports": [{"containerPort": 29400}],
            "resources": {"limits": {"nvidia.com/gpu": "1"}},
            "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
        }],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}}],
    });
    runs("a node of Kubeflow's trainer", &spec);
}
