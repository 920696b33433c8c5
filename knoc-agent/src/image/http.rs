//! An HTTP/1.1 client for one bounded request at a time: it connects, sends the request, follows
//! redirects, and reads no more than is allowed.
//!
//! Connections are not pooled: each request has its own, which closes with the response, so that a
//! limit on requests is a limit on connections. Every connection follows [`Rules`], the first one
//! as well as those of redirects; the address that is checked is the address that is connected to.
//! Credentials and tokens are sent to their own origin and to no other.
//!
//! Owner task: none; an [`Answer`] owns the task that drives its connection. Cancel safety:
//! dropping a request or an answer closes its connection.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, OnceLock},
};

use bytes::Bytes;
use http::{
    Method, StatusCode, Uri,
    header::{self, HeaderMap, HeaderValue},
};
use http_body_util::{BodyExt as _, Empty};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::{
    client::proxy::matcher::{Intercept, Matcher},
    rt::TokioIo,
};
use knoc_proto::error::chain;
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    task::JoinSet,
};

use super::{
    Settings,
    guard::{Rules, Url},
};

const USER_AGENT: &str = concat!("knoc-agent/", env!("CARGO_PKG_VERSION"));
/// Blob stores need one or two redirects.
const MAX_REDIRECTS: usize = 5;
/// The largest head of a response, and the size of the read buffer for a body.
const MAX_HEAD: usize = 64 * 1024;
const MAX_HEADERS: usize = 100;
/// How many addresses of one host are tried.
const MAX_ADDRESSES: usize = 8;

/// A connection over any transport.
trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}
type BoxIo = Box<dyn Io>;

/// A request.
#[derive(Debug, Clone)]
pub(super) struct Request<'a> {
    /// GET or HEAD.
    pub(super) method: Method,
    pub(super) url: Url,
    /// The accepted media types.
    pub(super) accept: &'a str,
    /// Sent only to the origin of `url`.
    pub(super) authorization: Option<HeaderValue>,
    /// Whether the registry itself is accessed over plain HTTP.
    pub(super) plain: bool,
}

/// A response whose body has not been read yet.
#[derive(Debug)]
pub(super) struct Answer {
    /// The URL of the last redirect.
    pub(super) url: Url,
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    body: Incoming,
    /// The task that drives the connection, which ends with the answer.
    _connection: JoinSet<()>,
}

impl Answer {
    /// The next part of the body; `None` at its end.
    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, String> {
        while let Some(frame) = self.body.frame().await {
            let frame = frame.map_err(|error| format!("{}: {}", self.url, chain(&error)))?;
            if let Ok(data) = frame.into_data()
                && !data.is_empty()
            {
                return Ok(Some(data));
            }
        }
        Ok(None)
    }

