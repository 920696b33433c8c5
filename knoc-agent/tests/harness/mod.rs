//! A job for the shim to run, and the agent's end of its link.
//!
//! By default with the process runtime and no root. `KNOC_TEST_RUNTIME=apptainer`, `KNOC_TEST_RUNTIME_PATH` and
//! `KNOC_TEST_IMAGE` run the same tests in containers, `KNOC_TEST_AGENT` names another executable. `tests/tests/l3_shim.rs` does so with
//! those that need containers.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
#![allow(dead_code, reason = "each test binary uses a part")]

pub(crate) mod streams;

use std::{
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use futures::StreamExt as _;
use knoc_contract::jobdir::{JobDir, StateDir, schema::Endpoint, write_json};
use knoc_link::pinned::KeyPair;
use knoc_proto::pb::{self, shim_client::ShimClient};
use tonic::transport::Channel;

/// For whatever a test waits for: long, as the machine may be loaded.
pub(crate) const DEADLINE: Duration = Duration::from_mins(2);

pub(crate) struct Job {
    _root: tempfile::TempDir,
    pub(crate) state: StateDir,
    pub(crate) dir: JobDir,
    pub(crate) file: pb::JobFile,
    pub(crate) values: pb::PodValues,
    child: Option<Child>,
    /// The path of the image of all containers.
    pub(crate) image: String,
    /// Its identity, as of an image that the agent has not converted.
    pub(crate) image_file: Option<pb::ImageFileId>,
    pub(crate) env: Vec<(String, String)>,
    /// What the shell does that becomes the shim.
    pub(crate) under: &'static str,
}

pub(crate) fn var(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Do the containers have namespaces of their own?
pub(crate) fn isolated() -> bool {
    var("KNOC_TEST_RUNTIME").is_some_and(|runtime| runtime != "process")
}

pub(crate) fn sh(name: &str, script: &str) -> pb::Container {
    let words = ["sh", "-c", script];
    pb::Container {
        name: name.to_owned(),
        image: "test".to_owned(),
        command: words.map(str::to_owned).to_vec(),
        ..Default::default()
    }
}

impl Job {
    pub(crate) fn new(containers: Vec<pb::Container>) -> Self {
        let base = var("KNOC_TEST_DIR").unwrap_or_else(|| "/tmp".to_owned());
        let root = tempfile::Builder::new()
            .prefix("shim")
            .tempdir_in(base)
            .unwrap();
        let state = StateDir::new(root.path().join("state"));
        state.create().unwrap();
        let dir = state.pod(&knoc_proto::ids::PodUid::try_from("pod-uid").unwrap());
        dir.create().unwrap();
        let spec = pb::PodSpec {
            uid: "pod-uid".to_owned(),
            namespace: "default".to_owned(),
            name: "pod".to_owned(),
            restart_policy: pb::RestartPolicy::Never.into(),
            termination_grace_period_seconds: 30,
            containers,
            ..Default::default()
        };
        let file = pb::JobFile {
            spec: Some(spec),
            runtime: var("KNOC_TEST_RUNTIME").unwrap_or_else(|| "process".to_owned()),
            runtime_path: var("KNOC_TEST_RUNTIME_PATH").unwrap_or_default(),
            runtime_env: ["PATH", "HOME"]
                .into_iter()
                .filter_map(|name| Some((name.to_owned(), var(name)?)))
                .collect(),
            settings: Some(pb::ShimSettings {
                backoff_initial_ms: 50,
                backoff_max_ms: 200,
                log_debug: true,
                ..Default::default()
            }),
            ..Default::default()
        };
        let values = pb::PodValues {
            revision: 1,
            ..Default::default()
        };
        Self {
            _root: root,
            state,
            dir,
            file,
            values,
            child: None,
            image: var("KNOC_TEST_IMAGE").unwrap_or_default(),
            image_file: None,
            env: Vec::new(),
            under: ":",
        }
    }

    pub(crate) fn spec(&mut self) -> &mut pb::PodSpec {
        self.file.spec.as_mut().unwrap()
    }

    pub(crate) fn set_env(&mut self, container: &str, vars: Vec<(&str, Vec<u8>)>) {
        let vars = vars.into_iter().map(|(name, value)| pb::EnvVar {
            name: name.to_owned(),
            value: Some(pb::env_var::Value::Literal(value.into())),
        });
        let env = pb::ContainerEnv {
            container: container.to_owned(),
            vars: vars.collect(),
        };
        self.values.env.push(env);
    }

    /// Writes the job directory and starts the shim.
    pub(crate) fn start(&mut self) {
        let names: Vec<String> = {
            let spec = self.file.spec.as_ref().unwrap();
            spec.init_containers
                .iter()
                .chain(&spec.containers)
                .map(|c| c.name.clone())
                .collect()
        };
        self.file.images = names
            .into_iter()
            .map(|container| pb::ResolvedImage {
                container,
                path: self.image.clone(),
                image_id: "test@sha256:0".to_owned(),
                config: Some(pb::ImageConfig {
                    env: vec![format!("PATH={}", var("PATH").unwrap_or_default())],
                    ..Default::default()
                }),
                file: self.image_file.clone(),
                ..Default::default()
            })
            .collect();
        self.dir.write_spec(&self.file).unwrap();
        if self.values.revision > 0 {
            self.dir.write_values(&self.values).unwrap();
        }
        self.spawn();
    }

    #[expect(clippy::disallowed_methods, reason = "the test starts the shim")]
    pub(crate) fn spawn(&mut self) {
        let agent =
            var("KNOC_TEST_AGENT").unwrap_or_else(|| env!("CARGO_BIN_EXE_knoc-agent").to_owned());
        let out = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.batch_out())
            .unwrap();
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", &format!("{} && exec \"$@\"", self.under), "sh"])
            .arg(agent)
            .arg("shim")
            .arg(self.dir.path())
            .env_remove("SLURM_JOB_ID")
            .env_remove("SLURM_RESTART_COUNT")
            .env("KNOC_JOB_ID", "4711")
            .env("LEAKED", "must not reach the container")
            .envs(self.env.clone())
            .stdin(Stdio::null())
            .stderr(out.try_clone().unwrap())
            .stdout(out);
        self.child = Some(command.spawn().unwrap());
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.as_ref().unwrap().id()).unwrap()
    }

    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// The shim's exit, within the deadline.
    pub(crate) async fn wait(&mut self) -> ExitStatus {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.as_mut().unwrap().try_wait().unwrap() {
                return status;
            }
            assert!(
                began.elapsed() < DEADLINE,
                "the shim goes on: {:?}",
                self.state_words()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) async fn code(&mut self) -> i32 {
        let status = self.wait().await;
        status
            .code()
            .unwrap_or_else(|| panic!("{status}: {}", self.state_words()))
    }

    pub(crate) fn report(&self) -> pb::Report {
        self.dir.report().unwrap().expect("no report")
    }

    /// Waits until the report on disk satisfies `wanted`.
    pub(crate) async fn until(&self, wanted: impl Fn(&pb::Report) -> bool) -> pb::Report {
        let began = Instant::now();
        loop {
            if let Some(report) = self.dir.report().unwrap()
                && wanted(&report)
            {
                return report;
            }
            assert!(began.elapsed() < DEADLINE, "never: {}", self.state_words());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) fn state_words(&self) -> String {
        let out = std::fs::read_to_string(self.dir.batch_out()).unwrap_or_default();
        format!("report {:#?}\nbatch.out:\n{out}", self.dir.report())
    }

    pub(crate) fn log_path(&self, container: &str, attempt: u32) -> PathBuf {
        self.dir.log_path(container, attempt)
    }

    /// The text of a log, without the CRI frame.
    pub(crate) fn log(&self, container: &str, attempt: u32) -> String {
        let path = self.log_path(container, attempt);
        let bytes = knoc_contract::logs::read::last_text(&path, 1 << 30, 1 << 30).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    /// Listens as the agent does; to be called before [`Self::start`].
    pub(crate) async fn agent(&self) -> Agent {
        let pair = KeyPair::generate("agent").unwrap();
        let listening = knoc_link::pinned::listen("127.0.0.1:0".parse().unwrap(), pair.clone());
        let incoming = listening.await.unwrap();
        let address = incoming.local_addr().unwrap().to_string();
        let endpoint = Endpoint {
            addresses: vec![address],
            spki: pair.spki().to_owned(),
            trial: 1,
            isolated: false,
        };
        write_json(&self.state.endpoint(), &endpoint).unwrap();
        let shim = KeyPair::generate("shim").unwrap();
        let (cert, key) = self.dir.link_pair();
        knoc_contract::jobdir::atomic::write(&cert, shim.cert_pem().as_bytes(), 0o600).unwrap();
        knoc_contract::jobdir::atomic::write(&key, shim.key_pem().as_bytes(), 0o600).unwrap();
        Agent {
            incoming,
            spki: shim.spki().to_owned(),
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            child.kill().ok();
            child.wait().ok();
        }
        if std::thread::panicking() {
            eprintln!("{}", self.state_words());
        }
    }
}

pub(crate) struct Agent {
    incoming: knoc_link::Incoming,
    spki: String,
}

impl Agent {
    /// A client over the shim's next connection.
    pub(crate) async fn shim(&mut self) -> ShimClient<Channel> {
        ShimClient::new(self.channel().await).max_decoding_message_size(8 << 20)
    }

    /// The shim's next connection.
    pub(crate) async fn channel(&mut self) -> Channel {
        let next = tokio::time::timeout(DEADLINE, self.incoming.next());
        let next = next.await.expect("the shim did not dial");
        let connection = next.unwrap().unwrap();
        let knoc_link::Peer::Pinned { spki, .. } = connection.peer() else {
            panic!("{:?}", connection.peer());
        };
        assert_eq!(**spki, *self.spki);
        knoc_link::near_side(connection)
    }
}

/// A report in which the first container runs.
pub(crate) fn running(report: &pb::Report) -> bool {
    use pb::container_status::State;
    report
        .containers
        .iter()
        .all(|c| matches!(c.state, Some(State::Running(_))))
}

pub(crate) fn terminated(status: &pb::ContainerStatus) -> pb::Terminated {
    match status.state.clone() {
        Some(pb::container_status::State::Terminated(terminated)) => terminated,
        other => panic!("not terminated: {other:?}"),
    }
}
