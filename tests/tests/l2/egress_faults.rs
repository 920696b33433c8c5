//! Level 2: faults around the connections of pods to the cluster: endpoints, kubelets and agents that go away while connections are open, a
//! Service that changes, and a pod that opens more than it may.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use jiff::{SignedDuration, Timestamp};
use knoc_tests::{
    endpoint,
    site::{Kubelet, NODE, Site},
    wait_for,
};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};
use serde_json::json;
use tokio::{io::AsyncReadExt as _, net::TcpStream, task::JoinSet};

use crate::egress::{log, logged, refusals, service, start};

/// How long a silent link may go unnoticed: the interval of its keepalive, the time for the answer, and some more for a busy machine.
const KEEPALIVE: Duration = Duration::from_secs(150);

/// Sends on and on to an endpoint that has closed its connection.
const SENDER: &str = r#"
import os, socket, time
target = (os.environ["KUBERNETES_SERVICE_HOST"], int(os.environ["KUBERNETES_SERVICE_PORT"]))
try:
    with socket.create_connection(target) as peer:
        peer.sendall(b"x")
        while peer.recv(10): pass
        print("closed", flush=True)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            peer.sendall(b"y" * 1000)
            time.sleep(0.05)
        print("it was never told", flush=True)
except OSError:
    print("broken", flush=True)
print("end", flush=True)
"#;

#[tokio::test]
async fn a_program_that_sends_to_an_endpoint_that_is_gone_is_told() -> anyhow::Result<()> {
    // It reads everything, so this is a regular end.
    let reads_one = |mut peer: TcpStream| async move { peer.read_exact(&mut [0]).await.map(drop) };
    let (port, _tasks) = endpoint::serve(reads_one).await?;
    let (site, kubelet, _running) = start("", port, &[]).await?;
    let main = json!({"name": "main", "image": "none", "command": ["python3", "-c", SENDER]});
    let uid = kubelet.create_pod("client", json!({"containers": [main]}))?;
    let log = log(&site, &uid).await?;
    ensure!(log.starts_with("closed\nbroken\n"), "{log}");
    Ok(())
}

/// How long after it leads a kubelet takes until it serves a connection. What takes longer on a machine that is busy with other tests is
/// only told.
const SERVES: SignedDuration = SignedDuration::from_secs(2);

/// Holds so many connections until they end, then opens new ones until one is served, and says when that was, in milliseconds.
const HOLDER: &str = r#"
import os, socket, sys, time
target = (os.environ["KUBERNETES_SERVICE_HOST"], int(os.environ["KUBERNETES_SERVICE_PORT"]))
held = [socket.create_connection(target) for _ in range(int(sys.argv[1]))]
for peer in held: peer.sendall(b"x")
for peer in held: peer.recv(1)
print("open", flush=True)
ended = 0
for peer in held:
    try:
        if not peer.recv(1): ended += 1
    except OSError:
        ended += 1
print("ended", ended, flush=True)
for _ in range(2000):
    try:
        with socket.create_connection(target) as peer:
            peer.sendall(b"x")
            if peer.recv(1):
                print("again", int(time.time() * 1000), flush=True)
                break
    except OSError:
        pass
    time.sleep(0.1)
print("end", flush=True)
"#;

/// The endpoint sends each byte back and keeps its connections.
async fn keeper() -> anyhow::Result<(u16, JoinSet<()>)> {
    endpoint::serve(|mut peer: TcpStream| async move {
        let (mut reader, mut writer) = peer.split();
        tokio::io::copy(&mut reader, &mut writer).await.map(drop)
    })
    .await
}

/// When the kubelet that leads took the Lease.
fn leads_since(kubelet: &Kubelet) -> anyhow::Result<Timestamp> {
    let name = format!("knoc-kubelet-{NODE}");
    let lease = kubelet
        .api
        .get("coordination.k8s.io/v1", "leases", "default", &name)?;
    let at = lease["spec"]["acquireTime"]
        .as_str()
        .context("nobody has led")?;
    Ok(at.parse::<Timestamp>()?)
}

#[tokio::test]
async fn a_hundred_connections_end_with_their_kubelet_and_the_next_one_serves_new_ones()
-> anyhow::Result<()> {
    let (port, _keeper) = keeper().await?;
    let (site, kubelet, [_agent, process]) = start("", port, &[]).await?;
    let main =
        json!({"name": "main", "image": "none", "command": ["python3", "-c", HOLDER, "100"]});
    let uid = kubelet.create_pod("client", json!({"containers": [main]}))?;
    logged(&site, &uid, "open").await?;
    let before = leads_since(&kubelet)?;
    process.kill().await?;
    logged(&site, &uid, "ended 100").await?;
    let _process = kubelet.start(&site, &[]).await?;
    let log = log(&site, &uid).await?;
    let mut lines = log.lines();
    let again = lines.find_map(|line| line.strip_prefix("again "));
    let again = again.with_context(|| log.clone())?.trim().parse::<i64>()?;
    let leads = leads_since(&kubelet)?;
    ensure!(leads > before, "the second kubelet has not led");
    let took = Timestamp::from_millisecond(again)?.duration_since(leads);
    if took > SERVES {
        eprintln!("a slow machine: served {took:?} after it led, instead of {SERVES:?}");
    }
    Ok(())
}

