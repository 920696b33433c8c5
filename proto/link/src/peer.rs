//! Who is at the other end of a connection, once that has been proved.
use std::{fmt, sync::Arc};

use super::{Identity, Shown, origin::Origin};

/// A peer that has proved who it is; in the extensions of every request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    /// Proved by its certificate.
    Tls {
        /// The identity in the certificate.
        identity: Identity,
        /// Where the connection comes from.
        origin: Origin,
        /// The certificate itself.
        certificate: Shown,
    },
    /// The same user on the same machine, proved by the kernel.
    Unix {
        /// The user of the process, always ours.
        uid: u32,
        /// The process, if the kernel says it.
        pid: Option<i32>,
    },
    /// Whoever a command reaches, such as a login over SSH; proved by that command alone.
    Command,
    /// The other side of the shim's link, proved by its pinned key.
    Pinned {
        /// SHA-256 of its public key, in hex.
        spki: Arc<str>,
        /// Where the connection comes from.
        origin: Origin,
    },
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tls {
                identity, origin, ..
            } => write!(f, "{identity} at {origin}"),
            Self::Unix {
                uid,
                pid: Some(pid),
            } => write!(f, "uid {uid}, pid {pid}"),
            Self::Unix { uid, pid: None } => write!(f, "uid {uid}"),
            Self::Command => f.write_str("the agent of that login"),
            Self::Pinned { .. } => f.write_str("the pinned peer"),
        }
    }
}
