//! PURE: the EndpointSlices of relayed pods: one for each pod and Service, because all endpoints of a slice share its ports, and
//! each pod has ports of its own at the kubelet's address. What differs in the API server, and how it is brought about.
//!
//! A slice is this kubelet's if its labels say so, whatever its name is. It belongs to its Service, so Kubernetes removes it with that.

use std::{
    collections::{BTreeMap, HashMap},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::IpAddr,
};

use k8s_openapi::{
    api::{
        core::v1::ObjectReference,
        discovery::v1::{
            Endpoint as KubeEndpoint, EndpointConditions, EndpointPort, EndpointSlice,
        },
    },
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};

use super::plan::{Endpoint, PodPort};
use crate::egress::table::Name;

/// The label of a slice that names its Service.
const OF_SERVICE: &str = "kubernetes.io/service-name";
/// The label of a slice that names who writes it, so that Kubernetes' own controllers leave it alone.
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
/// Its value for slices of kubelets of KNoC.
const MANAGER: &str = "relay.knoc.io";
/// The label of a slice that names the node whose kubelet writes it.
const OF_NODE: &str = "knoc.io/node";

/// The label selector of all slices of this node.
pub(super) fn of_node(node: &str) -> String {
    format!("{MANAGED_BY}={MANAGER},{OF_NODE}={node}")
}

/// Is the slice one of the kubelet of this node? What is not must never be deleted, whatever the API server makes of the selector.
pub(super) fn is_own(slice: &EndpointSlice, node: &str) -> bool {
    let has = |name: &str, value: &str| {
        let labels = slice.metadata.labels.as_ref();
        labels
            .and_then(|labels| labels.get(name))
            .is_some_and(|it| it == value)
    };
    has(MANAGED_BY, MANAGER) && has(OF_NODE, node)
}

/// Where the relayed ports are.
#[derive(Debug, Clone)]
pub(super) struct Place<'a> {
    /// The name of the node.
    pub(super) node: &'a str,
    /// The address at which the cluster reaches the kubelet.
    pub(super) address: IpAddr,
}

/// The slice of an endpoint whose ports of the pod have these ports of the kubelet; those without one are left out. `None` if no
/// port is left.
pub(super) fn slice(
    endpoint: &Endpoint,
    place: &Place<'_>,
    ports: &HashMap<PodPort, u16>,
) -> Option<(Name, EndpointSlice)> {
    let number = |number| {
        let uid = endpoint.uid.clone();
        ports.get(&PodPort { uid, number }).copied()
    };
    let relayed = endpoint.ports.iter().filter_map(|port| {
        Some(EndpointPort {
            name: Some(port.name.clone().unwrap_or_default()),
            port: Some(number(port.number)?.into()),
            protocol: Some("TCP".to_owned()),
            app_protocol: port.app_protocol.clone(),
        })
    });
    let relayed: Vec<_> = relayed.collect();
    if relayed.is_empty() {
        return None;
    }
    let name = name(endpoint, place);
    let slice = EndpointSlice {
        address_type: family(place.address).to_owned(),
        endpoints: Some(vec![kube_endpoint(endpoint, place)]),
        metadata: metadata(endpoint, place, &name),
        ports: Some(relayed),
    };
    Some((name, slice))
}

fn family(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "IPv4" } else { "IPv6" }
}

/// The type of addresses cannot be changed, so it is part of the name.
fn name(endpoint: &Endpoint, place: &Place<'_>) -> Name {
    let mut hasher = DefaultHasher::new();
    (place.node, endpoint.uid.as_str(), family(place.address)).hash(&mut hasher);
    Name {
        namespace: endpoint.service.namespace.clone(),
        name: format!("{}-knoc-{:016x}", endpoint.service.name, hasher.finish()).into(),
    }
}

