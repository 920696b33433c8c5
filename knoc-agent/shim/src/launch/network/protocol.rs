//! What the shim and the helper that holds a pod's network say to each other. Both are the same binary, so it needs no
//! version. Each message is JSON with its length first; descriptors are attached to its first byte.

use std::{collections::BTreeSet, net::Ipv4Addr, path::PathBuf};

use rustix::net::SocketType;
use serde::{Deserialize, Serialize};

pub(crate) use super::range::Range;
use crate::launch::ids::Ids;

/// pasta's interface in the pod, and the first hop from there to other networks.
pub(crate) const OUTWARD: &str = "eth0";
pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 1);

/// The longest message in bytes.
pub(crate) const LONGEST: usize = 64 << 10;

/// What the shim asks for. Each request has one answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Creates the namespaces; sent once, before anything else.
    Create {
        /// The names that `/etc/subuid` may have for this user.
        users: Vec<String>,
        /// The pod's own address.
        address: Ipv4Addr,
    },
    /// Whether there is a default route.
    IsRouted,
    /// From now on no other process may open the helper's files.
    Seal,
    /// A new socket in the pod's network.
    Socket(Family, Kind),
    /// From now on, exactly these addresses lead from the pod to the edge.
    Lead(BTreeSet<Range>),
    /// A new socket in the edge.
    EdgeSocket(Kind),
    /// What the pod sends to this range goes nowhere, as long as there is no interface of the mesh.
    MeshBar(Range),
    /// The interface of the mesh: the pod has this address on it, and what it sends to the range can be read from it. Sent once.
    Mesh { address: Ipv4Addr, range: Range },
    /// What the pod sends to these ranges can be read from it, too.
    MeshRoutes(BTreeSet<Range>),
    /// Mounts a volume in memory, in a mount namespace that the helper creates with the first of them.
    Memory(Tmpfs),
}

/// A volume in memory with a size of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tmpfs {
    /// The shim's folder at which it is mounted.
    pub(crate) path: PathBuf,
    /// Its size.
    pub(crate) bytes: u64,
}

/// The family of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Family {
    Ipv4,
    Ipv6,
}

/// The kind of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) enum Kind {
    Tcp,
    Udp,
}

impl From<Kind> for SocketType {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Tcp => Self::STREAM,
            Kind::Udp => Self::DGRAM,
        }
    }
}

/// What the helper answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// With the user namespace and the network namespace.
    Created {
        /// The ids that are mapped in the user namespace.
        ids: Ids,
        /// Why the pod has no edge, if it has none.
        no_edge: Option<String>,
    },
    Routed(bool),
    /// With the socket, if one was asked for; with the mount namespace and the volume, if that was mounted.
    Done,
    Failed {
        why: String,
    },
}
