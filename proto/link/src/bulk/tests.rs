use bytes::Bytes;
use futures::{StreamExt as _, stream};
use http_body_util::BodyExt as _;
use knoc_proto::pb::{
    self, ExecInput, ExecOutput,
    exec_input::Input,
    exec_output::Output,
    shim_client::ShimClient,
    shim_server::{Shim, ShimServer},
};
use proptest::prelude::*;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::{
    Code, Request, Response, Status, Streaming,
    body::Body,
    transport::{Channel, Endpoint, Server},
};

use super::{CancellableExecutor, Messages, NoMessages, RawClient, RawServer, messages::Side};
use crate::{Connection, Peer};

fn stdin(data: impl Into<Bytes>) -> ExecInput {
    let input = Some(Input::Stdin(data.into()));
    ExecInput { input }
}

fn stdout(data: Bytes) -> ExecOutput {
    let output = Some(Output::Stdout(data));
    ExecOutput { output }
}

/// `exec` echoes its input and ends with an error. `attach` sends no message, reads its input up to a change of the
/// terminal's size, and reports, when it is dropped, whether its input ended because the call was cancelled.
struct Echo {
    tasks: TaskTracker,
    left: mpsc::Sender<bool>,
}

fn nothing() -> Status {
    Status::unimplemented("not here")
}

#[tonic::async_trait]
impl Shim for Echo {
    type WatchReportStream = NoMessages<pb::Report>;
    type ReadLogsStream = NoMessages<pb::LogChunk>;
    type ExecStream = NoMessages<ExecOutput>;
    type AttachStream = NoMessages<ExecOutput>;
    type PortForwardStream = NoMessages<pb::PortForwardOutput>;
    type WatchEgressStream = NoMessages<pb::EgressAttempt>;
    type EgressStreamStream = NoMessages<pb::EgressOutput>;
    type JoinMeshStream = NoMessages<pb::MeshQuestion>;
    type MeshStreamStream = NoMessages<pb::MeshBytes>;

    async fn exec(
        &self,
        request: Request<Streaming<ExecInput>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        let input: Messages<ExecInput> = super::input(request)?;
        let echoed = input.filter_map(async |input| match input.ok()?.input? {
            Input::Stdin(data) => Some(Ok(stdout(data))),
            Input::Start(_) | Input::Attach(_) | Input::StdinClosed(_) | Input::Resize(_) => None,
        });
        let failed = Status::data_loss("ünd Schluss");
        let all = echoed.chain(stream::iter([Err(failed)]));
        Ok(super::answer(super::encode(all)))
    }

    async fn attach(
        &self,
        request: Request<Streaming<ExecInput>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut input: Messages<ExecInput> = super::input(request)?;
        let left = self.left.clone();
        let (output, silent) = mpsc::channel::<Result<ExecOutput, Status>>(1);
        self.tasks.spawn(async move {
            while let Ok(Some(message)) = input.message().await {
                if matches!(message.input, Some(Input::Resize(_))) {
                    break;
                }
            }
            output.closed().await;
            let cancelled = input.is_cancelled();
            drop(input);
            left.send(cancelled).await
        });
        Ok(super::answer(super::encode(ReceiverStream::new(silent))))
    }

    async fn read_logs(
        &self,
        request: Request<pb::ReadLogsRequest>,
    ) -> Result<Response<Self::ReadLogsStream>, Status> {
        let request = request.into_inner();
        if request.container.is_empty() {
            return Err(Status::not_found("no container"));
        }
        let chunk = |data: &str| pb::LogChunk {
            data: Bytes::copy_from_slice(data.as_bytes()),
            ..pb::LogChunk::default()
        };
        let chunks = [chunk(&request.container), chunk("end")];
        Ok(super::answer(super::encode(stream::iter(chunks.map(Ok)))))
    }

    async fn watch_report(
        &self,
        _: Request<pb::WatchReportRequest>,
    ) -> Result<Response<Self::WatchReportStream>, Status> {
        Err(nothing())
    }

    async fn add_ephemeral_container(
        &self,
        _: Request<pb::AddEphemeralContainerRequest>,
    ) -> Result<Response<pb::AddEphemeralContainerResponse>, Status> {
        Err(nothing())
    }

    async fn stop(
        &self,
        _: Request<pb::StopRequest>,
    ) -> Result<Response<pb::StopResponse>, Status> {
        Ok(Response::new(pb::StopResponse {}))
    }

    async fn update_values(
        &self,
        _: Request<pb::PodValues>,
    ) -> Result<Response<pb::ShimUpdateValuesResponse>, Status> {
        Err(nothing())
    }

    async fn update_image(
        &self,
        _: Request<pb::UpdateImageRequest>,
    ) -> Result<Response<pb::UpdateImageResponse>, Status> {
        Err(nothing())
    }

