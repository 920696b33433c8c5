//! A one-minute job that tests the whole chain: sbatch, start, shim, link and report.
//!
//! Its container is the program `true` of the compute node, whatever the site's container runtime
//! is: it tests the chain, not an image. The job directory has no record, so an agent that restarts
//! meanwhile removes it.

use std::{sync::Arc, time::Duration};

use knoc_contract::jobdir::{JobDir, JobDirError};
use knoc_proto::{
    error::chain,
    ids::PodUid,
    pb::{self, Finding},
    pod::PodSpec,
};
use tokio::{sync::mpsc, time::Instant};

use super::finding;
use crate::{
    pod::{input::Input, stage, state::Event},
    scheduler::{Cancel, JobPhase, JobRef, JobView, SubmitRequest, Submitted},
    site::Site,
};

/// A job that has not ended after this time is cancelled.
const TIMEOUT: Duration = Duration::from_mins(3);
/// The queue's length for what the shim reports in that time.
const INPUTS: usize = 64;

/// How the job went.
struct ProbeRun {
    last: Option<JobView>,
    /// Whether the shim's link came up.
    linked: bool,
    report: Option<pb::Report>,
    /// How the shim is reached if compute nodes cannot dial the agent.
    isolated: Option<String>,
}

pub(super) async fn run(site: &Arc<Site>) -> Vec<Finding> {
    let name = format!("doctor-{:08x}", rand::random::<u32>());
    let Ok(uid) = PodUid::try_from(name) else {
        return Vec::new();
    };
    let (dir, spec) = (site.state.pod(&uid), spec(&uid));
    let (input, inputs) = mpsc::channel(INPUTS);
    let prepared = {
        let (dir, spec, site) = (dir.clone(), spec.clone(), Arc::clone(site));
        tokio::task::spawn_blocking(move || prepare(&site, &dir, &spec)).await
    };
    let pin = match prepared {
        Ok(Ok(pin)) => pin,
        Ok(Err(error)) => return vec![finding("probe: stage", Err(chain(&error)), "see state")],
        Err(error) => return vec![finding("probe: stage", Err(chain(&error)), "see the log")],
    };
    site.shim_links.expect(&uid, &spec, pin, input);
    let shape = PodSpec::accepted_before(uid.clone(), spec);
    let findings = travel(site, &uid, shape, &dir, inputs).await;
    site.shim_links.forget(&uid);
    // If it is left over, the next start removes it.
    drop(tokio::task::spawn_blocking(move || dir.remove()).await);
    findings
}

fn spec(uid: &PodUid) -> pb::PodSpec {
    let container = pb::Container {
        name: "probe".to_owned(),
        image: "none".to_owned(),
        command: vec!["true".to_owned()],
        ..pb::Container::default()
    };
    pb::PodSpec {
        uid: uid.to_string(),
        namespace: "knoc".to_owned(),
        name: "doctor".to_owned(),
        generation: 1,
        containers: vec![container],
        restart_policy: pb::RestartPolicy::Never.into(),
        job: Some(pb::JobRequest {
            time_minutes: 1,
            cpu_millis: 1000,
            ..pb::JobRequest::default()
        }),
        ..pb::PodSpec::default()
    }
}

fn prepare(site: &Site, dir: &JobDir, spec: &pb::PodSpec) -> Result<String, JobDirError> {
    dir.create()?;
    dir.write_values(&pb::PodValues {
        revision: 1,
        ..pb::PodValues::default()
    })?;
    let image = pb::ResolvedImage {
        container: "probe".to_owned(),
        ..pb::ResolvedImage::default()
    };
    let mut job = stage::job_file(site, spec, vec![image], String::new());
    "process".clone_into(&mut job.runtime);
    job.runtime_path.clear();
    dir.write_spec(&job)?;
    // Without a key the link cannot come up, which the last finding reports.
    Ok(stage::link_pin(dir).unwrap_or_default())
}

