//! Connections and datagrams over the loopback interface, which stands for the edge: the test is container, agent and kubelet.

use std::io::ErrorKind;

use knoc_link::bulk;
use knoc_proto::pb::{EgressInput, EgressOutput, egress_input::Input, egress_output};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
    task::JoinSet,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request,
    body::Body,
    codec::{DecodeBuf, Decoder},
};

use super::{gate::Gate, *};
use crate::{launch::network::protocol::Range, supervisor::Command};

mod names;

const SOON: Duration = Duration::from_secs(30);

/// Addresses of the loopback interface, as if they were those of a cluster.
fn gate() -> (Gate, mpsc::Receiver<Command>) {
    let egress = Egress::default();
    let mut table = Table::default();
    table.ranges.insert(Range::parse("127.0.0.0/16").unwrap());
    egress.table.send_replace(Arc::new(table));
    let (notes, orders) = mpsc::channel(4);
    (Gate::new(&Arc::new(egress), notes), orders)
}

/// The body carries the messages, and tonic sees none.
struct Unused;

impl Decoder for Unused {
    type Item = EgressInput;
    type Error = Status;

    fn decode(&mut self, _: &mut DecodeBuf<'_>) -> Result<Option<EgressInput>, Status> {
        Ok(None)
    }
}

/// A call of `EgressStream`, from the caller's side.
struct Call {
    input: mpsc::Sender<EgressInput>,
    output: mpsc::Receiver<Result<EgressOutput, Status>>,
}

impl Call {
    fn new() -> (Self, Taken) {
        let (sender, stream) = mpsc::channel(4);
        let (metadata, extensions, _) = bulk::request(ReceiverStream::new(stream)).into_parts();
        let streaming = Streaming::new_empty(Unused, Body::empty());
        let request = Request::from_parts(metadata, extensions, streaming);
        let input = bulk::input(request).unwrap();
        let (output, outputs) = mpsc::channel(4);
        let call = Self {
            input: sender,
            output: outputs,
        };
        (call, Taken { input, output })
    }

    async fn send(&self, input: Input) {
        let message = EgressInput { input: Some(input) };
        self.input.send(message).await.unwrap();
    }

    async fn next(&mut self) -> egress_output::Output {
        let next = tokio::time::timeout(SOON, self.output.recv()).await;
        next.unwrap().unwrap().unwrap().output.unwrap()
    }
}

/// The first attempt after this one, once there is one.
async fn attempt(egress: &Egress, after: u64) -> pb::EgressAttempt {
    let mut waiting = egress.waiting.subscribe();
    let found = waiting.wait_for(|waiting| waiting.after(after).is_some());
    let found = tokio::time::timeout(SOON, found).await.unwrap().unwrap();
    found.after(after).unwrap()
}

async fn take(egress: &Egress, attempt: &pb::EgressAttempt) -> Call {
    let (mut call, taken) = Call::new();
    egress.take(attempt.id, taken).unwrap();
    assert_eq!(call.next().await, egress_output::Output::Connected(true));
    call
}

