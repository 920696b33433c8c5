//! The mesh: the pods of the agent that have addresses of their own, and the packets that they exchange (ADR 0123).
//!
//! ```text
//!   container ─kernel─► pods0 ─► router ─► lane ══ tunnel: TLS ══► the shim of the other pod
//!             ◄─kernel─ pods0 ◄─────────── inbound ◄══ tunnel ════
//!                                │ who has this address? carry a tunnel there, if its node is not reached
//!                                └─► Mesh ═ JoinMesh ═ agent
//! ```
//!
//! [`router`] is the task that owns the interface, the listener and all tunnels. Each other pod to which packets go has a
//! [`lane`], and each tunnel that the shim of another pod has dialled is [`inbound`]. [`Mesh`] is what these and the agent's calls
//! have in common: levels, which whoever calls `JoinMesh` replaces, and which stay while nobody calls.
//!
//! The shim decides nothing about who may reach whom: it sends to those, and takes from those, that the agent names. What it
//! checks is that a packet is what it should be: from the pod whose key the tunnel has, for this pod.

pub(crate) mod carried;
mod inbound;
mod interface;
mod lane;
mod members;
mod notes;
mod packet;
pub(crate) mod router;
mod tunnel;
mod unproven;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use knoc_proto::{
    mesh::{MAX_RANGES, PodRange},
    pb::{self, mesh_control::Control, mesh_question::Question},
    reason::ErrorReason,
    text::quote,
};
use tokio::sync::{mpsc, watch};
use tonic::{Status, Streaming};

use self::{
    carried::{Tunnel, Waiting},
    members::Members,
};
use crate::launch::network::protocol::Range;

/// How long packets and tunnels wait until the agent has said who has an address.
const PATIENCE: Duration = Duration::from_secs(10);

/// How much of a wrong text an error shows.
const SHOWN: usize = 80;

/// The stream of questions to the agent.
pub(crate) type Questions = mpsc::Sender<Result<pb::MeshQuestion, Status>>;

/// What the agent has said about the pod's own address.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
enum Given {
    /// Nothing yet.
    #[default]
    Unknown,
    /// The pod has none, for now, and why.
    Nothing(String),
    Address(Ipv4Addr),
}

/// What the tasks of the mesh and the calls of the agent have in common.
#[derive(Debug, Default)]
pub(crate) struct Mesh {
    /// The addresses of the node's pods; `None` if the pod is to have none of its own.
    range: Option<Range>,
    /// The addresses of all pods that can be reached: those of the node, and those of other nodes of the agent.
    ranges: watch::Sender<BTreeSet<Range>>,
    given: watch::Sender<Given>,
    /// Where tunnels are taken, once the pod has its address.
    endpoint: watch::Sender<Option<SocketAddr>>,
    members: watch::Sender<Members>,
    /// The lanes that wait for a tunnel that the agent carries.
    waiting: watch::Sender<Waiting>,
    /// Takes tunnels that the agent carries from other shims, once the pod has its address.
    arrivals: watch::Sender<Option<mpsc::Sender<Tunnel>>>,
    /// The number of the newest call of `JoinMesh`.
    newest: watch::Sender<u64>,
}

/// The number of a call of `JoinMesh`.
#[derive(Debug)]
pub(crate) struct Call(u64);

impl Mesh {
    /// The mesh as a pod with this shape sees it.
    pub(crate) fn of(spec: &pb::PodSpec) -> Arc<Self> {
        Self::with(Range::parse(&spec.pod_range))
    }

    fn with(range: Option<Range>) -> Arc<Self> {
        Arc::new(Self {
            range,
            ranges: watch::Sender::new(range.into_iter().collect()),
            ..Self::default()
        })
    }

    /// Can a pod have this address?
    pub(crate) fn reaches(&self, address: Ipv4Addr) -> bool {
        self.ranges.borrow().iter().any(|one| one.contains(address))
    }

    /// Does the pod have its address, and the interface that leads to other pods?
    pub(crate) fn is_up(&self) -> bool {
        self.endpoint.borrow().is_some()
    }

