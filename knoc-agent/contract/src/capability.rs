//! The capabilities that a shim names in its reports: what an older shim cannot do, so that the agent asks first.

/// It serves `Attach`.
pub const ATTACH: &str = "attach";
/// It serves `PortForward`.
pub const PORT_FORWARD: &str = "port-forward";
/// It serves `GetStats`.
pub const STATS: &str = "stats";
/// It takes SIGUSR1 for the agent's request to stop. An older shim would be ended by the signal.
pub const STOP_SIGNAL: &str = "stop-signal";

/// All capabilities of this version's shim.
pub const ALL: [&str; 4] = [ATTACH, PORT_FORWARD, STATS, STOP_SIGNAL];
