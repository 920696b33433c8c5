//! An attacker: one address that keeps thousands of connections to a port open and never sends anything.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::ensure;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{io::AsyncReadExt as _, net::TcpSocket, task::JoinSet};

use crate::wait_for;

/// The attacker's address.
pub const ATTACKER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
/// How long a closed connection waits before it is opened again.
const AGAIN: Duration = Duration::from_secs(1);
/// The number of file descriptors for the rest of the process.
const OTHERS: u64 = 1024;

/// The open connections; dropping this closes them.
#[derive(Debug)]
pub struct Flood(#[expect(dead_code, reason = "held for its drop")] JoinSet<()>);

impl Flood {
    /// Opens `count` connections; returns when the port has taken or refused each, or leaves so many waiting that it will
    /// take no more.
    pub async fn start(target: SocketAddr, count: usize) -> anyhow::Result<Self> {
        let limit = getrlimit(Resource::Nofile);
        let most = limit.maximum.unwrap_or(u64::MAX);
        ensure!(
            most >= count as u64 + OTHERS,
            "a hard limit of {most} open files (ulimit -Hn) is too low for {count} connections"
        );
        let raised = Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        };
        setrlimit(Resource::Nofile, raised)?;
        let tried = Arc::new(AtomicUsize::new(0));
        let mut tasks = JoinSet::new();
        for _ in 0..count {
            let tried = Arc::clone(&tried);
            tasks.spawn(async move {
                let mut first = true;
                loop {
                    let opened = tokio::time::timeout(AGAIN * 3, open(target)).await;
                    if std::mem::take(&mut first) {
                        tried.fetch_add(1, Ordering::Relaxed);
                    }
                    if let Ok(Ok(mut stream)) = opened {
                        // Until the other side closes it.
                        stream.read_u8().await.ok();
                    }
                    tokio::time::sleep(AGAIN).await;
                }
            });
        }
        let what = format!("{count} connections to {target}");
        wait_for(&what, Duration::from_mins(2), async || {
            let tried = tried.load(Ordering::Relaxed);
            if tried >= count { Ok(()) } else { Err(tried) }
        })
        .await?;
        Ok(Self(tasks))
    }
}

async fn open(target: SocketAddr) -> std::io::Result<tokio::net::TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((ATTACKER, 0).into())?;
    socket.connect(target).await
}