fn kube_endpoint(endpoint: &Endpoint, place: &Place<'_>) -> KubeEndpoint {
    KubeEndpoint {
        addresses: vec![place.address.to_string()],
        conditions: Some(EndpointConditions {
            ready: Some(endpoint.conditions.ready),
            serving: Some(endpoint.conditions.serving),
            terminating: Some(endpoint.conditions.terminating),
        }),
        node_name: Some(place.node.to_owned()),
        target_ref: Some(ObjectReference {
            kind: Some("Pod".to_owned()),
            namespace: Some(endpoint.service.namespace.to_string()),
            name: Some(endpoint.pod.clone()),
            uid: Some(endpoint.uid.to_string()),
            ..ObjectReference::default()
        }),
        ..KubeEndpoint::default()
    }
}

fn metadata(endpoint: &Endpoint, place: &Place<'_>, name: &Name) -> ObjectMeta {
    let labels = [
        (OF_SERVICE, endpoint.service.name.to_string()),
        (MANAGED_BY, MANAGER.to_owned()),
        (OF_NODE, place.node.to_owned()),
    ];
    ObjectMeta {
        namespace: Some(name.namespace.to_string()),
        name: Some(name.name.to_string()),
        labels: Some(labels.map(|(name, value)| (name.to_owned(), value)).into()),
        owner_references: Some(vec![OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Service".to_owned(),
            name: endpoint.service.name.to_string(),
            uid: endpoint.service_uid.clone(),
            controller: Some(true),
            block_owner_deletion: None,
        }]),
        ..ObjectMeta::default()
    }
}

/// The ports at this address that a slice has.
pub(super) fn ports_at(slice: &EndpointSlice, address: IpAddr) -> Vec<u16> {
    if !is_at(slice, address) {
        return Vec::new();
    }
    let ports = slice.ports.iter().flatten();
    let ports = ports.filter_map(|port| u16::try_from(port.port?).ok());
    ports.collect()
}

/// Does the slice lead to this address?
pub(super) fn is_at(slice: &EndpointSlice, address: IpAddr) -> bool {
    let mut endpoints = slice.endpoints.iter().flatten();
    let address = address.to_string();
    endpoints.any(|one| one.addresses.contains(&address))
}

/// What has to be written.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Change {
    Create(Name, EndpointSlice),
    Replace(Name, EndpointSlice),
    /// With the metadata of the version that is deleted.
    Delete(Name, ObjectMeta),
}

/// What has to be written so that `stored` becomes `wanted`. New endpoints come first.
pub(super) fn changes(
    wanted: &BTreeMap<Name, EndpointSlice>,
    stored: &HashMap<Name, EndpointSlice>,
) -> Vec<Change> {
    let written = wanted.iter().filter_map(|(name, slice)| {
        let (name, slice) = (name.clone(), slice.clone());
        match stored.get(&name) {
            None => Some(Change::Create(name, slice)),
            Some(stored) if same(&slice, stored) => None,
            Some(_) => Some(Change::Replace(name, slice)),
        }
    });
    let over = stored.iter().filter(|(name, _)| !wanted.contains_key(name));
    let over = over.map(|(name, slice)| Change::Delete(name.clone(), slice.metadata.clone()));
    written.chain(over).collect()
}

