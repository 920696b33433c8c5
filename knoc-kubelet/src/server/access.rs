//! The gate in front of every route, including those that do not exist: authentication, then authorization.
//!
//! Answers are cached for as long as in the Kubernetes kubelet: tokens for 2 minutes, known or not, allowed requests
//! for 5 minutes, denied ones for 30 seconds. The caches are bounded; a full one is emptied, which only costs reviews.
//! There is one review at a time for each token: other requests with the same token wait for its answer. Reviews of
//! tokens that the cluster has not known lately are bounded in rate and number ([`reviews`]); further ones are answered
//! 429.

mod reviews;

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use futures::{
    FutureExt as _,
    future::{BoxFuture, Shared, WeakShared},
};
use http::StatusCode;
use knoc_link::admission::Source;
use knoc_proto::{error::chain, log_limit::LogLimit};
use rustls_pki_types::UnixTime;
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;
use tracing::{info, warn};

use self::reviews::Reviews;
use super::{
    Cluster, ClusterError, Context,
    authn::{Peer, bearer},
    authz::{self, Attributes},
    tls::Verifier,
    user::User,
};

const TOKEN_TTL: Duration = Duration::from_mins(2);
/// A token that the cluster knew counts as known for this long: it may be reviewed again however many others are sent.
const KNOWN_TTL: Duration = Duration::from_hours(1);
const ALLOW_TTL: Duration = Duration::from_mins(5);
const DENY_TTL: Duration = Duration::from_secs(30);
/// A kubelet has few distinct callers (API server, metrics-server, Prometheus); more means that somebody tries tokens.
const CACHE_ENTRIES: usize = 1024;

/// Lets a request pass with its [`User`] as an extension, or answers it.
pub(super) async fn gate(
    State(context): State<Arc<Context>>,
    mut request: Request,
    next: Next,
) -> Response {
    let peer = request.extensions().get::<Peer>().cloned();
    let slot = peer.as_ref().map(|peer| Arc::clone(&peer.slot));
    let token = bearer(request.headers()).map(str::to_owned);
    let verifier = context.tls.verifier.borrow().clone();
    let cluster = &context.cluster;
    let identity = context.access.authenticate(cluster, &verifier, peer, token);
    let user = match identity.await {
        Ok(user) => user,
        Err(error) => {
            context.access.log(&error, request.uri().path());
            return error.into_response();
        }
    };
    let attributes = authz::attributes(request.method(), request.uri().path());
    let may = context
        .access
        .authorize(&**cluster, &context.node, &user, attributes);
    match may.await {
        Ok(true) => {
            // Only after authorization: every pod has a token that authenticates it.
            if let Some(slot) = slot {
                slot.identified();
            }
            request.extensions_mut().insert(user);
            next.run(request).await
        }
        Ok(false) => {
            let text = authz::forbidden(&user, attributes);
            info!(
                user = user.name,
                path = request.uri().path(),
                "{}",
                text.trim_end()
            );
            (StatusCode::FORBIDDEN, text).into_response()
        }
        Err(error) => {
            warn!(user = user.name, error = %chain(&error), "could not authorize a request");
            let text = authz::undecided(&user, attributes);
            (StatusCode::INTERNAL_SERVER_ERROR, text).into_response()
        }
    }
}

/// Why a request has no identity; for the log only.
#[derive(Debug)]
struct Unauthenticated {
    source: Source,
    peer: String,
    reasons: Vec<String>,
    /// The token was not reviewed, because too many others are.
    busy: bool,
}

impl IntoResponse for Unauthenticated {
    fn into_response(self) -> Response {
        if self.busy {
            let text = "too many unknown tokens are being reviewed, try again in a second\n";
            let wait = [(http::header::RETRY_AFTER, "1")];
            return (StatusCode::TOO_MANY_REQUESTS, wait, text).into_response();
        }
        (StatusCode::UNAUTHORIZED, "Unauthorized").into_response()
    }
}

impl std::fmt::Display for Unauthenticated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.peer, self.reasons.join("; "))
    }
}

type AccessKey = (User, &'static str, &'static str);

/// A token's hash, so that no cache holds tokens.
type TokenKey = [u8; 32];

/// A review that several requests wait for; it is cancelled when none of them waits any more.
type Review = BoxFuture<'static, Result<Option<User>, Arc<ClusterError>>>;

/// The caches of the gate.
#[derive(Debug, Default)]
pub(super) struct Access {
    tokens: Cache<TokenKey, User>,
    /// Tokens that the cluster does not know, in a cache of their own so that a flood of them displaces no known token.
    unknown: Cache<TokenKey, ()>,
    /// Tokens that the cluster knew at their last review.
    known: Cache<TokenKey, ()>,
    reviews: Mutex<HashMap<TokenKey, WeakShared<Review>>>,
    /// The rate and number of reviews of tokens that may be guesses.
    guesses: Arc<Mutex<Reviews>>,
    rights: Cache<AccessKey, bool>,
    refused: Mutex<LogLimit<Source>>,
}

/// The result for a token.
enum Token {
    Known(User),
    Unknown,
    /// The token was not reviewed, because too many others are.
    Busy,
}

/// A running review of a token that may be a guess; counted until it is dropped.
struct Guess {
    source: Source,
    guesses: Arc<Mutex<Reviews>>,
}

