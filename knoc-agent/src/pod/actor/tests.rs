//! Tests of actors with a real state directory and scripts in the place of Slurm's commands.

use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use knoc_contract::{capability::STOP_SIGNAL, jobdir::atomic};
use knoc_proto::{
    ids::PodUid,
    pb::{self, PodPhase},
    pod::{PodSpec, PodValues},
    reason::ErrorReason,
};
use tokio_util::sync::CancellationToken;

use super::facts;
use crate::{
    app::fake::{Fake, SOON, spec, values},
    lease::{Holder, Process, STALE},
    pod::{
        input::{Input, RequestError},
        record::Record,
        stage,
        state::{Event, Pod},
    },
    registry::Registry,
};

/// Slurm's commands as scripts that log their calls. Submissions run one at a time, at most `rate`
/// in a second.
async fn slurm(rate: f32) -> Fake {
    let fake = Fake::new(&format!(
        "[env]\nPATH = \"{{dir}}:/usr/bin:/bin\"\n\
         [limits]\nsbatch_burst = 1\nsbatch_rate = {rate:?}\n"
    ))
    .await;
    for (name, script) in [
        ("sinfo", "true"),
        ("sbatch", "cat >/dev/null; echo 7"),
        ("scancel", "true"),
    ] {
        program(&fake, name, script);
    }
    fake
}

