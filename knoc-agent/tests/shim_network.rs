//! The helper that holds the network of a pod.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    io::{self, IoSliceMut, Read as _, Write as _},
    mem::MaybeUninit,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddrV4, SocketAddrV6, TcpListener},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags, openat},
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, bind, connect, listen, recvmsg},
};
use serde_json::{Value, json};

const LOCALHOST: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// One helper, and the shim's end of its socket.
struct Helper {
    child: Child,
    socket: UnixStream,
}

impl Helper {
    fn start() -> Self {
        let (socket, theirs) = UnixStream::pair().unwrap();
        socket
            .set_read_timeout(Some(Duration::from_mins(1)))
            .unwrap();
        #[expect(
            clippy::disallowed_methods,
            reason = "the test's own helper, which it waits for"
        )]
        let mut command = Command::new(env!("CARGO_BIN_EXE_knoc-agent"));
        let child = command
            .arg("network")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .unwrap();
        Self { child, socket }
    }

    fn ask(&mut self, request: &Value) -> (Value, Vec<OwnedFd>) {
        let body = request.to_string();
        let length = u32::try_from(body.len()).unwrap().to_be_bytes();
        self.socket.write_all(&length).unwrap();
        self.socket.write_all(body.as_bytes()).unwrap();
        let mut head = [0; 4];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut head)];
        let received = recvmsg(
            &self.socket,
            &mut parts,
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        );
        assert_eq!(received.unwrap().bytes, 4);
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        let mut body = vec![0; u32::from_be_bytes(head) as usize];
        self.socket.read_exact(&mut body).unwrap();
        (serde_json::from_slice(&body).unwrap(), fds)
    }

    fn create(&mut self) -> (Value, Vec<OwnedFd>) {
        self.ask(&json!({"Create": {"users": [], "address": "192.0.0.2"}}))
    }

    fn tcp(&mut self) -> OwnedFd {
        let (answer, mut fds) = self.ask(&json!({"Socket": ["Ipv4", "Tcp"]}));
        assert_eq!(answer, json!("Done"));
        fds.pop().unwrap()
    }

    /// A socket whose connect waits for the outcome.
    fn client(&mut self) -> OwnedFd {
        let socket = self.tcp();
        rustix::io::ioctl_fionbio(&socket, false).unwrap();
        socket
    }

    fn end(self) {
        let Self { mut child, socket } = self;
        drop(socket);
        let status = child.wait().unwrap();
        assert!(status.success(), "{status}");
    }
}

#[test]
fn each_network_is_its_own_and_every_port_is_free() {
    let [mut one, mut other] = [Helper::start(), Helper::start()];
    for helper in [&mut one, &mut other] {
        let (answer, namespaces) = helper.create();
        let ids = &answer["Created"]["ids"];
        assert_eq!(
            ids["uid"],
            json!(rustix::process::getuid().as_raw()),
            "{answer}"
        );
        assert_eq!(namespaces.len(), 2);
    }
    let http = SocketAddrV4::new(LOCALHOST, 80);
    // The same port in both, and a third on the pod's own address.
    let listeners = [one.tcp(), other.tcp()];
    for listener in &listeners {
        bind(listener, &http).unwrap();
        listen(listener, 1).unwrap();
    }
    let own = one.tcp();
    bind(&own, &SocketAddrV4::new(Ipv4Addr::new(192, 0, 0, 2), 80)).unwrap();
    // A connection leads to the listener of its own network.
    let client = one.client();
    connect(&client, &http).unwrap();
    let mut wait = [PollFd::new(&listeners[0], PollFlags::IN)];
    let limit = Timespec {
        tv_sec: 60,
        tv_nsec: 0,
    };
    assert_eq!(poll(&mut wait, Some(&limit)), Ok(1));
    rustix::net::accept(&listeners[0]).unwrap();
    let nobody = rustix::net::accept(&listeners[1]);
    assert_eq!(nobody.unwrap_err(), rustix::io::Errno::AGAIN);
    // What listens outside is not there.
    let outside = TcpListener::bind((LOCALHOST, 0)).unwrap();
    let port = outside.local_addr().unwrap().port();
    let refused = connect(one.client(), &SocketAddrV4::new(LOCALHOST, port));
    assert_eq!(refused.unwrap_err(), rustix::io::Errno::CONNREFUSED);
    one.end();
    other.end();
}