    /// The whole body. A body longer than `limit` is rejected as soon as its length is known.
    pub(super) async fn whole(&mut self, limit: usize, what: &str) -> Result<Vec<u8>, String> {
        let url = self.url.clone();
        let too_long = || format!("{url}: {what} is longer than the {limit} bytes allowed");
        let announced = self.length().unwrap_or(0);
        if announced > u64::try_from(limit).unwrap_or(u64::MAX) {
            return Err(too_long());
        }
        let mut body = Vec::new();
        while let Some(chunk) = self.chunk().await? {
            if body.len() + chunk.len() > limit {
                return Err(too_long());
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }

    /// The `Content-Length`, if there is one.
    pub(super) fn length(&self) -> Option<u64> {
        self.header(header::CONTENT_LENGTH)?.parse().ok()
    }

    /// A header, if it is text.
    pub(super) fn header(&self, name: header::HeaderName) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// The client.
pub(super) struct Client {
    rules: Rules,
    proxies: Matcher,
    tls: OnceLock<Arc<rustls::ClientConfig>>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("rules", &self.rules)
            .field("proxies", &self.proxies)
            .finish_non_exhaustive()
    }
}

impl Client {
    pub(super) fn new(settings: &Settings) -> Self {
        let variable = |name: &str| {
            let lower = settings.env.get(&name.to_lowercase());
            let value = settings.env.get(name).filter(|value| !value.is_empty());
            value.or(lower).cloned().unwrap_or_default()
        };
        let proxies = Matcher::builder()
            .http(variable("HTTP_PROXY"))
            .https(variable("HTTPS_PROXY"))
            .no(variable("NO_PROXY"));
        Self {
            rules: Rules::new(
                &settings.registries,
                settings
                    .library
                    .as_ref()
                    .map(|library| library.address.as_str()),
            ),
            proxies: proxies.build(),
            tls: OnceLock::new(),
        }
    }

    /// Sends a request and follows redirects. The caller bounds the time.
    pub(super) async fn ask(&self, request: Request<'_>) -> Result<Answer, String> {
        let origin = request.url.clone();
        let mut url = request.url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let authorization = request
                .authorization
                .as_ref()
                .filter(|_| url.same_origin(&origin));
            let answer = self.once(&request, &url, authorization).await?;
            if !answer.status.is_redirection() {
                return Ok(answer);
            }
            let location = answer.header(header::LOCATION).unwrap_or_default();
            let next = url.join(location);
            url =
                next.map_err(|why| format!("{url} redirects to a URL that cannot be used: {why}"))?;
        }
        Err(format!(
            "{origin} redirects more than {MAX_REDIRECTS} times"
        ))
    }

    async fn once(
        &self,
        request: &Request<'_>,
        url: &Url,
        authorization: Option<&HeaderValue>,
    ) -> Result<Answer, String> {
        self.rules.host(url)?;
        self.rules.scheme(url, request.plain)?;
        let uri: Uri = format!("{}://{}{}", url.scheme(), url.authority(), url.path)
            .parse()
            .map_err(|error| format!("{url}: {error}"))?;
        let proxy = self.proxies.intercept(&uri);
        let io = match &proxy {
            Some(proxy) => self.through(proxy, url).await?,
            None => self.direct(url).await?,
        };
        let io = if url.tls {
            self.encrypt(io, &url.host).await?
        } else {
            io
        };
        let failed = |error: hyper::Error| format!("{url}: {}", chain(&error));
        let mut connection = JoinSet::new();
        let mut sender = handshake(io, &mut connection).await.map_err(failed)?;
        let absolute = proxy.as_ref().filter(|_| !url.tls);
        let target = if absolute.is_some() {
            uri
        } else {
            url.path
                .parse()
                .map_err(|error| format!("{url}: {error}"))?
        };
        let mut head = http::Request::builder()
            .method(request.method.clone())
            .uri(target)
            .header(header::HOST, url.authority())
            .header(header::USER_AGENT, USER_AGENT)
            .header(header::ACCEPT, request.accept)
            .header(header::ACCEPT_ENCODING, "identity");
        if let Some(authorization) = authorization {
            head = head.header(header::AUTHORIZATION, authorization);
        }
        if let Some(basic) = absolute.and_then(Intercept::basic_auth) {
            head = head.header(header::PROXY_AUTHORIZATION, basic);
        }
        let head = head
            .body(Empty::<Bytes>::new())
            .map_err(|error| format!("{url}: {error}"))?;
        let answer = sender.send_request(head).await.map_err(failed)?;
        let (parts, body) = answer.into_parts();
        Ok(Answer {
            url: url.clone(),
            status: parts.status,
            headers: parts.headers,
            body,
            _connection: connection,
        })
    }

    /// Connects to the host itself, if all of its addresses are allowed.
    async fn direct(&self, url: &Url) -> Result<BoxIo, String> {
        let found = look_up(&url.host, url.port).await?;
        check_addresses(&self.rules, url, &found)?;
        Ok(Box::new(dial(&url.authority(), &found).await?))
    }

    /// Connects through a proxy of the site file. The site chose the proxy, so its address is not
    /// checked.
    async fn through(&self, proxy: &Intercept, url: &Url) -> Result<BoxIo, String> {
        let at = Url::parse(&proxy.uri().to_string())
            .map_err(|why| format!("the proxy of [env] in the site file: {why}"))?;
        let found = look_up(&at.host, at.port).await?;
        let io: BoxIo = Box::new(dial(&format!("proxy {}", at.authority()), &found).await?);
        let io = if at.tls {
            self.encrypt(io, &at.host).await?
        } else {
            io
        };
        if !url.tls {
            return Ok(io);
        }
        let failed = |error: hyper::Error| format!("proxy {}: {}", at.authority(), chain(&error));
        let mut connection = JoinSet::new();
        let mut sender = handshake(io, &mut connection).await.map_err(failed)?;
        let host = url.authority();
        let target = if host.ends_with(&format!(":{}", url.port)) {
            host
        } else {
            format!("{host}:{}", url.port)
        };
        let mut head = http::Request::connect(&target).header(header::HOST, &target);
        if let Some(basic) = proxy.basic_auth() {
            head = head.header(header::PROXY_AUTHORIZATION, basic);
        }
        let head = head
            .body(Empty::<Bytes>::new())
            .map_err(|error| format!("proxy {}: {error}", at.authority()))?;
        let answer = sender.send_request(head).await.map_err(failed)?;
        if !answer.status().is_success() {
            let status = answer.status();
            return Err(format!(
                "proxy {}: {status} to CONNECT {target}",
                at.authority()
            ));
        }
        let upgraded = hyper::upgrade::on(answer).await.map_err(failed)?;
        // The upgraded connection is independent of the task, which has ended.
        Ok(Box::new(TokioIo::new(upgraded)))
    }

    async fn encrypt(&self, io: BoxIo, host: &str) -> Result<BoxIo, String> {
        let failed = |why: String| format!("TLS with {host}: {why}");
        let name = ServerName::try_from(host.to_owned()).map_err(|error| failed(chain(&error)))?;
        let config = if let Some(config) = self.tls.get() {
            Arc::clone(config)
        } else {
            let loaded = tokio::task::spawn_blocking(tls_config).await;
            let config = loaded.map_err(|error| failed(chain(&error)))??;
            Arc::clone(self.tls.get_or_init(|| config))
        };
        let connector = tokio_rustls::TlsConnector::from(config);
        let stream = connector.connect(name, io).await;
        Ok(Box::new(stream.map_err(|error| failed(chain(&error)))?))
    }
}

/// A TLS configuration that uses the system's certificate authorities. Blocking.
fn tls_config() -> Result<Arc<rustls::ClientConfig>, String> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = rustls::RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(found.certs);
    if added == 0 {
        let why = found.errors.first().map(|error| format!(": {error}"));
        return Err(format!(
            "this host has no certificate authorities{} (set SSL_CERT_FILE in [env] to use others)",
            why.unwrap_or_default()
        ));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| chain(&error))?;
    let mut config = config.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

async fn look_up(host: &str, port: u16) -> Result<Vec<SocketAddr>, String> {
    let found = tokio::net::lookup_host((host, port)).await;
    let found: Vec<SocketAddr> = found
        .map_err(|error| format!("look up {host}: {error}"))?
        .take(MAX_ADDRESSES)
        .collect();
    if found.is_empty() {
        return Err(format!("look up {host}: it has no address"));
    }
    Ok(found)
}

/// Whether all addresses that the host of `url` has may be connected to.
fn check_addresses(rules: &Rules, url: &Url, found: &[SocketAddr]) -> Result<(), String> {
    let mut addresses = found.iter().map(SocketAddr::ip);
    addresses.try_for_each(|ip| rules.address(url, ip, is_of_this_host(ip)))
}

/// Whether an interface of this host has the address. If the interfaces cannot be listed, none has
/// it.
fn is_of_this_host(ip: IpAddr) -> bool {
    let ip = ip.to_canonical();
    let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
    interfaces
        .filter_map(|interface| interface.address)
        .any(|address| {
            let v4 = || address.as_sockaddr_in().map(|has| IpAddr::V4(has.ip()));
            let v6 = || address.as_sockaddr_in6().map(|has| IpAddr::V6(has.ip()));
            v4().or_else(v6) == Some(ip)
        })
}

async fn dial(name: &str, addresses: &[SocketAddr]) -> Result<TcpStream, String> {
    let mut failed = String::new();
    for address in addresses {
        match TcpStream::connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => failed = format!("connect to {name} ({address}): {error}"),
        }
    }
    Err(failed)
}

