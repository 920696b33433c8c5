//! Task: the datagrams that containers send to one port of the cluster's Services.
//!
//! A flow is what one local address of the pod exchanges with one target. Each flow has a call of `EgressStream`, which is
//! announced with its first datagram and ends when it is idle; if it leads to another pod of the node, it has a socket in the pod's
//! network instead. Answers leave with the address as their source to which the
//! container has sent. As with any network, what does not fit is dropped. Questions to the cluster's DNS are no flows: [`dns`]
//! answers them.
//!
//! [`dns`]: super::dns

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, SocketAddrV4},
    sync::Arc,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use knoc_proto::pb::{EgressInput, egress_input::Input, egress_output::Output};
use tokio::{
    net::UdpSocket,
    sync::{OwnedSemaphorePermit, mpsc},
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep_until, timeout},
};

use super::{
    DNS, Egress, Settled, Taken,
    datagram::{Key, receive, reply},
    dns::Names,
    gate::{Gate, PAUSE},
    tcp::send,
};
use crate::{budget::Budget, launch::network::protocol::Kind};

/// How many flows one port may have; beyond it, the one that was idle for the longest time ends.
const FLOWS: usize = 512;

/// How many datagrams of a flow may wait for the link, and how many bytes: about as many as a socket takes. Those of all flows are bounded
/// as well ([`super::gate::WAITING`]).
const QUEUE: usize = 16;
const WAITING: usize = 256 << 10;

/// The longest datagram.
const LONGEST: usize = 64 << 10;

/// After which time an idle flow ends.
const IDLE: Duration = Duration::from_mins(1);

/// After which time a flow to a DNS server ends if every question has its answer: resolvers use a port for a few
/// questions only.
const ANSWERED: Duration = Duration::from_secs(1);

/// How long the datagrams of a refused flow are dropped, before the next one is announced as a new flow.
const REFUSED: Duration = Duration::from_secs(5);

/// A flow, as its port sees it.
#[derive(Debug)]
struct Flow {
    datagrams: mpsc::Sender<Bytes>,
    /// The bytes that may still wait.
    room: Budget,
    task: AbortHandle,
    used: Instant,
}

/// Task: serves one port until it is dropped; its flows end with it.
pub(super) async fn serve(socket: UdpSocket, port: u16, gate: Gate) {
    let socket = Arc::new(socket);
    let names = (port == DNS).then(|| Names::start(Arc::clone(&gate.egress), Arc::clone(&socket)));
    let mut port = Port {
        socket,
        names,
        gate,
        flows: HashMap::new(),
        tasks: JoinSet::new(),
        number: port,
    };
    let mut buffer = vec![0; LONGEST];
    let socket = Arc::clone(&port.socket);
    loop {
        tokio::select! {
            biased;
            Some(ended) = port.tasks.join_next() => if let Ok(key) = ended {
                port.forget(&key);
            },
            received = receive(&socket, &mut buffer) => match received {
                Ok((from, to, count)) => {
                    let data = buffer.get(..count).unwrap_or_default();
                    port.pass_on(from, to, data);
                }
                Err(_) => tokio::time::sleep(PAUSE).await,
            },
        }
    }
}

struct Port {
    socket: Arc<UdpSocket>,
    /// What answers questions to the cluster's DNS.
    names: Option<Names>,
    gate: Gate,
    flows: HashMap<Key, Flow>,
    tasks: JoinSet<Key>,
    number: u16,
}

impl Port {
    fn pass_on(&mut self, from: SocketAddrV4, to: Ipv4Addr, data: &[u8]) {
        if !self.gate.reaches(to) {
            return;
        }
        let key = (from, SocketAddrV4::new(to, self.number));
        if let Some(names) = self.names.as_ref()
            && self.gate.egress.is_dns(key.1)
        {
            return names.ask(key, Bytes::copy_from_slice(data));
        }
        if let Some(flow) = self.flows.get_mut(&key)
            && !flow.datagrams.is_closed()
        {
            // What does not fit is lost: the link is slower than the container.
            if let Ok(place) = flow.datagrams.try_reserve()
                && let Some(data) = flow.room.copy(data, false)
            {
                place.send(data);
                flow.used = Instant::now();
            }
            return;
        }
        self.begin(key, data);
    }

