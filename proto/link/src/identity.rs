//! Who a peer is: a URI SAN of its certificate, and whom the other side expects.
//!
//! Pure.
use std::{fmt, str::FromStr};

/// The trust domain all identities begin with.
const PREFIX: &str = "spiffe://knoc/";

/// A peer's identity.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Identity {
    /// The agent of a site.
    Agent {
        /// The site's name.
        site: String,
    },
    /// A kubelet.
    Kubelet {
        /// Its name, usually the node's.
        name: String,
    },
    /// A person's knocctl.
    Ctl {
        /// The person's name.
        name: String,
    },
}

/// Why a text or a certificate gives no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidIdentity {
    /// Not one of the three forms.
    #[error(
        "{uri:?} is not spiffe://knoc/agent/SITE, spiffe://knoc/kubelet/NAME or spiffe://knoc/ctl/NAME"
    )]
    Form {
        /// As given.
        uri: String,
    },
    /// The certificate has no such URI.
    #[error("no spiffe://knoc/… URI among the subject alternative names")]
    Absent,
    /// The certificate has several.
    #[error("{count} spiffe://knoc/… URIs among the subject alternative names, not one")]
    Several {
        /// How many.
        count: usize,
    },
}

impl Identity {
    /// The last part: the site or the name.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Agent { site: name } | Self::Kubelet { name } | Self::Ctl { name } => name,
        }
    }

    /// The only identity among the URIs of a certificate.
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

/// Whom one side accepts at the other end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExpectPeer {
    /// The agent of any site: what kubelet and knocctl expect where no site is configured.
    AnyAgent,
    /// Any kubelet: what an agent expects that dials out; its policy then looks at the name.
    AnyKubelet,
    /// A kubelet or a knocctl: what the agent expects; its policy then looks at the name.
    NearSide,
    /// This one only.
    Exactly(Identity),
}

impl ExpectPeer {
    /// Is `identity` the one that is expected?
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
    fn there_and_back() {
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
    fn one_identity_a_certificate() {
        let (a, k) = ("spiffe://knoc/agent/a", "spiffe://knoc/kubelet/k");
        assert_eq!(Identity::one_of(&["https://x", a]).unwrap().name(), "a");
        assert_eq!(Identity::one_of(&[]), Err(InvalidIdentity::Absent));
        assert_eq!(
            Identity::one_of(&[a, k]),
            Err(InvalidIdentity::Several { count: 2 })
        );
    }

    #[test]
    fn expectations() {
        let agent = Identity::Agent { site: "a".into() };
        let ctl = Identity::Ctl { name: "a".into() };
        assert!(ExpectPeer::AnyAgent.accepts(&agent) && !ExpectPeer::AnyAgent.accepts(&ctl));
        assert!(ExpectPeer::NearSide.accepts(&ctl) && !ExpectPeer::NearSide.accepts(&agent));
        assert!(ExpectPeer::Exactly(agent.clone()).accepts(&agent));
        assert!(!ExpectPeer::Exactly(agent).accepts(&ctl));
    }
}
