//! Task: answers the questions that containers send to the cluster's DNS.
//!
//! Answers are [kept](cache) for their lifetime, so most questions do not leave the compute node. The others share one flow
//! of datagrams to the cluster instead of having one each, whatever port a container has used for them. Names that the site
//! leaves to the [resolvers of the compute node](node) are asked there.
//!
//! ```text
//!   container ─question─► Names ─┬─► cache ──────────────────────────────────────────► answer
//!                                ├─► a resolver of the node, if the site lists the suffix ─► answer
//!                                └─► Pending ─► flow ═ EgressStream ═► kubelet ─► DNS ─► answer
//! ```
//!
//! The kubelet chooses a DNS server for each flow, so a flow is replaced after half a minute, or sooner if a question has had
//! no answer for two seconds. The older one goes on until its answers have had their time.

mod cache;
pub(crate) mod message;
mod node;
mod pending;
pub(super) mod stream;
mod suffixes;

use std::{net::SocketAddrV4, sync::Arc, time::Duration};

use bytes::Bytes;
use knoc_proto::pb::{EgressInput, egress_input::Input, egress_output::Output};
use tokio::{
    net::UdpSocket,
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};

pub(crate) use self::node::NodeNames;
use self::{
    cache::Cache,
    message::Question,
    pending::{Asked, PATIENCE, Pending},
};
use super::{
    Egress, Settled, Taken,
    datagram::{Key, reply},
    tcp::send,
};
use crate::launch::network::protocol::Kind;

/// How many questions may wait for this task, and for a flow.
const QUESTIONS: usize = 128;

/// How many answers may wait for this task.
const ANSWERS: usize = 64;

/// After which time a flow is replaced.
const OLD: Duration = Duration::from_secs(30);

/// The same if a question has had no answer for this time.
const STUCK: Duration = Duration::from_secs(2);

/// After which time a flow ends that nobody uses. The kubelet would end it after ten seconds.
const IDLE: Duration = Duration::from_secs(5);

/// How many flows may be open at once, with those that were replaced.
const FLOWS: usize = 8;

/// How long questions fail at once after a flow was refused or nobody took it.
const REFUSED: Duration = Duration::from_secs(5);

/// How many questions the resolvers of the node are asked at once.
const OF_NODE: usize = 64;

/// The handle of the task, which ends when this is dropped.
#[derive(Debug)]
pub(super) struct Names {
    questions: mpsc::Sender<(Key, Bytes)>,
    _task: JoinSet<()>,
}

impl Names {
    /// Starts the task. Answers leave through the socket.
    pub(super) fn start(egress: Arc<Egress>, socket: Arc<UdpSocket>) -> Self {
        let (questions, asked) = mpsc::channel(QUESTIONS);
        let (from_flows, answers) = mpsc::channel(ANSWERS);
        let resolver = Resolver {
            egress,
            socket,
            cache: Cache::default(),
            pending: Pending::default(),
            flow: None,
            last: 0,
            flows: JoinSet::new(),
            from_flows,
            of_node: JoinSet::new(),
            refused: None,
            target: None,
        };
        let mut task = JoinSet::new();
        task.spawn(resolver.run(asked, answers));
        Self {
            questions,
            _task: task,
        }
    }

    /// Asks a question of a container. As on any network, it may be lost.
    pub(super) fn ask(&self, key: Key, message: Bytes) {
        if message::is_question(&message) {
            self.questions.try_send((key, message)).ok();
        }
    }
}

/// A flow that takes questions. Dropped, it ends after the answers that it waits for have had their time.
#[derive(Debug)]
struct Flow {
    number: u64,
    questions: mpsc::Sender<Bytes>,
    since: Instant,
}

/// How a flow has ended.
#[derive(Debug)]
struct Ended {
    flow: u64,
    /// Whether it was refused, or nobody took it.
    is_refused: bool,
}

/// What a resolver of the node has answered.
#[derive(Debug)]
struct OfNode {
    key: Key,
    question: Question,
    asked: Bytes,
    answer: Option<Vec<u8>>,
}

