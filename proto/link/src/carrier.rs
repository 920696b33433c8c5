//! Carriers: how bytes get from one side of a link to the other, before any peer has proved anything.
//!
//! Each carrier is a file under this module. It implements [`Dial`] if it opens connections and [`Listener`] if it
//! accepts them; both yield [`Unverified`] connections. Admission, TLS and HTTP/2 know only these traits. [`Carrier`]
//! is the form in configuration, such as `tcp:HOST:PORT`, `ssh:USER@HOST` or `unix:/PATH`.
//!
//! To add a carrier, add its file, a variant of [`Carrier`] with its textual form, and an arm in
//! [`connect`](fn@super::connect) that says how its peer is verified. The compiler points at these places.
use std::{
    fmt,
    future::Future,
    io,
    net::SocketAddr,
    path::PathBuf,
    str::FromStr,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    LinkError,
    origin::Origin,
    proxy::{InvalidEnvironment, Proxy, Via},
};

pub mod exec;
pub mod http_connect;
pub mod ssh;
pub mod tcp;
pub mod unix;

/// A stream of bytes in both directions.
pub trait Io: AsyncRead + AsyncWrite + fmt::Debug + Send + Sync + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + fmt::Debug + Send + Sync + Unpin + 'static> Io for T {}

/// A connection whose peer has proved nothing yet.
#[derive(Debug)]
pub struct Unverified<I> {
    /// The stream of bytes.
    pub io: I,
    /// Where the connection comes from, as far as the carrier knows.
    pub origin: Origin,
}

/// The side of a carrier that opens connections.
pub trait Dial: fmt::Debug + Send + Sync {
    /// The stream of a connection that this carrier opens.
    type Io: Io;

    /// Opens a connection. The caller sets the deadline. Cancel safe: dropping the future closes the connection.
    fn dial(&self) -> impl Future<Output = Result<Unverified<Self::Io>, LinkError>> + Send;
}

/// The side of a carrier that accepts connections.
pub trait Listener: fmt::Debug + Send + Sync + Unpin + 'static {
    /// The stream of a connection that this carrier accepts.
    type Io: Io;

    /// Whether anybody can connect. If so, a connection must send its first byte before its handshake starts.
    const STRANGERS: bool;

    /// Polls for the next connection. An error concerns either that connection or the listener; see accept(2).
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Unverified<Self::Io>>>;

    /// The network address that is listened on; `None` if the carrier is not a network.
    fn local_addr(&self) -> Option<SocketAddr>;

    /// Waits for the first byte of a connection without reading it, and sets the connection's socket options. Returns
    /// `false` if the connection ended before that byte. The caller sets the deadline.
    fn first_byte(_io: &Self::Io) -> impl Future<Output = bool> + Send {
        std::future::ready(true)
    }
}

/// How a peer is reached, as written in configuration.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Carrier {
    /// TLS over TCP to `HOST:PORT`.
    Tcp(String),
    /// TLS over TCP to `HOST:PORT` through an HTTP proxy.
    HttpConnect {
        /// `host:port`
        address: String,
        /// The proxy.
        proxy: Proxy,
    },
    /// A unix socket without TLS, whose peer is identified by its uid.
    Unix(PathBuf),
    /// Standard input and output of a command, spoken TLS over.
    Exec(exec::Argv),
    /// A login over SSH, spoken TLS over.
    Ssh(Box<ssh::Ssh>),
}

impl Carrier {
    /// The same carrier, with these options if it is a login over SSH.
    #[must_use]
    pub fn with_login(self, login: ssh::Login) -> Self {
        match self {
            Self::Ssh(ssh) => Self::Ssh(Box::new(ssh::Ssh { login, ..*ssh })),
            Self::Tcp(_) | Self::HttpConnect { .. } | Self::Unix(_) | Self::Exec(_) => self,
        }
    }

    /// Whether each connection starts a process, and perhaps a login at another host.
    #[must_use]
    pub fn starts_a_process(&self) -> bool {
        match self {
            Self::Exec(_) | Self::Ssh(_) => true,
            Self::Tcp(_) | Self::HttpConnect { .. } | Self::Unix(_) => false,
        }
    }
}

