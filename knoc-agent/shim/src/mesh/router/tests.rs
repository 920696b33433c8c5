//! Pods that exchange packets over tunnels on this host. Pairs of sockets stand for the interfaces: the test is the kernel of each
//! pod, and the agent.

use std::os::unix::net::UnixDatagram;

use tokio::time::timeout;

use super::{
    super::{
        members::{Member, Members, State},
        packet::LARGEST,
        tunnel,
    },
    *,
};

const SOON: Duration = Duration::from_secs(30);
/// How long something is looked for that must not come.
const NOT_LATER: Duration = Duration::from_millis(500);
const A: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 3);
const B: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 7);

/// One pod: what the test knows of it.
struct Pod {
    address: Ipv4Addr,
    mesh: Arc<Mesh>,
    kernel: tokio::net::UnixDatagram,
    member: Member,
    _commands: mpsc::Receiver<Command>,
}

/// A packet of UDP.
fn packet(source: Ipv4Addr, target: Ipv4Addr, content: &[u8]) -> Vec<u8> {
    let total = u16::try_from(20 + content.len()).unwrap();
    let mut packet = vec![0x45, 0];
    packet.extend(total.to_be_bytes());
    packet.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    packet.extend(source.octets());
    packet.extend(target.octets());
    packet.extend(content);
    packet
}

/// Starts the routes of a pod.
async fn start(address: Ipv4Addr, tasks: &mut JoinSet<()>) -> Pod {
    let range = Range::parse("10.200.0.0/16").unwrap();
    let mesh = Mesh::with(Some(range));
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let pair = KeyPair::generate("shim").unwrap();
    let any_port = "127.0.0.1:0".parse().unwrap();
    let incoming = pinned::listen(any_port, pair.clone()).await.unwrap();
    let member = Member {
        spki: pair.spki().to_owned(),
        endpoint: incoming.local_addr().unwrap(),
    };
    let (arrivals, carried) = mpsc::channel(ARRIVALS);
    mesh.arrivals.send_replace(Some(arrivals));
    let up = Up {
        own: address,
        interface: Arc::new(Interface::new(theirs.into()).unwrap()),
        incoming,
        carried,
        pair: Arc::new(pair),
    };
    let (commands, orders) = mpsc::channel(16);
    let notes = Arc::new(Notes::new(commands));
    let routes = Routes::new(Arc::clone(&mesh), up, notes);
    tasks.spawn(async move {
        routes.serve().await;
    });
    Pod {
        address,
        mesh,
        kernel: tokio::net::UnixDatagram::from_std(ours).unwrap(),
        member,
        _commands: orders,
    }
}

impl Pod {
    /// The agent says this about an address as soon as the shim asks for it, and the test goes on.
    async fn learns(&self, address: Ipv4Addr, state: State) {
        let mut members = self.mesh.members.subscribe();
        let asked = members.wait_for(|members| members.state(address).is_some());
        drop(
            timeout(SOON, asked)
                .await
                .expect("it does not ask")
                .unwrap(),
        );
        self.mesh
            .members
            .send_modify(|members| members.set(address, state));
    }

    async fn learns_of(&self, other: &Self) {
        let present = State::Present(other.member.clone());
        self.learns(other.address, present).await;
    }

    async fn sends(&self, packet: &[u8]) {
        let sent = timeout(SOON, self.kernel.send(packet)).await;
        assert_eq!(sent.unwrap().unwrap(), packet.len());
    }

    async fn receives(&self) -> Vec<u8> {
        self.within(SOON).await.expect("no packet arrives")
    }

    /// The next packet within this time.
    async fn within(&self, limit: Duration) -> Option<Vec<u8>> {
        let mut packet = vec![0; LARGEST];
        let count = timeout(limit, self.kernel.recv(&mut packet)).await;
        packet.truncate(count.ok()?.unwrap());
        Some(packet)
    }
}

