//! Bare TLS relays: the floor of streams. Each is a process of its own that takes a connection over TLS 1.3 and passes
//! its bytes on to the next; the last one runs the program that the pod runs, dials the pod's own listener, or reads the
//! bytes from a file. They stand where the parts of KNoC stand (compute node, login node, host), so that the bytes go the
//! same way; the TLS library and its settings are the links', and there is nothing else.

use std::{
    io::Read as _,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::Context as _;
use futures::StreamExt as _;
use knoc_link::{
    Connection,
    pinned::{self, KeyPair},
};
use tempfile::TempDir;
use tokio::{
    io::{
        AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, copy_bidirectional_with_sizes,
    },
    net::TcpStream,
    process::Child,
};

use super::bed::{Bed, FOLDER, RELAY};
use crate::{Run, wait_for};

/// Bytes moved at once.
const CHUNK: usize = 64 << 10;

/// Of a relay that starts.
const SOON: Duration = Duration::from_secs(30);

/// The first port; the relays of one chain have neighbouring ones.
const FIRST_PORT: u16 = 19_200;

/// Where a part of KNoC stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// The shim.
    Compute,
    /// The agent.
    Login,
    /// Kubelet and API server.
    Host,
}

impl Place {
    /// As the next one reaches it.
    fn address(self) -> Ipv4Addr {
        match self {
            Self::Compute => Ipv4Addr::new(10, 78, 0, 11),
            Self::Login => Ipv4Addr::new(10, 77, 0, 2),
            Self::Host => Ipv4Addr::LOCALHOST,
        }
    }
}

/// What a relay does with a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// Writes what is in that file and closes.
    File(PathBuf),
    /// Gives it to a program as standard input and output.
    Program(Vec<String>),
    /// Dials that address, where somebody listens without TLS, and writes what comes from there.
    Listener(SocketAddr),
    /// Dials that address and copies both ways.
    Relay(SocketAddr),
}

impl Role {
    /// `file=PATH`, `program=WORDS`, `listener=ADDRESS` or `relay=ADDRESS`.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        match text.split_once('=') {
            Some(("file", path)) => Ok(Self::File(path.into())),
            Some(("program", words)) => {
                Ok(Self::Program(words.split(' ').map(str::to_owned).collect()))
            }
            Some(("listener", address)) => Ok(Self::Listener(address.parse()?)),
            Some(("relay", address)) => Ok(Self::Relay(address.parse()?)),
            _ => anyhow::bail!(
                "{text:?} is no file=PATH, program=WORDS, listener=ADDRESS or relay=ADDRESS"
            ),
        }
    }
}

/// Serves connections one after the other, for ever. `keys` has `pair.crt` and `pair.key`.
pub async fn serve(port: u16, role: Role, keys: &Path) -> anyhow::Result<()> {
    let pair = KeyPair::from_files(&keys.join("pair.crt"), &keys.join("pair.key"))?;
    let everywhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    let mut incoming = pinned::listen(everywhere, pair.clone()).await?;
    while let Some(connection) = incoming.next().await {
        // A probe whether we listen shakes no hands.
        let Ok(near) = connection else { continue };
        match &role {
            Role::File(path) => send(near, path).await?,
            Role::Program(words) => drop(run(near, words).await?),
            Role::Listener(address) => fetch(near, *address).await?,
            Role::Relay(next) => pass(near, dial(*next, &pair).await?).await?,
        }
    }
    Ok(())
}

async fn send(mut near: Connection, path: &Path) -> anyhow::Result<()> {
    // It is in the page cache, and nobody else waits in this process.
    let mut file = std::fs::File::open(path)?;
    let mut chunk = vec![0; CHUNK];
    loop {
        match file.read(&mut chunk)? {
            0 => break,
            read => near.write_all(&chunk[..read]).await?,
        }
    }
    close(near).await
}

async fn fetch(mut near: Connection, address: SocketAddr) -> anyhow::Result<()> {
    let mut far = TcpStream::connect(address).await?;
    copy(&mut far, &mut near).await?;
    close(near).await
}

/// What is sent is lost where a socket is closed with bytes unread.
async fn close(mut near: Connection) -> anyhow::Result<()> {
    near.shutdown().await?;
    let mut rest = Vec::new();
    near.read_to_end(&mut rest).await?;
    Ok(())
}

