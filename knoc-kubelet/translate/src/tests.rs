use k8s_openapi::api::core::v1 as core;
use serde_json::{Value, json};

use super::*;

mod problems;
mod rendered;

fn pod() -> Pod {
    serde_json::from_value(json!({
        "metadata": {
            "name": "p", "namespace": "ns", "uid": "u-1", "generation": 3,
            "labels": {"app": "x \"y\""},
            "annotations": {
                "knoc.io/partition": "gpu", "knoc.io/time": "2h", "knoc.io/flags": "--mail-type=END --comment='a b'",
                "kubectl.kubernetes.io/last-applied-configuration": "secret",
            },
        },
        "spec": {
            "restartPolicy": "OnFailure", "nodeName": "knoc-t", "activeDeadlineSeconds": 60,
            "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["a", "b"]}],
            "initContainers": [{"name": "init", "image": "busybox:1.36", "resources": {"requests": {"cpu": "3", "memory": "10Mi"}}}],
            "containers": [
                {"name": "main", "image": "busybox", "command": ["sh", "-c"], "args": ["echo $(A)"], "tty": true,
                 "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": "2Gi", "nvidia.com/gpu": "2"}},
                 "envFrom": [{"prefix": "P_", "configMapRef": {"name": "cm"}}, {"secretRef": {"name": "maybe", "optional": true}}],
                 "env": [
                    {"name": "A", "value": "a$(P_K)"},
                    {"name": "S", "valueFrom": {"secretKeyRef": {"name": "sec", "key": "k"}}},
                    {"name": "N", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
                    {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                    {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
                    {"name": "MEM", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}}},
                 ],
                 "volumeMounts": [{"name": "files", "mountPath": "/f", "readOnly": true, "subPath": "s"}]},
                {"name": "side", "image": "/images/x.sif", "imagePullPolicy": "Never"},
            ],
            "volumes": [
                {"name": "files", "projected": {"defaultMode": 256, "sources": [
                    {"configMap": {"name": "cm", "items": [{"key": "k", "path": "d/k", "mode": 511}]}},
                    {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
                    {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
                ]}},
                {"name": "scratch", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
            ],
        },
    }))
    .unwrap()
}

fn resolved() -> Resolved {
    let config_map = serde_json::from_value(json!({"data": {"k": "v", "bad=": "x"}})).unwrap();
    let secret = serde_json::from_value(json!({"data": {"k": "AP8="}})).unwrap();
    Resolved {
        config_maps: [("cm".to_owned(), config_map)].into(),
        secrets: [("sec".to_owned(), secret)].into(),
        tokens: [(
            TokenRequestKey {
                audience: String::new(),
                expiration: 3607,
            },
            Token {
                token: "t".to_owned(),
                expires: Timestamp::from_second(1000).unwrap(),
            },
        )]
        .into(),
        trust_bundles: BTreeMap::new(),
        services: vec![("SVC_SERVICE_HOST".to_owned(), "10.0.0.9".to_owned())],
        allocatable: pb::Resources {
            cpu_millis: 64_500,
            ..Default::default()
        },
    }
}

#[test]
fn addresses_with_leading_zeros_are_those_that_the_api_server_takes_them_for() {
    let mut pod = pod();
    let spec = pod.spec.as_mut().unwrap();
    let alias =
        json!([{"ip": "127.000.0.1", "hostnames": ["a"]}, {"ip": "wrong", "hostnames": ["b"]}]);
    spec.host_aliases = Some(serde_json::from_value(alias).unwrap());
    let config = json!({"nameservers": ["010.0.0.053", "2001:db8::1"]});
    spec.dns_config = Some(serde_json::from_value(config).unwrap());
    let shape = shape(&pod).unwrap();
    let aliases = shape.host_aliases.iter().map(|alias| alias.ip.as_str());
    // The agent rejects what is no address.
    assert_eq!(aliases.collect::<Vec<_>>(), ["127.0.0.1", "wrong"]);
    let resolver = shape.resolver.unwrap();
    assert_eq!(resolver.nameservers, ["10.0.0.53", "2001:db8::1"]);
}

#[test]
fn the_shape_of_a_pod() {
    let mut shape = shape(&pod()).unwrap();
    // The map has no order.
    let annotations: BTreeMap<_, _> = shape.annotations.drain().collect();
    assert_eq!(
        annotations.keys().map(String::as_str).collect::<Vec<_>>(),
        ["knoc.io/flags", "knoc.io/partition", "knoc.io/time"]
    );
    insta::assert_debug_snapshot!(shape);
}

#[test]
fn the_values_of_a_pod() {
    let mut resolved = resolved();
    let secret = serde_json::from_value(json!({"data": {"k": "/w=="}})).unwrap();
    resolved.secrets.insert("sec".to_owned(), secret);
    let values = values(&pod(), &resolved).unwrap();
    assert_eq!(values.skipped, ["P_bad="]);
    insta::assert_debug_snapshot!(values.values);
}

#[test]
fn what_a_pod_refers_to() {
    let needs = needs(&pod());
    assert_eq!(needs.config_maps, ["cm"]);
    assert_eq!(needs.secrets, ["maybe", "sec"]);
    assert_eq!(needs.tokens.len(), 1);
}

#[test]
fn all_missing_objects_but_optional_ones_are_reported() {
    let mut pod = pod();
    let error = values(&pod, &Resolved::default()).unwrap_err();
    let mounts: Vec<String> = [
        ("files", "configmap \"cm\" not found"),
        ("files", "the service account token was not issued"),
    ]
    .map(|(volume, why)| format!("MountVolume.SetUp failed for volume \"{volume}\" : {why}"))
    .into();
    assert_eq!(error, Missing::Mounts(mounts));
    pod.spec.as_mut().unwrap().volumes = None;
    let error = values(&pod, &Resolved::default()).unwrap_err();
    let variables = ["configmap \"cm\" not found", "secret \"sec\" not found"];
    assert_eq!(
        error,
        Missing::Variables(variables.map(str::to_owned).into())
    );
}

/// The pod with only these volumes, and the objects to which they refer.
fn with_volumes(volumes: serde_json::Value) -> (Pod, Resolved) {
    let mut pod = pod();
    pod.spec.as_mut().unwrap().volumes = serde_json::from_value(volumes).unwrap();
    let mut resolved = resolved();
    let other = serde_json::from_value(json!({"data": {"k": "other", "l": "l"}})).unwrap();
    resolved.config_maps.insert("other".to_owned(), other);
    let secret = serde_json::from_value(json!({"data": {"k": "cw=="}})).unwrap();
    resolved.secrets.insert("sec".to_owned(), secret);
    (pod, resolved)
}

/// The paths and contents of the pod's files.
fn files_of(volumes: serde_json::Value) -> Result<Vec<(String, String)>, Missing> {
    let (pod, resolved) = with_volumes(volumes);
    let volumes = values(&pod, &resolved)?.values.files;
    let files = volumes.into_iter().flat_map(|volume| volume.files);
    let text = |file: &pb::VolumeFile| String::from_utf8_lossy(&file.data).into_owned();
    Ok(files.map(|file| (file.path.clone(), text(&file))).collect())
}

#[test]
fn one_key_may_be_several_files_of_each_kind_of_volume() {
    let items =
        json!([{"key": "k", "path": "a"}, {"key": "k", "path": "b"}, {"key": "k", "path": "d/c"}]);
    for (volume, text) in [
        (json!({"configMap": {"name": "cm", "items": items}}), "v"),
        (
            json!({"secret": {"secretName": "sec", "items": items}}),
            "s",
        ),
        (
            json!({"projected": {"sources": [{"configMap": {"name": "cm", "items": items}}]}}),
            "v",
        ),
        (
            json!({"projected": {"sources": [{"secret": {"name": "sec", "items": items}}]}}),
            "s",
        ),
        // Each source reads its own copy of the object.
        (
            json!({"projected": {"sources": [
                {"configMap": {"name": "cm", "items": [{"key": "k", "path": "a"}]}},
                {"configMap": {"name": "cm", "items": [{"key": "k", "path": "b"}, {"key": "k", "path": "d/c"}]}},
            ]}}),
            "v",
        ),
        (
            json!({"downwardAPI": {"items": [
                {"path": "a", "fieldRef": {"fieldPath": "metadata.name"}},
                {"path": "b", "fieldRef": {"fieldPath": "metadata.name"}},
                {"path": "d/c", "fieldRef": {"fieldPath": "metadata.name"}},
            ]}}),
            "p",
        ),
    ] {
        let mut named = volume.clone();
        named["name"] = json!("v");
        let wanted = ["a", "b", "d/c"].map(|path| (path.to_owned(), text.to_owned()));
        assert_eq!(files_of(json!([named])).unwrap(), wanted, "{volume}");
    }
}

#[test]
fn paths_of_files_are_cleaned_and_the_later_source_wins() {
    let volume = json!({"name": "v", "projected": {"sources": [
        {"configMap": {"name": "cm", "items": [{"key": "k", "path": "./d//k"}]}},
        {"configMap": {"name": "other", "items": [{"key": "k", "path": "d/k"}, {"key": "l", "path": "a..b/"}]}},
        {"downwardAPI": {"items": [{"path": "x/..y//name", "fieldRef": {"fieldPath": "metadata.name"}}]}},
        {"serviceAccountToken": {"expirationSeconds": 3607, "path": ".//token"}},
    ]}});
    let wanted = [
        ("a..b", "l"),
        ("d/k", "other"),
        ("token", "t"),
        ("x/..y/name", "p"),
    ];
    let wanted = wanted.map(|(path, text)| (path.to_owned(), text.to_owned()));
    assert_eq!(files_of(json!([volume])).unwrap(), wanted);
}

#[test]
fn an_invalid_path_is_reported_by_name() {
    for (items, why) in [
        (
            json!([{"key": "k", "path": "a/../b"}]),
            "invalid path \"a/../b\": must not contain '..'",
        ),
        (
            json!([{"key": "k", "path": "./"}]),
            "invalid path \"./\": must name a file below the volume",
        ),
        (
            json!([{"key": "k", "path": "./..data"}]),
            "invalid path \"./..data\": must not start with '..'",
        ),
        (
            json!([{"key": "k", "path": "a/b"}, {"key": "k", "path": "./a"}]),
            "\"a\" is a file, so there can be no \"a/b\"",
        ),
    ] {
        let volume = json!([{"name": "v", "configMap": {"name": "cm", "items": items}}]);
        let why = format!("MountVolume.SetUp failed for volume \"v\" : {why}");
        assert_eq!(files_of(volume).unwrap_err(), Missing::Mounts(vec![why]));
    }
}

#[test]
fn paths_of_mounts_are_as_a_kubelet_takes_them() {
    for (sub_path, wanted) in [
        ("./history", "history"),
        ("logs/", "logs"),
        ("a//b", "a/b"),
        ("./", ""),
        ("..foo", "..foo"),
        // The agent rejects it by name.
        ("../x", "../x"),
    ] {
        let mut pod = pod();
        let main = &mut pod.spec.as_mut().unwrap().containers[0];
        main.termination_message_path = Some("log".to_owned());
        let mount = &mut main.volume_mounts.as_mut().unwrap()[0];
        mount.mount_path = "f/".to_owned();
        mount.sub_path = Some(sub_path.to_owned());
        let shape = shape(&pod).unwrap();
        let main = &shape.containers[0];
        assert_eq!(main.termination_message_path, "/log");
        assert_eq!(main.mounts[0].path, "/f/");
        assert_eq!(main.mounts[0].sub_path, wanted, "{sub_path:?}");
    }
}

#[test]
fn the_user_of_a_container_overrides_the_pods() {
    let ids = |of_pod: Value| {
        let mut pod = pod();
        let spec = pod.spec.as_mut().unwrap();
        spec.security_context = serde_json::from_value(of_pod).unwrap();
        spec.containers[1].security_context =
            serde_json::from_value(json!({"runAsUser": 0, "runAsGroup": 3})).unwrap();
        let shape = shape(&pod).unwrap();
        let containers = shape.containers.iter();
        let ids = containers.map(|one| (one.run_as_user, one.run_as_group));
        ids.collect::<Vec<_>>()
    };
    let own = (Some(0), Some(3));
    let both = json!({"runAsUser": 1000, "runAsGroup": 2000, "fsGroup": 4000});
    assert_eq!(ids(both), [(Some(1000), Some(2000)), own]);
    // A program has one group inside: without another one it is that of the pod's files.
    assert_eq!(ids(json!({"fsGroup": 4000})), [(None, Some(4000)), own]);
}

#[test]
fn a_value_with_a_nul_byte_cannot_be_a_variable() {
    let error = values(&pod(), &resolved()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the value of key k in secret sec contains a NUL byte"
    );
}

#[test]
fn init_containers_count_as_the_largest() {
    let job = shape(&pod()).unwrap().job.unwrap();
    assert_eq!(job.cpu_millis, 3000);
    assert_eq!(job.memory_bytes, 2 << 30);
    assert_eq!(job.gres, "");
}

#[test]
fn gres_is_taken_only_from_the_annotation() {
    let mut pod = pod();
    let annotations = pod.metadata.annotations.get_or_insert_default();
    annotations.insert("knoc.io/gres".to_owned(), "gpu:a100:2".to_owned());
    assert_eq!(shape(&pod).unwrap().job.unwrap().gres, "gpu:a100:2");
}

#[test]
fn service_variables_have_the_names_of_kubernetes() {
    let services: Vec<core::Service> = serde_json::from_value(json!([
        {"metadata": {"name": "kubernetes", "namespace": "default"},
         "spec": {"clusterIP": "10.0.0.1", "ports": [{"name": "https", "port": 443}]}},
        {"metadata": {"name": "my-db", "namespace": "ns"}, "spec": {"clusterIP": "10.0.0.2", "ports": [{"port": 5432, "protocol": "TCP"}]}},
        {"metadata": {"name": "headless", "namespace": "ns"}, "spec": {"clusterIP": "None", "ports": [{"port": 1}]}},
        {"metadata": {"name": "other", "namespace": "elsewhere"}, "spec": {"clusterIP": "10.0.0.3", "ports": [{"port": 1}]}},
    ]))
    .unwrap();
    let lines = |links| {
        let vars = service_variables(services.iter(), "ns", links);
        vars.iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect::<Vec<_>>()
            .join("\n")
    };
    insta::assert_snapshot!(lines(true));
    assert!(!lines(false).contains("MY_DB"));
    assert!(lines(false).contains("KUBERNETES_SERVICE_HOST=10.0.0.1"));
}

#[test]
fn a_volume_of_an_unknown_kind_is_an_error_wherever_it_is_read() {
    for source in [
        json!({"iscsi": {"iqn": "i", "lun": 0, "targetPortal": "p"}}),
        json!({"fromTheFuture": {}}),
        json!({}),
    ] {
        let mut volume = source;
        volume["name"] = json!("v");
        let (pod, resolved) = with_volumes(json!([volume]));
        let unknown = "spec.volumes[v]: volumes of this kind are not known to this version of KNoC";
        assert_eq!(shape(&pod).unwrap_err(), [unknown]);
        let missing = values(&pod, &resolved).unwrap_err().to_string();
        assert!(missing.ends_with(unknown), "{missing}");
        assert_eq!(needs(&pod).tokens, []);
    }
}

/// The verdict table names the field paths that containers can refer to; the translation must support each of them.
#[test]
fn every_field_path_with_a_verdict_is_translated_and_no_other() {
    let honoured = verdict::fields::honoured_field_paths();
    assert!(honoured.len() > 12, "{honoured:?}");
    for (kind, path) in honoured {
        let runtime = path.starts_with("status.");
        assert_eq!(
            files::field(&pod(), &path).is_none(),
            runtime,
            "{kind}: {path}"
        );
        let env = json!([{"name": "N", "valueFrom": {"fieldRef": {"fieldPath": path}}}]);
        let mut pod = pod();
        let spec = pod.spec.as_mut().unwrap();
        spec.volumes = None;
        spec.containers[0].env = serde_json::from_value(env).unwrap();
        values(&pod, &resolved()).unwrap();
    }
    assert_eq!(files::field(&pod(), "spec.hostname"), None);
}

/// The shape of a pod with one container, with these fields of `spec` too.
fn with(change: impl FnOnce(&mut serde_json::Value)) -> pb::PodSpec {
    let mut json = json!({
        "metadata": {"name": "web-0", "namespace": "ns", "uid": "u-1"},
        "spec": {"containers": [{"name": "main", "image": "busybox"}]},
    });
    change(&mut json);
    shape(&serde_json::from_value(json).unwrap()).unwrap()
}

#[test]
fn the_names_of_a_pod_are_those_a_kubelet_gives_it() {
    let names = |fields: serde_json::Value| {
        let shape = with(|json| {
            for (key, value) in fields.as_object().unwrap() {
                json["spec"][key] = value.clone();
            }
        });
        (shape.hostname, shape.subdomain, shape.set_hostname_as_fqdn)
    };
    let expect =
        |hostname: &str, subdomain: &str, fqdn| (hostname.to_owned(), subdomain.to_owned(), fqdn);
    assert_eq!(names(json!({})), expect("web-0", "", false));
    let all = json!({"hostname": "h", "subdomain": "web", "setHostnameAsFQDN": true});
    assert_eq!(names(all), expect("h", "web", true));
    // It takes the place of all others, and the pod has no domain.
    let replaced =
        json!({"hostname": "h", "subdomain": "web", "hostnameOverride": "my.own.example"});
    assert_eq!(names(replaced), expect("my.own.example", "", false));
    let long = json!({"hostnameOverride": format!("{}.{}", "a".repeat(62), "b".repeat(9))});
    assert_eq!(names(long), expect(&"a".repeat(62), "", false));
    let long = with(|json| json["metadata"]["name"] = "n".repeat(80).into());
    assert_eq!(long.hostname, "n".repeat(63));
}

#[test]
fn what_a_pod_says_about_names_reaches_its_resolver() {
    let resolver = |policy: &str, config: serde_json::Value| {
        with(|json| {
            json["spec"]["dnsPolicy"] = policy.into();
            json["spec"]["dnsConfig"] = config;
        })
        .resolver
    };
    assert_eq!(
        resolver("Default", json!(null)),
        None,
        "the node's file stays"
    );
    let cluster_first = Some(pb::Resolver {
        cluster_first: true,
        ..pb::Resolver::default()
    });
    for policy in ["ClusterFirst", "ClusterFirstWithHostNet"] {
        assert_eq!(resolver(policy, json!(null)), cluster_first, "{policy}");
    }
    let in_the_nodes_network = |policy: Option<&str>| {
        with(|json| {
            json["spec"]["hostNetwork"] = true.into();
            json["spec"]["dnsPolicy"] = json!(policy);
        })
        .resolver
    };
    assert_eq!(in_the_nodes_network(Some("ClusterFirst")), None);
    assert_eq!(in_the_nodes_network(None), None);
    assert_eq!(
        in_the_nodes_network(Some("ClusterFirstWithHostNet")),
        cluster_first
    );
    let config = json!({
        "nameservers": ["1.1.1.1"], "searches": ["a.example"],
        "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}],
    });
    let own = resolver("None", config.clone()).unwrap();
    assert!(own.only_own && !own.cluster_first);
    assert_eq!((own.nameservers.len(), own.searches.len()), (1, 1));
    let options: Vec<_> = own
        .options
        .iter()
        .map(|one| (one.name.as_str(), one.value.as_deref()))
        .collect();
    assert_eq!(options, [("ndots", Some("2")), ("edns0", None)]);
    let merged = resolver("ClusterFirst", config).unwrap();
    assert!(merged.cluster_first && !merged.only_own);
}

#[test]
fn a_sub_path_is_expanded_before_a_pod_is_given_to_the_agent() {
    let pod = |value: &str, template: &str| -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "ns", "uid": "u-1", "annotations": {"there": "x"}},
            "spec": {
                "containers": [{
                    "name": "main", "image": "busybox",
                    "env": [
                        {"name": "A", "value": value},
                        {"name": "NOTE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.annotations['missing']"}}},
                        {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                    ],
                    "volumeMounts": [{"name": "v", "mountPath": "/v", "subPathExpr": template}],
                }],
                "volumes": [{"name": "v", "emptyDir": {}}],
            },
        }))
        .unwrap()
    };
    let why =
        |value: &str, template: &str| match values(&pod(value, template), &Resolved::default()) {
            Ok(_) => String::new(),
            Err(Missing::Variables(missing)) => missing.join("; "),
            Err(other) => panic!("{other:?}"),
        };
    assert_eq!(why("foo", "$(A)/$(IP)"), "");
    assert_eq!(why("foo", "$(NOTE)/$(A)"), "missing value for NOTE");
    assert!(why("..", "$(A)").contains("must not contain '..'"));
    assert!(why("/tmp", "$(A)").contains("must be a relative path"));
    let shape = shape(&pod("foo", "$(A)")).unwrap();
    assert_eq!(shape.containers[0].mounts[0].sub_path_expr, "$(A)");
    assert_eq!(shape.containers[0].mounts[0].sub_path, "");
}

