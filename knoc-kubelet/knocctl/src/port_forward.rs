//! `knocctl port-forward`: forwards local ports to ports of a pod.
//!
//! Each connection has a task, which [`PortForward::run`] owns, and a gRPC call. Back-pressure works in both directions,
//! and TCP's half-close is kept. The command ends with the pod or by a signal.

mod spec;

use std::{io, net::SocketAddr, process::ExitCode};

use bytes::BytesMut;
use futures::{StreamExt as _, stream::FuturesUnordered};
use knoc_link::reset::{self, ResetUnlessEnded};
use knoc_proto::CHUNK;
use knoc_proto::pb::{
    PortForwardInput, PortForwardOutput, PortForwardStart, agent_client::AgentClient,
    port_forward_input::Input, port_forward_output::Output,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc,
    task::JoinSet,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};

use self::spec::{Addresses, Ports};
use super::{
    CtlError, Global,
    converse::{QUEUE, Signals},
    find, output,
    session::{Session, asked},
};

/// The most connections at once, which is also the shim's limit.
const CONNECTIONS: usize = 256;

#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub(super) struct PortForward {
    /// Name, NAMESPACE/NAME or uid of the pod
    pod: String,
    /// A port of the pod: REMOTE, LOCAL:REMOTE, or :REMOTE for any free local port
    #[arg(required = true, value_name = "[LOCAL:]REMOTE")]
    ports: Vec<Ports>,
    /// The local addresses to listen on, separated by commas: IP addresses, or localhost for 127.0.0.1 and ::1
    #[arg(long, default_value = "localhost", value_name = "ADDRESS")]
    address: Addresses,
}

const HELP: &str = "\
Connects only to programs of the pod, and only if they listen on 127.0.0.1, ::1 or all addresses of the node. Runs until ^C \
or until the pod has ended.";

/// The pause after a connection could not be accepted.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(200);

/// A listening socket and the pod's port behind it.
type Door = (TcpListener, u16);

impl PortForward {
    pub(super) async fn run(self, global: &Global) -> Result<ExitCode, CtlError> {
        let mut session = Session::open(global)?;
        let pod = find::one(&mut session, global.namespace.as_deref(), &self.pod).await?;
        if pod.outcome.is_some() {
            return Err(CtlError::PodEnded { pod: self.pod });
        }
        let mut doors = Vec::new();
        for ports in &self.ports {
            open(&self.address, *ports, &mut doors).await?;
        }
        for (listener, remote) in &doors {
            if let Ok(local) = listener.local_addr() {
                output::print(&format!("Forwarding from {local} -> {remote}\n"))?;
            }
        }
        let mut signals = Signals::new(true)?;
        let client = session.client.clone();
        let ended = async {
            session
                .wait_for(&pod.uid, |pod| pod.outcome.is_some())
                .await
        };
        tokio::select! {
            biased;
            _signal = signals.next() => Ok(ExitCode::SUCCESS),
            ended = ended => {
                ended?;
                Err(CtlError::PodEnded { pod: self.pod })
            }
            () = serve(&doors, &client, &pod.uid) => Ok(ExitCode::SUCCESS),
        }
    }
}

/// Listens for one pair of ports. Of localhost's two addresses, one is enough.
async fn open(addresses: &Addresses, ports: Ports, doors: &mut Vec<Door>) -> Result<(), CtlError> {
    for (ips, all) in addresses.groups() {
        let mut failure = None;
        let mut local = ports.local;
        let before = doors.len();
        for ip in ips {
            let address = SocketAddr::new(*ip, local);
            match TcpListener::bind(address).await {
                Ok(listener) => {
                    // The second address uses the same port as the first.
                    local = listener
                        .local_addr()
                        .map_or(local, |address| address.port());
                    doors.push((listener, ports.remote));
                }
                Err(source) => failure = Some(CtlError::Listen { address, source }),
            }
        }
        if let Some(failure) = failure.filter(|_| all || doors.len() == before) {
            return Err(failure);
        }
    }
    Ok(())
}

/// Accepts connections until the future is dropped.
async fn serve(doors: &[Door], client: &AgentClient<Channel>, uid: &str) {
    let mut tasks = JoinSet::new();
    let mut accepting: FuturesUnordered<_> = doors.iter().map(accept).collect();
    loop {
        let (door, accepted) = tokio::select! {
            biased;
            Some(_) = tasks.join_next() => continue,
            Some(next) = accepting.next(), if tasks.len() < CONNECTIONS => next,
            else => return,
        };
        accepting.push(accept(door));
        let remote = door.1;
        match accepted {
            Ok((stream, _)) => {
                tasks.spawn(connection(client.clone(), uid.to_owned(), remote, stream));
            }
            Err(error) => output::complain(&format!("error: take a connection: {error}")),
        }
    }
}

