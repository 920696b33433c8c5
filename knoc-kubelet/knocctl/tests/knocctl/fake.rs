//! A fake agent with three pods and a few commands for `exec`. It records the requests that it gets.
use std::{
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use knoc_link::Incoming;
use knoc_proto::{
    pb::{
        self, PodPhase,
        agent_server::{Agent, AgentServer},
        exec_input::Input,
        exec_output::Output,
        pod_event::Event,
    },
    reason::ErrorReason,
};
use tokio::{sync::mpsc, task::JoinSet};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The requests that the agent got, one line each.
#[derive(Clone, Default)]
pub(crate) struct Asked(Arc<Mutex<Vec<String>>>);

impl Asked {
    fn note(&self, line: impl Into<String>) {
        self.0.lock().unwrap().push(line.into());
    }

    pub(crate) fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

#[derive(Clone)]
struct Fake {
    asked: Asked,
}

/// Serves the fake agent on a socket until the tasks are dropped.
pub(crate) fn serve(socket: &Path) -> (JoinSet<()>, Asked) {
    let incoming: Incoming = knoc_link::listen::unix(socket).unwrap();
    let asked = Asked::default();
    let service = AgentServer::new(Fake {
        asked: asked.clone(),
    });
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        knoc_link::server()
            .add_service(service)
            .serve_with_incoming(incoming)
            .await
            .unwrap();
    });
    (tasks, asked)
}

fn pod(uid: &str, namespace: &str, name: &str, phase: PodPhase) -> pb::PodObserved {
    let container = |name: &str| pb::ContainerStatus {
        name: name.into(),
        ready: true,
        ..pb::ContainerStatus::default()
    };
    let kind = pb::OutcomeKind::Succeeded.into();
    let outcome = pb::Outcome {
        kind,
        ..pb::Outcome::default()
    };
    pb::PodObserved {
        uid: uid.into(),
        namespace: namespace.into(),
        name: name.into(),
        phase: phase.into(),
        containers: vec![container("main"), container("side")],
        outcome: (phase == PodPhase::Finished).then_some(outcome),
        ..pb::PodObserved::default()
    }
}

fn pods() -> Vec<pb::PodObserved> {
    vec![
        pod("u1", "default", "web", PodPhase::Running),
        pod("u2", "team", "web", PodPhase::Queued),
        pod("u3", "default", "done", PodPhase::Finished),
    ]
}

fn answers<T: Send + 'static>(list: Vec<T>) -> Response<Answers<T>> {
    Response::new(Box::pin(futures::stream::iter(list.into_iter().map(Ok))))
}

/// A response stream of what `run` sends. The stream itself drives `run`, so no task is needed.
fn driven<T: Send + 'static>(
    receiver: mpsc::Receiver<Result<T, Status>>,
    run: impl Future<Output = ()> + Send + 'static,
) -> Response<Answers<T>> {
    let run = futures::stream::once(run).filter_map(|()| async { None });
    let both = futures::stream::select(ReceiverStream::new(receiver), run);
    Response::new(Box::pin(both))
}

#[tonic::async_trait]
impl Agent for Fake {
    async fn get_info(
        &self,
        _: Request<pb::GetInfoRequest>,
    ) -> Result<Response<pb::AgentInfo>, Status> {
        let info = pb::AgentInfo {
            version: "0.1.0".into(),
            site: "fake".into(),
            scheduler: "local".into(),
            runtime: "process".into(),
            ..pb::AgentInfo::default()
        };
        Ok(Response::new(info))
    }

    type WatchNodeStream = Answers<pb::NodeInfo>;

    async fn watch_node(
        &self,
        _: Request<pb::WatchNodeRequest>,
    ) -> Result<Response<Self::WatchNodeStream>, Status> {
        Ok(answers(vec![pb::NodeInfo {
            cpu: 4,
            ..pb::NodeInfo::default()
        }]))
    }

