//! Questions of containers to the cluster's DNS: the test is container, agent, kubelet and every server.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddr},
};

use super::{
    super::{
        datagram::Key,
        dns::{self, Names, message, message::samples},
        tcp::Guarded,
    },
    *,
};

/// An address that stands for the cluster's DNS.
const SERVER: Ipv4Addr = Ipv4Addr::new(127, 0, 9, 9);
const ADDRESS: [u8; 4] = [10, 96, 7, 7];

/// A container, and the task that answers it.
struct Container {
    names: Names,
    socket: UdpSocket,
    key: Key,
    egress: Arc<Egress>,
}

impl Container {
    async fn new() -> Self {
        let (gate, _) = gate();
        let edge = UdpSocket::bind("0.0.0.0:0").await.unwrap();
        let target = SocketAddrV4::new(SERVER, edge.local_addr().unwrap().port());
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let SocketAddr::V4(own) = socket.local_addr().unwrap() else {
            panic!("no address of IPv4");
        };
        Self {
            names: Names::start(Arc::clone(&gate.egress), Arc::new(edge)),
            socket,
            key: (own, target),
            egress: gate.egress,
        }
    }

    fn ask(&self, question: &[u8]) {
        self.names.ask(self.key, question.to_vec().into());
    }

    async fn answer(&self) -> Vec<u8> {
        let mut buffer = [0; 4096];
        let received = tokio::time::timeout(SOON, self.socket.recv_from(&mut buffer)).await;
        let (count, from) = received.expect("no answer").unwrap();
        assert_eq!(from, self.key.1.into(), "it comes from the server");
        buffer[..count].to_vec()
    }

    /// Whether a question waits to be answered or announced.
    fn newest(&self, after: u64) -> Option<pb::EgressAttempt> {
        self.egress.waiting.borrow().after(after)
    }
}

/// The next question at the server.
async fn asked(call: &mut Call) -> Vec<u8> {
    let next = call.next().await;
    let egress_output::Output::Data(data) = next else {
        panic!("{next:?}");
    };
    data.to_vec()
}

#[tokio::test]
async fn containers_share_a_flow_and_an_answer_is_given_again_without_the_link() {
    let container = Container::new().await;
    container.ask(&samples::question(1, "web.ns"));
    container.ask(&samples::question(1, "gone.ns"));
    let flow = attempt(&container.egress, 0).await;
    assert_eq!(flow.protocol(), pb::EgressProtocol::Udp);
    assert_eq!(flow.address, SERVER.to_string());
    let mut call = take(&container.egress, &flow).await;
    let web = asked(&mut call).await;
    let gone = asked(&mut call).await;
    assert_ne!(message::id(&web), message::id(&gone));
    // The answers come in another order, and one of them for nobody.
    let forged = samples::found(&samples::question(1, "web.ns"), 20, [6; 4]);
    let wrong_id = message::id(&web).unwrap() ^ 1;
    let forged = message::with_id(&forged, wrong_id);
    let missing = samples::missing(&gone, 3, 20, 20);
    let found = samples::found(&web, 20, ADDRESS);
    for answer in [forged, missing, found] {
        call.send(Input::Data(answer.into())).await;
    }
    assert_eq!(
        container.answer().await,
        samples::missing(&samples::question(1, "gone.ns"), 3, 20, 20)
    );
    assert_eq!(
        container.answer().await,
        samples::found(&samples::question(1, "web.ns"), 20, ADDRESS)
    );
    // From now on nobody is asked.
    container.ask(&samples::question(7, "gone.ns"));
    assert_eq!(container.answer().await[3] & 0xf, 3);
    for id in 2..200 {
        let question = samples::question(id, "Web.ns");
        container.ask(&question);
        let answer = container.answer().await;
        assert_eq!(message::id(&answer), Some(id));
        assert!(answer.ends_with(&ADDRESS), "{answer:?}");
    }
    assert_eq!(container.newest(flow.id), None, "there is one flow");
    container.ask(&samples::question(8, "other.ns"));
    let other = asked(&mut call).await;
    assert!(other.ends_with(&samples::question(8, "other.ns")[2..]));
}

/// The C library asks for the addresses of both kinds at once, and most Services have none of IPv6.
#[tokio::test]
async fn a_name_without_an_address_of_ipv6_is_there_all_the_same() {
    let container = Container::new().await;
    let ipv6 = |id| {
        let mut question = samples::question(id, "web.ns");
        let kind = question.len() - 3;
        question[kind] = 28;
        question
    };
    container.ask(&samples::question(1, "web.ns"));
    container.ask(&ipv6(2));
    let flow = attempt(&container.egress, 0).await;
    let mut call = take(&container.egress, &flow).await;
    let of_ipv4 = asked(&mut call).await;
    let of_ipv6 = asked(&mut call).await;
    let nothing = samples::missing(&of_ipv6, 0, 20, 20);
    call.send(Input::Data(nothing.into())).await;
    assert_eq!(
        container.answer().await,
        samples::missing(&ipv6(2), 0, 20, 20)
    );
    let found = samples::found(&of_ipv4, 20, ADDRESS);
    call.send(Input::Data(found.into())).await;
    assert!(container.answer().await.ends_with(&ADDRESS));
    // Both answers are kept, each for its own question.
    container.ask(&ipv6(3));
    let again = container.answer().await;
    assert_eq!((message::id(&again), again[3] & 0xf), (Some(3), 0));
    assert_eq!(again[7], 0, "no address: {again:?}");
    container.ask(&samples::question(4, "web.ns"));
    assert!(container.answer().await.ends_with(&ADDRESS));
    assert_eq!(container.newest(flow.id), None, "nobody else was asked");
}

