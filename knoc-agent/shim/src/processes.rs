//! The PID namespace of a pod whose containers share their processes.
//!
//! A helper ([`crate::launch::hold`]) holds the PID namespace of all containers. It is
//! started with the first container, and ends with the shim. Ranks on one node share such a namespace, too: the helper of one of
//! them starts the holder.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use tokio::{net::UnixStream, sync::Mutex, time::timeout};

use super::{
    children::{Child, Children},
    handshake::{self, HandshakeError},
    network::Network,
    ranks::node::NodeFolder,
    signals::Identity,
};
use crate::launch::contain::spec::ContainSpec;

/// How long the helper may take to start.
const START: Duration = Duration::from_secs(10);

/// Why a container cannot share processes.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProcessesError {
    #[error(
        "this needs user namespaces, which this node or its container runtime (setuid) does not use; leave out \
         shareProcessNamespace and the target, or have the site allow user namespaces and install the runtime without its \
         setuid part"
    )]
    NoNamespaces,
    #[error("start the helper that holds the PID namespace")]
    Spawn(#[source] io::Error),
    #[error("hold the PID namespace")]
    Hold(#[source] HandshakeError),
    #[error("find the PID namespace of the ranks on this node")]
    Find(#[source] io::Error),
    #[error("the helper that holds the PID namespace has ended")]
    Ended,
    #[error("the helper that holds the PID namespace did not start within {} s", START.as_secs())]
    Slow,
}

/// The holder of the pod's PID namespace, once it was started.
#[derive(Debug, Default)]
pub(crate) struct Holder(Mutex<Option<(Identity, Child)>>);

/// What the helper is started with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Helper<'a> {
    /// The agent's executable.
    pub(crate) agent: &'a Path,
    pub(crate) children: &'a Children,
    /// The names that `/etc/subuid` may have for this user.
    pub(crate) users: &'a [String],
    /// The pod's network, in which the containers are.
    pub(crate) network: &'a Network,
}

impl Holder {
    /// PID 1 of the pod's namespace, which is started if it does not run.
    pub(crate) async fn first(&self, helper: Helper<'_>) -> Result<Identity, ProcessesError> {
        let mut holder = self.0.lock().await;
        if let Some((first, _)) = &*holder
            && first.lives()
        {
            return Ok(*first);
        }
        let started = timeout(START, start(helper)).await;
        let (first, child) = started.map_err(|_| ProcessesError::Slow)??;
        *holder = Some((first, child));
        Ok(first)
    }

    /// PID 1 of the namespace that the ranks on this node share. Whoever asks first starts it, and names it to the others in their
    /// folder.
    pub(crate) async fn of_node(
        &self,
        folder: &Arc<NodeFolder>,
        helper: Helper<'_>,
    ) -> Result<Identity, ProcessesError> {
        let of_all = Arc::clone(folder);
        // Another one may be starting it.
        let finding = tokio::task::spawn_blocking(move || of_all.holder()).await;
        let found = finding.map_err(io::Error::other).flatten();
        let (file, named) = found.map_err(ProcessesError::Find)?;
        if let Some(first) = named.filter(|first| first.runs()) {
            return Ok(first);
        }
        let first = self.first(helper).await?;
        let naming = folder.name_holder(&file, first);
        naming.map_err(ProcessesError::Find)?;
        Ok(first)
    }
}

/// Starts the holder. Returns its PID 1, and the process that waits for it.
async fn start(helper: Helper<'_>) -> Result<(Identity, Child), ProcessesError> {
    let (ours, theirs) = StdUnixStream::pair().map_err(ProcessesError::Spawn)?;
    ours.set_nonblocking(true).map_err(ProcessesError::Spawn)?;
    let ours = UnixStream::from_std(ours).map_err(ProcessesError::Spawn)?;
    let child = spawn(helper, theirs).map_err(ProcessesError::Spawn)?;
    let joined = helper.network.to_join().map_err(ProcessesError::Spawn)?;
    let (network, namespaces) =
        joined.map_or((None, Vec::new()), |to| (Some(to.ids), to.namespaces));
    let spec = ContainSpec {
        users: helper.users.to_vec(),
        network,
        ..ContainSpec::default()
    };
    let held = handshake::contain(ours, &spec, namespaces).await;
    let pid = held.map_err(ProcessesError::Hold)?.pid;
    let first = pid.and_then(Identity::of).ok_or(ProcessesError::Ended)?;
    Ok((first, child))
}

#[expect(
    clippy::disallowed_methods,
    reason = "the shim's one module that starts this helper"
)]
fn spawn(helper: Helper<'_>, socket: StdUnixStream) -> io::Result<Child> {
    let mut command = Command::new(helper.agent);
    command
        .arg("hold")
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(socket)))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    helper.children.spawn(&mut command, true)
}
