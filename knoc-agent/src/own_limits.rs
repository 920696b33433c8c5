//! Raises the resource limits that the agent inherited from the shell or unit that started it.
//!
//! Login nodes limit the processor time, the file size and the memory of processes, which would end
//! the agent, or an image that it pulls. Soft limits are raised to the hard limits; a low hard
//! limit is logged. Jobs inherit none of them (`--propagate=NONE`); with the embedded scheduler,
//! the hard limits hold for the pods too, and nothing can change that.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Limits whose excess ends a process: the resource, its description, and the `ulimit` option that
/// shows it.
const ENDING: [(Resource, &str, &str); 4] = [
    (Resource::Cpu, "processor time, seconds", "ulimit -t"),
    (Resource::Fsize, "size of files, bytes", "ulimit -f"),
    (Resource::As, "address space, bytes", "ulimit -v"),
    (Resource::Data, "data segment, bytes", "ulimit -d"),
];

/// Called once, at the start of `serve`.
pub(crate) fn raise() {
    for (resource, what, command) in ENDING {
        let limit = getrlimit(resource);
        let raised = Rlimit {
            current: limit.maximum,
            ..limit
        };
        // A process may always raise its soft limit to the hard one.
        setrlimit(resource, raised).ok();
        if let Some(most) = limit.maximum {
            tracing::warn!(
                limit = what,
                most,
                "the agent was started under a hard limit that may end it or its image pulls: start it where \
                 `{command}` is unlimited"
            );
        }
    }
}
