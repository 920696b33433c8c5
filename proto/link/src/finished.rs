//! Limits how many connections with verified peers a listener has at once ([`Bounded`]).
//!
//! Such connections carry users' streams, so none is ever closed in favour of another one; connections beyond the limit
//! are refused. Kubelets are counted apart from all others, and no identity gets more than half of the connections of
//! its kind, so that neither one user of knocctl nor one faulty kubelet can lock the others out.
use std::{
    collections::HashMap,
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
};

use futures::{Stream, StreamExt as _};
use knoc_proto::log_limit::LogLimit;
use tokio::time::Instant;

use super::{Connection, Identity, Peer, accept};

/// The kinds of peers, which are counted separately.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Kubelets,
    Others,
}

/// PURE: the numbers of connections by kind and by peer.
#[derive(Debug, Default)]
struct Counts {
    kinds: HashMap<Kind, usize>,
    peers: HashMap<(Kind, String), usize>,
}

/// Which limit a further connection would exceed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
enum Full {
    #[error("all {0} connections that peers of its kind may have are in use")]
    Kind(usize),
    #[error("it already has {0} connections, the most that one identity may have")]
    Peer(usize),
}

impl Counts {
    /// Counts a connection of this peer, which may have `of_peer` of the `most` connections of its kind.
    fn take(&mut self, key: &(Kind, String), of_peer: usize, most: usize) -> Result<(), Full> {
        let kind = self.kinds.entry(key.0).or_default();
        if self.peers.get(key).is_some_and(|count| *count >= of_peer) {
            return Err(Full::Peer(of_peer));
        }
        if *kind >= most {
            return Err(Full::Kind(most));
        }
        *kind += 1;
        *self.peers.entry(key.clone()).or_default() += 1;
        Ok(())
    }

    fn release(&mut self, key: &(Kind, String)) {
        if let Some(kind) = self.kinds.get_mut(&key.0) {
            *kind = kind.saturating_sub(1);
        }
        if let Some(count) = self.peers.get_mut(key) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.peers.remove(key);
            }
        }
    }
}

/// The limits and current numbers of one listener.
#[derive(Debug)]
struct PeerLimits {
    /// The most connections of each kind: kubelets get one half of the listener's connections, all others the other
    /// half.
    most: usize,
    counts: Arc<Mutex<Counts>>,
}

/// One counted connection; it is uncounted on drop.
#[derive(Debug)]
struct CountedConnection {
    key: (Kind, String),
    counts: Arc<Mutex<Counts>>,
}

impl PeerLimits {
    fn new(most: usize) -> Self {
        Self {
            most: (most / 2).max(1),
            counts: Arc::default(),
        }
    }

    fn take(&self, peer: &Peer) -> Result<CountedConnection, Full> {
        let half = (self.most / 2).max(1);
        let (key, of_peer) = match peer {
            Peer::Tls { identity, .. } => {
                let kind = match identity {
                    Identity::Kubelet { .. } => Kind::Kubelets,
                    Identity::Agent { .. } | Identity::Ctl { .. } => Kind::Others,
                };
                ((kind, identity.to_string()), half)
            }
            // Only our own user can connect to the socket.
            Peer::Unix { uid, .. } => ((Kind::Others, uid.to_string()), self.most),
            Peer::Pinned { .. } | Peer::Command => ((Kind::Others, String::new()), half),
        };
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.take(&key, of_peer, self.most)?;
        Ok(CountedConnection {
            key,
            counts: Arc::clone(&self.counts),
        })
    }
}

impl Drop for CountedConnection {
    fn drop(&mut self) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.release(&self.key);
    }
}

/// The connections of `S` that are within the limits; the others are closed.
#[derive(Debug)]
pub(super) struct Bounded<S> {
    connections: S,
    limits: PeerLimits,
    /// Limits the log lines about each identity.
    log: LogLimit<String>,
}

impl<S> Bounded<S> {
    /// Yields at most `most` of these connections at once.
    pub(super) fn new(connections: S, most: usize) -> Self {
        Self {
            connections,
            limits: PeerLimits::new(most),
            log: LogLimit::default(),
        }
    }

    fn refuse(&mut self, peer: &Peer, full: Full) {
        let who = match peer {
            Peer::Tls { identity, .. } => identity.to_string(),
            Peer::Unix { .. } | Peer::Pinned { .. } | Peer::Command => String::new(),
        };
        let verdict = self.log.event(Instant::now(), who);
        accept::left_out(verdict.left_out);
        if verdict.write {
            tracing::warn!(%peer, "connection refused: {full}");
        }
    }
}

impl<S: Stream<Item = io::Result<Connection>> + Unpin> Stream for Bounded<S> {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            let accepted = ready!(self.connections.poll_next_unpin(cx));
            let Some(Ok(connection)) = accepted else {
                return Poll::Ready(accepted);
            };
            match self.limits.take(connection.peer()) {
                Ok(counted) => return Poll::Ready(Some(Ok(connection.holding(counted)))),
                Err(full) => self.refuse(connection.peer(), full),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rustls_pki_types::{CertificateDer, pem::PemObject as _};

    use super::*;
    use crate::{PeerCertificate, origin::Origin, pki};

    fn peer(identity: Identity) -> Peer {
        let key = pki::self_signed("peer").unwrap();
        let der = CertificateDer::from_pem_slice(key.cert_pem.as_bytes()).unwrap();
        Peer::Tls {
            identity,
            origin: Origin::ThisHost,
            certificate: PeerCertificate::of(Some(&[der])).unwrap(),
        }
    }

    fn ctl(name: &str) -> Peer {
        peer(Identity::Ctl { name: name.into() })
    }

    fn take_all(limits: &PeerLimits, peer: &Peer) -> (Vec<CountedConnection>, Full) {
        let mut taken = Vec::new();
        loop {
            match limits.take(peer) {
                Ok(counted) => taken.push(counted),
                Err(full) => return (taken, full),
            }
        }
    }

    #[test]
    fn no_user_takes_all_connections_or_any_of_a_kubelet() {
        let limits = PeerLimits::new(64);
        let (ann, full) = take_all(&limits, &ctl("ann"));
        assert_eq!((ann.len(), full), (16, Full::Peer(16)));
        let (_bob, full) = take_all(&limits, &ctl("bob"));
        assert_eq!(full, Full::Peer(16));
        assert_eq!(limits.take(&ctl("eve")).unwrap_err(), Full::Kind(32));
        let kubelet = peer(Identity::Kubelet { name: "k".into() });
        let (kubelets, _) = take_all(&limits, &kubelet);
        assert_eq!(kubelets.len(), 16);
        drop(ann);
        let _eve = limits.take(&ctl("eve")).unwrap();
    }

    #[test]
    fn released_connections_are_forgotten() {
        let limits = PeerLimits::new(64);
        for number in 0..1000 {
            drop(limits.take(&ctl(&number.to_string())).unwrap());
        }
        assert!(limits.counts.lock().unwrap().peers.is_empty());
    }
}
