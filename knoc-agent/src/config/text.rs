//! Parses durations, sizes and addresses of the site file, and has some defaults.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};

use serde::{Deserialize as _, Deserializer, de::Error as _};

/// Parses `"90s"`, `"10m"`, `"1h 30m"`.
pub(super) fn duration<'de, D: Deserializer<'de>>(input: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(input)?;
    let parsed: jiff::SignedDuration = text.parse().map_err(|error| {
        D::Error::custom(format!(
            "{text:?} is not a duration such as \"90s\" or \"10m\": {error}"
        ))
    })?;
    Duration::try_from(parsed).map_err(|_| D::Error::custom(format!("{text:?} is negative")))
}

/// Parses `"64GiB"`, `"500MiB"`, or a number of bytes.
pub(super) fn size<'de, D: Deserializer<'de>>(input: D) -> Result<u64, D::Error> {
    #[derive(serde::Deserialize)]
    #[serde(untagged, expecting = "a size such as \"64GiB\", or a number of bytes")]
    enum Size {
        Bytes(u64),
        Text(String),
    }
    let text = match Size::deserialize(input)? {
        Size::Bytes(bytes) => return Ok(bytes),
        Size::Text(text) => text,
    };
    let units = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)];
    let size = units.into_iter().find_map(|(unit, bits)| {
        let number: u64 = text.strip_suffix(unit)?.trim_end().parse().ok()?;
        number.checked_mul(1 << bits)
    });
    size.ok_or_else(|| {
        D::Error::custom(format!(
            "{text:?} is not a size such as \"500MiB\" or \"64GiB\" (KiB, MiB, GiB, TiB)"
        ))
    })
}

/// Parses `"0.0.0.0:10350"`.
pub(super) fn address<'de, D: Deserializer<'de>>(input: D) -> Result<SocketAddr, D::Error> {
    let text = String::deserialize(input)?;
    text.parse().map_err(|_| {
        D::Error::custom(format!(
            "{text:?} is not an IP address with a port such as \"0.0.0.0:10350\" or \"[::]:10350\""
        ))
    })
}

/// Reads `"0.0.0.0:10350"`, or `"none"`.
pub(super) fn address_or_none<'de, D: Deserializer<'de>>(
    input: D,
) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(input)?;
    if text == "none" {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| {
        D::Error::custom(format!(
            "{text:?} is neither an IP address with a port such as \"0.0.0.0:10350\" or \"[::]:10350\", nor \"none\""
        ))
    })
}

/// The default mapping of extended resources.
pub(crate) fn gres() -> BTreeMap<String, String> {
    BTreeMap::from([("nvidia.com/gpu".to_owned(), "gpu".to_owned())])
}

/// The default state directory, before `~` is expanded.
pub(super) fn state_dir() -> PathBuf {
    PathBuf::from(knoc_link::socket::DEFAULT_STATE_DIR)
}