async fn two(tasks: &mut JoinSet<()>) -> (Pod, Pod) {
    (start(A, tasks).await, start(B, tasks).await)
}

#[tokio::test]
async fn pods_exchange_packets_once_both_shims_know_the_other_key() {
    let mut tasks = JoinSet::new();
    let (a, b) = two(&mut tasks).await;
    let there = packet(A, B, b"hello");
    a.sends(&there).await;
    a.learns_of(&b).await;
    b.learns_of(&a).await;
    assert_eq!(b.receives().await, there);
    // The answer comes over a tunnel of its own.
    let back = packet(B, A, &vec![7; 40_000]);
    b.sends(&back).await;
    assert_eq!(a.receives().await, back);
    for number in 0..100_u8 {
        a.sends(&packet(A, B, &[number])).await;
        assert_eq!(b.receives().await, packet(A, B, &[number]));
    }
}

#[tokio::test]
async fn the_agent_carries_a_tunnel_if_the_other_node_is_not_reached() {
    let mut tasks = JoinSet::new();
    let (a, b) = two(&mut tasks).await;
    let there = packet(A, B, b"hello");
    a.sends(&there).await;
    // Nobody listens on port 1.
    let unreached = Member {
        endpoint: "127.0.0.1:1".parse().unwrap(),
        ..b.member.clone()
    };
    a.learns(B, State::Present(unreached)).await;
    let mut waiting = a.mesh.waiting.subscribe();
    let asked = waiting.wait_for(|waiting| waiting.contains(B));
    drop(timeout(SOON, asked).await.unwrap().unwrap());
    let (one, other) = tokio::io::duplex(1 << 16);
    let carried = |io| Tunnel {
        io,
        origin: knoc_link::Origin::Command,
    };
    assert!(a.mesh.give(&B.to_string(), carried(one)));
    let arrivals = b.mesh.arrivals.borrow().clone().unwrap();
    arrivals.send(carried(other)).await.unwrap();
    b.learns_of(&a).await;
    // The packet that waited may have been answered meanwhile.
    let arrives = async {
        while b.within(NOT_LATER).await.as_ref() != Some(&there) {
            a.sends(&there).await;
        }
    };
    timeout(SOON, arrives).await.expect("no packet arrives");
}

#[tokio::test]
async fn a_shim_without_the_key_of_the_address_is_not_believed() {
    let mut tasks = JoinSet::new();
    let (a, b) = two(&mut tasks).await;
    a.sends(&packet(A, B, b"hello")).await;
    a.learns_of(&b).await;
    // For the agent somebody else has the address of A.
    let other = Member {
        spki: "0".repeat(64),
        ..a.member.clone()
    };
    b.learns(A, State::Present(other)).await;
    assert_eq!(b.within(NOT_LATER).await, None);
}

#[tokio::test]
async fn a_program_learns_at_once_that_nobody_has_the_address_or_that_it_is_denied() {
    let mut tasks = JoinSet::new();
    let a = start(A, &mut tasks).await;
    let there = packet(A, B, b"hello");
    for (state, reason) in [
        (State::Nobody, Reason::HostUnreachable),
        (State::Denied, Reason::Prohibited),
    ] {
        a.sends(&there).await;
        a.learns(B, state).await;
        let answer = refusal(&there, reason).unwrap();
        // The first packet may be answered by what was known before.
        let arrives = async {
            while a.receives().await != answer {
                a.sends(&there).await;
            }
        };
        timeout(SOON, arrives)
            .await
            .expect("no answer of this kind");
    }
}

#[tokio::test]
async fn a_tunnel_ends_when_the_agent_says_otherwise() {
    let mut tasks = JoinSet::new();
    let (a, b) = two(&mut tasks).await;
    a.sends(&packet(A, B, b"1")).await;
    a.learns_of(&b).await;
    b.learns_of(&a).await;
    assert_eq!(b.receives().await, packet(A, B, b"1"));
    b.learns(A, State::Denied).await;
    a.learns(B, State::Denied).await;
    let second = packet(A, B, b"2");
    a.sends(&second).await;
    assert_eq!(
        a.receives().await,
        refusal(&second, Reason::Prohibited).unwrap()
    );
    assert_eq!(b.within(NOT_LATER).await, None);
}

