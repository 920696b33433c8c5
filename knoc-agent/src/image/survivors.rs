//! Ends conversions that outlive an agent which was killed: nobody waits for them, and they would write on in the folders of
//! pulls, beside the limit of the cache.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Kills the processes of this user on this host that run in a folder below `temporary`. Blocking.
pub(super) fn end(temporary: &Path) {
    // The kernel shows where a folder really is.
    let (Ok(temporary), Ok(processes)) = (temporary.canonicalize(), fs::read_dir("/proc")) else {
        return;
    };
    for process in processes.flatten() {
        let Some(pid) = pid(&process.path(), &temporary) else {
            continue;
        };
        if kill(Pid::from_raw(pid), Signal::SIGKILL).is_ok() {
            tracing::info!(
                pid,
                "ended a conversion that an earlier agent had left behind"
            );
        }
    }
}

/// The id of the process, if it runs in a folder below `temporary`.
fn pid(process: &Path, temporary: &Path) -> Option<i32> {
    let pid = process.file_name()?.to_str()?.parse().ok()?;
    // Those of other users are not shown.
    let folder: PathBuf = fs::read_link(process.join("cwd")).ok()?;
    (folder.starts_with(temporary) && folder != temporary).then_some(pid)
}