    async fn ensure_pod(
        &self,
        request: Request<pb::EnsurePodRequest>,
    ) -> Result<Response<pb::EnsurePodResponse>, Status> {
        let spec = request.into_inner().spec.unwrap();
        self.asked.note(format!(
            "ensure {} {}/{}",
            spec.uid, spec.namespace, spec.name
        ));
        Ok(Response::new(pb::EnsurePodResponse {
            pod: None,
            created: true,
        }))
    }

    async fn delete_pod(
        &self,
        request: Request<pb::DeletePodRequest>,
    ) -> Result<Response<pb::DeletePodResponse>, Status> {
        let request = request.into_inner();
        self.asked.note(format!(
            "delete {} grace {}",
            request.uid, request.grace_seconds
        ));
        Ok(Response::new(pb::DeletePodResponse::default()))
    }

    async fn forget_pod(
        &self,
        request: Request<pb::ForgetPodRequest>,
    ) -> Result<Response<pb::ForgetPodResponse>, Status> {
        self.asked
            .note(format!("forget {}", request.into_inner().uid));
        Ok(Response::new(pb::ForgetPodResponse {}))
    }

    async fn get_pod(
        &self,
        _: Request<pb::GetPodRequest>,
    ) -> Result<Response<pb::PodObserved>, Status> {
        Err(ErrorReason::NotFound.status("not asked by knocctl"))
    }

    type WatchPodsStream = Answers<pb::PodEvent>;

    async fn watch_pods(
        &self,
        _: Request<pb::WatchPodsRequest>,
    ) -> Result<Response<Self::WatchPodsStream>, Status> {
        let items = pods().into_iter().map(Event::Item);
        let events = items.chain([Event::Synced(pb::Synced::default())]);
        let list: Vec<_> = events
            .map(|event| Ok(pb::PodEvent { event: Some(event) }))
            .collect();
        let endless = futures::stream::iter(list).chain(futures::stream::pending());
        Ok(Response::new(Box::pin(endless)))
    }

    async fn update_values(
        &self,
        _: Request<pb::UpdateValuesRequest>,
    ) -> Result<Response<pb::UpdateValuesResponse>, Status> {
        Err(ErrorReason::Unsupported.status("not asked by knocctl"))
    }

    type ReadLogsStream = Answers<pb::LogChunk>;

    async fn read_logs(
        &self,
        request: Request<pb::ReadLogsRequest>,
    ) -> Result<Response<Self::ReadLogsStream>, Status> {
        let request = request.into_inner();
        if request.container == "nix" {
            return Err(ErrorReason::ContainerNotFound.status("the pod has no container nix"));
        }
        let head = format!(
            "{} {} tail={}\n",
            request.uid, request.container, request.tail_lines
        );
        let chunks = [
            Bytes::from(head),
            Bytes::from_static(b"\x00\xff\x1b[31m no newline"),
        ];
        Ok(answers(
            chunks
                .map(|data| pb::LogChunk {
                    data,
                    ..Default::default()
                })
                .into(),
        ))
    }

    type ExecStream = Answers<pb::ExecOutput>;

    async fn exec(
        &self,
        request: Request<Streaming<pb::ExecInput>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        let (sender, receiver) = mpsc::channel(4);
        let fake = self.clone();
        let run = async move { fake.command(request.into_inner(), sender).await };
        Ok(driven(receiver, run))
    }

    type GetStatsStream = Answers<pb::PodStats>;