    fn begin(&mut self, key: Key, data: &[u8]) {
        if !self.gate.has_way() {
            return;
        }
        let room = self.gate.datagrams.part(WAITING);
        let Some(data) = room.copy(data, false) else {
            return;
        };
        if self.flows.len() >= FLOWS
            && let Some(oldest) = oldest(&self.flows)
            && let Some(flow) = self.flows.remove(&oldest)
        {
            flow.task.abort();
        }
        let Ok(slot) = Arc::clone(&self.gate.flows).try_acquire_owned() else {
            self.gate.note_once(
                "the containers exchange datagrams with too many addresses of the cluster at once: some are dropped"
                    .to_owned(),
            );
            return;
        };
        let (datagrams, queue) = mpsc::channel(QUEUE);
        // There is room for the first one.
        datagrams.try_send(data).ok();
        let exchange = Exchange {
            key,
            socket: Arc::clone(&self.socket),
            queue,
            _slot: slot,
        };
        let egress = Arc::clone(&self.gate.egress);
        let task = self.tasks.spawn(exchange.run(egress));
        let flow = Flow {
            datagrams,
            room,
            task,
            used: Instant::now(),
        };
        self.flows.insert(key, flow);
    }

    /// Removes a flow that has ended, unless there is a newer one between the same addresses.
    fn forget(&mut self, key: &Key) {
        if self
            .flows
            .get(key)
            .is_some_and(|flow| flow.datagrams.is_closed())
        {
            self.flows.remove(key);
        }
    }
}

/// PURE: the flow that was used least recently.
fn oldest(flows: &HashMap<Key, Flow>) -> Option<Key> {
    let oldest = flows.iter().min_by_key(|(_, flow)| flow.used);
    oldest.map(|(key, _)| *key)
}

/// One flow.
struct Exchange {
    key: Key,
    socket: Arc<UdpSocket>,
    queue: mpsc::Receiver<Bytes>,
    _slot: OwnedSemaphorePermit,
}

impl Exchange {
    async fn run(mut self, egress: Arc<Egress>) -> Key {
        let reached = match egress.announce(Kind::Udp, self.key.1).await {
            Some(Settled::Taken(taken)) => {
                self.carry(taken).await;
                true
            }
            Some(Settled::Redirected(pod)) => self.meet(pod, &egress).await.is_ok(),
            None => false,
        };
        if !reached {
            let drained = async { while self.queue.recv().await.is_some() {} };
            timeout(REFUSED, drained).await.ok();
        }
        self.key
    }

    /// Exchanges datagrams with another pod of the node, until the flow is idle. An error means that nobody listens there.
    async fn meet(&mut self, pod: SocketAddrV4, egress: &Egress) -> io::Result<()> {
        let inside = egress.inside.get().ok_or(io::ErrorKind::NotConnected)?;
        let socket = inside.network.datagrams().await?;
        socket.connect(pod).await?;
        self.exchange(&socket).await
    }

    async fn exchange(&mut self, other: &UdpSocket) -> io::Result<()> {
        let mut until = Instant::now() + IDLE;
        loop {
            tokio::select! {
                biased;
                ready = other.readable() => {
                    ready?;
                    // A silent flow holds no buffer.
                    let mut data = BytesMut::with_capacity(LONGEST);
                    match other.try_recv_buf(&mut data) {
                        // As on any network, it may be lost.
                        Ok(_) => drop(reply(&self.socket, self.key, &data).await),
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                        Err(error) => return Err(error),
                    }
                }
                Some(data) = self.queue.recv() => {
                    if let Err(error) = other.send(&data).await
                        && error.kind() == io::ErrorKind::ConnectionRefused
                    {
                        return Err(error);
                    }
                }
                () = sleep_until(until) => return Ok(()),
            }
            until = Instant::now() + IDLE;
        }
    }

    async fn carry(&mut self, taken: Taken) {
        let Taken { mut input, output } = taken;
        if !send(&output, Output::Connected(true)).await {
            return;
        }
        let mut state = State {
            is_dns: self.key.1.port() == DNS,
            open: 0,
        };
        let mut until = Instant::now() + IDLE;
        loop {
            tokio::select! {
                biased;
                () = output.closed() => return,
                message = input.message() => match message {
                    Ok(Some(EgressInput { input: Some(Input::Data(data)) })) => {
                        // As on any network, it may be lost.
                        reply(&self.socket, self.key, &data).await.ok();
                        state.open = state.open.saturating_sub(1);
                    }
                    Ok(Some(EgressInput { input: Some(Input::Start(_)) | None })) => continue,
                    Ok(Some(EgressInput { input: Some(Input::Closed(_)) }) | None) | Err(_) => return,
                },
                Some(data) = self.queue.recv() => {
                    if !send(&output, Output::Data(data)).await {
                        return;
                    }
                    state.open = state.open.saturating_add(1);
                }
                () = sleep_until(until) => return,
            }
            until = Instant::now() + state.patience();
        }
    }
}

/// What a flow waits for.
#[derive(Debug, Clone, Copy)]
struct State {
    is_dns: bool,
    /// How many datagrams of the container have no answer yet, if each has one.
    open: u32,
}