#[test]
fn there_is_no_way_out_until_somebody_makes_one_and_namespaces_are_created_once() {
    let mut helper = Helper::start();
    helper.create();
    assert_eq!(helper.ask(&json!("IsRouted")).0, json!({"Routed": false}));
    assert_eq!(helper.ask(&json!("Seal")).0, json!("Done"));
    let (again, none) = helper.create();
    let why = again["Failed"]["why"].as_str().unwrap_or_default();
    assert!(why.contains("exist already") && none.is_empty(), "{again}");
    let unreachable = connect(
        helper.client(),
        &SocketAddrV4::new(Ipv4Addr::new(10, 1, 1, 1), 80),
    );
    assert_eq!(unreachable.unwrap_err(), rustix::io::Errno::NETUNREACH);
    no_ipv6(&mut helper);
    helper.end();
}

/// Whoever dials an address of IPv6 learns at once that it is not reached.
fn no_ipv6(helper: &mut Helper) {
    let unique_local = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
    let global = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
    for address in [unique_local, global] {
        let (answer, mut fds) = helper.ask(&json!({"Socket": ["Ipv6", "Tcp"]}));
        let Some(socket) = fds.pop() else {
            eprintln!("no IPv6: {answer}");
            return;
        };
        let unreachable = connect(&socket, &SocketAddrV6::new(address, 80, 0, 0));
        assert_eq!(unreachable.unwrap_err(), rustix::io::Errno::NETUNREACH);
    }
}

#[test]
fn a_sealed_helper_opens_its_files_to_nobody_of_the_same_user() -> io::Result<()> {
    let mut helper = Helper::start();
    helper.create();
    let network = format!("/proc/{}/ns/net", helper.child.id());
    std::fs::File::open(&network)?;
    helper.ask(&json!("Seal"));
    // Root may open everything.
    if !rustix::process::getuid().is_root() {
        let error = std::fs::File::open(&network).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }
    helper.end();
    Ok(())
}

/// Has the helper mount a volume of 1 MiB. Returns the mount namespace and the volume.
fn volume(helper: &mut Helper, path: &Path) -> [OwnedFd; 2] {
    let (answer, fds) = helper.ask(&json!({"Memory": {"path": path, "bytes": 1_u64 << 20}}));
    assert_eq!(answer, json!("Done"));
    <[OwnedFd; 2]>::try_from(fds).unwrap()
}

#[test]
fn a_volume_in_memory_has_its_size_and_is_not_seen_on_the_node() {
    let [one, other] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let mut helper = Helper::start();
    helper.create();
    let [mounts, root] = volume(&mut helper, one.path());
    let [same, _second] = volume(&mut helper, other.path());
    let inode = |fd: &OwnedFd| rustix::fs::fstat(fd).unwrap().st_ino;
    assert_eq!(inode(&mounts), inode(&same), "one namespace has them all");
    let size = rustix::fs::fstatvfs(&root).unwrap();
    assert_eq!(size.f_blocks * size.f_frsize, 1 << 20);
    // Whoever has the descriptor reads and writes what containers see at the path.
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC;
    let file = openat(&root, "file", flags, Mode::RUSR | Mode::WUSR).unwrap();
    let full = std::fs::File::from(file).write_all(&vec![7; 2 << 20]);
    assert_eq!(full.unwrap_err().kind(), io::ErrorKind::StorageFull);
    for folder in [&one, &other] {
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
    let nowhere = one.path().join("missing");
    let (failed, none) = helper.ask(&json!({"Memory": {"path": nowhere, "bytes": 1}}));
    let why = failed["Failed"]["why"].as_str().unwrap_or_default();
    assert!(
        why.contains("mount a volume in memory") && none.is_empty(),
        "{failed}"
    );
    helper.end();
    // The folders can be removed, whoever still has the volume.
    one.close().unwrap();
    drop(root);
}

const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);

/// The helper's edge; `None` on a node without virtual interfaces.
fn edge(helper: &mut Helper) -> Option<()> {
    let (answer, _) = helper.create();
    if let Some(why) = answer["Created"]["no_edge"].as_str() {
        eprintln!("no edge: {why}");
        assert!(why.contains("veth"), "{why}");
        return None;
    }
    let (led, _) = helper.ask(&json!({"Lead": [{"first": "10.96.0.0", "prefix": 12}]}));
    assert_eq!(led, json!("Done"));
    Some(())
}

fn edge_socket(helper: &mut Helper, kind: &str) -> OwnedFd {
    let (answer, mut fds) = helper.ask(&json!({ "EdgeSocket": kind }));
    assert_eq!(answer, json!("Done"));
    let socket = fds.pop().unwrap();
    rustix::io::ioctl_fionbio(&socket, false).unwrap();
    socket
}

