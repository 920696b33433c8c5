//! The pod's network: that of the compute node, or a network namespace of the pod's own.
//!
//! With a network of its own (`private`) a pod may listen on any port, its containers share the loopback interface, and no
//! process outside the pod can reach them but through the shim. The namespaces belong to a helper
//! ([`crate::launch::network`]); the shim holds descriptors of them and stays outside, so that its link works. pasta(1)
//! leads to the networks of the node ([`pasta`]).

mod holder;
mod names;
mod pasta;

use std::{
    collections::{BTreeSet, HashMap},
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use anyhow::Context as _;
use knoc_proto::{error::chain, pb};
use tokio::net::{TcpSocket, TcpStream, UdpSocket};

use self::{
    holder::{Held, Holder},
    names::Names,
    pasta::{Options, Pasta, PastaError},
};
use super::children::Children;
use crate::launch::{
    ids::Ids,
    network::protocol::{Family, Kind, Range, Tmpfs},
};

/// The address of every pod with a network of its own. It is of a block that no network routes (RFC 7335), so it hides
/// nothing that a pod may want to reach.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 2);

/// The network that the pod's containers are in.
#[derive(Debug, Clone, Default)]
pub(crate) enum Network {
    /// The compute node's.
    #[default]
    Host,
    /// The pod's own.
    Private(Arc<Private>),
}

/// A network namespace of the pod's own.
#[derive(Debug)]
pub(crate) struct Private {
    /// The user namespace that owns it.
    user: OwnedFd,
    net: OwnedFd,
    /// The ids that are mapped in the user namespace.
    ids: Ids,
    holder: Arc<Holder>,
    /// `None`: the pod has no volumes in memory with a size, or they could not be mounted.
    memory: Option<Memory>,
    /// The address that every pod has in its own network.
    pub(crate) address: IpAddr,
    /// The address at which other pods reach it, once it has one. It is never another one.
    own: OnceLock<Ipv4Addr>,
    /// Replaces the node's `/etc/resolv.conf`.
    resolv_conf: Option<String>,
    /// Why the pod has no edge, without which it does not reach the cluster.
    pub(crate) no_edge: Option<String>,
}

/// The volumes in memory that have a size.
#[derive(Debug)]
struct Memory {
    /// The mount namespace in which they are.
    namespace: OwnedFd,
    /// The shim's folders at which they are mounted there, and the volumes.
    volumes: Vec<(PathBuf, OwnedFd)>,
}

/// What a container's helper joins.
#[derive(Debug)]
pub(crate) struct Joined {
    pub(crate) ids: Ids,
    /// The user namespace, then the network namespace, then the mount namespace of volumes in memory, if there is one.
    pub(crate) namespaces: Vec<OwnedFd>,
}

impl Network {
    /// Without the helper that joins it, a container would be in the node's network.
    pub(crate) fn is_host(&self) -> bool {
        matches!(self, Self::Host)
    }

    /// What the helper of a container has to join; `None` in the node's network.
    pub(crate) fn to_join(&self) -> io::Result<Option<Joined>> {
        let Self::Private(private) = self else {
            return Ok(None);
        };
        let mut namespaces = vec![private.user.try_clone()?, private.net.try_clone()?];
        if let Some(memory) = &private.memory {
            namespaces.push(memory.namespace.try_clone()?);
        }
        Ok(Some(Joined {
            ids: private.ids.clone(),
            namespaces,
        }))
    }

    /// The volume in memory that containers see at this folder of the shim, if one is mounted there.
    pub(crate) fn mounted_at(&self, folder: &Path) -> Option<BorrowedFd<'_>> {
        let Self::Private(private) = self else {
            return None;
        };
        let mut volumes = private.memory.iter().flat_map(|memory| &memory.volumes);
        let (_, volume) = volumes.find(|(path, _)| path == folder)?;
        Some(volume.as_fd())
    }

    /// The text that replaces the node's `/etc/resolv.conf`.
    pub(crate) fn resolv_conf(&self) -> Option<&str> {
        match self {
            Self::Host => None,
            Self::Private(private) => private.resolv_conf.as_deref(),
        }
    }
}

