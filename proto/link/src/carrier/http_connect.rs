//! The carrier `http-connect`: `HOST:PORT` through an HTTP proxy that is asked to `CONNECT` (RFC 9110, section 9.3.6).
//!
//! The proxy only relays bytes; TLS with our identities runs through it. Its answer is bounded in size and time, and
//! each way to fail has an error of its own, because different people can fix it.
use std::{
    fs, io,
    io::Read as _,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::{Carrier, Dial, Unverified};
use crate::{
    LinkError,
    origin::Origin,
    own_uid,
    proxy::{Login, Proxy},
};

/// The limit from connecting to the end of the proxy's answer. It is below `CONNECT_TIMEOUT`, so that the error names the
/// proxy.
const ANSWER: Duration = Duration::from_secs(8);
/// The largest head of an answer, in bytes, as in most HTTP clients.
const MAX_HEAD: usize = 8 << 10;
/// The largest file with credentials, in bytes.
const MAX_CREDENTIALS: u64 = 1 << 10;
/// How many characters an error shows of what a proxy sent.
const SHOWN: usize = 80;

/// Why no connection was made through a proxy.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// The proxy cannot be connected to, or its name does not resolve.
    #[error("connect to the proxy {proxy}")]
    Unreachable {
        /// The proxy.
        proxy: Proxy,
        /// The system's message.
        #[source]
        source: io::Error,
    },
    /// The proxy did not answer in time.
    #[error("the proxy {proxy} did not answer within {} s", ANSWER.as_secs())]
    Silent {
        /// The proxy.
        proxy: Proxy,
    },
    /// The connection to the proxy broke before its answer.
    #[error("the proxy {proxy} ended the connection before it answered")]
    Closed {
        /// The proxy.
        proxy: Proxy,
        /// The system's message.
        #[source]
        source: io::Error,
    },
    /// The head of the answer is too long.
    #[error("the proxy {proxy} sent an answer whose head is longer than {MAX_HEAD} bytes")]
    TooLong {
        /// The proxy.
        proxy: Proxy,
    },
    /// The answer is not HTTP.
    #[error("{proxy} does not answer like an HTTP proxy: {answer:?}")]
    NotHttp {
        /// The proxy.
        proxy: Proxy,
        /// The beginning of its answer.
        answer: String,
    },
    /// The proxy answered 407, and no credentials are configured.
    #[error(
        "the proxy {proxy} asks for a user and a password (407): name a file with `user:password` as its credentials"
    )]
    NoCredentials {
        /// The proxy.
        proxy: Proxy,
    },
    /// The proxy answered 407 to our credentials.
    #[error("the proxy {proxy} does not accept the user and password of {origin} (407)")]
    WrongCredentials {
        /// The proxy.
        proxy: Proxy,
        /// Where they come from.
        origin: String,
    },
    /// The proxy answered 403 or 405.
    #[error(
        "the proxy {proxy} forbids connections to {target} ({status}): its operator has to allow this host and port"
    )]
    Forbidden {
        /// The proxy.
        proxy: Proxy,
        /// The peer.
        target: String,
        /// Its status line.
        status: String,
    },
    /// The proxy answered with any other status.
    #[error("the proxy {proxy} cannot connect to {target}: {status}")]
    Failed {
        /// The proxy.
        proxy: Proxy,
        /// The peer.
        target: String,
        /// Its status line.
        status: String,
    },
    /// The file with credentials cannot be read.
    #[error("read the proxy's credentials from {}", path.display())]
    ReadCredentials {
        /// The file.
        path: PathBuf,
        /// The system's message.
        #[source]
        source: io::Error,
    },
    /// Other users can read the file with credentials.
    #[error("{} must belong to uid {uid} with mode 0600 or less, or to root without access for others; it belongs to uid {found_uid} and has mode {mode:04o}", path.display())]
    OpenCredentials {
        /// The file.
        path: PathBuf,
        /// Our own uid.
        uid: u32,
        /// The uid of its owner.
        found_uid: u32,
        /// Its permission bits.
        mode: u32,
    },
    /// The file does not contain `user:password`.
    #[error("{} must contain one line `user:password` and nothing else", path.display())]
    FormOfCredentials {
        /// The file.
        path: PathBuf,
    },
}

/// Dials `HOST:PORT` through a proxy.
#[derive(Debug)]
pub struct Dialler<'a> {
    /// `HOST:PORT`
    pub address: &'a str,
    /// The proxy.
    pub proxy: &'a Proxy,
}

impl Dial for Dialler<'_> {
    type Io = TcpStream;

    async fn dial(&self) -> Result<Unverified<TcpStream>, LinkError> {
        let proxy = self.proxy.clone();
        let tunnel = tokio::time::timeout(ANSWER, self.tunnel());
        let tunnel = tunnel.await.unwrap_or(Err(ProxyError::Silent { proxy }));
        tunnel.map_err(|source| LinkError::Proxy {
            carrier: Carrier::Tcp(self.address.to_owned()),
            source: Box::new(source),
        })
    }
}

