//! PURE: whose address is whose, where the shim of each pod takes tunnels, and what another pod's shim is told about it.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddr},
};

use knoc_proto::pb::{self, MeshMemberState as State};

/// A pod that takes part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) namespace: String,
    /// The pin of the key of its shim.
    pub(super) spki: String,
    /// The number of the call that announced it.
    pub(super) number: u64,
    /// Where its shim takes tunnels; `None` while the shim has no link.
    pub(super) endpoint: Option<SocketAddr>,
}

/// All pods that have an address, as far as their shims were seen.
#[derive(Debug, Default)]
pub(super) struct Members(HashMap<Ipv4Addr, Member>);

impl Members {
    /// Takes up a pod, or a newer link of one.
    pub(super) fn put(&mut self, address: Ipv4Addr, member: Member) {
        self.0.insert(address, member);
    }

    /// The link with this number has ended. Returns whether that changes anything.
    pub(super) fn away(&mut self, address: Ipv4Addr, number: u64) -> bool {
        match self.0.get_mut(&address) {
            Some(member) if member.number == number => member.endpoint.take().is_some(),
            Some(_) | None => false,
        }
    }

    /// The pod has ended. Returns whether that changes anything.
    pub(super) fn remove(&mut self, address: Ipv4Addr) -> bool {
        self.0.remove(&address).is_some()
    }

    /// What a pod of the namespace `asker` may know about an address. `permits` is asked about both namespaces.
    pub(super) fn look(
        &self,
        asker: &str,
        address: Ipv4Addr,
        permits: impl Fn(&str, &str) -> bool,
    ) -> pb::MeshMember {
        let mut answer = pb::MeshMember {
            address: address.to_string(),
            state: State::Nobody.into(),
            ..pb::MeshMember::default()
        };
        let Some(member) = self.0.get(&address) else {
            return answer;
        };
        if !permits(asker, &member.namespace) {
            answer.set_state(State::Denied);
            return answer;
        }
        match member.endpoint {
            None => answer.set_state(State::Away),
            Some(endpoint) => {
                answer.set_state(State::Present);
                answer.spki.clone_from(&member.spki);
                answer.endpoint = endpoint.to_string();
            }
        }
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 7);

    fn member(number: u64) -> Member {
        Member {
            namespace: "shop".to_owned(),
            spki: format!("key{number}"),
            number,
            endpoint: Some("10.0.0.7:4001".parse().unwrap()),
        }
    }

    fn same(one: &str, other: &str) -> bool {
        one == other
    }

    #[test]
    fn who_may_not_reach_a_pod_learns_neither_its_key_nor_its_node() {
        let mut members = Members::default();
        let of = |members: &Members, asker: &str| members.look(asker, ADDRESS, same);
        assert_eq!(of(&members, "shop").state(), State::Nobody);
        members.put(ADDRESS, member(1));
        let present = of(&members, "shop");
        assert_eq!(present.state(), State::Present);
        assert_eq!(
            (&*present.spki, &*present.endpoint),
            ("key1", "10.0.0.7:4001")
        );
        assert_eq!(present.address, "10.200.0.7");
        let denied = of(&members, "other");
        assert_eq!(denied.state(), State::Denied);
        assert!(denied.spki.is_empty() && denied.endpoint.is_empty());
        let permitted = members.look("other", ADDRESS, |_, _| true);
        assert_eq!(permitted.state(), State::Present);
    }

    #[test]
    fn the_late_end_of_an_older_link_changes_nothing() {
        let mut members = Members::default();
        members.put(ADDRESS, member(1));
        members.put(ADDRESS, member(2));
        assert!(!members.away(ADDRESS, 1));
        assert_eq!(members.look("shop", ADDRESS, same).spki, "key2");
        assert!(members.away(ADDRESS, 2));
        assert!(!members.away(ADDRESS, 2));
        let away = members.look("shop", ADDRESS, same);
        assert_eq!((away.state(), &*away.spki), (State::Away, ""));
        assert!(members.remove(ADDRESS) && !members.remove(ADDRESS));
        assert_eq!(members.look("shop", ADDRESS, same).state(), State::Nobody);
    }
}