    /// `default/web` uses one core; `team/web` has no measurements.
    async fn get_stats(
        &self,
        request: Request<pb::GetStatsRequest>,
    ) -> Result<Response<Self::GetStatsStream>, Status> {
        let uids = request.into_inner().uids;
        self.asked.note(format!("stats {uids:?}"));
        let round = self.asked.all().len() as u64;
        let usage = pb::Usage {
            time: i64::try_from(round * 1_000_000_000).unwrap(),
            cpu_nanoseconds: round * 1_000_000_000,
            working_set_bytes: 300 << 20,
            ..pb::Usage::default()
        };
        let container = |name: &str, share: u64| pb::ContainerStats {
            name: name.into(),
            started_at: 1,
            usage: Some(pb::Usage {
                cpu_nanoseconds: usage.cpu_nanoseconds / share,
                ..usage
            }),
        };
        Ok(answers(vec![pb::PodStats {
            uid: "u1".into(),
            namespace: "default".into(),
            name: "web".into(),
            started_at: 1,
            usage: Some(usage),
            containers: vec![container("main", 2), container("side", 4)],
        }]))
    }

    type AttachStream = Answers<pb::ExecOutput>;

    async fn attach(
        &self,
        request: Request<Streaming<pb::ExecInput>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut input = request.into_inner();
        let Some(Ok(pb::ExecInput {
            input: Some(Input::Attach(start)),
        })) = input.next().await
        else {
            return Err(ErrorReason::InvalidRequest.status("the first message is `attach`"));
        };
        self.asked.note(format!(
            "attach {} {} tty={} stdin={}",
            start.uid, start.container, start.tty, start.stdin
        ));
        if start.container == "side" {
            return Err(ErrorReason::InvalidRequest.status("container side has no terminal"));
        }
        let (sender, receiver) = mpsc::channel(4);
        let fake = self.clone();
        let run = async move {
            let say = Say(sender);
            say.out(Output::Started(true)).await;
            say.out(Output::Stderr(Bytes::from_static(b"now on\n")))
                .await;
            let mut exit = pb::ExecExit {
                code: 9,
                ..pb::ExecExit::default()
            };
            if start.stdin {
                fake.echo(&mut input, &say).await;
            } else {
                exit.code = 1;
                exit.error = "detached: too slow".into();
            }
            say.out(Output::Exit(exit)).await;
        };
        Ok(driven(receiver, run))
    }

    type WatchEgressStream = Answers<pb::EgressAttempt>;

    async fn watch_egress(
        &self,
        _: Request<Streaming<pb::EgressControl>>,
    ) -> Result<Response<Self::WatchEgressStream>, Status> {
        Err(Status::unimplemented(""))
    }

    type EgressStreamStream = Answers<pb::EgressOutput>;

    async fn egress_stream(
        &self,
        _: Request<Streaming<pb::EgressInput>>,
    ) -> Result<Response<Self::EgressStreamStream>, Status> {
        Err(Status::unimplemented(""))
    }

    type PortForwardStream = Answers<pb::PortForwardOutput>;

    /// Port 80 echoes its input and then sends `-end`; no program listens on the other ports.
    async fn port_forward(
        &self,
        request: Request<Streaming<pb::PortForwardInput>>,
    ) -> Result<Response<Self::PortForwardStream>, Status> {
        use pb::{port_forward_input::Input as ToPod, port_forward_output::Output as FromPod};
        let mut input = request.into_inner();
        let first = input.next().await.unwrap()?.input;
        let Some(ToPod::Start(start)) = first else {
            return Err(ErrorReason::InvalidRequest.status("the first message is `start`"));
        };
        if start.port != 80 {
            let message = format!("failed to connect to localhost:{}", start.port);
            return Err(ErrorReason::NotListening.status(message));
        }
        let (sender, receiver) = mpsc::channel(4);
        let asked = self.asked.clone();
        let run = async move {
            let say = async |output| {
                let message = pb::PortForwardOutput {
                    output: Some(output),
                };
                sender.send(Ok(message)).await.unwrap_or_default();
            };
            say(FromPod::Connected(true)).await;
            while let Some(Ok(message)) = input.next().await {
                match message.input {
                    Some(ToPod::Data(data)) => say(FromPod::Data(data)).await,
                    Some(ToPod::Closed(_)) => {
                        asked.note("forward closed");
                        say(FromPod::Data(Bytes::from_static(b"-end"))).await;
                        say(FromPod::Closed(true)).await;
                        return;
                    }
                    Some(ToPod::Start(_)) | None => {}
                }
            }
            asked.note("forward broken");
        };
        Ok(driven(receiver, run))
    }

