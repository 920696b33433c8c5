//! A link between two processes: carrier + TLS 1.3 + HTTP/2.
//!
//! Depends on `knoc-proto` alone. [`bulk`] are the streams of bytes over a link, [`pki`] the certificates that its two
//! sides show each other.
//!
//! The near side is always the gRPC client, the far side the server; who *dials* is the TLS client, and that is
//! configuration. Two kinds of links:
//!
//! - **kubelet or knocctl → agent**: [`dial()`] and [`listen`], with certificates of one CA and an [`Identity`] as URI
//!   SAN that is checked whatever the TLS role; over a unix socket the peer's user stands in for both.
//! - **agent → shim**: [`pinned`], where the shim dials the agent and each pins the other's self-signed key;
//!   [`near_side`] and [`far_side`] put HTTP/2 on such a connection.
//!
//! No task is started here: handshakes run inside the stream of connections that the server polls. Every handshake is
//! full (no resumption, no tickets), so a changed certificate counts from the next connection on.
use std::time::Duration;

use tonic::transport::{Endpoint, Server};

use crate::bulk::CancellableExecutor;

pub mod accept;
mod addresses;
pub mod admission;
mod backoff;
pub mod bulk;
pub mod carrier;
mod connect;
mod connection;
mod credentials;
mod dial;
mod finished;
mod identity;
pub mod listen;
mod origin;
mod peer;
pub mod pinned;
pub mod pki;
mod route;
mod shown;
mod single_connection;
pub mod socket;
mod tls;
pub mod verifier;

pub use self::{
    addresses::{Addresses, InvalidAddresses},
    carrier::{Carrier, InvalidCarrier},
    connect::connect,
    connection::Connection,
    credentials::{Credentials, CredentialsError},
    dial::dial,
    identity::{ExpectPeer, Identity, InvalidIdentity},
    listen::Incoming,
    origin::Origin,
    peer::Peer,
    route::Route,
    shown::{Shown, Trust, Untrusted},
    single_connection::{FarSide, far_side, near_side},
};

/// Both sides ping as often: shorter than the idle limits of firewalls and NAT (often 60 s and more), rare enough to
/// cost nothing.
pub const KEEPALIVE: Duration = Duration::from_secs(20);
/// A ping unanswered for this long ends the link: a dead peer is noticed within [`KEEPALIVE`] plus this.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// From the first packet to the end of the TLS handshake. Busy login nodes take seconds, not tens of them.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// What one stream may have in flight, and so what a stalled reader holds: 1 Gbit/s at 16 ms. With half of it, processes
/// that share two cores wait for each other: they stood still for 5 % of the time that a log took, and now for 4 %.
pub const STREAM_WINDOW: u32 = 2 << 20;
/// What all streams of a connection may have in flight. What a stalled reader does not take counts here too, so this is
/// as much as 512 of them leave: with less, a few of them would hold up every other stream of the node.
pub const CONNECTION_WINDOW: u32 = 512 * STREAM_WINDOW;
/// Streams of one connection: watches, and a follow or exec for every pod that people look at. Excess waits.
pub const MAX_STREAMS: u32 = 2048;
/// The largest message: a pod's values may hold some `ConfigMap`s and Secrets of 1 MiB each. tonic's default of 4 MiB is
/// too small for `EnsurePod` and `UpdateValues`; give this to `max_decoding_message_size` of both sides.
pub const MAX_MESSAGE: usize = 24 << 20;
/// The largest HTTP/2 frame that either side takes: a whole message of [`CHUNK`](knoc_proto::CHUNK) in one write and one
/// read. The least that the protocol allows, 16 KiB, costs four times the frames and their system calls.
const FRAME: u32 = 64 << 10;

/// An address that stands in `:authority`; the carrier decides where bytes go.
const AUTHORITY: &str = "http://knoc.internal";

