//! PURE: the features that the Node declares to the API server (`status.declaredFeatures`).

use super::release::Release;

/// Lets the API server pass WebSockets for exec, attach and port-forward on to the kubelet, instead of translating to
/// SPDY.
pub const WEBSOCKETS: &str = "ExtendWebSocketsToKubelet";
/// Lets the scheduler place pods whose containers may all be restarted by the exit of one.
const RESTART_ALL: &str = "RestartAllContainersOnContainerExits";
/// The first API server that reads features.
const SINCE: Release = Release::new(1, 36);

/// The features to declare to an API server, sorted. API servers before 1.36 do not know the field.
#[must_use]
pub fn declared(websockets: bool, server: Release) -> Vec<&'static str> {
    let features = [(WEBSOCKETS, websockets), (RESTART_ALL, true)];
    let declared = features
        .into_iter()
        .filter_map(|(name, on)| (on && server >= SINCE).then_some(name));
    declared.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_declared_from_1_36_on_and_websockets_only_if_wanted() {
        for (major, minor) in [(1, 36), (1, 40), (2, 0)] {
            let server = Release::new(major, minor);
            assert_eq!(declared(true, server), [WEBSOCKETS, RESTART_ALL], "{minor}");
            assert_eq!(declared(false, server), [RESTART_ALL]);
        }
        for (major, minor) in [(1, 35), (1, 9), (0, 99)] {
            let server = Release::new(major, minor);
            assert!(declared(true, server).is_empty(), "{minor}");
        }
    }
}
