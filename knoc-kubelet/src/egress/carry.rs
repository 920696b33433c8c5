//! One connection between an endpoint in the cluster and the pod that opened it: dials, takes the connection at the agent, and
//! copies both ways until both have ended.
//!
//! [`halves`] copies the bytes of TCP. If one side breaks, the other one is reset.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use knoc_link::bulk::{self, Messages};
use knoc_proto::{
    ids::PodUid,
    pb::{self, EgressProtocol, egress_input::Input, egress_output::Output},
    reason::ErrorReason,
};
use tokio::{
    net::{TcpStream, UdpSocket},
    sync::mpsc,
    time::{Instant, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::decide::{DNS, Dial};
use crate::{
    agent::Agent,
    halves::{self, OnWriteError, Part},
    metrics::traffic::{Direction, Open, Reason},
    server::prepare,
};

/// How long an endpoint may take to accept. The shim gives the connection up after ten seconds.
const DIAL: Duration = Duration::from_secs(5);
/// How long the agent and the shim may take to hand the connection over.
const TAKE: Duration = Duration::from_secs(10);
/// A flow of datagrams ends after this time without one.
const IDLE: Duration = Duration::from_mins(1);
/// The same for questions to DNS, of which resolvers open a flow each.
const IDLE_DNS: Duration = Duration::from_secs(10);
/// Messages that may wait for the agent; then the endpoint is not read.
const QUEUE: usize = 4;
/// The same for answers of DNS, since a flow has the questions of all containers of a pod. They are short.
const QUEUE_DNS: usize = 64;
/// The largest datagram.
const DATAGRAM: usize = 65_535;

/// A connection that a pod has opened, and where it leads.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) uid: PodUid,
    pub(super) namespace: Arc<str>,
    pub(super) id: u64,
    pub(super) protocol: EgressProtocol,
    pub(super) dial: Dial,
}

/// Why a connection was not made.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failed {
    /// The endpoint does not accept it.
    #[error("connect to {endpoint}, an endpoint of Service {service} (port {port})")]
    Dial {
        service: String,
        port: u16,
        endpoint: SocketAddr,
        source: io::Error,
    },
    /// The site does not let pods reach the Service.
    #[error("{why}")]
    Policy { why: String },
    /// The pod's side is gone or could not be reached.
    #[error("take the connection of the pod: {why}")]
    Pod { why: String },
}

impl Failed {
    /// As metrics show it.
    pub(super) fn reason(&self) -> Reason {
        match self {
            Self::Dial { .. } => Reason::Dial,
            Self::Policy { .. } => Reason::Policy,
            Self::Pod { .. } => Reason::Pod,
        }
    }
}

/// Carries the connection until it ends. Fails if it was never made.
pub(super) async fn run(
    agent: &Agent,
    connection: &Connection,
    traffic: &Direction,
) -> Result<(), Failed> {
    let endpoint = connection.dial.endpoint;
    let failed = |source| Failed::Dial {
        service: connection.dial.service.to_string(),
        port: connection.dial.port,
        endpoint,
        source,
    };
    match connection.protocol {
        EgressProtocol::Tcp | EgressProtocol::Unspecified => {
            let dialled = timeout(DIAL, TcpStream::connect(endpoint)).await;
            let stream = dialled
                .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
                .map_err(failed)?;
            // Latency counts, and the pod's side has gathered bytes already. Keepalive of the pod ends at its shim, so that the
            // endpoint lives is found out here. It works without these options, too.
            prepare(&stream).ok();
            let (input, output) = take(agent, connection).await?;
            tcp(stream, input, output, &traffic.made()).await;
        }
        EgressProtocol::Udp => {
            let socket = udp_socket(endpoint).await.map_err(failed)?;
            let (input, output) = take(agent, connection).await?;
            let idle = if connection.dial.port == DNS {
                IDLE_DNS
            } else {
                IDLE
            };
            udp(&socket, (&input, output), idle, &traffic.made()).await;
        }
    }
    Ok(())
}

