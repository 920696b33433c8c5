//! The connections that containers open to the cluster.
//!
//! What a container sends to the addresses of the cluster's Services arrives in the [edge](crate::launch::network) of the
//! pod's network, where [`ports`] listens. Each connection is announced on `WatchEgress`, and carried by the `EgressStream`
//! that takes it, until both directions have ended. The shim decides nothing about it: which Service it is, whether the pod
//! may use it and which endpoint it reaches is decided by the kubelet and the agent.
//!
//! ```text
//!   container ─connects─► ports ─► Waiting ─► follow ═ WatchEgress ═► agent, kubelet
//!                           └─ tcp, udp ◄─── take ◄═ EgressStream ══ agent, kubelet
//! ```
//!
//! Questions to the cluster's DNS share one such flow, and their answers are kept ([`dns`]).
//!
//! In the node's network there is no edge, and only the API server is reached, at a port of the loopback interface
//! ([`host`]).
//!
//! If compute nodes cannot reach the agent, job steps carry links on demand, and a container's connection is no demand: while there
//! is no link it is reset at once, and an Event says so.
//!
//! The [`Table`] is a level: whoever calls `WatchEgress` replaces it, and the listeners follow while the pod runs. Without a
//! link, connections wait for a new one as long as they would wait for an answer.

mod api;
mod datagram;
pub(crate) mod dns;
pub(crate) mod gate;
pub(crate) mod host;
pub(crate) mod ports;
mod table;
mod tcp;
mod udp;
mod waiting;

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use knoc_link::bulk::Messages;
use knoc_proto::{
    pb::{self, egress_control::Control},
    reason::ErrorReason,
};
use tokio::sync::{mpsc, oneshot, watch};
use tonic::{Status, Streaming};

use self::waiting::Waiting;
pub(crate) use self::{
    api::ApiServer,
    dns::NodeNames,
    table::{Table, TableError},
};
use crate::{launch::network::protocol::Kind, mesh::Mesh, network::Private};

/// How long a connection waits until it is taken.
const PATIENCE: Duration = Duration::from_secs(knoc_proto::egress::PATIENCE);

/// The port of DNS.
const DNS: u16 = 53;

/// The stream of what containers send.
pub(crate) type Output = mpsc::Sender<Result<pb::EgressOutput, Status>>;

/// The stream of connections that were opened.
pub(crate) type Attempts = mpsc::Sender<Result<pb::EgressAttempt, Status>>;

/// The `EgressStream` that takes a connection.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) input: Messages<pb::EgressInput>,
    pub(crate) output: Output,
}

/// What becomes of a connection that waits, if it is not refused.
#[derive(Debug)]
pub(crate) enum Settled {
    /// The call carries it.
    Taken(Taken),
    /// It leads to a pod of the node, which is reached over the mesh.
    Redirected(SocketAddrV4),
}

/// The pod's own network, from which other pods are reached.
#[derive(Debug)]
struct Inside {
    network: Arc<Private>,
    mesh: Arc<Mesh>,
}

/// What the listeners, the calls of the agent and the containers' files have in common.
#[derive(Debug, Default)]
pub(crate) struct Egress {
    /// The newest network of the cluster; empty if none is known.
    table: watch::Sender<Arc<Table>>,
    waiting: watch::Sender<Waiting>,
    /// The number of the newest call of `WatchEgress`.
    watch: watch::Sender<u64>,
    /// Set if the node's pods have addresses of their own.
    inside: OnceLock<Inside>,
    /// The names that the resolvers of the compute node answer.
    node_names: OnceLock<NodeNames>,
    /// Compute nodes are known not to reach the agent.
    isolated: AtomicBool,
    /// How many calls of `WatchEgress` are followed.
    calls: AtomicUsize,
    /// Containers keep the resolvers of their node, whatever the cluster has.
    without_dns: AtomicBool,
}

