use std::sync::Arc;

use tokio::time::Instant;

use super::*;

static NONE: LinkCertificate = LinkCertificate {
    validity: None,
    problem: String::new(),
};

fn identity() -> Identity {
    Identity {
        name: "knoc-t".to_owned(),
        internal_ip: "10.0.0.1".to_owned(),
        port: 10250,
        labels: BTreeMap::new(),
        pods: 100,
        queue_factor: 10,
        cluster_domain: "cluster.local".to_owned(),
        pod_ip: crate::node::PodIp::None,
        pod_range: None,
        taint: true,
        websockets: true,
    }
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn up() -> Link {
    let info = pb::AgentInfo {
        version: "0.1.0".to_owned(),
        site: "t".to_owned(),
        hostname: "login".to_owned(),
        runtime: "apptainer".to_owned(),
        runtime_version: "apptainer version 1.4.5".to_owned(),
        scheduler_version: "slurm 24.11.5".to_owned(),
        kernel: "6.1.0-25-amd64".to_owned(),
        os: "Debian GNU/Linux 12 (bookworm)".to_owned(),
        ..pb::AgentInfo::default()
    };
    Link::Up {
        info: Arc::new(info),
        since: at(1),
    }
}

fn capacity() -> pb::NodeInfo {
    pb::NodeInfo {
        cpu: 12,
        memory_bytes: 1 << 34,
        extended: [("nvidia.com/gpu".to_owned(), 4)].into(),
        pid_isolation: true,
        scheduler: Some(pb::SchedulerHealth {
            reachable: true,
            ..Default::default()
        }),
        ..pb::NodeInfo::default()
    }
}

fn facts<'a>(
    identity: &'a Identity,
    link: &'a Link,
    capacity: Option<&'a pb::NodeInfo>,
) -> Facts<'a> {
    Facts {
        identity,
        link,
        capacity,
        orphans: 0,
        certificates: &[],
        link_certificate: &NONE,
        api_names: &ApiNames::Unknown,
        server: None,
        previous: None,
        now: at(100),
    }
}

/// Most sites leave TmpDisk at 0. The scheduler places no pod that requests local disk on a node without the resource.
#[test]
fn a_site_without_known_local_disk_rejects_no_pod_for_it() {
    let (identity, link) = (identity(), up());
    let shown = |bytes| {
        let capacity = pb::NodeInfo {
            ephemeral_storage_bytes: bytes,
            ..capacity()
        };
        let status = status(&facts(&identity, &link, Some(&capacity)));
        let amount = |list: &str| {
            let text = status[list]["ephemeral-storage"].as_str().unwrap();
            text.parse::<i64>().unwrap()
        };
        (amount("capacity"), amount("allocatable"))
    };
    assert_eq!(shown(5 << 30), (5 << 30, 50 << 30));
    let (unknown, allocatable) = shown(0);
    assert!(unknown >= 1 << 50 && allocatable >= unknown, "{unknown}");
}

#[test]
fn the_version_follows_the_api_servers_and_stays_while_that_is_not_known() {
    let (identity, link) = (identity(), up());
    let said = |server, previous| {
        let facts = Facts {
            server,
            previous,
            ..facts(&identity, &link, None)
        };
        let status = status(&facts);
        let version = &status["nodeInfo"]["kubeletVersion"];
        (version.as_str().unwrap().to_owned(), status.clone())
    };
    let old = Some(Release::new(1, 34));
    let (version, status) = said(old, None);
    assert!(version.starts_with("v1.34.0+knoc."), "{version}");
    let before: NodeStatus = serde_json::from_value(status).unwrap();
    assert_eq!(said(None, Some(&before)).0, version);
    let new = Some(Release::new(1, 37));
    assert!(said(new, Some(&before)).0.starts_with("v1.36.0+knoc."));
}

#[test]
fn features_are_declared_and_taken_back() {
    let (identity, link) = (identity(), up());
    let declared: NodeStatus =
        serde_json::from_value(json!({"declaredFeatures": ["ExtendWebSocketsToKubelet"]})).unwrap();
    let said = |server, previous| {
        let facts = Facts {
            server,
            previous,
            ..facts(&identity, &link, None)
        };
        status(&facts).get("declaredFeatures").cloned()
    };
    let both = [
        "ExtendWebSocketsToKubelet",
        "RestartAllContainersOnContainerExits",
    ];
    let (new, old) = (Release::new(1, 36), Release::new(1, 35));
    assert_eq!(said(None, Some(&declared)), None, "not known: as it was");
    assert_eq!(said(Some(new), None), Some(json!(both)));
    assert_eq!(said(Some(old), Some(&declared)), Some(json!([])));
    assert_eq!(said(Some(old), None), None);
}

