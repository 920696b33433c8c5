//! How many connections with a known peer one listener has at once.
//!
//! They carry streams of people, so none is ever closed for another one; what exceeds the bound is refused. Kubelets are
//! counted apart from everybody else, and no identity gets more than half of its kind's places, so that neither a user
//! of knocctl nor one faulty kubelet can keep the others out.
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use super::{Identity, Peer};

/// Connections that are counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Kubelets,
    Others,
}

/// PURE: the counts.
#[derive(Debug, Default)]
struct Counts {
    kinds: HashMap<Kind, usize>,
    peers: HashMap<(Kind, String), usize>,
}

/// There is no place for one more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Full {
    #[error("all {0} places for connections of its kind are taken")]
    Kind(usize),
    #[error("it has {0} connections already, the most that one identity may have")]
    Peer(usize),
}

impl Counts {
    /// One more of this peer, which may have `of_peer` of all `most`.
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

    fn give_back(&mut self, key: &(Kind, String)) {
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

/// The connections of one listener.
#[derive(Debug)]
pub(super) struct Finished {
    /// Of each kind: kubelets have half of the listener's places, everybody else the other half.
    most: usize,
    counts: Arc<Mutex<Counts>>,
}

/// One connection's place, given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    key: (Kind, String),
    counts: Arc<Mutex<Counts>>,
}

impl Finished {
    pub(super) fn new(most: usize) -> Self {
        Self {
            most: (most / 2).max(1),
            counts: Arc::default(),
        }
    }

    pub(super) fn take(&self, peer: &Peer) -> Result<Place, Full> {
        let half = (self.most / 2).max(1);
        let (key, of_peer) = match peer {
            Peer::Tls { identity, .. } => {
                let kind = match identity {
                    Identity::Kubelet { .. } => Kind::Kubelets,
                    Identity::Agent { .. } | Identity::Ctl { .. } => Kind::Others,
                };
                ((kind, identity.to_string()), half)
            }
            // Our own user, who shares the socket with nobody.
            Peer::Unix { uid, .. } => ((Kind::Others, uid.to_string()), self.most),
            Peer::Pinned => ((Kind::Others, String::new()), half),
        };
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.take(&key, of_peer, self.most)?;
        Ok(Place {
            key,
            counts: Arc::clone(&self.counts),
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.give_back(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use rustls_pki_types::{CertificateDer, pem::PemObject as _};

    use super::*;
    use crate::Shown;
    use crate::pki;

    fn peer(identity: Identity) -> Peer {
        let key = pki::self_signed("peer").unwrap();
        let der = CertificateDer::from_pem_slice(key.cert_pem.as_bytes()).unwrap();
        Peer::Tls {
            identity,
            addr: ([127, 0, 0, 1], 1).into(),
            certificate: Shown::of(Some(&[der])).unwrap(),
        }
    }

    fn ctl(name: &str) -> Peer {
        peer(Identity::Ctl { name: name.into() })
    }

    fn take_all(finished: &Finished, peer: &Peer) -> (Vec<Place>, Full) {
        let mut places = Vec::new();
        loop {
            match finished.take(peer) {
                Ok(place) => places.push(place),
                Err(full) => return (places, full),
            }
        }
    }

    #[test]
    fn no_user_takes_all_places_and_none_of_a_kubelet() {
        let finished = Finished::new(64);
        let (ann, full) = take_all(&finished, &ctl("ann"));
        assert_eq!((ann.len(), full), (16, Full::Peer(16)));
        let (_bob, full) = take_all(&finished, &ctl("bob"));
        assert_eq!(full, Full::Peer(16));
        assert_eq!(finished.take(&ctl("eve")).unwrap_err(), Full::Kind(32));
        let kubelet = peer(Identity::Kubelet { name: "k".into() });
        let (kubelets, _) = take_all(&finished, &kubelet);
        assert_eq!(kubelets.len(), 16);
        drop(ann);
        let _eve = finished.take(&ctl("eve")).unwrap();
    }

    #[test]
    fn what_is_given_back_leaves_nothing_behind() {
        let finished = Finished::new(64);
        for number in 0..1000 {
            drop(finished.take(&ctl(&number.to_string())).unwrap());
        }
        assert!(finished.counts.lock().unwrap().peers.is_empty());
    }
}
