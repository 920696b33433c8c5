//! A registry on a real socket that answers as its test says: correctly, endlessly, slowly or not
//! at all.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_util::task::AbortOnDropHandle;

use super::super::super::digest::Digest;

pub(super) const CONFIG: &str = r#"{"os":"linux","rootfs":{"type":"layers","diff_ids":[]},"config":{"Cmd":["/bin/sh"],"Entrypoint":["/e"],"Env":["A=b"],"WorkingDir":"/w","User":"7"}}"#;
pub(super) const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";

/// A response.
#[derive(Debug, Clone)]
pub(super) enum Reply {
    /// Status, further header lines, body.
    Whole(&'static str, String, Vec<u8>),
    /// A body without an end, whatever the header lines say about its length.
    Endless(String),
    /// A body of so many bytes, one byte after each pause.
    Trickle(usize, Duration),
    /// The first bytes of a body of so many, and then nothing.
    Stall(usize),
    /// The connection is closed.
    Close,
}

impl Reply {
    pub(super) fn ok(body: impl Into<Vec<u8>>) -> Self {
        Self::Whole("200 OK", String::new(), body.into())
    }

    pub(super) fn not_found() -> Self {
        let body = r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#;
        Self::Whole("404 Not Found", String::new(), body.into())
    }

    pub(super) fn redirect(to: &str) -> Self {
        let head = format!("Location: {to}\r\n");
        Self::Whole("307 Temporary Redirect", head, Vec::new())
    }

    /// A response that demands a token of that realm.
    pub(super) fn unauthorized(realm: &str) -> Self {
        let head = format!("WWW-Authenticate: Bearer realm=\"{realm}\",service=\"s\"\r\n");
        Self::Whole("401 Unauthorized", head, Vec::new())
    }
}

/// A request: its head as it was received.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    pub(super) method: String,
    pub(super) path: String,
    pub(super) head: String,
}

type Answers = Arc<dyn Fn(&Ask) -> Reply + Send + Sync>;

/// What the registry has seen.
#[derive(Debug, Default)]
pub(super) struct Seen {
    open: AtomicUsize,
    /// The most connections at the same time.
    pub(super) most: AtomicUsize,
    /// Connections in total.
    pub(super) total: AtomicUsize,
    /// Bytes of bodies that were sent.
    pub(super) sent: AtomicUsize,
    pub(super) asks: Mutex<Vec<Ask>>,
}

impl Seen {
    pub(super) fn count(&self, method: &str, part: &str) -> usize {
        let asks = self.asks.lock().unwrap();
        let these = asks.iter().filter(|ask| ask.method == method);
        these.filter(|ask| ask.path.contains(part)).count()
    }
}

/// The registry; its task ends when it is dropped.
pub(super) struct FakeRegistry {
    /// The address, `127.0.0.1:PORT`.
    pub(super) address: String,
    pub(super) seen: Arc<Seen>,
    _task: AbortOnDropHandle<()>,
}

impl FakeRegistry {
    pub(super) async fn start(answers: impl Fn(&Ask) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let seen = Arc::new(Seen::default());
        let (answers, count): (Answers, _) = (Arc::new(answers), Arc::clone(&seen));
        let accept = async move {
            let mut tasks = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (answers, seen) = (Arc::clone(&answers), Arc::clone(&count));
                tasks.spawn(async move {
                    let open = seen.open.fetch_add(1, Ordering::SeqCst) + 1;
                    seen.most.fetch_max(open, Ordering::SeqCst);
                    seen.total.fetch_add(1, Ordering::SeqCst);
                    serve(stream, &answers, &seen).await.ok();
                    seen.open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        };
        #[expect(
            clippy::disallowed_methods,
            reason = "owned by the handle, which aborts it"
        )]
        let task = AbortOnDropHandle::new(tokio::spawn(accept));
        Self {
            address,
            seen,
            _task: task,
        }
    }
}

async fn serve(mut stream: TcpStream, answers: &Answers, seen: &Seen) -> std::io::Result<()> {
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let read = stream.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        text.extend_from_slice(&buffer[..read]);
        // The client sent TLS; the answer is what any plain web server sends.
        if text.first() == Some(&0x16) {
            return stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        }
        if !text.ends_with(b"\r\n\r\n") {
            continue;
        }
        let head = String::from_utf8_lossy(&text).into_owned();
        text.clear();
        let mut words = head.split(' ').map(str::to_owned);
        let (method, path) = (words.next().unwrap(), words.next().unwrap());
        let ask = Ask { method, path, head };
        seen.asks.lock().unwrap().push(ask.clone());
        let without_body = ask.method == "HEAD";
        match answers(&ask) {
            Reply::Whole(status, lines, body) => {
                stream
                    .write_all(whole_head(status, &lines, &body).as_bytes())
                    .await?;
                if !without_body {
                    send(&mut stream, seen, &body).await?;
                }
            }
            Reply::Endless(lines) => endless(&mut stream, seen, &lines).await?,
            Reply::Trickle(length, pause) => {
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n");
                stream.write_all(head.as_bytes()).await?;
                for _ in 0..length {
                    send(&mut stream, seen, b"x").await?;
                    tokio::time::sleep(pause).await;
                }
            }
            Reply::Stall(length) => {
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\nxxx");
                stream.write_all(head.as_bytes()).await?;
                std::future::pending::<()>().await;
            }
            Reply::Close => return Ok(()),
        }
    }
}

