//! What admits connections: their number is bounded, and one that exceeds it is reset.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
};
use tokio_util::task::TaskTracker;

use super::{
    Egress,
    dns::{self, NodeNames},
    tcp,
};
use crate::{budget::Budget, supervisor::Command};

/// How many connections the containers of a pod may have open to the cluster at once.
const CONNECTIONS: usize = 1024;

/// How many flows of datagrams they may have.
const FLOWS: usize = 1024;

/// How many bytes of datagrams may wait for the link, in all flows together.
pub(super) const WAITING: usize = 8 << 20;

/// The pause after a connection or a datagram could not be taken, for example because the shim has too many files open.
pub(super) const PAUSE: Duration = Duration::from_millis(100);

/// Why a connection is reset at a site whose compute nodes do not reach the agent.
const CUT_OFF: &str = "A connection to the cluster was refused: the compute nodes of this site do not reach the agent, and no job step \
                       carries the link of this pod at the moment. Pods reach the cluster if compute nodes reach one of \
                       `listen.shim_addresses` of the site file";

/// What admits connections.
#[derive(Debug, Clone)]
pub(crate) struct Gate {
    pub(super) egress: Arc<Egress>,
    connections: Arc<Semaphore>,
    pub(super) flows: Arc<Semaphore>,
    /// The datagrams that may still wait.
    pub(super) datagrams: Budget,
    /// The tasks of the connections, which outlive their listener.
    pub(super) tasks: TaskTracker,
    notes: mpsc::Sender<Command>,
    /// Whether users were told that there are too many.
    told: Arc<AtomicBool>,
    /// Whether they were told that nobody takes connections.
    told_cut_off: Arc<AtomicBool>,
}

impl Gate {
    pub(crate) fn new(egress: &Arc<Egress>, notes: mpsc::Sender<Command>) -> Self {
        Self {
            egress: Arc::clone(egress),
            connections: Arc::new(Semaphore::new(CONNECTIONS)),
            flows: Arc::new(Semaphore::new(FLOWS)),
            datagrams: Budget::new(WAITING),
            tasks: TaskTracker::new(),
            notes,
            told: Arc::default(),
            told_cut_off: Arc::default(),
        }
    }

    pub(super) fn admit(&self, stream: TcpStream) {
        let stream = tcp::Guarded::new(stream);
        // The edge has an address of its own, which is none of the cluster's.
        let Some(target) = self.target(&stream.local_addr()) else {
            return;
        };
        let Some(slot) = self.slot() else { return };
        let egress = Arc::clone(&self.egress);
        self.tasks.spawn(async move {
            if egress.is_dns(target) && egress.node_names().is_some_and(NodeNames::are_any) {
                dns::stream::serve(stream, target, &egress).await;
            } else {
                tcp::serve(stream, target, Bytes::new(), &egress).await;
            }
            drop(slot);
        });
    }

    /// Whether there is a way to the cluster. If there is none, users are told once.
    pub(super) fn has_way(&self) -> bool {
        if !self.egress.is_cut_off() {
            return true;
        }
        if !self.told_cut_off.swap(true, Ordering::Relaxed) {
            self.note("EgressRefused", CUT_OFF.to_owned());
        }
        false
    }

    /// Room for one more connection, if there is a way.
    pub(super) fn slot(&self) -> Option<OwnedSemaphorePermit> {
        if !self.has_way() {
            return None;
        }
        let slot = Arc::clone(&self.connections).try_acquire_owned();
        if slot.is_err() {
            self.note_once(format!(
                "the containers have {CONNECTIONS} connections to the cluster open: further ones are reset until some have ended"
            ));
        }
        slot.ok()
    }

    fn target(&self, dialled: &io::Result<SocketAddr>) -> Option<SocketAddrV4> {
        match dialled {
            Ok(SocketAddr::V4(target)) => self.reaches(*target.ip()).then_some(*target),
            Ok(SocketAddr::V6(_)) | Err(_) => None,
        }
    }

    /// Whether this address leads to the cluster.
    pub(super) fn reaches(&self, address: Ipv4Addr) -> bool {
        self.egress.table.borrow().contains(address)
    }

    pub(super) fn note_once(&self, message: String) {
        if !self.told.swap(true, Ordering::Relaxed) {
            self.note("EgressLimit", message);
        }
    }

    pub(super) fn note(&self, reason: &'static str, message: String) {
        tracing::warn!("{message}");
        // The supervisor has ended, or is flooded with commands.
        self.notes.try_send(Command::Note { reason, message }).ok();
    }
}