/// Holds a connection until there is a file, uses it again, and opens another one.
const KEPT: &str = r#"
import os, socket, sys, time
target = (os.environ["KUBERNETES_SERVICE_HOST"], int(os.environ["KUBERNETES_SERVICE_PORT"]))
with socket.create_connection(target) as held:
    held.sendall(b"1")
    held.recv(1)
    print("open", flush=True)
    while not os.path.exists(sys.argv[1]): time.sleep(0.05)
    held.sendall(b"2")
    print("kept", held.recv(1), flush=True)
    for _ in range(2000):
        try:
            with socket.create_connection(target) as peer:
                peer.sendall(b"3")
                if peer.recv(1):
                    print("new", flush=True)
                    break
        except OSError:
            pass
        time.sleep(0.1)
print("end", flush=True)
"#;

#[tokio::test]
async fn a_service_that_changes_its_port_keeps_its_connections_and_takes_new_ones()
-> anyhow::Result<()> {
    let (port, _keeper) = keeper().await?;
    let (site, kubelet, _running) = start("", port, &[]).await?;
    let changed = site.path("changed");
    let argv = json!(["python3", "-c", KEPT, changed.display().to_string()]);
    let main = json!({"name": "main", "image": "none", "command": argv});
    let uid = kubelet.create_pod("client", json!({"containers": [main]}))?;
    logged(&site, &uid, "open").await?;
    kubelet
        .api
        .delete("services", "default", "kubernetes", &json!({}))?;
    kubelet
        .api
        .create("v1", "services", "default", service(6443))?;
    site.put("changed", "")?;
    let log = log(&site, &uid).await?;
    ensure!(log.contains("kept b'2'") && log.contains("new"), "{log}");
    Ok(())
}

/// Connects more often than a pod may, and says how many connections were reset.
const MANY: &str = r#"
import os, resource, socket
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
target = (os.environ["KUBERNETES_SERVICE_HOST"], int(os.environ["KUBERNETES_SERVICE_PORT"]))
held, reset = [], 0
for number in range(10000):
    try:
        peer = socket.create_connection(target)
        peer.sendall(b"x")
        if not peer.recv(1): raise OSError("ended")
        held.append(peer)
    except OSError:
        reset += 1
        if reset == 20: break
print("held", len(held), flush=True)
print("end", flush=True)
"#;

#[tokio::test]
async fn a_pod_that_opens_ten_thousand_connections_is_bounded_and_told_by_name()
-> anyhow::Result<()> {
    // This process has the other ends.
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised)?;
    let (port, _keeper) = keeper().await?;
    let (site, kubelet, _running) = start("", port, &[]).await?;
    let main = json!({"name": "main", "image": "none", "command": ["python3", "-c", MANY]});
    let uid = kubelet.create_pod("client", json!({"containers": [main]}))?;
    let log = log(&site, &uid).await?;
    ensure!(log.starts_with("held 768\n"), "{log}");
    let refused = refusals(&kubelet).await?;
    ensure!(
        refused[0].contains("768 open connections to the cluster, which is the limit"),
        "{refused:?}"
    );
    Ok(())
}

/// Holds a connection and says when it ends.
const SILENT: &str = r#"
import os, socket
target = (os.environ["KUBERNETES_SERVICE_HOST"], int(os.environ["KUBERNETES_SERVICE_PORT"]))
with socket.create_connection(target) as held:
    held.sendall(b"x")
    held.recv(1)
    print("open", flush=True)
    try:
        print("ended", held.recv(1), flush=True)
    except OSError:
        print("reset", flush=True)
print("end", flush=True)
"#;

/// A process that is stopped is a link on which nothing comes any more, although nobody has closed it.
#[tokio::test]
async fn a_link_that_is_cut_resets_the_connections_within_keepalive() -> anyhow::Result<()> {
    let (port, _keeper) = keeper().await?;
    let (site, kubelet, [agent, _process]) = start("", port, &[]).await?;
    let main = json!({"name": "main", "image": "none", "command": ["python3", "-c", SILENT]});
    let uid = kubelet.create_pod("client", json!({"containers": [main]}))?;
    logged(&site, &uid, "open").await?;
    let pid = agent.pid().and_then(|pid| i32::try_from(pid).ok());
    let pid = pid.and_then(Pid::from_raw).context("the agent has ended")?;
    kill_process(pid, Signal::STOP)?;
    // Nobody serves logs meanwhile, so the file is looked at.
    let ended = wait_for("a reset", KEEPALIVE, async || {
        let found = container_log(&site, &uid).map_err(|error| format!("{error:#}"))?;
        if found.contains("reset") {
            Ok(())
        } else {
            Err(found)
        }
    })
    .await;
    kill_process(pid, Signal::CONT)?;
    ended
}

/// What the log files of the pod have by now.
fn container_log(site: &Site, uid: &str) -> anyhow::Result<String> {
    let mut all = String::new();
    let mut folders = vec![site.jobdir(uid).join("logs")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else {
                all += &std::fs::read_to_string(entry.path())?;
            }
        }
    }
    Ok(all)
}
