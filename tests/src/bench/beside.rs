//! How long a status takes while `kubectl cp` runs at full speed, while the same bytes go through as many bare relays, and without
//! either, alternately. Control and bulk traffic use separate connections, so the copy should delay a status hardly more than its use of
//! the processors does, which the relays show.

use std::{cell::Cell, time::Duration};

use anyhow::Context as _;

use super::bed::{Bed, FOLDER};
use super::kubernetes;
use super::pods::Batch;
use super::relay::Chain;
use super::streams::ALL;
use crate::{PodBuilder, wait_for};

/// The time limit for the pod from which is copied.
const READY: Duration = Duration::from_mins(5);

/// Pods at once: few, so that their own starts do not fill the machine.
const PODS: usize = 4;

/// The size of the file that is copied over and over.
const BYTES: u64 = 1 << 30;

/// T3 of pods, without and beside a copy, and beside the relays.
#[derive(Debug, Default)]
pub(super) struct Beside {
    pub(super) alone: Batch,
    pub(super) copying: Batch,
    /// Beside the floor of the copy.
    pub(super) relaying: Batch,
    /// Files that were copied completely during the rounds, and those that went through the relays.
    pub(super) copies: usize,
    pub(super) relayed: usize,
}

/// Creates the pod from which is copied, with its file.
async fn source(bed: &Bed) -> anyhow::Result<()> {
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
    .await
}

/// Measures `rounds` rounds of each kind.
pub(super) async fn measure(bed: &Bed, rounds: usize) -> anyhow::Result<Beside> {
    source(bed).await?;
    // In memory: client and compute nodes share a disk here, and a container's end waits until it has written everything (Apptainer calls
    // syncfs(2) for the file system of the overlay).
    let folder = tempfile::tempdir_in("/dev/shm")?;
    let local = folder.path().display().to_string();
    let target = format!("{local}/large");
    let produce = format!(
        "mkdir -p {FOLDER} && cd {FOLDER} && head -c {BYTES} /dev/zero >large && sync large"
    );
    bed.shell("login", &produce).ok().await?;
    let far = format!("program=tar -cf - -C {FOLDER} large");
    let chain = Chain::start(bed, ALL, far).await?;
    let near = ["tar", "-xf", "-", "-C", &local].map(str::to_owned);
    let mut beside = Beside {
        alone: Batch::new(PODS),
        copying: Batch::new(PODS),
        relaying: Batch::new(PODS),
        ..Beside::default()
    };
    let Beside {
        alone,
        copying,
        relaying,
        copies,
        relayed,
    } = &mut beside;
    for round in 1..=rounds {
        let measured = alone.measure(bed, round).await;
        measured.context("without a copy")?;
        let copy_again = async {
            loop {
                if let Err(error) = kubernetes::copy(bed, "beside:/data/large", &target).await {
                    return error;
                }
                *copies += 1;
            }
        };
        tokio::select! {
            measured = copying.measure(bed, round) => measured.context("beside a copy")?,
            error = copy_again => return Err(error.context("the copy")),
        }
        // A relay ends with a connection that breaks, so the last one is not dropped.
        let over = Cell::new(false);
        let pods = async {
            let measured = relaying.measure(bed, round).await;
            over.set(true);
            measured.context("beside the relays")
        };
        let relays = async {
            while !over.get() {
                chain.run(&near).await.context("the relays")?;
                *relayed += 1;
            }
            Ok(())
        };
        tokio::try_join!(pods, relays)?;
    }
    bed.world.delete("beside", Some(0)).await?;
    bed.world.wait_gone("beside", READY).await?;
    Ok(beside)
}
