//! PURE: extended resources that somebody else, such as an administrator, added to the Node's capacity. As on any node they
//! are kept, become allocatable and are counted at admission; nothing of them is requested from Slurm (ADR 0098).

use std::collections::BTreeMap;

use k8s_openapi::{api::core::v1::NodeStatus, apimachinery::pkg::api::resource::Quantity};
use knoc_proto::pb;

/// Amounts by the name of the resource.
type Pieces = BTreeMap<String, i64>;

/// Resources that are always the node's own.
const OWN: [&str; 4] = ["cpu", "memory", "ephemeral-storage", "pods"];

/// The foreign resources of a Node's status. Empty as long as the agent has not reported which resources are the site's.
pub(crate) fn resources(status: Option<&NodeStatus>, site: Option<&pb::NodeInfo>) -> Pieces {
    let capacity = status.and_then(|status| status.capacity.as_ref());
    let (Some(capacity), Some(site)) = (capacity, site) else {
        return Pieces::new();
    };
    let foreign = capacity.iter().filter(|(name, _)| is_foreign(name, site));
    foreign
        .filter_map(|(name, amount)| Some((name.clone(), pieces(amount)?)))
        .collect()
}

/// Is it a foreign resource?
fn is_foreign(name: &str, site: &pb::NodeInfo) -> bool {
    // Only extended resources have a domain in their names; a kubelet reports those under `kubernetes.io/` itself.
    name.contains('/') && !name.starts_with("kubernetes.io/") && !is_sites(name, site)
}

/// Is it a resource of every node, or one that the site file maps to a resource of Slurm?
fn is_sites(name: &str, site: &pb::NodeInfo) -> bool {
    OWN.contains(&name) || site.extended.contains_key(name)
}

fn pieces(amount: &Quantity) -> Option<i64> {
    let pieces = knoc_translate::quantity::units(amount).ok()?;
    (pieces > 0).then_some(pieces)
}

/// The resources of the Node's status that the site maps but no longer has: a patch removes them with null.
pub(crate) fn gone(status: Option<&NodeStatus>, site: &pb::NodeInfo) -> Vec<String> {
    let capacity = status.and_then(|status| status.capacity.as_ref());
    let shown = |name: &String| capacity.is_some_and(|capacity| capacity.contains_key(name));
    let none = site.extended.iter().filter(|(_, amount)| **amount == 0);
    none.map(|(name, _)| name.clone()).filter(shown).collect()
}

/// Removes the foreign resources from the shape, because the agent does not know them. They were counted at admission.
pub(crate) fn leave_out(shape: &mut pb::PodSpec, site: &pb::NodeInfo) {
    let all = shape
        .init_containers
        .iter_mut()
        .chain(&mut shape.containers);
    for container in all {
        let lists = [&mut container.requests, &mut container.limits];
        for list in lists.into_iter().flatten() {
            list.extended.retain(|name, _| is_sites(name, site));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn status() -> NodeStatus {
        serde_json::from_value(json!({"capacity": {
            "cpu": "4", "memory": "1Gi", "pods": "10", "ephemeral-storage": "1",
            "hugepages-2Mi": "0", "nvidia.com/gpu": "2", "amd.com/gpu": "1",
            "example.com/licence": "5", "example.com/none": "0",
        }}))
        .unwrap()
    }

    fn site() -> pb::NodeInfo {
        pb::NodeInfo {
            extended: [
                ("nvidia.com/gpu".to_owned(), 2),
                ("amd.com/gpu".to_owned(), 0),
            ]
            .into(),
            ..pb::NodeInfo::default()
        }
    }

    #[test]
    fn what_somebody_else_put_there_is_foreign() {
        let found = resources(Some(&status()), Some(&site()));
        assert_eq!(found, Pieces::from([("example.com/licence".to_owned(), 5)]));
        assert!(resources(Some(&status()), None).is_empty());
        assert!(resources(None, Some(&site())).is_empty());
    }

    #[test]
    fn what_the_site_has_none_of_any_more_goes() {
        assert_eq!(gone(Some(&status()), &site()), ["amd.com/gpu"]);
        assert!(gone(None, &site()).is_empty());
    }

    #[test]
    fn the_agent_is_asked_only_for_the_sites_resources() {
        let list = || {
            let extended = ["nvidia.com/gpu", "example.com/licence"];
            Some(pb::Resources {
                cpu_millis: 1,
                extended: extended.map(|name| (name.to_owned(), 1)).into(),
                ..pb::Resources::default()
            })
        };
        let container = || pb::Container {
            requests: list(),
            limits: list(),
            ..pb::Container::default()
        };
        let mut shape = pb::PodSpec {
            init_containers: vec![container()],
            containers: vec![container(), pb::Container::default()],
            ..pb::PodSpec::default()
        };
        leave_out(&mut shape, &site());
        let left = |list: &Option<pb::Resources>| {
            let list = list.as_ref().unwrap();
            assert_eq!(list.cpu_millis, 1);
            list.extended.keys().cloned().collect::<Vec<_>>()
        };
        for container in [&shape.init_containers[0], &shape.containers[0]] {
            assert_eq!(left(&container.requests), ["nvidia.com/gpu"]);
            assert_eq!(left(&container.limits), ["nvidia.com/gpu"]);
        }
    }
}
