//! PURE: the identity of a peer, a URI SAN of its certificate, and which identities the other side accepts.
use std::{fmt, str::FromStr};

/// The trust domain with which every identity begins.
const PREFIX: &str = "spiffe://knoc/";

/// The identity of a peer: a SPIFFE ID (a URI) in the trust domain `knoc`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Identity {
    /// The agent of a site: `spiffe://knoc/agent/SITE`.
    Agent {
        /// The site's name.
        site: String,
    },
    /// A kubelet: `spiffe://knoc/kubelet/NAME`.
    Kubelet {
        /// The kubelet's name, usually that of its node.
        name: String,
    },
    /// The knocctl of a user: `spiffe://knoc/ctl/NAME`.
    Ctl {
        /// The user's name.
        name: String,
    },
}

/// Why a text is not an identity, or a certificate does not contain exactly one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidIdentity {
    /// The URI has none of the three forms.
    #[error(
        "{uri:?} is not spiffe://knoc/agent/SITE, spiffe://knoc/kubelet/NAME or spiffe://knoc/ctl/NAME"
    )]
    Form {
        /// The URI.
        uri: String,
    },
    /// The certificate has no URI of the trust domain.
    #[error("no spiffe://knoc/… URI among the subject alternative names")]
    Absent,
    /// The certificate has several URIs of the trust domain.
    #[error("{count} spiffe://knoc/… URIs among the subject alternative names instead of one")]
    Several {
        /// The number of such URIs.
        count: usize,
    },
}

impl Identity {
    /// The last part of the URI: the site or the name.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Agent { site: name } | Self::Kubelet { name } | Self::Ctl { name } => name,
        }
    }

    /// The identity among the URIs of a certificate, of which there must be exactly one.
    pub(crate) fn one_of(uris: &[&str]) -> Result<Self, InvalidIdentity> {
        let ours: Vec<_> = uris.iter().filter(|uri| uri.starts_with(PREFIX)).collect();
        match ours.as_slice() {
            [] => Err(InvalidIdentity::Absent),
            [uri] => uri.parse(),
            _ => Err(InvalidIdentity::Several { count: ours.len() }),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self {
            Self::Agent { .. } => "agent",
            Self::Kubelet { .. } => "kubelet",
            Self::Ctl { .. } => "ctl",
        };
        write!(f, "{PREFIX}{kind}/{}", self.name())
    }
}

impl FromStr for Identity {
    type Err = InvalidIdentity;

    fn from_str(uri: &str) -> Result<Self, InvalidIdentity> {
        let form = || InvalidIdentity::Form {
            uri: uri.to_owned(),
        };
        let (kind, name) = uri
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split_once('/'))
            .ok_or_else(form)?;
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
        if name.is_empty() || name.len() > 253 || !name.bytes().all(plain) {
            return Err(form());
        }
        let name = name.to_owned();
        match kind {
            "agent" => Ok(Self::Agent { site: name }),
            "kubelet" => Ok(Self::Kubelet { name }),
            "ctl" => Ok(Self::Ctl { name }),
            _ => Err(form()),
        }
    }
}

/// Which identities one side accepts at the other end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExpectPeer {
    /// The agent of any site: what kubelet and knocctl expect if no site is configured.
    AnyAgent,
    /// Any kubelet: what an agent expects that dials out. Its policy then decides by name.
    AnyKubelet,
    /// A kubelet or a knocctl: what the agent expects. Its policy then decides by name.
    NearSide,
    /// Only this identity.
    Exactly(Identity),
}

impl ExpectPeer {
    /// Whether `identity` is accepted.
    #[must_use]
    pub fn accepts(&self, identity: &Identity) -> bool {
        match (self, identity) {
            (Self::AnyAgent, Identity::Agent { .. })
            | (Self::AnyKubelet, Identity::Kubelet { .. })
            | (Self::NearSide, Identity::Kubelet { .. } | Identity::Ctl { .. }) => true,
            (Self::Exactly(expected), found) => expected == found,
            (Self::AnyAgent | Self::AnyKubelet, _) | (Self::NearSide, Identity::Agent { .. }) => {
                false
            }
        }
    }
}

impl fmt::Display for ExpectPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AnyAgent => write!(f, "{PREFIX}agent/…"),
            Self::AnyKubelet => write!(f, "{PREFIX}kubelet/…"),
            Self::NearSide => write!(f, "{PREFIX}kubelet/… or {PREFIX}ctl/…"),
            Self::Exactly(identity) => identity.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_are_parsed_and_written() {
        for uri in [
            "spiffe://knoc/agent/hpc.example",
            "spiffe://knoc/kubelet/k-1",
            "spiffe://knoc/ctl/ann",
        ] {
            assert_eq!(uri.parse::<Identity>().unwrap().to_string(), uri);
        }
        for bad in [
            "",
            "spiffe://knoc/agent/",
            "spiffe://knoc/admin/x",
            "spiffe://else/agent/x",
            "spiffe://knoc/agent/a/b",
        ] {
            bad.parse::<Identity>().unwrap_err();
        }
    }

    #[test]
    fn a_certificate_has_exactly_one_identity() {
        let (a, k) = ("spiffe://knoc/agent/a", "spiffe://knoc/kubelet/k");
        assert_eq!(Identity::one_of(&["https://x", a]).unwrap().name(), "a");
        assert_eq!(Identity::one_of(&[]), Err(InvalidIdentity::Absent));
        assert_eq!(
            Identity::one_of(&[a, k]),
            Err(InvalidIdentity::Several { count: 2 })
        );
    }

    #[test]
    fn only_expected_identities_are_accepted() {
        let agent = Identity::Agent { site: "a".into() };
        let ctl = Identity::Ctl { name: "a".into() };
        assert!(ExpectPeer::AnyAgent.accepts(&agent) && !ExpectPeer::AnyAgent.accepts(&ctl));
        assert!(ExpectPeer::NearSide.accepts(&ctl) && !ExpectPeer::NearSide.accepts(&agent));
        assert!(ExpectPeer::Exactly(agent.clone()).accepts(&agent));
        assert!(!ExpectPeer::Exactly(agent).accepts(&ctl));
    }
}
