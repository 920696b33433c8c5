//! `knocctl describe`: shows the details of one pod.

use std::process::ExitCode;

use knoc_proto::pb;

use super::{
    CtlError, Global, find,
    output::{self, fields, plain},
    session::Session,
    view,
};

#[derive(Debug, clap::Args)]
pub(super) struct Describe {
    /// Name, NAMESPACE/NAME or uid of the pod
    pod: String,
}

impl Describe {
    pub(super) async fn run(self, global: &Global) -> Result<ExitCode, CtlError> {
        let mut session = Session::open(global)?;
        let pod = find::one(&mut session, global.namespace.as_deref(), &self.pod).await?;
        output::show(global.output, || view::pod(&pod), |_| text(&pod))?;
        Ok(ExitCode::SUCCESS)
    }
}

fn text(pod: &pb::PodObserved) -> String {
    let mut parts = vec![describe_pod(pod)];
    if let Some(outcome) = &pod.outcome {
        let word = view::outcome(pod).unwrap_or("not decided");
        parts.push(format!("Outcome:\n  {word}\n"));
        parts.push(describe_outcome(outcome));
    }
    if let Some(job) = &pod.job {
        parts.extend(["Job:\n".to_owned(), describe_job(job)]);
    }
    let kinds = [
        ("Init containers", &pod.init_containers),
        ("Containers", &pod.containers),
        ("Ephemeral containers", &pod.ephemeral_containers),
    ];
    for (heading, list) in kinds {
        if !list.is_empty() {
            parts.push(format!("{heading}:\n"));
        }
        for container in list {
            parts.push(format!("  {}:\n", plain(&container.name)));
            parts.push(describe_container(container));
        }
    }
    if !pod.notes.is_empty() {
        parts.extend(["Notes:\n".to_owned(), notes(&pod.notes)]);
    }
    parts.concat()
}

fn describe_pod(pod: &pb::PodObserved) -> String {
    let yes = |is: bool| if is { "yes".to_owned() } else { String::new() };
    let shim = if pod.shim_connected {
        "connected"
    } else {
        "not connected"
    };
    let list = [
        ("Name", pod.name.clone()),
        ("Namespace", pod.namespace.clone()),
        ("UID", pod.uid.clone()),
        ("Cluster", pod.cluster_id.clone()),
        ("Phase", view::phase(pod).to_owned()),
        (
            "Since",
            view::nanos(pod.since).map(view::whole).unwrap_or_default(),
        ),
        ("Why", view::joined(&pod.reason, &pod.message)),
        ("Deleting", yes(pod.deleting)),
        ("Host IP", pod.host_ip.clone()),
        ("Shim", shim.to_owned()),
    ];
    fields(0, &list)
}

fn describe_outcome(outcome: &pb::Outcome) -> String {
    let yes = |is: bool| if is { "yes".to_owned() } else { String::new() };
    let list = [
        ("Why", view::joined(&outcome.reason, &outcome.message)),
        (
            "Finished",
            view::nanos(outcome.finished_at)
                .map(view::whole)
                .unwrap_or_default(),
        ),
        ("Disruption", yes(outcome.disruption)),
    ];
    fields(2, &list)
}

fn describe_job(job: &pb::Job) -> String {
    let time = |at: i64| view::seconds(at).map(view::whole).unwrap_or_default();
    let restarts = if job.restarts > 0 {
        job.restarts.to_string()
    } else {
        String::new()
    };
    fields(
        2,
        &[
            ("Id", job.id.clone()),
            ("State", view::joined(&job.state, &job.reason)),
            ("Partition", job.partition.clone()),
            ("Nodes", job.nodes.clone()),
            ("Submitted", time(job.submitted_at)),
            ("Expected", time(job.estimated_start)),
            ("Started", time(job.started_at)),
            ("Ended", time(job.ended_at)),
            ("Restarts", restarts),
        ],
    )
}

fn describe_container(container: &pb::ContainerStatus) -> String {
    let (state, detail) = view::state(container);
    let last = container.last_termination.as_ref().map(view::termination);
    fields(
        4,
        &[
            ("Image", container.image.clone()),
            ("Image ID", container.image_id.clone()),
            ("State", format!("{state} {detail}").trim_end().to_owned()),
            ("Last end", last.unwrap_or_default()),
            ("Ready", container.ready.to_string()),
            ("Restarts", container.restart_count.to_string()),
        ],
    )
}

fn notes(list: &[pb::PodNote]) -> String {
    let row = |note: &pb::PodNote| {
        vec![
            if note.warning {
                "  Warning"
            } else {
                "  Normal"
            }
            .to_owned(),
            view::nanos(note.at).map(view::whole).unwrap_or_default(),
            note.reason.clone(),
            if note.container.is_empty() {
                "-".to_owned()
            } else {
                note.container.clone()
            },
            note.message.clone(),
        ]
    };
    let rows: Vec<_> = list.iter().map(row).collect();
    output::table(&["  TYPE", "AT", "REASON", "CONTAINER", "MESSAGE"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_described_completely() {
        let mut pod = view::tests::sample();
        pod.outcome = Some(pb::Outcome {
            kind: pb::OutcomeKind::Failed.into(),
            reason: "OOMKilled".into(),
            message: "side used more than 1 GiB".into(),
            finished_at: 1_700_000_070_000_000_000,
            ..pb::Outcome::default()
        });
        insta::assert_snapshot!(text(&pod));
    }
}