fn whole_head(status: &str, lines: &str, body: &[u8]) -> String {
    let (length, digest) = (body.len(), Digest::of(body));
    let digest = if status.starts_with("200") && !lines.contains("Docker-Content-Digest") {
        format!("Docker-Content-Digest: {digest}\r\n")
    } else {
        String::new()
    };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {MANIFEST_TYPE}\r\nContent-Length: {length}\r\n{lines}{digest}\r\n"
    )
}

async fn endless(stream: &mut TcpStream, seen: &Seen, lines: &str) -> std::io::Result<()> {
    let head = format!("HTTP/1.1 200 OK\r\n{lines}\r\n");
    stream.write_all(head.as_bytes()).await?;
    let block = vec![b' '; 65536];
    let chunked = lines.contains("chunked");
    loop {
        if chunked {
            stream.write_all(b"10000\r\n").await?;
        }
        send(stream, seen, &block).await?;
        if chunked {
            stream.write_all(b"\r\n").await?;
        }
    }
}

async fn send(stream: &mut TcpStream, seen: &Seen, bytes: &[u8]) -> std::io::Result<()> {
    stream.write_all(bytes).await?;
    seen.sent.fetch_add(bytes.len(), Ordering::SeqCst);
    Ok(())
}

/// The images of a registry by request: `NAME/manifests/TAG`, `blobs/DIGEST`.
#[derive(Debug, Clone, Default)]
pub(super) struct Content {
    manifests: HashMap<String, Vec<u8>>,
    blobs: HashMap<String, Vec<u8>>,
}

/// A manifest of `CONFIG` and of layers with these digests and sizes.
pub(super) fn manifest(layers: &[(String, usize)]) -> String {
    let config = Digest::of(CONFIG.as_bytes());
    let layer = |(digest, size): &(String, usize)| {
        format!(r#"{{"mediaType":"{LAYER_TYPE}","digest":"{digest}","size":{size}}}"#)
    };
    let layers: Vec<String> = layers.iter().map(layer).collect();
    format!(
        r#"{{"schemaVersion":2,"mediaType":"{MANIFEST_TYPE}","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config}","size":{}}},"layers":[{}]}}"#,
        CONFIG.len(),
        layers.join(",")
    )
}

impl Content {
    /// Adds an image of those layers under `name` (`library/one`), with any tag.
    pub(super) fn with(mut self, name: &str, layers: &[Vec<u8>]) -> Self {
        let described = layers.iter().map(|layer| {
            let digest = Digest::of(layer).to_string();
            (digest, layer.len())
        });
        let text = manifest(&described.clone().collect::<Vec<_>>());
        self.blobs
            .extend(described.map(|it| it.0).zip(layers.to_vec()));
        let config = Digest::of(CONFIG.as_bytes()).to_string();
        self.blobs.insert(config, CONFIG.into());
        self.text(name, text)
    }

    /// Adds any text in place of a manifest.
    pub(super) fn text(mut self, name: &str, text: impl Into<Vec<u8>>) -> Self {
        self.manifests.insert(name.to_owned(), text.into());
        self
    }

    /// Replaces a blob's content with bytes that do not match its digest.
    pub(super) fn falsified(mut self, digest: &str, bytes: &[u8]) -> Self {
        self.blobs.insert(digest.to_owned(), bytes.to_vec());
        self
    }

    pub(super) fn answer(&self, ask: &Ask) -> Reply {
        let path = ask.path.strip_prefix("/v2/").unwrap_or_default();
        if path.is_empty() {
            return Reply::ok("{}");
        }
        let found = if let Some((name, _)) = path.split_once("/manifests/") {
            self.manifests.get(name)
        } else {
            let digest = path.split_once("/blobs/").map(|(_, digest)| digest);
            digest.and_then(|digest| self.blobs.get(digest))
        };
        found.map_or_else(Reply::not_found, |body| Reply::ok(body.as_slice()))
    }
}

/// A tar archive with one file.
pub(super) fn tar(name: &str, content: &[u8]) -> Vec<u8> {
    let mut head = vec![0_u8; 512];
    head[..name.len()].copy_from_slice(name.as_bytes());
    head[100..108].copy_from_slice(b"0000644\0");
    let size = format!("{:011o}\0", content.len());
    head[124..136].copy_from_slice(size.as_bytes());
    head[156] = b'0';
    head[257..263].copy_from_slice(b"ustar\0");
    super::super::super::unpacked::tests::seal(&mut head);
    let mut tar = head;
    tar.extend_from_slice(content);
    tar.resize(tar.len().next_multiple_of(512) + 1024, 0);
    tar
}
