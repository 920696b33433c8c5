//! One HTTP request to the pod, for a probe or a hook. Redirects are followed on the same host; everything is bounded.

use std::str::FromStr as _;

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Request, StatusCode,
    header::{ACCEPT, CONNECTION, HOST, LOCATION, USER_AGENT},
};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use knoc_proto::{error::chain, pb};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use tokio::io::{AsyncRead, AsyncWrite};

use super::{LOCALHOST, asked::Asked, known::Known, tls};
use crate::health::Outcome;

/// As Kubernetes' own kubelet calls itself.
pub(super) const PROBE_AGENT: &str = "kube-probe/1.36";
const HOOK_AGENT: &str = "kube-lifecycle/1.36";

/// How many redirects are followed, and how much of a body is read, as in Kubernetes.
const REDIRECTS: usize = 10;
const BODY: usize = 10 << 10;

/// What cannot stand in the target of a request as it is.
const ESCAPED: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'<')
    .add(b'>')
    .add(b'\\')
    .add(b'^')
    .add(b'`')
    .add(b'{')
    .add(b'|')
    .add(b'}');

/// The same for a path that cannot be part of a URL.
const ALL_ESCAPED: &AsciiSet = &ESCAPED.add(b'%').add(b'?').add(b'#');

/// Where a request goes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Url {
    https: bool,
    port: u16,
    /// Path and query, which begin with a slash.
    target: String,
}

impl Url {
    fn of(get: &pb::HttpGetAction) -> Option<Self> {
        Some(Self {
            https: get.https,
            port: u16::try_from(get.port).ok().filter(|port| *port > 0)?,
            target: target(&get.path),
        })
    }

    fn scheme(&self) -> &'static str {
        if self.https { "https" } else { "http" }
    }

    /// Where a redirect to `location` leads, or `None` if that is another host.
    fn redirected(&self, location: &str) -> Option<Self> {
        let (scheme, rest) = match location.split_once("://") {
            Some((scheme, rest)) if !scheme.contains(['/', '?', '#']) => (Some(scheme), rest),
            Some(_) | None => match location.strip_prefix("//") {
                Some(rest) => (Some(self.scheme()), rest),
                None => (None, location),
            },
        };
        let Some(scheme) = scheme else {
            let target = self.relative(rest);
            return Some(Self {
                target,
                ..self.clone()
            });
        };
        let https = match scheme.to_ascii_lowercase().as_str() {
            "http" => false,
            "https" => true,
            _ => return None,
        };
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        let default = if https { 443 } else { 80 };
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) => (host, port.parse().ok()?),
            None => (authority, default),
        };
        (host == LOCALHOST).then(|| Self {
            https,
            port,
            target: target(&without_dots(path)),
        })
    }

    fn relative(&self, reference: &str) -> String {
        let path = self.target.split('?').next().unwrap_or_default();
        match reference.chars().next() {
            Some('/') => target(&without_dots(reference)),
            Some('?') => target(&format!("{path}{reference}")),
            None | Some('#') => self.target.clone(),
            Some(_) => {
                let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
                target(&without_dots(&format!("{folder}/{reference}")))
            }
        }
    }
}

impl std::fmt::Display for Url {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { port, target, .. } = self;
        write!(f, "{}://{LOCALHOST}:{port}{target}", self.scheme())
    }
}

/// A path with its query as it stands in a request. As in Kubernetes, all of a text that is no URL, because of a `%` without two
/// digits, is a path.
fn target(path: &str) -> String {
    let names = path.split(['?', '#']).next().unwrap_or_default();
    let is_escape = |after: &str| {
        let digits = after.as_bytes().get(..2);
        digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    };
    let (path, escaped) = if names.split('%').skip(1).all(is_escape) {
        (path.split('#').next().unwrap_or_default(), ESCAPED)
    } else {
        (path, ALL_ESCAPED)
    };
    let slash = if path.starts_with('/') { "" } else { "/" };
    format!("{slash}{}", utf8_percent_encode(path, escaped))
}

/// The address of a redirect with the `.` and `..` of its path resolved, as any client does it.
fn without_dots(reference: &str) -> String {
    let end = reference.find(['?', '#']).unwrap_or(reference.len());
    let (path, query) = reference.split_at(end);
    if !path.starts_with('/') {
        return reference.to_owned();
    }
    let mut names = Vec::new();
    for name in path.split('/').skip(1) {
        match name {
            "." => {}
            ".." => {
                names.pop();
            }
            name => names.push(name),
        }
    }
    let ends_in_folder = path.ends_with("/.") || path.ends_with("/..");
    let slash = if ends_in_folder && !names.is_empty() {
        "/"
    } else {
        ""
    };
    format!("/{}{slash}{query}", names.join("/"))
}