fn program(fake: &Fake, name: &str, script: &str) {
    let path = fake.path().join(name);
    let calls = fake.path().join("calls");
    let text = format!(
        "#!/bin/sh\n{script}\necho \"{name} $*\" >>'{}'\n",
        calls.display()
    );
    atomic::write(&path, text.as_bytes(), 0o755).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// How many calls of a command have this text in their arguments.
fn calls(fake: &Fake, name: &str, part: &str) -> usize {
    let text = std::fs::read_to_string(fake.path().join("calls")).unwrap_or_default();
    let lines = text.lines().filter(|line| line.starts_with(name));
    lines.filter(|line| line.contains(part)).count()
}

/// Waits for a call of a command with this text in its arguments.
async fn called(fake: &Fake, name: &str, part: &str) {
    let asked = async {
        while calls(fake, name, part) == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let waited = tokio::time::timeout(SOON, asked).await;
    waited.unwrap_or_else(|_| panic!("never: {name} {part}"));
}

fn uid(name: &str) -> PodUid {
    PodUid::try_from(name).unwrap()
}

/// Sends an event to a pod's actor.
fn happens(fake: &Fake, uid: &PodUid, event: Event) {
    let handles = fake.registry.handles();
    let (_, handle) = handles.iter().find(|(known, _)| known == uid).unwrap();
    assert!(handle.offer(Input::Event(event)));
}

/// The report of a shim whose pod runs.
fn report(uid: &PodUid) -> pb::Report {
    pb::Report {
        uid: uid.to_string(),
        job_id: "7".to_owned(),
        sequence: 1,
        capabilities: vec![STOP_SIGNAL.to_owned()],
        ..pb::Report::default()
    }
}

/// A pod whose shim has reported that it runs.
async fn running(fake: &Fake, name: &str) -> PodUid {
    let uid = uid(name);
    fake.ensure(&uid).await;
    fake.seen(&uid, |seen| seen.phase() == PodPhase::Queued)
        .await;
    happens(fake, &uid, Event::Report(Box::new(report(&uid))));
    fake.seen(&uid, |seen| seen.phase() == PodPhase::Running)
        .await;
    uid
}

/// A pod that has succeeded; its job still exists.
async fn finished(fake: &Fake, name: &str) -> PodUid {
    let uid = running(fake, name).await;
    let last = pb::Report {
        sequence: 2,
        r#final: true,
        outcome: pb::OutcomeKind::Succeeded.into(),
        ..report(&uid)
    };
    happens(fake, &uid, Event::Report(Box::new(last)));
    fake.seen(&uid, |seen| seen.phase() == PodPhase::Finished)
        .await;
    // The pod is published before its record is written; this request is answered after both.
    fake.ensure(&uid).await;
    uid
}

/// The files of a pod that an agent was staging when it died.
fn half_staged(fake: &Fake, spec: &pb::PodSpec, version: &str) {
    let uid = uid(&spec.uid);
    let spec = PodSpec::try_from(spec.clone()).unwrap();
    let facts = facts(&spec, &fake.site.config);
    let record = Record::of(&Pod::new(facts, Timestamp::now()), "", 1);
    let mut job = stage::job_file(&fake.site, &spec, Vec::new(), String::new());
    version.clone_into(&mut job.version);
    stage::accept(&fake.site.state.pod(&uid), &job, &record, Some(values())).unwrap();
}

/// A newer generation of the pod's shape.
fn newer(uid: &PodUid) -> pb::PodSpec {
    pb::PodSpec {
        generation: 2,
        labels: [("colour".to_owned(), "blue".to_owned())].into(),
        ..spec(uid)
    }
}

/// An agent on another host takes over, as if this one had been silent for too long.
fn fence(fake: &Fake) {
    let other = Process {
        host: "elsewhere".to_owned(),
        ..Process::own()
    };
    let later = Timestamp::now() + 2 * STALE;
    Holder::take(&fake.site.state, &other, later).unwrap();
}

#[tokio::test]
async fn an_agent_that_is_fenced_while_it_waits_for_its_rate_submits_nothing() {
    let fake = slurm(0.5).await;
    let [first, second] = ["a", "b"].map(uid);
    fake.ensure(&first).await;
    fake.seen(&first, |seen| seen.phase() == PodPhase::Queued)
        .await;
    fake.ensure(&second).await;
    // The wait takes two seconds; only during it would a check that came too early show.
    tokio::time::sleep(Duration::from_millis(300)).await;
    fence(&fake);
    fake.seen(&second, |seen| {
        matches!(seen.phase(), PodPhase::Throttled | PodPhase::Queued)
    })
    .await;
    let seen = fake.site.board.get("b").unwrap();
    assert!(seen.message.contains("was fenced"), "{}", seen.message);
    assert_eq!(calls(&fake, "sbatch", ""), 1);
}

/// Puts a folder at the path, which no rename can replace.
fn block(path: &Path) {
    std::fs::remove_file(path).unwrap();
    std::fs::create_dir(path).unwrap();
}

/// If a pod is deleted while its record cannot be written, its containers still get their whole
/// grace period.
#[tokio::test]
async fn what_a_failed_write_held_back_is_done_once_it_succeeds() {
    let fake = slurm(100.0).await;
    let pod = running(&fake, "a").await;
    let record = fake.site.state.pod(&pod).record_path();
    block(&record);
    let grace = Some(Duration::from_hours(1));
    let rejected = fake.registry.delete(&pod, grace, String::new()).await;
    assert_eq!(rejected.unwrap_err().reason, ErrorReason::Internal);
    assert_eq!(calls(&fake, "scancel", ""), 0);
    std::fs::remove_dir(&record).unwrap();
    called(&fake, "scancel", "--signal=USR1").await;
    assert_eq!(fake.site.state.pod(&pod).stop_grace(), grace);
    let deleted = fake.registry.delete(&pod, grace, String::new()).await;
    assert!(deleted.unwrap().deleting);
}

/// The answer of a running sbatch is awaited even if records cannot be written meanwhile. Its job
/// would be lost otherwise.
#[tokio::test]
async fn a_record_that_cannot_be_written_during_sbatch_loses_no_job() {
    let fake = slurm(100.0).await;
    let gate = fake.path().join("gate");
    let waits = format!(
        "cat >/dev/null; while ! test -e '{}'; do sleep 0.01; done; echo 7",
        gate.display()
    );
    program(&fake, "sbatch", &waits);
    let pod = uid("a");
    fake.ensure(&pod).await;
    let record = fake.site.state.pod(&pod).record_path();
    block(&record);
    let rejected = fake.registry.delete(&pod, None, String::new()).await;
    rejected.unwrap_err();
    std::fs::remove_dir(&record).unwrap();
    atomic::write(&gate, b"", 0o600).unwrap();
    called(&fake, "scancel", "--state=PENDING 7").await;
}

/// Whoever removes the handle after the end was announced finds the actor's channel closed.
#[tokio::test]
async fn a_pod_that_has_ended_leaves_no_handle() {
    let fake = slurm(100.0).await;
    let pod = finished(&fake, "a").await;
    // The end cannot be announced yet: the actor waits in that very call.
    while fake.site.ended.try_send(uid("another")).is_ok() {}
    fake.registry.forget(&pod).await.unwrap();
    fake.gone(&pod).await;
    fake.registry.release(&pod);
    assert!(fake.registry.is_empty());
}

/// A pod whose job has outlived its report by an hour, as a newly started agent finds it.
async fn outlived(fake: &Fake, name: &str) -> (PodUid, Arc<Registry>) {
    let pod = finished(fake, name).await;
    let record = fake.site.state.pod(&pod).record_path();
    let text = std::fs::read(&record).unwrap();
    let mut text: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let hour_ago = Timestamp::now() - Duration::from_hours(1);
    text["since"] = hour_ago.to_string().into();
    atomic::write(&record, &serde_json::to_vec(&text).unwrap(), 0o600).unwrap();
    let restarted = Registry::new(Arc::clone(&fake.site), 100, CancellationToken::new());
    assert_eq!(restarted.recover().await.unwrap(), 1);
    (pod, restarted)
}

/// A command that begins, waits for `open` and then ends.
struct Gate {
    begun: PathBuf,
    open: PathBuf,
}

impl Gate {
    fn new(fake: &Fake, name: &str) -> Self {
        let [begun, open] = ["begun", "open"].map(|file| fake.path().join(file));
        let waits = format!(
            "touch '{}'; while ! test -e '{}'; do sleep 0.01; done",
            begun.display(),
            open.display()
        );
        program(fake, name, &waits);
        Self { begun, open }
    }

    async fn begun(&self) {
        let looking = async {
            while !self.begun.exists() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let looked = tokio::time::timeout(SOON, looking).await;
        looked.unwrap_or_else(|_| panic!("never begun, or cut off"));
    }

    fn open(&self) {
        atomic::write(&self.open, b"", 0o600).unwrap();
    }
}

/// Nobody knows the job of a forgotten pod, so its cancellation is not aborted.
#[tokio::test]
async fn a_job_that_is_being_cancelled_when_its_pod_is_forgotten_is_cancelled() {
    let fake = slurm(100.0).await;
    let gate = Gate::new(&fake, "scancel");
    let (pod, restarted) = outlived(&fake, "a").await;
    let opened = async {
        gate.begun().await;
        gate.open();
    };
    let (forgotten, ()) = tokio::join!(restarted.forget(&pod), opened);
    forgotten.unwrap();
    called(&fake, "scancel", "7").await;
    fake.gone(&pod).await;
    assert!(!fake.site.state.pod(&pod).path().exists());
}

/// A record that could not be written before is not written now: it would be that of a newly
/// accepted pod.
#[tokio::test]
async fn a_pod_that_is_being_forgotten_is_not_recorded_as_a_new_one() {
    let fake = slurm(100.0).await;
    let gate = Gate::new(&fake, "scancel");
    let (pod, restarted) = outlived(&fake, "a").await;
    let record = fake.site.state.pod(&pod).record_path();
    block(&record);
    let deleted = restarted.delete(&pod, None, String::new()).await;
    let told = deleted.unwrap_err().message;
    assert!(
        told.starts_with("the pod's record could not be written: ")
            && told.contains("Is a directory"),
        "{told}"
    );
    std::fs::remove_dir(&record).unwrap();
    let opened = async {
        gate.begun().await;
        assert!(!record.exists());
        gate.open();
    };
    let (forgotten, ()) = tokio::join!(restarted.forget(&pod), opened);
    forgotten.unwrap();
    fake.gone(&pod).await;
    assert!(!fake.site.state.pod(&pod).path().exists());
}

/// The pods belong to the newer agent: no record is changed, and no job is ended.
#[tokio::test]
async fn an_agent_that_is_fenced_changes_nothing() {
    let fake = slurm(100.0).await;
    let pod = running(&fake, "a").await;
    let done = finished(&fake, "b").await;
    let record = |pod: &PodUid| std::fs::read(fake.site.state.pod(pod).record_path()).unwrap();
    let before = record(&pod);
    fence(&fake);
    let reason = |rejected: RequestError| rejected.reason;
    let rejected = fake.registry.delete(&pod, None, String::new()).await;
    assert_eq!(rejected.map_err(reason), Err(ErrorReason::ShuttingDown));
    for spec in [newer(&pod), spec(&uid("c"))] {
        let rejected = fake.ensure_as(spec).await;
        assert_eq!(rejected.map_err(reason), Err(ErrorReason::ShuttingDown));
    }
    assert!(!fake.site.state.pod(&uid("c")).path().exists());
    let rejected = fake.registry.forget(&done).await;
    assert_eq!(rejected.map_err(reason), Err(ErrorReason::ShuttingDown));
    record(&done);
    // Events of the pod are still published.
    let last = pb::Report {
        sequence: 2,
        r#final: true,
        ..report(&pod)
    };
    happens(&fake, &pod, Event::Report(Box::new(last)));
    fake.seen(&pod, |seen| seen.phase() == PodPhase::Finished)
        .await;
    // This request is sent and answered after it.
    fake.registry.forget(&pod).await.unwrap_err();
    assert_eq!(record(&pod), before);
    assert_eq!(calls(&fake, "scancel", ""), 0);
}

#[tokio::test]
async fn a_newer_shape_that_comes_during_staging_is_what_the_job_runs() {
    let fake = slurm(100.0).await;
    let of_two = |mut spec: pb::PodSpec| {
        spec.containers.push(pb::Container {
            name: "second".to_owned(),
            ..spec.containers[0].clone()
        });
        spec
    };
    let pod = uid("a");
    half_staged(&fake, &of_two(spec(&pod)), fake.site.versions.own());
    fake.registry.recover().await.unwrap();
    // Staging notes each image. The queue has no room for the note of the second one before the
    // newer shape is taken.
    let filled = async {
        let (_, handle) = &fake.registry.handles()[0];
        while handle.offer(Input::Event(Event::Tick)) {}
    };
    let newer = of_two(newer(&pod));
    let (taken, ()) = tokio::join!(fake.ensure_as(newer.clone()), filled);
    taken.unwrap();
    fake.seen(&pod, |seen| seen.phase() == PodPhase::Queued)
        .await;
    let job = fake.site.state.pod(&pod).spec().unwrap();
    assert_eq!(job.images.len(), 2);
    assert_eq!(job.spec.unwrap(), newer);
}

#[tokio::test]
async fn a_newer_shape_that_cannot_be_written_is_not_taken_for_written() {
    let fake = slurm(100.0).await;
    let pod = running(&fake, "a").await;
    let dir = fake.site.state.pod(&pod);
    let kept = std::fs::read(dir.spec_path()).unwrap();
    block(&dir.spec_path());
    let rejected = fake.ensure_as(newer(&pod)).await;
    assert_eq!(rejected.unwrap_err().reason, ErrorReason::Internal);
    assert_eq!(fake.site.board.get("a").unwrap().spec_generation, 1);
    std::fs::remove_dir(dir.spec_path()).unwrap();
    atomic::write(&dir.spec_path(), &kept, 0o600).unwrap();
    fake.ensure_as(newer(&pod)).await.unwrap();
    assert_eq!(dir.spec().unwrap().spec.unwrap(), newer(&pod));
    assert_eq!(fake.site.board.get("a").unwrap().spec_generation, 2);
}

/// The agent may end right after it wrote the shape, and the next one gives the shim the container.
#[tokio::test]
async fn the_variables_of_a_container_that_is_added_are_there_before_it_is() {
    let fake = slurm(100.0).await;
    let pod = uid("a");
    fake.ensure(&pod).await;
    fake.seen(&pod, |seen| seen.phase() == PodPhase::Queued)
        .await;
    let mut debugged = newer(&pod);
    debugged.ephemeral_containers = vec![pb::Container {
        name: "debug".to_owned(),
        ..debugged.containers[0].clone()
    }];
    let debugged = PodSpec::try_from(debugged).unwrap();
    let second = pb::PodValues {
        revision: 2,
        ..values()
    };
    let second = PodValues::check(second, &debugged).unwrap();
    let dir = fake.site.state.pod(&pod);
    block(&dir.spec_path());
    let ensured = fake.registry.ensure(debugged, second, None, String::new());
    assert_eq!(ensured.await.unwrap_err().reason, ErrorReason::Internal);
    assert_eq!(dir.values().unwrap().unwrap().revision, 2);
}

/// A pod that is staged again runs this agent's version, so no job directory names the older one
/// any more.
#[tokio::test]
async fn a_version_is_released_when_its_pod_is_staged_again() {
    let fake = slurm(100.0).await;
    let older = fake.site.state.versions().join("0.0.1");
    atomic::create_dir(&older).unwrap();
    atomic::write(&older.join("knoc-agent"), b"older", 0o755).unwrap();
    let pod = uid("a");
    half_staged(&fake, &spec(&pod), "0.0.1");
    fake.registry.recover().await.unwrap();
    fake.seen(&pod, |seen| seen.phase() == PodPhase::Queued)
        .await;
    let job = fake.site.state.pod(&pod).spec().unwrap();
    assert_eq!(job.version, fake.site.versions.own());
    assert!(!older.exists());
}

/// A pod that is not in a snapshot is one that the agent does not know: the kubelet fails it if it
/// ran.
#[tokio::test]
async fn every_restored_pod_is_on_the_board_before_a_snapshot_can_be_sent() {
    let fake = slurm(100.0).await;
    let pod = running(&fake, "a").await;
    // As after a restart, when nothing is published yet.
    fake.site.board.remove("a");
    let restarted = Registry::new(Arc::clone(&fake.site), 100, CancellationToken::new());
    assert_eq!(restarted.recover().await.unwrap(), 1);
    let (shown, _) = fake.site.board.snapshot();
    let shown: Vec<_> = shown
        .iter()
        .map(|seen| (&*seen.uid, seen.phase()))
        .collect();
    assert_eq!(shown, [(pod.as_str(), PodPhase::Running)]);
    let (_, handle) = &restarted.handles()[0];
    assert!(
        handle.wanted().job.is_some(),
        "the first round asks about its job"
    );
}
