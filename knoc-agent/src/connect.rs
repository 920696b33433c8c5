//! `knoc-agent connect`: relays standard input and output to the running agent's unix socket, for carriers that
//! start a command (`ssh login knoc-agent connect`). Understands nothing of what it carries.

use std::path::Path;

use tokio::{
    io::{self, AsyncWriteExt as _},
    net::UnixStream,
};

/// Relays until either side ends.
pub async fn run(socket: &Path) -> io::Result<()> {
    let stream = UnixStream::connect(socket).await?;
    let (mut from_agent, mut to_agent) = stream.into_split();
    let upstream = async {
        let copied = io::copy(&mut io::stdin(), &mut to_agent).await;
        // Half-close is kept: the agent sees the end of input and may still answer.
        to_agent.shutdown().await.and(copied)
    };
    let downstream = async {
        let mut stdout = io::stdout();
        io::copy(&mut from_agent, &mut stdout).await?;
        stdout.flush().await
    };
    tokio::select! {
        // The agent's end is the end; the end of input alone is not.
        done = downstream => done,
        Err(error) = upstream => Err(error),
    }
}
