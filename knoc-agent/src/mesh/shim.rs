//! One shim's end: gives its pod the address, takes up where it takes tunnels, and answers what it asks.
//!
//! It runs as a part of the task that follows the shim's link, and ends with it.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, RandomState},
    net::Ipv4Addr,
    pin::pin,
    time::Duration,
};

use knoc_proto::{
    ids::PodUid,
    mesh::{MAX_ASKED, NamespacePairs, endpoint},
    pb::{self, MeshMemberState, mesh_control::Control, mesh_question::Question},
    reason::ErrorReason,
    text::quote,
};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::{Instant, Interval, MissedTickBehavior, interval_at, sleep},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::{Client, Mesh, Registered, carry::carry};
use crate::pod::input::Input;

/// How many messages to a shim may wait. Further ones wait for the shim.
const CONTROLS: usize = 64;
/// How often it is looked whether the site has changed its mind.
const POLICY: Duration = Duration::from_secs(10);
/// How long changes are collected before the shim is told: when many pods start at once, each of them changes something.
const SETTLE: Duration = Duration::from_millis(50);
/// How many tunnels are carried for one shim that asks: each takes streams of two links.
const CARRIED: usize = 32;
/// The same while those of all shims take up more than half of what there is, so that a few pods leave some to the others.
const SHARE: usize = 4;
/// How much of a wrong text an error shows.
const SHOWN: usize = 80;
/// The pause after the call has ended although the link is up, and before a pod without an address is tried again.
const AGAIN: Duration = Duration::from_secs(30);

/// What is known about a shim that may take part.
#[derive(Debug)]
pub(crate) struct Shim {
    pub(crate) uid: PodUid,
    pub(crate) namespace: String,
    /// The pin of its key.
    pub(crate) spki: String,
    /// The pod's actor, which owns the address.
    pub(crate) input: mpsc::Sender<Input>,
    pub(crate) client: Client,
}

/// Follows the shim until this is dropped.
pub(super) async fn follow(mesh: &Mesh, mut shim: Shim) {
    loop {
        if let Err(status) = session(mesh, &mut shim).await {
            tracing::debug!(uid = %shim.uid, error = status.message(), "the shim's JoinMesh ended");
        }
        sleep(AGAIN).await;
    }
}

/// One call of `JoinMesh`.
async fn session(mesh: &Mesh, shim: &mut Shim) -> Result<(), Status> {
    let address = address(shim).await;
    let given = address.as_ref().ok().copied();
    let ranges = mesh.ranges();
    let (controls, sent) = mpsc::channel(CONTROLS);
    // The channel is empty.
    controls.send(told(address, ranges.clone())).await.ok();
    let answer = shim.client.join_mesh(ReceiverStream::new(sent)).await?;
    let mut session = Session {
        mesh,
        shim,
        address: given,
        ranges,
        permitted: mesh.permitted(),
        controls,
        asked: HashMap::new(),
        registered: None,
        tunnels: JoinSet::new(),
    };
    session.serve(answer.into_inner()).await
}

/// Asks the pod's actor for the address, which is on disk once it answers.
async fn address(shim: &Shim) -> Result<Ipv4Addr, String> {
    let (reply, answer) = oneshot::channel();
    let sent = shim.input.send(Input::Address { reply }).await;
    let answer = match sent {
        Ok(()) => answer.await,
        Err(_) => return Err("the pod is being forgotten".to_owned()),
    };
    match answer {
        Ok(given) => given.map_err(|error| error.message),
        Err(_) => Err("the agent is stopping".to_owned()),
    }
}

/// PURE: the message about the pod's own address, and the ranges of all pods.
fn told(address: Result<Ipv4Addr, String>, ranges: Vec<String>) -> pb::MeshControl {
    let (address, why) = match address {
        Ok(address) => (address.to_string(), String::new()),
        Err(why) => (String::new(), why),
    };
    pb::MeshControl {
        control: Some(Control::Address(pb::MeshAddress {
            address,
            why,
            ranges,
        })),
    }
}