    /// Is every address of this range that of a pod?
    pub(crate) fn covers(&self, range: Range) -> bool {
        let covers = |one: &Range| one.prefix <= range.prefix && one.contains(range.first);
        self.ranges.borrow().iter().any(covers)
    }

    /// Adds the ranges of other nodes. They never become fewer: their pods may still be there.
    fn add_ranges(&self, told: &[String]) {
        let right = told.iter().filter(|text| text.parse::<PodRange>().is_ok());
        let new: Vec<Range> = right.filter_map(|text| Range::parse(text)).collect();
        self.ranges.send_if_modified(|known| {
            let before = known.len();
            for range in new {
                if known.len() < MAX_RANGES {
                    known.insert(range);
                }
            }
            known.len() > before
        });
    }

    /// The addresses of the node's pods, if this one is to have one of them.
    pub(crate) fn range(&self) -> Option<Range> {
        self.range
    }

    /// Follows one message of the agent.
    fn obey(&self, control: pb::MeshControl) -> Result<(), Status> {
        let invalid = |why: String| ErrorReason::InvalidRequest.status(why);
        match control.control {
            Some(Control::Address(told)) => {
                self.add_ranges(&told.ranges);
                self.take_address(&told).map_err(invalid)
            }
            Some(Control::Member(told)) => {
                let mut learned = Ok(false);
                self.members.send_if_modified(|members| {
                    learned = members.learn(&told);
                    matches!(learned, Ok(true))
                });
                learned.map(drop).map_err(invalid)
            }
            // A message that a newer agent knows.
            None => Ok(()),
        }
    }

    fn take_address(&self, told: &pb::MeshAddress) -> Result<(), String> {
        let given = if told.address.is_empty() {
            Given::Nothing(told.why.clone())
        } else {
            let shown = || quote(&told.address, SHOWN);
            let address: Ipv4Addr = told
                .address
                .parse()
                .map_err(|_| format!("address: {} is not an IPv4 address", shown()))?;
            if !self.range.is_some_and(|range| range.contains(address)) {
                return Err(format!("address: {} is not in the pod's range", shown()));
            }
            Given::Address(address)
        };
        let mut other = None;
        self.given
            .send_if_modified(|known| match (&*known, &given) {
                (Given::Address(own), Given::Address(new)) => {
                    other = (own != new).then_some(*own);
                    false
                }
                // Programs have it already.
                (Given::Address(_), Given::Unknown | Given::Nothing(_)) => false,
                (Given::Unknown | Given::Nothing(_), _) => {
                    known.clone_from(&given);
                    true
                }
            });
        match other {
            None => Ok(()),
            Some(own) => Err(format!(
                "address: the pod has {own} already, and never gets another one"
            )),
        }
    }

    /// Takes the first message of `JoinMesh`; from now on, earlier calls end.
    pub(crate) async fn begin(
        &self,
        calls: &mut Streaming<pb::MeshControl>,
    ) -> Result<Call, Status> {
        let first = calls.message().await?.unwrap_or_default();
        if !matches!(first.control, Some(Control::Address(_))) {
            let message = "the first message of JoinMesh is `address`";
            return Err(ErrorReason::InvalidRequest.status(message));
        }
        self.obey(first)?;
        let mut number = 0;
        self.newest.send_modify(|newest| {
            *newest += 1;
            number = *newest;
        });
        Ok(Call(number))
    }