impl Dialler<'_> {
    async fn tunnel(&self) -> Result<Unverified<TcpStream>, ProxyError> {
        let proxy = || self.proxy.clone();
        let authorization = authorization(self.proxy.login())?;
        let unreachable = |source| ProxyError::Unreachable {
            proxy: proxy(),
            source,
        };
        let connected = TcpStream::connect(self.proxy.address()).await;
        let mut io = connected.map_err(unreachable)?;
        io.set_nodelay(true).map_err(unreachable)?;
        let origin = Origin::Address(io.peer_addr().map_err(unreachable)?);
        let closed = |source| ProxyError::Closed {
            proxy: proxy(),
            source,
        };
        let request = request(self.address, authorization.as_deref());
        io.write_all(request.as_bytes()).await.map_err(closed)?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            if head.len() >= MAX_HEAD {
                return Err(ProxyError::TooLong { proxy: proxy() });
            }
            // Read byte by byte, because what follows the head belongs to TLS.
            head.push(io.read_u8().await.map_err(closed)?);
            if !could_be_http(&head) {
                return Err(self.not_http(&head));
            }
        }
        self.judge(&head)?;
        Ok(Unverified { io, origin })
    }

    fn judge(&self, head: &[u8]) -> Result<(), ProxyError> {
        let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
        let line = String::from_utf8_lossy(line);
        let status = line.split_once(' ').map(|(_, status)| status.trim());
        let code = status.and_then(|status| status.get(..3)?.parse::<u16>().ok());
        let (Some(code), Some(status)) = (code, status) else {
            return Err(self.not_http(head));
        };
        let (proxy, target) = (self.proxy.clone(), self.address.to_owned());
        let status = format!("{:?}", shortened(status));
        match code {
            200..=299 => Ok(()),
            407 => Err(match self.proxy.login() {
                Login::Nothing => ProxyError::NoCredentials { proxy },
                Login::Text(_) => {
                    let origin = "the variable that names it".to_owned();
                    ProxyError::WrongCredentials { proxy, origin }
                }
                Login::File(path) => {
                    let origin = path.display().to_string();
                    ProxyError::WrongCredentials { proxy, origin }
                }
            }),
            403 | 405 => Err(ProxyError::Forbidden {
                proxy,
                target,
                status,
            }),
            _ => Err(ProxyError::Failed {
                proxy,
                target,
                status,
            }),
        }
    }

    fn not_http(&self, answer: &[u8]) -> ProxyError {
        ProxyError::NotHttp {
            proxy: self.proxy.clone(),
            answer: shortened(&String::from_utf8_lossy(answer)),
        }
    }
}

fn request(target: &str, authorization: Option<&str>) -> String {
    let login = authorization.map_or_else(String::new, |login| {
        format!("Proxy-Authorization: Basic {login}\r\n")
    });
    format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{login}\r\n")
}

/// Whether an HTTP answer can begin like this.
fn could_be_http(head: &[u8]) -> bool {
    let known = head.len().min(b"HTTP/1.".len());
    head[..known] == b"HTTP/1."[..known]
}

fn shortened(text: &str) -> String {
    text.chars().take(SHOWN).collect()
}

/// The credentials in base64, as the header has them.
fn authorization(login: &Login) -> Result<Option<String>, ProxyError> {
    let text = match login {
        Login::Nothing => return Ok(None),
        Login::Text(text) => text.clone(),
        Login::File(path) => credentials(path)?,
    };
    Ok(Some(BASE64_STANDARD.encode(text)))
}

/// Reads `user:password` from a file that nobody else can read. The group may read a file of root: Kubernetes mounts Secrets
/// so.
fn credentials(path: &Path) -> Result<String, ProxyError> {
    let failed = |source| ProxyError::ReadCredentials {
        path: path.to_owned(),
        source,
    };
    let file = fs::File::open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    let mode = meta.mode() & 0o7777;
    let private = (meta.uid() == own_uid() && mode.trailing_zeros() >= 6)
        || (meta.uid() == 0 && mode & 0o027 == 0);
    if !private {
        return Err(ProxyError::OpenCredentials {
            path: path.to_owned(),
            uid: own_uid(),
            found_uid: meta.uid(),
            mode,
        });
    }
    let mut text = String::new();
    let read = file.take(MAX_CREDENTIALS + 1).read_to_string(&mut text);
    let size = u64::try_from(read.map_err(failed)?).unwrap_or(u64::MAX);
    let line = text.strip_suffix('\n').unwrap_or(&text);
    let line = line.strip_suffix('\r').unwrap_or(line);
    if size > MAX_CREDENTIALS || !line.contains(':') || line.chars().any(char::is_control) {
        let path = path.to_owned();
        return Err(ProxyError::FormOfCredentials { path });
    }
    Ok(line.to_owned())
}

#[cfg(test)]
mod tests;
