//! Checks host paths for admission, off the runtime's threads.
//!
//! A shared file system may hang. Therefore each look-up runs on a blocking thread, its caller
//! waits until a deadline, and only a few look-ups run at the same time, so that a hanging file
//! system blocks only a few threads.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use knoc_proto::{error::chain, pb, reason::ErrorReason};
use tokio::sync::Semaphore;
use tonic::Status;

/// The number of concurrent look-ups. Each one blocks a thread until the file system answers.
const AT_ONCE: usize = 4;
/// A healthy file system answers within milliseconds.
const DEADLINE: Duration = Duration::from_secs(5);

/// The look-ups of one agent.
#[derive(Debug)]
pub(super) struct HostPaths {
    permits: Arc<Semaphore>,
    deadline: Duration,
}

impl Default for HostPaths {
    fn default() -> Self {
        Self {
            permits: Arc::new(Semaphore::new(AT_ONCE)),
            deadline: DEADLINE,
        }
    }
}

impl HostPaths {
    /// The host paths among `volumes` that are outside `roots`, one sentence for each. Without host
    /// paths, no file system is touched.
    ///
    /// # Errors
    ///
    /// The file system did not answer in time. The same request may succeed later.
    pub(super) async fn outside(
        &self,
        volumes: &[pb::Volume],
        roots: &[PathBuf],
    ) -> Result<Vec<String>, Status> {
        let volumes: Vec<_> = volumes
            .iter()
            .filter(|volume| is_host_path(volume))
            .cloned()
            .collect();
        if volumes.is_empty() {
            return Ok(Vec::new());
        }
        let roots = roots.to_vec();
        self.look_up(move || outside(&volumes, &roots)).await
    }

    /// Runs `work` on a blocking thread. The permit is returned only when the work has ended, even
    /// after the deadline.
    async fn look_up<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Status> {
        let permits = Arc::clone(&self.permits);
        let looked = tokio::time::timeout(self.deadline, async move {
            let permit = permits.acquire_owned().await;
            let done = tokio::task::spawn_blocking(move || {
                let found = work();
                drop(permit);
                found
            });
            done.await
        });
        match looked.await {
            Ok(Ok(found)) => Ok(found),
            Ok(Err(error)) => {
                let message = format!("look up host paths: {}", chain(&error));
                Err(ErrorReason::Internal.status(message))
            }
            Err(_) => {
                let message = format!(
                    "look up host paths: the file system did not answer within {:?}",
                    self.deadline
                );
                Err(ErrorReason::Internal.status(message))
            }
        }
    }
}

fn is_host_path(volume: &pb::Volume) -> bool {
    matches!(volume.source, Some(pb::volume::Source::HostPath(_)))
}

/// The host paths outside the site's roots, one sentence for each. Links are followed: the place
/// that a path leads to counts.
fn outside(volumes: &[pb::Volume], roots: &[PathBuf]) -> Vec<String> {
    let canonical = |path: &Path| std::fs::canonicalize(path).ok();
    let roots: Vec<PathBuf> = roots.iter().filter_map(|root| canonical(root)).collect();
    let problem = |volume: &pb::Volume| {
        let Some(pb::volume::Source::HostPath(host)) = &volume.source else {
            return None;
        };
        let inside = canonical(Path::new(&host.path))
            .is_some_and(|path| roots.iter().any(|root| path.starts_with(root)));
        (!inside).then(|| {
            let (name, path) = (&volume.name, &host.path);
            format!("volume {name:?}: {path:?} is not under host_paths of the site file")
        })
    };
    volumes.iter().filter_map(problem).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_paths_stay_under_the_sites_roots() {
        let folder = tempfile::tempdir().unwrap();
        let (root, other) = (folder.path().join("root"), folder.path().join("other"));
        std::fs::create_dir_all(root.join("data")).unwrap();
        std::fs::create_dir_all(&other).unwrap();
        std::os::unix::fs::symlink(&other, root.join("out")).unwrap();
        let problems = |path: &Path, roots: &[PathBuf]| {
            let path = path.display().to_string();
            let source = pb::volume::Source::HostPath(pb::HostPath { path });
            let volume = pb::Volume {
                name: "v".to_owned(),
                source: Some(source),
            };
            outside(&[volume], roots).len()
        };
        let roots = [root.clone()];
        assert_eq!(problems(&root.join("data"), &roots), 0);
        assert_eq!(problems(&root.join("data"), &[]), 1, "no roots, no paths");
        assert_eq!(
            problems(&root.join("out"), &roots),
            1,
            "a link that leads out"
        );
        assert_eq!(problems(&root.join("../other"), &roots), 1);
        assert_eq!(problems(&root.join("nothing"), &roots), 1);
    }

    #[tokio::test]
    async fn a_file_system_that_hangs_delays_an_answer_and_holds_few_threads() {
        let lookups = HostPaths {
            deadline: Duration::from_millis(50),
            ..HostPaths::default()
        };
        let (release, held) = std::sync::mpsc::channel::<()>();
        let held = Arc::new(std::sync::Mutex::new(held));
        for _ in 0..AT_ONCE {
            let held = Arc::clone(&held);
            let hangs = move || drop(held.lock().map(|held| held.recv()));
            let late = lookups.look_up(hangs).await.unwrap_err();
            assert!(late.message().contains("did not answer"), "{late}");
        }
        assert_eq!(lookups.permits.available_permits(), 0);
        lookups.look_up(|| ()).await.unwrap_err();
        drop(release);
        let all = u32::try_from(AT_ONCE).unwrap();
        drop(lookups.permits.acquire_many(all).await.unwrap());
        lookups.look_up(|| ()).await.unwrap();
    }
}