impl Private {
    /// Connects to an address in the pod's network.
    pub(crate) async fn connect(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let family = match address {
            SocketAddr::V4(_) => Family::Ipv4,
            SocketAddr::V6(_) => Family::Ipv6,
        };
        let socket = self.holder.socket(family, Kind::Tcp).await?;
        let socket = TcpSocket::from_std_stream(std::net::TcpStream::from(socket));
        let stream = socket.connect(address).await?;
        // If nobody listens, the kernel may choose this very port for the shim's end, and TCP connects the socket to itself.
        if stream.local_addr()? == address {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        Ok(stream)
    }

    /// A socket for datagrams in the pod's network.
    pub(crate) async fn datagrams(&self) -> io::Result<UdpSocket> {
        let socket = self.holder.socket(Family::Ipv4, Kind::Udp).await?;
        UdpSocket::from_std(socket.into())
    }

    /// A socket in the edge, where the shim takes what the pod sends to the cluster.
    pub(crate) async fn edge_socket(&self, kind: Kind) -> io::Result<OwnedFd> {
        self.holder.edge_socket(kind).await
    }

    /// Has what the pod sends to this range, of which pods have addresses, go nowhere as long as it has none itself.
    pub(crate) async fn bar(&self, range: Range) -> io::Result<()> {
        self.holder.bar(range).await
    }

    /// Gives the pod this address, at which the pods of `range` reach it. The result has the packets that they exchange.
    pub(crate) async fn join(&self, address: Ipv4Addr, range: Range) -> io::Result<OwnedFd> {
        let packets = self.holder.mesh(address, range).await?;
        // It is called once.
        self.own.set(address).ok();
        Ok(packets)
    }

    /// Has these ranges lead to other pods, too.
    pub(crate) async fn reach(&self, ranges: BTreeSet<Range>) -> io::Result<()> {
        self.holder.reach(ranges).await
    }

    /// The address at which other pods reach it, if it has one.
    pub(crate) fn own_address(&self) -> Option<Ipv4Addr> {
        self.own.get().copied()
    }

    /// Has exactly these ranges lead from the pod to the edge.
    pub(crate) async fn lead(&self, ranges: BTreeSet<Range>) -> io::Result<()> {
        self.holder.lead(ranges).await
    }
}

/// What decides about the pod's network.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wish {
    /// What the pod asks for.
    pub(crate) pod: pb::NetworkMode,
    /// The site's setting.
    pub(crate) site: pb::NetworkMode,
    /// Whether containers are started by a helper that can join namespaces.
    pub(crate) joins: bool,
    /// Whether the job has several tasks or nodes, which reach each other over the nodes' network.
    pub(crate) parallel: bool,
}

/// What is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plan {
    Host,
    /// A network of its own, if it leads to other networks; otherwise the node's.
    IfPossible,
    Private,
}

/// Why the pod cannot have a network of its own.
#[derive(Debug, thiserror::Error)]
enum PlanError {
    #[error(
        "the container runtime of this site cannot start containers in it: it needs Apptainer or Singularity without \
         setuid"
    )]
    Runtime,
}

impl Wish {
    /// PURE: what to try. The pod's wish comes before the site's.
    fn plan(self) -> Result<Plan, PlanError> {
        use pb::NetworkMode as Mode;
        let asked = match self.pod {
            Mode::Unspecified | Mode::Auto => self.site,
            Mode::Private | Mode::Host => self.pod,
        };
        match asked {
            Mode::Private if self.joins => Ok(Plan::Private),
            Mode::Private => Err(PlanError::Runtime),
            Mode::Auto if self.joins && !self.parallel => Ok(Plan::IfPossible),
            Mode::Auto | Mode::Host | Mode::Unspecified => Ok(Plan::Host),
        }
    }
}

/// What the network is brought up with.
#[derive(Debug)]
pub(crate) struct Tools<'a> {
    pub(crate) children: &'a Children,
    /// The agent's executable, which is the helper.
    pub(crate) agent: &'a Path,
    /// The names that `/etc/subuid` may have for this user.
    pub(crate) users: &'a [String],
    /// The environment of the runtime, whose `PATH` may have pasta.
    pub(crate) env: &'a HashMap<String, String>,
    /// Whether a network of the pod's own reaches the node's IPv6 networks too.
    pub(crate) ipv6: bool,
    /// The volumes in memory that have a size.
    pub(crate) memory: &'a [Tmpfs],
}

/// What it means that a pod has no edge.
pub(crate) const NO_CLUSTER: &str = "the pod does not reach the cluster's Services";

/// The network, and what it lacks.
#[derive(Debug)]
pub(crate) struct Up {
    pub(crate) network: Network,
    /// Leads to other networks as long as it lives.
    pasta: Option<Pasta>,
    /// What does not work in it.
    pub(crate) lacks: Vec<String>,
    /// Why the pod does not reach the cluster, if it should.
    pub(crate) no_cluster: Option<String>,
    /// Why the pod shares the node's network, although it could have one of its own.
    shared: Option<String>,
}

impl Up {
    fn host(shared: Option<String>) -> Self {
        Self {
            network: Network::Host,
            pasta: None,
            lacks: Vec::new(),
            no_cluster: None,
            shared,
        }
    }

    /// What the shim reports.
    pub(crate) fn reported(&self) -> pb::PodNetwork {
        let mode = match self.network {
            Network::Host => pb::NetworkMode::Host,
            Network::Private(_) => pb::NetworkMode::Private,
        };
        let no_cluster = self.no_cluster.as_ref();
        let no_cluster = no_cluster.map(|why| format!("{NO_CLUSTER}: {why}"));
        let first = self.lacks.first().cloned().or(no_cluster);
        pb::PodNetwork {
            mode: mode.into(),
            reason: first.or_else(|| self.shared.clone()).unwrap_or_default(),
            address: String::new(),
        }
    }

