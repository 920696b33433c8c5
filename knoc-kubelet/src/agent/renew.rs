//! Task: the kubelet's certificate on the link to the agent, renewed over that link at 70 % of its life.
//!
//! ```text
//!              due ──► key, request ──RenewCertificate──► fits ──► kept ──► used, new connections
//!               ▲                            │ rejected, unfit, not kept: reported in the node's condition
//!               └──────────── later ◄────────┘ and the log; nothing changes
//! ```
//!
//! A certificate is stored (in the Secret or folder of keys) before it is used, so that a kubelet that restarts has it.
//! Requests and streams that are running end on their old connection; new ones use a new connection, which shows the
//! new certificate. The mounted bundle is not changed: a renewed pair counts as long as it descends from the mounted
//! one.

use std::time::Duration;

use jiff::Timestamp;
use knoc_link::{
    Carrier, Credentials, CredentialsError, ExpectPeer, LinkError, Route,
    dial_in::DialIn,
    pki::{self, CertificateInfo, CertifiedKey, PkiError, Request, Validity},
};
use knoc_proto::{error::chain, reason::ErrorReason};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Agent, Channels, Link};
use crate::certs::{Keep, KeepError};

/// The longest sleep, since the bundle may be replaced and the clock may be set.
const LOOK: Duration = Duration::from_mins(1);
/// The pause after the first failure; doubled with each further one, up to [`RETRY_MOST`].
const RETRY: Duration = Duration::from_secs(5);
const RETRY_MOST: Duration = Duration::from_hours(1);

/// Which side opens the connections to the agent.
#[derive(Clone, Debug)]
pub enum Way {
    /// The kubelet dials one of these addresses.
    Dial(Route),
    /// The agent dials the kubelet.
    DialIn(DialIn),
}

impl Way {
    /// Whether a connection may be a login.
    #[must_use]
    pub fn costs_logins(&self) -> bool {
        match self {
            Self::Dial(route) => route.carriers().iter().any(Carrier::starts_a_process),
            Self::DialIn(_) => false,
        }
    }
}

/// How to connect to the agent.
#[derive(Clone, Debug)]
pub struct Dialer {
    /// Which side opens connections, and how.
    pub way: Way,
    /// Our certificate and CA; None on a unix socket.
    pub credentials: Option<Credentials>,
    /// The identity that the agent must have.
    pub expect: ExpectPeer,
}

impl Dialer {
    /// Two new connections, which are opened by their first request.
    pub fn dial(&self) -> Result<Channels, LinkError> {
        let dial = || match &self.way {
            Way::Dial(route) => {
                let (route, credentials) = (route.clone(), self.credentials.clone());
                knoc_link::dial(route, credentials, self.expect.clone())
            }
            Way::DialIn(dial_in) => Ok(dial_in.channel()),
        };
        Ok(Channels {
            control: dial()?,
            bulk: dial()?,
        })
    }
}

/// The state of the link's certificate, for the node's condition and the metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkCertificate {
    /// Its dates; None if the link has no certificate, or before the first check.
    pub validity: Option<Validity>,
    /// Why it was not renewed; empty if it was or is not due.
    pub problem: String,
}

/// Why the certificate was not renewed.
#[derive(Debug, thiserror::Error)]
enum RenewalError {
    #[error("there is no link to the agent")]
    NoLink,
    #[error("the agent ({version}) cannot renew certificates, upgrade it")]
    OldAgent { version: String },
    #[error("generate a key")]
    Key(#[from] PkiError),
    #[error("the agent did not renew the certificate: {0}")]
    Rejected(String),
    #[error("use the certificate that the agent issued")]
    Unusable(#[from] CredentialsError),
    #[error(
        "the certificate that the agent issued does not renew the one in use, or is of another CA"
    )]
    Unfit,
    #[error("store the certificate")]
    Keep(#[from] KeepError),
}

/// The task that renews the certificate.
pub struct Renewer {
    agent: Agent,
    dialer: Dialer,
    credentials: Credentials,
    keep: Keep,
    link: watch::Receiver<Link>,
    health: watch::Sender<LinkCertificate>,
    failures: u32,
    /// Whether the connections in use were opened with an older certificate.
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
    /// A task for the certificate of `dialer`; None if the link has no certificate.
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

    /// Checks the certificate once, and returns how long to wait before the next check.
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
                        "could not renew the link's certificate, which is due; trying again");
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
            RenewalError::Rejected(match ErrorReason::of(&status) {
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

    /// Replaces the connections by new ones, once these are seen to work. Until then the old ones stay and this is
    /// retried: the agent answers no new request on a connection whose own certificate has expired.
    async fn redial(&self) -> bool {
        let channels = match self.dialer.dial() {
            Ok(channels) => channels,
            Err(error) => {
                tracing::warn!(
                    error = chain(&error),
                    "could not connect with the link's renewed certificate, trying again"
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
                tracing::warn!(
                    error,
                    "could not connect with the link's renewed certificate, trying again"
                );
                false
            }
        }
    }
}

/// Uses the stored renewed pair at start, if it descends from the mounted bundle. A failure is only logged.
pub async fn restore(credentials: &Credentials, keep: &Keep) {
    let pair = match keep.link_pair().await {
        Ok(Some(pair)) => pair,
        Ok(None) => return,
        Err(error) => {
            let error = chain(&error);
            tracing::warn!(
                error,
                "could not read the link's renewed certificate, using the mounted one"
            );
            return;
        }
    };
    match credentials.renew(&pair) {
        Ok(true) => {
            let until = credentials.info().validity.until;
            tracing::info!(%until, "using the link's renewed certificate");
        }
        Ok(false) => tracing::info!(
            "the link's renewed certificate has expired or belongs to another bundle, using the mounted one"
        ),
        Err(error) => {
            let error = chain(&error);
            tracing::warn!(
                error,
                "could not use the link's renewed certificate, using the mounted one"
            );
        }
    }
}

/// PURE: how long until `then`; None if it is now or past.
fn before(then: Timestamp, now: Timestamp) -> Option<Duration> {
    let left = Duration::try_from(then.duration_since(now)).ok()?;
    (!left.is_zero()).then_some(left)
}

#[cfg(test)]
mod tests;
