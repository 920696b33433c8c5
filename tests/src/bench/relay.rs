//! Plain TLS relays: the floor of streams. Each relay is a process that accepts a connection over TLS 1.3 and passes its
//! bytes on to the next relay. The last one runs the same program as the pod, connects to a listener, or reads
//! the bytes from a file. The relays run on the same machines as the parts of KNoC (compute node, login node, host), so that
//! the bytes take the same path. The TLS library and its settings are those of KNoC's links.

use std::{
    io::Read as _,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
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
    net::{TcpListener, TcpStream},
    process::Child,
};

use super::bed::{Bed, FOLDER, RELAY};
use crate::{Run, wait_for};

/// The size of the buffer for copying.
const CHUNK: usize = 64 << 10;

/// The time limit for the start of a relay.
const SOON: Duration = Duration::from_secs(30);

/// The compute nodes of [`Location::Compute`] and [`Location::Second`].
pub(super) const FIRST: &str = "c1";
pub(super) const SECOND: &str = "c2";

/// The port of the first relay; the others of the chain use the following ports.
const FIRST_PORT: u16 = 19_200;

/// The machine of a part of KNoC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Location {
    /// The compute node, where the shim runs.
    Compute,
    /// A second compute node, on which a pod sends to one of the first.
    Second,
    /// The login node, where the agent runs.
    Login,
    /// The login node again, but its relay is a command of an SSH login: it has no port, and the next relay logs in for each connection.
    Ssh,
    /// The host of kubelet and API server.
    Host,
}

impl Location {
    /// The name of the node of the test bed, if it is not the host.
    fn node(self) -> Option<&'static str> {
        match self {
            Self::Compute => Some(FIRST),
            Self::Second => Some(SECOND),
            Self::Login | Self::Ssh => Some("login"),
            Self::Host => None,
        }
    }

    /// The address at which the next relay reaches it.
    fn address(self) -> Ipv4Addr {
        match self {
            Self::Compute => Ipv4Addr::new(10, 78, 0, 11),
            Self::Second => Ipv4Addr::new(10, 78, 0, 12),
            Self::Login | Self::Ssh => login_address(),
            Self::Host => Ipv4Addr::LOCALHOST,
        }
    }
}

/// The login node that the agent runs on, as the host reaches it.
fn login_address() -> Ipv4Addr {
    match std::env::var("PROFILE").as_deref() {
        Ok("two-logins") => Ipv4Addr::new(10, 76, 0, 2),
        _ => Ipv4Addr::new(10, 77, 0, 2),
    }
}

/// The words with which the host logs in at the login node as the agent's user, with a key that gives a shell.
pub(super) fn ssh() -> anyhow::Result<Vec<String>> {
    let variable = |name: &str| std::env::var(name).with_context(|| format!("{name} is not set"));
    let (prefix, bed) = (variable("HPC_PREFIX")?, variable("KNOC_BED")?);
    let words = format!(
        "ssh -q -T -F none -i {prefix}/ssh/id_ed25519 -o BatchMode=yes -o IdentitiesOnly=yes -o StrictHostKeyChecking=yes \
         -o UserKnownHostsFile={bed}/run/ssh/known_hosts hpcuser@{}",
        login_address()
    );
    Ok(words.split(' ').map(str::to_owned).collect())
}

/// Passes standard input and output to the relay at that address. `keys` is as in [`serve`].
pub async fn pipe(to: SocketAddr, keys: &Path) -> anyhow::Result<()> {
    let pair = KeyPair::from_files(&keys.join("pair.crt"), &keys.join("pair.key"))?;
    let (mut from, mut far) = tokio::io::split(dial(to, &pair).await?);
    let input = async {
        copy(&mut tokio::io::stdin(), &mut far).await?;
        anyhow::Ok(far.shutdown().await?)
    };
    let output = async {
        let mut out = tokio::io::stdout();
        copy(&mut from, &mut out).await?;
        anyhow::Ok(out.flush().await?)
    };
    tokio::try_join!(input, output)?;
    Ok(())
}

/// Sends that many bytes to the relay at that address and waits until it closes; returns the time. `keys` is as in [`serve`].
pub async fn send_bytes(to: SocketAddr, bytes: u64, keys: &Path) -> anyhow::Result<Duration> {
    let pair = KeyPair::from_files(&keys.join("pair.crt"), &keys.join("pair.key"))?;
    let chunk = vec![0; CHUNK];
    let mut left = usize::try_from(bytes)?;
    let began = Instant::now();
    let mut near = dial(to, &pair).await?;
    while left > 0 {
        let part = left.min(CHUNK);
        near.write_all(&chunk[..part]).await?;
        left -= part;
    }
    close(near).await?;
    Ok(began.elapsed())
}

