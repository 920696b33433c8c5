//! The mesh: the pods that have an address of their own, and what their shims are told about each other (ADR 0123).
//!
//! ```text
//! pod's actor ── give, restore, take_back ──► addresses      recorded by the actor before anybody is told
//! shim ═ JoinMesh ═► its endpoint ──────────► members
//!                ◄── who has an address ────  members, as far as `[policy] pod_traffic` lets this pod know
//! ```
//!
//! [`shim::follow`] serves one shim, as a part of the task that follows its link. The packets do not pass the agent, unless compute
//! nodes do not reach each other ([`carry`]).

mod addresses;
mod carry;
mod members;
mod shim;

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use knoc_link::bulk::RawClient;
use knoc_proto::{
    ids::PodUid,
    mesh::{MAX_RANGES, NamespacePairs, PodRange},
    pb::{self, MeshMemberState, shim_client::ShimClient},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::Instant,
};
use tonic::transport::Channel;

use self::{
    addresses::Addresses,
    members::{Member, Members},
};
use crate::policy::Live;

pub(crate) use self::{addresses::Exhausted, shim::Shim};

/// How many tunnels are carried for all shims: each has buffers here, and takes streams of two links.
const CARRIED: usize = 1024;

/// The client of a shim.
type Client = ShimClient<RawClient<Channel>>;

/// A handle to the mesh; clones share it.
#[derive(Debug, Clone)]
pub struct Mesh(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    addresses: Mutex<Addresses>,
    members: Mutex<Members>,
    /// The shims that are present, each with the number of its link.
    clients: Mutex<HashMap<Ipv4Addr, (u64, Client)>>,
    /// The tunnels that may still be carried.
    carried: Arc<Semaphore>,
    /// Grows with every change of `members`, and of the ranges of `addresses`.
    changes: watch::Sender<u64>,
    /// The number of the newest link of a shim.
    newest: AtomicU64,
    policy: Live,
}

impl Mesh {
    /// A mesh without pods. `seed` decides with which addresses it begins, and should be random.
    #[must_use]
    pub fn new(policy: Live, seed: u32) -> Self {
        Self(Arc::new(Shared {
            addresses: Mutex::new(Addresses::new(seed)),
            members: Mutex::default(),
            clients: Mutex::default(),
            carried: Arc::new(Semaphore::new(CARRIED)),
            changes: watch::Sender::new(0),
            newest: AtomicU64::new(0),
            policy,
        }))
    }

    /// The address of the pod, a new one of this range if it has none. The caller records it before it tells anybody.
    pub(crate) fn give(&self, uid: &PodUid, range: PodRange) -> Result<Ipv4Addr, Exhausted> {
        let mut addresses = lock(&self.0.addresses);
        let before = addresses.ranges().len();
        let given = addresses.give(uid, range, Instant::now());
        let is_new = addresses.ranges().len() > before;
        if given.is_ok() && !addresses.ranges().contains(&range) {
            tracing::warn!(%uid, %range, "pods have addresses of {MAX_RANGES} other ranges already: those of this range are reached by pods of it only");
        }
        drop(addresses);
        if is_new {
            self.changed();
        }
        given
    }

    /// Takes up a pod of this range whose record names this address. Returns false if another pod has it.
    #[must_use]
    pub(crate) fn restore(&self, uid: &PodUid, address: Ipv4Addr, range: Option<PodRange>) -> bool {
        lock(&self.0.addresses).restore(uid, address, range)
    }

    /// The ranges of all pods.
    pub(crate) fn ranges(&self) -> Vec<String> {
        let addresses = lock(&self.0.addresses);
        addresses.ranges().iter().map(ToString::to_string).collect()
    }

    /// The job of the pod has ended, or the pod is forgotten: its address may be given to another pod after a while.
    pub(crate) fn take_back(&self, uid: &PodUid) {
        // Held meanwhile, so that its shim does not take part again in between.
        let mut addresses = lock(&self.0.addresses);
        let address = addresses.take_back(uid, Instant::now());
        let changes = address.is_some_and(|address| lock(&self.0.members).remove(address));
        drop(addresses);
        if changes {
            self.changed();
        }
    }

    /// Serves the shim of a pod until this is dropped.
    pub(crate) async fn follow(&self, shim: Shim) {
        shim::follow(self, shim).await;
    }

    /// The shim of a pod takes tunnels at `endpoint`, until the result is dropped. `None` if the address is not the pod's any more: its
    /// job has ended, and another pod may have the address.
    fn register(
        &self,
        uid: &PodUid,
        (namespace, spki): (&str, &str),
        endpoint: SocketAddr,
    ) -> Option<Registered> {
        let addresses = lock(&self.0.addresses);
        let address = addresses.of_pod(uid)?;
        let number = self.0.newest.fetch_add(1, Ordering::Relaxed);
        let member = Member {
            namespace: namespace.to_owned(),
            spki: spki.to_owned(),
            number,
            endpoint: Some(endpoint),
        };
        lock(&self.0.members).put(address, member);
        drop(addresses);
        self.changed();
        Some(Registered {
            mesh: self.clone(),
            address,
            number,
        })
    }

