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
use knoc_link::pinned::KeyPair;
use rand::RngExt as _;
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
    tunnel::{self, Ended, IDLE},
};

/// How many packets wait for one other pod: the most that one connection has under way on a fast network, and not more memory
/// than a few connections have.
pub(super) const QUEUE: usize = 64;

/// The first and the longest pause after a tunnel could not be dialled or has broken at once.
const PAUSES: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(15)];
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
        let mut pause = PAUSES[0];
        loop {
            let state = members.borrow_and_update().state(self.target).cloned();
            let next = match state {
                // Somebody uses it: this lane.
                None => return,
                Some(State::Asked | State::Away) => self.wait(&mut queue, &mut members).await,
                Some(State::Nobody) => {
                    self.refuse(&mut queue, &mut members, Reason::HostUnreachable)
                        .await
                }
                Some(State::Denied) => {
                    self.refuse(&mut queue, &mut members, Reason::Prohibited)
                        .await
                }
                Some(State::Present(member)) => self.carry(&mut queue, &member, &mut pause).await,
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
    ) -> Next {
        match timeout(PATIENCE, members.changed()).await {
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
        reason: Reason,
    ) -> Next {
        loop {
            let packet = tokio::select! {
                biased;
                changed = members.changed() => return match changed {
                    Ok(()) => Next::Again,
                    Err(_) => Next::End,
                },
                packet = timeout(IDLE, queue.recv()) => packet,
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
        pause: &mut Duration,
    ) -> Next {
        let mut members = self.wanted.mesh.members.subscribe();
        let state = State::Present(member.clone());
        let mut changed = pin!(async {
            let other = |members: &Members| members.state(self.target) != Some(&state);
            drop(members.wait_for(other).await);
        });
        let began = Instant::now();
        let carrying = async {
            let dialling = tunnel::dial(member.endpoint, &self.pair, &member.spki, self.own);
            match Box::pin(dialling).await {
                Ok(connection) => Ok(tunnel::send(connection, queue).await),
                Err(why) => Err(why),
            }
        };
        let carried = tokio::select! {
            biased;
            () = &mut changed => return Next::Again,
            carried = carrying => carried,
        };
        match carried {
            Ok(Ended::Idle | Ended::Closed) => return Next::End,
            Ok(Ended::Broken) if began.elapsed() > WORKED => {
                *pause = PAUSES[0];
                return Next::Again;
            }
            Ok(Ended::Broken) => {}
            Err(why) => self.notes.unreachable(self.target, &why),
        }
        let [_, longest] = PAUSES;
        let now = pause.mul_f64(rand::rng().random_range(0.5..1.5));
        *pause = (*pause * 2).min(longest);
        let over = Instant::now() + now;
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
