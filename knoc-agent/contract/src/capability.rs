//! The capabilities that a shim lists in its reports. The agent checks them before it calls a shim,
//! since running jobs may have an older one.

/// The shim serves `Attach`.
pub const ATTACH: &str = "attach";
/// The shim serves `PortForward`.
pub const PORT_FORWARD: &str = "port-forward";
/// The shim serves `GetStats`.
pub const STATS: &str = "stats";
/// The shim continues a log at a position, and sends the first position at once.
pub const LOG_POSITIONS: &str = "log-positions";
/// The shim handles SIGUSR1 as the agent's request to stop the pod. An older shim would be killed
/// by the signal.
pub const STOP_SIGNAL: &str = "stop-signal";

/// The shim serves `WatchEgress` and `EgressStream`.
pub const EGRESS: &str = "egress";

/// The shim reads variables from files that containers write. Older shims reject all values with such a variable.
pub const ENV_FILES: &str = "env-files";

/// The shim serves `AddEphemeralContainer`.
pub const EPHEMERAL: &str = "ephemeral-containers";

/// The shim serves `UpdateImage`.
pub const IMAGE_UPDATES: &str = "image-updates";

/// The shim serves `JoinMesh`.
pub const MESH: &str = "mesh";

/// The shim runs commands in the ranks of a container other than the first one.
pub const EXEC_IN_RANKS: &str = "exec-in-ranks";

/// All capabilities of this version's shim.
pub const ALL: [&str; 11] = [
    ATTACH,
    EGRESS,
    ENV_FILES,
    EPHEMERAL,
    EXEC_IN_RANKS,
    IMAGE_UPDATES,
    LOG_POSITIONS,
    MESH,
    PORT_FORWARD,
    STATS,
    STOP_SIGNAL,
];
