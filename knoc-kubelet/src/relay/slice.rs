//! PURE: the EndpointSlices of relayed pods: one for each pod and Service, because all endpoints of a slice share its ports, and
//! each pod has ports of its own at the kubelet's address. What differs in the API server, and how it is brought about.
//!
//! A slice is this kubelet's if its labels say so, whatever its name is. Its owner is the pod, so that Kubernetes deletes it with the
//! pod even if no kubelet is left. (A slice with two owners would stay until both are gone.)

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
use knoc_proto::ids::PodUid;

use super::plan::{Endpoint, PORTS, PodPort};
use crate::egress::table::Name;

/// The label of a slice that names its Service.
const OF_SERVICE: &str = "kubernetes.io/service-name";
/// The label of a slice that names who writes it, so that Kubernetes' own controllers leave it alone.
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
/// Its value for slices of kubelets of KNoC.
const MANAGER: &str = "relay.knoc.io";
/// The label of a slice that names the node whose kubelet writes it.
const OF_NODE: &str = "knoc.io/node";

/// The longest value of a label.
const LABEL: usize = 63;
/// The longest description of a pod in an endpoint: its namespace, name and UID.
const TARGET: usize = 1024;

/// The label selector of all slices of this node.
pub(super) fn of_node(node: &str) -> String {
    format!("{MANAGED_BY}={MANAGER},{OF_NODE}={node}")
}

/// Is the slice one of the kubelet of this node? Others must never be deleted, whatever the API server makes of the selector.
pub(super) fn is_own(slice: &EndpointSlice, node: &str) -> bool {
    let has = |name: &str, value: &str| {
        let labels = slice.metadata.labels.as_ref();
        labels
            .and_then(|labels| labels.get(name))
            .is_some_and(|it| it == value)
    };
    has(MANAGED_BY, MANAGER) && has(OF_NODE, node)
}

/// The kubelet that publishes relayed ports.
#[derive(Debug, Clone)]
pub(super) struct Publisher<'a> {
    /// The name of the node.
    pub(super) node: &'a str,
    /// The address at which the cluster reaches the kubelet.
    pub(super) address: IpAddr,
}

/// The slice of an endpoint whose ports of the pod have these ports of the kubelet; those without one are left out. `None` if no
/// port is left.
pub(super) fn slice(
    endpoint: &Endpoint,
    publisher: &Publisher<'_>,
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
    let name = name(endpoint, publisher);
    let slice = EndpointSlice {
        address_type: family(publisher.address).to_owned(),
        endpoints: Some(vec![kube_endpoint(endpoint, publisher)]),
        metadata: metadata(endpoint, publisher, &name),
        ports: Some(relayed),
    };
    Some((name, slice))
}

/// The family of an address, as slices and Services have it.
pub(super) fn family(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "IPv4" } else { "IPv6" }
}

/// The type of addresses cannot be changed, so it is part of the name.
fn name(endpoint: &Endpoint, publisher: &Publisher<'_>) -> Name {
    let mut hasher = DefaultHasher::new();
    (
        publisher.node,
        endpoint.uid.as_str(),
        family(publisher.address),
    )
        .hash(&mut hasher);
    Name {
        namespace: endpoint.service.namespace.clone(),
        name: format!("{}-knoc-{:016x}", endpoint.service.name, hasher.finish()).into(),
    }
}

