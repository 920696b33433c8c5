//! The kubelet's own certificates: the serving certificate of its API, and the client certificate of the node's
//! identity.
//!
//! Owner: one [`Rotator`] task a certificate. It decides purely ([`plan::step`]), makes or requests what is needed,
//! keeps it ([`Keep`]: a Secret, or a folder) and publishes it on a `watch` channel; whoever uses it takes the newest.
//! A failure changes nothing: the old certificate stays in use, and [`Health`] says what is wrong, and what to do.
//!
//! ```text
//!              none, expired, due (70–90 % of its life), other names
//!   Valid ───────────────────────────────────────────────────────► Obtain ── self-signed ──────────────► Valid
//!     ▲                                                              │ key kept, request made
//!     │                                                              ▼
//!     └───────── issued, fits, kept ──────────────── Waiting (CSR) ──┴── denied, failed, unfit: key thrown away,
//!                                                                         Failing for a while, then Obtain again
//! ```
//!
//! The key of a request is kept before the request is made, and the request's name follows from key and contents: a
//! kubelet that was restarted waits for the same request, and an approval is never lost.

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
    /// TLS server of the kubelet's API.
    Serving,
    /// TLS client of the API server, as `system:node:NAME`.
    Client,
}

impl Purpose {
    /// In names of files and objects.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::Client => "client",
        }
    }

    /// The type of the node's condition.
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

    /// What the signer demands, for a key that cannot encipher.
    #[must_use]
    pub const fn usages(self) -> [&'static str; 2] {
        match self {
            Self::Serving => ["digital signature", "server auth"],
            Self::Client => ["digital signature", "client auth"],
        }
    }
}

/// What must stand in a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// What it is for.
    pub purpose: Purpose,
    /// The node's name.
    pub node: String,
    /// DNS names and IP addresses: those that the Node publishes; none for a client.
    pub names: BTreeSet<String>,
}

impl Wanted {
    /// `system:node:NAME`, which the signers demand.
    #[must_use]
    pub fn common_name(&self) -> String {
        format!("system:node:{}", self.node)
    }
}

/// The organization of every node.
pub const ORGANIZATION: &str = "system:nodes";

/// How a certificate does, for the node's condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// Nothing is known yet.
    Starting,
    /// In use.
    Valid {
        /// `notAfter`
        until: Timestamp,
    },
    /// Somebody must approve a CertificateSigningRequest.
    Waiting {
        /// Its name.
        request: String,
        /// Until when the certificate in use is good; none: there is none.
        until: Option<Timestamp>,
    },
    /// No new certificate could be had.
    Failing {
        /// Why not, as a chain.
        message: String,
        /// Until when the certificate in use is good; none: there is none.
        until: Option<Timestamp>,
    },
}

impl Health {
    /// Status, reason and message of the node's condition; `None` while nothing is known.
    #[must_use]
    pub fn condition(&self) -> Option<(&'static str, &'static str, String)> {
        let meanwhile = |until: &Option<Timestamp>| match until {
            Some(until) => format!("the one in use is valid until {}", date(*until)),
            None => "there is none yet".to_owned(),
        };
        match self {
            Self::Starting => None,
            Self::Valid { until } => {
                Some(("True", "Valid", format!("valid until {}", date(*until))))
            }
            Self::Waiting { request, until } => {
                let text = format!(
                    "waits for: kubectl certificate approve {request}; {}",
                    meanwhile(until)
                );
                let status = if until.is_some() { "True" } else { "False" };
                Some((status, "AwaitingApproval", text))
            }
            Self::Failing { message, until } => {
                let text = format!("no new certificate: {message}; {}", meanwhile(until));
                let status = if until.is_some() { "True" } else { "False" };
                Some((status, "RenewalFailed", text))
            }
        }
    }
}

fn date(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}
