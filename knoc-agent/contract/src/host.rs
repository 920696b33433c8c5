//! Facts of the host that the agent and the shim must state in the same way.

/// The host's own name, as `uname -n` prints it.
#[must_use]
pub fn node_name() -> String {
    rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned()
}