impl Egress {
    /// Replaces the network.
    pub(crate) fn replace(&self, network: &pb::EgressNetwork) -> Result<(), TableError> {
        let mut table = Table::parse(network)?;
        if self.without_dns.load(Ordering::Relaxed) {
            table.dns = None;
        }
        let changed = |old: &mut Arc<Table>| {
            let changes = **old != table;
            if changes {
                if let Some(what) = table.left_out() {
                    tracing::warn!("the pod does not reach {what}");
                }
                *old = Arc::new(table);
            }
            changes
        };
        self.table.send_if_modified(changed);
        Ok(())
    }

    /// Whether compute nodes are known not to reach the agent, so that nobody follows connections unless a job step carries
    /// the link.
    pub(crate) fn set_isolated(&self, isolated: bool) {
        self.isolated.store(isolated, Ordering::Relaxed);
    }

    /// Lets containers keep the resolvers of their node from now on, since names have to resolve at any time.
    pub(crate) fn keep_resolvers(&self) {
        self.without_dns.store(true, Ordering::Relaxed);
    }

    /// Whether nobody will take a connection: there is no link, and none will come because a container connects.
    fn is_cut_off(&self) -> bool {
        self.isolated.load(Ordering::Relaxed) && self.calls.load(Ordering::Relaxed) == 0
    }