#[tokio::test]
async fn a_thousand_names_cost_one_flow() {
    let container = Container::new().await;
    container.ask(&samples::question(0, "first"));
    let flow = attempt(&container.egress, 0).await;
    let mut call = take(&container.egress, &flow).await;
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        loop {
            let answer = samples::found(&asked(&mut call).await, 20, ADDRESS);
            call.send(Input::Data(answer.into())).await;
        }
    });
    container.answer().await;
    for round in 0..50 {
        let ids = round * 20..(round + 1) * 20;
        for id in ids.clone() {
            container.ask(&samples::question(id, &format!("n{id}.ns")));
        }
        let mut answered = BTreeSet::new();
        for _ in ids.clone() {
            answered.extend(message::id(&container.answer().await));
        }
        assert!(answered.into_iter().eq(ids), "round {round}");
    }
    assert_eq!(container.newest(flow.id), None);
}

#[tokio::test]
async fn what_one_pod_is_answered_never_reaches_another_pod() {
    let (one, other) = (Container::new().await, Container::new().await);
    let question = samples::question(1, "web.ns");
    one.ask(&question);
    let flow = attempt(&one.egress, 0).await;
    let mut call = take(&one.egress, &flow).await;
    let answer = samples::found(&asked(&mut call).await, 20, ADDRESS);
    call.send(Input::Data(answer.into())).await;
    one.answer().await;
    other.ask(&question);
    attempt(&other.egress, 0).await;
}

#[tokio::test]
async fn questions_fail_at_once_if_the_flow_is_refused_and_nobody_is_asked_again_and_again() {
    let container = Container::new().await;
    container.ask(&samples::question(3, "web.ns"));
    let flow = attempt(&container.egress, 0).await;
    drop(container.egress.withdraw(flow.id));
    let failed = container.answer().await;
    assert_eq!((message::id(&failed), failed[3] & 0xf), (Some(3), 2));
    for id in 4..20 {
        container.ask(&samples::question(id, "web.ns"));
        assert_eq!(message::id(&container.answer().await), Some(id));
    }
    assert_eq!(container.newest(flow.id), None);
}

/// As while no kubelet is there, or its DNS servers are not reached.
#[tokio::test(start_paused = true)]
async fn a_question_that_nobody_takes_is_a_failure_and_no_silence() {
    let container = Container::new().await;
    container.ask(&samples::question(9, "web.ns"));
    let failed = container.answer().await;
    assert_eq!((message::id(&failed), failed[3] & 0xf), (Some(9), 2));
    assert_eq!(container.newest(0), None, "it is not announced any more");
}

#[tokio::test]
async fn questions_are_asked_again_as_soon_as_a_flow_has_an_answer() {
    let container = Container::new().await;
    container.ask(&samples::question(1, "slow.ns"));
    let flow = attempt(&container.egress, 0).await;
    let mut call = take(&container.egress, &flow).await;
    let slow = asked(&mut call).await;
    let Call { input, mut output } = call;
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { while output.recv().await.is_some() {} });
    // A flow that owes an answer is replaced after a while.
    let newer = async {
        loop {
            container.ask(&samples::question(2, "other.ns"));
            let newer = attempt(&container.egress, flow.id);
            if let Ok(newer) = tokio::time::timeout(Duration::from_millis(50), newer).await {
                return newer;
            }
        }
    };
    let newer = tokio::time::timeout(SOON, newer).await.unwrap();
    drop(container.egress.withdraw(newer.id));
    let failed = container.answer().await;
    assert_eq!((message::id(&failed), failed[3] & 0xf), (Some(2), 2));
    let found = samples::found(&slow, 20, ADDRESS);
    let answer = EgressInput {
        input: Some(Input::Data(found.into())),
    };
    input.send(answer).await.unwrap();
    // The newer flow may have had the question more than once.
    while message::id(&container.answer().await) != Some(1) {}
    container.ask(&samples::question(3, "third.ns"));
    attempt(&container.egress, newer.id).await;
}

#[tokio::test]
async fn what_is_no_question_is_dropped_and_what_is_not_read_is_passed_on() {
    let container = Container::new().await;
    let question = samples::question(3, "web.ns");
    container.ask(&[1, 2, 3]);
    container.ask(&samples::found(&question, 20, ADDRESS));
    // An update (OPCODE 5).
    let mut update = question.clone();
    update[2] = 0x28;
    container.ask(&update);
    let mut call = take(&container.egress, &attempt(&container.egress, 0).await).await;
    let passed_on = asked(&mut call).await;
    assert_eq!(passed_on[2..], update[2..]);
    let mut answer = passed_on;
    answer[2] |= 0x80;
    call.send(Input::Data(answer.clone().into())).await;
    assert_eq!(container.answer().await, message::with_id(&answer, 3));
}

