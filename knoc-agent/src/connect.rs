//! `knoc-agent connect [JOBDIR]`: relays standard input and output to the running agent's unix socket, for
//! transports that start a command (`ssh login knoc-agent connect`). It does not interpret what it
//! relays, and it relays nothing to a process of another user.
//!
//! With a job directory it relays to the shim of that pod instead: the agent runs it as a step of
//! the pod's job if compute nodes cannot reach the agent ([`crate::shim_steps`]). The shim's report
//! names its socket, which only works on the shim's own node.

use std::{path::Path, time::Duration};

use knoc_contract::{
    host::node_name,
    jobdir::{JobDir, JobDirError},
};
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
    /// The relay to a shim broke, or its report cannot be read.
    #[error("relay to the shim")]
    Stream(#[from] io::Error),
    /// The job directory or its report cannot be read.
    #[error("find the shim")]
    JobDir(#[from] JobDirError),
    /// The shim has written no report.
    #[error("the shim of this job directory has written no report yet")]
    NoReport,
    /// The shim has no socket.
    #[error(
        "the shim of this job directory has no socket: it is of an older version, or could not create one"
    )]
    NoSocket,
    /// The shim's socket does not answer.
    #[error("relay to the shim on {shim}, from {here}")]
    Shim {
        /// The shim's host.
        shim: String,
        /// This host.
        here: String,
        /// What failed.
        #[source]
        source: LinkError,
    },
}

/// What `connect JOBDIR` writes before the stream begins, so that the agent can skip what others
/// print first.
pub const MARKER: &[u8; 13] = b"\nknoc-stream\n";

/// How long the shim may take to end the connection after the end of standard input.
const FAREWELL: Duration = Duration::from_secs(5);

/// Relays to the shim of the pod with this job directory, until either side ends.
pub async fn to_shim(path: &Path) -> Result<(), ConnectError> {
    let dir = JobDir::open(path)?;
    let report = tokio::task::spawn_blocking(move || dir.report());
    let report = report.await.map_err(io::Error::other)??;
    let report = report.ok_or(ConnectError::NoReport)?;
    let socket = report.route.map(|route| route.socket).unwrap_or_default();
    if !socket.starts_with('/') {
        return Err(ConnectError::NoSocket);
    }
    let here = node_name();
    let connected = unix::connect(Path::new(&socket)).await;
    let (stream, _) = connected.map_err(|source| ConnectError::Shim {
        shim: report.hostname,
        here,
        source,
    })?;
    let mut stdout = io::stdout();
    stdout.write_all(MARKER).await?;
    stdout.flush().await?;
    let (mut from_shim, mut to_shim) = stream.into_split();
    let upstream = async {
        let copied = io::copy(&mut io::stdin(), &mut to_shim).await;
        let closed = to_shim.shutdown().await.and(copied);
        // The shim ends the connection when it sees the end. If it does not, nobody is left who
        // would end this process.
        tokio::time::sleep(FAREWELL).await;
        closed.map(drop)
    };
    let downstream = async {
        io::copy(&mut from_shim, &mut stdout).await?;
        stdout.flush().await
    };
    tokio::select! {
        done = downstream => Ok(done?),
        done = upstream => Ok(done?),
    }
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