/// The other end of a relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// Sends the contents of the file and closes.
    File(PathBuf),
    /// Connects it with the standard input and output of a program.
    Program(Vec<String>),
    /// Connects to that address without TLS, and sends what it reads from there.
    Listener(SocketAddr),
    /// Connects to that address without TLS and copies in both directions.
    Server(SocketAddr),
    /// Connects to the next relay at that address and copies in both directions.
    Relay(SocketAddr),
}

impl Role {
    /// Parses `file=PATH`, `program=COMMAND`, `listener=ADDRESS`, `server=ADDRESS` or `relay=ADDRESS`.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        match text.split_once('=') {
            Some(("file", path)) => Ok(Self::File(path.into())),
            Some(("program", command)) => Ok(Self::Program(
                command.split(' ').map(str::to_owned).collect(),
            )),
            Some(("listener", address)) => Ok(Self::Listener(address.parse()?)),
            Some(("server", address)) => Ok(Self::Server(address.parse()?)),
            Some(("relay", address)) => Ok(Self::Relay(address.parse()?)),
            _ => anyhow::bail!(
                "{text:?} is not file=PATH, program=COMMAND, listener=ADDRESS, server=ADDRESS or relay=ADDRESS"
            ),
        }
    }
}

/// Serves connections one after the other until the process is killed. `keys` contains `pair.crt` and `pair.key`.
pub async fn serve(port: u16, role: Role, keys: &Path) -> anyhow::Result<()> {
    let pair = KeyPair::from_files(&keys.join("pair.crt"), &keys.join("pair.key"))?;
    let everywhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    let mut incoming = pinned::listen(everywhere, pair.clone()).await?;
    while let Some(connection) = incoming.next().await {
        // A probe that only checks whether the port is open makes no TLS handshake.
        let Ok(near) = connection else { continue };
        match &role {
            Role::File(path) => send(near, path).await?,
            Role::Program(command) => drop(run(near, command).await?),
            Role::Listener(address) => fetch(near, *address).await?,
            Role::Server(address) => pass(near, TcpStream::connect(*address).await?).await?,
            Role::Relay(next) => pass(near, dial(*next, &pair).await?).await?,
        }
    }
    Ok(())
}

/// A relay whose clients have no TLS: passes their connections on to the relay at that address, one after the other. `keys` is as in
/// [`serve`].
pub async fn plain(port: u16, to: SocketAddr, keys: &Path) -> anyhow::Result<()> {
    let pair = KeyPair::from_files(&keys.join("pair.crt"), &keys.join("pair.key"))?;
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await?;
    loop {
        let (near, _) = listener.accept().await?;
        pass(near, dial(to, &pair).await?).await?;
    }
}

