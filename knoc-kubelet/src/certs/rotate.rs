//! Task: obtains one certificate and renews it.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use knoc_link::pki::{CertifiedKey, LEAF_LIFE, PkiError, Validity};
use knoc_proto::error::chain;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    Authority, Health, Keep, KeepError, Purpose, Wanted,
    authority::{Answer, AuthorityError},
    plan::{self, Facts, Step, Unusable, Why},
    request,
};
use crate::pods::events::{Events, Note};

/// How often a pending request is read.
const POLL: Duration = Duration::from_secs(3);
/// The longest sleep: the machine's clock may be set, so that a distant date comes nearer.
const LOOK: Duration = Duration::from_hours(1);
/// The pause after a failure; doubled with each further one, up to [`RETRY_MOST`].
const RETRY: Duration = Duration::from_secs(1);
const RETRY_MOST: Duration = Duration::from_mins(5);
/// The pause after a request was denied: a new one now would only be denied again.
const REJECTED: Duration = Duration::from_mins(10);

/// The newest certificate; `None` while there is none that may be used.
pub type Pairs = watch::Receiver<Option<Arc<CertifiedKey>>>;

/// Returns the current time; tests use their own clock.
pub(super) type Clock = Box<dyn Fn() -> Timestamp + Send + Sync>;

/// Who signs a certificate.
#[derive(Clone)]
pub enum Issuer {
    /// The kubelet signs it itself, for a year.
    SelfSigned,
    /// An authority signs it on request.
    Authority(Arc<dyn Authority>),
}

impl std::fmt::Debug for Issuer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::SelfSigned => "SelfSigned",
            Self::Authority(_) => "Authority",
        })
    }
}

/// Why no certificate could be obtained this time.
#[derive(Debug, thiserror::Error)]
enum ObtainError {
    #[error("store the certificate")]
    Keep {
        #[from]
        source: KeepError,
    },
    #[error("make the certificate or its request")]
    Make {
        #[from]
        source: PkiError,
    },
    #[error("request the certificate")]
    Ask {
        #[from]
        source: AuthorityError,
    },
    #[error("{request} was rejected: {message}")]
    Rejected { request: String, message: String },
    #[error("the certificate issued for {request} cannot be used")]
    Unusable {
        request: String,
        #[source]
        source: Unusable,
    },
    #[error(
        "the certificate issued for {request} has another subject or other names, or is not valid now: {facts:?}"
    )]
    Unfit { request: String, facts: Box<Facts> },
}

impl ObtainError {
    /// Must a new request be made, since this one cannot succeed any more?
    fn ends_request(&self) -> bool {
        matches!(
            self,
            Self::Rejected { .. } | Self::Unusable { .. } | Self::Unfit { .. }
        )
    }
}

enum Progress {
    Done,
    Waiting(String),
}

/// The task that obtains and renews one certificate.
#[derive(Debug)]
pub struct Rotator {
    wanted: Wanted,
    keep: Keep,
    issuer: Issuer,
    events: Events,
    clock: DebugClock,
    /// The contents of the certificate in use.
    have: Option<Facts>,
    failures: u32,
    /// The request for whose approval an Event was recorded.
    announced: String,
    pairs: watch::Sender<Option<Arc<CertifiedKey>>>,
    health: watch::Sender<Health>,
}

struct DebugClock(Clock);

impl std::fmt::Debug for DebugClock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Clock")
    }
}

impl Rotator {
    /// Reads the stored certificate. A serving certificate is available at once: until there is a better one it is
    /// self-signed and not stored. A client certificate is available if a valid one was stored. Each certificate is
    /// sent to `pairs`.
    pub async fn start(
        wanted: Wanted,
        keep: Keep,
        issuer: Issuer,
        events: Events,
        pairs: watch::Sender<Option<Arc<CertifiedKey>>>,
    ) -> Result<Self, StartError> {
        Self::start_at(
            wanted,
            keep,
            issuer,
            events,
            pairs,
            Box::new(Timestamp::now),
        )
        .await
    }