/// A connection of a container, which waits to be taken.
async fn dial(gate: &Gate) -> (TcpStream, SocketAddrV4) {
    let listener = TcpListener::bind("127.0.9.9:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let client = TcpStream::connect(address).await.unwrap();
    gate.admit(listener.accept().await.unwrap().0);
    let std::net::SocketAddr::V4(address) = address else {
        panic!("{address}");
    };
    (client, address)
}

async fn read(client: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut all = Vec::new();
    let read = tokio::time::timeout(SOON, client.read_to_end(&mut all)).await;
    read.expect("the connection stays open").map(|_| all)
}

async fn is_reset(client: &mut TcpStream) -> bool {
    read(client)
        .await
        .is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
}

#[tokio::test]
async fn each_direction_of_a_connection_ends_alone_and_the_attempt_names_what_was_dialled() {
    let (gate, _orders) = gate();
    let (mut client, address) = dial(&gate).await;
    let found = attempt(&gate.egress, 0).await;
    assert_eq!(found.protocol(), pb::EgressProtocol::Tcp);
    assert_eq!(found.address, address.ip().to_string());
    assert_eq!(found.port, u32::from(address.port()));
    let mut call = take(&gate.egress, &found).await;
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(
        call.next().await,
        egress_output::Output::Data(b"question"[..].into())
    );
    assert_eq!(call.next().await, egress_output::Output::Closed(true));
    call.send(Input::Data(b"answer"[..].into())).await;
    call.send(Input::Closed(true)).await;
    assert_eq!(read(&mut client).await.unwrap(), b"answer");
    // The call ends successfully.
    assert!(call.output.recv().await.is_none());
    let (_, again) = Call::new();
    let gone = gate.egress.take(found.id, again).unwrap_err();
    assert_eq!(gone.code(), tonic::Code::NotFound);
}

#[tokio::test]
async fn whatever_breaks_a_connection_resets_it() {
    let (gate, _orders) = gate();
    // It is refused.
    let (mut client, _) = dial(&gate).await;
    let refused = attempt(&gate.egress, 0).await;
    let refusal = pb::EgressRefusal {
        uid: String::new(),
        id: refused.id,
    };
    let control = Some(Control::Refusal(refusal));
    let caller = None;
    gate.egress
        .obey(pb::EgressControl { control, caller })
        .unwrap();
    assert!(is_reset(&mut client).await);
    // The caller goes, before or after it has sent something.
    let (mut client, _) = dial(&gate).await;
    let lost = attempt(&gate.egress, refused.id).await;
    drop(take(&gate.egress, &lost).await);
    assert!(is_reset(&mut client).await);
    let (mut client, _) = dial(&gate).await;
    let cut = attempt(&gate.egress, lost.id).await;
    let mut call = take(&gate.egress, &cut).await;
    call.send(Input::Data(b"part"[..].into())).await;
    let Call { input, output } = &mut call;
    let (other, _) = mpsc::channel(1);
    drop(std::mem::replace(input, other));
    let status = tokio::time::timeout(SOON, output.recv())
        .await
        .unwrap()
        .unwrap()
        .unwrap_err();
    assert_eq!(ErrorReason::of(&status), Some(ErrorReason::InvalidRequest));
    assert!(is_reset(&mut client).await);
    // The container resets it, which the caller learns.
    let (client, _) = dial(&gate).await;
    let reset = attempt(&gate.egress, cut.id).await;
    let mut call = take(&gate.egress, &reset).await;
    rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
    drop(client);
    let ended = tokio::time::timeout(SOON, call.output.recv())
        .await
        .unwrap();
    let status = ended.unwrap().unwrap_err();
    assert_eq!(ErrorReason::of(&status), Some(ErrorReason::NotListening));
}

#[tokio::test]
async fn connections_beyond_the_limit_are_reset_and_one_note_says_so() {
    let (gate, mut orders) = gate();
    let held: Vec<_> = std::iter::from_fn(|| gate.slot()).collect();
    assert_eq!(held.len(), 1024);
    for _ in 0..2 {
        let (mut client, _) = dial(&gate).await;
        assert!(is_reset(&mut client).await);
    }
    let note = orders.recv().await.unwrap();
    assert!(
        matches!(
            note,
            Command::Note {
                reason: "EgressLimit",
                ..
            }
        ),
        "{note:?}"
    );
    orders.try_recv().unwrap_err();
    drop(held);
    dial(&gate).await;
    attempt(&gate.egress, 0).await;
    // An address that is none of the cluster's, such as the edge's own.
    let mut table = Table::default();
    table.ranges.insert(Range::parse("10.96.0.0/12").unwrap());
    gate.egress.table.send_replace(Arc::new(table));
    let (mut client, _) = dial(&gate).await;
    assert!(is_reset(&mut client).await);
}

#[tokio::test]
async fn a_connection_that_nobody_will_take_is_reset_at_once_and_one_note_says_so() {
    let (gate, mut orders) = gate();
    gate.egress.set_isolated(true);
    for _ in 0..2 {
        let (mut client, _) = dial(&gate).await;
        assert!(is_reset(&mut client).await);
    }
    let note = orders.recv().await.unwrap();
    let Command::Note { reason, message } = &note else {
        panic!("{note:?}");
    };
    assert_eq!(*reason, "EgressRefused");
    assert!(message.contains("listen.shim_addresses"), "{message}");
    orders.try_recv().unwrap_err();
    assert_eq!(gate.egress.waiting.borrow().after(0), None);
    // A job step carries the link for another reason.
    let followed = gate.egress.followed();
    let (_client, _) = dial(&gate).await;
    let first = attempt(&gate.egress, 0).await;
    drop(followed);
    let (mut client, _) = dial(&gate).await;
    assert!(is_reset(&mut client).await);
    // Compute nodes reach the agent after all.
    gate.egress.set_isolated(false);
    let (_client, _) = dial(&gate).await;
    attempt(&gate.egress, first.id).await;
}

#[test]
fn names_resolve_as_on_the_node_if_the_clusters_dns_may_be_out_of_reach() {
    let network = pb::EgressNetwork {
        ranges: vec!["10.96.0.0/12".to_owned()],
        dns: "10.96.0.10".to_owned(),
        api_address: "10.96.0.1".to_owned(),
        api_port: 443,
        ..pb::EgressNetwork::default()
    };
    let egress = Egress::default();
    egress.replace(&network).unwrap();
    assert!(egress.table().dns.is_some());
    egress.keep_resolvers();
    egress.replace(&network).unwrap();
    let table = egress.table();
    assert!(table.dns.is_none() && table.api.is_some());
}

#[tokio::test]
async fn datagrams_of_each_source_and_target_are_a_flow_and_answers_come_from_the_target() {
    let (gate, _orders) = gate();
    let socket = UdpSocket::bind("0.0.0.0:0").await.unwrap();
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Ipv4PacketInfo, &true)
        .unwrap();
    let port = socket.local_addr().unwrap().port();
    let mut tasks = JoinSet::new();
    tasks.spawn(udp::serve(socket, port, gate.clone()));
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    // The last one is none of the cluster's.
    let [one, two, other] = ["127.0.9.9", "127.0.9.8", "127.1.0.1"];
    client.send_to(b"lost", (other, port)).await.unwrap();
    client.send_to(b"first", (one, port)).await.unwrap();
    let first = attempt(&gate.egress, 0).await;
    assert_eq!(first.protocol(), pb::EgressProtocol::Udp);
    assert_eq!((first.address.as_str(), first.port), (one, u32::from(port)));
    client.send_to(b"second", (one, port)).await.unwrap();
    client.send_to(b"third", (two, port)).await.unwrap();
    let second = attempt(&gate.egress, first.id).await;
    assert_eq!(second.address, two);
    let mut call = take(&gate.egress, &first).await;
    assert_eq!(
        call.next().await,
        egress_output::Output::Data(b"first"[..].into())
    );
    assert_eq!(
        call.next().await,
        egress_output::Output::Data(b"second"[..].into())
    );
    call.send(Input::Data(b"answer"[..].into())).await;
    let mut buffer = [0; 100];
    let (count, from) = client.recv_from(&mut buffer).await.unwrap();
    assert_eq!((from.ip().to_string().as_str(), from.port()), (one, port));
    assert_eq!(buffer.get(..count), Some(&b"answer"[..]));
    let mut call = take(&gate.egress, &second).await;
    assert_eq!(
        call.next().await,
        egress_output::Output::Data(b"third"[..].into())
    );
    // A flow whose call has ended begins anew with the next datagram.
    drop(call);
    let again = async {
        loop {
            client.send_to(b"again", (two, port)).await.unwrap();
            let newer = attempt(&gate.egress, second.id);
            if let Ok(newer) = tokio::time::timeout(Duration::from_millis(50), newer).await {
                return newer;
            }
        }
    };
    let newer = tokio::time::timeout(SOON, again).await.unwrap();
    assert_eq!(newer.address, two);
}

