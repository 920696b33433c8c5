//! `knoc-agent connect`: relays standard input and output to the running agent's unix socket, for
//! transports that start a command (`ssh login knoc-agent connect`). It does not interpret what it
//! relays, and it relays nothing to a process of another user.

use knoc_link::{LinkError, carrier::unix, socket::SocketLocations};
use tokio::io::{self, AsyncWriteExt as _};

/// Why nothing was relayed, or why the relay ended.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No agent of this user answers.
    #[error("relay to the agent")]
    Link(#[source] LinkError),
    /// The state directory is in use on another host.
    #[error("relay to the agent: it runs on {host}, log in there")]
    Elsewhere {
        /// The name of that host.
        host: String,
        /// Why this host's socket could not be used.
        #[source]
        source: LinkError,
    },
    /// The connection, standard input or standard output broke.
    #[error("relay to the agent")]
    Broken(#[source] io::Error),
}

/// Relays until either side ends.
pub async fn run(places: &SocketLocations) -> Result<(), ConnectError> {
    let path = places.find().unwrap_or_else(|| places.choose().0);
    let (stream, _) = unix::connect(&path).await.map_err(|source| {
        let not_served = matches!(source, LinkError::NotServed { .. });
        match places.other_host().filter(|_| not_served) {
            Some(host) => ConnectError::Elsewhere { host, source },
            None => ConnectError::Link(source),
        }
    })?;
    relay(stream).await.map_err(ConnectError::Broken)
}

async fn relay(stream: tokio::net::UnixStream) -> io::Result<()> {
    let (mut from_agent, mut to_agent) = stream.into_split();
    let upstream = async {
        let copied = io::copy(&mut io::stdin(), &mut to_agent).await;
        // A half-close is passed on: the agent sees the end of input and may still answer.
        to_agent.shutdown().await.and(copied)
    };
    let downstream = async {
        let mut stdout = io::stdout();
        io::copy(&mut from_agent, &mut stdout).await?;
        stdout.flush().await
    };
    tokio::select! {
        // The relay ends when the agent closes the connection; the end of standard input alone does
        // not end it.
        done = downstream => done,
        Err(error) = upstream => Err(error),
    }
}