fn kube_endpoint(endpoint: &Endpoint, publisher: &Publisher<'_>) -> KubeEndpoint {
    KubeEndpoint {
        addresses: vec![publisher.address.to_string()],
        conditions: Some(EndpointConditions {
            ready: Some(endpoint.conditions.ready),
            serving: Some(endpoint.conditions.serving),
            terminating: Some(endpoint.conditions.terminating),
        }),
        node_name: Some(publisher.node.to_owned()),
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

fn metadata(endpoint: &Endpoint, publisher: &Publisher<'_>, name: &Name) -> ObjectMeta {
    let labels = [
        (OF_SERVICE, endpoint.service.name.to_string()),
        (MANAGED_BY, MANAGER.to_owned()),
        (OF_NODE, publisher.node.to_owned()),
    ];
    ObjectMeta {
        namespace: Some(name.namespace.to_string()),
        name: Some(name.name.to_string()),
        labels: Some(labels.map(|(name, value)| (name.to_owned(), value)).into()),
        owner_references: Some(vec![OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Pod".to_owned(),
            name: endpoint.pod.clone(),
            uid: endpoint.uid.to_string(),
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

/// The part of a stored slice that is remembered; `None` if it is not this kubelet's. Others may have written to it, and a large
/// object must not fill the memory: of what this kubelet would never write only so much is kept that the slice differs from every
/// wanted one.
pub(super) fn remembered(slice: EndpointSlice, node: &str) -> Option<EndpointSlice> {
    if !is_own(&slice, node) {
        return None;
    }
    let meta = slice.metadata;
    let labels = meta.labels.unwrap_or_default();
    let labels = labels.into_iter().filter(|(name, value)| {
        [OF_SERVICE, MANAGED_BY, OF_NODE].contains(&name.as_str()) && value.len() <= LABEL
    });
    let endpoints = slice.endpoints.filter(|all| all.iter().all(is_plain));
    Some(EndpointSlice {
        address_type: slice.address_type,
        endpoints: endpoints.filter(|all| all.len() == 1),
        metadata: ObjectMeta {
            name: meta.name,
            namespace: meta.namespace,
            uid: meta.uid,
            resource_version: meta.resource_version,
            labels: Some(labels.collect()),
            owner_references: meta.owner_references.filter(|owners| owners.len() == 1),
            ..ObjectMeta::default()
        },
        ports: slice.ports.filter(|ports| ports.len() <= PORTS),
    })
}

/// Could this kubelet have written the endpoint?
fn is_plain(endpoint: &KubeEndpoint) -> bool {
    let KubeEndpoint {
        addresses,
        conditions: _,
        deprecated_topology,
        hints,
        hostname,
        node_name: _,
        target_ref,
        zone,
    } = endpoint;
    let target = target_ref.iter().flat_map(|it| {
        let more = [&it.api_version, &it.field_path, &it.resource_version];
        let names = [&it.kind, &it.namespace, &it.name, &it.uid];
        more.into_iter().chain(names)
    });
    let target: usize = target.flatten().map(String::len).sum();
    let others = deprecated_topology.is_none() && hints.is_none() && hostname.is_none();
    addresses.len() == 1 && others && zone.is_none() && target <= TARGET
}

/// What has to be written.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Change {
    Create(Name, EndpointSlice),
    Replace(Name, EndpointSlice),
    /// With the metadata of the version that is deleted.
    Delete(Name, ObjectMeta),
}

impl Change {
    /// The name of the slice.
    pub(super) fn name(&self) -> &Name {
        match self {
            Self::Create(name, _) | Self::Replace(name, _) | Self::Delete(name, _) => name,
        }
    }

    /// The Service and the pod that the slice joins; `None` if the slice is deleted.
    pub(super) fn joins(&self) -> Option<(Name, PodUid)> {
        let (name, slice) = match self {
            Self::Create(name, slice) | Self::Replace(name, slice) => (name, slice),
            Self::Delete(..) => return None,
        };
        let service = slice.metadata.labels.as_ref()?.get(OF_SERVICE)?;
        let owner = slice.metadata.owner_references.as_ref()?.first()?;
        let pod = PodUid::try_from(owner.uid.clone()).ok()?;
        Some((Name::new(&name.namespace, service), pod))
    }
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
            // This cannot be changed. Once the watch says that the slice is gone, it is created.
            Some(stored) if stored.address_type != slice.address_type => {
                Some(Change::Delete(name, stored.metadata.clone()))
            }
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

    fn publisher(address: &str) -> Publisher<'static> {
        Publisher {
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
            &publisher("10.0.0.7"),
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
        let owner = &object["metadata"]["ownerReferences"][0];
        assert_eq!(
            (&owner["kind"], &owner["uid"]),
            (&json!("Pod"), &json!(UID))
        );
        assert!(is_own(&slice, "knoc-a") && !is_own(&slice, "knoc-b"));
        assert!(!is_own(&EndpointSlice::default(), "knoc-a"));
        let none = super::slice(&endpoint(true), &publisher("10.0.0.7"), &HashMap::new());
        assert!(none.is_none(), "no port is relayed");
        let (other, slice) = super::slice(
            &endpoint(true),
            &publisher("fd00::7"),
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
    fn what_others_wrote_into_a_slice_is_not_remembered_and_differs() {
        let ports = relayed(&[(80, 11_000)]);
        let (name, wanted) = slice(&endpoint(true), &publisher("10.0.0.7"), &ports).unwrap();
        let all = BTreeMap::from([(name.clone(), wanted.clone())]);
        let changed = |stored: &EndpointSlice| {
            let stored = remembered(stored.clone(), "knoc-a").unwrap();
            assert!(serde_json::to_vec(&stored).unwrap().len() < 2048);
            !changes(&all, &HashMap::from([(name.clone(), stored)])).is_empty()
        };
        let mut noted = wanted.clone();
        let note = ("note".to_owned(), "x".repeat(100_000));
        noted.metadata.annotations = Some(BTreeMap::from([note.clone()]));
        noted
            .metadata
            .labels
            .as_mut()
            .unwrap()
            .insert("more".to_owned(), "x".repeat(63));
        assert!(
            !changed(&noted),
            "labels and annotations of others may stay"
        );
        let mut many = wanted.clone();
        let one = many.endpoints.as_ref().unwrap()[0].clone();
        many.endpoints = Some(vec![one.clone(); 1000]);
        assert!(changed(&many));
        let mut zone = wanted.clone();
        zone.endpoints.as_mut().unwrap()[0].zone = Some("x".repeat(100_000));
        assert!(changed(&zone));
        let mut target = wanted.clone();
        let reference = target.endpoints.as_mut().unwrap()[0]
            .target_ref
            .as_mut()
            .unwrap();
        reference.field_path = Some("x".repeat(100_000));
        assert!(changed(&target));
        let mut ports = wanted.clone();
        let port = ports.ports.as_ref().unwrap()[0].clone();
        ports.ports = Some(vec![port; 20_000]);
        assert!(changed(&ports));
        assert!(remembered(wanted, "knoc-b").is_none());
    }

    #[test]
    fn only_what_differs_is_written() {
        let ports = relayed(&[(80, 11_000)]);
        let at = publisher("10.0.0.7");
        let (name, wanted) = slice(&endpoint(true), &at, &ports).unwrap();
        let all = BTreeMap::from([(name.clone(), wanted.clone())]);
        let created = changes(&all, &HashMap::new());
        assert_eq!(created, [Change::Create(name.clone(), wanted.clone())]);
        let joined = (Name::new("team", "web"), UID.parse().unwrap());
        assert_eq!(created[0].joins(), Some(joined));
        let deleted = Change::Delete(name.clone(), wanted.metadata.clone());
        assert_eq!(deleted.joins(), None);
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
        let mut odd = stored.clone();
        odd.get_mut(&name).unwrap().address_type = "FQDN".to_owned();
        let odd = changes(&all, &odd);
        assert!(matches!(odd.as_slice(), [Change::Delete(..)]), "{odd:?}");
        let gone = changes(&BTreeMap::new(), &stored);
        let [Change::Delete(deleted, meta)] = gone.as_slice() else {
            panic!("{gone:?}");
        };
        assert_eq!((deleted, meta.uid.as_deref()), (&name, Some("x")));
    }
}