struct Resolver {
    egress: Arc<Egress>,
    socket: Arc<UdpSocket>,
    cache: Cache,
    pending: Pending<Key>,
    flow: Option<Flow>,
    /// The number of the newest flow.
    last: u64,
    flows: JoinSet<Ended>,
    /// Answers, with the number of the flow.
    from_flows: mpsc::Sender<(u64, Bytes)>,
    of_node: JoinSet<OfNode>,
    /// When a flow was refused.
    refused: Option<Instant>,
    /// The cluster's DNS.
    target: Option<SocketAddrV4>,
}

impl Resolver {
    async fn run(
        mut self,
        mut questions: mpsc::Receiver<(Key, Bytes)>,
        mut answers: mpsc::Receiver<(u64, Bytes)>,
    ) {
        loop {
            tokio::select! {
                biased;
                Some((flow, message)) = answers.recv() => self.answered(flow, &message).await,
                Some(ended) = self.flows.join_next() => if let Ok(ended) = ended {
                    self.ended(&ended).await;
                },
                Some(answered) = self.of_node.join_next() => if let Ok(answered) = answered {
                    self.answered_by_node(answered).await;
                },
                question = questions.recv() => match question {
                    Some((key, message)) => self.asked(key, message).await,
                    None => return,
                },
                () = sleep(IDLE), if self.flow.is_some() => self.flow = None,
            }
        }
    }

    async fn asked(&mut self, key: Key, message: Bytes) {
        let now = Instant::now();
        self.follow(key.1);
        let question = Question::parse(&message);
        if let Some(question) = &question {
            if let Some(answer) = self.cache.answer(question, &message, now) {
                return self.reply(key, &answer).await;
            }
            if self.is_of_node(question) {
                return self.ask_node(key, message, question.clone());
            }
        }
        if self.refused.is_some_and(|at| now < at + REFUSED) {
            return self.fail(key, &message).await;
        }
        let Some(flow) = self.usable(key.1, now) else {
            return;
        };
        let (number, queue) = (flow.number, flow.questions.clone());
        let asked = Asked {
            client: key,
            message: message.to_vec(),
            question,
            flow: number,
            at: now,
        };
        if let Some(id) = self.pending.add(asked, rand::random) {
            // If the link is slower than the containers, it is lost.
            queue.try_send(message::with_id(&message, id).into()).ok();
        }
    }

    /// Forgets what another server has answered.
    fn follow(&mut self, target: SocketAddrV4) {
        if self.target != Some(target) {
            self.target = Some(target);
            self.cache.clear();
            self.flow = None;
            self.refused = None;
        }
    }

    /// The flow for the next question. `None` if there are too many.
    fn usable(&mut self, target: SocketAddrV4, now: Instant) -> Option<&Flow> {
        let pending = &self.pending;
        self.flow.take_if(|flow| is_over(flow, pending, now));
        if self.flow.is_none() && self.flows.len() < FLOWS {
            self.last += 1;
            let (questions, queue) = mpsc::channel(QUESTIONS);
            let exchange = Exchange {
                number: self.last,
                questions: queue,
                answers: self.from_flows.clone(),
            };
            let egress = Arc::clone(&self.egress);
            self.flows.spawn(exchange.run(egress, target));
            self.flow = Some(Flow {
                number: self.last,
                questions,
                since: now,
            });
        }
        self.flow.as_ref()
    }

    async fn answered(&mut self, flow: u64, message: &[u8]) {
        let Some(asked) = self.pending.answered(flow, message) else {
            return;
        };
        // An older flow may have waited in vain until the link was back, while a newer one works.
        self.refused = None;
        if let Some(question) = &asked.question {
            self.cache.keep(question, message, Instant::now());
        }
        if let Some(id) = message::id(&asked.message) {
            let answer = message::with_id(message, id);
            self.reply(asked.client, &answer).await;
        }
    }

    async fn ended(&mut self, ended: &Ended) {
        self.flow.take_if(|flow| flow.number == ended.flow);
        if !ended.is_refused {
            // Containers ask again, in the next flow.
            return;
        }
        self.refused = Some(Instant::now());
        let failed: Vec<_> = self.pending.of(ended.flow).collect();
        for asked in failed {
            self.fail(asked.client, &asked.message).await;
        }
    }

    fn is_of_node(&self, question: &Question) -> bool {
        let names = self.egress.node_names();
        names.is_some_and(|names| names.answers(&question.name, &self.egress.table().domain))
    }