    /// Waits until the pod's way to other networks ends, which should not happen before the pod does. Returns why.
    pub(crate) async fn lost(self) -> String {
        match self.pasta {
            Some(mut pasta) => chain(&pasta.ended().await),
            None => std::future::pending().await,
        }
    }
}

/// Brings up the pod's network. Fails if the pod or the site asks for what this node cannot do.
pub(crate) async fn bring_up(tools: &Tools<'_>, wish: Wish) -> anyhow::Result<Up> {
    const ASKED: &str = "the pod is to have a network of its own (`private`)";
    let plan = wish.plan().context(ASKED)?;
    if plan == Plan::Host {
        return Ok(Up::host(None));
    }
    let started = Holder::start(tools.children, tools.agent, tools.users, ADDRESS).await;
    let (holder, held) = match started {
        Ok(started) => started,
        Err(error) if plan == Plan::IfPossible => return Ok(Up::host(Some(chain(&error)))),
        Err(error) => return Err(anyhow::Error::new(error).context(ASKED)),
    };
    let (pasta, mut lacks) = match lead_out(tools, &holder).await {
        Ok(pasta) => (Some(pasta), Vec::new()),
        Err(error) => (
            None,
            vec![format!("it reaches no other network: {}", chain(&error))],
        ),
    };
    let names = Names::find(tools.ipv6);
    if names == Names::Lost {
        lacks.push(names::LOST.to_owned());
    }
    if plan == Plan::IfPossible && !lacks.is_empty() {
        return Ok(Up::host(Some(lacks.swap_remove(0))));
    }
    let memory = mount_memory(&holder, tools.memory).await;
    match holder.seal().await {
        Ok(()) => {}
        Err(error) if plan == Plan::IfPossible => return Ok(Up::host(Some(chain(&error)))),
        Err(error) => return Err(anyhow::Error::new(error).context(ASKED)),
    }
    Ok(Up {
        network: Network::Private(Arc::new(private(holder, held, names, memory))),
        pasta,
        lacks,
        no_cluster: None,
        shared: None,
    })
}

fn private(holder: Arc<Holder>, held: Held, names: Names, memory: Option<Memory>) -> Private {
    Private {
        user: held.user,
        net: held.net,
        ids: held.ids,
        holder,
        memory,
        address: ADDRESS.into(),
        own: OnceLock::new(),
        resolv_conf: match names {
            Names::Instead(text) => Some(text),
            Names::OfNode | Names::Lost => None,
        },
        no_edge: held.no_edge,
    }
}

/// Mounts the volumes in memory. If that fails, they lie in the node's memory file system and are measured, as in the node's
/// network.
async fn mount_memory(holder: &Arc<Holder>, volumes: &[Tmpfs]) -> Option<Memory> {
    let mut memory: Option<Memory> = None;
    for volume in volumes {
        let [namespace, root] = match holder.mount(volume.clone()).await {
            Ok(mounted) => mounted,
            Err(error) => {
                let error = chain(&error);
                tracing::warn!(%error, "the volumes in memory have no size of their own, and are measured");
                return None;
            }
        };
        let mounted = (volume.path.clone(), root);
        match &mut memory {
            Some(memory) => memory.volumes.push(mounted),
            None => {
                memory = Some(Memory {
                    namespace,
                    volumes: vec![mounted],
                });
            }
        }
    }
    memory
}

async fn lead_out(tools: &Tools<'_>, holder: &Arc<Holder>) -> Result<Pasta, PastaError> {
    let options = Options {
        path: tools.env.get("PATH").map_or("", String::as_str),
        holder: holder.pid,
        ipv6: tools.ipv6,
    };
    let mut pasta = Pasta::start(tools.children, &options)?;
    pasta.wait_until_routed(holder).await?;
    Ok(pasta)
}

#[cfg(test)]
mod tests {
    use pb::NetworkMode as Mode;

    use super::*;

    #[test]
    fn the_pods_wish_comes_first_and_what_is_impossible_is_refused() {
        let plan = |pod, site, joins, parallel| {
            let wish = Wish {
                pod,
                site,
                joins,
                parallel,
            };
            wish.plan().ok()
        };
        let unset = Mode::Unspecified;
        assert_eq!(plan(unset, Mode::Auto, true, false), Some(Plan::IfPossible));
        assert_eq!(plan(unset, Mode::Auto, false, false), Some(Plan::Host));
        assert_eq!(plan(unset, Mode::Auto, true, true), Some(Plan::Host));
        assert_eq!(plan(unset, Mode::Private, true, true), Some(Plan::Private));
        assert_eq!(plan(unset, Mode::Private, false, false), None);
        assert_eq!(
            plan(Mode::Private, Mode::Host, true, false),
            Some(Plan::Private)
        );
        assert_eq!(
            plan(Mode::Host, Mode::Private, true, false),
            Some(Plan::Host)
        );
        // The job file of an agent that does not know the setting.
        assert_eq!(plan(unset, unset, true, false), Some(Plan::Host));
    }
}
