//! Where a connection comes from, as far as its carrier knows.
//!
//! Pure.
use std::{fmt, net::SocketAddr};

/// The other end of a connection. It proves nothing: it is for logs, and for counting the connections of one source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Origin {
    /// A host of the network.
    Address(SocketAddr),
    /// A process of this host.
    ThisHost,
    /// The far side of a command that this process started.
    Command,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::ThisHost => f.write_str("this host"),
            Self::Command => f.write_str("the far side of a command"),
        }
    }
}
