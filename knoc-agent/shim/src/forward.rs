//! Task: one forwarded connection to a port of the pod.
//!
//! [`connect`] finds the pod's own listener and dials it; [`run`] copies both directions with back-pressure until both
//! have ended, each on its own, as TCP's do. A client that goes away resets the connection. No forwarded connection
//! times out.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use knoc_link::bulk::Messages;
use knoc_proto::{
    CHUNK,
    pb::{
        PortForwardInput, PortForwardOutput, port_forward_input::Input, port_forward_output::Output,
    },
    reason::ErrorReason,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc,
};
use tonic::Status;

use super::listeners::{self, Choice, Listener};

/// How long a connection that is the pod's is looked for, and the pause between two tries.
const DIALLING: Duration = Duration::from_secs(5);
const BETWEEN_DIALS: Duration = Duration::from_millis(20);

/// Where a connection's answers go.
pub(crate) type Answers = mpsc::Sender<Result<PortForwardOutput, Status>>;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ForwardError {
    /// In the words of a real node.
    #[error(
        "failed to connect to localhost:{port} inside the pod: {}",
        dial_errors(tried)
    )]
    ConnectionRefused {
        port: u16,
        tried: Vec<(IpAddr, io::Error)>,
    },
    /// Its owner is another user, another pod, or the node itself.
    #[error(
        "port {port} of the node belongs to a process outside the pod: only the pod's own listeners are forwarded to"
    )]
    Foreign { port: u16 },
    /// Whose connection it is cannot be told.
    #[error("the listeners of port {port} changed while it was dialled: try again")]
    Changed { port: u16 },
    /// It could be reached there, but that is no port-forward.
    #[error(
        "failed to connect to localhost:{port} inside the pod: it listens on {} only", addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    )]
    Elsewhere { port: u16, addresses: Vec<IpAddr> },
}

impl From<ForwardError> for Status {
    fn from(error: ForwardError) -> Self {
        ErrorReason::NotListening.status(error.to_string())
    }
}

fn dial_errors(tried: &[(IpAddr, io::Error)]) -> String {
    if tried.is_empty() {
        return "connect: connection refused".to_owned();
    }
    let one = |(address, error): &(IpAddr, io::Error)| {
        let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
        let refused = error.kind() == io::ErrorKind::ConnectionRefused;
        let error = if refused {
            "connection refused".to_owned()
        } else {
            error.to_string()
        };
        format!("{family}: dial {address}: connect: {error}")
    };
    tried.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// A connection to what a process below `root` listens on at `port` of the loopback interface.
///
/// A program that listens for one connection only closes its listener, and often the connection, before we can look who
/// has it. What cannot be told to be the pod's is dropped before anything was sent, and dialled again while we hold the
/// listener open, so that it tells whose the connection is.
pub(crate) async fn connect(port: u16, root: u32) -> Result<TcpStream, ForwardError> {
    if let Some(stream) = dial(port, root, Hold::No).await? {
        return Ok(stream);
    }
    let dialling = async {
        loop {
            match dial(port, root, Hold::Yes).await {
                Ok(Some(stream)) => return Ok(stream),
                // Between two that listen once nobody does.
                Ok(None) | Err(ForwardError::ConnectionRefused { .. }) => {}
                Err(error) => return Err(error),
            }
            tokio::time::sleep(BETWEEN_DIALS).await;
        }
    };
    let dialled = tokio::time::timeout(DIALLING, dialling).await;
    dialled.unwrap_or(Err(ForwardError::Changed { port }))
}

/// Are the listeners held open while they are dialled?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hold {
    No,
    Yes,
}

/// `None` where there is a connection, but it cannot be told to be the pod's.
async fn dial(port: u16, root: u32, mode: Hold) -> Result<Option<TcpStream>, ForwardError> {
    let mut tried = Vec::new();
    let (before, own, held) = look(port, move || {
        let held = match mode {
            Hold::No => HashMap::new(),
            Hold::Yes => listeners::hold(&listeners::on(port, None), root),
        };
        let (all, own) = listeners::look(port, root);
        (all.listeners, own, held)
    })
    .await?;
    if held.keys().any(|inode| !own.contains(inode)) {
        // The program has closed it meanwhile: nobody would accept.
        return Ok(None);
    }
    for address in choose(&before, &own, port)? {
        match TcpStream::connect(SocketAddr::new(address, port)).await {
            Ok(stream) => {
                let client = stream.local_addr().ok();
                let whose = move || {
                    let after = listeners::on(port, client);
                    let own = listeners::owned(&after, root);
                    listeners::is_own(&before, &after, &own, address)
                };
                let is_own = look(port, whose).await?;
                drop(held);
                if !is_own {
                    return Ok(None);
                }
                // Without it the connection works as well.
                stream.set_nodelay(true).ok();
                return Ok(Some(stream));
            }
            Err(error) => tried.push((address, error)),
        }
    }
    Err(ForwardError::ConnectionRefused { port, tried })
}

