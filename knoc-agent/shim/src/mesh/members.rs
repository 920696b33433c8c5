//! PURE: what the shim knows about the addresses of other pods, and what it still has to ask the agent.
//!
//! ```text
//!           want                learn
//!   (none) ──────► Asked ───────────────► Present, Away, Nobody or Denied ◄─┐
//!      ▲                                    │          └────── learn ───────┘
//!      └──────────── leave, by the last user ┘
//! ```
//!
//! An address stays known as long as somebody uses it. While there is no link, what was learned stays as it is: tunnels go on
//! without the agent. For the same reason a member that is present does not become away.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
};

use knoc_proto::{
    mesh::{MAX_ASKED, endpoint},
    pb::{self, MeshMemberState, mesh_question::Question},
    text::quote,
};

/// How much of a wrong text an error shows.
const SHOWN: usize = 80;
/// The length of a pin: SHA-256 in hexadecimal digits.
const PIN: usize = 64;

/// Another pod, as the agent describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Member {
    /// The pin of the key of its shim.
    pub(super) spki: String,
    /// Where its shim takes tunnels.
    pub(super) endpoint: SocketAddr,
}

/// What is known about an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum State {
    /// The agent has not answered yet.
    Asked,
    Present(Member),
    /// A pod has it, whose shim has no link to the agent.
    Away,
    /// No pod has it.
    Nobody,
    /// The site does not let the pods reach each other.
    Denied,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    /// Of all entries. Whoever was asked about an address answers for this entry, and not for one that comes after it.
    id: u64,
    users: usize,
    state: State,
    /// The number of the newest tunnel from there; 0: none yet.
    newest: u64,
}

/// All addresses that somebody uses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Members {
    entries: BTreeMap<Ipv4Addr, Entry>,
    /// The id of the newest entry.
    newest: u64,
}

impl Members {
    /// Somebody uses this address from now on. Returns false if too many are in use.
    #[must_use]
    pub(super) fn want(&mut self, address: Ipv4Addr) -> bool {
        if self.entries.len() >= MAX_ASKED && !self.entries.contains_key(&address) {
            return false;
        }
        let next = self.newest + 1;
        let entry = self.entries.entry(address).or_insert(Entry {
            id: next,
            users: 0,
            state: State::Asked,
            newest: 0,
        });
        entry.users += 1;
        self.newest = self.newest.max(entry.id);
        true
    }

    /// Somebody has stopped to use it.
    pub(super) fn leave(&mut self, address: Ipv4Addr) {
        if let Some(entry) = self.entries.get_mut(&address) {
            entry.users = entry.users.saturating_sub(1);
            if entry.users == 0 {
                self.entries.remove(&address);
            }
        }
    }

    /// What is known about it; `None` if nobody uses it.
    pub(super) fn state(&self, address: Ipv4Addr) -> Option<&State> {
        self.entries.get(&address).map(|entry| &entry.state)
    }

    /// Is the pod with this key there?
    pub(super) fn has(&self, address: Ipv4Addr, spki: &str) -> bool {
        matches!(self.state(address), Some(State::Present(member)) if member.spki == spki)
    }

    /// A tunnel from there begins; those before it end. Returns its number.
    pub(super) fn enter(&mut self, address: Ipv4Addr) -> u64 {
        self.entries.get_mut(&address).map_or(0, |entry| {
            entry.newest += 1;
            entry.newest
        })
    }

    /// Is this the newest tunnel from there?
    pub(super) fn is_newest(&self, address: Ipv4Addr, number: u64) -> bool {
        let entry = self.entries.get(&address);
        entry.is_some_and(|entry| entry.newest == number)
    }

    /// Takes up what the agent says. Returns whether it changes anything.
    pub(super) fn learn(&mut self, told: &pb::MeshMember) -> Result<bool, String> {
        let shown = || quote(&told.address, SHOWN);
        let address = told.address.parse::<Ipv4Addr>();
        let address = address.map_err(|_| format!("{} is not an IPv4 address", shown()))?;
        let state = match told.state() {
            MeshMemberState::Present => State::Present(member(told)?),
            MeshMemberState::Away => State::Away,
            MeshMemberState::Nobody => State::Nobody,
            MeshMemberState::Denied => State::Denied,
            MeshMemberState::Unspecified => {
                let what = format!("the state of {} is not known to this version", shown());
                return Err(what);
            }
        };
        // It may come after the last user has left.
        let Some(entry) = self.entries.get_mut(&address) else {
            return Ok(false);
        };
        // While its shim has no link to the agent, the pod has the same key at the same place.
        let stays = matches!((&entry.state, &state), (State::Present(_), State::Away));
        let changes = entry.state != state && !stays;
        if changes {
            entry.state = state;
        }
        Ok(changes)
    }

    /// Sets what is known about an address that somebody uses, whatever the agent may say.
    #[cfg(test)]
    pub(super) fn set(&mut self, address: Ipv4Addr, state: State) {
        if let Some(entry) = self.entries.get_mut(&address) {
            entry.state = state;
        }
    }

    /// The next question for an agent that was asked about the addresses `told`, each with the entry for which it was asked. Returns the
    /// entry, too.
    pub(super) fn next(&self, told: &BTreeMap<Ipv4Addr, u64>) -> Option<(Question, u64)> {
        // First those that make room.
        let gone = told.iter().find(|(address, id)| {
            let entry = self.entries.get(*address);
            entry.is_none_or(|entry| entry.id != **id)
        });
        if let Some((address, id)) = gone {
            return Some((Question::Forget(address.to_string()), *id));
        }
        let mut entries = self.entries.iter();
        let new = entries.find(|(address, _)| !told.contains_key(*address));
        new.map(|(address, entry)| (Question::Ask(address.to_string()), entry.id))
    }
}

