//! Task: the packets to one other pod.
//!
//! ```text
//!            ┌──────────────────────────────────────────────┐
//!            ▼                     the agent says otherwise │
//!   Asked, Away ─────► Present ─► dial ─► tunnel ───────────┤
//!      │ too long         │        │ fails    │ breaks      │
//!      ▼                  ▼        ▼          ▼             │
//!   Nobody, Denied ──► packets are answered with "unreachable", for a while or until there is news
//!
//!   from everywhere: no packet for a while ─► the task ends
//! ```
//!
//! Packets wait in a bounded queue, and the interface drops those that do not fit. A packet that goes nowhere is answered, so a
//! program learns it at once.

use std::{net::Ipv4Addr, pin::pin, sync::Arc, time::Duration};

use bytes::Bytes;
use knoc_link::{Connection, pinned::KeyPair};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, timeout},
};

use super::{
    PATIENCE, Wanted,
    interface::Interface,
    members::{Member, Members, State},
    notes::Notes,
    packet::{Reason, refusal},
    tunnel::{self, Ended},
};

/// How many packets wait for one other pod: the most that one connection has under way on a fast network, and not more memory
/// than a few connections have.
pub(super) const QUEUE: usize = 64;

/// The first and the longest pause after a tunnel could not be dialled or has broken at once.
const PAUSES: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(15)];
/// How long it is remembered that packets go nowhere, after the last of them: a program that tries many addresses needs many lanes.
const QUIET: Duration = Duration::from_secs(30);
/// A tunnel that was open for longer has worked.
const WORKED: Duration = Duration::from_secs(10);

/// What the packets to one other pod need.
#[derive(Debug)]
pub(super) struct Lane {
    /// The other pod's address.
    pub(super) target: Ipv4Addr,
    /// This pod's address.
    pub(super) own: Ipv4Addr,
    pub(super) wanted: Wanted,
    pub(super) interface: Arc<Interface>,
    pub(super) pair: Arc<KeyPair>,
    pub(super) notes: Arc<Notes>,
}

/// How the other shim is reached.
#[derive(Debug)]
struct Way {
    /// Its node is not reached, and the agent has carried a tunnel there.
    through_agent: bool,
    /// Before the next try, if this one fails.
    pause: Duration,
}

impl Default for Way {
    fn default() -> Self {
        Self {
            through_agent: false,
            pause: PAUSES[0],
        }
    }
}

impl Way {
    /// The pause before the next try, which grows.
    fn next_pause(&mut self) -> Duration {
        let [_, longest] = PAUSES;
        let pause = self.pause.mul_f64(rand::random_range(0.5..1.5));
        self.pause = (self.pause * 2).min(longest);
        pause
    }
}

/// What happens after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Again,
    End,
}

impl Lane {
    /// Carries the packets of the queue until there are none for a while.
    pub(super) async fn run(self, mut queue: mpsc::Receiver<Bytes>) {
        let mut members = self.wanted.mesh.members.subscribe();
        let mut way = Way::default();
        loop {
            let state = members.borrow_and_update().state(self.target).cloned();
            let next = match state {
                // Somebody uses it: this lane.
                None => return,
                Some(state @ (State::Asked | State::Away)) => {
                    self.wait(&mut queue, &mut members, &state).await
                }
                Some(state @ State::Nobody) => {
                    let why = (&state, Reason::HostUnreachable);
                    self.refuse(&mut queue, &mut members, why).await
                }
                Some(state @ State::Denied) => {
                    let why = (&state, Reason::Prohibited);
                    self.refuse(&mut queue, &mut members, why).await
                }
                Some(State::Present(member)) => self.carry(&mut queue, &member, &mut way).await,
            };
            if next == Next::End {
                return;
            }
        }
    }

    /// Waits for news. Packets stay in the queue until it has taken too long.
    async fn wait(
        &self,
        queue: &mut mpsc::Receiver<Bytes>,
        members: &mut watch::Receiver<Members>,
        state: &State,
    ) -> Next {
        // What happens to other addresses does not make it wait longer.
        let other = |members: &Members| members.state(self.target) != Some(state);
        let news = timeout(PATIENCE, members.wait_for(other)).await;
        match news.map(|news| news.map(drop)) {
            Ok(Ok(())) => Next::Again,
            Ok(Err(_)) => Next::End,
            Err(_) if queue.is_empty() => {
                // Without a packet for so long, nobody waits.
                Next::End
            }
            Err(_) => {
                self.refuse_waiting(queue, Reason::HostUnreachable);
                Next::Again
            }
        }
    }

