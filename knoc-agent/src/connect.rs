//! `knoc-agent connect`: relays standard input and output to a socket of the running agent, for links that start a command
//! on the login node (`ssh login knoc-agent connect`). It does not interpret what it relays, and it relays nothing to a
//! process of another user.
//!
//! By default it relays to the agent's TLS socket, where every client shows a certificate and `[policy]` decides who is
//! served. Only `--plain` relays to the socket without TLS, which serves whoever logs in as this user; that is for knocctl.
//!
//! The agent may run on another login node that shares the state directory. TLS is relayed to its port there; the plain
//! socket belongs to one host, so that host is named instead.
//!
//! A marker line precedes the relayed bytes: the near side discards what a login shell has printed before it.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd as _, OwnedFd},
    time::Duration,
};

use knoc_contract::jobdir::schema::Lease;
use knoc_link::{
    LinkError,
    carrier::{exec::marker::Speaks, unix},
    socket::SocketLocations,
};
use tokio::net::TcpStream;

use crate::config::Config;

/// How long the holder's host may take to accept a connection.
const DIAL: Duration = Duration::from_secs(5);
/// What is moved at once: more than a socket buffers by default.
const CHUNK: usize = 256 << 10;

/// Why nothing was relayed, or why the relay ended.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No agent of this user answers.
    #[error("relay to the agent")]
    Link(#[source] LinkError),
    /// The agent has no certificate.
    #[error(
        "relay to the agent: it has no [tls] in its site file, so only `knoc-agent connect --plain` reaches it"
    )]
    NoTls,
    /// The state directory is in use on another host.
    #[error("relay to the agent: it runs on {host}, log in there{}", tried.as_ref().map_or_else(String::new, |tried| format!(" ({tried})")))]
    Elsewhere {
        /// The name of that host.
        host: String,
        /// The attempt to relay to that host.
        tried: Option<String>,
        /// Why this host's socket could not be used.
        #[source]
        source: Box<LinkError>,
    },
    /// The connection, standard input or standard output broke.
    #[error("relay to the agent")]
    Broken(#[source] io::Error),
}

/// A connection to the agent that nothing was sent over yet.
#[derive(Debug)]
pub struct Reached {
    socket: OwnedFd,
    speaks: Speaks,
}

/// Connects to the agent of this state directory.
pub async fn reach(
    config: &Config,
    places: &SocketLocations,
    speaks: Speaks,
) -> Result<Reached, ConnectError> {
    if speaks == Speaks::Tls && config.tls.is_none() {
        return Err(ConnectError::NoTls);
    }
    let source = match local(places, speaks).await {
        Ok(socket) => return Ok(Reached { socket, speaks }),
        Err(error) => error,
    };
    let absent = if let LinkError::Connect { source, .. } = &source {
        source.kind() == io::ErrorKind::NotFound
    } else {
        matches!(source, LinkError::NotServed { .. })
    };
    let Some(host) = places.other_host().filter(|_| absent) else {
        return Err(ConnectError::Link(source));
    };
    if speaks == Speaks::Plain {
        return Err(ConnectError::Elsewhere {
            host,
            tried: None,
            source: Box::new(source),
        });
    }
    // The link is TLS from end to end, so the network between the login nodes is not trusted.
    let tried = match config.listen.kubelet.map(|address| address.port()) {
        Some(port) => match dial(&host, port).await {
            Ok(socket) => return Ok(Reached { socket, speaks }),
            Err(error) => Some(format!(
                "its port {port} does not answer from here: {error}"
            )),
        },
        None => None,
    };
    Err(ConnectError::Elsewhere {
        host,
        tried,
        source: Box::new(source),
    })
}

/// The first of the sockets that is served; the error of the first otherwise. An agent that was started in another
/// environment may serve another one than that of this login.
async fn local(places: &SocketLocations, speaks: Speaks) -> Result<OwnedFd, LinkError> {
    let candidates = match speaks {
        Speaks::Plain => places.candidates(),
        Speaks::Tls => places.tls_candidates(),
    };
    let mut first = None;
    for path in candidates {
        match unix::connect(&path).await {
            Ok((stream, _)) => return blocking(stream.into_std(), &path),
            Err(error) => {
                // A dead socket says more than one that is not there.
                let better = matches!(error, LinkError::NotServed { .. });
                if better || first.is_none() {
                    first = Some(error);
                }
            }
        }
    }
    Err(first.unwrap_or(LinkError::Ended))
}

fn blocking(
    stream: io::Result<std::os::unix::net::UnixStream>,
    path: &std::path::Path,
) -> Result<OwnedFd, LinkError> {
    let stream = stream.and_then(|stream| {
        stream.set_nonblocking(false)?;
        Ok(OwnedFd::from(stream))
    });
    stream.map_err(|source| LinkError::Connect {
        carrier: knoc_link::Carrier::Unix(path.to_owned()),
        source,
    })
}

async fn dial(host: &str, port: u16) -> io::Result<OwnedFd> {
    let dialled = tokio::time::timeout(DIAL, TcpStream::connect((host, port))).await;
    let stream = dialled.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
    stream.set_nodelay(true)?;
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    Ok(stream.into())
}

/// Whether an agent on another host of this state directory has shown recently that it lives.
#[must_use]
pub fn lives_elsewhere(lease: Option<&Lease>, own_host: &str, now: i64) -> bool {
    let stale = i64::try_from(crate::lease::STALE.as_secs()).unwrap_or(60);
    lease.is_some_and(|lease| lease.host != own_host && now - lease.heartbeat <= stale)
}

impl Reached {
    /// Writes the marker and relays until the agent closes the connection. Blocking.
    pub fn relay(self) -> Result<(), ConnectError> {
        self.run().map_err(ConnectError::Broken)
    }

    fn run(self) -> io::Result<()> {
        // Descriptors of their own: the standard library's handles buffer by lines.
        let mut input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        let mut output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        output.write_all(self.speaks.marker())?;
        let mut from_agent = File::from(self.socket);
        let mut to_agent = from_agent.try_clone()?;
        // It may wait for input for ever: the relay ends when the agent closes the connection, and the process with it. The
        // end of standard input alone does not end it.
        std::thread::Builder::new().spawn(move || {
            copy(&mut input, &mut to_agent).ok();
            // The agent sees the end of input, and may still answer.
            rustix::net::shutdown(&to_agent, rustix::net::Shutdown::Write).ok();
        })?;
        copy(&mut from_agent, &mut output)
    }
}

fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    loop {
        let read = match from.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        to.write_all(chunk.get(..read).unwrap_or_default())?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_elsewhere_counts_while_its_heartbeat_is_fresh() {
        let lease = Lease {
            host: "login1".into(),
            boot_id: String::new(),
            pid: 1,
            epoch: 1,
            heartbeat: 1000,
            version: None,
        };
        assert!(lives_elsewhere(Some(&lease), "login2", 1060));
        assert!(!lives_elsewhere(Some(&lease), "login2", 1061));
        assert!(!lives_elsewhere(Some(&lease), "login1", 1000));
        assert!(!lives_elsewhere(None, "login2", 0));
    }
}
