//! Task: a tunnel from one shim to another one through the agent, if their compute nodes do not reach each other.
//!
//! The bytes are TLS between the two shims, which compare each other's keys as on any tunnel. The agent has looked only whether
//! they may reach each other, and copies, with back-pressure, until either side ends.

use std::{net::Ipv4Addr, time::Duration};

use knoc_proto::pb::{self, mesh_bytes::Content};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::Client;

/// How many messages may wait for a slow shim.
const WAITING: usize = 4;

/// How long both shims may take to open their ends. The one that has asked waits no longer.
const OPENING: Duration = Duration::from_secs(10);

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
    let opening = async {
        let far = End::open(&mut to, String::new()).await?;
        let near = End::open(&mut from, address.to_string()).await?;
        Ok::<_, Status>((far, near))
    };
    let opened = timeout(OPENING, Box::pin(opening)).await;
    let (mut far, mut near) =
        opened.map_err(|_| Status::deadline_exceeded("a shim did not open its end in time"))??;
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

#[cfg(test)]
mod tests {
    use knoc_link::bulk::RawClient;
    use knoc_proto::pb::shim_client::ShimClient;
    use tonic::transport::Endpoint;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_shim_that_never_answers_keeps_no_place() {
        // The kernel takes the connections, and nobody says anything.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", silent.local_addr().unwrap());
        let client = || {
            let endpoint = Endpoint::from_shared(address.clone()).unwrap();
            ShimClient::new(RawClient::new(endpoint.connect_lazy()))
        };
        let carried = carry(client(), client(), Ipv4Addr::new(10, 200, 0, 7));
        let carried = timeout(Duration::from_mins(1), carried).await;
        let status = carried.expect("it waits for ever").unwrap_err();
        assert_eq!(status.code(), tonic::Code::DeadlineExceeded, "{status}");
    }
}
