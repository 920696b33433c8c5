//! Facts about the host that the agent and the shim must report identically.

/// This host's name, as `uname -n` prints it.
#[must_use]
pub fn node_name() -> String {
    rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned()
}
