//! Keeps what a process holds in memory to itself: private keys, tokens, the Secrets of pods.

use std::io;

use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit,
};

/// Makes this process non-dumpable and sets its soft core limit to 0, so that no other process of the user can attach to
/// it or read its memory through `/proc`, and a crash leaves no core file. Every program of ours calls it first of all.
///
/// `execve(2)` undoes the former, and children inherit the latter: whoever becomes a program that is not ours raises the
/// limit again, which the hard limit allows.
pub fn keep_memory_private() -> io::Result<()> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let limit = getrlimit(Resource::Core);
    let none = Rlimit {
        current: Some(0),
        ..limit
    };
    Ok(setrlimit(Resource::Core, none)?)
}

/// Does `work` while the process is dumpable. The files of `/proc/self` that map the ids of a new user namespace belong to
/// root while it is not, and `newuidmap(1)` refuses another user's process. Only for a helper that holds no secret yet.
pub fn while_dumpable<T>(work: impl FnOnce() -> T) -> io::Result<T> {
    set_dumpable_behavior(DumpableBehavior::Dumpable)?;
    let done = work();
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    Ok(done)
}

#[cfg(test)]
mod tests {
    use rustix::process::dumpable_behavior;

    use super::*;

    #[test]
    fn the_process_is_not_dumpable_and_dumps_no_core_but_its_children_may() {
        let before = getrlimit(Resource::Core);
        keep_memory_private().unwrap();
        assert_eq!(dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable);
        let after = getrlimit(Resource::Core);
        assert_eq!((after.current, after.maximum), (Some(0), before.maximum));
        let meanwhile = while_dumpable(|| dumpable_behavior().unwrap()).unwrap();
        assert_eq!(meanwhile, DumpableBehavior::Dumpable);
        assert_eq!(dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable);
    }
}