/// The headers of the request. `Host` may be one of them. As in Kubernetes, the pod cannot say how long the body is, and of several
/// hosts and agents the first one counts.
fn headers(get: &pb::HttpGetAction, agent: &'static str) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for header in &get.headers {
        // A value may be secret, so the error does not show it.
        let name = HeaderName::from_str(&header.name);
        let value = HeaderValue::from_bytes(header.value.as_bytes());
        let (Ok(name), Ok(value)) = (name, value) else {
            return Err(format!("the header {:?} cannot be sent", header.name));
        };
        let skipped = match name.as_str() {
            "content-length" | "transfer-encoding" | "trailer" => true,
            "host" | "user-agent" => headers.contains_key(&name),
            _ => false,
        };
        if !skipped {
            headers.append(name, value);
        }
    }
    if headers.get(HOST).is_some_and(HeaderValue::is_empty) {
        headers.remove(HOST);
    }
    // As in Kubernetes: an empty value leaves the header out.
    for (name, default) in [(USER_AGENT, agent), (ACCEPT, "*/*")] {
        match headers.get(&name) {
            None => drop(headers.insert(name, HeaderValue::from_static(default))),
            Some(value) if value.is_empty() => drop(headers.remove(name)),
            Some(_) => {}
        }
    }
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    Ok(headers)
}

/// How a request that got a response ended.
#[derive(Debug)]
pub(super) enum Ending {
    Status(StatusCode),
    /// A redirect to another host or to nowhere, with the beginning of its body.
    NotFollowed(String),
}

/// A response as far as it is read.
struct Answer {
    status: StatusCode,
    location: Option<String>,
    body: Vec<u8>,
}

/// What users know the request by.
pub(super) fn name(get: &pb::HttpGetAction) -> String {
    Url::of(get).map_or_else(String::new, |url| format!("Get {:?}", url.to_string()))
}

/// A probe: sends the request, and judges the response as Kubernetes does. The caller limits the time.
pub(super) async fn probe(get: &pb::HttpGetAction, known: &Known) -> Outcome {
    match request_of(get, PROBE_AGENT, known).await {
        Ok(Ending::Status(status)) => judge(status),
        Ok(Ending::NotFollowed(body)) => {
            Outcome::Warned(format!("Probe terminated redirects, Response body: {body}"))
        }
        Err(outcome) => outcome,
    }
}

/// A hook: as in Kubernetes every response will do.
pub(super) async fn hook(get: &pb::HttpGetAction, known: &Known) -> bool {
    request_of(get, HOOK_AGENT, known).await.is_ok()
}

/// Sends the request and follows its redirects.
async fn request_of(
    get: &pb::HttpGetAction,
    agent: &'static str,
    known: &Known,
) -> Result<Ending, Outcome> {
    let headers = headers(get, agent).map_err(Outcome::Errored)?;
    let first =
        Url::of(get).ok_or_else(|| Outcome::Errored(format!("{} is not a port", get.port)))?;
    let mut url = first.clone();
    for _ in 0..=REDIRECTS {
        let answer = send(&url, &headers, known)
            .await
            .map_err(|error| Outcome::Failed(format!("Get {:?}: {error}", url.to_string())))?;
        let location = answer
            .location
            .as_deref()
            .filter(|_| matches!(answer.status.as_u16(), 301 | 302 | 303 | 307 | 308));
        match location.and_then(|location| url.redirected(location)) {
            Some(next) => url = next,
            None if answer.status.is_redirection() => {
                let body = String::from_utf8_lossy(&answer.body).into_owned();
                return Ok(Ending::NotFollowed(body));
            }
            None => return Ok(Ending::Status(answer.status)),
        }
    }
    Err(Outcome::Failed(format!(
        "Get {:?}: stopped after {REDIRECTS} redirects",
        first.to_string()
    )))
}

fn judge(status: StatusCode) -> Outcome {
    match status.as_u16() {
        200..=299 => Outcome::Passed,
        code => Outcome::Failed(format!("HTTP probe failed with statuscode: {code}")),
    }
}

async fn send(url: &Url, headers: &HeaderMap, known: &Known) -> Result<Answer, String> {
    let stream = known.connect(url.port).await?;
    if url.https {
        let stream = tls::connect(stream, &[]).await?;
        exchange(stream, url, headers).await
    } else {
        exchange(stream, url, headers).await
    }
}