    async fn get_stats(
        &self,
        _: Request<pb::ShimGetStatsRequest>,
    ) -> Result<Response<pb::PodStats>, Status> {
        Err(nothing())
    }

    async fn port_forward(
        &self,
        _: Request<Streaming<pb::PortForwardInput>>,
    ) -> Result<Response<Self::PortForwardStream>, Status> {
        Err(nothing())
    }

    async fn watch_egress(
        &self,
        _: Request<Streaming<pb::EgressControl>>,
    ) -> Result<Response<Self::WatchEgressStream>, Status> {
        Err(nothing())
    }

    async fn egress_stream(
        &self,
        _: Request<Streaming<pb::EgressInput>>,
    ) -> Result<Response<Self::EgressStreamStream>, Status> {
        Err(nothing())
    }

    async fn join_mesh(
        &self,
        _: Request<Streaming<pb::MeshControl>>,
    ) -> Result<Response<Self::JoinMeshStream>, Status> {
        Err(nothing())
    }

    async fn mesh_stream(
        &self,
        _: Request<Streaming<pb::MeshBytes>>,
    ) -> Result<Response<Self::MeshStreamStream>, Status> {
        Err(nothing())
    }
}

/// A channel to an [`Echo`], and a receiver that is notified when its `attach` is dropped.
fn echo() -> (Channel, mpsc::Receiver<bool>) {
    let (left, gone) = mpsc::channel(1);
    let (near, far) = tokio::io::duplex(1 << 16);
    let tasks = TaskTracker::new();
    let echo = Echo {
        tasks: tasks.clone(),
        left,
    };
    let server = Server::builder().add_service(RawServer::new(ShimServer::new(echo)));
    let peer = Peer::Unix { uid: 0, pid: None };
    let far = crate::far_side(Connection::new(far, peer));
    tasks.spawn(server.serve_with_incoming(far));
    let mut near = Some(near);
    let connector = tower::service_fn(move |_: http::Uri| {
        let io = near.take().map(hyper_util::rt::TokioIo::new);
        std::future::ready(io.ok_or_else(|| std::io::Error::other("once")))
    });
    let endpoint = Endpoint::from_static("http://echo").executor(CancellableExecutor);
    (endpoint.connect_with_connector_lazy(connector), gone)
}

/// Pieces of all relevant sizes: empty, small, a frame, larger than our window, larger than a buffer of tonic.
fn pieces() -> Vec<Bytes> {
    let sizes = [0, 1, 255, 256, 16_384, 65_472, 65_536, 300_000];
    let piece = |(number, size): (usize, usize)| vec![u8::try_from(number).unwrap(); size].into();
    sizes.into_iter().enumerate().map(piece).collect()
}

async fn echoed(
    next: impl AsyncFnMut() -> Result<Option<ExecOutput>, Status>,
) -> (Vec<Bytes>, Status) {
    let (mut next, mut all) = (next, Vec::new());
    loop {
        match next().await {
            Ok(Some(ExecOutput {
                output: Some(Output::Stdout(data)),
            })) => all.push(data),
            Ok(other) => panic!("{other:?}"),
            Err(status) => return (all, status),
        }
    }
}

#[tokio::test]
async fn bytes_and_the_status_come_whole_from_either_client() {
    let said = || stream::iter(pieces().into_iter().map(stdin));
    let (channel, _gone) = echo();
    let mut called = ShimClient::new(RawClient::new(channel.clone()));
    let answer = called.exec(super::request(said())).await.unwrap();
    let mut ours = super::output(&answer);
    let mut theirs = ShimClient::new(channel)
        .exec(said())
        .await
        .unwrap()
        .into_inner();
    let ours = echoed(async || ours.message().await).await;
    let theirs = echoed(async || theirs.message().await).await;
    for (all, status) in [ours, theirs] {
        assert_eq!(all, pieces());
        assert_eq!(
            (status.code(), status.message()),
            (Code::DataLoss, "ünd Schluss")
        );
    }
}

#[tokio::test]
async fn a_relay_passes_bodies_on_and_maps_their_status() {
    let (channel, _gone) = echo();
    let mut shim = ShimClient::new(RawClient::new(channel));
    let said = super::messages::encode_request(stream::iter(pieces().into_iter().map(stdin)));
    let mut input = Messages::<ExecInput>::new(said, Side::Server);
    assert_eq!(input.peek().await.unwrap(), Some(stdin("")));
    assert_eq!(
        input.peek().await.unwrap(),
        Some(stdin("")),
        "it is still there"
    );
    let answer = shim
        .exec(super::request_body(input.into_body()))
        .await
        .unwrap();
    let body = super::output_body(&answer).unwrap();
    let body = super::map_status(body, |status| {
        Status::aborted(format!("!{}", status.message()))
    });
    let mut output = Messages::<ExecOutput>::new(body, Side::Client);
    let (all, status) = echoed(async || output.message().await).await;
    assert_eq!(all, pieces());
    assert_eq!(
        (status.code(), status.message()),
        (Code::Aborted, "!ünd Schluss")
    );
}

