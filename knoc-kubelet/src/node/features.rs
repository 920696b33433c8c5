//! PURE: what the node declares to the API server (`status.declaredFeatures`).

use k8s_openapi::apimachinery::pkg::version::Info;

/// The API server may hand WebSockets for exec, attach and port-forward on to us, instead of speaking SPDY for the client.
pub const WEBSOCKETS: &str = "ExtendWebSocketsToKubelet";
/// The first API server that reads it: 1.36.
const SINCE: (u32, u32) = (1, 36);

/// The features that are declared to an API server, sorted; older ones neither know the field nor ask.
#[must_use]
pub fn declared(websockets: bool, server: &Info) -> Vec<&'static str> {
    let new = version(server).is_some_and(|version| version >= SINCE);
    let features = [(WEBSOCKETS, websockets && new)];
    let declared = features
        .into_iter()
        .filter_map(|(name, on)| on.then_some(name));
    declared.collect()
}

/// Major and minor; the minor of some distributions ends with `+`.
fn version(info: &Info) -> Option<(u32, u32)> {
    let digits = |text: &str| {
        let end = text.find(|it: char| !it.is_ascii_digit());
        text.get(..end.unwrap_or(text.len()))?.parse().ok()
    };
    Some((digits(&info.major)?, digits(&info.minor)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(major: &str, minor: &str) -> Info {
        Info {
            major: major.to_owned(),
            minor: minor.to_owned(),
            ..Info::default()
        }
    }

    #[test]
    fn websockets_are_declared_from_1_36_on_and_only_where_wanted() {
        for (major, minor) in [("1", "36"), ("1", "36+"), ("1", "40"), ("2", "0")] {
            assert_eq!(declared(true, &info(major, minor)), [WEBSOCKETS], "{minor}");
            assert!(declared(false, &info(major, minor)).is_empty());
        }
        for (major, minor) in [("1", "35"), ("1", "9"), ("", ""), ("1", "x"), ("0", "99")] {
            assert!(declared(true, &info(major, minor)).is_empty(), "{minor}");
        }
    }
}
