//! `kubectl logs -f`: the time from when the program writes a line until a client of the API server has it. Program and
//! client have the same clock, because the nodes are namespaces of this machine.

use std::time::Duration;

use futures::{AsyncBufReadExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, LogParams};

use super::bed::Bed;
use super::stats::{Series, now, span};
use crate::PodBuilder;

/// The time limit for one start.
const SOON: Duration = Duration::from_mins(1);

/// The pause between two lines in milliseconds: long enough that the follower is idle and has to be woken for each line.
const PAUSE: &str = "50";

/// Follows `lines` lines as they are written.
pub(super) async fn measure(bed: &Bed, lines: usize) -> anyhow::Result<Series> {
    // Lines that were written before the follower was connected do not count.
    let times = (2 * lines).to_string();
    let pod = PodBuilder::new("follow")
        .image(&Bed::image_path())
        .command(["/knoc-stamp", PAUSE, &times]);
    bed.world.create(&pod).await?;
    bed.world.wait_phase("follow", "Running", SOON).await?;
    let pods: Api<Pod> = bed.world.api();
    let what = LogParams {
        follow: true,
        ..LogParams::default()
    };
    let mut seen = pods.log_stream("follow", &what).await?.lines();
    let mut series = Series::default();
    let mut there = None;
    while let Some(line) = seen.try_next().await? {
        let now = now();
        let written = line.split_once(' ').and_then(|(_, time)| time.parse().ok());
        let since = *there.get_or_insert(now);
        match written {
            Some(written) if written > since => series.push(span(written, now)),
            Some(_) => {}
            None => anyhow::bail!("no stamp in {line:?}"),
        }
        if series.count() == lines {
            break;
        }
    }
    anyhow::ensure!(
        series.count() > lines / 2,
        "{} lines were followed",
        series.count()
    );
    bed.world.delete("follow", Some(0)).await?;
    bed.world.wait_gone("follow", SOON).await?;
    Ok(series)
}
