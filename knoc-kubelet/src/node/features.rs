//! PURE: the features that the Node declares to the API server (`status.declaredFeatures`).

use super::release::Release;

/// Lets the API server pass WebSockets for exec, attach and port-forward on to the kubelet, instead of translating to
/// SPDY.
pub const WEBSOCKETS: &str = "ExtendWebSocketsToKubelet";
/// The first API server that reads the feature.
const SINCE: Release = Release::new(1, 36);

/// The features to declare to an API server, sorted. API servers before 1.36 do not know the field.
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
    fn websockets_are_declared_from_1_36_on_and_only_if_wanted() {
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