    pub(super) async fn start_at(
        wanted: Wanted,
        keep: Keep,
        issuer: Issuer,
        events: Events,
        pairs: watch::Sender<Option<Arc<CertifiedKey>>>,
        clock: Clock,
    ) -> Result<Self, StartError> {
        let purpose = wanted.purpose;
        let kept = keep.pair(purpose).await?;
        let mut rotator = Self {
            wanted,
            keep,
            issuer,
            events,
            clock: DebugClock(clock),
            have: None,
            failures: 0,
            announced: String::new(),
            pairs,
            health: watch::Sender::new(Health::Starting),
        };
        match kept.map(|pair| (Facts::of(&pair), pair)) {
            Some((Ok(facts), pair)) if plan::is_valid(&facts, rotator.now()) => {
                rotator.publish(facts, pair);
            }
            Some((Err(error), _)) => {
                let error = chain(&error);
                tracing::warn!(purpose = purpose.name(), %error, "the stored certificate cannot be used");
            }
            Some((Ok(_), _)) | None => {}
        }
        if rotator.have.is_none() && purpose == Purpose::Serving {
            let provisional = rotator.self_signed()?;
            rotator.pairs.send_replace(Some(Arc::new(provisional)));
        }
        Ok(rotator)
    }

    /// The state of the certificate.
    #[must_use]
    pub fn health(&self) -> watch::Receiver<Health> {
        self.health.subscribe()
    }

    /// Renews until `shutdown`.
    pub async fn run(mut self, shutdown: CancellationToken) {
        while let Some(wait) = shutdown.run_until_cancelled(self.turn()).await {
            let slept = shutdown.run_until_cancelled(tokio::time::sleep(wait)).await;
            if slept.is_none() {
                return;
            }
        }
    }

    fn now(&self) -> Timestamp {
        (self.clock.0)()
    }

    /// The end of the certificate in use, if it is valid.
    fn until(&self) -> Option<Timestamp> {
        let now = self.now();
        let good = self
            .have
            .as_ref()
            .filter(|facts| plan::is_valid(facts, now));
        good.map(|facts| facts.until)
    }

    /// Does one step, and returns how long to wait before the next.
    ///
    /// Cancel safe: entries are stored completely, and an existing request is found again.
    async fn turn(&mut self) -> Duration {
        let now = self.now();
        let why = match plan::step(self.have.as_ref(), &self.wanted, now) {
            Step::Keep(due) => {
                if let Some(until) = self.until() {
                    self.set_health(Health::Valid { until });
                }
                let left = due.duration_since(now).max(jiff::SignedDuration::ZERO);
                return Duration::try_from(left).unwrap_or(LOOK).clamp(RETRY, LOOK);
            }
            Step::Obtain(why) => why,
        };
        match self.obtain(why).await {
            Ok(Progress::Done) => {
                self.failures = 0;
                Duration::ZERO
            }
            Ok(Progress::Waiting(request)) => {
                self.failures = 0;
                self.waits(request, why);
                POLL
            }
            Err(error) => self.failed(&error).await,
        }
    }

    async fn failed(&mut self, error: &ObtainError) -> Duration {
        let (purpose, message) = (self.wanted.purpose, chain(error));
        let again = matches!(&*self.health.borrow(), Health::Failing { message: told, .. } if *told == message);
        if !again {
            tracing::warn!(purpose = purpose.name(), error = %message, "could not get a new certificate, trying again");
            self.record("CertificateFailed", &message);
        }
        let until = self.until();
        self.set_health(Health::Failing { message, until });
        if error.ends_request() {
            if let Err(error) = self.keep.drop_next_key(purpose).await {
                let error = chain(&error);
                tracing::warn!(purpose = purpose.name(), %error, "could not delete the key of the rejected request");
            }
            return REJECTED;
        }
        self.failures = self.failures.saturating_add(1);
        let doubled = RETRY.saturating_mul(1 << self.failures.min(16).saturating_sub(1));
        doubled
            .min(RETRY_MOST)
            .mul_f64(rand::random_range(0.8..1.2))
    }

