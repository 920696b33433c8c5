//! PURE: what the node declares to the API server (`status.declaredFeatures`).

use super::release::Release;

/// The API server may hand WebSockets for exec, attach and port-forward on to us, instead of speaking SPDY for the client.
pub const WEBSOCKETS: &str = "ExtendWebSocketsToKubelet";
/// The first API server that reads it.
const SINCE: Release = Release::new(1, 36);

/// The features that are declared to an API server, sorted; older ones neither know the field nor ask.
#[must_use]
pub fn declared(websockets: bool, server: Release) -> Vec<&'static str> {
    let features = [(WEBSOCKETS, websockets && server >= SINCE)];
    let declared = features
        .into_iter()
        .filter_map(|(name, on)| on.then_some(name));
    declared.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn websockets_are_declared_from_1_36_on_and_only_where_wanted() {
        for (major, minor) in [(1, 36), (1, 40), (2, 0)] {
            let server = Release::new(major, minor);
            assert_eq!(declared(true, server), [WEBSOCKETS], "{minor}");
            assert!(declared(false, server).is_empty());
        }
        for (major, minor) in [(1, 35), (1, 9), (0, 99)] {
            let server = Release::new(major, minor);
            assert!(declared(true, server).is_empty(), "{minor}");
        }
    }
}
