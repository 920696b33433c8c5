//! Writes the page docs/performance.md.

use std::fmt::Write as _;

use super::bed::Bed;
use super::beside::Beside;
use super::egress::{Egress, WATCHED};
use super::pods::Batch;
use super::probes::Probes;
use super::stats::Series;
use super::streams::Stream;
use super::submitted::Submitted;
use super::{Figures, machine, peers};

/// One target: the measured value and its upper bound, or its lower bound if `least` is set.
struct Bound {
    what: String,
    found: f64,
    limit: f64,
    unit: &'static str,
    least: bool,
}

pub(super) fn page(figures: &Figures, bed: &Bed, quick: bool) -> anyhow::Result<String> {
    let mut out = String::new();
    let info = &bed.info;
    writeln!(out, "# Performance\n")?;
    writeln!(
        out,
        "Written by `make bench` on {date}, with KNoC {version}, {scheduler} and {runtime}, on one machine: {machine}.\n\n\
         Control plane, Slurm (three nodes), registry and all of KNoC share that machine, so there is no network delay, and figures at \
         50 pods include 50 container starts on these cores. Figures are in milliseconds unless another unit is given.\n\n\
         Each figure of KNoC is shown with its floor, the lower bound: Slurm and Apptainer used by hand as the same user, measured \
         alternately in the same run. The figures of other projects, at the end, are from another run.\n\n\
         | time | from → to |\n|---|---|\n\
         | T1 | a watch shows the pod's `spec.nodeName` → `sbatch` has exited |\n\
         | T2 | the pod is created → the program writes its first line |\n\
         | T3 | the program writes its last line → a watch shows the pod's terminal phase |\n\
         | T4 | a client that is connected already runs `true` by exec → it has the exit code |\n",
        date = jiff::Timestamp::now().strftime("%Y-%m-%d"),
        version = info.version,
        scheduler = info.scheduler_version,
        runtime = info.runtime_version,
        machine = machine::describe(),
    )?;
    if quick {
        out.push_str(
            "**A quick run** (`knoc-bench --quick`, few samples, the machine shared with other work): \
             it gives an impression and shows missed targets, but no final figures.\n\n",
        );
    }
    bounds(&mut out, figures)?;
    for batch in &figures.batches {
        pods(&mut out, batch)?;
    }
    submitted(&mut out, &figures.submitted)?;
    others(&mut out, figures)?;
    peers::section(&mut out, figures)?;
    Ok(out)
}

fn bounds(out: &mut String, figures: &Figures) -> anyhow::Result<()> {
    writeln!(
        out,
        "## Targets\n\n| figure | found | target | |\n|---|---|---|---|"
    )?;
    for Bound {
        what,
        found,
        limit,
        unit,
        least,
    } in all_bounds(figures)
    {
        let met = if least {
            found >= limit
        } else {
            found <= limit
        };
        let verdict = if met { "met" } else { "**missed**" };
        // With three digits a share that is missed by little does not look like its target.
        let (sign, digits) = if least { ("≥", 3) } else { ("≤", 1) };
        writeln!(
            out,
            "| {what} | {found:.digits$}{unit} | {sign} {limit:.1}{unit} | {verdict} |"
        )?;
    }
    writeln!(out)?;
    Ok(())
}