#[test]
fn an_unknown_capacity_is_not_published_as_zero() {
    let (identity, link) = (identity(), up());
    let capacity = pb::NodeInfo {
        scheduler: Some(pb::SchedulerHealth::default()),
        ..pb::NodeInfo::default()
    };
    let facts = Facts {
        identity: &identity,
        link: &link,
        capacity: Some(&capacity),
        orphans: 0,
        certificates: &[],
        link_certificate: &NONE,
        api_names: &ApiNames::Unknown,
        server: None,
        previous: None,
        now: at(100),
    };
    let status = status(&facts);
    assert_eq!(status.get("capacity"), None);
    let conditions = status.get("conditions").unwrap().to_string();
    assert!(conditions.contains("ControllerDown"), "{conditions}");
}

#[test]
fn a_connected_node() {
    let (identity, link, capacity) = (identity(), up(), capacity());
    let facts = facts(&identity, &link, Some(&capacity));
    insta::assert_snapshot!(serde_json::to_string_pretty(&status(&facts)).unwrap());
}

#[tokio::test]
async fn a_cut_link_leaves_the_node_ready() {
    let (identity, capacity) = (identity(), capacity());
    let link = Link::Down {
        since: at(50),
        at: Instant::now(),
        message: "refused".to_owned(),
    };
    let facts = Facts {
        orphans: 7,
        ..facts(&identity, &link, Some(&capacity))
    };
    let conditions = status(&facts)["conditions"].clone();
    let words = |condition: &Value| {
        format!(
            "{} {} {}",
            condition["type"], condition["status"], condition["message"]
        )
    };
    let lines: Vec<_> = conditions.as_array().unwrap().iter().map(words).collect();
    insta::assert_snapshot!(lines.join("\n"));
}

#[test]
fn a_condition_that_others_overwrote_is_sent_again() {
    let (identity, link, capacity) = (identity(), up(), capacity());
    let facts = facts(&identity, &link, Some(&capacity));
    let wanted = status(&facts);
    let live = |wanted: &Value| serde_json::from_value::<NodeStatus>(wanted.clone()).unwrap();
    assert!(stands(&wanted, Some(&live(&wanted))));
    assert!(!stands(&wanted, None));
    assert!(!stands(&wanted, Some(&NodeStatus::default())), "a new Node");
    let mut unknown = live(&wanted);
    for condition in unknown.conditions.iter_mut().flatten() {
        if condition.type_ == "Ready" {
            condition.status = "Unknown".to_owned();
            condition.reason = Some("NodeStatusUnknown".to_owned());
        }
    }
    assert!(!stands(&wanted, Some(&unknown)), "the node controller");
    let mut bare = live(&wanted);
    bare.capacity = None;
    assert!(!stands(&wanted, Some(&bare)));
    // Conditions that others add are ignored.
    let mut more = live(&wanted);
    let extra = live(&wanted).conditions.unwrap()[0].clone();
    more.conditions
        .as_mut()
        .unwrap()
        .push(k8s_openapi::api::core::v1::NodeCondition {
            type_: "Foreign".to_owned(),
            ..extra
        });
    assert!(stands(&wanted, Some(&more)));
}

#[test]
fn a_heartbeat_is_no_change() {
    let (identity, link) = (identity(), up());
    let mut facts = facts(&identity, &link, None);
    let one = status(&facts);
    facts.now = at(200);
    assert!(same(&one, &status(&facts)));
}

#[test]
fn what_somebody_else_put_into_the_capacity_is_kept_and_what_slurm_lost_goes() {
    let (identity, link) = (identity(), up());
    let previous: NodeStatus = serde_json::from_value(serde_json::json!({"capacity": {
        "cpu": "12", "example.com/licence": "5", "amd.com/gpu": "1",
    }}))
    .unwrap();
    let mut capacity = capacity();
    capacity.extended.insert("amd.com/gpu".to_owned(), 0);
    let facts = Facts {
        previous: Some(&previous),
        ..facts(&identity, &link, Some(&capacity))
    };
    let status = status(&facts);
    for list in ["capacity", "allocatable"] {
        assert_eq!(status[list]["example.com/licence"], "5", "{list}");
        assert!(
            status[list]
                .as_object()
                .unwrap()
                .contains_key("amd.com/gpu")
        );
        assert!(status[list]["amd.com/gpu"].is_null(), "{list}");
    }
    assert_eq!(status["allocatable"]["nvidia.com/gpu"], "40");
}