impl State {
    /// PURE: how long the flow may be idle.
    fn patience(self) -> Duration {
        if self.is_dns && self.open == 0 {
            ANSWERED
        } else {
            IDLE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Table, *};
    use crate::launch::network::protocol::Range;

    /// A port of the cluster's Services, which are addresses of the loopback interface.
    async fn port() -> Port {
        let egress = Egress::default();
        let mut table = Table::default();
        table.ranges.insert(Range::parse("127.0.0.0/16").unwrap());
        egress.table.send_replace(Arc::new(table));
        Port {
            socket: Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap()),
            names: None,
            gate: Gate::new(&Arc::new(egress), mpsc::channel(4).0),
            flows: HashMap::new(),
            tasks: JoinSet::new(),
            number: 123,
        }
    }

    #[tokio::test]
    async fn datagrams_that_nobody_takes_are_bounded_in_bytes_for_each_flow_and_for_all() {
        const SIZE: usize = 60 << 10;
        let mut port = port().await;
        let (to, data) = (Ipv4Addr::new(127, 0, 9, 9), vec![7; SIZE]);
        for client in 1..200 {
            for _ in 0..QUEUE {
                port.pass_on(SocketAddrV4::new(to, client), to, &data);
            }
        }
        let flows = port.flows.values();
        let waiting = flows.map(|flow| QUEUE - flow.datagrams.capacity());
        let waiting: Vec<_> = waiting.collect();
        assert!(waiting.iter().all(|count| *count <= WAITING / SIZE));
        assert_eq!(
            waiting.iter().sum::<usize>(),
            super::super::gate::WAITING / SIZE
        );
        // A small one still fits, and flows that have ended free their room.
        port.pass_on(SocketAddrV4::new(to, 200), to, b"small");
        assert_eq!(port.flows.len(), waiting.len() + 1);
        let gate = port.gate.clone();
        drop(port);
        let freed = async {
            while gate.datagrams.copy(&data, false).is_none() {
                tokio::task::yield_now().await;
            }
        };
        let freed = timeout(Duration::from_secs(20), freed).await;
        freed.expect("the room is not freed");
    }

    #[test]
    fn a_resolver_that_has_its_answers_lets_go_early() {
        let of = |is_dns, open| State { is_dns, open }.patience();
        assert_eq!(of(true, 0), ANSWERED);
        // Another question is open, or an answer was lost.
        assert_eq!(of(true, 1), IDLE);
        assert_eq!(of(false, 0), IDLE);
    }

    #[tokio::test]
    async fn datagrams_go_to_another_pod_and_back_until_nobody_listens_there() {
        let soon = Duration::from_secs(20);
        let bound = async || UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let at = |socket: &UdpSocket| match socket.local_addr().unwrap() {
            std::net::SocketAddr::V4(address) => address,
            std::net::SocketAddr::V6(address) => panic!("{address}"),
        };
        let (client, port, pod) = (bound().await, Arc::new(bound().await), bound().await);
        let inside = bound().await;
        inside.connect(at(&pod)).await.unwrap();
        let (datagrams, queue) = mpsc::channel(QUEUE);
        let mut exchange = Exchange {
            key: (at(&client), at(&port)),
            socket: Arc::clone(&port),
            queue,
            _slot: Arc::new(tokio::sync::Semaphore::new(1))
                .try_acquire_owned()
                .unwrap(),
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { exchange.exchange(&inside).await });
        datagrams
            .send(Bytes::from_static(b"question"))
            .await
            .unwrap();
        let mut buffer = [0; 64];
        let (count, from) = timeout(soon, pod.recv_from(&mut buffer))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(&buffer[..count], b"question");
        pod.send_to(b"answer", from).await.unwrap();
        let (count, from) = timeout(soon, client.recv_from(&mut buffer))
            .await
            .unwrap()
            .unwrap();
        assert_eq!((&buffer[..count], from), (&b"answer"[..], at(&port).into()));
        drop(pod);
        let told = async {
            loop {
                // The kernel reports a refused datagram with a later call.
                datagrams.try_send(Bytes::from_static(b"again")).ok();
                if let Ok(ended) = timeout(Duration::from_millis(50), tasks.join_next()).await {
                    return ended.unwrap().unwrap();
                }
            }
        };
        let ended = timeout(soon, told).await.expect("the flow goes on");
        assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn the_flow_that_was_used_least_recently_ends_first() {
        let mut tasks = JoinSet::new();
        let mut flow = |used| Flow {
            datagrams: mpsc::channel(1).0,
            room: Budget::new(0),
            task: tasks.spawn(std::future::pending::<()>()),
            used,
        };
        let now = Instant::now();
        let key = |port| {
            let client = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
            (client, SocketAddrV4::new(Ipv4Addr::LOCALHOST, DNS))
        };
        let flows = HashMap::from([(key(1), flow(now + IDLE)), (key(2), flow(now))]);
        assert_eq!(oldest(&flows), Some(key(2)));
    }
}
