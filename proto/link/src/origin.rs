//! PURE: where a connection comes from, as far as its carrier knows.
use std::{fmt, net::SocketAddr};

/// The other end of a connection, unverified. It serves only logs and the count of connections per source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Origin {
    /// A network address.
    Address(SocketAddr),
    /// A process on this host.
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