    /// Tunnels to the shim with this place may be carried over this link.
    fn lend(&self, place: &Registered, client: Client) {
        lock(&self.0.clients).insert(place.address, (place.number, client));
    }

    /// The shim of the pod with this address, if it has a link.
    fn client(&self, address: Ipv4Addr) -> Option<Client> {
        let clients = lock(&self.0.clients);
        clients.get(&address).map(|(_, client)| client.clone())
    }

    /// A place for one more tunnel that is carried, until it is dropped. `None` if there are too many.
    fn carried(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.0.carried).try_acquire_owned().ok()
    }

    /// Whether more than half of these places are taken, so that a pod should not have many.
    fn is_crowded(&self) -> bool {
        self.0.carried.available_permits() < CARRIED / 2
    }

    /// Between which namespaces pods reach each other now.
    fn permitted(&self) -> NamespacePairs {
        self.0.policy.now().pod_traffic()
    }

    /// What a pod of the namespace `asker` may know about an address.
    fn look(&self, permitted: &NamespacePairs, asker: &str, address: Ipv4Addr) -> pb::MeshMember {
        let permits = |one: &str, other: &str| permitted.permits(one, other);
        let mut member = lock(&self.0.members).look(asker, address, permits);
        // After a restart shims come back one after the other.
        let is_given = || lock(&self.0.addresses).is_given(address);
        if member.state() == MeshMemberState::Nobody && is_given() {
            member.set_state(MeshMemberState::Away);
        }
        member
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.0.changes.subscribe()
    }

    fn changed(&self) {
        self.0.changes.send_modify(|count| *count += 1);
    }
}

/// The place of one shim among the members.
#[derive(Debug)]
struct Registered {
    mesh: Mesh,
    address: Ipv4Addr,
    number: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut clients = lock(&self.mesh.0.clients);
        let own = |(number, _): &(u64, Client)| *number == self.number;
        if clients.get(&self.address).is_some_and(own) {
            clients.remove(&self.address);
        }
        drop(clients);
        if lock(&self.mesh.0.members).away(self.address, self.number) {
            self.mesh.changed();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use knoc_proto::pb::MeshMemberState as State;

    use super::*;
    use crate::config::Policy;

    fn uid(name: &str) -> PodUid {
        PodUid::try_from(name).unwrap()
    }

    fn mesh(pairs: &[&str]) -> Mesh {
        let policy = Policy {
            pod_traffic: pairs.iter().map(|&pair| pair.to_owned()).collect(),
            ..Policy::default()
        };
        Mesh::new(Live::fixed(policy), 0)
    }

    fn look(mesh: &Mesh, asker: &str, address: Ipv4Addr) -> State {
        mesh.look(&mesh.permitted(), asker, address).state()
    }

    #[test]
    fn a_pod_is_present_while_its_shim_is_linked_and_gone_once_its_job_is() {
        let mesh = mesh(&[]);
        let mut changes = mesh.changes();
        let range = "10.200.0.0/16".parse().unwrap();
        let address = mesh.give(&uid("a"), range).unwrap();
        let look = || look(&mesh, "shop", address);
        assert_eq!(look(), State::Away, "its shim has no link yet");
        let endpoint = "10.0.0.7:4001".parse().unwrap();
        let older = mesh.register(&uid("a"), ("shop", "key"), endpoint);
        assert_eq!(look(), State::Present);
        let newer = mesh.register(&uid("a"), ("shop", "key"), endpoint);
        assert!(older.is_some() && newer.is_some());
        drop(older);
        assert_eq!(look(), State::Present);
        changes.borrow_and_update();
        drop(newer);
        assert_eq!(look(), State::Away);
        assert!(changes.has_changed().unwrap());
        mesh.take_back(&uid("a"));
        assert_eq!(look(), State::Nobody);
        assert_ne!(mesh.give(&uid("b"), range), Ok(address));
        // Whoever has the key of a pod that has ended takes nobody's place.
        let late = mesh.register(&uid("a"), ("shop", "key"), endpoint);
        assert!(late.is_none());
        assert_eq!(look(), State::Nobody);
    }

    #[test]
    fn traffic_between_namespaces_needs_the_sites_permission() {
        let address = Ipv4Addr::new(10, 200, 0, 7);
        let endpoint = "10.0.0.7:4001".parse().unwrap();
        for (pairs, expected) in [
            (&[][..], State::Denied),
            (&["shop:other"][..], State::Denied),
            (&["team-*:shop"][..], State::Present),
        ] {
            let mesh = mesh(pairs);
            assert!(mesh.restore(&uid("a"), address, None));
            let registered = mesh.register(&uid("a"), ("shop", "key"), endpoint);
            assert_eq!(look(&mesh, "team-a", address), expected, "{pairs:?}");
            assert_eq!(look(&mesh, "shop", address), State::Present);
            drop(registered);
        }
    }
}
