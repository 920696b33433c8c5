//! Who is served: every request is judged by the rules of this moment, and connections whose peer they do not serve any
//! more are cut with all their streams.
//!
//! A handshake proves who the peer is; that its certificate still counts is no fact that lasts. So each request is judged
//! before any method sees it (health and reflection too), and [`Gate::sweep`] judges all open connections whenever the
//! rules change, and every [`SWEEP`] for certificates that end.

use std::{
    collections::{BTreeMap, HashMap},
    io::{self, IoSlice},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use knoc_link::{Connection, Identity, Peer, Shown, pki::CertificateInfo};
use knoc_proto::reason::ErrorReason;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::watch::Receiver,
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::{Request, Status, service::Interceptor, transport::server::Connected};

use crate::policy::{Refused, Renewals, Rules};

/// Between two looks at all connections.
const SWEEP: Duration = Duration::from_secs(5);
/// The same refusal is logged again only after this.
const LOG_AGAIN: Duration = Duration::from_mins(1);

/// Cheap to clone; all clones are the same gate.
#[derive(Debug, Clone)]
pub struct Gate(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    rules: Receiver<Arc<Rules>>,
    state: Mutex<State>,
}

/// Held for no await.
#[derive(Debug, Default)]
struct State {
    open: HashMap<u64, Open>,
    next: u64,
    renewals: Renewals,
    /// The last refusal that was logged, and when.
    logged: Option<(String, Instant)>,
}

/// A connection with a certificate.
#[derive(Debug)]
struct Open {
    peer: String,
    identity: Identity,
    shown: Shown,
    cut: CancellationToken,
}

impl Gate {
    /// A gate that goes by these rules.
    #[must_use]
    pub fn new(rules: Receiver<Arc<Rules>>) -> Self {
        let state = Mutex::default();
        Self(Arc::new(Shared { rules, state }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches over a connection until it is dropped.
    pub(super) fn guard(&self, conn: Connection) -> Guarded {
        let Peer::Tls {
            identity,
            certificate,
            ..
        } = conn.peer()
        else {
            return Guarded {
                conn,
                watched: None,
            };
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
        let watched = Watched {
            gate: self.clone(),
            id,
            cut: Box::pin(cut.cancelled_owned()),
        };
        Guarded {
            conn,
            watched: Some(watched),
        }
    }

    /// Is this peer served now?
    fn judge(&self, peer: Option<&Peer>) -> Result<(), Status> {
        let (identity, certificate) = match peer {
            // The socket's folder is our own user's.
            Some(Peer::Unix { .. }) => return Ok(()),
            Some(Peer::Tls {
                identity,
                certificate,
                ..
            }) => (identity, certificate),
            Some(Peer::Pinned { .. }) | None => {
                return Err(ErrorReason::PeerDenied.status("the peer is not known"));
            }
        };
        let rules = Arc::clone(&self.0.rules.borrow());
        let mut state = self.state();
        let now = Timestamp::now();
        // A renewal lets what is under way go on; whoever asks for more shows a certificate that is valid.
        let judged = rules.judge(identity, certificate, &Renewals::default(), now);
        judged.map_err(|refused| {
            let message = refused.to_string();
            if state.is_news(&message) {
                let peer = peer.map_or_else(String::new, ToString::to_string);
                tracing::warn!(peer, refused = message, "a request was refused");
            }
            ErrorReason::PeerDenied.status(message)
        })
    }

    /// A certificate was renewed: what is under way on connections that it opened goes on after its end.
    pub(super) fn renewed(&self, held: &CertificateInfo, until: Timestamp) {
        let ancestors = held.ancestors.iter().map(|one| one.spki.as_str());
        let keys = ancestors.chain([held.spki.as_str()]);
        self.state().renewals.note(keys, until, Timestamp::now());
    }

    /// The kubelets that are connected now, each once, with the end of its newest certificate.
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

    /// Task: cuts connections that are not served any more, until `stop`.
    pub async fn sweep(self, stop: CancellationToken) {
        let mut rules = self.0.rules.clone();
        loop {
            let now = Timestamp::now();
            let current = Arc::clone(&rules.borrow_and_update());
            for (peer, refused) in self.cut(&current, now) {
                tracing::warn!(peer, %refused, "a connection was cut with all its streams");
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                // An error: the watcher has ended, and we are about to.
                Ok(()) = rules.changed() => {}
                () = tokio::time::sleep(SWEEP) => {}
            }
        }
    }

    fn cut(&self, rules: &Rules, now: Timestamp) -> Vec<(String, Refused)> {
        let state = self.state();
        let mut cut = Vec::new();
        for open in state.open.values().filter(|open| !open.cut.is_cancelled()) {
            let judged = rules.judge(&open.identity, &open.shown, &state.renewals, now);
            if let Err(refused) = judged {
                open.cut.cancel();
                cut.push((open.peer.clone(), refused));
            }
        }
        cut
    }
}

impl State {
    /// Is this refusal worth a line in the log?
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

/// A connection that ends when its peer is not served any more.
#[derive(Debug)]
pub(super) struct Guarded {
    conn: Connection,
    /// None for our own user's.
    watched: Option<Watched>,
}

#[derive(Debug)]
struct Watched {
    gate: Gate,
    id: u64,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.gate.state().open.remove(&self.id);
    }
}

impl Guarded {
    /// An error once the connection is cut; the caller's task is woken when it is.
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let Some(watched) = &mut self.watched else {
            return Ok(());
        };
        match watched.cut.as_mut().poll(cx) {
            Poll::Pending => Ok(()),
            Poll::Ready(()) => {
                let text = "the peer is not served any more";
                Err(io::Error::new(io::ErrorKind::ConnectionAborted, text))
            }
        }
    }
}

impl Connected for Guarded {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.conn.connect_info()
    }
}

impl AsyncRead for Guarded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.conn).poll_read(cx, buf)
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.conn).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.conn).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.conn).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.conn.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.conn).poll_write_vectored(cx, bufs)
    }
}