fn all_bounds(figures: &Figures) -> Vec<Bound> {
    let mut bounds = Vec::new();
    for batch in &figures.batches {
        let (pods, t3) = (batch.pods, &batch.t3);
        if pods == 1 {
            let (t1, t2) = (batch.t1_share.median(), batch.t2_share());
            bounds.push(bound(
                "T1 less sbatch's own span, 1 pod, p50",
                t1,
                40.0,
                " ms",
            ));
            bounds.push(bound("KNoC's share of T2, 1 pod, p50", t2, 100.0, " ms"));
        }
        let at = format!("T3, {pods} at once");
        let (median, most) = if pods > 50 {
            (1000.0, 5000.0)
        } else {
            (100.0, 500.0)
        };
        bounds.push(bound(&format!("{at}, p50"), t3.median(), median, " ms"));
        bounds.push(bound(&format!("{at}, p99"), t3.at(99), most, " ms"));
        let [patches, events, _] = batch.cost.for_each();
        let at = format!("for each pod, {pods} at once");
        bounds.push(bound(&format!("status patches {at}"), patches, 4.0, ""));
        bounds.push(bound(&format!("Events {at}"), events, 4.0, ""));
    }
    let submitted = &figures.submitted;
    bounds.push(bound(
        &format!(
            "T1 of the last of {0} pods / {0} sbatch in a row, in a partition that is down",
            submitted.pods
        ),
        submitted.last.median() / submitted.row.median(),
        1.3,
        " ×",
    ));
    let beside = &figures.beside;
    bounds.push(bound(
        "T3 beside a kubectl cp at full speed, p99, less that beside 4 bare relays at full speed",
        beside.copying.t3.at(99) - beside.relaying.t3.at(99),
        20.0,
        " ms",
    ));
    egress_bounds(figures, &mut bounds);
    probe_bounds(&figures.probes, &mut bounds);
    stream_bounds(figures, &mut bounds);
    let load = &figures.load;
    let memory = [
        ("resident memory of the agent", load.memory.agent, 32.0),
        ("resident memory of the kubelet", load.memory.kubelet, 48.0),
        ("anonymous memory of the shim, median", load.shim.0, 5.0),
    ];
    for (what, kib, limit) in memory {
        let what = format!("{what} at {} pods", load.pods);
        bounds.push(bound(&what, mib(kib), limit, " MiB"));
    }
    bounds
}

/// The targets for what pods open to the cluster.
fn egress_bounds(figures: &Figures, bounds: &mut Vec<Bound>) {
    let egress = &figures.egress;
    bounds.push(bound(
        "connection and first byte from a pod to the API server / over 3 plain relays, p50",
        egress.first.median() / egress.first_floor.median(),
        3.0,
        " ×",
    ));
}

/// The targets for probes.
fn probe_bounds(probes: &Probes, bounds: &mut Vec<Bound>) {
    for (place, served) in [
        ("in the node's network", &probes.node),
        ("in a network of the pod's own", &probes.private),
    ] {
        bounds.push(bound(
            &format!(
                "CPU of the shim for {:.0} http and tcp probes a minute {place}, less that without probes",
                served.rate
            ),
            served.with - served.without,
            1.0,
            " %",
        ));
    }
    bounds.push(bound(
        "CPU of the shim and its children for an exec probe / nsenter by hand",
        probes.execs.probe / probes.execs.by_hand,
        1.2,
        " ×",
    ));
}

/// The targets for exec, logs and streams.
fn stream_bounds(figures: &Figures, bounds: &mut Vec<Bound>) {
    let exec = &figures.exec;
    let ratio = exec.knoc.median() / exec.instance.median();
    bounds.push(bound(
        "T4 over gRPC / apptainer exec instance://",
        ratio,
        1.5,
        " ×",
    ));
    let ratio = exec.kubernetes.median() / exec.instance.median();
    bounds.push(bound(
        "T4 through the API server / apptainer exec instance://",
        ratio,
        1.5,
        " ×",
    ));
    bounds.push(bound(
        "logs -f: line written → seen, p50",
        figures.follow.median(),
        20.0,
        " ms",
    ));
    for stream in &figures.streams {
        let Some(share) = stream.share else { continue };
        let what = format!(
            "{}, MB/s / that of {} bare relays",
            stream.name, stream.hops
        );
        let found = stream.knoc.median() / stream.floor.median();
        bounds.push(Bound {
            least: true,
            ..bound(&what, found, share, " ×")
        });
    }
}

