use std::sync::Arc;

use knoc_proto::pb;
use serde_json::{Value, json};

use super::*;

/// A running pod `web-0` of `team` that is ready, with these labels.
fn pod(labels: &Value, change: impl FnOnce(&mut Value)) -> PodView {
    let mut object = json!({
        "metadata": {"namespace": "team", "name": "web-0", "uid": "u-1", "labels": labels},
        "spec": {
            "containers": [{"name": "main", "ports": [{"name": "http", "containerPort": 8080}, {"name": "dns", "containerPort": 53,
                "protocol": "UDP"}]}],
            "initContainers": [{"name": "proxy", "restartPolicy": "Always", "ports": [{"name": "side", "containerPort": 15_000}]},
                {"name": "once", "ports": [{"name": "init", "containerPort": 1}]}],
        },
        "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
    });
    change(&mut object);
    let observed = pb::PodObserved {
        phase: PodPhase::Running.into(),
        ..pb::PodObserved::default()
    };
    PodView {
        uid: "u-1".parse().unwrap(),
        pod: Arc::new(serde_json::from_value(object).unwrap()),
        observed: Some(Arc::new(observed)),
    }
}

fn service(name: &str, spec: &Value) -> Service {
    let object = json!({"metadata": {"namespace": "team", "name": name, "uid": format!("s-{name}")}, "spec": spec});
    serde_json::from_value(object).unwrap()
}

fn web() -> Service {
    service(
        "web",
        &json!({"clusterIP": "10.96.0.9", "selector": {"app": "web"}, "ports": [
            {"name": "http", "port": 80, "targetPort": "http"}, {"name": "same", "port": 8081},
            {"name": "side", "port": 1, "targetPort": "side"}, {"name": "init", "port": 2, "targetPort": "init"},
            {"name": "nobody", "port": 3, "targetPort": "nobody"}]}),
    )
}

fn planned(view: &PodView, services: &[Service], policies: &Policies) -> Plan {
    let allow = AllowList::parse(&["team/*"]).unwrap();
    plan(
        std::slice::from_ref(view),
        services.iter(),
        (&allow, "IPv4"),
        policies,
    )
}

fn unchanged(_: &mut Value) {}

#[test]
fn a_service_leads_to_the_ports_that_it_names() {
    let view = pod(&json!({"app": "web", "tier": "front"}), unchanged);
    let plan = planned(&view, &[web()], &Policies::default());
    let [endpoint] = plan.endpoints.as_slice() else {
        panic!("{plan:?}");
    };
    let ports: Vec<_> = endpoint
        .ports
        .iter()
        .map(|port| (port.name.as_deref().unwrap_or_default(), port.number))
        .collect();
    assert_eq!(ports, [("http", 8080), ("same", 8081), ("side", 15_000)]);
    assert_eq!(plan.ports().len(), 3);
    assert!(plan.isolated().is_empty());
    assert_eq!(endpoint.service.to_string(), "team/web");
    assert_eq!(endpoint.pod, "web-0");
    let ready = Conditions {
        ready: true,
        serving: true,
        terminating: false,
    };
    assert_eq!(endpoint.conditions, ready);
    assert!(plan.refused.is_empty(), "{plan:?}");
}

/// No proxy takes a slice of a family that the Service does not have.
#[test]
fn a_service_of_another_family_is_refused_by_name() {
    let view = pod(&json!({"app": "web"}), unchanged);
    let of = |families: &Value| {
        let mut web = web();
        let spec = web.spec.as_mut().unwrap();
        spec.ip_families = serde_json::from_value(families.clone()).unwrap();
        planned(&view, &[web], &Policies::default())
    };
    for families in [
        json!(null),
        json!([]),
        json!(["IPv4"]),
        json!(["IPv6", "IPv4"]),
    ] {
        let plan = of(&families);
        assert_eq!(
            (plan.endpoints.len(), plan.refused.len()),
            (1, 0),
            "{families}"
        );
    }
    let plan = of(&json!(["IPv6"]));
    assert!(plan.endpoints.is_empty(), "{plan:?}");
    let text = plan.refused[0].1.to_string();
    assert!(
        text.contains("Service team/web does not lead") && text.contains("no IPv4 address"),
        "{text}"
    );
}

#[test]
fn services_that_select_others_or_are_not_listed_lead_nowhere() {
    let view = pod(&json!({"app": "web"}), unchanged);
    let ports = json!([{"port": 80}]);
    let more = json!({"clusterIP": "10.96.0.1", "selector": {"app": "web", "tier": "front"}, "ports": ports});
    let none = json!({"clusterIP": "10.96.0.2", "ports": ports});
    let empty = json!({"clusterIP": "10.96.0.3", "selector": {}, "ports": ports});
    let external = json!({"type": "ExternalName", "externalName": "a.b", "selector": {"app": "web"}, "ports": ports});
    let mut other = web();
    other.metadata.namespace = Some("other".to_owned());
    let services = [
        service("more", &more),
        service("none", &none),
        service("empty", &empty),
        service("external", &external),
        other,
    ];
    assert_eq!(
        planned(&view, &services, &Policies::default()),
        Plan::default()
    );
    let allow = AllowList::parse(&["other/*", "team/db"]).unwrap();
    let not_listed = plan(
        &[view],
        [web()].iter(),
        (&allow, "IPv4"),
        &Policies::default(),
    );
    assert_eq!(not_listed, Plan::default());
}