#[tokio::test]
async fn packets_of_others_for_others_and_of_other_protocols_stay_where_they_are() {
    let mut tasks = JoinSet::new();
    let (a, b) = two(&mut tasks).await;
    for wrong in [
        packet(B, B, b"its source is not this pod"),
        packet(A, A, b"it is for this pod"),
        packet(
            A,
            Ipv4Addr::new(10, 201, 0, 1),
            b"it is outside of the range",
        ),
        b"\x60 something of IPv6".to_vec(),
    ] {
        a.sends(&wrong).await;
    }
    // What was sent before this one was looked at before it.
    let right = packet(A, B, b"right");
    a.sends(&right).await;
    a.learns_of(&b).await;
    b.learns_of(&a).await;
    assert_eq!(b.receives().await, right);
    let asked = a.mesh.members.borrow().clone();
    let mut expected = Members::default();
    assert!(expected.want(B));
    expected.set(B, State::Present(b.member.clone()));
    assert_eq!(asked, expected, "it asks for nobody else");
}

#[tokio::test]
async fn a_shim_that_sends_packets_of_others_loses_its_tunnel() {
    let mut tasks = JoinSet::new();
    let b = start(B, &mut tasks).await;
    let pair = KeyPair::generate("a").unwrap();
    let dialling = tunnel::dial(b.member.endpoint, &pair, &b.member.spki, A);
    let mut connection = dialling.await.unwrap();
    let known = Member {
        spki: pair.spki().to_owned(),
        endpoint: b.member.endpoint,
    };
    b.learns(A, State::Present(known)).await;
    let send = async |connection: &mut Connection, packet: &[u8]| {
        use tokio::io::AsyncWriteExt as _;
        let length = u16::try_from(packet.len()).unwrap();
        connection.write_all(&length.to_be_bytes()).await.unwrap();
        connection.write_all(packet).await.unwrap();
        connection.flush().await.unwrap();
    };
    let right = packet(A, B, b"right");
    send(&mut connection, &right).await;
    assert_eq!(b.receives().await, right);
    let third = Ipv4Addr::new(10, 200, 0, 9);
    send(&mut connection, &packet(third, B, b"of somebody else")).await;
    let mut end = Vec::new();
    let reading = tokio::io::AsyncReadExt::read_to_end(&mut connection, &mut end);
    // An end or a reset.
    timeout(SOON, reading)
        .await
        .expect("the tunnel stays open")
        .ok();
    assert_eq!(b.within(NOT_LATER).await, None);
}

#[tokio::test(start_paused = true)]
async fn who_tries_many_addresses_does_not_keep_the_lanes_of_those_that_nobody_has() {
    let mesh = Mesh::with(Range::parse("10.200.0.0/16"));
    let (_ours, theirs) = UnixDatagram::pair().unwrap();
    let (commands, _orders) = mpsc::channel(1);
    let lane = Lane {
        target: B,
        own: A,
        wanted: mesh.want(B).unwrap(),
        interface: Arc::new(Interface::new(theirs.into()).unwrap()),
        pair: Arc::new(KeyPair::generate("shim").unwrap()),
        notes: Arc::new(Notes::new(commands)),
    };
    mesh.members
        .send_modify(|members| members.set(B, State::Nobody));
    let (_queue, packets) = mpsc::channel(QUEUE);
    let others = async {
        for host in 1..100 {
            sleep(Duration::from_secs(10)).await;
            drop(mesh.want(Ipv4Addr::new(10, 200, 1, host)));
        }
    };
    tokio::select! {
        () = lane.run(packets) => {}
        () = others => panic!("the lane stays as long as others are tried"),
    }
    assert_eq!(mesh.members.borrow().state(B), None);
}
