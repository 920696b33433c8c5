//! Task: renews the agent's own certificate with the CA key next to the CA; without one, it logs a
//! warning before the certificate expires.
//!
//! The key pair is kept and only the certificate's file is replaced, so that no crash leaves a
//! certificate and a key that do not match. The task also publishes the certificate's expiry, and
//! what is wrong with the site file, to kubelets ([`pb::NodeInfo`]).

use std::{sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use knoc_contract::jobdir::atomic::{self, FileError};
use knoc_link::{
    Credentials,
    pki::{self, PkiError, RenewError},
};
use knoc_proto::{error::chain, pb};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    api::renew::{self, NoCa},
    config::Tls,
    site::Site,
};

/// The longest pause: the clock may be changed, and a policy problem is published within this time.
const LOOK: Duration = Duration::from_secs(10);
/// The interval between two warnings of the same kind, and between two failed attempts.
const AGAIN: Duration = Duration::from_hours(1);

/// Why the certificate was not renewed.
#[derive(Debug, thiserror::Error)]
enum RenewalError {
    #[error(transparent)]
    Ca(#[from] NoCa),
    #[error("read or write the agent's certificate")]
    File(#[from] FileError),
    #[error("issue the agent's certificate")]
    Issue(#[from] RenewError),
    #[error("use the agent's key")]
    Key(#[from] PkiError),
}

/// The task's state.
#[derive(Debug)]
pub struct Renewal {
    site: Arc<Site>,
    /// `None` if only the unix socket is served.
    credentials: Option<Credentials>,
    node: watch::Sender<pb::NodeInfo>,
    /// The time of the last attempt or warning.
    tried: Option<Timestamp>,
}

impl Renewal {
    /// Creates the task for the certificate in `credentials`.
    #[must_use]
    pub fn new(
        site: Arc<Site>,
        credentials: Option<Credentials>,
        node: watch::Sender<pb::NodeInfo>,
    ) -> Self {
        Self {
            site,
            credentials,
            node,
            tried: None,
        }
    }

    /// Checks the certificate until `stop` is cancelled.
    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            self.turn().await;
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    async fn turn(&mut self) {
        let (credentials, tls) = (self.credentials.clone(), self.site.config.tls.clone());
        if let (Some(credentials), Some(tls)) = (credentials, tls) {
            self.look(credentials, tls).await;
        }
        let until = until(self.credentials.as_ref());
        let problem = self.site.policy.problem().unwrap_or_default();
        let maps_privileged = self.site.policy.now().maps_privileged();
        self.node.send_if_modified(|node| {
            let news = node.certificate_until != until
                || node.policy_problem != problem
                || node.maps_privileged != maps_privileged;
            node.certificate_until = until;
            node.maps_privileged = maps_privileged;
            node.policy_problem.clone_from(&problem);
            news
        });
    }

    async fn look(&mut self, credentials: Credentials, tls: Tls) {
        let now = Timestamp::now();
        let validity = credentials.info().validity;
        let again = SignedDuration::try_from(AGAIN).unwrap_or(SignedDuration::MAX);
        let recently = self
            .tried
            .is_some_and(|at| now.duration_since(at).abs() < again);
        if now < pki::due(validity) || recently {
            return;
        }
        self.tried = Some(now);
        let renewed = tokio::task::spawn_blocking(move || renew(&credentials, &tls, now));
        match renewed.await {
            Ok(Ok(until)) => {
                self.tried = None;
                tracing::info!(%until, "renewed the agent's own certificate");
            }
            Ok(Err(error)) if pki::is_expiring(validity, now) => {
                let error = chain(&error);
                tracing::error!(until = %validity.until, error, "the agent's certificate expires soon and cannot be renewed");
            }
            Ok(Err(error)) => {
                let error = chain(&error);
                tracing::warn!(until = %validity.until, error, "the agent's certificate cannot be renewed");
            }
            Err(error) => tracing::error!(
                error = chain(&error),
                "cannot check or renew the agent's certificate"
            ),
        }
    }
}

/// Issues a new certificate for the same key, identity and names, and replaces the old one with it.
/// Blocking.
fn renew(credentials: &Credentials, tls: &Tls, now: Timestamp) -> Result<Timestamp, RenewalError> {
    let ca = renew::ca(tls)?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let key = text(atomic::read(&tls.key)?);
    let held = text(atomic::read(&tls.cert)?);
    let pem = ca.renew_own(&held, &key, now)?;
    let until = pki::inspect_pem(&pem)?.validity.until;
    atomic::write(&tls.cert, pem.as_bytes(), 0o600)?;
    // Reread at once; otherwise the next handshake would do it.
    if let Err(error) = credentials.reread() {
        tracing::error!(error = chain(&error), "cannot read the renewed certificate");
    }
    Ok(until)
}

/// When the agent's certificate expires, as a watch of the node shows it.
pub(crate) fn until(credentials: Option<&Credentials>) -> i64 {
    credentials.map_or(0, |one| one.info().validity.until.as_second())
}

#[cfg(test)]
mod tests {
    use knoc_link::{
        Identity,
        pki::{Ca, Validity},
    };

    use super::*;

    fn write(path: &std::path::Path, text: &str) {
        atomic::write(path, text.as_bytes(), 0o600).unwrap();
    }

    #[test]
    fn the_agents_own_certificate_keeps_key_identity_and_names() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let tls = Tls {
            ca: path("ca.crt"),
            cert: path("agent.crt"),
            key: path("agent.key"),
            ca_key: None,
        };
        let ca = Ca::generate("ca").unwrap();
        let who = Identity::Agent { site: "s".into() };
        let names = ["login.example".to_owned(), "10.0.0.1".to_owned()];
        let now = Timestamp::now();
        let dates = Validity::starting(now, Duration::from_mins(1));
        let pair = ca.issue_for(&who, &names, dates).unwrap();
        write(&tls.ca, ca.cert_pem());
        write(&tls.cert, &pair.cert_pem);
        write(&tls.key, &pair.key_pem);
        let credentials = Credentials::from_files(&tls.ca, &tls.cert, &tls.key).unwrap();
        let before = credentials.info();
        let error = renew(&credentials, &tls, now).unwrap_err();
        assert!(error.to_string().contains("ca.key is not there"), "{error}");
        write(&tls.ca_key(), &Ca::generate("other").unwrap().key_pem());
        let error = chain(&renew(&credentials, &tls, now).unwrap_err());
        assert!(error.contains("none of the CA's certificates"), "{error}");
        write(&tls.ca_key(), &ca.key_pem());
        let later = now + SignedDuration::from_secs(30);
        renew(&credentials, &tls, later).unwrap();
        let after = credentials.info();
        assert_eq!(after.identity, Ok(who));
        assert_eq!(after.spki, before.spki);
        assert!(after.validity.until > before.validity.until);
        let read = std::fs::read_to_string(&tls.cert).unwrap();
        let names_of = |pem: &str| pki::names_of_pem(pem).unwrap();
        assert_eq!(names_of(&read), names_of(&pair.cert_pem));
        assert_eq!(names_of(&read).len(), 2);
    }
}
