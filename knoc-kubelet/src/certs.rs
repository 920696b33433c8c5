//! The kubelet's own certificates: the serving certificate of its API, and the client certificate of the node's
//! identity.
//!
//! Owner: one [`Rotator`] task for each certificate. It decides purely ([`plan::step`]), signs or requests what is
//! needed, stores it ([`Keep`]: a Secret, or a folder) and publishes it on a `watch` channel, whose readers use the
//! newest one. A failure changes nothing: the old certificate stays in use, and [`Health`] says what is wrong and what
//! to do.
//!
//! ```text
//!              none, expired, due (70–90 % of its life), other names
//!   Valid ───────────────────────────────────────────────────────► Obtain ── self-signed ──────────────► Valid
//!     ▲                                                              │ key stored, request created
//!     │                                                              ▼
//!     └───────── issued, fits, stored ────────────── Waiting (CSR) ──┴── denied, failed, unfit: key discarded,
//!                                                                         Failing for a while, then Obtain again
//! ```
//!
//! The key of a request is stored before the request is created, and the request's name follows from key and contents:
//! a kubelet that was restarted waits for the same request, so no approval is lost.

pub mod authority;
pub mod keep;
pub mod plan;
pub mod request;
mod rotate;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use jiff::Timestamp;

pub use authority::{Authority, KubeAuthority};
pub use keep::{Keep, KeepError};
pub use rotate::{Issuer, Pairs, Rotator, StartError};

/// What a certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Purpose {
    /// For the TLS server of the kubelet's API.
    Serving,
    /// For the TLS client of the API server, as `system:node:NAME`.
    Client,
}

impl Purpose {
    /// The purpose in names of files and objects.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::Client => "client",
        }
    }

    /// The type of the Node's condition about the certificate.
    #[must_use]
    pub const fn condition(self) -> &'static str {
        match self {
            Self::Serving => "ServingCertificate",
            Self::Client => "ClientCertificate",
        }
    }

    /// The signer of Kubernetes that issues such certificates.
    #[must_use]
    pub const fn signer(self) -> &'static str {
        match self {
            Self::Serving => "kubernetes.io/kubelet-serving",
            Self::Client => "kubernetes.io/kube-apiserver-client-kubelet",
        }
    }

    /// The key usages that the signer requires for a key that cannot encipher.
    #[must_use]
    pub const fn usages(self) -> [&'static str; 2] {
        match self {
            Self::Serving => ["digital signature", "server auth"],
            Self::Client => ["digital signature", "client auth"],
        }
    }
}

/// What a certificate must contain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// What the certificate is for.
    pub purpose: Purpose,
    /// The node's name.
    pub node: String,
    /// The DNS names and IP addresses that the Node publishes; empty for a client.
    pub names: BTreeSet<String>,
}

impl Wanted {
    /// The common name `system:node:NAME`, which the signers require.
    #[must_use]
    pub fn common_name(&self) -> String {
        format!("system:node:{}", self.node)
    }
}

/// The organization of every node's certificate.
pub const ORGANIZATION: &str = "system:nodes";

/// The state of a certificate, for the Node's condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// Nothing is known yet.
    Starting,
    /// The certificate is valid and in use.
    Valid {
        /// Its `notAfter`.
        until: Timestamp,
    },
    /// A CertificateSigningRequest must be approved.
    Waiting {
        /// The name of the request.
        request: String,
        /// The end of the certificate in use; None if there is none.
        until: Option<Timestamp>,
    },
    /// No new certificate could be obtained.
    Failing {
        /// The error with its causes.
        message: String,
        /// The end of the certificate in use; None if there is none.
        until: Option<Timestamp>,
    },
}

impl Health {
    /// Status, reason and message of the Node's condition; `None` while nothing is known.
    #[must_use]
    pub fn condition(&self) -> Option<(&'static str, &'static str, String)> {
        let meanwhile = |until: &Option<Timestamp>| match until {
            Some(until) => format!("the certificate in use is valid until {}", date(*until)),
            None => "there is no certificate yet".to_owned(),
        };
        match self {
            Self::Starting => None,
            Self::Valid { until } => {
                Some(("True", "Valid", format!("valid until {}", date(*until))))
            }
            Self::Waiting { request, until } => {
                let text = format!(
                    "waiting for approval: kubectl certificate approve {request}; {}",
                    meanwhile(until)
                );
                let status = if until.is_some() { "True" } else { "False" };
                Some((status, "AwaitingApproval", text))
            }
            Self::Failing { message, until } => {
                let text = format!(
                    "could not get a new certificate: {message}; {}",
                    meanwhile(until)
                );
                let status = if until.is_some() { "True" } else { "False" };
                Some((status, "RenewalFailed", text))
            }
        }
    }
}

fn date(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}
