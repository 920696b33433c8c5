//! PURE: the connections that containers have opened and that nobody has taken or refused yet.

use std::{collections::BTreeMap, net::SocketAddrV4};

use knoc_proto::pb;
use tokio::sync::oneshot;

use super::Settled;
use crate::launch::network::protocol::Kind;

/// All attempts, by their id.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    /// The newest id, which is never used again.
    last: u64,
    attempts: BTreeMap<u64, Attempt>,
}

#[derive(Debug)]
struct Attempt {
    kind: Kind,
    target: SocketAddrV4,
    taker: oneshot::Sender<Settled>,
}

impl Waiting {
    /// Adds an attempt. `taker` is dropped if it is refused.
    pub(super) fn add(
        &mut self,
        kind: Kind,
        target: SocketAddrV4,
        taker: oneshot::Sender<Settled>,
    ) -> u64 {
        self.last += 1;
        let attempt = Attempt {
            kind,
            target,
            taker,
        };
        self.attempts.insert(self.last, attempt);
        self.last
    }

    /// Removes an attempt, which is refused if the result is dropped.
    pub(super) fn remove(&mut self, id: u64) -> Option<oneshot::Sender<Settled>> {
        self.attempts.remove(&id).map(|attempt| attempt.taker)
    }

    /// The oldest attempt that is newer than this id.
    pub(super) fn after(&self, id: u64) -> Option<pb::EgressAttempt> {
        let mut newer = self.attempts.range(id.checked_add(1)?..);
        let (id, attempt) = newer.next()?;
        let protocol = match attempt.kind {
            Kind::Tcp => pb::EgressProtocol::Tcp,
            Kind::Udp => pb::EgressProtocol::Udp,
        };
        Some(pb::EgressAttempt {
            uid: String::new(),
            id: *id,
            protocol: protocol.into(),
            address: attempt.target.ip().to_string(),
            port: attempt.target.port().into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reader_gets_all_that_wait_in_order_and_no_id_is_used_twice() {
        let mut waiting = Waiting::default();
        let target: SocketAddrV4 = "10.96.0.1:443".parse().unwrap();
        let add = |waiting: &mut Waiting, kind| {
            let (taker, stream) = oneshot::channel();
            (waiting.add(kind, target, taker), stream)
        };
        let (one, mut refused) = add(&mut waiting, Kind::Tcp);
        let (two, _taken) = add(&mut waiting, Kind::Udp);
        let first = waiting.after(0).unwrap();
        assert_eq!((first.id, first.port), (one, 443));
        assert_eq!(first.protocol(), pb::EgressProtocol::Tcp);
        assert_eq!(first.address, "10.96.0.1");
        assert_eq!(waiting.after(one).unwrap().id, two);
        assert_eq!(waiting.after(two), None);
        assert_eq!(waiting.after(u64::MAX), None);
        drop(waiting.remove(one));
        refused.try_recv().unwrap_err();
        assert!(waiting.remove(one).is_none());
        let (three, _taken) = add(&mut waiting, Kind::Tcp);
        assert!(three > two);
        // A reader that begins again gets what still waits.
        assert_eq!(waiting.after(0).unwrap().id, two);
    }
}