impl Drop for Guess {
    fn drop(&mut self) {
        lock(&self.guesses).end(self.source);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Access {
    async fn authenticate(
        &self,
        cluster: &Arc<dyn Cluster>,
        verifier: &Verifier,
        peer: Option<Peer>,
        token: Option<String>,
    ) -> Result<User, Unauthenticated> {
        let mut reasons = Vec::new();
        let mut busy = false;
        let source = peer
            .as_ref()
            .map_or(Source::Local, |peer| peer.origin.into());
        match peer
            .as_ref()
            .and_then(|peer| peer.user(verifier, UnixTime::now()))
        {
            Some(Ok(user)) => return Ok(user),
            Some(Err(reason)) => reasons.push(format!("certificate rejected: {reason}")),
            None => reasons.push("no client certificate".to_owned()),
        }
        match token {
            None => reasons.push("no bearer token".to_owned()),
            Some(token) => match self.token(cluster, token, source).await {
                Ok(Token::Known(user)) => return Ok(user),
                Ok(Token::Unknown) => {
                    reasons.push("the cluster does not know the token".to_owned());
                }
                Ok(Token::Busy) => {
                    busy = true;
                    reasons.push("too many unknown tokens are being reviewed".to_owned());
                }
                Err(error) => reasons.push(chain(&*error)),
            },
        }
        let peer = peer.map_or_else(String::new, |peer| {
            format!("{} ({})", peer.origin, peer.claims())
        });
        Err(Unauthenticated {
            source,
            peer,
            reasons,
            busy,
        })
    }

    /// Logs a rejected request, unless its source had several a moment ago.
    fn log(&self, error: &Unauthenticated, path: &str) {
        let verdict = lock(&self.refused).event(Instant::now(), error.source);
        if let Some(count) = verdict.left_out {
            info!(
                count,
                "further requests without a valid identity were not logged"
            );
        }
        if verdict.write {
            info!(path, %error, "rejected a request without a valid identity");
        }
    }

    async fn token(
        &self,
        cluster: &Arc<dyn Cluster>,
        token: String,
        source: Source,
    ) -> Result<Token, Arc<ClusterError>> {
        let key: TokenKey = Sha256::digest(token.as_bytes()).into();
        if let Some(user) = self.tokens.get(&key) {
            return Ok(Token::Known(user));
        }
        if self.unknown.get(&key).is_some() {
            return Ok(Token::Unknown);
        }
        let Some(review) = self.review(cluster, key, token, source) else {
            return Ok(Token::Busy);
        };
        let Some(user) = review.await? else {
            self.known.remove(&key);
            self.unknown.put(key, (), TOKEN_TTL);
            return Ok(Token::Unknown);
        };
        self.tokens.put(key, user.clone(), TOKEN_TTL);
        self.known.put(key, (), KNOWN_TTL);
        Ok(Token::Known(user))
    }

    /// The running review of this token, else a new one; `None` if no more may run now.
    fn review(
        &self,
        cluster: &Arc<dyn Cluster>,
        key: TokenKey,
        token: String,
        source: Source,
    ) -> Option<Shared<Review>> {
        let mut reviews = lock(&self.reviews);
        reviews.retain(|_, review| review.upgrade().is_some());
        if let Some(review) = reviews.get(&key).and_then(WeakShared::upgrade) {
            return Some(review);
        }
        let guess = if self.known.get(&key).is_some() {
            None
        } else if lock(&self.guesses).begin(Instant::now(), source) {
            let guesses = Arc::clone(&self.guesses);
            Some(Guess { source, guesses })
        } else {
            return None;
        };
        let cluster = Arc::clone(cluster);
        let review = async move {
            let _counted = guess;
            let user = cluster.review_token(token).await.map_err(Arc::new)?;
            Ok(user.map(User::authenticated))
        };
        let review = review.boxed().shared();
        reviews.extend(review.downgrade().map(|review| (key, review)));
        Some(review)
    }

    async fn authorize(
        &self,
        cluster: &dyn Cluster,
        node: &str,
        user: &User,
        attributes: Attributes,
    ) -> Result<bool, ClusterError> {
        if user.is_master() {
            return Ok(true);
        }
        for &subresource in attributes.subresources {
            let key = (user.clone(), attributes.verb, subresource);
            let allowed = if let Some(allowed) = self.rights.get(&key) {
                allowed
            } else {
                let spec = authz::review(user, node, attributes.verb, subresource);
                let allowed = cluster.review_access(spec).await?;
                let ttl = if allowed { ALLOW_TTL } else { DENY_TTL };
                self.rights.put(key, allowed, ttl);
                allowed
            };
            if allowed {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// A bounded map whose entries expire. Its lock is never held across an await.
#[derive(Debug)]
struct Cache<K, V>(Mutex<HashMap<K, (V, Instant)>>);

impl<K, V> Default for Cache<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash, V: Clone> Cache<K, V> {
    fn get(&self, key: &K) -> Option<V> {
        let entries = lock(&self.0);
        let (value, expires) = entries.get(key)?;
        (*expires > Instant::now()).then(|| value.clone())
    }

    fn remove(&self, key: &K) {
        lock(&self.0).remove(key);
    }

    fn put(&self, key: K, value: V, ttl: Duration) {
        let now = Instant::now();
        let mut entries = lock(&self.0);
        if entries.len() >= CACHE_ENTRIES {
            entries.retain(|_, (_, expires)| *expires > now);
        }
        if entries.len() >= CACHE_ENTRIES {
            entries.clear();
        }
        entries.insert(key, (value, now + ttl));
    }
}

#[cfg(test)]
mod tests;