    /// Counts a call of `WatchEgress`, until the result is dropped.
    fn followed(&self) -> Followed<'_> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        Followed(self)
    }

    /// Sets which names the resolvers of the compute node answer, once.
    pub(crate) fn set_node_names(&self, names: NodeNames) {
        self.node_names.set(names).ok();
    }

    fn node_names(&self) -> Option<&NodeNames> {
        self.node_names.get()
    }

    /// Whether this is the cluster's DNS.
    fn is_dns(&self, target: SocketAddrV4) -> bool {
        target.port() == DNS && self.table.borrow().dns == Some(*target.ip())
    }

    /// The present network.
    pub(crate) fn table(&self) -> Arc<Table> {
        Arc::clone(&self.table.borrow())
    }

    /// Connections may lead to other pods of the node, which are reached from the pod's own network.
    pub(crate) fn leads_to_pods(&self, network: &Arc<Private>, mesh: &Arc<Mesh>) {
        let inside = Inside {
            network: Arc::clone(network),
            mesh: Arc::clone(mesh),
        };
        // It is called once.
        self.inside.set(inside).ok();
    }

    /// Announces a connection, and waits until it is settled. `None` if it was refused or nobody took it.
    async fn announce(&self, kind: Kind, target: SocketAddrV4) -> Option<Settled> {
        if self.is_cut_off() {
            return None;
        }
        let (taker, stream) = oneshot::channel();
        let mut id = 0;
        self.waiting
            .send_modify(|waiting| id = waiting.add(kind, target, taker));
        // It is withdrawn even if the caller is dropped.
        let announced = Announced { egress: self, id };
        let stream = tokio::time::timeout(PATIENCE, stream).await;
        drop(announced);
        stream.ok()?.ok()
    }

    fn withdraw(&self, id: u64) -> Option<oneshot::Sender<Settled>> {
        let mut taker = None;
        self.waiting.send_if_modified(|waiting| {
            taker = waiting.remove(id);
            // Readers look for new attempts only.
            false
        });
        taker
    }

    /// Gives a connection to the call that takes it.
    pub(crate) fn take(&self, id: u64, stream: Taken) -> Result<(), Status> {
        let taker = self.withdraw(id);
        let settled = Settled::Taken(stream);
        let given = taker.is_some_and(|taker| taker.send(settled).is_ok());
        given.then_some(()).ok_or_else(|| {
            let message = format!(
                "connection {id} does not wait: it was taken or refused before, or the container has given up"
            );
            ErrorReason::NotFound.status(message)
        })
    }

    /// Follows one message of the caller of `WatchEgress`.
    fn obey(&self, control: pb::EgressControl) -> Result<(), Status> {
        match control.control {
            Some(Control::Network(network)) => self
                .replace(&network)
                .map_err(|error| ErrorReason::InvalidRequest.status(error.to_string())),
            Some(Control::Refusal(refusal)) => {
                drop(self.withdraw(refusal.id));
                Ok(())
            }
            Some(Control::Redirect(redirect)) => {
                self.redirect(&redirect);
                Ok(())
            }
            // A message that a newer agent knows.
            None => Ok(()),
        }
    }

    /// The connection leads to another pod. If its address cannot be one, or this pod has none itself, it is refused.
    fn redirect(&self, redirect: &pb::EgressRedirect) {
        let Some(taker) = self.withdraw(redirect.id) else {
            return;
        };
        let inside = self.inside.get();
        if let Some(pod) = inside.and_then(|inside| other_pod(redirect, &inside.mesh)) {
            // The container may have given up.
            taker.send(Settled::Redirected(pod)).ok();
        }
    }

    /// Takes the first message of `WatchEgress`; from now on, earlier calls end.
    pub(crate) async fn begin(
        &self,
        calls: &mut Streaming<pb::EgressControl>,
    ) -> Result<Watch, Status> {
        let first = calls.message().await?.unwrap_or_default();
        if !matches!(first.control, Some(Control::Network(_))) {
            let message = "the first message of WatchEgress is `network`";
            return Err(ErrorReason::InvalidRequest.status(message));
        }
        self.obey(first)?;
        let mut number = 0;
        self.watch.send_modify(|newest| {
            *newest += 1;
            number = *newest;
        });
        Ok(Watch(number))
    }

    /// Task: serves one call of `WatchEgress`, until it ends or a newer one begins.
    pub(crate) async fn follow(
        &self,
        watch: Watch,
        mut calls: Streaming<pb::EgressControl>,
        attempts: Attempts,
    ) {
        let _followed = self.followed();
        let mut newest = self.watch.subscribe();
        let mut waiting = self.waiting.subscribe();
        let mut announced = 0;
        loop {
            let next = waiting.borrow_and_update().after(announced);
            let result = tokio::select! {
                biased;
                () = attempts.closed() => return,
                _ = newest.wait_for(|number| *number != watch.0) => {
                    Err(ErrorReason::StaleLeader.status("a newer call of WatchEgress has taken over"))
                }
                call = calls.message() => match call {
                    Ok(Some(control)) => self.obey(control),
                    Ok(None) => return,
                    Err(status) => Err(status),
                },
                slot = attempts.reserve(), if next.is_some() => match (slot, next) {
                    (Ok(slot), Some(attempt)) => {
                        announced = attempt.id;
                        slot.send(Ok(attempt));
                        Ok(())
                    }
                    _ => return,
                },
                changed = waiting.changed() => match changed {
                    Ok(()) => Ok(()),
                    Err(_) => return,
                },
            };
            if let Err(status) = result {
                // If the caller is gone, nobody receives it.
                attempts.send(Err(status)).await.ok();
                return;
            }
        }
    }
}

/// The pod to which a redirection leads. `None` if its address cannot be that of a pod, or as long as this pod has none itself: what it
/// sent there would go to the networks of the compute node.
fn other_pod(redirect: &pb::EgressRedirect, mesh: &Mesh) -> Option<SocketAddrV4> {
    let address: Ipv4Addr = redirect.address.parse().ok()?;
    let port = u16::try_from(redirect.port).ok()?;
    let is_pod = port > 0 && mesh.is_up() && mesh.reaches(address);
    is_pod.then(|| SocketAddrV4::new(address, port))
}

/// A call of `WatchEgress` that is followed.
struct Followed<'a>(&'a Egress);

impl Drop for Followed<'_> {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The number of a call of `WatchEgress`.
#[derive(Debug)]
pub(crate) struct Watch(u64);

/// Withdraws an attempt that nobody waits for any more.
struct Announced<'a> {
    egress: &'a Egress,
    id: u64,
}

impl Drop for Announced<'_> {
    fn drop(&mut self) {
        drop(self.egress.withdraw(self.id));
    }
}

#[cfg(test)]
mod tests;
