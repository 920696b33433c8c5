//! How values of the site file are written: durations, addresses, defaults.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};

use serde::{Deserialize as _, Deserializer, de::Error as _};

/// Reads `"90s"`, `"10m"`, `"1h 30m"`.
pub(super) fn duration<'de, D: Deserializer<'de>>(input: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(input)?;
    let parsed: jiff::SignedDuration = text.parse().map_err(|error| {
        D::Error::custom(format!(
            "{text:?} is no duration such as \"90s\" or \"10m\": {error}"
        ))
    })?;
    Duration::try_from(parsed).map_err(|_| D::Error::custom(format!("{text:?} is negative")))
}

/// Reads `"0.0.0.0:10350"`.
pub(super) fn address<'de, D: Deserializer<'de>>(input: D) -> Result<SocketAddr, D::Error> {
    let text = String::deserialize(input)?;
    text.parse().map_err(|_| {
        D::Error::custom(format!(
            "{text:?} is no IP address with a port such as \"0.0.0.0:10350\" or \"[::]:10350\""
        ))
    })
}

/// What extended resources are at a plain site.
pub(crate) fn gres() -> BTreeMap<String, String> {
    BTreeMap::from([("nvidia.com/gpu".to_owned(), "gpu".to_owned())])
}

/// The default state directory, before `~` is expanded.
pub(super) fn state_dir() -> PathBuf {
    PathBuf::from(knoc_proto::link::socket::DEFAULT_STATE_DIR)
}