#[tokio::test]
async fn a_redirection_to_what_is_no_pod_resets_the_connection() {
    let (gate, _orders) = gate();
    let (mut client, _) = dial(&gate).await;
    let found = attempt(&gate.egress, 0).await;
    let redirect = pb::EgressRedirect {
        uid: String::new(),
        id: found.id,
        address: "127.0.0.1".to_owned(),
        port: 22,
    };
    let control = pb::EgressControl {
        control: Some(Control::Redirect(redirect)),
        caller: None,
    };
    gate.egress.obey(control).unwrap();
    assert!(is_reset(&mut client).await);
}

#[test]
fn a_redirection_leads_to_pods_only_and_only_if_the_pod_has_an_address_itself() {
    let redirect = |address: &str, port| pb::EgressRedirect {
        uid: String::new(),
        id: 1,
        address: address.to_owned(),
        port,
    };
    let range = "10.200.0.0/16";
    let (pod, up) = (redirect("10.200.0.7", 80), Mesh::fixture(range, true));
    let expected: SocketAddrV4 = "10.200.0.7:80".parse().unwrap();
    assert_eq!(other_pod(&pod, &up), Some(expected));
    for wrong in [
        redirect("10.201.0.7", 80),
        redirect("web-0", 80),
        redirect("10.200.0.7", 0),
        redirect("10.200.0.7", 65_536),
    ] {
        assert_eq!(other_pod(&wrong, &up), None, "{wrong:?}");
    }
    // It would be dialled over the networks of the compute node, where another host may have the address.
    assert_eq!(other_pod(&pod, &Mesh::fixture(range, false)), None);
}