    /// Task: serves one call of `JoinMesh`, until it ends or a newer one begins.
    pub(crate) async fn follow(
        &self,
        call: Call,
        mut calls: Streaming<pb::MeshControl>,
        questions: Questions,
    ) {
        let mut newest = self.newest.subscribe();
        let mut members = self.members.subscribe();
        let mut endpoint = self.endpoint.subscribe();
        let mut waiting = self.waiting.subscribe();
        let mut told = Told::default();
        loop {
            let here = *endpoint.borrow_and_update();
            told.follow(&waiting.borrow_and_update());
            let next = told.next(here, &members.borrow_and_update());
            let next = next.or_else(|| Some((waiting.borrow().next(&told.carried)?, 0)));
            let result = tokio::select! {
                biased;
                () = questions.closed() => return,
                _ = newest.wait_for(|number| *number != call.0) => {
                    Err(ErrorReason::StaleLeader.status("a newer call of JoinMesh has taken over"))
                }
                message = calls.message() => match message {
                    Ok(Some(control)) => self.obey(control),
                    Ok(None) => return,
                    Err(status) => Err(status),
                },
                slot = questions.reserve(), if next.is_some() => match (slot, next) {
                    (Ok(slot), Some((question, id))) => {
                        told.note(&question, id, here);
                        slot.send(Ok(pb::MeshQuestion { question: Some(question) }));
                        Ok(())
                    }
                    _ => return,
                },
                changed = members.changed() => match changed {
                    Ok(()) => Ok(()),
                    Err(_) => return,
                },
                changed = endpoint.changed() => match changed {
                    Ok(()) => Ok(()),
                    Err(_) => return,
                },
                changed = waiting.changed() => match changed {
                    Ok(()) => Ok(()),
                    Err(_) => return,
                },
            };
            if let Err(status) = result {
                // If the caller is gone, nobody receives it.
                questions.send(Err(status)).await.ok();
                return;
            }
        }
    }

    /// Keeps what is known about an address up to date until the result is dropped. `None` if too many are in use.
    fn want(self: &Arc<Self>, address: Ipv4Addr) -> Option<Wanted> {
        let mut wanted = false;
        self.members.send_if_modified(|members| {
            let before = members.state(address).is_some();
            wanted = members.want(address);
            wanted && !before
        });
        wanted.then(|| Wanted {
            mesh: Arc::clone(self),
            address,
        })
    }
}

#[cfg(test)]
impl Mesh {
    /// The mesh of a pod of this range, which has its address or has none yet.
    pub(crate) fn fixture(range: &str, is_up: bool) -> Arc<Self> {
        let mesh = Self::with(Range::parse(range));
        let endpoint = SocketAddr::from(([10, 0, 0, 7], 4001));
        mesh.endpoint.send_replace(is_up.then_some(endpoint));
        mesh
    }
}

/// Says that somebody uses an address.
#[derive(Debug)]
struct Wanted {
    mesh: Arc<Mesh>,
    address: Ipv4Addr,
}

impl Drop for Wanted {
    fn drop(&mut self) {
        self.mesh.members.send_if_modified(|members| {
            members.leave(self.address);
            members.state(self.address).is_none()
        });
    }
}

/// PURE: what one call of the agent was told and asked.
#[derive(Debug, Default)]
struct Told {
    endpoint: Option<SocketAddr>,
    /// With the entry of each address for which it was asked.
    asked: BTreeMap<Ipv4Addr, u64>,
    /// Where the agent was asked to carry tunnels to, for lanes that still wait.
    carried: BTreeSet<Ipv4Addr>,
}

impl Told {
    /// What comes next, and the entry of the address that it is about; the endpoint comes first.
    fn next(&self, endpoint: Option<SocketAddr>, members: &Members) -> Option<(Question, u64)> {
        let place = endpoint.filter(|_| self.endpoint != endpoint);
        let place = place.map(|place| (Question::Endpoint(place.to_string()), 0));
        place.or_else(|| members.next(&self.asked))
    }

    fn note(&mut self, question: &Question, id: u64, endpoint: Option<SocketAddr>) {
        let address = |text: &str| text.parse::<Ipv4Addr>().ok();
        match question {
            Question::Endpoint(_) => self.endpoint = endpoint,
            Question::Ask(text) => self
                .asked
                .extend(address(text).map(|address| (address, id))),
            Question::Carry(text) => self.carried.extend(address(text)),
            Question::Forget(text) => {
                if let Some(address) = address(text) {
                    self.asked.remove(&address);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
