//! Decides who is served. Every request is checked against the current rules, and connections whose
//! peer is no longer served are closed with all their streams.
//!
//! A TLS handshake proves who the peer is, but its certificate may expire or be denied later. So
//! each request is checked before any method sees it (health and reflection too), and
//! [`Gate::sweep`] checks all open connections whenever the rules change, and every [`SWEEP`] for
//! certificates that have expired.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use knoc_link::{Connection, Identity, Peer, PeerCertificate, pki::CertificateInfo};
use knoc_proto::reason::ErrorReason;
use tokio::sync::watch::Receiver;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status, service::Interceptor};

use crate::policy::{PeerDenied, Renewals, Rules};

/// Interval between two checks of all connections.
const SWEEP: Duration = Duration::from_secs(5);
/// A denial that repeats is logged again only after this time.
const LOG_AGAIN: Duration = Duration::from_mins(1);

/// Cheap to clone; all clones share one state.
#[derive(Debug, Clone)]
pub struct Gate(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    rules: Receiver<Arc<Rules>>,
    state: Mutex<State>,
}

/// Never held across an await.
#[derive(Debug, Default)]
struct State {
    open: HashMap<u64, Open>,
    next: u64,
    renewals: Renewals,
    /// The last denial that was logged, and when.
    logged: Option<(String, Instant)>,
}

/// An open connection whose peer has a certificate.
#[derive(Debug)]
struct Open {
    peer: String,
    identity: Identity,
    shown: PeerCertificate,
    cut: CancellationToken,
}

impl Gate {
    /// Creates a gate that follows these rules.
    #[must_use]
    pub fn new(rules: Receiver<Arc<Rules>>) -> Self {
        let state = Mutex::default();
        Self(Arc::new(Shared { rules, state }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a connection until it is dropped, and returns it so that it fails once its peer is no longer served. A
    /// connection of our own user is returned as it is.
    pub(super) fn guard(&self, conn: Connection) -> Connection {
        let Peer::Tls {
            identity,
            certificate,
            ..
        } = conn.peer()
        else {
            return conn;
        };
        let info = certificate.info();
        let peer = conn.peer().to_string();
        tracing::info!(
            peer,
            serial = info.serial,
            key = info.spki,
            until = %info.validity.until,
            "connected"
        );
        let cut = CancellationToken::new();
        let open = Open {
            peer,
            identity: identity.clone(),
            shown: certificate.clone(),
            cut: cut.clone(),
        };
        let mut state = self.state();
        let id = state.next;
        state.next += 1;
        state.open.insert(id, open);
        drop(state);
        let gate = self.clone();
        conn.cut_by(cut, "the peer is no longer served")
            .holding(Registered { gate, id })
    }

    /// Checks whether this peer is served now.
    fn judge(&self, peer: Option<&Peer>) -> Result<(), Status> {
        let (identity, certificate) = match peer {
            // Only our own user can reach the socket: the directory that holds it is private.
            Some(Peer::Unix { .. }) => return Ok(()),
            Some(Peer::Tls {
                identity,
                certificate,
                ..
            }) => (identity, certificate),
            Some(Peer::Pinned { .. } | Peer::Command) | None => {
                return Err(ErrorReason::PeerDenied.status("the peer is not known"));
            }
        };
        let rules = Arc::clone(&self.0.rules.borrow());
        let mut state = self.state();
        let now = Timestamp::now();
        // A renewal keeps open streams alive, but a new request needs a certificate that is itself
        // valid.
        let judged = rules.judge(identity, certificate, &Renewals::default(), now);
        judged.map_err(|denied| {
            let message = denied.to_string();
            if state.is_news(&message) {
                let peer = peer.map_or_else(String::new, ToString::to_string);
                tracing::warn!(peer, reason = message, "a request was denied");
            }
            ErrorReason::PeerDenied.status(message)
        })
    }

    /// Records that a certificate was renewed: streams on connections that were opened with it
    /// outlive its end.
    pub(super) fn renewed(&self, held: &CertificateInfo, until: Timestamp) {
        let ancestors = held.ancestors.iter().map(|one| one.spki.as_str());
        let keys = ancestors.chain([held.spki.as_str()]);
        self.state().renewals.note(keys, until, Timestamp::now());
    }

    /// The kubelets that are connected now, each once, with the expiry of its newest certificate.
    #[must_use]
    pub fn kubelets(&self) -> BTreeMap<Identity, Timestamp> {
        let mut kubelets = BTreeMap::new();
        for open in self.state().open.values() {
            if matches!(open.identity, Identity::Kubelet { .. }) {
                let until = open.shown.info().validity.until;
                let newest = kubelets.entry(open.identity.clone()).or_insert(until);
                *newest = until.max(*newest);
            }
        }
        kubelets
    }

    /// Task: closes connections that are no longer served, until `stop` is cancelled.
    pub async fn sweep(self, stop: CancellationToken) {
        let mut rules = self.0.rules.clone();
        loop {
            let now = Timestamp::now();
            let current = Arc::clone(&rules.borrow_and_update());
            for (peer, denied) in self.cut(&current, now) {
                tracing::warn!(peer, %denied, "a connection was closed with all its streams: its peer is no longer served");
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                // An error means that the watcher has ended, and so will we.
                Ok(()) = rules.changed() => {}
                () = tokio::time::sleep(SWEEP) => {}
            }
        }
    }

    fn cut(&self, rules: &Rules, now: Timestamp) -> Vec<(String, PeerDenied)> {
        let state = self.state();
        let mut cut = Vec::new();
        for open in state.open.values().filter(|open| !open.cut.is_cancelled()) {
            let judged = rules.judge(&open.identity, &open.shown, &state.renewals, now);
            if let Err(denied) = judged {
                open.cut.cancel();
                cut.push((open.peer.clone(), denied));
            }
        }
        cut
    }
}

impl State {
    /// Whether this denial is worth a line in the log.
    fn is_news(&mut self, message: &str) -> bool {
        let told = self.logged.as_ref();
        if told.is_some_and(|(text, at)| text == message && at.elapsed() < LOG_AGAIN) {
            return false;
        }
        self.logged = Some((message.to_owned(), Instant::now()));
        true
    }
}

impl Interceptor for Gate {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        self.judge(request.extensions().get::<Peer>())?;
        Ok(request)
    }
}

/// Removes a connection from those that are open when it is dropped.
#[derive(Debug)]
struct Registered {
    gate: Gate,
    id: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.gate.state().open.remove(&self.id);
    }
}