#[tokio::test]
async fn a_connection_to_another_pod_asks_whether_that_pod_is_still_there() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let here = listener.local_addr().unwrap();
    let pair = async || {
        let near = TcpStream::connect(here).await.unwrap();
        (near, listener.accept().await.unwrap().0)
    };
    let (mut container, mut edge) = pair().await;
    let (other, mut pod) = pair().await;
    let same = rustix::io::dup(&other).unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { tcp::join(&mut edge, b"question", other).await });
    let mut head = [0; 8];
    let reading = tokio::time::timeout(SOON, pod.read_exact(&mut head)).await;
    reading.unwrap().unwrap();
    assert_eq!(&head, b"question");
    assert!(rustix::net::sockopt::socket_keepalive(&same).unwrap());
    pod.write_all(b"answer").await.unwrap();
    pod.shutdown().await.unwrap();
    container.shutdown().await.unwrap();
    let ended = tokio::time::timeout(SOON, tasks.join_next()).await;
    assert!(
        ended.unwrap().unwrap().unwrap(),
        "both directions have ended"
    );
    drop(same);
    assert_eq!(read(&mut container).await.unwrap(), b"answer");
}

#[tokio::test(start_paused = true)]
async fn nobody_is_told_of_a_connection_that_was_given_up() {
    let egress = Egress::default();
    let target = SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, 443);
    assert!(egress.announce(Kind::Tcp, target).await.is_none());
    assert_eq!(egress.waiting.borrow().after(0), None);
    // The connection ends while its announcement waits to be taken.
    let gone = tokio::time::timeout(Duration::from_secs(1), egress.announce(Kind::Udp, target));
    assert!(gone.await.is_err());
    assert_eq!(egress.waiting.borrow().after(0), None);
}

#[tokio::test]
async fn what_was_sent_before_both_directions_ended_is_delivered_to_a_slow_reader() {
    const SIZE: usize = 300_000;
    let (gate, _orders) = gate();
    let (mut client, _) = dial(&gate).await;
    let mut call = take(&gate.egress, &attempt(&gate.egress, 0).await).await;
    client.shutdown().await.unwrap();
    assert_eq!(call.next().await, egress_output::Output::Closed(true));
    for _ in 0..10 {
        call.send(Input::Data(vec![7; SIZE / 10].into())).await;
    }
    call.send(Input::Closed(true)).await;
    // The sockets may hold all of it or not: in any case the call does not end with an error before the client reads.
    let ended = tokio::time::timeout(Duration::from_secs(1), call.output.recv()).await;
    assert!(!matches!(ended, Ok(Some(_))), "{ended:?}");
    assert_eq!(read(&mut client).await.unwrap().len(), SIZE);
}

#[tokio::test]
async fn a_call_that_ends_frees_a_connection_of_which_the_clusters_direction_has_ended() {
    let (gate, _orders) = gate();
    let (mut client, _) = dial(&gate).await;
    let call = take(&gate.egress, &attempt(&gate.egress, 0).await).await;
    call.send(Input::Closed(true)).await;
    assert!(read(&mut client).await.unwrap().is_empty());
    drop(call);
    let is_free = || std::iter::from_fn(|| gate.slot()).collect::<Vec<_>>().len() == 1024;
    let freed = async {
        while !is_free() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(SOON, freed).await.unwrap();
}

#[tokio::test]
async fn a_container_that_is_gone_after_its_direction_has_ended_frees_its_place() {
    let (gate, _orders) = gate();
    let (mut client, _) = dial(&gate).await;
    let mut call = take(&gate.egress, &attempt(&gate.egress, 0).await).await;
    client.shutdown().await.unwrap();
    assert_eq!(call.next().await, egress_output::Output::Closed(true));
    // The endpoint sends nothing, and does not end its direction.
    rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
    drop(client);
    let ended = tokio::time::timeout(SOON, call.output.recv()).await;
    let status = ended.expect("it stays").unwrap().unwrap_err();
    assert_eq!(ErrorReason::of(&status), Some(ErrorReason::NotListening));
}

#[tokio::test]
async fn whether_a_container_is_still_there_is_asked() {
    let (gate, _orders) = gate();
    let listener = TcpListener::bind("127.0.9.9:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let _client = TcpStream::connect(address).await.unwrap();
    let (accepted, _) = listener.accept().await.unwrap();
    let same = rustix::io::dup(&accepted).unwrap();
    gate.admit(accepted);
    attempt(&gate.egress, 0).await;
    assert!(rustix::net::sockopt::socket_keepalive(&same).unwrap());
}