async fn exchange<S>(stream: S, url: &Url, headers: &HeaderMap) -> Result<Answer, String>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let text = |error: hyper::Error| chain(&error);
    let mut client = hyper::client::conn::http1::Builder::new();
    // As Go writes them: a simple server may know no other spelling.
    client.title_case_headers(true);
    let handshake = client.handshake(TokioIo::new(Asked::new(stream)));
    let (mut sender, connection) = handshake.await.map_err(text)?;
    let request = request(url, headers)?;
    let answering = async {
        let response = sender.send_request(request).await.map_err(text)?;
        Ok(read(response).await)
    };
    tokio::pin!(answering, connection);
    // The connection moves the bytes. It may end before the answer was taken.
    tokio::select! {
        biased;
        answer = &mut answering => answer,
        _ended = &mut connection => answering.await,
    }
}

fn request(url: &Url, headers: &HeaderMap) -> Result<Request<Empty<Bytes>>, String> {
    let mut request = Request::new(Empty::new());
    *request.uri_mut() = url
        .target
        .parse()
        .map_err(|error| format!("the path {:?} cannot be sent: {error}", url.target))?;
    *request.headers_mut() = headers.clone();
    if !headers.contains_key(HOST) {
        let host = HeaderValue::from_str(&format!("{LOCALHOST}:{}", url.port));
        let host = host.map_err(|error| error.to_string())?;
        request.headers_mut().insert(HOST, host);
    }
    Ok(request)
}