/// Looks on a blocking thread: a node has many sockets, and a pod many descriptors.
async fn look<T: Send + 'static>(
    port: u16,
    at: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ForwardError> {
    let looked = tokio::task::spawn_blocking(at).await;
    looked.map_err(|_| ForwardError::Changed { port })
}

fn choose(all: &[Listener], own: &HashSet<u64>, port: u16) -> Result<Vec<IpAddr>, ForwardError> {
    match listeners::choose(all, own) {
        Choice::Own(addresses) => Ok(addresses),
        Choice::Foreign => Err(ForwardError::Foreign { port }),
        Choice::Elsewhere(addresses) => Err(ForwardError::Elsewhere { port, addresses }),
        Choice::Nobody => Err(ForwardError::ConnectionRefused {
            port,
            tried: Vec::new(),
        }),
    }
}

/// Copies until both directions have ended, or the client is gone.
pub(crate) async fn run(stream: TcpStream, input: Messages<PortForwardInput>, output: Answers) {
    if !send(&output, Output::Connected(true)).await {
        return;
    }
    let (reader, writer) = stream.into_split();
    let both =
        async { tokio::try_join!(to_pod(input, writer), from_pod(reader, &output)).map(|_| ()) };
    let ended = tokio::select! {
        biased;
        () = output.closed() => return,
        ended = both => ended,
    };
    if let Err(status) = ended {
        // Where the client is gone nobody is left to be told.
        drop(output.send(Err(status)).await);
    }
}

/// The writing half resets the connection when it is dropped before its end.
struct Resets(Option<OwnedWriteHalf>);

impl Drop for Resets {
    fn drop(&mut self) {
        if let Some(writer) = self.0.take() {
            let stream: &TcpStream = writer.as_ref();
            // Without it the program sees an end in place of a reset.
            rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO)).ok();
            writer.forget();
        }
    }
}

async fn to_pod(
    mut input: Messages<PortForwardInput>,
    writer: OwnedWriteHalf,
) -> Result<(), Status> {
    let mut guard = Resets(Some(writer));
    loop {
        // A broken stream is no end: the program must not take what came for all.
        let data = match input.message().await?.and_then(|message| message.input) {
            Some(Input::Data(data)) => data,
            Some(Input::Start(_)) => continue,
            Some(Input::Closed(_)) | None => break,
        };
        let Some(writer) = &mut guard.0 else { continue };
        if writer.write_all(&data).await.is_err() {
            // The program reads no more; what it has written still goes out. Input is taken and dropped.
            guard.0 = None;
        }
    }
    if let Some(mut writer) = guard.0.take() {
        // Fails where the program has gone: that shows in the other direction.
        writer.shutdown().await.ok();
    }
    Ok(())
}

async fn from_pod(mut reader: OwnedReadHalf, output: &Answers) -> Result<(), Status> {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(CHUNK);
        let read = reader.read_buf(&mut buffer).await;
        let count = read.map_err(|error| {
            ErrorReason::NotListening.status(format!("the pod's end of the connection: {error}"))
        })?;
        let message = if count == 0 {
            Output::Closed(true)
        } else {
            Output::Data(take(&mut buffer))
        };
        if !send(output, message).await || count == 0 {
            return Ok(());
        }
    }
}

/// What was read. Little of it is copied: a large buffer must not wait for a slow reader with a few bytes in it.
fn take(buffer: &mut BytesMut) -> Bytes {
    if buffer.len() < CHUNK / 8 {
        let data = Bytes::copy_from_slice(buffer);
        buffer.clear();
        data
    } else {
        buffer.split().freeze()
    }
}

async fn send(output: &Answers, message: Output) -> bool {
    let message = PortForwardOutput {
        output: Some(message),
    };
    output.send(Ok(message)).await.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn own_listeners_are_dialled_and_others_refused_by_name() {
        let parent = std::os::unix::process::parent_id();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        connect(port, parent).await.unwrap();
        // A program that another test starts has our listener too, until its exec closes it.
        let refused = async {
            loop {
                match connect(port, std::process::id()).await {
                    Err(error) => break error,
                    Ok(_) => tokio::task::yield_now().await,
                }
            }
        };
        let foreign = tokio::time::timeout(Duration::from_secs(10), refused)
            .await
            .expect("it is dialled for ever");
        assert!(foreign.to_string().contains("outside the pod"), "{foreign}");
        drop(listener);
        let refused = connect(port, parent).await.unwrap_err();
        let text = format!(
            "failed to connect to localhost:{port} inside the pod: connect: connection refused"
        );
        assert_eq!(refused.to_string(), text);
        let status = Status::from(refused);
        assert_eq!(ErrorReason::of(&status), Some(ErrorReason::NotListening));
    }

    #[test]
    fn dial_errors_name_both_families() {
        let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
        let tried = [
            ("127.0.0.1".parse().unwrap(), refused()),
            ("::1".parse().unwrap(), io::Error::other("odd")),
        ];
        assert_eq!(
            dial_errors(&tried),
            "IPv4: dial 127.0.0.1: connect: connection refused, IPv6: dial ::1: connect: odd"
        );
    }
}
