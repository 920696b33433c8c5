//! Task: the kubelet's certificate on the link to the agent, renewed over that link at 70 % of its life.
//!
//! ```text
//!              due ──► key, request ──RenewCertificate──► fits ──► kept ──► used, new connections
//!               ▲                            │ refused, unfit, not kept: said in the node's condition
//!               └──────────── later ◄────────┘ and the log; nothing changes
//! ```
//!
//! What is used was kept first (the keys Secret or folder), so that a kubelet that starts again has it. Requests and
//! streams that are under way end on their old connection; new ones take a new connection, which shows the new
//! certificate. The mounted bundle stays what it is: a renewed pair counts as long as it descends from it.

use std::time::Duration;

use jiff::Timestamp;
use knoc_link::{
    Credentials, CredentialsError, ExpectPeer, LinkError, Route,
    pki::{self, CertificateInfo, CertifiedKey, PkiError, Request, Validity},
};
use knoc_proto::{error::chain, reason::ErrorReason};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Agent, Channels, Link};
use crate::certs::{Keep, KeepError};

/// The longest sleep: the bundle may be replaced, and the clock be set.
const LOOK: Duration = Duration::from_mins(1);
/// After a failure; doubled with each, up to [`RETRY_MOST`].
const RETRY: Duration = Duration::from_secs(5);
const RETRY_MOST: Duration = Duration::from_hours(1);

/// How connections to the agent are made.
#[derive(Clone, Debug)]
pub struct Dialer {
    /// The addresses.
    pub route: Route,
    /// Who we are; none over a unix socket.
    pub credentials: Option<Credentials>,
    /// Whom we expect.
    pub expect: ExpectPeer,
}

impl Dialer {
    /// New connections, which are made at their first request.
    pub fn dial(&self) -> Result<Channels, LinkError> {
        let dial = || {
            let (route, credentials) = (self.route.clone(), self.credentials.clone());
            knoc_link::dial(route, credentials, self.expect.clone())
        };
        Ok(Channels {
            control: dial()?,
            bulk: dial()?,
        })
    }
}

/// How the link's certificate does, for the node's condition and the metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkCertificate {
    /// Its dates; none: the link has no certificate, or nothing is known yet.
    pub validity: Option<Validity>,
    /// Why it was not renewed; empty: it was, or it is not due.
    pub problem: String,
}

/// Why there is no new certificate.
#[derive(Debug, thiserror::Error)]
enum RenewalError {
    #[error("there is no link to the agent")]
    NoLink,
    #[error("the agent ({version}) cannot renew certificates: upgrade it")]
    OldAgent { version: String },
    #[error("make a key")]
    Key(#[from] PkiError),
    #[error("the agent did not renew it: {0}")]
    Refused(String),
    #[error("use what the agent issued")]
    Unusable(#[from] CredentialsError),
    #[error(
        "what the agent issued does not descend from the certificate in use, or is not of its CA"
    )]
    Unfit,
    #[error("keep it")]
    Keep(#[from] KeepError),
}

/// The task's own state.
pub struct Renewer {
    agent: Agent,
    dialer: Dialer,
    credentials: Credentials,
    keep: Keep,
    link: watch::Receiver<Link>,
    health: watch::Sender<LinkCertificate>,
    failures: u32,
    /// The connections in use were opened with an older certificate.
    stale: bool,
    clock: fn() -> Timestamp,
}

impl std::fmt::Debug for Renewer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Renewer")
            .field("credentials", &self.credentials)
            .field("failures", &self.failures)
            .finish_non_exhaustive()
    }
}