#[test]
fn one_listener_in_the_edge_takes_the_connections_to_every_address_of_the_cluster() {
    let mut helper = Helper::start();
    if edge(&mut helper).is_none() {
        return;
    }
    let listener = edge_socket(&mut helper, "Tcp");
    bind(&listener, &SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 443)).unwrap();
    listen(&listener, 5).unwrap();
    let listener = TcpListener::from(listener);
    // The pod's own port of the same number is another one.
    let own = helper.tcp();
    bind(&own, &SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 443)).unwrap();
    for address in [SERVICE, Ipv4Addr::new(10, 111, 255, 254)] {
        let target = SocketAddrV4::new(address, 443);
        let client = helper.client();
        connect(&client, &target).unwrap();
        let (accepted, peer) = listener.accept().unwrap();
        assert_eq!(accepted.local_addr().unwrap(), target.into());
        assert_eq!(peer.ip(), Ipv4Addr::new(192, 0, 0, 2));
    }
    // With an address of its own the pod has that one toward the cluster, too.
    let packets = interface(&mut helper, POD_A);
    if packets.is_some() {
        connect(helper.client(), &SocketAddrV4::new(SERVICE, 443)).unwrap();
        assert_eq!(listener.accept().unwrap().1.ip(), POD_A);
    }
    // Nobody listens on another port, and another address is not reached.
    let refused = connect(helper.client(), &SocketAddrV4::new(SERVICE, 80));
    assert_eq!(refused.unwrap_err(), rustix::io::Errno::CONNREFUSED);
    let elsewhere = SocketAddrV4::new(Ipv4Addr::new(10, 1, 1, 1), 443);
    let unreachable = connect(helper.client(), &elsewhere);
    assert_eq!(unreachable.unwrap_err(), rustix::io::Errno::NETUNREACH);
    // The ranges are replaced while the listener stays.
    let (led, _) = helper.ask(&json!({"Lead": [{"first": "10.1.0.0", "prefix": 16}]}));
    assert_eq!(led, json!("Done"));
    connect(helper.client(), &elsewhere).unwrap();
    let gone = connect(helper.client(), &SocketAddrV4::new(SERVICE, 443));
    assert_eq!(gone.unwrap_err(), rustix::io::Errno::NETUNREACH);
    helper.end();
}

const POD_A: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 3);
const POD_B: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 7);

/// The packets of a pod with this address; `None` on a host where nobody may create such interfaces.
fn mesh(helper: &mut Helper, address: Ipv4Addr) -> Option<OwnedFd> {
    helper.create();
    interface(helper, address)
}

fn pod_range() -> Value {
    json!({"first": "10.200.0.0", "prefix": 16})
}

/// The same in the network that the helper has created already.
fn interface(helper: &mut Helper, address: Ipv4Addr) -> Option<OwnedFd> {
    let range = pod_range();
    let (answer, mut fds) = helper.ask(&json!({"Mesh": {"address": address, "range": range}}));
    if let Some(why) = answer["Failed"]["why"].as_str() {
        eprintln!("no interface: {why}");
        assert!(why.contains("leads to other pods"), "{why}");
        return None;
    }
    let packets = fds.pop()?;
    rustix::io::ioctl_fionbio(&packets, false).unwrap();
    Some(packets)
}

/// Carries packets in one direction until the test ends.
fn carry(from: OwnedFd, to: OwnedFd) {
    std::thread::spawn(move || {
        let mut packet = vec![0; 65_535];
        while let Ok(count @ 1..) = rustix::io::read(&from, packet.as_mut_slice()) {
            rustix::io::write(&to, &packet[..count]).ok();
        }
    });
}