fn bound(what: &str, found: f64, limit: f64, unit: &'static str) -> Bound {
    Bound {
        what: what.to_owned(),
        found,
        limit,
        unit,
        least: false,
    }
}

pub(super) fn pods(out: &mut String, batch: &Batch) -> anyhow::Result<()> {
    let many = if batch.pods == 1 {
        "1 pod"
    } else {
        &format!("{} pods at once", batch.pods)
    };
    writeln!(
        out,
        "## {many}\n\n| | p50 | p99 | max | n |\n|---|---|---|---|---|"
    )?;
    pod_rows(out, batch)?;
    let [patches, events, server] = batch.cost.for_each();
    writeln!(
        out,
        "\nFor each pod, from its creation to its terminal phase: {patches:.1} status patches and {events:.1} Events of KNoC, \
         {server:.0} ms of the API server's processor time (with the scheduler's requests and the benchmark's own).\n"
    )?;
    if batch.t2_apptainer.count() == 0 {
        return Ok(());
    }
    writeln!(
        out,
        "KNoC's share of T2, by medians (created → accepted, and job began → first line less apptainer exec): {:.1} ms. \
         slurmctld starts jobs once a second, so the whole T2 always varies by ± 500 ms.\n",
        batch.t2_share()
    )?;
    Ok(())
}

/// The rows of the table of pods, each with its floor.
fn pod_rows(out: &mut String, batch: &Batch) -> anyhow::Result<()> {
    let mut row = |name: &str, series: &Series| {
        if series.count() == 0 {
            // Many pods at once are measured without their floors.
            return Ok(());
        }
        writeln!(
            out,
            "| {name} | {:.1} | {:.1} | {:.1} | {} |",
            series.median(),
            series.at(99),
            series.max(),
            series.count()
        )
    };
    row("T1: nodeName seen → sbatch exited", &batch.t1)?;
    row("T1 less the span of its own sbatch", &batch.t1_share)?;
    row("floor: sbatch", &batch.sbatch)?;
    row("T1 of the pod whose sbatch exited last", &batch.t1_last)?;
    row(
        "first nodeName seen → last sbatch exited, with the scheduler's own time",
        &batch.t1_all,
    )?;
    row("floor: as many sbatch in a row", &batch.sbatch_row)?;
    row("T2: created → first line of the program", &batch.t2)?;
    row("floor: sbatch → first line, by hand", &batch.t2_hand)?;
    row("created → sbatch accepted", &batch.t2_before)?;
    row("job began → first line", &batch.t2_start)?;
    row(
        "floor: the same by hand, apptainer exec --overlay",
        &batch.t2_apptainer,
    )?;
    row(
        "for comparison: by hand, with a read-only root",
        &batch.t2_read_only,
    )?;
    row("T3: last line → terminal phase seen", &batch.t3)?;
    row(
        "of it: last line → the shim saw the program end",
        &batch.t3_shim,
    )?;
    row("of it: → the agent has the shim's report", &batch.t3_agent)?;
    row("of it: → terminal phase seen", &batch.t3_kubelet)?;
    Ok(())
}

/// T1 of pods whose jobs wait.
pub(super) fn submitted(out: &mut String, submitted: &Submitted) -> std::fmt::Result {
    writeln!(
        out,
        "## {} pods at once, whose jobs wait\n\nThe partition is down, so that no container starts on these processors meanwhile.\n\n\
         | | p50 | p99 | n |\n|---|---|---|---|",
        submitted.pods
    )?;
    row(
        out,
        "T1 of the pod whose sbatch exited last",
        &submitted.last,
    )?;
    row(
        out,
        "first nodeName seen → last sbatch exited, with the scheduler's own time",
        &submitted.all,
    )?;
    row(out, "floor: as many sbatch in a row", &submitted.row)?;
    writeln!(out)
}

fn row(out: &mut String, name: &str, series: &Series) -> std::fmt::Result {
    let (median, most) = (series.median(), series.at(99));
    writeln!(
        out,
        "| {name} | {median:.1} | {most:.1} | {} |",
        series.count()
    )
}

