//! `knoc-agent network`: creates the network namespace of a pod, and holds it while the shim lives.
//!
//! A user namespace of its own owns the network namespace, and only this account has rights in it. The namespace starts
//! with nothing but a loopback interface, which this helper brings up and gives the pod's address, and any port may be
//! bound in it. The shim stays outside: it gets descriptors of both namespaces, which it passes on to the helper that
//! starts a container ([`super::contain`]), and asks this helper for sockets. A socket belongs to the network namespace in
//! which it was made, whoever uses it, so the shim connects to the pod's listeners without entering the namespace.
//!
//! ```text
//! shim ──Create──────► unshare, map ids, loopback, sysctls, the edge
//!      ◄─Created────── with descriptors of the user and the network namespace
//!      ──Socket──────► ◄─Done── with a socket               any number of times
//!      ──Lead────────► ◄─Done── after routes were changed    any number of times
//!      ──EdgeSocket──► ◄─Done── with a socket of the edge    any number of times
//!      ──Memory──────► ◄─Done── with the mount namespace and the volume    once for each volume, before the others
//!      ──MeshBar─────► ◄─Done── what the pod sends to other pods goes nowhere
//!      ──Mesh────────► ◄─Done── with the packets of the mesh
//! ```
//!
//! The [`edge`] is a second network namespace, in which the shim takes what the pod sends to the cluster. The interface of the
//! [`mesh`] leads to other pods: the shim reads from its descriptor what the pod sends to them, and writes what they send.
//!
//! It ends with the shim's end of the socket pair, its standard input. Single-threaded, as `unshare(2)` requires.

mod edge;
mod memory;
mod mesh;
mod netlink;
pub(crate) mod protocol;
mod range;

use std::{
    fs::{self, File},
    io::{self, Write as _},
    net::Ipv4Addr,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    process::ExitCode,
};

use knoc_proto::private::while_dumpable;
use nix::sched::CloneFlags;
use rustix::{
    net::{AddressFamily, SocketFlags, socket_with},
    process::getgid,
};

use self::{
    edge::{Edge, EdgeError},
    protocol::{Answer, Family, Kind, Request},
};
use super::{
    fds,
    ids::{self, Ids, Isolated},
};

/// The helper's exit code if it could not do its work.
const FAILED: u8 = 125;

/// The namespaces that it creates.
const NAMESPACES: CloneFlags = CloneFlags::CLONE_NEWUSER.union(CloneFlags::CLONE_NEWNET);

/// The kernel's table of IPv4 routes of the reader's network namespace.
const ROUTES: &str = "/proc/self/net/route";

/// Settings of the network namespace: the first port that needs no rights, and the groups that may send pings.
const FIRST_PORT: &str = "/proc/sys/net/ipv4/ip_unprivileged_port_start";
const PING_GROUPS: &str = "/proc/sys/net/ipv4/ping_group_range";