async fn accept(door: &Door) -> (&Door, io::Result<(TcpStream, SocketAddr)>) {
    let accepted = door.0.accept().await;
    if accepted.is_err() {
        // If no file descriptor is left, each attempt fails at once.
        tokio::time::sleep(PAUSE).await;
    }
    (door, accepted)
}

/// Forwards one connection until it ends, and prints why it failed.
async fn connection(client: AgentClient<Channel>, uid: String, remote: u16, stream: TcpStream) {
    let local = stream.local_addr().map_or(0, |address| address.port());
    output::complain(&format!("Handling connection for {local}"));
    if let Err(error) = forward(client, uid, remote, stream).await {
        output::complain(&format!(
            "error: forward {local} -> {remote}: {}",
            knoc_proto::error::chain(&error)
        ));
    }
}

async fn forward(
    mut client: AgentClient<Channel>,
    uid: String,
    remote: u16,
    stream: TcpStream,
) -> Result<(), CtlError> {
    const WHAT: &str = "reach the port";
    // If this function fails before both directions have ended, the local program sees a reset.
    let mut reset = Reset(Some(stream));
    let (sender, receiver) = mpsc::channel(QUEUE);
    let start = PortForwardStart {
        uid,
        port: remote.into(),
    };
    send(&sender, Input::Start(start)).await;
    let call = client.port_forward(ReceiverStream::new(receiver));
    let answers = asked(WHAT, call).await?;
    let Some(stream) = reset.0.take() else {
        return Ok(());
    };
    let (reader, writer) = stream.into_split();
    let result = {
        let answered = from_pod(answers, writer);
        let asked = to_pod(reader, sender);
        tokio::pin!(answered, asked);
        // The connection ends with the answer: the pod reads nothing after it.
        let mut open = true;
        loop {
            tokio::select! {
                biased;
                result = &mut answered => break result,
                () = &mut asked, if open => open = false,
            }
        }
    };
    match result {
        Ok(()) => Ok(()),
        Err((error, writer)) => {
            drop(ResetUnlessEnded::new(writer));
            Err(error)
        }
    }
}

/// A connection that is reset when it is dropped.
struct Reset(Option<TcpStream>);

impl Drop for Reset {
    fn drop(&mut self) {
        if let Some(stream) = &self.0 {
            reset::at_the_end(stream);
        }
    }
}

/// Sends the local program's data and its end to the pod.
async fn to_pod(mut reader: OwnedReadHalf, sender: mpsc::Sender<PortForwardInput>) {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(CHUNK);
        // A broken connection is not a regular end: the pod's side is reset when this call is dropped.
        let Ok(count) = reader.read_buf(&mut buffer).await else {
            return;
        };
        let message = if count == 0 {
            Input::Closed(true)
        } else {
            Input::Data(buffer.split().freeze())
        };
        if !send(&sender, message).await {
            return;
        }
        if count == 0 {
            // The call stays open for the answer.
            sender.closed().await;
            return;
        }
    }
}

async fn send(sender: &mpsc::Sender<PortForwardInput>, input: Input) -> bool {
    let message = PortForwardInput { input: Some(input) };
    sender.send(message).await.is_ok()
}

/// Sends the pod's data and its end to the local program. On failure it returns the connection with the error.
async fn from_pod(
    mut answers: Streaming<PortForwardOutput>,
    mut writer: OwnedWriteHalf,
) -> Result<(), (CtlError, OwnedWriteHalf)> {
    let what = || "forward the connection".to_owned();
    loop {
        let message = match answers.message().await {
            Ok(Some(message)) => message,
            Ok(None) => return Ok(()),
            Err(source) => {
                let what = what();
                return Err((CtlError::Agent { what, source }, writer));
            }
        };
        match message.output {
            Some(Output::Data(data)) => {
                // The local program has stopped reading: drop the call, which resets the pod's side.
                if writer.write_all(&data).await.is_err() {
                    return Ok(());
                }
            }
            Some(Output::Closed(_)) => {
                writer.shutdown().await.ok();
            }
            Some(Output::Connected(_)) | None => {}
        }
    }
}