impl Renewer {
    /// A task for the certificate of `dialer`; none where the link has no certificate.
    #[must_use]
    pub fn new(
        agent: Agent,
        dialer: Dialer,
        keep: Keep,
        link: watch::Receiver<Link>,
        health: watch::Sender<LinkCertificate>,
    ) -> Option<Self> {
        let credentials = dialer.credentials.clone()?;
        Some(Self {
            agent,
            dialer,
            credentials,
            keep,
            link,
            health,
            failures: 0,
            stale: false,
            clock: Timestamp::now,
        })
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

    /// One look; says when the next one is due.
    async fn turn(&mut self) -> Duration {
        let now = (self.clock)();
        let validity = self.credentials.info().validity;
        if self.stale {
            self.stale = !self.redial().await;
        }
        let look = if self.stale { RETRY } else { LOOK };
        if let Some(wait) = before(pki::due(validity), now) {
            self.failures = 0;
            self.report(validity, String::new());
            return wait.min(look);
        }
        match self.renew().await {
            Ok(info) => {
                self.failures = 0;
                tracing::info!(serial = info.serial, key = info.spki, until = %info.validity.until,
                    "the link's certificate was renewed");
                self.report(info.validity, String::new());
                Duration::ZERO
            }
            Err(error) => {
                let wait = RETRY
                    .saturating_mul(1 << self.failures.min(10))
                    .min(RETRY_MOST);
                self.failures = self.failures.saturating_add(1);
                let problem = chain(&error);
                if self.health.borrow().problem != problem {
                    tracing::warn!(until = %validity.until, error = problem,
                        "the link's certificate is due and was not renewed, trying again");
                }
                self.report(validity, problem);
                wait.mul_f64(rand::random_range(0.75..1.25))
            }
        }
    }

    fn report(&self, validity: Validity, problem: String) {
        let validity = Some(validity);
        self.health.send_if_modified(|known| {
            let next = LinkCertificate { validity, problem };
            let news = *known != next;
            *known = next;
            news
        });
    }

    async fn renew(&mut self) -> Result<CertificateInfo, RenewalError> {
        self.able()?;
        let name = self.credentials.info().identity;
        let name = name.map_or_else(|_| String::new(), |identity| identity.name().to_owned());
        let request = Request::generate(&name)?;
        let answer = self.agent.renew_certificate(request.der).await;
        let cert_pem = answer.map_err(|status| {
            let text = status.message();
            RenewalError::Refused(match ErrorReason::of(&status) {
                Some(_) => text.to_owned(),
                None => chain(&status),
            })
        })?;
        let info = pki::inspect_pem(&cert_pem)?;
        let pair = CertifiedKey {
            cert_pem,
            key_pem: request.key_pem,
        };
        if !self.credentials.would_renew(&pair)? {
            return Err(RenewalError::Unfit);
        }
        self.keep.put_link_pair(&pair).await?;
        if !self.credentials.renew(&pair)? {
            return Err(RenewalError::Unfit);
        }
        self.stale = !self.redial().await;
        Ok(info)
    }

    fn able(&self) -> Result<(), RenewalError> {
        match &*self.link.borrow() {
            Link::Down { .. } => Err(RenewalError::NoLink),
            Link::Up { info, .. } if !info.capabilities.iter().any(|it| it == "renew") => {
                let version = info.version.clone();
                Err(RenewalError::OldAgent { version })
            }
            Link::Up { .. } => Ok(()),
        }
    }

    /// Replaces the connections by new ones, once these are seen to work. Until then the old ones stay, and this is tried
    /// again: the agent answers no new request on a connection whose own certificate has ended.
    async fn redial(&self) -> bool {
        let channels = match self.dialer.dial() {
            Ok(channels) => channels,
            Err(error) => {
                tracing::warn!(
                    error = chain(&error),
                    "connect with the renewed certificate"
                );
                return false;
            }
        };
        let tried = self.agent.with(channels.clone());
        match tried.get_info().await {
            Ok(_) => {
                self.agent.redial(channels);
                true
            }
            Err(status) => {
                let error = chain(&status);
                tracing::warn!(error, "connect with the renewed certificate");
                false
            }
        }
    }
}

/// Uses the renewed pair that was kept, if it descends from the bundle. For the start: a failure is only logged.
pub async fn restore(credentials: &Credentials, keep: &Keep) {
    let pair = match keep.link_pair().await {
        Ok(Some(pair)) => pair,
        Ok(None) => return,
        Err(error) => {
            let error = chain(&error);
            tracing::warn!(
                error,
                "no renewed certificate of the link can be read: the mounted one is used"
            );
            return;
        }
    };
    match credentials.renew(&pair) {
        Ok(true) => {
            let until = credentials.info().validity.until;
            tracing::info!(%until, "the link's renewed certificate is used");
        }
        Ok(false) => tracing::info!(
            "the renewed certificate that was kept is expired, or of another bundle: the mounted one is used"
        ),
        Err(error) => {
            let error = chain(&error);
            tracing::warn!(
                error,
                "the renewed certificate that was kept cannot be used: the mounted one is"
            );
        }
    }
}

/// PURE: how long until then; none: it is now, or was.
fn before(then: Timestamp, now: Timestamp) -> Option<Duration> {
    let left = Duration::try_from(then.duration_since(now)).ok()?;
    (!left.is_zero()).then_some(left)
}

#[cfg(test)]
mod tests;