    async fn render_script(
        &self,
        _: Request<pb::RenderScriptRequest>,
    ) -> Result<Response<pb::RenderScriptResponse>, Status> {
        let argv = ["sbatch", "--comment=a b"].map(str::to_owned).into();
        Ok(Response::new(pb::RenderScriptResponse {
            script: "#!/bin/sh\nexec x".into(),
            argv,
        }))
    }

    async fn renew_certificate(
        &self,
        _: Request<pb::RenewCertificateRequest>,
    ) -> Result<Response<pb::RenewCertificateResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    type DiagnoseStream = Answers<pb::Finding>;

    async fn diagnose(
        &self,
        request: Request<pb::DiagnoseRequest>,
    ) -> Result<Response<Self::DiagnoseStream>, Status> {
        let finding = |check: &str, ok, detail: &str, cure: &str| pb::Finding {
            check: check.into(),
            ok,
            detail: detail.into(),
            cure: cure.into(),
        };
        let mut findings = vec![finding("state_dir", true, "writable", "")];
        if request.into_inner().probe {
            findings.push(finding("probe job", false, "no partition", "set one"));
        }
        Ok(answers(findings))
    }
}

/// Sends the output of a command.
struct Say(mpsc::Sender<Result<pb::ExecOutput, Status>>);

impl Say {
    async fn out(&self, output: Output) {
        self.0
            .send(Ok(pb::ExecOutput {
                output: Some(output),
            }))
            .await
            .unwrap_or_default();
    }
}

impl Fake {
    /// Runs a command: `cat` echoes its input and exits with 0; `exit N` exits with N; `nix` cannot be started; `size` prints
    /// each size of the terminal until it reads `q`.
    async fn command(
        &self,
        mut input: Streaming<pb::ExecInput>,
        sender: mpsc::Sender<Result<pb::ExecOutput, Status>>,
    ) {
        let say = Say(sender);
        let Some(Ok(pb::ExecInput {
            input: Some(Input::Start(start)),
        })) = input.next().await
        else {
            return;
        };
        self.asked.note(format!(
            "exec {} {} {:?} tty={} stdin={}",
            start.uid, start.container, start.command, start.tty, start.stdin
        ));
        say.out(Output::Started(true)).await;
        let mut exit = pb::ExecExit::default();
        match start.command[0].as_str() {
            "exit" => {
                say.out(Output::Stderr(Bytes::from_static(b"bye\n"))).await;
                exit.code = start.command[1].parse().unwrap();
            }
            // No path is a folder, and the container has no `tar`.
            "test" => exit.code = 1,
            "nix" | "tar" => {
                exit = pb::ExecExit {
                    code: 127,
                    error: "no such file".into(),
                    signal: 0,
                };
            }
            _ => {
                if let Some(size) = start.size {
                    say.out(Output::Stdout(
                        format!("{}x{}\r\n", size.width, size.height).into(),
                    ))
                    .await;
                }
                self.echo(&mut input, &say).await;
            }
        }
        say.out(Output::Exit(exit)).await;
    }

    async fn echo(&self, input: &mut Streaming<pb::ExecInput>, say: &Say) {
        while let Some(Ok(message)) = input.next().await {
            match message.input {
                Some(Input::Stdin(bytes)) => {
                    let quit = &bytes[..] == b"q";
                    say.out(Output::Stdout(bytes)).await;
                    if quit {
                        return;
                    }
                }
                Some(Input::StdinClosed(_)) => {
                    self.asked.note("stdin closed");
                    return;
                }
                Some(Input::Resize(size)) => {
                    let line = format!("{}x{}\r\n", size.width, size.height);
                    say.out(Output::Stdout(line.into())).await;
                }
                Some(Input::Start(_) | Input::Attach(_)) | None => {}
            }
        }
    }
}
