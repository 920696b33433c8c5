//! Actors over a real state directory and a scheduler of scripts.

use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use knoc_contract::capability::STOP_SIGNAL;
use knoc_contract::jobdir::atomic;
use knoc_proto::{
    ids::PodUid,
    pb::{self, PodPhase},
    pod::PodSpec,
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

/// Slurm's commands as scripts that note what they were asked, and so many submissions a second, one at a time.
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

/// How often a command was asked with these words in its arguments.
fn calls(fake: &Fake, name: &str, words: &str) -> usize {
    let text = std::fs::read_to_string(fake.path().join("calls")).unwrap_or_default();
    let lines = text.lines().filter(|line| line.starts_with(name));
    lines.filter(|line| line.contains(words)).count()
}

/// Waits until a command was asked with these words.
async fn called(fake: &Fake, name: &str, words: &str) {
    let asked = async {
        while calls(fake, name, words) == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let waited = tokio::time::timeout(SOON, asked).await;
    waited.unwrap_or_else(|_| panic!("never: {name} {words}"));
}

fn uid(name: &str) -> PodUid {
    PodUid::try_from(name).unwrap()
}

/// Something happens to a pod.
fn happens(fake: &Fake, uid: &PodUid, event: Event) {
    let handles = fake.registry.handles();
    let (_, handle) = handles.iter().find(|(known, _)| known == uid).unwrap();
    assert!(handle.offer(Input::Event(event)));
}

/// What the shim of a pod says that runs.
fn report(uid: &PodUid) -> pb::Report {
    pb::Report {
        uid: uid.to_string(),
        job_id: "7".to_owned(),
        sequence: 1,
        capabilities: vec![STOP_SIGNAL.to_owned()],
        ..pb::Report::default()
    }
}

/// A pod whose shim said that it runs.
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

/// A pod that has succeeded; its job is still there.
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
    // It is seen before its record is written; what is asked after it is answered after it.
    fake.ensure(&uid).await;
    uid
}

/// What an agent that died left of a pod which it was staging.
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

/// Another host's agent takes over, as if we had been silent for too long.
fn fence(fake: &Fake) {
    let other = Process {
        host: "elsewhere".to_owned(),
        ..Process::own()
    };
    let later = Timestamp::now() + 2 * STALE;
    Holder::take(&fake.site.state, other, later).unwrap();
}

#[tokio::test]
async fn an_agent_that_is_fenced_while_it_waits_for_its_rate_submits_nothing() {
    let fake = slurm(0.5).await;
    let [first, second] = ["a", "b"].map(uid);
    fake.ensure(&first).await;
    fake.seen(&first, |seen| seen.phase() == PodPhase::Queued)
        .await;
    fake.ensure(&second).await;
    // Into the wait of two seconds: only there a check that came too early shows.
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

/// Nothing can be renamed over a folder.
fn block(path: &Path) {
    std::fs::remove_file(path).unwrap();
    std::fs::create_dir(path).unwrap();
}

/// The containers of a pod that is deleted while its record cannot be written have their whole grace all the same.
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
    let deleted = fake.registry.delete(&pod, grace, String::new()).await;
    assert!(deleted.unwrap().deleting);
}

/// The answer of an sbatch that runs is awaited, whatever else cannot be written meanwhile: its job would be lost.
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

/// Who takes the handle off the map when the end is told finds the actor's end of it closed already.
#[tokio::test]
async fn a_pod_that_has_ended_leaves_no_handle() {
    let fake = slurm(100.0).await;
    let pod = finished(&fake, "a").await;
    // Its end cannot be told yet: the actor stands right where it tells.
    while fake.site.ended.try_send(uid("another")).is_ok() {}
    fake.registry.forget(&pod).await.unwrap();
    fake.gone(&pod).await;
    fake.registry.release(&pod);
    assert!(fake.registry.is_empty());
}

/// A pod whose job outlived its report by an hour, as an agent finds it that has just started.
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

/// A command that begins, waits for `open` and ends.
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

/// Nobody knows the job of a forgotten pod any more: what ends it is not cut off.
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

/// A record that could not be written before is not written then: it would be that of a pod just accepted.
#[tokio::test]
async fn a_pod_that_is_being_forgotten_is_not_recorded_as_a_new_one() {
    let fake = slurm(100.0).await;
    let gate = Gate::new(&fake, "scancel");
    let (pod, restarted) = outlived(&fake, "a").await;
    let record = fake.site.state.pod(&pod).record_path();
    block(&record);
    let deleted = restarted.delete(&pod, None, String::new()).await;
    deleted.unwrap_err();
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

/// What a newer agent has taken over is its own: no record is changed, and no job ended.
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
    // What happens to the pod is still seen.
    let last = pb::Report {
        sequence: 2,
        r#final: true,
        ..report(&pod)
    };
    happens(&fake, &pod, Event::Report(Box::new(last)));
    fake.seen(&pod, |seen| seen.phase() == PodPhase::Finished)
        .await;
    // Asked after it, answered after it.
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
    // Staging notes each image. For that of the second one there is no place in the queue before the newer shape is taken.
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

/// What is staged again runs our own version: no job directory names the older one any more.
#[tokio::test]
async fn a_version_is_let_go_when_the_pod_that_named_it_is_staged_again() {
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