    fn ask_node(&mut self, key: Key, asked: Bytes, question: Question) {
        if self.of_node.len() >= OF_NODE {
            return;
        }
        let egress = Arc::clone(&self.egress);
        self.of_node.spawn(async move {
            let answer = match egress.node_names() {
                Some(names) => names.ask(&asked, &question).await,
                None => None,
            };
            OfNode {
                key,
                question,
                asked,
                answer,
            }
        });
    }

    async fn answered_by_node(&mut self, answered: OfNode) {
        let OfNode {
            key,
            question,
            asked,
            answer,
        } = answered;
        match answer {
            Some(answer) => {
                self.cache.keep(&question, &answer, Instant::now());
                self.reply(key, &answer).await;
            }
            None => self.fail(key, &asked).await,
        }
    }

    /// Answers that the server has failed, so that a program does not wait in vain.
    async fn fail(&self, key: Key, asked: &[u8]) {
        if let Some(answer) = message::failure(asked) {
            self.reply(key, &answer).await;
        }
    }

    async fn reply(&self, key: Key, answer: &[u8]) {
        // As on any network, it may be lost.
        reply(&self.socket, key, answer).await.ok();
    }
}

/// PURE: whether a flow takes no more questions.
fn is_over(flow: &Flow, pending: &Pending<Key>, now: Instant) -> bool {
    let then = now.checked_sub(STUCK);
    flow.questions.is_closed()
        || now >= flow.since + OLD
        || then.is_some_and(|then| pending.waits_since(flow.number, then))
}

/// The other end of a flow.
struct Exchange {
    number: u64,
    questions: mpsc::Receiver<Bytes>,
    answers: mpsc::Sender<(u64, Bytes)>,
}

impl Exchange {
    async fn run(mut self, egress: Arc<Egress>, target: SocketAddrV4) -> Ended {
        let settled = egress.announce(Kind::Udp, target).await;
        // Only connections of TCP are redirected to pods of the node.
        let is_refused = !matches!(settled, Some(Settled::Taken(_)));
        if let Some(Settled::Taken(taken)) = settled {
            self.carry(taken).await;
        }
        Ended {
            flow: self.number,
            is_refused,
        }
    }

    async fn carry(&mut self, taken: Taken) {
        let Taken { mut input, output } = taken;
        if !send(&output, Output::Connected(true)).await {
            return;
        }
        // Set once there are no more questions.
        let mut ends = None;
        loop {
            tokio::select! {
                biased;
                () = output.closed() => return,
                message = input.message() => match message {
                    Ok(Some(EgressInput { input: Some(Input::Data(data)) })) => {
                        if self.answers.send((self.number, data)).await.is_err() {
                            return;
                        }
                    }
                    Ok(Some(EgressInput { input: Some(Input::Start(_)) | None })) => {}
                    Ok(Some(EgressInput { input: Some(Input::Closed(_)) }) | None) | Err(_) => return,
                },
                question = self.questions.recv(), if ends.is_none() => match question {
                    Some(question) => {
                        if !send(&output, Output::Data(question)).await {
                            return;
                        }
                    }
                    None => ends = Some(Instant::now() + PATIENCE),
                },
                () = sleep_until(ends.unwrap_or_else(Instant::now)), if ends.is_some() => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::{message::samples, *};

    #[test]
    fn a_flow_is_replaced_if_it_is_old_or_closed_or_owes_an_answer() {
        let now = Instant::now();
        let (questions, queue) = mpsc::channel(1);
        let flow = Flow {
            number: 1,
            questions,
            since: now,
        };
        let mut pending = Pending::default();
        let over = |pending: &Pending<Key>, at| is_over(&flow, pending, at);
        assert!(!over(&pending, now + OLD.mul_f32(0.9)));
        assert!(over(&pending, now + OLD));
        let local = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 1);
        let message = samples::question(1, "a");
        let asked = Asked {
            client: (local, local),
            question: Question::parse(&message),
            message,
            flow: 1,
            at: now,
        };
        pending.add(asked, || 1).unwrap();
        assert!(!over(&pending, now + STUCK.mul_f32(0.9)));
        assert!(over(&pending, now + STUCK));
        let answer = samples::found(&samples::question(1, "a"), 1, [1; 4]);
        pending.answered(1, &answer).unwrap();
        assert!(!over(&pending, now + STUCK));
        drop(queue);
        assert!(over(&pending, now));
    }
}