    fn waits(&mut self, request: String, why: Why) {
        if self.announced != request {
            let purpose = self.wanted.purpose;
            let text = format!(
                "{} certificate ({}) is waiting for approval: kubectl certificate approve {request}",
                purpose.name(),
                why.text()
            );
            tracing::info!(request, "{text}");
            self.record("CertificateAwaitsApproval", &text);
            self.announced.clone_from(&request);
        }
        let until = self.until();
        self.set_health(Health::Waiting { request, until });
    }

    async fn obtain(&mut self, why: Why) -> Result<Progress, ObtainError> {
        let (purpose, issuer) = (self.wanted.purpose, self.issuer.clone());
        let (facts, pair) = match issuer {
            Issuer::SelfSigned => {
                let pair = self.self_signed()?;
                let facts = Facts::of(&pair).map_err(|source| ObtainError::Unusable {
                    request: "a self-signed certificate".to_owned(),
                    source,
                })?;
                (facts, pair)
            }
            Issuer::Authority(authority) => match self.request(&*authority).await? {
                Ok(made) => made,
                Err(request) => return Ok(Progress::Waiting(request)),
            },
        };
        self.keep.put_pair(purpose, &pair).await?;
        tracing::info!(
            purpose = purpose.name(),
            until = %facts.until,
            "using a new certificate, since {}",
            why.text()
        );
        self.publish(facts, pair);
        Ok(Progress::Done)
    }

    /// The pair that was issued, or the name of the pending request.
    async fn request(
        &self,
        authority: &dyn Authority,
    ) -> Result<Result<(Facts, CertifiedKey), String>, ObtainError> {
        let purpose = self.wanted.purpose;
        let kept = self.keep.next_key(purpose).await?;
        let key_pem = if let Some(key) = kept {
            key
        } else {
            let key = request::key()?;
            self.keep.put_next_key(purpose, &key).await?;
            key
        };
        let made = request::request(&self.wanted, &key_pem)?;
        let request = made.name.clone();
        let cert_pem = match authority.look(&request).await? {
            Answer::Issued(pem) => pem,
            Answer::Waiting => return Ok(Err(request)),
            Answer::Absent => {
                authority.ask(&made).await?;
                return Ok(Err(request));
            }
            Answer::Rejected(message) => return Err(ObtainError::Rejected { request, message }),
        };
        let pair = CertifiedKey { cert_pem, key_pem };
        let facts = match Facts::of(&pair) {
            Ok(facts) => facts,
            Err(source) => return Err(ObtainError::Unusable { request, source }),
        };
        if !facts.fits(&self.wanted) || !plan::is_valid(&facts, self.now()) {
            let facts = Box::new(facts);
            return Err(ObtainError::Unfit { request, facts });
        }
        Ok(Ok((facts, pair)))
    }

    fn self_signed(&self) -> Result<CertifiedKey, PkiError> {
        request::self_signed(&self.wanted, Validity::starting(self.now(), LEAF_LIFE))
    }

    fn publish(&mut self, facts: Facts, pair: CertifiedKey) {
        self.have = Some(facts);
        self.pairs.send_replace(Some(Arc::new(pair)));
    }

    fn set_health(&self, health: Health) {
        self.health.send_if_modified(|old| {
            let changed = *old != health;
            *old = health;
            changed
        });
    }

    fn record(&self, reason: &str, message: &str) {
        self.events.record(Note {
            object: ObjectReference {
                kind: Some("Node".to_owned()),
                name: Some(self.wanted.node.clone()),
                uid: Some(self.wanted.node.clone()),
                ..ObjectReference::default()
            },
            warning: true,
            reason: reason.to_owned(),
            message: message.to_owned(),
            at: self.now(),
            salt: 0,
            times: 1,
        });
    }
}

/// Why the task could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The stored keys cannot be read.
    #[error("read the kubelet's keys")]
    Keep {
        /// The error of the storage.
        #[from]
        source: KeepError,
    },
    /// No certificate can be made for the node's name and addresses.
    #[error("make a certificate for the node's name and addresses")]
    Make {
        /// The error of the certificate library.
        #[from]
        source: PkiError,
    },
}
