//! The helper that holds the pod's namespaces, as the shim sees it: one process, one question at a time.

use std::{
    collections::BTreeSet,
    io,
    net::Ipv4Addr,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use crate::{
    children::{Child, Children},
    launch::{
        fds,
        ids::Ids,
        network::protocol::{Answer, Family, Kind, LONGEST, Range, Request, Tmpfs},
    },
};

/// How long an answer may take. Creating the namespaces runs the tools that map ids.
const PATIENCE: Duration = Duration::from_secs(10);

/// The helper's process.
#[derive(Debug)]
pub(super) struct Holder {
    pub(super) pid: u32,
    /// Ends when the shim drops it.
    _child: Child,
    /// `None` once an answer did not come: a later one would be taken for the answer to another question.
    socket: Mutex<Option<UnixStream>>,
}

/// The pod's namespaces.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) user: OwnedFd,
    pub(super) net: OwnedFd,
    pub(super) ids: Ids,
    /// Why there is no edge, if there is none.
    pub(super) no_edge: Option<String>,
}

impl Holder {
    /// Starts the helper, which creates the namespaces.
    pub(super) async fn start(
        children: &Children,
        agent: &Path,
        users: &[String],
        address: Ipv4Addr,
    ) -> io::Result<(Arc<Self>, Held)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(PATIENCE))?;
        ours.set_write_timeout(Some(PATIENCE))?;
        let child = spawn(children, agent, theirs)?;
        let holder = Arc::new(Self {
            pid: child.pid,
            _child: child,
            socket: Mutex::new(Some(ours)),
        });
        let users = users.to_vec();
        let (answer, descriptors) = holder.ask(Request::Create { users, address }).await?;
        let descriptors = <[OwnedFd; 2]>::try_from(descriptors);
        let (Answer::Created { ids, no_edge }, Ok([user, net])) = (answer, descriptors) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let held = Held {
            user,
            net,
            ids,
            no_edge,
        };
        Ok((holder, held))
    }

    /// A socket in the pod's network.
    pub(super) async fn socket(
        self: &Arc<Self>,
        family: Family,
        kind: Kind,
    ) -> io::Result<OwnedFd> {
        self.ask_for_one(Request::Socket(family, kind)).await
    }

    /// A socket in the edge.
    pub(super) async fn edge_socket(self: &Arc<Self>, kind: Kind) -> io::Result<OwnedFd> {
        self.ask_for_one(Request::EdgeSocket(kind)).await
    }

    async fn ask_for_one(self: &Arc<Self>, request: Request) -> io::Result<OwnedFd> {
        let (_, mut descriptors) = self.ask(request).await?;
        let socket = descriptors.pop();
        socket.ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Mounts a volume in memory. Returns the mount namespace in which it is, and the volume.
    pub(super) async fn mount(self: &Arc<Self>, volume: Tmpfs) -> io::Result<[OwnedFd; 2]> {
        let (_, made) = self.ask(Request::Memory(volume)).await?;
        <[OwnedFd; 2]>::try_from(made).map_err(|_| io::ErrorKind::InvalidData.into())
    }

    /// Has exactly these ranges lead to the edge.
    pub(super) async fn lead(self: &Arc<Self>, ranges: BTreeSet<Range>) -> io::Result<()> {
        self.ask(Request::Lead(ranges)).await.map(drop)
    }

    /// Has what the pod sends to this range go nowhere, until there is the interface of the mesh.
    pub(super) async fn bar(self: &Arc<Self>, range: Range) -> io::Result<()> {
        self.ask(Request::MeshBar(range)).await.map(drop)
    }

    /// The interface of the mesh, with this address of the pod; the result has the packets that go over it.
    pub(super) async fn mesh(
        self: &Arc<Self>,
        address: Ipv4Addr,
        range: Range,
    ) -> io::Result<OwnedFd> {
        self.ask_for_one(Request::Mesh { address, range }).await
    }

    /// Has these ranges lead over the interface of the mesh.
    pub(super) async fn reach(self: &Arc<Self>, ranges: BTreeSet<Range>) -> io::Result<()> {
        self.ask(Request::MeshRoutes(ranges)).await.map(drop)
    }

    /// Whether the pod has a way to other networks.
    pub(super) async fn is_routed(self: &Arc<Self>) -> io::Result<bool> {
        Ok(self.ask(Request::IsRouted).await?.0 == Answer::Routed(true))
    }

    /// Closes the helper's files to other processes of this user.
    pub(super) async fn seal(self: &Arc<Self>) -> io::Result<()> {
        self.ask(Request::Seal).await.map(drop)
    }

    /// Asks on a blocking thread, to the end even if the caller is dropped.
    async fn ask(self: &Arc<Self>, request: Request) -> io::Result<(Answer, Vec<OwnedFd>)> {
        let holder = Arc::clone(self);
        let asked = tokio::task::spawn_blocking(move || holder.ask_now(&request)).await;
        asked.map_err(io::Error::other)?
    }

    fn ask_now(&self, request: &Request) -> io::Result<(Answer, Vec<OwnedFd>)> {
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(stream) = socket.as_ref() else {
            let what = "the process that holds the pod's network has ended";
            return Err(io::Error::other(what));
        };
        let answer = converse(stream, request);
        if answer.is_err() {
            *socket = None;
        }
        match answer? {
            (Answer::Failed { why }, _) => Err(io::Error::other(why)),
            other => Ok(other),
        }
    }
}

fn converse(socket: &UnixStream, request: &Request) -> io::Result<(Answer, Vec<OwnedFd>)> {
    fds::send_frame(socket, &serde_json::to_vec(request)?, &[])?;
    let received = fds::receive_frame(socket, LONGEST)?;
    let (body, descriptors) = received.ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok((serde_json::from_slice(&body)?, descriptors))
}

#[expect(
    clippy::disallowed_methods,
    reason = "the shim's one module that starts the holder of the pod's network"
)]
fn spawn(children: &Children, agent: &Path, theirs: UnixStream) -> io::Result<Child> {
    let mut command = Command::new(agent);
    command
        .arg("network")
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // The command holds the helper's end of the socket until it is dropped, and the shim would never see the end of file.
    children.spawn(&mut command, true)
}