/// Why a link cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// TCP has to carry TLS.
    #[error("a certificate is needed to dial {carrier}")]
    NoCredentials {
        /// The way.
        carrier: Carrier,
    },
    /// A unix socket carries no TLS, so certificates would be ignored.
    #[error("{carrier} takes no certificates: the socket's peer is checked by its user")]
    NeedlessCredentials {
        /// The way.
        carrier: Carrier,
    },
    /// The peer finished its TLS handshake, and then said something else.
    #[error("{peer}{} does not speak HTTP/2", claim(Some(claimed)))]
    NotHttp2 {
        /// Its address.
        peer: String,
        /// Who it is.
        claimed: String,
    },
    /// Nobody answers there.
    #[error("connect to {carrier}")]
    Connect {
        /// The way.
        carrier: Carrier,
        /// The system's words.
        #[source]
        source: std::io::Error,
    },
    /// A socket is there, and refuses: it is a dead agent's, or that of an agent on another host.
    #[error(
        "no process of this host serves {carrier}: the agent has ended, or it runs on another host that shares this folder"
    )]
    NotServed {
        /// The way.
        carrier: Carrier,
        /// The system's message.
        #[source]
        source: std::io::Error,
    },
    /// The command, or ssh, gave no link.
    #[error("connect to {carrier}")]
    Command {
        /// The way.
        carrier: Carrier,
        /// What the command said.
        #[source]
        source: Box<carrier::exec::CommandFailure>,
    },
    /// The folder for a login over SSH is no good.
    #[error("log in to {carrier}")]
    Secret {
        /// The way.
        carrier: Carrier,
        /// What is wrong with it.
        #[source]
        source: Box<carrier::ssh::SecretError>,
    },
    /// No address of several answers.
    #[error("no address answers: {}", errors.join("; "))]
    NoAddress {
        /// Each with its error.
        errors: Vec<String>,
    },
    /// An address failed a moment ago, and it is too early to try again. The message is that of the failure.
    #[error("{error}")]
    TooEarly {
        /// The failure.
        error: String,
    },
    /// No answer in time.
    #[error("no answer from {carrier} within {} s", CONNECT_TIMEOUT.as_secs())]
    Timeout {
        /// The way.
        carrier: Carrier,
    },
    /// The TLS handshake failed on this side.
    #[error("TLS handshake with {peer}{}", claim(claimed.as_deref()))]
    Handshake {
        /// Its address.
        peer: String,
        /// What its certificate says, proved or not.
        claimed: Option<String>,
        /// rustls' words.
        #[source]
        source: std::io::Error,
    },
    /// The process at the other end of the socket is another user's.
    #[error("the process behind {peer} belongs to uid {found}, not to uid {expected}")]
    WrongUser {
        /// The socket.
        peer: String,
        /// Whose it is.
        found: u32,
        /// Whose it should be.
        expected: u32,
    },
    /// The PEM files are no good.
    #[error("load the link's certificates")]
    Credentials {
        /// Which and why.
        #[source]
        source: CredentialsError,
    },
    /// No listener at this address or path.
    #[error("listen on {carrier}")]
    Listen {
        /// Where.
        carrier: Carrier,
        /// The system's words.
        #[source]
        source: std::io::Error,
    },
    /// Somebody serves there already.
    #[error("another process serves {carrier}")]
    InUse {
        /// Where.
        carrier: Carrier,
    },
    /// The socket's folder cannot be opened.
    #[error("open the folder {path} of the socket")]
    Folder {
        /// The folder.
        path: String,
        /// The system's message.
        #[source]
        source: std::io::Error,
    },
    /// A link, or a file, where the socket's folder should be. A link could be pointed elsewhere between check and use.
    #[error("{path} must be the folder of the socket itself, it is {found}")]
    NoFolder {
        /// Where the folder should be.
        path: String,
        /// What is there.
        found: &'static str,
    },
    /// The socket's folder could be entered by others.
    #[error(
        "the folder {path} of the socket must belong to uid {uid} with mode 0700, it has uid {found_uid} and mode {mode:04o}"
    )]
    OpenFolder {
        /// The folder.
        path: String,
        /// Us.
        uid: u32,
        /// Its owner.
        found_uid: u32,
        /// Its mode.
        mode: u32,
    },
    /// The connection that the channel lived on is gone, and this side does not dial.
    #[error("the link has ended")]
    Ended,
}

fn claim(claimed: Option<&str>) -> String {
    claimed.map_or_else(String::new, |identity| {
        format!(" (it calls itself {identity})")
    })
}

/// The user this process acts as.
fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// A gRPC server with the link's windows, limits and keepalive: start from this one.
#[must_use]
pub fn server() -> Server {
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .max_concurrent_streams(MAX_STREAMS)
}

/// The same for the client's side.
fn endpoint() -> Endpoint {
    Endpoint::from_static(AUTHORITY)
        .executor(CancellableExecutor)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
}

#[cfg(test)]
mod tests;
