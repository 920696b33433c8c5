//! Links between two processes of KNoC: a carrier, TLS 1.3 and HTTP/2.
//!
//! This crate depends on `knoc-proto` alone. [`bulk`] holds the streams of bytes over a link, [`pki`] the certificates
//! that the two sides of a link present to each other.
//!
//! The near side is always the gRPC client and the far side the gRPC server. Configuration decides which side *dials*;
//! that side is the TLS client. There are two kinds of links:
//!
//! - **kubelet or knocctl → agent**: [`dial()`] and [`listen`]; if the agent dials its kubelet, [`dial_out`] and
//!   [`dial_in`]. Both sides have certificates of one CA, and each checks the other's [`Identity`] (a URI SAN) whatever
//!   its TLS role. Over a unix socket without TLS, the peer's uid replaces both.
//! - **agent → shim**: [`pinned`]. The shim dials the agent, and each side pins the other's self-signed key.
//!   [`near_side`] and [`far_side`] run HTTP/2 on such a connection.
//!
//! This crate spawns no task except hyper's own and one for each attempt of a channel to connect: handshakes of the side
//! that is dialled make progress while the server polls its stream of connections. Every handshake is a full one (no resumption, no session tickets), so a replaced certificate is used
//! from the next connection on.
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
mod cut;
mod dial;
pub mod dial_in;
pub mod dial_out;
pub mod file_lock;
mod finished;
mod greeting;
mod identity;
pub mod ladder;
pub mod listen;
pub mod log_reader;
mod origin;
mod peer;
mod peer_certificate;
pub mod pinned;
pub mod pki;
pub mod proxy;
pub mod reset;
mod route;
mod serve;
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
    peer_certificate::{PeerCertificate, Trust, Untrusted},
    route::Route,
    serve::serve,
    single_connection::{FarSide, far_side, near_side},
};

/// How often each side sends an HTTP/2 ping. This is shorter than the idle timeouts of firewalls, NAT and proxies (60 s or
/// more), and rare enough to cost nothing. It is the same for every carrier, because the pings pass through all of them, ssh
/// and proxies included, and none is known that closes an idle connection sooner.
pub const KEEPALIVE: Duration = Duration::from_secs(20);
/// A ping that is not answered within this time ends the link, so a dead peer is noticed within [`KEEPALIVE`] plus this
/// time.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// The limit from the first packet to the end of the TLS handshake. A busy login node needs seconds for it.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The flow-control window of one stream in bytes, and so the most that a stalled reader holds: 1 Gbit/s at 16 ms. With
/// half of it, processes that share two cores waited for each other during 5 % of the time that a log took; with this
/// value during 4 %.
pub const STREAM_WINDOW: u32 = 2 << 20;
/// The flow-control window of a whole connection in bytes. Data that a stalled reader does not take counts here too, so
/// the window has room for 512 stalled streams; with less, a few of them would block every other stream of the node.
pub const CONNECTION_WINDOW: u32 = 512 * STREAM_WINDOW;
/// The most concurrent streams of one connection: watches, and a follow or exec for every pod that users look at.
/// Further streams wait.
pub const MAX_STREAMS: u32 = 2048;
/// The largest gRPC message in bytes: the values of a pod may hold several `ConfigMap`s and Secrets of 1 MiB each.
/// tonic's default of 4 MiB is too small for `EnsurePod` and `UpdateValues`, so both sides pass this to
/// `max_decoding_message_size`.
pub const MAX_MESSAGE: usize = 24 << 20;
/// The largest HTTP/2 frame that either side accepts, in bytes: a whole message of [`CHUNK`](knoc_proto::CHUNK) in one
/// write and one read. The protocol's default, 16 KiB, needs four times as many frames and system calls.
const FRAME: u32 = 64 << 10;

/// The `:authority` of every request. The carrier alone decides where the bytes go.
const AUTHORITY: &str = "http://knoc.internal";

