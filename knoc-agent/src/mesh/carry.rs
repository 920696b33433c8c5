//! Task: a tunnel from one shim to another one through the agent, if their compute nodes do not reach each other.
//!
//! The bytes are TLS between the two shims, which compare each other's keys as on any tunnel. The agent has looked only whether
//! they may reach each other, and copies, with back-pressure, until either side ends.

use std::net::Ipv4Addr;

use knoc_proto::pb::{self, mesh_bytes::Content};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::Client;

/// How many messages may wait for a slow shim.
const WAITING: usize = 4;

/// One shim's end of the tunnel.
struct End {
    output: mpsc::Sender<pb::MeshBytes>,
    input: Streaming<pb::MeshBytes>,
}

impl End {
    /// Opens it; `to` is the address that this shim asked for, or nothing.
    async fn open(client: &mut Client, to: String) -> Result<Self, Status> {
        let (output, sent) = mpsc::channel(WAITING);
        let carried = Content::Carried(pb::MeshCarried { to });
        let first = pb::MeshBytes {
            content: Some(carried),
        };
        // The channel is empty.
        output.send(first).await.ok();
        let answer = client.mesh_stream(ReceiverStream::new(sent)).await?;
        let input = answer.into_inner();
        Ok(Self { output, input })
    }
}

/// Carries a tunnel from the shim `from` to that of the pod with the address `address`, until either ends.
pub(super) async fn carry(
    mut from: Client,
    mut to: Client,
    address: Ipv4Addr,
) -> Result<(), Status> {
    let mut far = End::open(&mut to, String::new()).await?;
    let mut near = End::open(&mut from, address.to_string()).await?;
    tokio::select! {
        ended = copy(&mut near.input, &far.output) => ended,
        ended = copy(&mut far.input, &near.output) => ended,
    }
}

async fn copy(
    input: &mut Streaming<pb::MeshBytes>,
    output: &mpsc::Sender<pb::MeshBytes>,
) -> Result<(), Status> {
    while let Some(message) = input.message().await? {
        // The first message is the agent's alone.
        let is_data = matches!(message.content, Some(Content::Data(_)));
        if is_data && output.send(message).await.is_err() {
            break;
        }
    }
    Ok(())
}
