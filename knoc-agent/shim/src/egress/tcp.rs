//! Task: one connection of a container to the cluster.
//!
//! Both directions are copied with back-pressure, and each can end alone. Whatever ends the connection before both have
//! ended resets it, so that no program takes a part of the data for all of it.

use std::{
    io,
    net::{SocketAddr, SocketAddrV4},
    pin::pin,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use knoc_link::{bulk::Messages, carrier::tcp::keep_alive, reset};
use knoc_proto::{
    CHUNK,
    pb::{EgressInput, EgressOutput, egress_input::Input, egress_output},
    reason::ErrorReason,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, Interest, copy_bidirectional},
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    time::timeout,
};
use tonic::Status;

use super::{Egress, Output, PATIENCE, Settled, Taken};
use crate::{forward::take, launch::network::protocol::Kind};

/// How long a connection to a server of the compute node may last.
const BESIDE: Duration = Duration::from_mins(1);

/// A connection that is reset if it is dropped before it is [finished](Self::finish).
#[derive(Debug)]
pub(super) struct Guarded(TcpStream);

impl Guarded {
    pub(super) fn new(stream: TcpStream) -> Self {
        reset::at_the_end(&stream);
        // Whether somebody is still at the other end, if neither side sends: a container that was killed, or a pod that has gone.
        keep_alive(&stream);
        // The connection works without it, too.
        stream.set_nodelay(true).ok();
        Self(stream)
    }

    pub(super) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    /// Reads what the container has sent, and appends it. Returns how much it was.
    pub(super) async fn read(&mut self, buffer: &mut BytesMut) -> io::Result<usize> {
        self.0.read_buf(buffer).await
    }

    /// Relays the connection to a server of the compute node, for a limited time. `head` was read from it already.
    pub(super) async fn relay(mut self, mut server: TcpStream, head: &[u8]) {
        let both = async {
            server.write_all(head).await?;
            copy_bidirectional(&mut self.0, &mut server).await
        };
        let ended = timeout(BESIDE, both).await;
        if matches!(ended, Ok(Ok(_))) {
            self.finish();
        }
    }

    /// Both directions have ended: what was sent is still delivered.
    fn finish(self) {
        // It fails only if the connection is gone.
        rustix::net::sockopt::set_socket_linger(&self.0, None).ok();
    }
}

/// Announces the connection, and carries it once it is taken. `head` was read from it already.
pub(super) async fn serve(mut stream: Guarded, target: SocketAddrV4, head: Bytes, egress: &Egress) {
    let ended = match egress.announce(Kind::Tcp, target).await {
        None => return,
        Some(Settled::Taken(taken)) => carry(&mut stream.0, head, taken).await,
        Some(Settled::Redirected(pod)) => to_pod(&mut stream.0, &head, pod, egress).await,
    };
    if ended {
        stream.finish();
    }
}

/// Copies between the connection and another pod of the node, `head` first. Returns whether both directions have ended.
async fn to_pod(stream: &mut TcpStream, head: &[u8], pod: SocketAddrV4, egress: &Egress) -> bool {
    let Some(inside) = egress.inside.get() else {
        return false;
    };
    let connecting = inside.network.connect(pod.into());
    match timeout(PATIENCE, connecting).await {
        Ok(Ok(other)) => join(stream, head, other).await,
        Ok(Err(_)) | Err(_) => false,
    }
}

/// Copies between the connection and that to another pod, `head` first. Returns whether both directions have ended.
pub(super) async fn join(stream: &mut TcpStream, head: &[u8], other: TcpStream) -> bool {
    let mut other = Guarded::new(other);
    let both = async {
        other.0.write_all(head).await?;
        copy_bidirectional(stream, &mut other.0).await
    };
    let ended = both.await.is_ok();
    if ended {
        other.finish();
    }
    ended
}

/// Copies until both directions have ended, or until the call or the connection breaks. Returns whether both have ended.
async fn carry(stream: &mut TcpStream, head: Bytes, taken: Taken) -> bool {
    let Taken { input, output } = taken;
    if !send(&output, egress_output::Output::Connected(true)).await {
        return false;
    }
    if !head.is_empty() && !send(&output, egress_output::Output::Data(head)).await {
        return false;
    }
    let (reader, writer) = stream.split();
    let both = async {
        let mut to = pin!(to_container(input, writer));
        let mut from = pin!(from_container(&reader, &output));
        tokio::select! {
            biased;
            ended = &mut to => {
                ended?;
                return from.await;
            }
            ended = &mut from => ended?,
        }
        tokio::select! {
            biased;
            ended = to => ended,
            // It has ended its direction and is gone since: an endpoint that sends nothing would keep its place for ever.
            error = broken(&reader) => Err(failed(&error)),
        }
    };
    let ended = tokio::select! {
        biased;
        ended = both => ended,
        () = output.closed() => return false,
    };
    let Err(status) = ended else { return true };
    // If the caller is gone, nobody receives the error.
    output.send(Err(status)).await.ok();
    false
}

async fn to_container(
    mut input: Messages<EgressInput>,
    mut writer: WriteHalf<'_>,
) -> Result<(), Status> {
    loop {
        match input.message().await? {
            Some(EgressInput {
                input: Some(Input::Data(data)),
            }) => writer
                .write_all(&data)
                .await
                .map_err(|error| failed(&error))?,
            Some(EgressInput {
                input: Some(Input::Closed(_)),
            }) => return writer.shutdown().await.map_err(|error| failed(&error)),
            Some(EgressInput {
                input: Some(Input::Start(_)) | None,
            }) => {}
            // Only `closed` says that the data is complete.
            None => {
                let message = "the stream ended before the cluster's side of the connection did";
                return Err(ErrorReason::InvalidRequest.status(message));
            }
        }
    }
}

/// Waits until the connection breaks, which nobody notices who neither reads nor writes.
async fn broken(reader: &ReadHalf<'_>) -> io::Error {
    let ready = reader.ready(Interest::ERROR).await;
    ready
        .err()
        .unwrap_or_else(|| io::ErrorKind::ConnectionReset.into())
}

async fn from_container(reader: &ReadHalf<'_>, output: &Output) -> Result<(), Status> {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(CHUNK);
        let count = match reader.try_read_buf(&mut buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // A silent connection holds no buffer.
                buffer = BytesMut::new();
                reader.readable().await.map_err(|error| failed(&error))?;
                continue;
            }
            Err(error) => return Err(failed(&error)),
        };
        let message = if count == 0 {
            egress_output::Output::Closed(true)
        } else {
            egress_output::Output::Data(take(&mut buffer))
        };
        if !send(output, message).await {
            // The caller is gone, and what was sent with it.
            return Err(failed(&io::ErrorKind::BrokenPipe.into()));
        }
        if count == 0 {
            return Ok(());
        }
    }
}

fn failed(error: &io::Error) -> Status {
    ErrorReason::NotListening.status(format!("the container's connection failed: {error}"))
}

pub(super) async fn send(output: &Output, message: egress_output::Output) -> bool {
    let message = EgressOutput {
        output: Some(message),
    };
    output.send(Ok(message)).await.is_ok()
}