async fn send(mut near: Connection, path: &Path) -> anyhow::Result<()> {
    // Blocking reads are harmless: the file is in the page cache, and this process has no other task.
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

/// Closes the connection after the peer has. If a socket is closed with unread bytes, sent data may be lost.
async fn close(mut near: Connection) -> anyhow::Result<()> {
    near.shutdown().await?;
    let mut rest = Vec::new();
    near.read_to_end(&mut rest).await?;
    Ok(())
}

/// Passes the connection to the program's input and the program's output to the connection, with the end of each; returns the
/// number of bytes in both directions.
async fn run(near: Connection, command: &[String]) -> anyhow::Result<(u64, u64)> {
    let (program, arguments) = command.split_first().context("no program")?;
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
    anyhow::ensure!(status.success(), "{command:?}: {status}");
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

async fn pass(
    mut near: impl AsyncRead + AsyncWrite + Unpin,
    mut far: impl AsyncRead + AsyncWrite + Unpin,
) -> anyhow::Result<()> {
    copy_bidirectional_with_sizes(&mut near, &mut far, CHUNK, CHUNK).await?;
    Ok(())
}

async fn dial(to: SocketAddr, pair: &KeyPair) -> anyhow::Result<Connection> {
    Ok(pinned::dial(&to.to_string(), pair, pair.spki()).await?)
}

/// A chain of relays, one process each. The last one is the nearest.
pub(super) struct Chain {
    processes: Vec<Child>,
    keys: TempDir,
    pair: KeyPair,
    nearest: SocketAddr,
    farthest: SocketAddr,
}

impl Chain {
    /// Starts the relays, the farthest with `role`, and waits until all of them listen.
    pub(super) async fn start(
        bed: &Bed,
        locations: &[Location],
        role: String,
    ) -> anyhow::Result<Self> {
        let keys = tempfile::tempdir_in(bed.here(FOLDER))?;
        let name = keys.path().file_name().context("no name")?;
        let pair = KeyPair::generate("bench")?;
        crate::site::write(&keys.path().join("pair.crt"), pair.cert_pem())?;
        crate::site::write(&keys.path().join("pair.key"), pair.key_pem())?;
        readable_by_others(keys.path())?;
        let mut processes = Vec::new();
        let mut role = role;
        let mut nearest = SocketAddr::from((Ipv4Addr::LOCALHOST, FIRST_PORT));
        let farthest = locations
            .first()
            .map_or(Ipv4Addr::LOCALHOST, |one| one.address());
        let farthest = SocketAddr::from((farthest, FIRST_PORT));
        let log = keys.path().join("log");
        for (&location, port) in locations.iter().zip(FIRST_PORT..) {
            let keys_there = Path::new(FOLDER).join(name);
            if location == Location::Ssh {
                let keys = keys_there.display();
                let next = role
                    .strip_prefix("relay=")
                    .context("nothing to log in for")?;
                role = format!("program={} {RELAY} pipe {next} {keys}", ssh()?.join(" "));
                continue;
            }
            let (relay, keys_there) = match location.node() {
                Some(node) => (bed.world.on_as_root(node, [RELAY]), keys_there),
                None => (Run::new(bed.here(RELAY)), keys.path().to_owned()),
            };
            let relay = relay
                .args(["relay", &port.to_string(), &role])
                .arg(keys_there);
            processes.push(relay.spawn(&log)?);
            nearest = SocketAddr::from((location.address(), port));
            role = format!("relay={nearest}");
            listens(bed, location, port, &log).await?;
        }
        Ok(Self {
            processes,
            keys,
            pair,
            nearest,
            farthest,
        })
    }

    /// Starts one more relay, on the second compute node, whose clients have no TLS. It passes their bytes on to the farthest relay, as if
    /// there were no others between the two. Returns its address, at which it listens soon.
    pub(super) fn without_tls(&mut self, bed: &Bed) -> anyhow::Result<SocketAddr> {
        let port = self.nearest.port() + 1;
        let relay = bed.world.on_as_root(SECOND, [RELAY]);
        let relay = relay
            .args(["plain", &port.to_string(), &self.farthest.to_string()])
            .arg(self.keys_there()?);
        self.processes
            .push(relay.spawn(&self.keys.path().join("log"))?);
        Ok(SocketAddr::from((Location::Second.address(), port)))
    }

    /// The command with which a node sends that many bytes through the chain, over TLS. It prints the microseconds.
    pub(super) fn sender(&self, bytes: u64) -> anyhow::Result<String> {
        let (to, keys) = (self.nearest, self.keys_there()?);
        Ok(format!("{RELAY} send {to} {bytes} {}", keys.display()))
    }

    /// The folder of the keys as the nodes see it.
    fn keys_there(&self) -> anyhow::Result<PathBuf> {
        let name = self.keys.path().file_name().context("no name")?;
        Ok(Path::new(FOLDER).join(name))
    }

    /// Reads until the end; returns the number of bytes.
    pub(super) async fn read(&self) -> anyhow::Result<u64> {
        let mut near = dial(self.nearest, &self.pair).await?;
        near.shutdown().await.context("closing our half")?;
        copy(&mut near, &mut tokio::io::sink()).await
    }

    /// Connects a local program with the chain; returns the number of bytes received and sent.
    pub(super) async fn run(&self, command: &[String]) -> anyhow::Result<(u64, u64)> {
        run(dial(self.nearest, &self.pair).await?, command).await
    }
}

/// Waits until the relay at that port listens. It is asked from the machine of the next relay, because the host cannot reach compute nodes.
async fn listens(bed: &Bed, location: Location, port: u16, log: &Path) -> anyhow::Result<()> {
    let probe = format!("exec 3<>/dev/tcp/{}/{port}", location.address());
    wait_for("a relay listens", SOON, async || {
        let probed = match location {
            Location::Compute | Location::Second => bed.shell("login", &probe).ok().await,
            Location::Login | Location::Ssh | Location::Host => {
                Run::new("bash").args(["-c", &probe]).ok().await
            }
        };
        let said = || std::fs::read_to_string(log).unwrap_or_default();
        probed.map_err(|error| format!("{error:#}; {}", said()))
    })
    .await
    .map(drop)
}

/// The keys of the relays protect nothing, and one of them runs as the agent's user.
fn readable_by_others(folder: &Path) -> anyhow::Result<()> {
    let mode = std::os::unix::fs::PermissionsExt::from_mode;
    for name in ["pair.crt", "pair.key"] {
        std::fs::set_permissions(folder.join(name), mode(0o644))?;
    }
    Ok(std::fs::set_permissions(folder, mode(0o755))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles() {
        let relay = Role::Relay(SocketAddr::from(([10, 0, 0, 1], 7)));
        assert_eq!(Role::parse("relay=10.0.0.1:7").unwrap(), relay);
        assert_eq!(Role::parse("file=/a").unwrap(), Role::File("/a".into()));
        let server = SocketAddr::from(([127, 0, 0, 1], 7));
        assert_eq!(
            Role::parse("server=127.0.0.1:7").unwrap(),
            Role::Server(server)
        );
        let command = ["cat", "/x"].map(str::to_owned).to_vec();
        assert_eq!(
            Role::parse("program=cat /x").unwrap(),
            Role::Program(command)
        );
        Role::parse("sink").unwrap_err();
    }
}
