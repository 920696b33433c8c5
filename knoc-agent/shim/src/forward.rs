//! Task: one forwarded connection to a port of the pod.
//!
//! [`connect`] finds the pod's own listener and dials it. [`run`] copies both directions with back-pressure until both
//! have ended; each direction can end alone, as with TCP. If the client disconnects, the connection is reset. Making a connection
//! has a time limit, forwarded connections have none.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use knoc_link::{bulk::Messages, reset::ResetUnlessEnded};
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
    time::{Instant, error::Elapsed, timeout_at},
};
use tonic::Status;

use super::{
    listeners::{self, Choice, Listener},
    network::{Network, Private},
};

/// How long the shim tries to get a connection to the pod, and the pause between two tries. A program that does not accept its
/// connections may have so many of them that the kernel answers no further one, for minutes.
pub(crate) const DIALLING: Duration = Duration::from_secs(5);
const BETWEEN_DIALS: Duration = Duration::from_millis(20);

/// The stream of a connection's output.
pub(crate) type Answers = mpsc::Sender<Result<PortForwardOutput, Status>>;

/// Why no connection was made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ForwardError {
    /// The message is the one that a kubelet gives.
    #[error(
        "failed to connect to localhost:{port} inside the pod: {}",
        dial_errors(tried)
    )]
    ConnectionRefused {
        port: u16,
        tried: Vec<(IpAddr, io::Error)>,
    },
    /// The listener belongs to another user, another pod, or the node itself.
    #[error(
        "port {port} of the node belongs to a process outside the pod: only the pod's own listeners are forwarded to"
    )]
    Foreign { port: u16 },
    /// The shim cannot tell whether the connection leads to the pod.
    #[error("the listeners of port {port} changed while the connection was made: try again")]
    Changed { port: u16 },
    /// The pod listens, but not on a loopback address, to which port-forward connects.
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

/// Connects to `port` of the loopback interface. In the node's network, a process below `root` must listen there.
///
/// A program that listens for one connection only closes its listener, and often the connection, before the shim can find
/// out which process has it. If the shim cannot tell whether a connection leads to the pod, it drops it before anything was
/// sent, and dials again while it holds the listener open, which makes the owner known.
pub(crate) async fn connect(
    network: &Network,
    port: u16,
    root: u32,
) -> Result<TcpStream, ForwardError> {
    let reached = match network {
        Network::Host => connect_within(port, root, Reach::Loopback, DIALLING).await,
        Network::Private(private) => connect_inside(private, port, Reach::Loopback, DIALLING).await,
    };
    Ok(reached?.stream)
}

/// As [`connect`], but if nothing listens on the loopback interface, to the address where the pod listens; and a listener may take that
/// long to answer.
pub(crate) async fn connect_anywhere(
    network: &Network,
    port: u16,
    root: u32,
    patience: Duration,
) -> Result<Reached, ForwardError> {
    match network {
        Network::Host => connect_within(port, root, Reach::Anywhere, patience).await,
        Network::Private(private) => connect_inside(private, port, Reach::Anywhere, patience).await,
    }
}

/// Connects within the pod's own network, in which only the pod listens.
async fn connect_inside(
    private: &Private,
    port: u16,
    reach: Reach,
    patience: Duration,
) -> Result<Reached, ForwardError> {
    let own = private.own_address().map(IpAddr::from);
    let others = std::iter::once(private.address).chain(own);
    let others = others.filter(|_| reach == Reach::Anywhere);
    let loopback = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    let (mut tried, until) = (Vec::new(), Instant::now() + patience);
    for address in loopback.into_iter().chain(others) {
        let dialling = private.connect(SocketAddr::new(address, port));
        match answered(timeout_at(until, dialling).await) {
            Ok(stream) => {
                // The connection works without it, too.
                stream.set_nodelay(true).ok();
                return Ok(Reached {
                    stream,
                    address,
                    listeners: Vec::new(),
                });
            }
            Err(error) => tried.push((address, error)),
        }
        if Instant::now() >= until {
            break;
        }
    }
    Err(ForwardError::ConnectionRefused { port, tried })
}