struct Session<'a> {
    mesh: &'a Mesh,
    shim: &'a Shim,
    /// The address of the pod, if it has one.
    address: Option<Ipv4Addr>,
    /// The ranges that the shim was told last.
    ranges: Vec<String>,
    /// Between which namespaces pods reach each other, as of the last look.
    permitted: NamespacePairs,
    controls: mpsc::Sender<pb::MeshControl>,
    /// A digest of what the shim was told last about each address that it asked for: a thousand pods may know a thousand others each.
    asked: HashMap<Ipv4Addr, u64>,
    /// Its place among the members.
    registered: Option<Registered>,
    /// The tunnels that are carried for it.
    tunnels: JoinSet<()>,
}

impl Session<'_> {
    async fn serve(&mut self, mut questions: Streaming<pb::MeshQuestion>) -> Result<(), Status> {
        let mut changes = self.mesh.changes();
        let mut policy = every(POLICY);
        let mut again = every(AGAIN);
        let mut settled = pin!(sleep(Duration::ZERO));
        let mut has_news = false;
        loop {
            tokio::select! {
                question = questions.message() => match question? {
                    Some(question) => self.answer(question).await?,
                    None => return Ok(()),
                },
                news = changes.changed(), if !has_news => match news {
                    Ok(()) => {
                        has_news = true;
                        settled.as_mut().reset(Instant::now() + SETTLE);
                    }
                    Err(_) => return Ok(()),
                },
                () = &mut settled, if has_news => {
                    has_news = false;
                    changes.mark_unchanged();
                    self.tell_changes().await?;
                }
                Some(_) = self.tunnels.join_next() => {}
                _ = policy.tick() => {
                    self.permitted = self.mesh.permitted();
                    self.tell_changes().await?;
                }
                _ = again.tick(), if self.address.is_none() => self.try_again().await?,
            }
        }
    }

    async fn answer(&mut self, question: pb::MeshQuestion) -> Result<(), Status> {
        match question.question {
            Some(Question::Endpoint(text)) => self.take_part(&text),
            Some(Question::Ask(text)) => {
                if self.address.is_none() {
                    // Whoever has the key of a pod that has ended does not learn where others are.
                    let message = "a pod without an address reaches no others";
                    return Err(ErrorReason::InvalidRequest.status(message));
                }
                let address = parsed(&text)?;
                if self.asked.len() >= MAX_ASKED && !self.asked.contains_key(&address) {
                    let message = format!("a shim asks for at most {MAX_ASKED} addresses");
                    return Err(ErrorReason::Overloaded.status(message));
                }
                let member = self.look(address);
                let known = digest(self.asked.hasher(), &member);
                self.asked.insert(address, known);
                self.send(member).await
            }
            Some(Question::Forget(text)) => {
                self.asked.remove(&parsed(&text)?);
                Ok(())
            }
            Some(Question::Carry(text)) => {
                self.carry(parsed(&text)?);
                Ok(())
            }
            // A question of a newer shim.
            None => Ok(()),
        }
    }

    /// What the shim may know about an address.
    fn look(&self, address: Ipv4Addr) -> pb::MeshMember {
        let namespace = &self.shim.namespace;
        self.mesh.look(&self.permitted, namespace, address)
    }

    fn take_part(&mut self, text: &str) -> Result<(), Status> {
        if self.address.is_none() {
            let message = "a pod without an address takes no tunnels";
            return Err(ErrorReason::InvalidRequest.status(message));
        }
        let endpoint = endpoint(text).ok_or_else(|| {
            let text = quote(text, SHOWN);
            let message = format!("endpoint: {text} is not the address and port of a host");
            ErrorReason::InvalidRequest.status(message)
        })?;
        let pod = (&*self.shim.namespace, &*self.shim.spki);
        let registered = self.mesh.register(&self.shim.uid, pod, endpoint);
        let registered = registered.ok_or_else(|| {
            let message = "the job of the pod has ended, and its address is not its own any more";
            ErrorReason::NotRunning.status(message)
        })?;
        self.mesh.lend(&registered, self.shim.client.clone());
        self.registered = Some(registered);
        Ok(())
    }

    /// Carries a tunnel to another pod, if this one may reach it and both shims have a link. Otherwise the shim waits in vain, and
    /// asks again.
    fn carry(&mut self, address: Ipv4Addr) {
        let member = self.look(address);
        let present = member.state() == MeshMemberState::Present;
        let most = if self.mesh.is_crowded() {
            SHARE
        } else {
            CARRIED
        };
        let takes_part = self.registered.is_some() && self.tunnels.len() < most;
        let to = self.mesh.client(address).filter(|_| present && takes_part);
        let Some((to, place)) = to.and_then(|to| Some((to, self.mesh.carried()?))) else {
            tracing::debug!(uid = %self.shim.uid, %address, "a tunnel is not carried");
            return;
        };
        let (uid, from) = (self.shim.uid.clone(), self.shim.client.clone());
        self.tunnels.spawn(async move {
            if let Err(status) = carry(from, to, address).await {
                tracing::debug!(%uid, %address, error = status.message(), "a tunnel that is carried has ended");
            }
            drop(place);
        });
    }

    /// Tells the shim what is different from what it was told last.
    async fn tell_changes(&mut self) -> Result<(), Status> {
        let ranges = self.mesh.ranges();
        if let Some(address) = self.address.filter(|_| ranges != self.ranges) {
            self.ranges.clone_from(&ranges);
            self.control(told(Ok(address), ranges)).await?;
        }
        let mut news = Vec::new();
        let (mesh, permitted) = (self.mesh, &self.permitted);
        let hasher = self.asked.hasher().clone();
        for (address, known) in &mut self.asked {
            let member = mesh.look(permitted, &self.shim.namespace, *address);
            let now = digest(&hasher, &member);
            if *known != now {
                *known = now;
                news.push(member);
            }
        }
        for member in news {
            self.send(member).await?;
        }
        Ok(())
    }

    /// The pod has no address: perhaps there is one now.
    async fn try_again(&mut self) -> Result<(), Status> {
        let address = address(self.shim).await;
        self.address = address.as_ref().ok().copied();
        self.ranges = self.mesh.ranges();
        self.control(told(address, self.ranges.clone())).await
    }

    async fn send(&self, member: pb::MeshMember) -> Result<(), Status> {
        let control = Some(Control::Member(member));
        self.control(pb::MeshControl { control }).await
    }

    async fn control(&self, control: pb::MeshControl) -> Result<(), Status> {
        let sent = self.controls.send(control).await;
        sent.map_err(|_| ErrorReason::NotRunning.status("the shim has ended the call"))
    }
}

