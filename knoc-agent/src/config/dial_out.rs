//! `[[dial_out]]`: kubelets that the agent dials because they cannot dial it.

use std::path::{Path, PathBuf};

use knoc_link::{
    Carrier, ExpectPeer, Identity,
    dial_out::Target,
    proxy::{InvalidProxy, Via},
};
use serde::Deserialize;

/// The most entries: more kubelets than any agent serves.
pub(super) const MOST: usize = 16;

/// One kubelet, or a load balancer or an Ingress in front of it that passes TLS through.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DialOut {
    /// `HOST:PORT`. It has no default.
    #[serde(default)]
    pub address: String,
    /// The host name that is sent in the TLS handshake; unset: the host of `address`.
    #[serde(default)]
    pub server_name: Option<String>,
    /// The name in the kubelet's certificate; unset: any kubelet of the CA.
    #[serde(default)]
    pub kubelet: Option<String>,
    /// `http://HOST:PORT` of a proxy, or `none`; if not set, the environment decides.
    #[serde(default)]
    pub proxy: Option<String>,
    /// A file with `user:password` for that proxy.
    #[serde(default)]
    pub proxy_credentials: Option<PathBuf>,
}

impl DialOut {
    /// The configured choice of a proxy.
    pub fn via(&self) -> Result<Via, InvalidProxy> {
        Via::of_settings(self.proxy.as_deref(), self.proxy_credentials.as_deref())
    }

    /// The peer that is expected there; `None` if `kubelet` is not a valid name.
    #[must_use]
    pub fn expect(&self) -> Option<ExpectPeer> {
        let Some(name) = &self.kubelet else {
            return Some(ExpectPeer::AnyKubelet);
        };
        let identity: Identity = format!("spiffe://knoc/kubelet/{name}").parse().ok()?;
        Some(ExpectPeer::Exactly(identity))
    }

    pub(super) fn expand(&mut self, home: &Path) {
        if let Some(path) = &mut self.proxy_credentials
            && let Ok(rest) = path.strip_prefix("~")
        {
            *path = home.join(rest);
        }
    }

    /// Each mistake: the name of the setting, and what is wrong with it.
    pub(super) fn mistakes(&self) -> Vec<(&'static str, String)> {
        let mut wrong = Vec::new();
        match self.address.parse() {
            _ if self.address.is_empty() => {
                wrong.push(("address", "is missing: HOST:PORT of the kubelet".to_owned()));
            }
            Ok(Carrier::Tcp(_)) => {}
            Ok(_) => wrong.push(("address", format!("{:?} is not HOST:PORT", self.address))),
            Err(error) => wrong.push(("address", error.to_string())),
        }
        if let Some(name) = &self.server_name
            && !Target::is_server_name(name)
        {
            wrong.push(("server_name", format!("{name:?} is not a host name")));
        }
        if self.expect().is_none() {
            let what = "must be the name in the kubelet's certificate, such as \"knoc-site\"";
            wrong.push(("kubelet", what.to_owned()));
        }
        match self.via() {
            Ok(_) => {}
            Err(error @ InvalidProxy::NeedlessCredentials) => {
                wrong.push(("proxy_credentials", error.to_string()));
            }
            Err(error) => wrong.push(("proxy", error.to_string())),
        }
        if let Some(path) = self.proxy_credentials.as_ref().filter(|p| !p.is_absolute()) {
            let what = format!("must be absolute or begin with `~/`: {path:?}");
            wrong.push(("proxy_credentials", what));
        }
        wrong
    }
}
