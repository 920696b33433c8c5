//! A server of a test on a port of the loopback interface, each of whose connections has a task; and whether there is one.

use std::{io, time::Duration};

use anyhow::{Context as _, ensure};
use tokio::{
    net::{TcpListener, TcpStream, ToSocketAddrs},
    task::JoinSet,
    time::timeout,
};

/// A client that has waited for so long has waited in vain.
const PATIENCE: Duration = Duration::from_mins(1);

/// Serves each connection until the tasks are dropped. Returns the port, too.
pub async fn serve<S, F>(serve: S) -> anyhow::Result<(u16, JoinSet<()>)>
where
    S: Fn(TcpStream) -> F + Send + 'static,
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut peers = JoinSet::new();
        while let Ok((peer, _)) = listener.accept().await {
            // How a connection ends is what the test looks at on its other side.
            while peers.try_join_next().is_some() {}
            peers.spawn(serve(peer));
        }
    });
    Ok((port, tasks))
}

/// Succeeds if a connection to the address is refused, and not only unanswered.
pub async fn refuses(address: impl ToSocketAddrs) -> anyhow::Result<()> {
    let connected = timeout(PATIENCE, TcpStream::connect(address)).await;
    let error = connected.context("waited in vain")?.err();
    let kind = error.context("it accepts")?.kind();
    ensure!(kind == io::ErrorKind::ConnectionRefused, "{kind}");
    Ok(())
}
