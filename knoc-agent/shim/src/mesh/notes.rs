//! What users are told about the mesh, a few times for each pod: other pods come and go, and anybody can knock.

use std::{
    net::Ipv4Addr,
    sync::atomic::{AtomicUsize, Ordering},
};

use tokio::sync::mpsc;

use crate::supervisor::Command;

/// How many Events a pod gets about pods that are not reached.
const EVENTS: usize = 10;
/// How many lines the log gets about tunnels that were refused.
const LINES: usize = 20;

/// The reason of the Events about other pods.
const UNREACHABLE: &str = "PodUnreachable";

/// Where users are told.
#[derive(Debug)]
pub(super) struct Notes {
    commands: mpsc::Sender<Command>,
    events: AtomicUsize,
    lines: AtomicUsize,
}

impl Notes {
    pub(super) fn new(commands: mpsc::Sender<Command>) -> Self {
        Self {
            commands,
            events: AtomicUsize::new(EVENTS),
            lines: AtomicUsize::new(LINES),
        }
    }

    /// The compute node of the pod with this address is not reached.
    pub(super) fn unreachable(&self, target: Ipv4Addr, why: &str) {
        self.event(format!(
            "the pod at {target} is not reached from this compute node: {why}; compute nodes have to reach each other for it"
        ));
    }

    /// Too many addresses are in use.
    pub(super) fn too_many(&self, target: Ipv4Addr) {
        self.event(format!(
            "the pod at {target} is not reached, because packets are exchanged with {} others already",
            knoc_proto::mesh::MAX_ASKED
        ));
    }

    /// Whoever has dialled is not the pod with this address, or may not reach this one.
    pub(super) fn refused(&self, claimed: Ipv4Addr) {
        self.line(&format!(
            "refused a tunnel of somebody who is not the pod at {claimed}, or who may not reach this pod"
        ));
    }

    /// The shim of the pod with this address sends what it should not.
    pub(super) fn wrong_packet(&self, from: Ipv4Addr) {
        self.line(&format!(
            "ended a tunnel of the pod at {from}: it had a packet that is not from there for this pod"
        ));
    }

    fn event(&self, message: String) {
        if spend(&self.events) {
            tracing::warn!("{message}");
            let reason = UNREACHABLE;
            // The supervisor has ended, or is flooded with commands.
            self.commands
                .try_send(Command::Note { reason, message })
                .ok();
        }
    }

    fn line(&self, message: &str) {
        if spend(&self.lines) {
            tracing::warn!("{message}");
        }
    }
}

/// Takes one of those that are left; false if none is.
fn spend(left: &AtomicUsize) -> bool {
    let fewer = |left: usize| left.checked_sub(1);
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fewer)
        .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_gets_a_few_events_however_often_others_are_not_reached() {
        let (commands, mut orders) = mpsc::channel(EVENTS * 2);
        let notes = Notes::new(commands);
        let target = Ipv4Addr::new(10, 200, 0, 7);
        for _ in 0..EVENTS + 5 {
            notes.unreachable(target, "connection refused");
            notes.refused(target);
        }
        let mut count = 0;
        while let Ok(command) = orders.try_recv() {
            let Command::Note { reason, message } = command else {
                panic!("{command:?}");
            };
            assert_eq!(reason, UNREACHABLE);
            assert!(message.contains("10.200.0.7"), "{message}");
            count += 1;
        }
        assert_eq!(count, EVENTS);
    }
}