/// Reads the head, and the body up to its limit. A body that breaks off changes nothing.
async fn read(response: http::Response<Incoming>) -> Answer {
    let (head, mut body) = response.into_parts();
    let location = head.headers.get(LOCATION);
    let location = location.and_then(|value| value.to_str().ok());
    let mut kept = Vec::new();
    while kept.len() < BODY
        && let Some(Ok(frame)) = body.frame().await
    {
        let data = frame.into_data().unwrap_or_default();
        let room = (BODY - kept.len()).min(data.len());
        kept.extend_from_slice(data.get(..room).unwrap_or_default());
    }
    Answer {
        status: head.status,
        location: location.map(str::to_owned),
        body: kept,
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    fn url(text: &str) -> Url {
        let (https, rest) = match text.strip_prefix("https://") {
            Some(rest) => (true, rest),
            None => (false, text.strip_prefix("http://").unwrap()),
        };
        let (port, path) = rest.split_once('/').unwrap();
        Url {
            https,
            port: port.parse().unwrap(),
            target: format!("/{path}"),
        }
    }

    #[test]
    fn a_redirect_stays_on_the_host() {
        let base = url("http://8080/a/b?c=d");
        for (location, expected) in [
            ("/x?y#z", "http://8080/x?y"),
            ("x", "http://8080/a/x"),
            ("?q", "http://8080/a/b?q"),
            ("", "http://8080/a/b?c=d"),
            ("../x?y=../z", "http://8080/x?y=../z"),
            ("/a/./b/../c/..", "http://8080/a/"),
            ("/../..", "http://8080/"),
            ("http://127.0.0.1:81/a/../b/.", "http://81/b/"),
            ("http://127.0.0.1/x", "http://80/x"),
            ("HTTPS://127.0.0.1:9443", "https://9443/"),
            ("//127.0.0.1:81/p", "http://81/p"),
            (
                "/go?to=http://elsewhere/",
                "http://8080/go?to=http://elsewhere/",
            ),
        ] {
            assert_eq!(base.redirected(location), Some(url(expected)), "{location}");
        }
        for foreign in [
            "http://0.0.0.0/",
            "http://10.0.0.1:8080/",
            "//metadata/",
            "http://127.0.0.1@10.0.0.1/",
            "http://127.0.0.1.example.com/",
            "ftp://127.0.0.1/",
            "http://127.0.0.1:x/",
        ] {
            assert_eq!(base.redirected(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn a_path_is_a_target_whatever_it_contains() {
        assert_eq!(target(""), "/");
        assert_eq!(target("healthz"), "/healthz");
        assert_eq!(target("/a b\r\nX: y?q=ü#f"), "/a%20b%0D%0AX:%20y?q=%C3%BC");
        assert_eq!(target("/a%20b"), "/a%20b");
        // In a query anything goes; in a path an escape that is none makes all of it a path.
        assert_eq!(target("/a?b=100%"), "/a?b=100%");
        assert_eq!(target("/100%?a#b"), "/100%25%3Fa%23b");
        assert_eq!(target("/%2g%41"), "/%252g%2541");
    }

    #[test]
    fn headers_are_kubernetes_own_unless_the_pod_sets_them() {
        let header = |name: &str, value: &str| pb::HttpHeader {
            name: name.to_owned(),
            value: value.to_owned(),
        };
        let of = |list: &[pb::HttpHeader]| {
            let get = pb::HttpGetAction {
                headers: list.to_vec(),
                ..pb::HttpGetAction::default()
            };
            headers(&get, PROBE_AGENT)
        };
        let plain = of(&[]).unwrap();
        assert_eq!(plain[USER_AGENT], PROBE_AGENT);
        assert_eq!(plain[ACCEPT], "*/*");
        let own = of(&[
            header("user-agent", ""),
            header("Accept", "text/plain"),
            header("X-A", "1"),
            header("X-A", "2"),
        ])
        .unwrap();
        assert_eq!(own.get(USER_AGENT), None);
        assert_eq!(own[ACCEPT], "text/plain");
        assert_eq!(own.get_all("x-a").iter().count(), 2);
        let host = of(&[
            header("Host", "one.example"),
            header("host", "two.example"),
            header("User-Agent", "mine"),
            header("User-Agent", "other"),
            header("Content-Length", "7"),
            header("Transfer-Encoding", "chunked"),
        ])
        .unwrap();
        assert_eq!(
            host.get_all(HOST).iter().collect::<Vec<_>>(),
            ["one.example"]
        );
        assert_eq!(
            host.get_all(USER_AGENT).iter().collect::<Vec<_>>(),
            ["mine"]
        );
        assert_eq!(host.get("content-length"), None);
        assert_eq!(host.get("transfer-encoding"), None);
        assert_eq!(of(&[header("Host", "")]).unwrap().get(HOST), None);
        let error = of(&[header("X-A", "secret\n")]).unwrap_err();
        assert!(
            error.contains("X-A") && !error.contains("secret"),
            "{error}"
        );
    }

    /// Serves one connection: reads a request and writes `response`. Returns the request.
    async fn serve_once(
        mut stream: impl AsyncRead + AsyncWrite + Unpin,
        response: &[u8],
    ) -> String {
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            request.push(stream.read_u8().await.unwrap());
        }
        // The client may have read enough before all is written.
        stream.write_all(response).await.ok();
        stream.shutdown().await.ok();
        String::from_utf8(request).unwrap()
    }

    #[tokio::test]
    async fn a_request_is_as_a_kubelet_sends_it_and_a_body_without_end_is_cut() {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let get = pb::HttpGetAction {
            port: 8080,
            path: "live?x=1".to_owned(),
            ..pb::HttpGetAction::default()
        };
        let (url, headers) = (Url::of(&get).unwrap(), headers(&get, PROBE_AGENT).unwrap());
        let endless = [&b"HTTP/1.1 200 OK\r\n\r\n"[..], &vec![b'x'; 1 << 20]].concat();
        let (answer, request) =
            tokio::join!(exchange(ours, &url, &headers), serve_once(theirs, &endless),);
        let answer = answer.unwrap();
        assert_eq!((answer.status, answer.body.len()), (StatusCode::OK, BODY));
        assert!(
            request.starts_with("GET /live?x=1 HTTP/1.1\r\n"),
            "{request}"
        );
        for line in ["Host: 127.0.0.1:8080", "Connection: close", "Accept: */*"] {
            assert!(
                request.contains(&format!("\r\n{line}\r\n")),
                "{line}: {request}"
            );
        }
    }

    #[tokio::test]
    async fn a_server_may_answer_before_it_is_asked() {
        let (ours, mut theirs) = tokio::io::duplex(1 << 16);
        // As `echo` and `nc` do, which write no carriage returns either.
        theirs.write_all(b"HTTP/1.1 200 OK\n\nok").await.unwrap();
        theirs.shutdown().await.unwrap();
        let get = pb::HttpGetAction {
            port: 8080,
            ..pb::HttpGetAction::default()
        };
        let url = Url::of(&get).unwrap();
        let answer = exchange(ours, &url, &HeaderMap::new()).await.unwrap();
        assert_eq!(
            (answer.status, &answer.body[..]),
            (StatusCode::OK, &b"ok"[..])
        );
    }

    #[tokio::test]
    async fn what_is_no_http_is_an_error() {
        let (ours, mut theirs) = tokio::io::duplex(1 << 16);
        theirs.write_all(b"SSH-2.0-x\r\n").await.unwrap();
        let get = pb::HttpGetAction {
            port: 22,
            ..pb::HttpGetAction::default()
        };
        let url = Url::of(&get).unwrap();
        assert!(exchange(ours, &url, &HeaderMap::new()).await.is_err());
    }
}
