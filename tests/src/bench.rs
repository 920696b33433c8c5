//! The benchmarks: T1 to T4 and streams, measured on the running stack, each sample together with a sample of its floor (the lower
//! bound) in the same run. They measure KNoC's own share.
//!
//! | figure | from → to | floor |
//! |---|---|---|
//! | T1 | a second client's watch shows `spec.nodeName` → `sbatch` has exited 0 | `sbatch` itself |
//! | T2 | pod created → first line executed in the container | `sbatch` + `apptainer exec` |
//! | T3 | last line of the program → a watch shows the terminal phase | a watch's own delay |
//! | T4 | `exec true` by a warm client | `apptainer exec instance://… true` on the compute node |
//! | cost | status patches, Events and the API server's processor time for each pod | none |
//! | submitted | T1 of the last of many pods whose jobs wait | as many `sbatch` in a row |
//! | status beside a cp | T3 while `kubectl cp` runs at full speed | T3 while relays pass as much on |
//! | follow | the program writes a line → a client of the API server has it | none |
//! | probes | the shim's processor time for a thousand http and tcp probes a minute | the same pod without probes |
//! | exec probes | processor time of the shim and its children for each | `nsenter` into the container on the compute node |
//! | egress | a pod connects → it has the first byte; bytes to the cluster; names; idle connections | plain relays, one process each |
//! | streams | log, exec, cp and port-forward bytes, and bytes between pods | the same bytes through as many TLS relays, one process each |
//!
//! A stream's client counts bytes as they arrive: at the WebSocket of an exec or a port-forward, or at the body of a log, just as the
//! relays' reader does at its TLS connection. Only cp uses kubectl itself.

mod bed;
mod beside;
mod cost;
mod egress;
mod exec;
mod floor;
mod follow;
mod kubernetes;
pub mod links;
mod load;
mod machine;
mod peers;
mod pod_to_pod;
mod pods;
mod probes;
pub mod relay;
mod relayed;
mod report;
mod stats;
mod streams;
mod submitted;

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;

use self::bed::Bed;
use self::stats::Series;

/// Pods at once, and how many rounds of it.
const ROUNDS: [(usize, usize); 3] = [(1, 20), (10, 5), (50, 5)];

/// Many pods at once, and how many rounds of it. They are measured without the floors, which are those of fewer pods.
const MANY: (usize, usize) = (400, 2);

/// The number of exec samples.
const EXECS: usize = 100;

/// Rounds of each stream.
const STREAMS: usize = 5;
/// A short stream takes a third of a second, so it is measured this many times as often.
const SHORT: usize = 3;

/// Pods at once whose jobs wait, and how many rounds of it.
const SUBMITTED: (usize, usize) = (50, 10);

/// Rounds of pods without and beside a copy, and beside the relays.
const BESIDE: usize = 25;

/// The number of lines in the log that is followed.
const FOLLOWED: usize = 300;

/// The size of each stream, in whole lines.
const STREAM_BYTES: u64 = 100_000_000;

/// The size of the large streams: a GiB in whole lines.
const LARGE_BYTES: u64 = 80 * 13_421_773;

/// The results of all measurements.
#[derive(Debug, Default)]
struct Figures {
    /// One batch for each number of pods at once.
    batches: Vec<pods::Batch>,
    watch_delay: Series,
    exec: exec::Exec,
    follow: Series,
    egress: egress::Egress,
    probes: probes::Probes,
    submitted: submitted::Submitted,
    beside: beside::Beside,
    streams: Vec<streams::Stream>,
    load: load::Load,
    /// After many pods at once.
    after_many: load::Memory,
}

/// Measures everything and writes the page. `quick` takes few samples, to test the harness itself.
pub async fn run(page: &Path, quick: bool) -> anyhow::Result<()> {
    let bed = Bed::open().await?;
    let mut figures = Figures::default();
    say("a watch's own delay");
    figures.watch_delay = pods::watch_delay(&bed, if quick { 10 } else { 20 }).await?;
    for (pods, rounds) in ROUNDS {
        let rounds = if quick { (rounds / 2).max(1) } else { rounds };
        let mut batch = pods::Batch::new(pods);
        for round in 1..=rounds {
            say(&format!(
                "T1, T2, T3: {pods} pods at once, round {round} of {rounds}"
            ));
            batch
                .round(&bed, round)
                .await
                .with_context(|| format!("{pods} pods"))?;
        }
        say_batch(&batch)?;
        figures.batches.push(batch);
    }
    say("pods that are only submitted");
    figures.submitted = submitted_pods(&bed, quick).await?;
    say("memory and RPCs at 50 running pods");
    figures.load = load::measure(&bed, 50, if quick { 15 } else { 60 }).await?;
    let batch = many(&bed, quick).await?;
    say_batch(&batch)?;
    figures.batches.push(batch);
    figures.after_many = load::memory();
    say("T4: exec");
    figures.exec = exec::measure(&bed, if quick { 30 } else { EXECS }).await?;
    say("a followed log");
    figures.follow = follow::measure(&bed, if quick { 60 } else { FOLLOWED }).await?;
    say("status beside a cp");
    figures.beside = beside::measure(&bed, if quick { 3 } else { BESIDE }).await?;
    say("egress");
    figures.egress = egress::measure(&bed, egress_sizes(quick)).await?;
    say("probes");
    figures.probes = probes::measure(&bed, watched(quick)).await?;
    say("streams");
    figures.streams = streams_named(&bed, sizes(quick), "").await?;
    let text = report::page(&figures, &bed, quick)?;
    #[expect(clippy::disallowed_methods, reason = "a page of the documentation")]
    std::fs::write(page, text).with_context(|| page.display().to_string())?;
    bed.close().await
}