/// Ticks that begin after the first pause.
fn every(pause: Duration) -> Interval {
    let mut ticks = interval_at(Instant::now() + pause, pause);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// PURE: two descriptions of an address have the same digest if they say the same; its key is random.
fn digest(hasher: &RandomState, member: &pb::MeshMember) -> u64 {
    hasher.hash_one((member.state, &member.spki, &member.endpoint))
}

/// PURE: the address that a question names.
fn parsed(text: &str) -> Result<Ipv4Addr, Status> {
    text.parse().map_err(|_| {
        let text = quote(text, SHOWN);
        let message = format!("{text} is not an IPv4 address");
        ErrorReason::InvalidRequest.status(message)
    })
}

#[cfg(test)]
mod tests {
    use knoc_link::bulk::RawClient;
    use knoc_proto::pb::{MeshMemberState as State, shim_client::ShimClient};

    use super::*;
    use crate::{config::Policy, policy::Live};

    const OWN: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 3);
    const OTHER: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 7);

    /// The shim of the pod `a` of the namespace `shop`.
    fn shim() -> Shim {
        let endpoint = tonic::transport::Endpoint::from_static("http://127.0.0.1:1");
        Shim {
            uid: uid("a"),
            namespace: "shop".to_owned(),
            spki: "key-a".to_owned(),
            input: mpsc::channel(1).0,
            client: ShimClient::new(RawClient::new(endpoint.connect_lazy())),
        }
    }

    /// A mesh in which this shim's pod has the address [`OWN`] and another one, `b`, has [`OTHER`].
    fn mesh() -> Mesh {
        let mesh = Mesh::new(Live::fixed(Policy::default()), 0);
        for (name, address) in [("a", OWN), ("b", OTHER)] {
            assert!(mesh.restore(&uid(name), address, None));
        }
        mesh
    }

    fn uid(name: &str) -> PodUid {
        PodUid::try_from(name).unwrap()
    }

    fn session<'a>(
        mesh: &'a Mesh,
        shim: &'a Shim,
        address: Option<Ipv4Addr>,
    ) -> (Session<'a>, mpsc::Receiver<pb::MeshControl>) {
        let (controls, sent) = mpsc::channel(CONTROLS);
        let session = Session {
            mesh,
            shim,
            address,
            ranges: Vec::new(),
            permitted: mesh.permitted(),
            controls,
            asked: HashMap::new(),
            registered: None,
            tunnels: JoinSet::new(),
        };
        (session, sent)
    }

    fn ask(address: Ipv4Addr) -> pb::MeshQuestion {
        pb::MeshQuestion {
            question: Some(Question::Ask(address.to_string())),
        }
    }

    fn endpoint(text: &str) -> pb::MeshQuestion {
        pb::MeshQuestion {
            question: Some(Question::Endpoint(text.to_owned())),
        }
    }

    /// The state in the next message; `None` if there is none.
    fn state(sent: &mut mpsc::Receiver<pb::MeshControl>) -> Option<State> {
        match sent.try_recv().ok()?.control? {
            Control::Member(member) => Some(member.state()),
            Control::Address(_) => None,
        }
    }

    #[tokio::test]
    async fn a_shim_is_told_once_and_then_of_every_change_until_it_forgets() {
        let (mesh, shim) = (mesh(), shim());
        let (mut session, mut sent) = session(&mesh, &shim, Some(OWN));
        session.answer(ask(OTHER)).await.unwrap();
        assert_eq!(state(&mut sent), Some(State::Away));
        session.tell_changes().await.unwrap();
        assert_eq!(state(&mut sent), None);
        let place = "10.0.0.7:4001".parse().unwrap();
        let registered = mesh.register(&uid("b"), ("shop", "key-b"), place).unwrap();
        session.tell_changes().await.unwrap();
        assert_eq!(state(&mut sent), Some(State::Present));
        drop(registered);
        session.tell_changes().await.unwrap();
        assert_eq!(state(&mut sent), Some(State::Away));
        let forget = pb::MeshQuestion {
            question: Some(Question::Forget(OTHER.to_string())),
        };
        session.answer(forget).await.unwrap();
        let _registered = mesh.register(&uid("b"), ("shop", "key-b"), place).unwrap();
        session.tell_changes().await.unwrap();
        assert_eq!(state(&mut sent), None);
    }

    #[tokio::test]
    async fn only_a_pod_with_an_address_takes_tunnels_and_only_at_a_port_of_a_host() {
        let (mesh, shim) = (mesh(), shim());
        let (mut without, _sent) = session(&mesh, &shim, None);
        let refused = without.answer(endpoint("10.0.0.7:4001")).await;
        assert!(
            refused
                .unwrap_err()
                .message()
                .contains("without an address")
        );
        let refused = without.answer(ask(OTHER)).await;
        assert!(refused.unwrap_err().message().contains("reaches no others"));
        let (mut with, _sent) = session(&mesh, &shim, Some(OWN));
        let refused = with.answer(endpoint("127.0.0.1:22")).await;
        assert!(refused.unwrap_err().message().contains("127.0.0.1:22"));
        with.answer(endpoint("10.0.0.7:4001")).await.unwrap();
        let seen = mesh.look(&mesh.permitted(), "shop", OWN);
        assert_eq!((seen.state(), &*seen.spki), (State::Present, "key-a"));
        drop(with);
        let seen = mesh.look(&mesh.permitted(), "shop", OWN);
        assert_eq!(seen.state(), State::Away);
    }

    #[tokio::test]
    async fn a_shim_asks_for_a_bounded_number_of_addresses() {
        let (mesh, shim) = (mesh(), shim());
        let (mut session, mut sent) = session(&mesh, &shim, Some(OWN));
        let first = Ipv4Addr::new(10, 200, 1, 0);
        for number in 0..MAX_ASKED {
            let number = u32::try_from(number).unwrap();
            let address = Ipv4Addr::from_bits(first.to_bits() + number);
            session.answer(ask(address)).await.unwrap();
            assert_eq!(state(&mut sent), Some(State::Nobody));
        }
        session.answer(ask(first)).await.unwrap();
        let refused = session.answer(ask(OTHER)).await.unwrap_err();
        assert_eq!(ErrorReason::of(&refused), Some(ErrorReason::Overloaded));
        let wrong = pb::MeshQuestion {
            question: Some(Question::Ask("web-0".to_owned())),
        };
        session.answer(wrong).await.unwrap_err();
    }

    #[test]
    fn a_pod_learns_its_address_or_why_it_has_none() {
        let of = |address| match told(address, Vec::new()).control {
            Some(Control::Address(told)) => (told.address, told.why),
            Some(Control::Member(_)) | None => panic!("no address"),
        };
        assert_eq!(of(Ok(OWN)), ("10.200.0.3".to_owned(), String::new()));
        let why = "no free address".to_owned();
        assert_eq!(of(Err(why.clone())), (String::new(), why));
    }

    #[tokio::test]
    async fn a_tunnel_is_carried_only_to_a_pod_that_may_be_reached_and_is_there() {
        let (mesh, shim) = (mesh(), shim());
        let (mut session, _sent) = session(&mesh, &shim, Some(OWN));
        session.answer(endpoint("10.0.0.3:4001")).await.unwrap();
        let carry = || pb::MeshQuestion {
            question: Some(Question::Carry(OTHER.to_string())),
        };
        session.answer(carry()).await.unwrap();
        assert_eq!(session.tunnels.len(), 0, "its shim has no link");
        let place = "10.0.0.7:4001".parse().unwrap();
        let stranger = mesh.register(&uid("b"), ("other", "key-b"), place).unwrap();
        mesh.lend(&stranger, shim.client.clone());
        session.answer(carry()).await.unwrap();
        assert_eq!(session.tunnels.len(), 0, "the site does not permit it");
        let registered = mesh.register(&uid("b"), ("shop", "key-b"), place).unwrap();
        mesh.lend(&registered, shim.client.clone());
        drop(stranger);
        session.answer(carry()).await.unwrap();
        assert_eq!(session.tunnels.len(), 1);
        drop(registered);
        assert!(mesh.client(OTHER).is_none());
    }

    #[tokio::test]
    async fn the_tunnels_that_are_carried_for_all_shims_together_are_bounded() {
        let (mesh, shim) = (mesh(), shim());
        let (mut session, _sent) = session(&mesh, &shim, Some(OWN));
        session.answer(endpoint("10.0.0.3:4001")).await.unwrap();
        let place = "10.0.0.7:4001".parse().unwrap();
        let other = mesh.register(&uid("b"), ("shop", "key-b"), place).unwrap();
        mesh.lend(&other, shim.client.clone());
        let carry = || pb::MeshQuestion {
            question: Some(Question::Carry(OTHER.to_string())),
        };
        let mut others: Vec<_> = std::iter::from_fn(|| mesh.carried()).collect();
        session.answer(carry()).await.unwrap();
        assert_eq!(session.tunnels.len(), 0);
        // With half of them free, a pod does not get all of these.
        let half = others.split_off(others.len() / 2 + 1);
        drop(half);
        for _ in 0..=SHARE {
            session.answer(carry()).await.unwrap();
        }
        assert_eq!(session.tunnels.len(), SHARE);
        while session.tunnels.join_next().await.is_some() {}
        others.extend(std::iter::from_fn(|| mesh.carried()));
        drop(others.pop());
        session.answer(carry()).await.unwrap();
        assert_eq!(session.tunnels.len(), 1);
        assert!(mesh.carried().is_none());
        // It ends, because nobody is at the other end.
        let ended = session.tunnels.join_next().await;
        ended.unwrap().unwrap();
        assert!(mesh.carried().is_some());
    }

    #[tokio::test]
    async fn a_shim_is_told_of_the_ranges_of_other_nodes() {
        let (mesh, shim) = (mesh(), shim());
        let (mut session, mut sent) = session(&mesh, &shim, Some(OWN));
        session.tell_changes().await.unwrap();
        sent.try_recv().unwrap_err();
        mesh.give(&uid("c"), "10.201.0.0/16".parse().unwrap())
            .unwrap();
        session.tell_changes().await.unwrap();
        let Some(Control::Address(told)) = sent.try_recv().unwrap().control else {
            panic!("no address");
        };
        assert_eq!(told.address, OWN.to_string());
        assert_eq!(told.ranges, ["10.201.0.0/16"]);
        session.tell_changes().await.unwrap();
        sent.try_recv().unwrap_err();
    }
}