async fn handshake(
    io: BoxIo,
    owner: &mut JoinSet<()>,
) -> hyper::Result<http1::SendRequest<Empty<Bytes>>> {
    let (sender, connection) = http1::Builder::new()
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_HEADERS)
        .handshake(TokioIo::new(io))
        .await?;
    let connection = connection.with_upgrades();
    // An error of the connection reaches the reader of the answer.
    owner.spawn(async move { drop(connection.await) });
    Ok(sender)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_hosts_addresses_are_known_as_such() {
        for own in ["127.0.0.1", "::ffff:127.0.0.1"] {
            assert!(is_of_this_host(own.parse().unwrap()), "{own}");
        }
        // Addresses for documentation (RFC 5737, RFC 3849): no host has them.
        for other in ["192.0.2.1", "2001:db8::1"] {
            assert!(!is_of_this_host(other.parse().unwrap()), "{other}");
        }
    }

    /// A host whose only interface is the loopback has no such address, and nothing to show.
    #[test]
    fn no_image_leads_to_an_interface_of_this_host() {
        let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
        let addresses = interfaces.filter_map(|interface| interface.address);
        let mut own = addresses
            .filter_map(|address| address.as_sockaddr_in().map(|has| IpAddr::V4(has.ip())))
            .filter(|ip| super::super::guard::forbidden(*ip).is_none());
        let Some(ip) = own.next() else { return };
        let url = Url::parse("https://registry.example.org/v2/").unwrap();
        let check = |ip| check_addresses(&Rules::default(), &url, &[SocketAddr::new(ip, 443)]);
        let error = check(ip).unwrap_err();
        assert!(error.contains("an address of this host"), "{error}");
        // One that no host has (RFC 5737).
        assert_eq!(check("192.0.2.1".parse().unwrap()), Ok(()));
    }
}
