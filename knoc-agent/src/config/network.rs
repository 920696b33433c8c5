//! `job.network` of the site file: the network of pods that ask for none.

use knoc_proto::pb::NetworkMode;
use serde::Deserialize;

/// The network of pods that ask for none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkSetting {
    /// One of their own if the compute node can do it, else the node's.
    #[default]
    Auto,
    /// One of their own. A pod fails on a node that cannot do it.
    Private,
    /// The compute node's.
    Host,
}

impl From<NetworkSetting> for NetworkMode {
    fn from(setting: NetworkSetting) -> Self {
        match setting {
            NetworkSetting::Auto => Self::Auto,
            NetworkSetting::Private => Self::Private,
            NetworkSetting::Host => Self::Host,
        }
    }
}
