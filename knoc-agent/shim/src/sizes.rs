//! Task: measures the `emptyDir` volumes that have a size limit, and ends the pod if one exceeds it, as a kubelet evicts it.
//!
//! A volume with more files than can be counted in [`DEADLINE`] is counted less often, and its limit is enforced only if those that
//! were counted exceed it.

use std::time::{Duration, Instant};

use knoc_contract::tree_size;
use knoc_proto::pb::EndedBy;
use tokio::sync::mpsc;

use super::{supervisor::Command, volumes::Limit};

/// Between two measurements; a kubelet's is the same.
const PERIOD: Duration = Duration::from_secs(10);
/// How long the measurement of one volume may take.
const DEADLINE: Duration = Duration::from_secs(5);
/// The pause after a measurement is at least this many times as long as the measurement took.
const REST: u32 = 20;
/// The grace period of an eviction, as in a kubelet.
const GRACE: Duration = Duration::from_secs(1);

/// Measures until a limit is exceeded; ends with the supervisor.
pub(super) async fn watch(limits: Vec<Limit>, commands: mpsc::Sender<Command>) {
    if limits.is_empty() {
        return;
    }
    let mut warned = false;
    let mut pause = PERIOD;
    loop {
        tokio::select! {
            biased;
            () = commands.closed() => return,
            () = tokio::time::sleep(pause) => {}
        }
        let began = Instant::now();
        for limit in &limits {
            match measure(limit.clone()).await {
                Ok(bytes) if bytes > limit.bytes => return evict(limit, &commands).await,
                Err(error) if !warned => {
                    warned = true;
                    tracing::warn!(
                        volume = limit.volume,
                        "its size could not be measured: {error}"
                    );
                }
                Ok(_) | Err(_) => {}
            }
        }
        pause = PERIOD.max(began.elapsed().saturating_mul(REST));
    }
}

async fn measure(limit: Limit) -> Result<u64, String> {
    let measured = tokio::task::spawn_blocking(move || {
        tree_size::size_until(&limit.path, limit.bytes, Instant::now() + DEADLINE)
    });
    let measured = measured.await.map_err(|error| error.to_string())?;
    measured.map_err(|error| error.to_string())
}

async fn evict(limit: &Limit, commands: &mpsc::Sender<Command>) {
    let stop = Command::Stop {
        grace: GRACE,
        by: EndedBy::Evicted,
        reason: message(limit),
    };
    // If the supervisor has ended there is nothing to evict.
    commands.send(stop).await.ok();
}

/// A kubelet's message.
fn message(limit: &Limit) -> String {
    let Limit { volume, bytes, .. } = limit;
    let bytes = quantity(*bytes);
    format!("Usage of EmptyDir volume \"{volume}\" exceeds the limit \"{bytes}\". ")
}

/// PURE: bytes in Kubernetes' binary units, if they are whole.
fn quantity(bytes: u64) -> String {
    let units = [(40, "Ti"), (30, "Gi"), (20, "Mi"), (10, "Ki")];
    let unit = units
        .into_iter()
        .find(|(shift, _)| bytes > 0 && bytes.trailing_zeros() >= *shift);
    unit.map_or_else(
        || bytes.to_string(),
        |(shift, unit)| format!("{}{unit}", bytes >> shift),
    )
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "files of the test's own")]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_shown_as_it_is_usually_written() {
        for (bytes, text) in [
            (0, "0"),
            (1000, "1000"),
            (1 << 10, "1Ki"),
            (5 << 20, "5Mi"),
            ((1 << 30) + 1, "1073741825"),
            (3 << 40, "3Ti"),
        ] {
            assert_eq!(quantity(bytes), text);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_volume_that_exceeds_its_limit_is_named() {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        std::fs::write(folders[1].path().join("file"), vec![1; 2 << 20]).unwrap();
        let limit = |volume: &str, at: usize, bytes| Limit {
            volume: volume.to_owned(),
            path: folders[at].path().to_owned(),
            bytes,
        };
        let (commands, mut orders) = mpsc::channel(1);
        let limits = vec![
            limit("empty", 0, 1 << 20),
            limit("roomy", 1, 4 << 20),
            limit("full", 1, 1 << 20),
        ];
        watch(limits, commands).await;
        let Some(Command::Stop { by, reason, .. }) = orders.recv().await else {
            unreachable!("it ends the pod");
        };
        assert_eq!(by, EndedBy::Evicted);
        let wanted = "Usage of EmptyDir volume \"full\" exceeds the limit \"1Mi\". ";
        assert_eq!(reason, wanted);
    }
}