async fn udp_socket(endpoint: SocketAddr) -> io::Result<UdpSocket> {
    let any: SocketAddr = if endpoint.is_ipv4() {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(endpoint).await?;
    Ok(socket)
}

type ToPod = mpsc::Sender<pb::EgressInput>;
type FromPod = Messages<pb::EgressOutput>;

/// PURE: how many messages may wait for the agent.
fn queue_length(connection: &Connection) -> usize {
    match connection.protocol {
        EgressProtocol::Udp if connection.dial.port == DNS => QUEUE_DNS,
        EgressProtocol::Udp | EgressProtocol::Tcp | EgressProtocol::Unspecified => QUEUE,
    }
}

/// Takes the pod's connection.
async fn take(agent: &Agent, connection: &Connection) -> Result<(ToPod, FromPod), Failed> {
    let (queue, input) = mpsc::channel(queue_length(connection));
    let start = Input::Start(pb::EgressStart {
        uid: connection.uid.to_string(),
        id: connection.id,
        service: connection.dial.service.to_string(),
        port: connection.dial.port.into(),
    });
    let taken = async {
        // The channel is empty.
        queue.send(message(start)).await.ok();
        let mut client = agent.bulk().await;
        let answer = client
            .egress_stream(bulk::request(ReceiverStream::new(input)))
            .await;
        let answer = answer.inspect_err(|status| agent.noticed(status))?;
        let mut output: FromPod = bulk::output(&answer);
        match output.message().await?.and_then(|first| first.output) {
            Some(Output::Connected(_)) => Ok(output),
            Some(Output::Data(_) | Output::Closed(_)) | None => {
                Err(Status::internal("the shim did not begin with `connected`"))
            }
        }
    };
    let taken = timeout(TAKE, taken).await;
    let taken = taken.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in time")));
    match taken {
        Ok(output) => Ok((queue, output)),
        Err(status) if ErrorReason::of(&status) == Some(ErrorReason::PolicyDenied) => {
            Err(Failed::Policy {
                why: status.message().to_owned(),
            })
        }
        Err(status) => Err(Failed::Pod {
            why: status.message().to_owned(),
        }),
    }
}

/// Copies both ways. If either breaks, both the endpoint's connection and the pod's are reset.
async fn tcp(stream: TcpStream, input: ToPod, output: FromPod, open: &Open) {
    let (reader, guard) = halves::split(stream);
    let counted = |message| {
        let part = part(message);
        if let Some(Part::Data(data)) = &part {
            open.add_from_pod(data.len());
        }
        part
    };
    // An endpoint that has ended its direction and takes no more is gone: nobody else would tell a program that sends on and on.
    let ended = &AtomicBool::new(false);
    let on_error = || {
        if ended.load(Ordering::Relaxed) {
            OnWriteError::Break
        } else {
            OnWriteError::Drain
        }
    };
    let to_cluster = halves::to_socket(output, guard, on_error, counted);
    // The input ends with this direction.
    let from_cluster = async move {
        let wrap = |part: Part| match part {
            Part::Data(data) => {
                open.add_to_pod(data.len());
                message(Input::Data(data))
            }
            Part::Closed => message(Input::Closed(true)),
        };
        let how = halves::from_socket(&reader, &input, wrap).await;
        ended.store(how.is_ok(), Ordering::Relaxed);
        how
    };
    let both = async { tokio::try_join!(to_cluster, from_cluster) };
    if let Err(broken) = both.await {
        tracing::debug!(%broken, "a connection of a pod broke");
    }
}

fn part(message: pb::EgressOutput) -> Option<Part> {
    match message.output? {
        Output::Data(data) => Some(Part::Data(data)),
        Output::Closed(_) => Some(Part::Closed),
        Output::Connected(_) => None,
    }
}

/// Copies datagrams until there was none for `idle`, or the pod's side has ended.
async fn udp(
    socket: &UdpSocket,
    (input, mut output): (&ToPod, FromPod),
    idle: Duration,
    open: &Open,
) {
    let mut deadline = Instant::now() + idle;
    loop {
        tokio::select! {
            next = output.message() => match next {
                Ok(Some(pb::EgressOutput { output: Some(Output::Data(data)) })) => {
                    open.add_from_pod(data.len());
                    // A datagram that cannot be sent is lost, like any other.
                    socket.send(&data).await.ok();
                }
                Ok(Some(pb::EgressOutput { output: Some(Output::Connected(_)) | None })) => {}
                Ok(Some(pb::EgressOutput { output: Some(Output::Closed(_)) }) | None) | Err(_) => return,
            },
            ready = socket.readable() => {
                if ready.is_err() {
                    return;
                }
                let mut buffer = BytesMut::with_capacity(DATAGRAM);
                match socket.try_recv_buf(&mut buffer) {
                    // If the pod's side is slow, the datagram is lost: UDP has no back-pressure.
                    Ok(count) => {
                        let data = Bytes::copy_from_slice(&buffer);
                        if input.try_send(message(Input::Data(data))).is_ok() {
                            open.add_to_pod(count);
                        }
                    }
                    // Also the answer that nobody listens there, after which others may.
                    Err(_) => continue,
                }
            }
            () = tokio::time::sleep_until(deadline) => return,
        }
        deadline = Instant::now() + idle;
    }
}

fn message(input: Input) -> pb::EgressInput {
    pb::EgressInput { input: Some(input) }
}