    /// Answers packets that go nowhere, until there is news.
    async fn refuse(
        &self,
        queue: &mut mpsc::Receiver<Bytes>,
        members: &mut watch::Receiver<Members>,
        (state, reason): (&State, Reason),
    ) -> Next {
        loop {
            // What happens to other addresses does not make it stay: who tries many would use up all lanes.
            let other = |members: &Members| members.state(self.target) != Some(state);
            let packet = tokio::select! {
                biased;
                changed = members.wait_for(other) => return match changed.map(drop) {
                    Ok(()) => Next::Again,
                    Err(_) => Next::End,
                },
                packet = timeout(QUIET, queue.recv()) => packet,
            };
            match packet {
                Ok(Some(packet)) => self.answer(&packet, reason),
                Ok(None) | Err(_) => return Next::End,
            }
        }
    }

    /// Carries packets over a tunnel of its own.
    async fn carry(
        &self,
        queue: &mut mpsc::Receiver<Bytes>,
        member: &Member,
        way: &mut Way,
    ) -> Next {
        let mut members = self.wanted.mesh.members.subscribe();
        let state = State::Present(member.clone());
        let mut changed = pin!(async {
            let other = |members: &Members| members.state(self.target) != Some(&state);
            drop(members.wait_for(other).await);
        });
        let began = Instant::now();
        let carrying = async {
            let connection = Box::pin(self.tunnel(member, way)).await?;
            Ok::<_, String>(tunnel::send(connection, queue).await)
        };
        let carried = tokio::select! {
            biased;
            () = &mut changed => return Next::Again,
            carried = carrying => carried,
        };
        match carried {
            Ok(Ended::Idle | Ended::Closed) => return Next::End,
            Ok(Ended::Broken) if began.elapsed() > WORKED => {
                way.pause = PAUSES[0];
                return Next::Again;
            }
            Ok(Ended::Broken) => {}
            Err(why) => self.notes.unreachable(self.target, &why),
        }
        let over = Instant::now() + way.next_pause();
        loop {
            self.refuse_waiting(queue, Reason::HostUnreachable);
            let packet = tokio::select! {
                biased;
                () = &mut changed => return Next::Again,
                () = tokio::time::sleep_until(over) => return Next::Again,
                packet = queue.recv() => packet,
            };
            match packet {
                Some(packet) => self.answer(&packet, Reason::HostUnreachable),
                None => return Next::End,
            }
        }
    }

    /// A tunnel to the other shim: dialled, or through the agent if its node is not reached.
    async fn tunnel(&self, member: &Member, way: &mut Way) -> Result<Connection, String> {
        let direct = if way.through_agent {
            "not tried again".to_owned()
        } else {
            let dialling = tunnel::dial(member.endpoint, &self.pair, &member.spki, self.own);
            match dialling.await {
                Ok(connection) => return Ok(connection),
                Err(why) => why,
            }
        };
        let both = |why: String| format!("{direct}; through the agent: {why}");
        way.through_agent = false;
        let carried = self.wanted.mesh.carry(self.target).await;
        let carried = carried.map_err(both)?;
        let keys = (&*self.pair, &*member.spki);
        let made = tunnel::greet(carried, "the other shim", keys, self.own).await;
        way.through_agent = made.is_ok();
        made.map_err(both)
    }

    /// Answers the packets that wait.
    fn refuse_waiting(&self, queue: &mut mpsc::Receiver<Bytes>, reason: Reason) {
        // Not more than there is room for: the containers may send on and on.
        for _ in 0..QUEUE {
            match queue.try_recv() {
                Ok(packet) => self.answer(&packet, reason),
                Err(_) => return,
            }
        }
    }

    fn answer(&self, packet: &[u8], reason: Reason) {
        if let Some(answer) = refusal(packet, reason) {
            self.interface.put(&answer);
        }
    }
}