#[tokio::test]
async fn responses_to_a_single_message_and_errors() {
    let (channel, _gone) = echo();
    let mut shim = ShimClient::new(RawClient::new(channel));
    let request = pb::ReadLogsRequest {
        container: "main".to_owned(),
        ..pb::ReadLogsRequest::default()
    };
    let mut output = super::output(&shim.read_logs(request).await.unwrap());
    for expected in ["main", "end"] {
        assert_eq!(output.message().await.unwrap().unwrap().data, expected);
    }
    assert_eq!(output.message().await.unwrap(), None);
    assert_eq!(output.message().await.unwrap(), None);
    let refused = shim.read_logs(pb::ReadLogsRequest::default()).await;
    assert_eq!(refused.unwrap_err().code(), Code::NotFound);
    // Methods that are not streams of bytes are served by tonic itself.
    shim.stop(pb::StopRequest::default()).await.unwrap();
}

#[tokio::test]
async fn dropping_a_response_cancels_its_call() {
    let (channel, mut gone) = echo();
    let mut shim = ShimClient::new(RawClient::new(channel));
    let (input, said) = mpsc::channel(1);
    input.send(stdin("a")).await.unwrap();
    let request = super::request(ReceiverStream::new(said));
    let answer = shim.attach(request).await.unwrap();
    // The request has not ended, but sends nothing more.
    drop(super::output(&answer));
    assert!(gone.recv().await.unwrap(), "the input had no regular end");
    assert!(input.is_closed());
    let said = super::messages::encode_request(stream::iter([stdin("a")]));
    let mut ended = Messages::<ExecInput>::new(said, Side::Server);
    while ended.message().await.unwrap().is_some() {}
    assert!(!ended.is_cancelled(), "a regular end");
}

#[tokio::test]
async fn dropping_a_response_cancels_a_call_whose_request_waits_for_the_window() {
    let (channel, mut gone) = echo();
    let mut shim = ShimClient::new(RawClient::new(channel));
    let (input, said) = mpsc::channel(1);
    let request = super::request(ReceiverStream::new(said));
    let answer = shim.attach(request).await.unwrap();
    let size = Some(Input::Resize(pb::TerminalSize::default()));
    input.send(ExecInput { input: size }).await.unwrap();
    let more = Bytes::from(vec![7; 10_000]);
    let waits = std::time::Duration::from_secs(1);
    // Sends until the window is full.
    while let Ok(sent) = tokio::time::timeout(waits, input.send(stdin(more.clone()))).await {
        sent.unwrap();
    }
    drop(super::output(&answer));
    gone.recv().await.unwrap();
    // Other calls of the same connection continue.
    shim.stop(pb::StopRequest::default()).await.unwrap();
}

#[tokio::test]
async fn bodies_that_are_not_messages_are_rejected() {
    let cases: [(&[u8], Side, Code); 5] = [
        (b"\0\0\0\0\x05ab", Side::Server, Code::Internal),
        (b"\x01\0\0\0\x01a", Side::Server, Code::Internal),
        (b"\0\xff\xff\xff\xff", Side::Server, Code::OutOfRange),
        (b"\0\0\0\0\x01\xff", Side::Server, Code::Internal),
        (b"", Side::Client, Code::Unknown),
    ];
    for (bytes, side, code) in cases {
        let body = Body::new(
            http_body_util::Full::new(Bytes::from_static(bytes)).map_err(|never| match never {}),
        );
        let mut messages = Messages::<ExecInput>::new(body, side);
        assert_eq!(
            messages.message().await.unwrap_err().code(),
            code,
            "{bytes:?}"
        );
        assert_eq!(
            messages.message().await.unwrap(),
            None,
            "and that is the end"
        );
    }
}

proptest! {
    #[test]
    fn messages_are_read_however_their_body_is_split(sizes in prop::collection::vec(0_usize..2000, 0..6), step in 1_usize..700) {
        let said: Vec<_> = sizes.iter().map(|size| stdin(vec![7; *size])).collect();
        let body = super::messages::encode_request(stream::iter(said.clone()));
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let found = runtime.block_on(async move {
            let whole = body.collect().await.unwrap().to_bytes();
            let cut: Vec<_> = whole.chunks(step).map(Bytes::copy_from_slice).collect();
            let frames = stream::iter(cut.into_iter().map(|cut| Ok::<_, Status>(http_body::Frame::data(cut))));
            let body = Body::new(http_body_util::StreamBody::new(frames));
            Messages::<ExecInput>::new(body, Side::Server).map(Result::unwrap).collect::<Vec<_>>().await
        });
        prop_assert_eq!(found, said);
    }
}