/// Has the stored slice all that is wanted?
fn same(wanted: &EndpointSlice, stored: &EndpointSlice) -> bool {
    let has = |(name, value): (&String, &String)| {
        let labels = stored.metadata.labels.as_ref();
        labels.and_then(|labels| labels.get(name)) == Some(value)
    };
    wanted.endpoints == stored.endpoints
        && wanted.ports == stored.ports
        && wanted.metadata.labels.iter().flatten().all(has)
        && wanted.metadata.owner_references == stored.metadata.owner_references
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::relay::plan::{Conditions, NamedPort};

    const UID: &str = "u-1";

    fn endpoint(ready: bool) -> Endpoint {
        let port = |name: Option<&str>, number| NamedPort {
            name: name.map(str::to_owned),
            app_protocol: None,
            number,
        };
        Endpoint {
            service: Name::new("team", "web"),
            service_uid: "s-1".to_owned(),
            pod: "web-0".to_owned(),
            uid: UID.parse().unwrap(),
            ports: vec![port(Some("http"), 80), port(Some("admin"), 81)],
            conditions: Conditions {
                ready,
                serving: true,
                terminating: !ready,
            },
        }
    }

    fn place(address: &str) -> Place<'static> {
        Place {
            node: "knoc-a",
            address: address.parse().unwrap(),
        }
    }

    fn relayed(ports: &[(u16, u16)]) -> HashMap<PodPort, u16> {
        let one = |(number, port): &(u16, u16)| {
            let uid = UID.parse().unwrap();
            (
                PodPort {
                    uid,
                    number: *number,
                },
                *port,
            )
        };
        ports.iter().map(one).collect()
    }

    #[test]
    fn a_slice_has_the_kubelets_address_and_the_pods_relayed_ports() {
        let (name, slice) = slice(
            &endpoint(true),
            &place("10.0.0.7"),
            &relayed(&[(80, 11_000)]),
        )
        .unwrap();
        assert!(name.name.starts_with("web-knoc-") && &*name.namespace == "team");
        let object = serde_json::to_value(&slice).unwrap();
        assert_eq!(object["addressType"], "IPv4");
        assert_eq!(
            object["ports"],
            json!([{"name": "http", "port": 11_000, "protocol": "TCP"}])
        );
        assert_eq!(
            object["endpoints"],
            json!([{"addresses": ["10.0.0.7"], "conditions": {"ready": true, "serving": true, "terminating": false},
                "nodeName": "knoc-a", "targetRef": {"kind": "Pod", "namespace": "team", "name": "web-0", "uid": UID}}])
        );
        let labels = json!({"kubernetes.io/service-name": "web", "knoc.io/node": "knoc-a",
            "endpointslice.kubernetes.io/managed-by": "relay.knoc.io"});
        assert_eq!(object["metadata"]["labels"], labels);
        assert_eq!(object["metadata"]["ownerReferences"][0]["uid"], "s-1");
        assert!(is_own(&slice, "knoc-a") && !is_own(&slice, "knoc-b"));
        assert!(!is_own(&EndpointSlice::default(), "knoc-a"));
        let none = super::slice(&endpoint(true), &place("10.0.0.7"), &HashMap::new());
        assert!(none.is_none(), "no port is relayed");
        let (other, slice) = super::slice(
            &endpoint(true),
            &place("fd00::7"),
            &relayed(&[(81, 11_001)]),
        )
        .unwrap();
        assert_ne!(other, name, "the type of addresses cannot be changed");
        assert_eq!(slice.address_type, "IPv6");
        assert!(is_at(&slice, "fd00::7".parse().unwrap()));
        assert_eq!(ports_at(&slice, "fd00::7".parse().unwrap()), [11_001]);
        assert!(ports_at(&slice, "fd00::8".parse().unwrap()).is_empty());
    }

    #[test]
    fn only_what_differs_is_written() {
        let ports = relayed(&[(80, 11_000)]);
        let at = place("10.0.0.7");
        let (name, wanted) = slice(&endpoint(true), &at, &ports).unwrap();
        let all = BTreeMap::from([(name.clone(), wanted.clone())]);
        assert_eq!(
            changes(&all, &HashMap::new()),
            [Change::Create(name.clone(), wanted.clone())]
        );
        let mut stored = wanted.clone();
        stored.metadata.resource_version = Some("7".to_owned());
        stored.metadata.uid = Some("x".to_owned());
        let stored = HashMap::from([(name.clone(), stored)]);
        assert!(changes(&all, &stored).is_empty());
        let (_, leaving) = slice(&endpoint(false), &at, &ports).unwrap();
        let leaving = BTreeMap::from([(name.clone(), leaving)]);
        let changed = changes(&leaving, &stored);
        assert!(
            matches!(changed.as_slice(), [Change::Replace(..)]),
            "{changed:?}"
        );
        let gone = changes(&BTreeMap::new(), &stored);
        let [Change::Delete(deleted, meta)] = gone.as_slice() else {
            panic!("{gone:?}");
        };
        assert_eq!((deleted, meta.uid.as_deref()), (&name, Some("x")));
    }
}