#[test]
fn pods_reach_each_other_at_their_own_addresses_on_any_port() {
    let [mut a, mut b] = [Helper::start(), Helper::start()];
    let (Some(of_a), Some(of_b)) = (mesh(&mut a, POD_A), mesh(&mut b, POD_B)) else {
        return;
    };
    carry(of_a.try_clone().unwrap(), of_b.try_clone().unwrap());
    carry(of_b, of_a);
    let listener = a.client();
    bind(&listener, &SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 80)).unwrap();
    listen(&listener, 5).unwrap();
    let listener = TcpListener::from(listener);
    let loopback = a.tcp();
    bind(&loopback, &SocketAddrV4::new(LOCALHOST, 81)).unwrap();
    listen(&loopback, 5).unwrap();
    let client = b.client();
    connect(&client, &SocketAddrV4::new(POD_A, 80)).unwrap();
    let (mut accepted, peer) = listener.accept().unwrap();
    assert_eq!(peer.ip(), POD_B, "the address of the pod that called");
    // More than a packet.
    let mut client = std::net::TcpStream::from(client);
    let sent = vec![7; 1 << 20];
    let sending = sent.clone();
    let sender = std::thread::spawn(move || {
        client.write_all(&sending).unwrap();
    });
    let mut received = Vec::new();
    accepted.read_to_end(&mut received).unwrap();
    sender.join().unwrap();
    assert!(received == sent, "{} bytes", received.len());
    // Neither where nobody listens nor where only the pod itself is to be heard.
    for port in [79, 81] {
        let refused = connect(b.client(), &SocketAddrV4::new(POD_A, port));
        assert_eq!(
            refused.unwrap_err(),
            rustix::io::Errno::CONNREFUSED,
            "{port}"
        );
    }
    // The pod's own address is its own.
    let own = connect(a.client(), &SocketAddrV4::new(POD_A, 80));
    own.unwrap();
    no_ipv6(&mut a);
    a.end();
    b.end();
}

/// A way to other networks, as pasta configures it; `None` if this user or this host cannot make one.
fn way_out(helper: &Helper) -> Option<()> {
    let id = helper.child.id().to_string();
    let script = "ip tuntap add dev eth0 mode tap; ip address add 192.0.0.2/29 dev eth0; ip link set eth0 up; \
                  ip route add default via 192.0.0.1";
    #[expect(
        clippy::disallowed_methods,
        reason = "the test's own program, which it waits for"
    )]
    let mut command = Command::new("nsenter");
    command
        .args(["--target", &id, "--user", "--net", "--preserve-credentials"])
        .args(["sh", "-ec", script]);
    let made = command.status();
    if !made.as_ref().is_ok_and(std::process::ExitStatus::success) {
        eprintln!("no way out: {made:?}");
        return None;
    }
    Some(())
}

/// The address that the kernel names to a program in the pod that dials another network.
fn source(helper: &mut Helper, there: Ipv4Addr) -> IpAddr {
    let socket = helper.tcp();
    let begun = connect(&socket, &SocketAddrV4::new(there, 53)).unwrap_err();
    assert_eq!(begun, rustix::io::Errno::INPROGRESS);
    let socket = std::net::TcpStream::from(socket);
    socket.local_addr().unwrap().ip()
}

#[test]
fn a_program_that_asks_the_kernel_for_its_address_learns_the_one_that_other_pods_reach() {
    let mut pod = Helper::start();
    let edge = edge(&mut pod).is_some();
    if way_out(&pod).is_none() {
        return;
    }
    // In both halves of all addresses.
    let elsewhere = [Ipv4Addr::new(8, 8, 8, 8), Ipv4Addr::new(203, 0, 113, 1)];
    let everywhere = Ipv4Addr::new(192, 0, 0, 2);
    for there in elsewhere {
        assert_eq!(source(&mut pod, there), everywhere);
    }
    let Some(packets) = interface(&mut pod, POD_A) else {
        return;
    };
    for there in elsewhere {
        assert_eq!(source(&mut pod, there), POD_A);
    }
    // Ways out stay when the interface goes, and with it the address, if it is not on the interface toward the cluster as well.
    drop(packets);
    let left = if edge { POD_A } else { everywhere };
    for there in elsewhere {
        assert_eq!(source(&mut pod, there), left);
    }
    if edge {
        assert_eq!(source(&mut pod, SERVICE), POD_A);
    }
    pod.end();
}

#[test]
fn a_pod_without_an_address_sends_nothing_for_other_pods_to_other_networks() {
    let mut pod = Helper::start();
    pod.create();
    let (answer, _) = pod.ask(&json!({"MeshBar": pod_range()}));
    assert_eq!(answer, json!("Done"));
    let there = SocketAddrV4::new(POD_B, 80);
    let refused = connect(pod.client(), &there).unwrap_err();
    assert_eq!(refused, rustix::io::Errno::HOSTUNREACH);
    // The interface takes the place of the route.
    if let Some(_packets) = interface(&mut pod, POD_A) {
        let begun = connect(pod.tcp(), &there).unwrap_err();
        assert_eq!(begun, rustix::io::Errno::INPROGRESS);
        // It goes back if the interface is lost.
        let (answer, _) = pod.ask(&json!({"MeshBar": pod_range()}));
        assert_eq!(answer, json!("Done"));
        let refused = connect(pod.client(), &there).unwrap_err();
        assert_eq!(refused, rustix::io::Errno::HOSTUNREACH);
    }
    pod.end();
}