fn member(told: &pb::MeshMember) -> Result<Member, String> {
    let is_pin =
        |text: &str| text.len() == PIN && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let Some(endpoint) = endpoint(&told.endpoint).filter(|_| is_pin(&told.spki)) else {
        return Err(format!(
            "{} has the key {} and the endpoint {}, which are not the digest of a key and the port of a host",
            quote(&told.address, SHOWN),
            quote(&told.spki, SHOWN),
            quote(&told.endpoint, SHOWN)
        ));
    };
    Ok(Member {
        spki: told.spki.clone(),
        endpoint,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 7);
    const TWO: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 8);

    fn told(address: Ipv4Addr, state: MeshMemberState) -> pb::MeshMember {
        pb::MeshMember {
            address: address.to_string(),
            state: state.into(),
            spki: "a".repeat(PIN),
            endpoint: "10.0.0.7:4001".to_owned(),
        }
    }

    #[test]
    fn an_address_is_known_as_long_as_somebody_uses_it() {
        let mut members = Members::default();
        assert_eq!(members.state(ONE), None);
        assert!(members.want(ONE) && members.want(ONE));
        assert_eq!(members.state(ONE), Some(&State::Asked));
        let present = told(ONE, MeshMemberState::Present);
        assert_eq!(members.learn(&present), Ok(true));
        assert_eq!(members.learn(&present), Ok(false));
        assert!(members.has(ONE, &"a".repeat(PIN)) && !members.has(ONE, &"b".repeat(PIN)));
        // Tunnels go on while the other shim has no link to the agent.
        assert_eq!(members.learn(&told(ONE, MeshMemberState::Away)), Ok(false));
        assert!(members.has(ONE, &"a".repeat(PIN)));
        for (state, known) in [
            (MeshMemberState::Denied, State::Denied),
            (MeshMemberState::Nobody, State::Nobody),
            (MeshMemberState::Away, State::Away),
        ] {
            assert_eq!(members.learn(&told(ONE, state)), Ok(true));
            assert_eq!(members.state(ONE), Some(&known));
        }
        members.leave(ONE);
        assert!(members.state(ONE).is_some());
        members.leave(ONE);
        members.leave(ONE);
        assert_eq!(members.state(ONE), None);
        assert_eq!(members.learn(&present), Ok(false), "nobody uses it");
    }

    #[test]
    fn what_is_not_asked_yet_is_asked_and_what_nobody_uses_is_forgotten() {
        let mut members = Members::default();
        assert!(members.want(TWO) && members.want(ONE));
        let mut told = BTreeMap::new();
        let ask = |address: Ipv4Addr, id| Some((Question::Ask(address.to_string()), id));
        let forget = |address: Ipv4Addr, id| Some((Question::Forget(address.to_string()), id));
        assert_eq!(members.next(&told), ask(ONE, 2));
        told.insert(ONE, 2);
        assert_eq!(members.next(&told), ask(TWO, 1));
        told.insert(TWO, 1);
        assert_eq!(members.next(&told), None);
        members.leave(ONE);
        assert_eq!(members.next(&told), forget(ONE, 2));
        // Whoever uses it again before that was said asks again: the agent tells changes only.
        assert!(members.want(ONE));
        assert_eq!(members.next(&told), forget(ONE, 2));
        told.remove(&ONE);
        assert_eq!(members.next(&told), ask(ONE, 3));
        told.insert(ONE, 3);
        assert_eq!(members.next(&told), None);
        // A new agent is asked everything again.
        assert_eq!(members.next(&BTreeMap::new()), ask(ONE, 3));
    }

    #[test]
    fn the_number_of_addresses_is_bounded() {
        let mut members = Members::default();
        for number in 0..MAX_ASKED {
            let number = u32::try_from(number).unwrap();
            assert!(members.want(Ipv4Addr::from_bits(ONE.to_bits() + number)));
        }
        assert!(members.want(ONE));
        let further = Ipv4Addr::new(10, 201, 0, 1);
        assert!(!members.want(further));
        members.leave(TWO);
        assert!(members.want(further));
    }

    #[test]
    fn only_the_newest_tunnel_from_an_address_goes_on() {
        let mut members = Members::default();
        assert!(members.want(ONE));
        let first = members.enter(ONE);
        assert!(members.is_newest(ONE, first));
        let second = members.enter(ONE);
        assert!(members.is_newest(ONE, second) && !members.is_newest(ONE, first));
        members.leave(ONE);
        assert!(!members.is_newest(ONE, second));
    }

    #[test]
    fn what_the_agent_says_wrong_is_named() {
        let mut members = Members::default();
        let good = told(ONE, MeshMemberState::Present);
        let wrong = [
            pb::MeshMember {
                address: "web-0".to_owned(),
                ..good.clone()
            },
            pb::MeshMember {
                spki: "a".repeat(PIN - 1),
                ..good.clone()
            },
            pb::MeshMember {
                endpoint: "127.0.0.1:22".to_owned(),
                ..good.clone()
            },
            pb::MeshMember { state: 99, ..good },
        ];
        for one in wrong {
            let error = members.learn(&one).unwrap_err();
            let named = error.contains(&one.address) || error.contains("web-0");
            assert!(named, "{error}");
        }
    }
}