/// T3 beside a copy and without it, in parts.
pub(super) fn beside(out: &mut String, beside: &Beside) -> std::fmt::Result {
    for (name, batch) in [
        (
            "T3 beside a kubectl cp at full speed, 4 pods at once",
            &beside.copying,
        ),
        (
            "floor: the same beside 4 bare relays at full speed",
            &beside.relaying,
        ),
        ("the same without the cp", &beside.alone),
    ] {
        row(out, name, &batch.t3)?;
        row(
            out,
            "of it: last line → the shim saw the program end",
            &batch.t3_shim,
        )?;
        row(
            out,
            "of it: → the agent has the shim's report",
            &batch.t3_agent,
        )?;
        row(out, "of it: → terminal phase seen", &batch.t3_kubelet)?;
    }
    writeln!(
        out,
        "\nWhile these pods ran, kubectl cp copied 1 GiB completely {} times, and the relays {} times.",
        beside.copies, beside.relayed
    )
}

fn others(out: &mut String, figures: &Figures) -> anyhow::Result<()> {
    let exec = &figures.exec;
    writeln!(
        out,
        "## Exec, streams, memory\n\n| | p50 | p99 | n |\n|---|---|---|---|"
    )?;
    for (name, series) in [
        (
            "T4: exec true through the API server, warm client",
            &exec.kubernetes,
        ),
        ("T4: exec true over gRPC, warm client", &exec.knoc),
        (
            "floor: apptainer exec instance:// true, on the compute node",
            &exec.instance,
        ),
        (
            "for comparison: the same by srun --overlap, from the login node",
            &exec.srun,
        ),
        (
            "logs -f: line written → seen by a client of the API server",
            &figures.follow,
        ),
        ("floor of T3: a watch's own delay", &figures.watch_delay),
    ] {
        row(out, name, series)?;
    }
    beside(out, &figures.beside)?;
    streams(out, &figures.streams)?;
    egress(out, &figures.egress)?;
    probes(out, &figures.probes)?;
    memory(out, figures)
}

/// What idle pods take while they run.
fn memory(out: &mut String, figures: &Figures) -> anyhow::Result<()> {
    let load = &figures.load;
    writeln!(
        out,
        "\nAt {} running pods that do nothing, the agent has {:.1} MiB resident, the kubelet {:.1} MiB, and a shim {:.1} MiB anonymous \
         (median; the largest {:.1}); the agent sends {} RPCs per minute to slurmctld. After many pods at once, the agent has {:.1} MiB \
         and the kubelet {:.1} MiB.\n",
        load.pods,
        mib(load.memory.agent),
        mib(load.memory.kubelet),
        mib(load.shim.0),
        mib(load.shim.1),
        load.rpcs,
        mib(figures.after_many.agent),
        mib(figures.after_many.kubelet),
    )?;
    Ok(())
}

/// What pods open to the cluster.
pub(super) fn egress(out: &mut String, egress: &Egress) -> anyhow::Result<()> {
    writeln!(
        out,
        "\n| from a pod to the cluster | p50 | p99 | n |\n|---|---|---|---|"
    )?;
    for (name, series, digits) in [
        (
            "connection to the API server and its first byte, ms",
            &egress.first,
            2,
        ),
        (
            "floor: over 3 plain relays, from the compute node, ms",
            &egress.first_floor,
            2,
        ),
        ("a DNS question about a new name, ms", &egress.new_names, 2),
        (
            "a DNS question about a name that the shim has kept, ms",
            &egress.same_name,
            2,
        ),
        ("bytes on one connection, MB/s", &egress.rate, 0),
        ("floor: over 3 plain relays, MB/s", &egress.rate_floor, 0),
    ] {
        writeln!(
            out,
            "| {name} | {:.digits$} | {:.digits$} | {} |",
            series.median(),
            series.at(99),
            series.count()
        )?;
    }
    let idle = &egress.idle;
    let [shim, agent, kubelet, ..] = idle.spent.map(|seconds| seconds * 1000.0);
    writeln!(
        out,
        "\nWith {} idle connections of four pods the agent has {:.1} MiB resident (without them {:.1}), the kubelet {:.1} ({:.1}), and the \
         largest shim {:.1} MiB anonymous ({:.1}). In {} s the connections take {agent:.0} ms of processor time of the agent, {kubelet:.0} ms of \
         the kubelet and {shim:.0} ms of all shims.",
        idle.connections,
        mib(idle.with.agent),
        mib(idle.before.agent),
        mib(idle.with.kubelet),
        mib(idle.before.kubelet),
        mib(idle.shim.1),
        mib(idle.shim.0),
        WATCHED.as_secs(),
    )?;
    Ok(())
}

