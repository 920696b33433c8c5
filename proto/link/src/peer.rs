//! The verified peer at the other end of a connection.
use std::{fmt, sync::Arc};

use super::{Identity, PeerCertificate, origin::Origin};

/// A peer that has proved its identity. Every request has it among its extensions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    /// Verified by its certificate in a TLS handshake.
    Tls {
        /// The identity in the certificate.
        identity: Identity,
        /// Where the connection comes from.
        origin: Origin,
        /// The certificate that it presented.
        certificate: PeerCertificate,
    },
    /// A process of our own user on this host, verified by the kernel.
    Unix {
        /// The uid of the process, always our own.
        uid: u32,
        /// The pid of the process, if the kernel tells it.
        pid: Option<i32>,
    },
    /// Whoever a command reaches, such as a login over SSH; proved by that command alone.
    Command,
    /// The other side of a shim's link, verified by its pinned key.
    Pinned {
        /// SHA-256 of its public key (`SubjectPublicKeyInfo`), in hexadecimal digits.
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
