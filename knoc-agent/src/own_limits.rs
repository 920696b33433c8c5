//! The limits under which the agent itself runs: those of the shell or unit that started it.
//!
//! Login nodes bound the processor time and the size of files of what runs on them, which would end the agent, or an
//! image that it pulls, with a signal. Soft limits are raised; a hard one is named in the log. Jobs get none of them
//! (`--propagate=NONE`); with the embedded scheduler a hard one holds for the pods too, and nothing can change that.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What ends a process that passes it, with its name for people.
const ENDING: [(Resource, &str, &str); 2] = [
    (Resource::Cpu, "processor time, seconds", "ulimit -t"),
    (Resource::Fsize, "size of files, bytes", "ulimit -f"),
];

/// Once, at the start of `serve`.
pub(crate) fn raise() {
    for (resource, what, command) in ENDING {
        let limit = getrlimit(resource);
        let raised = Rlimit {
            current: limit.maximum,
            ..limit
        };
        // Up to the hard limit nobody is refused.
        setrlimit(resource, raised).ok();
        if let Some(most) = limit.maximum {
            tracing::warn!(
                limit = what,
                most,
                "the agent was started under a hard limit that will end it or its image pulls: start it where \
                 `{command}` is unlimited"
            );
        }
    }
}
