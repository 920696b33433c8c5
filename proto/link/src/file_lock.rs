//! Locks of files, for which the processes of one user wait. Nobody waits for ever: one that holds a lock may hang, or be stopped.
//!
//! The lock ends when its file is closed, and so with the process.

use std::{
    fs::TryLockError,
    io,
    path::Path,
    time::{Duration, Instant},
};

/// How long a process waits for a lock. Work under one takes less than a second, on a slow file system a few.
const PATIENCE: Duration = Duration::from_secs(30);

/// How often it looks.
const LOOK: Duration = Duration::from_millis(20);

/// Waits until `attempt` locks the file or folder at `path`, at most for half a minute. `false` if there is no lock to be had, as on
/// a file system without locks. Blocking.
pub fn wait(path: &Path, attempt: &dyn Fn() -> Result<(), TryLockError>) -> io::Result<bool> {
    wait_for(PATIENCE, path, attempt)
}

#[expect(
    clippy::disallowed_methods,
    reason = "the callers block on file work in any case, and flock(2) has no time limit"
)]
fn wait_for(
    patience: Duration,
    path: &Path,
    attempt: &dyn Fn() -> Result<(), TryLockError>,
) -> io::Result<bool> {
    let began = Instant::now();
    loop {
        match attempt() {
            Ok(()) => return Ok(true),
            Err(TryLockError::Error(_)) => return Ok(false),
            Err(TryLockError::WouldBlock) if began.elapsed() < patience => std::thread::sleep(LOOK),
            Err(TryLockError::WouldBlock) => {
                let message = format!(
                    "another process has kept {} locked for {} s: find it with `fuser {0}`, end it, and try again",
                    path.display(),
                    patience.as_secs()
                );
                return Err(io::Error::new(io::ErrorKind::TimedOut, message));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, sync::mpsc};

    use super::*;

    #[test]
    fn a_lock_that_stays_taken_is_an_error_that_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let open = || File::open(path).unwrap();
        let (first, second) = (open(), open());
        assert!(wait(path, &|| first.try_lock()).unwrap());
        let error = wait_for(Duration::ZERO, path, &|| second.try_lock()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let wanted = format!("another process has kept {} locked", path.display());
        assert!(error.to_string().starts_with(&wanted), "{error}");
        drop(first);
        assert!(wait(path, &|| second.try_lock()).unwrap());
    }

    #[test]
    fn who_waits_gets_the_lock_when_it_is_free() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let (first, second) = (File::open(path).unwrap(), File::open(path).unwrap());
        first.lock().unwrap();
        let (looked, looks) = mpsc::sync_channel(1);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                wait(path, &|| {
                    looked.try_send(()).ok();
                    second.try_lock()
                })
            });
            looks.recv().unwrap();
            drop(first);
            assert!(waiting.join().unwrap().unwrap());
        });
    }

    #[test]
    fn without_locks_nobody_waits() {
        let none = || -> Result<(), TryLockError> {
            Err(TryLockError::Error(io::ErrorKind::Unsupported.into()))
        };
        assert!(!wait(Path::new("/x"), &none).unwrap());
    }
}