/// The program's input is what comes, its output what goes, each with its own end. Answers the bytes of both.
async fn run(near: Connection, words: &[String]) -> anyhow::Result<(u64, u64)> {
    let (program, arguments) = words.split_first().context("no program")?;
    let mut program = Run::new(program).args(arguments);
    let child = program.command_mut();
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let (mut stdin, mut stdout) = child
        .stdin
        .take()
        .zip(child.stdout.take())
        .context("pipes")?;
    let (mut from, mut to) = tokio::io::split(near);
    let input = async move { copy(&mut from, &mut stdin).await };
    let output = async move {
        let bytes = copy(&mut stdout, &mut to).await?;
        to.shutdown().await?;
        Ok(bytes)
    };
    let bytes = tokio::try_join!(input, output)?;
    let status = child.wait().await?;
    anyhow::ensure!(status.success(), "{words:?}: {status}");
    Ok(bytes)
}

async fn copy(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
) -> anyhow::Result<u64> {
    let mut buffer = vec![0; CHUNK];
    let mut bytes = 0;
    loop {
        match from.read(&mut buffer).await? {
            0 => return Ok(bytes),
            read => {
                to.write_all(&buffer[..read]).await?;
                bytes += u64::try_from(read)?;
            }
        }
    }
}

async fn pass(mut near: Connection, mut far: Connection) -> anyhow::Result<()> {
    copy_bidirectional_with_sizes(&mut near, &mut far, CHUNK, CHUNK).await?;
    Ok(())
}

async fn dial(to: SocketAddr, pair: &KeyPair) -> anyhow::Result<Connection> {
    Ok(pinned::dial(&to.to_string(), pair, pair.spki()).await?)
}

/// A chain of relays, a process each, nearest last.
pub(super) struct Chain {
    _processes: Vec<Child>,
    _keys: TempDir,
    pair: KeyPair,
    nearest: SocketAddr,
}

impl Chain {
    /// Starts them, the farthest with `role`, and waits until each listens.
    pub(super) async fn start(bed: &Bed, places: &[Place], role: String) -> anyhow::Result<Self> {
        let keys = tempfile::tempdir_in(bed.here(FOLDER))?;
        let name = keys.path().file_name().context("no name")?;
        let pair = KeyPair::generate("bench")?;
        crate::site::write(&keys.path().join("pair.crt"), pair.cert_pem())?;
        crate::site::write(&keys.path().join("pair.key"), pair.key_pem())?;
        let mut processes = Vec::new();
        let mut role = role;
        let mut nearest = SocketAddr::from((Ipv4Addr::LOCALHOST, FIRST_PORT));
        for (place, port) in places.iter().zip(FIRST_PORT..) {
            let keys_there = Path::new(FOLDER).join(name);
            let relay = match place {
                Place::Compute => bed.world.on_as_root("c1", [RELAY]),
                Place::Login => bed.world.on_as_root("login", [RELAY]),
                Place::Host => Run::new(bed.here(RELAY)),
            };
            let keys_there = match place {
                Place::Compute | Place::Login => keys_there,
                Place::Host => keys.path().to_owned(),
            };
            let relay = relay
                .args(["relay", &port.to_string(), &role])
                .arg(keys_there);
            processes.push(relay.spawn(&keys.path().join("log"))?);
            nearest = SocketAddr::from((place.address(), port));
            role = format!("relay={nearest}");
            let log = keys.path().join("log");
            wait_for("a relay listens", SOON, async || {
                // From where the next one is; the host does not see the compute nodes.
                let probe = format!("exec 3<>/dev/tcp/{}/{port}", place.address());
                let probed = match place {
                    Place::Compute => bed.shell("login", &probe).ok().await,
                    Place::Login | Place::Host => Run::new("bash").args(["-c", &probe]).ok().await,
                };
                probed.map_err(|error| {
                    format!(
                        "{error:#}; {}",
                        std::fs::read_to_string(&log).unwrap_or_default()
                    )
                })
            })
            .await?;
        }
        Ok(Self {
            _processes: processes,
            _keys: keys,
            pair,
            nearest,
        })
    }

    /// Reads all that comes; answers how many bytes.
    pub(super) async fn read(&self) -> anyhow::Result<u64> {
        let mut near = dial(self.nearest, &self.pair).await?;
        near.shutdown().await.context("closing our half")?;
        copy(&mut near, &mut tokio::io::sink()).await
    }

    /// Puts a program at this end as well; answers the bytes that came and those that went.
    pub(super) async fn run(&self, words: &[String]) -> anyhow::Result<(u64, u64)> {
        run(dial(self.nearest, &self.pair).await?, words).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles() {
        let relay = Role::Relay(SocketAddr::from(([10, 0, 0, 1], 7)));
        assert_eq!(Role::parse("relay=10.0.0.1:7").unwrap(), relay);
        assert_eq!(Role::parse("file=/a").unwrap(), Role::File("/a".into()));
        let words = ["cat", "/x"].map(str::to_owned).to_vec();
        assert_eq!(Role::parse("program=cat /x").unwrap(), Role::Program(words));
        Role::parse("sink").unwrap_err();
    }
}
