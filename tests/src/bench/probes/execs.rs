//! Exec probes: the processor time of the shim and of its children for each, less that of the shim of the same pod without probes. The
//! floor is `nsenter` by hand into the namespaces of the same container, as the HPC user on the compute node.

use std::time::Duration;

use anyhow::Context as _;
use serde_json::json;

use super::{every_second, small, start, stop, watch};
use crate::{PodBuilder, bench::bed::Bed};

/// How long the program of the probed container sleeps, by which it is found on the compute node; and that of the other one.
const SECONDS: [u32; 2] = [36_017, 36_018];

/// Probes of the container a second: readiness and liveness.
const EACH_SECOND: u32 = 2;

/// The cost of a command, in milliseconds of processor time.
#[derive(Debug, Default)]
pub(in crate::bench) struct Execs {
    /// As a probe: of the shim and of its children.
    pub(in crate::bench) probe: f64,
    /// By `nsenter`: of the shell that starts it, and of its children.
    pub(in crate::bench) by_hand: f64,
    /// How many of each were run.
    pub(in crate::bench) count: u64,
}

/// Measures both, one after the other.
pub(super) async fn measure(bed: &Bed, watched: Duration) -> anyhow::Result<Execs> {
    let [probed, unprobed] = SECONDS;
    let pods = [
        sleeper("execs", probed, true),
        sleeper("no-execs", unprobed, false),
    ];
    let uids = start(bed, &pods).await?;
    let ([with, without], seconds) = watch(&uids, watched).await?;
    let all = (with.own + with.children) - (without.own + without.children);
    let node = bed.world.compute_node(&uids[0]).await?;
    let count = u64::from(EACH_SECOND) * watched.as_secs();
    let by_hand = nsenter(bed, &node, count).await?;
    stop(bed, &pods).await?;
    Ok(Execs {
        probe: 1000.0 * all / (f64::from(EACH_SECOND) * seconds),
        by_hand,
        count,
    })
}

/// A pod that sleeps, with two exec probes every second if `probed`.
fn sleeper(name: &str, seconds: u32, probed: bool) -> PodBuilder {
    let mut pod = small(PodBuilder::new(name).command(["sleep", &seconds.to_string()]));
    if probed {
        let command = every_second("exec", &json!({"command": ["true"]}));
        for field in ["readinessProbe", "livenessProbe"] {
            pod = pod.set(field, command.clone());
        }
    }
    pod
}

/// The processor time in milliseconds of one `nsenter` of `true` into the container, out of `count`.
async fn nsenter(bed: &Bed, node: &str, count: u64) -> anyhow::Result<f64> {
    let [sleeps, _] = SECONDS;
    // A shell's `time` counts the shell and its children, as the shim's figure does. The first one is not measured: it reads the program
    // from the disk.
    let script = format!(
        "pid=$(pgrep -n -f '^(/bin/)?sleep {sleeps}$') || exit; \
         enter() {{ nsenter -t $pid -U --preserve-credentials -m -p true || exit; }}; \
         enter; TIMEFORMAT='%3U %3S'; {{ time for i in {{1..{count}}}; do enter; done; }} 2>&1"
    );
    let text = bed.shell(node, &script).ok().await?.text();
    let mut seconds = 0.0;
    for part in text.split_whitespace() {
        let part: f64 = part.parse().with_context(|| text.clone())?;
        seconds += part;
    }
    anyhow::ensure!(seconds > 0.0, "no times: {text:?}");
    Ok(1000.0 * seconds / f64::from(u32::try_from(count)?))
}
