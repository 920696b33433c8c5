//! Level 2: the credentials of a pod's pull secrets reach the registry that its image names, and nothing else.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, ensure};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use knoc_tests::{
    site::{Kubelet, Options, Site, processes_naming},
    wait_for,
};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use super::state::holding;

const SOON: Duration = Duration::from_mins(2);
const WRONG: &str = "wr0ng-that-nobody-is-to-see";
const RIGHT: &str = "r1ght-that-nobody-is-to-see";

/// A registry that has no images, and says so only to ann.
struct Registry {
    address: String,
    /// How many requests had the right password.
    admitted: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

impl Registry {
    async fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        let admitted = Arc::new(AtomicUsize::new(0));
        let (mut tasks, count) = (JoinSet::new(), Arc::clone(&admitted));
        tasks.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // A client that goes away ends its own exchange only.
                drop(answer(stream, &count).await);
            }
        });
        Ok(Self {
            address,
            admitted,
            _tasks: tasks,
        })
    }

    fn admitted(&self) -> usize {
        self.admitted.load(Ordering::SeqCst)
    }
}

async fn answer(mut stream: TcpStream, admitted: &AtomicUsize) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut buffer = [0; 4096];
        let read = stream.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        head.extend_from_slice(&buffer[..read]);
    }
    let head = String::from_utf8_lossy(&head);
    let wanted = BASE64_STANDARD.encode(format!("ann:{RIGHT}"));
    let (status, lines, message) = if head.contains(&format!("Basic {wanted}")) {
        admitted.fetch_add(1, Ordering::SeqCst);
        ("404 Not Found", "", "manifest unknown")
    } else {
        let demand = "WWW-Authenticate: Basic realm=\"r\"\r\n";
        ("401 Unauthorized", demand, "authentication required")
    };
    let body = format!(r#"{{"errors":[{{"message":"{message}"}}]}}"#);
    let body = if head.starts_with("HEAD") { "" } else { &body };
    let length = body.len();
    let text = format!("HTTP/1.1 {status}\r\n{lines}Content-Length: {length}\r\n\r\n{body}");
    stream.write_all(text.as_bytes()).await
}

/// A site whose container runtime exists, and is never needed.
fn site(registry: &Registry) -> anyhow::Result<Site> {
    let site = Site::new(Options {
        tables: format!(
            "[[registry]]\nprefix = \"{}\"\ninsecure = true\n",
            registry.address
        ),
        ..Options::default()
    })?;
    let program = site.path("apptainer");
    site.put("apptainer", "#!/bin/sh\necho 'apptainer version 1.4.5'\n")?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o700))?;
    let config = fs::read_to_string(site.path("agent.toml"))?;
    let config = config.replace("runtime = \"process\"", "runtime = \"apptainer\"");
    let tools = format!("[tools]\napptainer = \"{}\"\n\n[listen]", program.display());
    site.put("agent.toml", &config.replace("[listen]", &tools))?;
    Ok(site)
}

fn put_secret(kubelet: &Kubelet, registry: &Registry, password: &str) -> anyhow::Result<()> {
    let auth = BASE64_STANDARD.encode(format!("ann:{password}"));
    let content = json!({"auths": {registry.address.as_str(): {"auth": auth}}}).to_string();
    let secret = json!({
        "metadata": {"name": "login"}, "type": "kubernetes.io/dockerconfigjson",
        "data": {".dockerconfigjson": BASE64_STANDARD.encode(content)},
    });
    kubelet.api.create("v1", "secrets", "default", secret)?;
    Ok(())
}

/// Waits until the container waits for its image with that message.
async fn waits_with(kubelet: &Kubelet, message: &str) -> anyhow::Result<()> {
    wait_for(message, SOON, async || {
        let pod = kubelet.api.get("v1", "pods", "default", "private");
        let pod = pod.map_err(|error| error.to_string())?;
        let waiting = &pod["status"]["containerStatuses"][0]["state"]["waiting"];
        let reason = waiting["reason"].as_str().unwrap_or_default();
        let text = waiting["message"].as_str().unwrap_or_default();
        let of_image = ["ErrImagePull", "ImagePullBackOff"].contains(&reason);
        if of_image && text.contains(message) {
            Ok(())
        } else {
            Err(pod["status"].to_string())
        }
    })
    .await
}

/// Checks that no file, log or command line has a password.
fn nobody_sees(site: &Site) -> anyhow::Result<()> {
    for password in [WRONG, RIGHT] {
        let encoded = BASE64_STANDARD.encode(format!("ann:{password}"));
        for text in [password.to_owned(), encoded] {
            let files = holding(&site.path(""), &text)?;
            ensure!(files.is_empty(), "{files:?} have it");
            let shown = processes_naming(Path::new(&text));
            ensure!(shown.is_empty(), "{shown:?}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_pull_secret_is_in_no_log_and_on_no_disk() -> anyhow::Result<()> {
    let registry = Registry::start().await?;
    let site = site(&registry)?;
    let agent = site.agent(&[("KNOC_LOG", "debug")]).await?;
    let kubelet = Kubelet::prepare(&site).await?;
    let _process = kubelet.start(&site, &[("KNOC_LOG_LEVEL", "debug")]).await?;
    put_secret(&kubelet, &registry, WRONG)?;
    kubelet.create_pod(
        "private",
        json!({
            "containers": [{"name": "main", "image": format!("{}/team/app:1", registry.address)}],
            "imagePullSecrets": [{"name": "login"}],
        }),
    )?;
    let failed = async |message: &str| {
        waits_with(&kubelet, message)
            .await
            .with_context(|| site.log())
    };
    failed("authentication required").await?;
    ensure!(registry.admitted() == 0);
    nobody_sees(&site)?;
    // The Secret is read again, and other credentials end the pause.
    kubelet
        .api
        .delete("secrets", "default", "login", &json!({}))?;
    put_secret(&kubelet, &registry, RIGHT)?;
    failed("manifest unknown").await?;
    nobody_sees(&site)?;
    // A new process has no credentials until the kubelet has sent them again.
    agent.kill().await?;
    let before = registry.admitted();
    let _agent = site.agent(&[("KNOC_LOG", "debug")]).await?;
    wait_for("the registry gets them again", SOON, async || {
        let now = registry.admitted();
        if now > before { Ok(()) } else { Err(now) }
    })
    .await
    .with_context(|| site.log())?;
    nobody_sees(&site)?;
    let log = fs::read_to_string(site.path("agent.log"))?;
    ensure!(log.contains("DEBUG"), "little is logged: {}", site.log());
    // The search does find passwords that are there.
    site.put("told", RIGHT)?;
    ensure!(nobody_sees(&site).is_err(), "the search is blind");
    Ok(())
}