async fn travel(
    site: &Arc<Site>,
    uid: &PodUid,
    spec: PodSpec,
    dir: &JobDir,
    mut inputs: mpsc::Receiver<Input>,
) -> Vec<Finding> {
    let request = SubmitRequest {
        uid: uid.clone(),
        spec: Arc::new(spec),
        cluster_id: String::new(),
        attempt: 1,
        jobdir: dir.path().to_owned(),
        shim: site.shim.clone(),
    };
    let submitted = match site.scheduler.submit(&request, site.may_submit()).await {
        Ok(submitted) => submitted,
        Err(error) => {
            let cure = "set what Slurm asks for in [job] of the site file";
            return vec![finding("probe: submit", Err(error.message), cure)];
        }
    };
    let mut journey = follow(site, uid, &submitted, &mut inputs).await;
    let report = {
        let dir = dir.clone();
        let read = tokio::task::spawn_blocking(move || dir.report()).await;
        read.ok().and_then(Result::ok).flatten()
    };
    if let Some(route) = report.as_ref().and_then(|report| report.route.as_ref()) {
        site.shim_route.reported(route);
    }
    let (route, works) = site.shim_route.describe();
    let isolated = works && site.shim_route.is_isolated();
    journey.isolated = isolated.then_some(route);
    judge(&submitted, &journey, report.as_ref())
}

/// Waits until the job has ended or the time is up.
async fn follow(
    site: &Site,
    uid: &PodUid,
    submitted: &Submitted,
    inputs: &mut mpsc::Receiver<Input>,
) -> ProbeRun {
    let mut journey = ProbeRun {
        last: None,
        linked: false,
        report: None,
        isolated: None,
    };
    let until = Instant::now() + TIMEOUT;
    let reference = JobRef {
        call: Some((submitted.began.as_second(), submitted.ended.as_second())),
        ..JobRef::new(submitted.job.clone(), uid.clone())
    };
    while Instant::now() < until {
        let pause = tokio::time::sleep(site.scheduler.round_interval());
        tokio::pin!(pause);
        loop {
            tokio::select! {
                biased;
                Some(input) = inputs.recv() => match input {
                    Input::Link => journey.linked = true,
                    Input::Event(Event::Report(report)) => journey.report = Some(*report),
                    Input::Event(_)
                    | Input::Ensure { .. }
                    | Input::Values { .. }
                    | Input::Delete { .. }
                    | Input::Address { .. }
                    | Input::Forget { .. } => {}
                },
                () = &mut pause => break,
            }
        }
        let Ok(round) = site.scheduler.round(std::slice::from_ref(&reference)).await else {
            continue;
        };
        let own = round.jobs.into_iter().find(|view| view.id == submitted.job);
        let ended = own
            .as_ref()
            .is_some_and(|view| view.state.phase() == JobPhase::Ended);
        journey.last = own.or(journey.last);
        if ended || round.missing.contains(&reference) {
            return journey;
        }
    }
    if let Err(error) = site.scheduler.cancel(&reference, Cancel::Kill).await {
        tracing::warn!(job = %submitted.job, error = chain(&error), "cannot cancel the probe's job");
    }
    journey
}

fn judge(submitted: &Submitted, journey: &ProbeRun, file: Option<&pb::Report>) -> Vec<Finding> {
    let job = &submitted.job;
    let span = submitted.ended.duration_since(submitted.began).as_millis();
    let mut findings = vec![finding(
        "probe: submit",
        Ok(format!("job {job} was accepted in {span} ms")),
        "",
    )];
    let state = journey.last.as_ref().map_or_else(
        || "not known to the scheduler".to_owned(),
        |view| format!("{} {} {}", view.state, view.reason, view.nodes),
    );
    let started = journey.last.as_ref().and_then(|view| view.started_at);
    let waited = started.map(|at| at - submitted.ended.as_second());
    findings.push(finding(
        "probe: start",
        waited
            .map(|s| format!("started after {} s", s.max(0)))
            .ok_or_else(|| state.clone()),
        "the queue is full, or the job's limits do not fit the partition: see squeue -j",
    ));
    let well = |report: &pb::Report| report.outcome() == pb::OutcomeKind::Succeeded;
    findings.push(finding(
        "probe: report",
        match file {
            Some(report) if well(report) => Ok(format!("the shim ran on {}", report.hostname)),
            Some(report) => Err(format!("{}: {}", report.reason, report.message)),
            None => Err(format!(
                "the shim sent no report; the job is {}",
                state.trim()
            )),
        },
        "compute nodes must see state_dir at the same path, and may run programs from it",
    ));
    findings.push(finding(
        "probe: link",
        if journey.linked || journey.report.is_some() {
            Ok("the shim connected to the agent".to_owned())
        } else if let Some(route) = journey.isolated.as_ref() {
            Ok(format!("the shim did not connect, and need not: {route}"))
        } else {
            Err("the shim did not reach the agent".to_owned())
        },
        "set listen.shim_addresses to an address that compute nodes reach; open its port",
    ));
    findings
}
