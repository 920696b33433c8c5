use std::{future::ready, path::Path};

use knoc_proto::pod::PodSpec;

use crate::scheduler::{JobExit, JobPhase, JobState};

use super::*;

struct World {
    dir: tempfile::TempDir,
    local: Local,
}

impl World {
    fn new() -> Self {
        Self::with(|settings| settings)
    }

    fn with(change: impl FnOnce(Settings) -> Settings) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let pods = dir.path().join("pods");
        std::fs::create_dir(&pods).unwrap();
        let local = Local::new(change(Settings::new(pods)));
        Self { dir, local }
    }

    /// Starts over as an agent that was killed and restarted.
    fn restart(&mut self) {
        self.local = Local::new(self.local.settings.as_ref().clone());
    }

    async fn submit(&self, uid: &str, shim: &str) -> JobRef {
        let jobdir = self.dir.path().join("pods").join(uid);
        std::fs::create_dir_all(&jobdir).unwrap();
        let program = jobdir.join("program");
        {
            use std::io::Write as _;
            let mut file = std::fs::File::create(&program).unwrap();
            writeln!(file, "#!/bin/sh\n{shim}").unwrap();
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            file.set_permissions(mode).unwrap();
        }
        let uid = PodUid::try_from(uid).unwrap();
        let request = SubmitRequest {
            uid: uid.clone(),
            spec: Arc::new(PodSpec::accepted_before(
                uid.clone(),
                knoc_proto::pb::PodSpec::default(),
            )),
            cluster_id: "c".to_owned(),
            attempt: 1,
            jobdir,
            shim: program,
        };
        let id = self
            .local
            .submit(&request, ready(Ok(())))
            .await
            .unwrap()
            .job;
        JobRef::new(id, uid)
    }

    async fn wait(&self, job: &JobRef, until: impl Fn(&JobView) -> bool) -> JobView {
        let mut last = None;
        for _ in 0..1000 {
            let round = self.local.round(std::slice::from_ref(job)).await.unwrap();
            last = round.jobs.into_iter().find(|view| job.is(view));
            if let Some(view) = last.as_ref().filter(|view| until(view)) {
                return view.clone();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        unreachable!("the state was not reached; last seen {last:?}");
    }

    async fn ended(&self, job: &JobRef) -> JobView {
        self.wait(job, |view| view.state.phase() == JobPhase::Ended)
            .await
    }
}

fn read(path: impl AsRef<Path>) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

#[tokio::test]
async fn exit_codes_and_signals() {
    let world = World::new();
    let cases = [
        (
            "a",
            "exit 0",
            JobState::Completed,
            JobExit { code: 0, signal: 0 },
        ),
        (
            "b",
            "exit 64",
            JobState::Failed,
            JobExit {
                code: 64,
                signal: 0,
            },
        ),
        (
            "c",
            "kill -9 $$",
            JobState::Failed,
            JobExit { code: 0, signal: 9 },
        ),
    ];
    for (uid, shim, state, exit) in cases {
        let job = world.submit(uid, shim).await;
        let view = world.ended(&job).await;
        assert_eq!((view.state, view.exit), (state, Some(exit)), "{uid}");
    }
}

#[tokio::test]
async fn the_shim_gets_its_job_id_and_directory_and_a_session_of_its_own() {
    let world = World::new();
    let job = world
        .submit(
            "a",
            "echo \"$SLURM_JOB_ID $1 $2\"; cut -d' ' -f1,6 /proc/$PPID/stat",
        )
        .await;
    world.ended(&job).await;
    let out = read(world.dir.path().join("pods/a/batch.out"));
    let expected = format!(
        "{} shim {}\n",
        job.id,
        world.dir.path().join("pods/a").display()
    );
    assert!(out.starts_with(&expected), "{out}");
    let line = out.lines().nth(1).unwrap();
    let (pid, session) = line.split_once(' ').unwrap();
    assert_eq!(pid, session, "the wrapper leads the session");
}

#[tokio::test]
async fn a_job_outlives_the_agent_and_its_exit_code_is_known() {
    let mut world = World::new();
    let job = world
        .submit("a", "while ! test -e go; do sleep 0.01; done; exit 7")
        .await;
    world
        .wait(&job, |view| view.state == JobState::Running)
        .await;
    world.restart();
    world
        .wait(&job, |view| view.state == JobState::Running)
        .await;
    std::fs::File::create(world.dir.path().join("pods/a/go")).unwrap();
    world.ended(&job).await;
    world.restart();
    let view = world.ended(&job).await;
    assert_eq!(view.exit, Some(JobExit { code: 7, signal: 0 }));
    let found = world.local.find(&job.uid).await.unwrap();
    assert_eq!(found.len(), 1, "{found:?}");
}

#[tokio::test]
async fn a_job_is_started_once_by_any_agent() {
    let mut world = World::with(|settings| Settings {
        max_running: 1,
        ..settings
    });
    let first = world
        .submit("a", "while ! test -e go; do sleep 0.01; done")
        .await;
    let second = world
        .submit(
            "b",
            "echo once >>count; while ! test -e go; do sleep 0.01; done",
        )
        .await;
    let view = world
        .wait(&second, |view| view.state == JobState::Pending)
        .await;
    assert_eq!(view.reason, "Resources");
    std::fs::File::create(world.dir.path().join("pods/a/go")).unwrap();
    world.ended(&first).await;
    world
        .wait(&second, |view| view.state.phase() == JobPhase::Running)
        .await;
    // The agent is killed right after the start and has not recorded it.
    world.restart();
    world
        .wait(&second, |view| view.state == JobState::Running)
        .await;
    std::fs::File::create(world.dir.path().join("pods/b/go")).unwrap();
    world.ended(&second).await;
    assert_eq!(read(world.dir.path().join("pods/b/count")), "once\n");
}

#[tokio::test]
async fn cancel_means_what_it_says() {
    let world = World::with(|settings| Settings {
        kill_wait: Duration::from_secs(1),
        ..settings
    });
    let trap = "trap 'echo term; exit 64' TERM; while :; do sleep 0.01; done";
    let job = world.submit("a", trap).await;
    world
        .wait(&job, |view| view.state == JobState::Running)
        .await;
    world.local.cancel(&job, Cancel::Queued).await.unwrap();
    assert_eq!(world.wait(&job, |_| true).await.state, JobState::Running);
    let out = world.dir.path().join("pods/a/batch.out");
    // The trap is set a moment after the job has started.
    world.local.cancel(&job, Cancel::Terminate).await.unwrap();
    let view = world.ended(&job).await;
    assert!(
        matches!(view.state, JobState::Failed),
        "{view:?} {}",
        read(out)
    );

    // The batch script ignores USR1 until a shim asks for it, which a shell cannot do.
    let told = world
        .submit(
            "c",
            "exec env --default-signal=USR1 /bin/sh -c \
             'trap \"exit 3\" USR1; trap : TERM; touch set; while :; do sleep 0.01; done'",
        )
        .await;
    let set = world.dir.path().join("pods/c/set");
    world.wait(&told, |_| set.exists()).await;
    world.local.cancel(&told, Cancel::Stop).await.unwrap();
    let view = world.ended(&told).await;
    assert_eq!(view.exit.map(|exit| exit.code), Some(3), "{view:?}");

    let stubborn = world
        .submit(
            "b",
            "trap '' TERM; sleep 600 & while :; do sleep 0.01; done",
        )
        .await;
    world
        .wait(&stubborn, |view| view.state == JobState::Running)
        .await;
    world.local.cancel(&stubborn, Cancel::Kill).await.unwrap();
    let view = world.ended(&stubborn).await;
    assert_eq!(view.state, JobState::Cancelled { by: None });
    world.local.cancel(&stubborn, Cancel::Kill).await.unwrap();
}

#[tokio::test]
async fn an_unknown_job_or_a_wrong_uid_is_missing() {
    let world = World::new();
    let job = world.submit("a", "exit 0").await;
    let stranger = JobRef::new(job.id.clone(), PodUid::try_from("other").unwrap());
    let round = world.local.round(&[job, stranger.clone()]).await.unwrap();
    assert_eq!(round.missing, [stranger]);
}

#[test]
fn a_pod_of_ranks_is_refused_with_the_annotations_that_ask_for_them() {
    let world = World::new();
    let uid = PodUid::try_from("0e9f5ac4-87ad-4ee6-9b5c-3a9be2f9fd73").unwrap();
    let spec = knoc_proto::pb::PodSpec {
        job: Some(knoc_proto::pb::JobRequest {
            mpi: Some(knoc_proto::pb::Mpi::default()),
            ..Default::default()
        }),
        ..Default::default()
    };
    let request = SubmitRequest {
        uid: uid.clone(),
        spec: Arc::new(PodSpec::accepted_before(uid, spec)),
        cluster_id: "c".to_owned(),
        attempt: 1,
        jobdir: world.dir.path().join("pods/x"),
        shim: world.dir.path().join("program"),
    };
    let error = world.local.render(&request).unwrap_err();
    assert_eq!(error.kind, SubmitErrorKind::Permanent);
    assert!(error.message.contains("knoc.io/mpi"), "{error}");
}