#[derive(Debug, thiserror::Error)]
enum NetworkError {
    #[error("create user and network namespaces")]
    Namespaces(#[source] io::Error),
    #[error("{what}")]
    Io {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Edge(#[from] EdgeError),
    #[error("the pod has no edge")]
    NoEdge,
    #[error("the shim did not say what to create")]
    NoRequest,
}

impl NetworkError {
    fn on(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}

/// Entry point of the hidden subcommand.
pub(super) fn main() -> ExitCode {
    super::die_with_parent();
    let shim = match super::shim_at_stdin("network") {
        Ok(shim) => shim,
        Err(code) => return code,
    };
    super::release_stdin();
    match run(&shim) {
        // This is the child that wrote the id maps, or the shim has ended.
        Ok(code) => code,
        Err(error) => {
            let why = knoc_proto::error::chain(&error);
            // If the shim has ended, nobody receives the answer.
            answer(&shim, &Answer::Failed { why }, &[]).ok();
            ExitCode::from(FAILED)
        }
    }
}

fn run(shim: &UnixStream) -> Result<ExitCode, NetworkError> {
    let Some(Request::Create { users, address }) = receive(shim)? else {
        return Err(NetworkError::NoRequest);
    };
    // The shim starts pasta meanwhile, which opens the files of this process that name its namespaces.
    let begun = while_dumpable(|| begin(shim, &users, address))
        .map_err(NetworkError::on("let pasta find the namespaces"))?;
    match begun? {
        Begun::Mapper(code) => Ok(code),
        Begun::Held(mut made) => {
            serve_until(shim, &mut made, false)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

enum Begun {
    /// The child that wrote the id maps.
    Mapper(ExitCode),
    /// The namespaces are there.
    Held(Made),
}

/// What the helper has made beside the namespaces.
struct Made {
    /// Some nodes allow none.
    edge: Option<Edge>,
    /// Whether this process is in a mount namespace of its own.
    left_node: bool,
}

/// Creates the namespaces, and answers until the shim has found its way to other networks.
fn begin(shim: &UnixStream, users: &[String], address: Ipv4Addr) -> Result<Begun, NetworkError> {
    let ids = match ids::isolate(users, NAMESPACES).map_err(NetworkError::Namespaces)? {
        Isolated::Mapper(code) => return Ok(Begun::Mapper(code)),
        Isolated::Done(ids) => ids,
    };
    // The change of credentials may have reset it.
    super::die_with_parent();
    set_up(address)?;
    let (edge, no_edge) = match Edge::create(address, free_ports) {
        Ok(edge) => (Some(edge), None),
        Err(lost @ EdgeError::Lost(_)) => return Err(lost.into()),
        Err(error) => (None, Some(knoc_proto::error::chain(&error))),
    };
    hand_over(shim, ids, no_edge)?;
    let mut made = Made {
        edge,
        left_node: false,
    };
    serve_until(shim, &mut made, true)?;
    Ok(Begun::Held(made))
}

/// Prepares the new network namespace.
fn set_up(address: Ipv4Addr) -> Result<(), NetworkError> {
    netlink::bring_up(netlink::LOOPBACK)
        .and_then(|()| netlink::add_address(netlink::LOOPBACK, address))
        .map_err(NetworkError::on("bring up the loopback interface"))?;
    free_ports().map_err(NetworkError::on("let the pod bind any port"))?;
    // Without it ping needs rights that the pod does not have.
    let group = getgid().as_raw();
    write(PING_GROUPS, &format!("{group} {group}")).ok();
    Ok(())
}

/// Lets every process bind any port of this network namespace.
fn free_ports() -> io::Result<()> {
    write(FIRST_PORT, "0")
}

fn hand_over(shim: &UnixStream, ids: Ids, no_edge: Option<String>) -> Result<(), NetworkError> {
    let open = || -> io::Result<[File; 2]> {
        Ok([
            File::open("/proc/self/ns/user")?,
            File::open("/proc/self/ns/net")?,
        ])
    };
    let [user, net] = open().map_err(NetworkError::on("open the namespaces"))?;
    let created = Answer::Created { ids, no_edge };
    answer(shim, &created, &[user.as_fd(), net.as_fd()])
}

/// Answers requests until the shim ends, or with `seal` until [`Request::Seal`].
fn serve_until(shim: &UnixStream, made: &mut Made, seal: bool) -> Result<(), NetworkError> {
    while let Some(request) = receive(shim)? {
        let sealed = seal && request == Request::Seal;
        match carry_out(request, made) {
            Ok((done, descriptors)) => {
                let descriptors: Vec<_> = descriptors.iter().map(OwnedFd::as_fd).collect();
                answer(shim, &done, &descriptors)?;
            }
            Err(error @ NetworkError::Edge(EdgeError::Lost(_))) => return Err(error),
            Err(error) => {
                let why = knoc_proto::error::chain(&error);
                answer(shim, &Answer::Failed { why }, &[])?;
            }
        }
        if sealed {
            return Ok(());
        }
    }
    Ok(())
}

/// Returns the answer, and the descriptors that go with it.
fn carry_out(request: Request, made: &mut Made) -> Result<(Answer, Vec<OwnedFd>), NetworkError> {
    match request {
        Request::Create { .. } => {
            let why = "the namespaces exist already".to_owned();
            Ok((Answer::Failed { why }, Vec::new()))
        }
        Request::Seal => Ok((Answer::Done, Vec::new())),
        Request::IsRouted => {
            let routes = fs::read_to_string(ROUTES).unwrap_or_default();
            Ok((Answer::Routed(has_default(&routes)), Vec::new()))
        }
        Request::Socket(family, kind) => {
            let socket = new_socket(family, kind).map_err(io::Error::from);
            let socket = socket.map_err(NetworkError::on("make a socket"))?;
            Ok((Answer::Done, vec![socket]))
        }
        Request::Lead(ranges) => {
            let edge = made.edge.as_mut().ok_or(NetworkError::NoEdge)?;
            edge.lead(&ranges)?;
            Ok((Answer::Done, Vec::new()))
        }
        Request::EdgeSocket(kind) => {
            let edge = made.edge.as_ref().ok_or(NetworkError::NoEdge)?;
            Ok((Answer::Done, vec![edge.socket(kind)?]))
        }
        Request::Memory(volume) => {
            if !made.left_node {
                memory::leave_node().map_err(NetworkError::on("create a mount namespace"))?;
                made.left_node = true;
            }
            let mounted = memory::mount_volume(&volume);
            let mounted = mounted.map_err(NetworkError::on("mount a volume in memory"))?;
            Ok((Answer::Done, mounted))
        }
        Request::MeshBar(range) => {
            let barred = mesh::bar(range);
            barred.map_err(NetworkError::on("add the route that leads nowhere"))?;
            Ok((Answer::Done, Vec::new()))
        }
        Request::Mesh { address, range } => {
            let packets = mesh::create(address, range);
            let packets = packets.map_err(NetworkError::on(
                "create the interface that leads to other pods",
            ))?;
            if let Some(edge) = &mut made.edge {
                edge.prefer(address)?;
            }
            Ok((Answer::Done, vec![packets]))
        }
        Request::MeshRoutes(ranges) => {
            let led = mesh::lead(&ranges);
            led.map_err(NetworkError::on("add a route to other pods"))?;
            Ok((Answer::Done, Vec::new()))
        }
    }
}

fn new_socket(family: Family, kind: Kind) -> rustix::io::Result<OwnedFd> {
    let family = match family {
        Family::Ipv4 => AddressFamily::INET,
        Family::Ipv6 => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(family, kind.into(), flags, None)
}

/// PURE: whether the text of `/proc/net/route` has a default route.
fn has_default(routes: &str) -> bool {
    let zero = |field: Option<&str>| field == Some("00000000");
    routes.lines().skip(1).any(|line| {
        let mut fields = line.split_ascii_whitespace();
        // Destination and mask.
        zero(fields.nth(1)) && zero(fields.nth(5))
    })
}

/// The next request; `None` if the shim has ended.
fn receive(shim: &UnixStream) -> Result<Option<Request>, NetworkError> {
    let received = fds::receive_frame(shim, protocol::LONGEST);
    let received = received.map_err(NetworkError::on("receive a request"))?;
    let Some((body, _)) = received else {
        return Ok(None);
    };
    let request = serde_json::from_slice(&body).map_err(io::Error::other);
    request
        .map(Some)
        .map_err(NetworkError::on("receive a request"))
}

fn answer(
    shim: &UnixStream,
    answer: &Answer,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), NetworkError> {
    let sending = || fds::send_frame(shim, &serde_json::to_vec(answer)?, descriptors);
    sending().map_err(NetworkError::on("answer the shim"))
}

fn write(path: &str, text: &str) -> io::Result<()> {
    File::options()
        .write(true)
        .open(path)?
        .write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_route_to_everywhere_is_a_default_route() {
        let head =
            "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n";
        let line = |destination: &str, mask: &str| {
            format!("{head}eth0\t{destination}\t010000C0\t0003\t0\t0\t0\t{mask}\t0\t0\t0\n")
        };
        assert!(has_default(&line("00000000", "00000000")));
        assert!(!has_default(&line("00000A0A", "00FFFFFF")));
        // The lower half of all addresses.
        assert!(!has_default(&line("00000000", "00000080")));
        assert!(!has_default(head));
        assert!(!has_default(""));
    }
}
