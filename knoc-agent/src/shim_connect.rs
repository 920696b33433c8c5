//! `knoc-agent connect JOBDIR`: relays standard input and output to the socket of the shim of that pod. The agent runs
//! it as a step of the pod's job if compute nodes cannot reach the agent ([`crate::shim_steps`]). The shim's report names
//! the socket, which only works on the shim's own node. What is relayed is not interpreted, and nothing is relayed to a
//! process of another user.

use std::{path::Path, time::Duration};

use knoc_contract::{
    host::node_name,
    jobdir::{JobDir, JobDirError},
};
use knoc_link::{LinkError, carrier::unix};
use tokio::io::{self, AsyncWriteExt as _};

/// Why nothing was relayed, or why the relay ended.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
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