#[test]
fn a_containers_word_about_root_comes_before_the_pods() {
    let said = |pod: serde_json::Value, container: serde_json::Value| {
        let shape = with(|json| {
            json["spec"]["securityContext"] = pod;
            json["spec"]["containers"][0]["securityContext"] = container;
        });
        shape.containers[0].run_as_non_root
    };
    let (yes, no) = (
        json!({"runAsNonRoot": true}),
        json!({"runAsNonRoot": false}),
    );
    assert!(said(json!({}), yes.clone()));
    assert!(said(yes.clone(), json!({})));
    assert!(!said(yes, no));
    assert!(!said(json!({}), json!({})));
}

#[test]
fn trust_anchors_are_a_file_and_optional_ones_may_be_missing() {
    let volumes = |optional: bool| {
        json!([{"name": "trust", "projected": {"sources": [
            {"clusterTrustBundle": {"name": "site", "path": "site.pem"}},
            {"clusterTrustBundle": {
                "signerName": "example.org/ca", "labelSelector": {"matchLabels": {"live": "true"}},
                "path": "signed.pem", "optional": optional,
            }},
        ]}}])
    };
    let signed = TrustBundleKey::Signed {
        signer: "example.org/ca".to_owned(),
        labels: Some("live=true".to_owned()),
    };
    let site = TrustBundleKey::Named("site".to_owned());
    let (pod, mut resolved) = with_volumes(volumes(true));
    assert_eq!(needs(&pod).trust_bundles, [site.clone(), signed.clone()]);
    resolved.trust_bundles.insert(site, "SITE".to_owned());
    let found = |pod: &Pod, resolved: &Resolved| {
        let files = values(pod, resolved)?.values.files;
        let files = files.into_iter().flat_map(|volume| volume.files);
        Ok::<_, Missing>(files.map(|file| file.data.to_vec()).collect::<Vec<_>>())
    };
    let empty = Vec::new();
    assert_eq!(found(&pod, &resolved), Ok(vec![empty, b"SITE".to_vec()]));
    let (required, _) = with_volumes(volumes(false));
    let missing = "MountVolume.SetUp failed for volume \"trust\" : clustertrustbundles of signer \"example.org/ca\" with labels \"live=true\" not found";
    let error = Missing::Mounts(vec![missing.to_owned()]);
    assert_eq!(found(&required, &resolved), Err(error));
    resolved.trust_bundles.insert(signed, "CA".to_owned());
    let both = vec![b"CA".to_vec(), b"SITE".to_vec()];
    assert_eq!(found(&required, &resolved), Ok(both));
}

#[test]
fn a_host_path_has_its_type_and_a_clean_path() {
    let of = |host_path: serde_json::Value| {
        let (pod, _) = with_volumes(json!([{"name": "v", "hostPath": host_path}]));
        shape(&pod).map(|mut shape| match shape.volumes.remove(0).source {
            Some(pb::volume::Source::HostPath(host)) => (host.path.clone(), host.r#type()),
            other => panic!("{other:?}"),
        })
    };
    let any = pb::HostPathType::Unspecified;
    assert_eq!(
        of(json!({"path": "/data//x/"})),
        Ok(("/data/x".to_owned(), any))
    );
    let file = json!({"path": "/data/x", "type": "FileOrCreate"});
    assert_eq!(of(file).unwrap().1, pb::HostPathType::FileOrCreate);
    for (path, why) in [
        ("data", "absolute"),
        ("/data/../etc", "'..'"),
        ("", "empty"),
    ] {
        let problems = of(json!({"path": path})).unwrap_err();
        let [problem] = problems.as_slice() else {
            panic!("{problems:?}");
        };
        let named = problem.starts_with("spec.volumes[v].hostPath.path: ");
        assert!(named && problem.contains(why), "{problem}");
    }
}