/// Why a link cannot be opened, or has ended.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// TCP was requested without credentials; a link over TCP always uses TLS.
    #[error("a certificate is needed to dial {carrier}")]
    NoCredentials {
        /// The carrier that was to be dialled.
        carrier: Carrier,
    },
    /// Credentials were given for a unix socket, which uses no TLS and would ignore them.
    #[error(
        "{carrier} uses no certificates: remove them (the peer on a unix socket is identified by its uid)"
    )]
    NeedlessCredentials {
        /// The carrier that was to be dialled.
        carrier: Carrier,
    },
    /// The peer finished its TLS handshake, but did not begin an HTTP/2 connection.
    #[error("{peer}{} does not speak HTTP/2", claim(Some(claimed)))]
    NotHttp2 {
        /// The peer's address.
        peer: String,
        /// The identity in the peer's certificate.
        claimed: String,
    },
    /// The connection cannot be opened.
    #[error("connect to {carrier}")]
    Connect {
        /// The carrier that was dialled.
        carrier: Carrier,
        /// The error of connect(2) or of the name's resolution.
        #[source]
        source: std::io::Error,
    },
    /// The socket exists but refuses connections: its agent has died, or runs on another host.
    #[error(
        "no process of this host serves {carrier}: the agent has ended, or it runs on another host that shares this folder"
    )]
    NotServed {
        /// The socket's carrier.
        carrier: Carrier,
        /// The error of connect(2).
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
    /// The folder for a login over SSH cannot be used.
    #[error("log in to {carrier}")]
    Secret {
        /// The address.
        carrier: Carrier,
        /// What is wrong with the folder.
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
    /// The proxy did not connect to the peer.
    #[error("connect to {carrier} through a proxy")]
    Proxy {
        /// The carrier that was dialled.
        carrier: Carrier,
        /// What the proxy answered, or why it could not be asked.
        #[source]
        source: Box<carrier::http_connect::ProxyError>,
    },
    /// The link was not established within [`CONNECT_TIMEOUT`].
    #[error("no answer from {carrier} within {} s", CONNECT_TIMEOUT.as_secs())]
    Timeout {
        /// The carrier that was dialled.
        carrier: Carrier,
    },
    /// The TLS handshake failed on this side.
    #[error("TLS handshake with {peer}{}", claim(claimed.as_deref()))]
    Handshake {
        /// The peer's address or carrier.
        peer: String,
        /// The identity that the peer's certificate claims, which may be unproved.
        claimed: Option<String>,
        /// The error of rustls, or of our own verifier.
        #[source]
        source: std::io::Error,
    },
    /// The process at the other end of the socket belongs to another user.
    #[error("the process behind {peer} belongs to uid {found}, not to uid {expected}")]
    WrongUser {
        /// The socket's carrier.
        peer: String,
        /// The uid of the process.
        found: u32,
        /// The uid that it must have: our own.
        expected: u32,
    },
    /// The CA, certificate or key cannot be used.
    #[error("load the link's certificates")]
    Credentials {
        /// Which of them, and why.
        #[source]
        source: CredentialsError,
    },
    /// The address or path cannot be listened on.
    #[error("listen on {carrier}")]
    Listen {
        /// The address or path.
        carrier: Carrier,
        /// The error of bind(2), listen(2) or of a file operation.
        #[source]
        source: std::io::Error,
    },
    /// Another process already serves this socket.
    #[error("another process serves {carrier}")]
    InUse {
        /// The socket's carrier.
        carrier: Carrier,
    },
    /// The folder of the socket cannot be opened.
    #[error("open the folder {path} of the socket")]
    Folder {
        /// The path of the folder.
        path: String,
        /// The error of open(2) or fstat(2).
        #[source]
        source: std::io::Error,
    },
    /// The folder of the socket is a symbolic link or a file. A link could be changed between check and use.
    #[error("the socket's folder {path} must be a real folder, but it is {found}")]
    NotAFolder {
        /// The path of the folder.
        path: String,
        /// The kind of file that was found, with its article.
        found: &'static str,
    },
    /// Other users can enter the folder of the socket.
    #[error(
        "the socket's folder {path} must belong to uid {uid} and have mode 0700, but it belongs to uid {found_uid} and has mode {mode:04o}"
    )]
    UnsafeFolder {
        /// The path of the folder.
        path: String,
        /// Our own uid.
        uid: u32,
        /// The uid of the folder's owner.
        found_uid: u32,
        /// The permission bits of the folder.
        mode: u32,
    },
    /// On a link that the far side dials, the peer sent no valid greeting (`link.proto`).
    #[error("greeting of {peer}{}", claim(claimed.as_deref()))]
    Greeting {
        /// The peer's address.
        peer: String,
        /// The identity in the peer's certificate.
        claimed: Option<String>,
        /// What happened.
        #[source]
        source: std::io::Error,
    },
    /// A newer agent of this site serves the kubelet.
    #[error(
        "another agent of this site, on {hostname} with the lease epoch {epoch}, serves the kubelet at {carrier}; restart \
         this agent if it is to serve instead"
    )]
    Superseded {
        /// The carrier to the kubelet.
        carrier: Box<Carrier>,
        /// The host of the other agent.
        hostname: String,
        /// The epoch of the other agent's lease.
        epoch: i64,
    },
    /// The agent already holds the maximum number of connections to kubelets.
    #[error("the kubelets hold {most} connections of this agent, the most that there may be")]
    TooMany {
        /// The maximum.
        most: usize,
    },
    /// No agent has dialled in, and this side does not dial.
    #[error("no agent has dialled in at {listen} for {} s{}", CONNECT_TIMEOUT.as_secs(), refused(refusal.as_deref()))]
    NobodyDialledIn {
        /// The address on which this side listens.
        listen: std::net::SocketAddr,
        /// Why the last connection was refused.
        refusal: Option<String>,
    },
    /// The connection of the channel has ended, and this side does not dial.
    #[error("the link has ended")]
    Ended,
}

fn claim(claimed: Option<&str>) -> String {
    claimed.map_or_else(String::new, |identity| {
        format!(" (it calls itself {identity})")
    })
}

fn refused(refusal: Option<&str>) -> String {
    refusal.map_or_else(String::new, |refusal| {
        format!("; the last connection that was refused: {refusal}")
    })
}

/// The effective uid of this process.
fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// A gRPC server with the link's flow-control windows, limits and keepalive. Every server of a link starts from this
/// one.
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

/// The gRPC client's counterpart of [`server`].
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
