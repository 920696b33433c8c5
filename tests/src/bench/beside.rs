//! How long a status takes while `kubectl cp` runs at full speed, and without it, alternately. Control and bulk traffic use
//! separate connections, so the copy should delay a status hardly more than its use of the processors does.

use std::time::Duration;

use anyhow::Context as _;

use super::bed::Bed;
use super::kubernetes;
use super::pods::Batch;
use crate::{PodBuilder, wait_for};

/// The time limit for the pod from which is copied.
const READY: Duration = Duration::from_mins(5);

/// Pods at once: few, so that their own starts do not fill the machine.
const PODS: usize = 4;

/// The size of the file that is copied over and over.
const BYTES: u64 = 1 << 30;

/// T3 of pods, without and beside a copy.
#[derive(Debug, Default)]
pub(super) struct Beside {
    pub(super) alone: Batch,
    pub(super) copying: Batch,
    /// Files that were copied completely during the rounds.
    pub(super) copies: usize,
}

/// Measures `rounds` rounds of each kind.
pub(super) async fn measure(bed: &Bed, rounds: usize) -> anyhow::Result<Beside> {
    let source = PodBuilder::new("beside")
        .image(&Bed::image_path())
        .memory("2Gi")
        .empty_dir("/data")
        .sh(&format!(
            "head -c {BYTES} /dev/zero >/data/new; sync; mv /data/new /data/large; exec sleep 36000"
        ));
    bed.world.create(&source).await?;
    bed.world.wait_phase("beside", "Running", READY).await?;
    wait_for("the file is there", READY, async || match kubernetes::size(
        bed,
        "beside",
        "/data/large",
    )
    .await
    {
        Ok(BYTES) => Ok(()),
        Ok(size) => Err(format!("{size} of {BYTES} bytes")),
        Err(error) => Err(format!("{error:#}")),
    })
    .await?;
    // In memory: client and compute nodes share a disk here, and a container's end waits until it has written everything (Apptainer calls
    // syncfs(2) for the file system of the overlay).
    let folder = tempfile::tempdir_in("/dev/shm")?;
    let target = folder.path().join("large").display().to_string();
    let (mut alone, mut copying) = (Batch::new(PODS), Batch::new(PODS));
    let mut copies = 0;
    for round in 1..=rounds {
        alone.measure(bed, round).await.context("without a copy")?;
        let copy_again = async {
            loop {
                if let Err(error) = kubernetes::copy(bed, "beside:/data/large", &target).await {
                    return error;
                }
                copies += 1;
            }
        };
        tokio::select! {
            measured = copying.measure(bed, round) => measured.context("beside a copy")?,
            error = copy_again => return Err(error.context("the copy")),
        }
    }
    bed.world.delete("beside", Some(0)).await?;
    bed.world.wait_gone("beside", READY).await?;
    Ok(Beside {
        alone,
        copying,
        copies,
    })
}