/// The result of a dial that has a time limit.
fn answered(dialled: Result<io::Result<TcpStream>, Elapsed>) -> io::Result<TcpStream> {
    dialled.unwrap_or_else(|_| {
        let text = format!("no answer within {} s", DIALLING.as_secs());
        Err(io::Error::new(io::ErrorKind::TimedOut, text))
    })
}

async fn connect_within(
    port: u16,
    root: u32,
    reach: Reach,
    patience: Duration,
) -> Result<Reached, ForwardError> {
    let begin = Instant::now();
    if let Some(reached) = dial((port, begin + patience), root, Hold::No, reach).await? {
        return Ok(reached);
    }
    let until = begin + DIALLING;
    let dialling = async {
        loop {
            match dial((port, until), root, Hold::Yes, reach).await {
                Ok(Some(reached)) => return Ok(reached),
                // A program that listens once, again and again, has no listener in between.
                Ok(None) | Err(ForwardError::ConnectionRefused { .. }) => {}
                Err(error) => return Err(error),
            }
            tokio::time::sleep(BETWEEN_DIALS).await;
        }
    };
    let dialled = timeout_at(until, dialling).await;
    dialled.unwrap_or(Err(ForwardError::Changed { port }))
}

/// Whether the shim holds the listeners open while it dials them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hold {
    No,
    Yes,
}

/// A connection to the pod.
#[derive(Debug)]
pub(crate) struct Reached {
    pub(crate) stream: TcpStream,
    pub(crate) address: IpAddr,
    /// All that listened on the port of the node when it was dialled. As long as the same do, the address leads to the pod.
    /// Empty in a network of the pod's own.
    pub(crate) listeners: Vec<Listener>,
}

/// Where the shim connects to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    Loopback,
    Anywhere,
}

/// Dials once, until the time that is given. `None` if a connection was made, but the shim cannot tell whether it leads to the pod.
async fn dial(
    (port, until): (u16, Instant),
    root: u32,
    mode: Hold,
    reach: Reach,
) -> Result<Option<Reached>, ForwardError> {
    let mut tried = Vec::new();
    let (before, own, held) = look(port, move || {
        let held = match mode {
            Hold::No => HashMap::new(),
            Hold::Yes => listeners::hold(port, root),
        };
        let (all, own) = listeners::look(port, root);
        (all, own, held)
    })
    .await?;
    if held.keys().any(|inode| !own.contains(inode)) {
        // The program has closed it in the meantime, so nobody would accept the connection.
        return Ok(None);
    }
    for address in choose(&before, &own, port, reach)? {
        let server = SocketAddr::new(address, port);
        match answered(timeout_at(until, TcpStream::connect(server)).await) {
            Ok(stream) => {
                let client = stream.local_addr().ok();
                let known = before.clone();
                let whose = move || listeners::still_own(&known, client, server, root);
                let is_own = look(port, whose).await?;
                drop(held);
                if !is_own {
                    return Ok(None);
                }
                // The connection works without it, too.
                stream.set_nodelay(true).ok();
                return Ok(Some(Reached {
                    stream,
                    address,
                    listeners: before,
                }));
            }
            Err(error) => tried.push((address, error)),
        }
        if Instant::now() >= until {
            break;
        }
    }
    Err(ForwardError::ConnectionRefused { port, tried })
}

/// Runs `at` on a blocking thread: a node has many sockets, and a pod many descriptors.
async fn look<T: Send + 'static>(
    port: u16,
    at: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ForwardError> {
    let looked = tokio::task::spawn_blocking(at).await;
    looked.map_err(|_| ForwardError::Changed { port })
}

fn choose(
    all: &[Listener],
    own: &HashSet<u64>,
    port: u16,
    reach: Reach,
) -> Result<Vec<IpAddr>, ForwardError> {
    match listeners::choose(all, own) {
        Choice::Own(addresses) => Ok(addresses),
        Choice::Foreign => Err(ForwardError::Foreign { port }),
        Choice::Elsewhere(mut addresses) if reach == Reach::Anywhere => {
            // An address may be shared with another process of the same user.
            let foreign = |ip: &IpAddr| {
                let mut at = all.iter().filter(|one| one.address.ip() == *ip);
                at.any(|one| !own.contains(&one.inode))
            };
            addresses.retain(|ip| !foreign(ip));
            if addresses.is_empty() {
                return Err(ForwardError::Foreign { port });
            }
            Ok(addresses)
        }
        Choice::Elsewhere(addresses) => Err(ForwardError::Elsewhere { port, addresses }),
        Choice::Nobody => Err(ForwardError::ConnectionRefused {
            port,
            tried: Vec::new(),
        }),
    }
}