#[test]
fn conditions_are_those_of_the_endpoint_controller() {
    let of = |change: fn(&mut Value), always: bool| {
        let view = pod(&json!({"app": "web"}), change);
        let mut web = web();
        let spec = web.spec.as_mut().unwrap();
        spec.publish_not_ready_addresses = Some(always);
        let plan = planned(&view, &[web], &Policies::default());
        plan.endpoints.first().map(|it| it.conditions)
    };
    let conditions = |ready, serving, terminating| {
        Some(Conditions {
            ready,
            serving,
            terminating,
        })
    };
    let unready: fn(&mut Value) = |pod| pod["status"]["conditions"][0]["status"] = json!("False");
    let leaving: fn(&mut Value) =
        |pod| pod["metadata"]["deletionTimestamp"] = json!("2026-11-29T10:00:00Z");
    assert_eq!(of(unready, false), conditions(false, false, false));
    assert_eq!(of(unready, true), conditions(true, false, false));
    assert_eq!(of(leaving, false), conditions(false, true, true));
    assert_eq!(of(leaving, true), conditions(true, true, true));
}

#[test]
fn a_pod_without_a_running_job_is_nobodys_endpoint() {
    let labels = || json!({"app": "web"});
    let nothing = |view: &PodView| {
        let plan = planned(view, &[web()], &Policies::default());
        assert_eq!(plan, Plan::default());
    };
    for phase in [
        PodPhase::Queued,
        PodPhase::Lost,
        PodPhase::Finished,
        PodPhase::Staging,
    ] {
        let mut view = pod(&labels(), unchanged);
        let observed = pb::PodObserved {
            phase: phase.into(),
            ..pb::PodObserved::default()
        };
        view.observed = Some(Arc::new(observed));
        nothing(&view);
        view.observed = None;
        nothing(&view);
    }
    nothing(&pod(&labels(), |pod| {
        pod["status"]["phase"] = json!("Succeeded");
    }));
    // Kubernetes' own controllers publish it.
    nothing(&pod(&labels(), |pod| {
        pod["status"]["podIP"] = json!("10.1.2.3");
    }));
}

#[test]
fn what_is_not_relayed_is_said_and_says_what_to_do() {
    let view = pod(&json!({"app": "web"}), unchanged);
    let headless =
        json!({"clusterIP": "None", "selector": {"app": "web"}, "ports": [{"port": 80}]});
    let udp = json!({"clusterIP": "10.96.0.8", "selector": {"app": "web"},
        "ports": [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "tcp", "port": 53}]});
    let services = [service("headless", &headless), service("dns", &udp)];
    let plan = planned(&view, &services, &Policies::default());
    let said: Vec<_> = plan
        .refused
        .iter()
        .map(|(_, why)| why.to_string())
        .collect();
    assert_eq!(said.len(), 2, "{said:?}");
    assert!(
        said[0].contains("port 53 of Service team/dns") && said[0].contains("UDP"),
        "{said:?}"
    );
    assert!(
        said[1].contains("team/headless") && said[1].contains("use a Service with a clusterIP"),
        "{said:?}"
    );
    let [endpoint] = plan.endpoints.as_slice() else {
        panic!("{plan:?}");
    };
    assert_eq!(endpoint.ports.len(), 1, "TCP is relayed");
}

#[test]
fn a_pod_that_a_network_policy_selects_is_not_relayed_to() {
    let view = pod(&json!({"app": "web"}), unchanged);
    let mut policies = Policies::default();
    let policy =
        json!({"metadata": {"namespace": "team", "name": "deny"}, "spec": {"podSelector": {}}});
    policies.set(&serde_json::from_value(policy).unwrap());
    let plan = planned(&view, &[web()], &policies);
    assert!(plan.endpoints.is_empty() && plan.ports().is_empty());
    assert_eq!(plan.isolated(), [&view.uid].into());
    let said: Vec<_> = plan
        .refused
        .iter()
        .map(|(_, why)| why.to_string())
        .collect();
    assert!(
        said.len() == 1 && said[0].contains("NetworkPolicy deny selects the pod"),
        "{said:?}"
    );
}

#[test]
fn a_user_who_creates_many_services_does_not_fill_the_node() {
    let view = pod(&json!({"app": "web"}), unchanged);
    let spec =
        json!({"clusterIP": "10.96.0.9", "selector": {"app": "web"}, "ports": [{"port": 80}]});
    let many = |count: usize| -> Vec<Service> {
        let names = (0..count).map(|number| format!("web-{number:04}"));
        names.map(|name| service(&name, &spec)).collect()
    };
    let all = planned(&view, &many(SERVICES), &Policies::default());
    assert_eq!((all.endpoints.len(), all.refused.len()), (SERVICES, 0));
    let some = planned(&view, &many(1000), &Policies::default());
    assert_eq!((some.endpoints.len(), some.refused.len()), (SERVICES, 1));
    let why = some.refused[0].1.to_string();
    assert!(why.contains("more than 32 Services select it"), "{why}");
    let views = vec![view; OF_NODE];
    let allow = AllowList::parse(&["team/*"]).unwrap();
    let services = many(2);
    let full = plan(
        &views,
        services.iter(),
        (&allow, "IPv4"),
        &Policies::default(),
    );
    assert_eq!(full.endpoints.len(), OF_NODE);
    let mut names = full
        .endpoints
        .iter()
        .map(|endpoint| &*endpoint.service.name);
    assert!(
        names.all(|name| name == "web-0000"),
        "each pod has one before any has two"
    );
    let why = full.refused[0].1.to_string();
    assert!(
        why.contains("4096 relayed endpoints, which is the limit"),
        "{why}"
    );
}