impl Carrier {
    /// This carrier through the proxy that the settings or the environment name for it, if any. `variable` reads the
    /// environment.
    pub fn via(
        self,
        via: &Via,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, InvalidEnvironment> {
        let Self::Tcp(address) = self else {
            return Ok(self);
        };
        Ok(match via.proxy_for(&address, variable)? {
            Some(proxy) => Self::HttpConnect { address, proxy },
            None => Self::Tcp(address),
        })
    }

    /// `host:port` of the peer, if it is reached over a network.
    #[must_use]
    pub fn address(&self) -> Option<&str> {
        match self {
            Self::Tcp(address) | Self::HttpConnect { address, .. } => Some(address),
            Self::Unix(_) | Self::Exec(_) | Self::Ssh(_) => None,
        }
    }
}

/// Why a text is not a carrier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidCarrier {
    /// The address does not have the form `HOST:PORT`.
    #[error("{address:?} is not HOST:PORT (write an IPv6 address in brackets)")]
    Address {
        /// The text in place of the address.
        address: String,
    },
    /// The path of the socket is relative.
    #[error("the socket path {path:?} is not absolute; write unix:/PATH")]
    Relative {
        /// The path as configured.
        path: String,
    },
    /// A scheme that this version does not know.
    #[error(
        "the carrier {scheme:?} is not supported; use tcp:HOST:PORT, ssh:[USER@]HOST[:PORT], exec:COMMAND or unix:/PATH"
    )]
    Scheme {
        /// The text before the first colon.
        scheme: String,
    },
    /// A command that would not be run as it is written.
    #[error("the command {command:?}: {why}")]
    Command {
        /// As given.
        command: String,
        /// What is wrong with it.
        why: String,
    },
    /// Not a login.
    #[error("{login:?} is not [USER@]HOST[:PORT] (an IPv6 address stands in brackets)")]
    Login {
        /// As given.
        login: String,
    },
}

impl FromStr for Carrier {
    type Err = InvalidCarrier;

    fn from_str(text: &str) -> Result<Self, InvalidCarrier> {
        match text.split_once(':') {
            Some(("unix", path)) => unix::parse(path),
            Some(("tcp", address)) => tcp::parse(address),
            Some(("exec", command)) => exec::parse(command),
            Some(("ssh", login)) => ssh::parse(login),
            Some((scheme, rest)) if rest.starts_with("//") => Err(InvalidCarrier::Scheme {
                scheme: scheme.to_owned(),
            }),
            Some(_) | None => tcp::parse(text),
        }
    }
}

impl fmt::Display for Carrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "tcp:{address}"),
            Self::HttpConnect { address, proxy } => {
                write!(f, "tcp:{address} through the proxy {proxy}")
            }
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Exec(argv) => write!(f, "exec:{argv}"),
            Self::Ssh(ssh) => write!(f, "ssh:{ssh}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_is_parsed_and_written() {
        for (text, shown) in [
            ("login:10350", "tcp:login:10350"),
            ("tcp:10.0.0.1:1", "tcp:10.0.0.1:1"),
            ("[::1]:10350", "tcp:[::1]:10350"),
            ("unix:/run/knoc/agent.sock", "unix:/run/knoc/agent.sock"),
            ("ssh:ann@login:2222", "ssh:ann@login:2222"),
            ("exec:ssh login", "exec:ssh login"),
            ("exec:[\"a b\"]", "exec:[\"a b\"]"),
        ] {
            let carrier: Carrier = text.parse().unwrap();
            assert_eq!(carrier.to_string(), shown);
            assert_eq!(shown.parse::<Carrier>().unwrap(), carrier);
        }
    }

    #[test]
    fn invalid_carriers_are_named_with_the_cause() {
        for (text, message) in [
            ("login", "not HOST:PORT"),
            ("login:http", "not HOST:PORT"),
            ("::1:10350", "brackets"),
            ("unix:agent.sock", "not absolute"),
            ("https://x:1", "not supported"),
            ("ssh://login", "not [USER@]HOST"),
            ("exec:ssh 'login'", "as a list"),
        ] {
            let error = text.parse::<Carrier>().unwrap_err().to_string();
            assert!(error.contains(message), "{text}: {error}");
        }
    }
}
