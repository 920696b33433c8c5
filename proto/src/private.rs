//! Protects the memory of a process, which may hold private keys, tokens and the Secrets of pods.

use std::io;

use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit,
};

/// Makes this process non-dumpable (`PR_SET_DUMPABLE`, prctl(2)) and sets its soft core limit to 0. Then no other
/// process of the user can attach to it or read its memory through `/proc`, and a crash leaves no core file. Every
/// program of KNoC calls this first.
///
/// execve(2) resets the former, and children inherit the latter: before a process executes a program that is not ours,
/// it raises the soft limit again, which the hard limit allows.
pub fn keep_memory_private() -> io::Result<()> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let limit = getrlimit(Resource::Core);
    let none = Rlimit {
        current: Some(0),
        ..limit
    };
    Ok(setrlimit(Resource::Core, none)?)
}

/// Runs `work` while the process is dumpable. While it is not, root owns the files of `/proc/self` that map the ids of
/// a new user namespace, and newuidmap(1) refuses a process of another user. Only for a helper process that holds no
/// secret yet, or only those of the program that it becomes at once.
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
    fn the_process_is_not_dumpable_and_leaves_no_core_file_but_its_children_may() {
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