async fn submitted_pods(bed: &Bed, quick: bool) -> anyhow::Result<submitted::Submitted> {
    let (pods, rounds) = SUBMITTED;
    submitted::measure(bed, pods, if quick { 3 } else { rounds }).await
}

/// Measures only T1 of pods whose jobs wait; prints the table to standard output and does not change the page.
pub async fn submitted(quick: bool) -> anyhow::Result<()> {
    let bed = Bed::open().await?;
    let measured = submitted_pods(&bed, quick).await?;
    let mut table = String::new();
    report::submitted(&mut table, &measured)?;
    print(&table)?;
    bed.close().await
}

/// Measures T1 to T3 and the cost of many pods at once.
async fn many(bed: &Bed, quick: bool) -> anyhow::Result<pods::Batch> {
    let (pods, rounds) = MANY;
    let rounds = if quick { 1 } else { rounds };
    let mut batch = pods::Batch::new(pods);
    for round in 1..=rounds {
        say(&format!("{pods} pods at once, round {round} of {rounds}"));
        let measured = batch.measure(bed, round).await;
        measured.with_context(|| format!("{pods} pods"))?;
    }
    Ok(batch)
}

/// Measures only the streams whose names contain `name`, in which `-` stands for a space, too; prints the table to standard output and does not change the page.
pub async fn streams(quick: bool, name: &str) -> anyhow::Result<()> {
    let bed = Bed::open().await?;
    let mut table = String::new();
    let measured = streams_named(&bed, sizes(quick), name).await?;
    anyhow::ensure!(!measured.is_empty(), "no stream has {name:?} in its name");
    report::streams(&mut table, &measured)?;
    print(&table)?;
    bed.close().await
}

async fn streams_named(
    bed: &Bed,
    sizes: streams::Sizes,
    name: &str,
) -> anyhow::Result<Vec<streams::Stream>> {
    let mut all = streams::measure(bed, sizes, name).await?;
    // The last one, because it starts the kubelet again, without the relay.
    if streams::is_named(pod_to_pod::NAME, name) {
        let measured = pod_to_pod::measure(bed, sizes).await;
        all.extend(measured.context(pod_to_pod::NAME)?);
    }
    Ok(all)
}

fn print(table: &str) -> std::io::Result<()> {
    std::io::Write::write_all(&mut std::io::stdout(), table.as_bytes())
}

/// Measures only what pods open to the cluster; prints the table to standard output and does not change the page.
pub async fn egress(quick: bool) -> anyhow::Result<()> {
    let bed = Bed::open().await?;
    let measured = egress::measure(&bed, egress_sizes(quick)).await?;
    let mut table = String::new();
    report::egress(&mut table, &measured)?;
    print(&table)?;
    bed.close().await
}

/// Measures only what probes cost; prints the table to standard output and does not change the page.
pub async fn probes(quick: bool) -> anyhow::Result<()> {
    let bed = Bed::open().await?;
    let measured = probes::measure(&bed, watched(quick)).await?;
    let mut table = String::new();
    report::probes(&mut table, &measured)?;
    print(&table)?;
    bed.close().await
}

/// Measures only T3 beside a copy; prints the table to standard output and does not change the page.
pub async fn beside(quick: bool) -> anyhow::Result<()> {
    let bed = Bed::open().await?;
    let measured = beside::measure(&bed, if quick { 3 } else { BESIDE }).await?;
    let mut table = String::new();
    report::beside(&mut table, &measured)?;
    print(&table)?;
    bed.close().await
}

/// How long pods with probes are watched.
fn watched(quick: bool) -> Duration {
    Duration::from_secs(if quick { 20 } else { 60 })
}

fn egress_sizes(quick: bool) -> egress::Sizes {
    let (connections, questions, rounds) = if quick { (60, 60, 3) } else { (300, 1000, 5) };
    egress::Sizes {
        connections,
        questions,
        rounds,
        bytes: STREAM_BYTES,
    }
}

/// Measures that many pods at once in that many rounds; prints the table to standard output and does not change the page.
pub async fn pods(pods: usize, rounds: usize) -> anyhow::Result<()> {
    let bed = Bed::open().await?;
    let mut batch = pods::Batch::new(pods);
    for round in 1..=rounds {
        say(&format!("{pods} pods at once, round {round} of {rounds}"));
        if pods < MANY.0 {
            batch.round(&bed, round).await?;
        } else {
            batch.measure(&bed, round).await?;
        }
    }
    let mut table = String::new();
    report::pods(&mut table, &batch)?;
    print(&table)?;
    bed.close().await
}

fn sizes(quick: bool) -> streams::Sizes {
    if quick {
        streams::Sizes {
            rounds: (3 * SHORT, 3),
            bytes: STREAM_BYTES,
            large: 2 * STREAM_BYTES,
        }
    } else {
        streams::Sizes {
            rounds: (STREAMS * SHORT, STREAMS),
            bytes: STREAM_BYTES,
            large: LARGE_BYTES,
        }
    }
}

/// Prints what was measured, so that a later failure does not lose it.
fn say_batch(batch: &pods::Batch) -> anyhow::Result<()> {
    let mut table = String::new();
    report::pods(&mut table, batch)?;
    say(&table);
    Ok(())
}

/// Prints a line of progress.
fn say(text: &str) {
    eprintln!("bench: {text}");
}