/// A resolver of the node, which answers every question of datagrams and streams.
async fn resolver(tasks: &mut JoinSet<()>) -> SocketAddr {
    // A port that is free for datagrams may be taken for streams.
    let (datagrams, listener) = loop {
        let datagrams = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = datagrams.local_addr().unwrap();
        if let Ok(listener) = TcpListener::bind(address).await {
            break (datagrams, listener);
        }
    };
    let address = datagrams.local_addr().unwrap();
    tasks.spawn(async move {
        let mut buffer = [0; 512];
        while let Ok((count, from)) = datagrams.recv_from(&mut buffer).await {
            let answer = samples::found(&buffer[..count], 20, ADDRESS);
            datagrams.send_to(&answer, from).await.unwrap();
        }
    });
    tasks.spawn(async move {
        while let Ok((mut peer, _)) = listener.accept().await {
            let mut all = Vec::new();
            peer.read_to_end(&mut all).await.unwrap();
            let answer = samples::found(&all[2..], 20, ADDRESS);
            let length = u16::try_from(answer.len()).unwrap().to_be_bytes();
            peer.write_all(&[&length[..], &answer].concat())
                .await
                .unwrap();
        }
    });
    address
}

fn leave_lan_to(egress: &Egress, servers: Vec<SocketAddr>) {
    egress.set_node_names(dns::NodeNames::new(&["lan".to_owned()], servers));
}

#[tokio::test]
async fn names_that_the_site_lists_are_asked_at_the_node_and_others_in_the_cluster() {
    let mut tasks = JoinSet::new();
    // The first one does not answer: nobody listens there.
    let dead = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let servers = vec![dead.local_addr().unwrap(), resolver(&mut tasks).await];
    drop(dead);
    let container = Container::new().await;
    leave_lan_to(&container.egress, servers);
    let question = samples::question(5, "printer.LAN");
    container.ask(&question);
    assert_eq!(
        container.answer().await,
        samples::found(&question, 20, ADDRESS)
    );
    // It is kept, too.
    drop(tasks);
    container.ask(&question);
    assert!(container.answer().await.ends_with(&ADDRESS));
    assert_eq!(container.newest(0), None);
    container.ask(&samples::question(6, "plan"));
    attempt(&container.egress, 0).await;
}

#[tokio::test]
async fn a_name_of_the_node_fails_if_no_resolver_of_the_node_answers() {
    let dead = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let container = Container::new().await;
    leave_lan_to(&container.egress, vec![dead.local_addr().unwrap()]);
    drop(dead);
    container.ask(&samples::question(5, "printer.lan"));
    let failed = container.answer().await;
    assert_eq!((message::id(&failed), failed[3] & 0xf), (Some(5), 2));
    assert_eq!(container.newest(0), None, "the cluster is not asked");
}

/// A connection of a container to the cluster's DNS.
async fn connect(egress: &Arc<Egress>, tasks: &mut JoinSet<()>) -> TcpStream {
    let listener = TcpListener::bind("127.0.9.9:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap())
        .await
        .unwrap();
    let stream = Guarded::new(listener.accept().await.unwrap().0);
    let egress = Arc::clone(egress);
    let target = SocketAddrV4::new(SERVER, DNS);
    tasks.spawn(async move { dns::stream::serve(stream, target, &egress).await });
    client
}

fn framed(name: &str) -> Vec<u8> {
    let question = samples::question(5, name);
    let length = u16::try_from(question.len()).unwrap().to_be_bytes();
    [&length[..], &question].concat()
}

#[tokio::test]
async fn a_connection_goes_where_its_first_question_belongs() {
    let (gate, _orders) = gate();
    let mut tasks = JoinSet::new();
    leave_lan_to(&gate.egress, vec![resolver(&mut tasks).await]);
    let mut client = connect(&gate.egress, &mut tasks).await;
    client.write_all(&framed("printer.lan")).await.unwrap();
    client.shutdown().await.unwrap();
    let answer = read(&mut client).await.unwrap();
    assert!(answer.ends_with(&ADDRESS), "{answer:?}");
    assert_eq!(gate.egress.waiting.borrow().after(0), None);
    // What was read to decide is passed on.
    let mut client = connect(&gate.egress, &mut tasks).await;
    client.write_all(&framed("web.ns")).await.unwrap();
    let found = attempt(&gate.egress, 0).await;
    assert_eq!((found.port, &*found.address), (53, "127.0.9.9"));
    let mut call = take(&gate.egress, &found).await;
    assert_eq!(asked(&mut call).await, framed("web.ns"));
    // So is what is no question.
    let mut client = connect(&gate.egress, &mut tasks).await;
    client.write_all(&[0]).await.unwrap();
    client.shutdown().await.unwrap();
    let odd = attempt(&gate.egress, found.id).await;
    let mut call = take(&gate.egress, &odd).await;
    assert_eq!(asked(&mut call).await, [0]);
}
