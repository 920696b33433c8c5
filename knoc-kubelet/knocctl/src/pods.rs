//! `knocctl pods`: prints one line per pod, and with `--watch` one line per change.

use std::process::ExitCode;

use jiff::Timestamp;
use knoc_proto::pb::{self, pod_event};
use serde_json::Value;

use super::{
    CtlError, Global,
    output::{self, Format, span, table},
    session::{Session, next},
    view,
};

#[derive(Debug, clap::Args)]
pub(super) struct Pods {
    /// Keeps running and prints each change until interrupted
    #[arg(short, long)]
    watch: bool,
}

impl Pods {
    pub(super) async fn run(self, global: &Global) -> Result<ExitCode, CtlError> {
        let mut session = Session::open(global)?;
        let ours = |pod: &pb::PodObserved| {
            global
                .namespace
                .as_ref()
                .is_none_or(|namespace| *namespace == pod.namespace)
        };
        if self.watch {
            return watch(&mut session, global.output, ours).await;
        }
        let mut pods: Vec<_> = session.pods().await?.into_iter().filter(ours).collect();
        pods.sort_by(|a, b| (&a.namespace, &a.name, &a.uid).cmp(&(&b.namespace, &b.name, &b.uid)));
        if pods.is_empty() && matches!(global.output, Format::Table | Format::Wide) {
            output::complain("no pods");
            return Ok(ExitCode::SUCCESS);
        }
        let value = || Value::Array(pods.iter().map(view::pod).collect());
        output::show(global.output, value, |wide| {
            listing(&pods, wide, Timestamp::now())
        })?;
        Ok(ExitCode::SUCCESS)
    }
}

async fn watch(
    session: &mut Session,
    format: Format,
    ours: impl Fn(&pb::PodObserved) -> bool,
) -> Result<ExitCode, CtlError> {
    let mut stream = session.watch().await?;
    let mut headings = true;
    loop {
        let Some(event) = next("watch the pods", &mut stream).await?.event else {
            continue;
        };
        match event {
            pod_event::Event::Item(pod) if ours(&pod) => {
                output::show(
                    format,
                    || view::pod(&pod),
                    |wide| {
                        let text = listing(std::slice::from_ref(&pod), wide, Timestamp::now());
                        let skip = if headings {
                            0
                        } else {
                            text.find('\n').map_or(0, |at| at + 1)
                        };
                        text[skip..].to_owned()
                    },
                )?;
                headings = false;
            }
            pod_event::Event::RemovedUid(uid) => output::complain(&format!("{uid} was removed")),
            pod_event::Event::Item(_) | pod_event::Event::Synced(_) => {}
        }
    }
}

fn listing(pods: &[pb::PodObserved], wide: bool, now: Timestamp) -> String {
    let mut headings = vec![
        "NAMESPACE",
        "NAME",
        "PHASE",
        "READY",
        "RESTARTS",
        "JOB",
        "SINCE",
    ];
    if wide {
        headings.extend(["NODES", "PARTITION", "UID", "REASON"]);
    }
    let rows: Vec<_> = pods.iter().map(|pod| row(pod, wide, now)).collect();
    table(&headings, &rows)
}

fn row(pod: &pb::PodObserved, wide: bool, now: Timestamp) -> Vec<String> {
    let or_dash = |text: &str| {
        if text.is_empty() {
            "-".to_owned()
        } else {
            text.to_owned()
        }
    };
    let job = pod.job.clone().unwrap_or_default();
    let restarts: i32 = pod
        .containers
        .iter()
        .map(|container| container.restart_count)
        .sum();
    let since = view::nanos(pod.since).map(|at| span(now.duration_since(at).as_secs()));
    let phase = view::phase(pod);
    let mut row = vec![
        pod.namespace.clone(),
        pod.name.clone(),
        if pod.deleting {
            format!("{phase} (deleting)")
        } else {
            phase.to_owned()
        },
        view::ready(pod),
        restarts.to_string(),
        or_dash(&job.id),
        since.unwrap_or_else(|| "-".to_owned()),
    ];
    if wide {
        let outcome = pod.outcome.clone().unwrap_or_default();
        let reason = [&outcome.reason, &pod.reason, &job.reason];
        let reason = reason.into_iter().find(|reason| !reason.is_empty());
        row.extend([
            or_dash(&job.nodes),
            or_dash(&job.partition),
            pod.uid.clone(),
        ]);
        row.push(or_dash(reason.map_or("", |reason| reason)));
    }
    row
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_pod_has_one_line() {
        let now = Timestamp::from_second(1_700_000_300).unwrap();
        let mut deleting = view::tests::sample();
        deleting.deleting = true;
        deleting.job = None;
        let pods = [view::tests::sample(), deleting];
        insta::assert_snapshot!(listing(&pods, true, now));
    }
}
