//! A server of a test on a port of the loopback interface. Each of its connections has a task.

use std::io;

use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

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