/// What probes cost.
pub(super) fn probes(out: &mut String, probes: &Probes) -> anyhow::Result<()> {
    writeln!(
        out,
        "\n| CPU of a pod's shim, % of one core | probes a minute | with probes | the same pod without |\n|---|---|---|---|"
    )?;
    for (name, served) in [
        ("http and tcp probes in the node's network", &probes.node),
        (
            "http and tcp probes in a network of the pod's own",
            &probes.private,
        ),
    ] {
        writeln!(
            out,
            "| {name} | {:.0} | {:.2} | {:.2} |",
            served.rate, served.with, served.without
        )?;
    }
    let execs = &probes.execs;
    writeln!(
        out,
        "\nAn exec probe of `true` takes {:.2} ms of processor time of the shim and its children; `true` by `nsenter` in the same container, by \
         hand on the compute node, takes {:.2} ms ({} of each).",
        execs.probe, execs.by_hand, execs.count
    )?;
    Ok(())
}

/// The table of streams.
pub(super) fn streams(out: &mut String, streams: &[Stream]) -> anyhow::Result<()> {
    writeln!(
        out,
        "\n| stream, MB/s | KNoC | bare TLS relays, one process in place of each part | ratio | hops | MB |\n|---|---|---|---|---|---|"
    )?;
    for stream in streams {
        let (knoc, floor) = (stream.knoc.median(), stream.floor.median());
        let (name, hops, megabytes) = (stream.name, stream.hops, stream.bytes / 1_000_000);
        writeln!(
            out,
            "| {name} | {knoc:.0} | {floor:.0} | {:.2} | {hops} | {megabytes} |",
            knoc / floor
        )?;
    }
    out.push_str(
        "\nHops are the relays of the floor. Its client reaches the first relay over TLS, and each relay the next one, so there are as many \
         connections over TLS as relays. Only in the row that says so the client has no TLS, and two relays are one such connection.\n",
    );
    spent(out, streams)
}

/// The processor time of each part; unlike a rate, it hardly depends on the load of the machine.
#[expect(clippy::cast_precision_loss, reason = "far below 2^52 bytes")]
fn spent(out: &mut String, streams: &[Stream]) -> anyhow::Result<()> {
    writeln!(
        out,
        "\n| CPU seconds per GB | shim | agent | kubelet | API server | client | relays | their client |\n|---|---|---|---|---|---|---|---|"
    )?;
    for stream in streams {
        let gigabytes = (stream.bytes * u64::try_from(stream.knoc.count())?) as f64 / 1e9;
        let (knoc, floor) = &stream.spent;
        let [shim, agent, kubelet, server, client, _] = knoc.map(|part| part / gigabytes);
        let [.., reader, relays] = floor.map(|part| part / gigabytes);
        let name = stream.name;
        writeln!(
            out,
            "| {name} | {shim:.2} | {agent:.2} | {kubelet:.2} | {server:.2} | {client:.2} | {relays:.2} | {reader:.2} |"
        )?;
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "shown with one digit")]
fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}