/// Copies until both directions have ended or the client disconnects.
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
        // If the client has disconnected, nobody receives the error.
        drop(output.send(Err(status)).await);
    }
}

async fn to_pod(
    mut input: Messages<PortForwardInput>,
    writer: OwnedWriteHalf,
) -> Result<(), Status> {
    let mut guard = ResetUnlessEnded::new(writer);
    loop {
        // Neither a broken stream nor a cancelled call is the end of the input: the program must not mistake partial input for
        // all of it.
        let data = match input.message().await?.and_then(|message| message.input) {
            Some(Input::Data(data)) => data,
            Some(Input::Start(_)) => continue,
            None if input.is_cancelled() => return Err(Status::cancelled("the client is gone")),
            Some(Input::Closed(_)) | None => break,
        };
        let Some(writer) = guard.writer() else {
            continue;
        };
        if writer.write_all(&data).await.is_err() {
            // The program reads no more, but its output is still sent. Further input is read and dropped.
            guard.give_up();
        }
    }
    // Fails if the program has closed the connection, which the other direction reports.
    guard.end().await.ok();
    Ok(())
}

async fn from_pod(mut reader: OwnedReadHalf, output: &Answers) -> Result<(), Status> {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(CHUNK);
        let read = reader.read_buf(&mut buffer).await;
        let count = read.map_err(|error| {
            ErrorReason::NotListening.status(format!("the connection to the pod failed: {error}"))
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

/// Takes what was read. A few bytes are copied, so that no large buffer waits for a slow reader because of them.
pub(crate) fn take(buffer: &mut BytesMut) -> Bytes {
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
    async fn only_own_listeners_are_dialled_and_the_error_says_so() {
        let parent = std::os::unix::process::parent_id();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        connect(&Network::Host, port, parent).await.unwrap();
        // A program that another test starts inherits the listener, until its exec closes it.
        let refused = async {
            loop {
                match connect(&Network::Host, port, std::process::id()).await {
                    Err(error) => break error,
                    Ok(_) => tokio::task::yield_now().await,
                }
            }
        };
        let foreign = tokio::time::timeout(Duration::from_secs(10), refused)
            .await
            .expect("a foreign listener is still dialled");
        assert!(foreign.to_string().contains("outside the pod"), "{foreign}");
        drop(listener);
        let refused = connect(&Network::Host, port, parent).await.unwrap_err();
        let text = format!(
            "failed to connect to localhost:{port} inside the pod: connect: connection refused"
        );
        assert_eq!(refused.to_string(), text);
        let status = Status::from(refused);
        assert_eq!(ErrorReason::of(&status), Some(ErrorReason::NotListening));
    }

    #[tokio::test(start_paused = true)]
    async fn a_program_that_accepts_no_connection_is_not_waited_for_without_limit() {
        let parent = std::os::unix::process::parent_id();
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(1).unwrap();
        let server = listener.local_addr().unwrap();
        // Once so many wait to be accepted, the kernel answers no further one.
        let dial = || std::net::TcpStream::connect_timeout(&server, Duration::from_millis(200));
        let waiting: Vec<_> = std::iter::from_fn(|| dial().ok()).take(64).collect();
        assert!(waiting.len() < 64, "the kernel answers them all");
        let port = server.port();
        let silent = connect(&Network::Host, port, parent).await.unwrap_err();
        let text = format!(
            "failed to connect to localhost:{port} inside the pod: IPv4: dial 127.0.0.1: connect: no answer within 5 s"
        );
        assert_eq!(silent.to_string(), text);
        // A probe has a time limit of its own, which may be longer.
        let longer = connect_anywhere(&Network::Host, port, parent, Duration::from_mins(2));
        let longer = tokio::time::timeout(Duration::from_mins(1), longer).await;
        longer.unwrap_err();
        drop((waiting, listener));
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
