//! Level 2: attach, port-forward, exec and cp through the real agent and shim, by gRPC and by `knocctl`.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use futures::{StreamExt as _, stream::BoxStream};
use knoc_proto::{
    pb::{
        self, ExecInput, PortForwardInput, agent_client::AgentClient, exec_input::Input,
        exec_output::Output, port_forward_input, port_forward_output,
    },
    reason::ErrorReason,
};
use knoc_tests::{
    Background,
    ports::free_port,
    site::{Options, Pod, Site, container, processes_naming},
    wait_for,
};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, transport::Channel};

const SOON: Duration = Duration::from_mins(2);

/// How long a broken stream may take to fail on a busy machine: less than the shortest time in which a silent link is found.
const AT_ONCE: Duration = knoc_link::KEEPALIVE_TIMEOUT.saturating_sub(Duration::from_secs(1));

/// An echo server that answers after the end of each connection's input, and echoes standard input line by line.
const SERVER: &str = r#"
import socket, sys, threading
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
def serve(peer):
    with peer:
        total = b""
        while data := peer.recv(65536): total += data
        peer.sendall(total + b"-end")
def accept():
    while True: threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
threading.Thread(target=accept, daemon=True).start()
print("up", flush=True)
for line in sys.stdin:
    if line == "end\n": sys.exit(5)
    print("got", line, end="", flush=True)
"#;

fn server(uid: &str) -> anyhow::Result<(Pod, u16)> {
    let port = free_port()?;
    let mut main = container("main", &["python3", "-c", SERVER, &port.to_string()], &[]);
    main.stdin = true;
    Ok((Pod::new(uid, vec![main]), port))
}

async fn up(pod: &Pod, client: &AgentClient<Channel>) -> anyhow::Result<()> {
    pod.ensure(client).await?;
    pod.running(client, SOON).await?;
    wait_for("the server listens", SOON, async || {
        match pod.log(client, "main").await {
            Ok(log) if log.starts_with(b"up\n") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await
}

/// An open stream and the sender that keeps it open.
struct Open {
    name: &'static str,
    answers: BoxStream<'static, Result<(), Status>>,
    _input: Option<mpsc::Sender<ExecInput>>,
    _data: Option<mpsc::Sender<PortForwardInput>>,
}

fn first(input: Input) -> ExecInput {
    ExecInput { input: Some(input) }
}

/// Opens all four kinds of streams, without traffic.
#[expect(clippy::too_many_lines, reason = "four openings, one after the other")]
async fn all_open(
    pod: &Pod,
    client: &AgentClient<Channel>,
    port: u16,
) -> anyhow::Result<Vec<Open>> {
    let uid = pod.uid().to_owned();
    let mut client = client.clone();
    let (exec, inputs) = mpsc::channel(4);
    let start = pb::ExecStart {
        uid: uid.clone(),
        command: ["sleep", "600"].map(str::to_owned).to_vec(),
        stdin: true,
        stdout: true,
        ..pb::ExecStart::default()
    };
    exec.send(first(Input::Start(start))).await?;
    let mut executing = client.exec(ReceiverStream::new(inputs)).await?.into_inner();
    executing.message().await?.context("exec said nothing")?;
    let (attach, inputs) = mpsc::channel(4);
    let start = pb::AttachStart {
        uid: uid.clone(),
        stdin: true,
        stdout: true,
        ..pb::AttachStart::default()
    };
    attach.send(first(Input::Attach(start))).await?;
    let mut attached = client
        .attach(ReceiverStream::new(inputs))
        .await?
        .into_inner();
    attached.message().await?.context("attach said nothing")?;
    let (forward, inputs) = mpsc::channel(4);
    let start = pb::PortForwardStart {
        uid: uid.clone(),
        port: port.into(),
    };
    let input = Some(port_forward_input::Input::Start(start));
    forward.send(PortForwardInput { input }).await?;
    let mut forwarded = client
        .port_forward(ReceiverStream::new(inputs))
        .await?
        .into_inner();
    forwarded
        .message()
        .await?
        .context("port-forward said nothing")?;
    let request = pb::ReadLogsRequest {
        uid,
        container: "main".to_owned(),
        follow: true,
        tail_lines: 1,
        ..pb::ReadLogsRequest::default()
    };
    let mut logs = client.read_logs(request).await?.into_inner();
    logs.message().await?.context("the log said nothing")?;
    let open = |name, answers, input, data| Open {
        name,
        answers,
        _input: input,
        _data: data,
    };
    Ok(vec![
        open(
            "exec",
            executing.map(|item| item.map(drop)).boxed(),
            Some(exec),
            None,
        ),
        open(
            "attach",
            attached.map(|item| item.map(drop)).boxed(),
            Some(attach),
            None,
        ),
        open(
            "port-forward",
            forwarded.map(|item| item.map(drop)).boxed(),
            None,
            Some(forward),
        ),
        open("logs", logs.map(|item| item.map(drop)).boxed(), None, None),
    ])
}

impl Open {
    /// The error that ends the stream.
    async fn failure(&mut self, began: Instant) -> anyhow::Result<Status> {
        let left = AT_ONCE.saturating_sub(began.elapsed());
        let ended = async {
            loop {
                match self.answers.next().await {
                    Some(Ok(())) => {}
                    Some(Err(status)) => return Ok(status),
                    None => anyhow::bail!("{} ended as if all were well", self.name),
                }
            }
        };
        let ended = tokio::time::timeout(left, ended).await;
        ended.with_context(|| format!("{} hangs", self.name))?
    }
}

#[tokio::test]
async fn a_killed_agent_fails_all_its_streams_at_once() -> anyhow::Result<()> {
    let (site, agent, client) = Site::start(Options::default()).await?;
    let (pod, port) = server("lost-agent")?;
    up(&pod, &client).await?;
    let mut streams = all_open(&pod, &client, port).await?;
    let began = Instant::now();
    agent.kill().await?;
    for stream in &mut streams {
        stream.failure(began).await?;
    }
    // The job continues, and a new agent reaches it.
    let _agent = site.agent(&[]).await?;
    pod.running(&client, SOON).await?;
    let (output, code) = pod.exec(&client, "main", &["echo", "again"], b"").await?;
    ensure!((output.as_slice(), code) == (b"again\n".as_slice(), 0));
    Ok(())
}

/// Sends SIGKILL to those processes of the pod's job that `chosen` selects.
fn kill(site: &Site, uid: &str, chosen: impl Fn(&str) -> bool) -> anyhow::Result<()> {
    let all = processes_naming(&site.jobdir(uid));
    let mut killed = 0;
    for (pid, _) in all.iter().filter(|(_, line)| chosen(line)) {
        kill_process(Pid::from_raw(*pid).context("a pid")?, Signal::KILL)?;
        killed += 1;
    }
    ensure!(killed > 0, "none of {all:?}");
    Ok(())
}

#[tokio::test]
async fn a_killed_shim_or_job_fails_its_streams_at_once() -> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
    for (uid, shim_only) in [("lost-shim", true), ("lost-job", false)] {
        let (pod, port) = server(uid)?;
        up(&pod, &client).await?;
        let mut streams = all_open(&pod, &client, port).await?;
        let began = Instant::now();
        kill(&site, uid, |line| !shim_only || line.contains(" shim "))?;
        // The log is not lost with the shim: it continues from the files and ends with the pod.
        for stream in streams.iter_mut().filter(|stream| stream.name != "logs") {
            let status = stream.failure(began).await?;
            ensure!(
                ErrorReason::of(&status) == Some(ErrorReason::ShimUnreachable),
                "{}: {status}",
                stream.name
            );
        }
        let outcome = pod.finished(&client, SOON).await?;
        ensure!(outcome.kind() == pb::OutcomeKind::Failed, "{outcome:?}");
    }
    Ok(())
}

#[tokio::test]
async fn two_hundred_execs_at_once_through_the_agent() -> anyhow::Result<()> {
    let (_site, _agent, client) = Site::start(Options::default()).await?;
    let (pod, _) = server("many")?;
    up(&pod, &client).await?;
    let all = (0..200).map(async |n| {
        let input = format!("input {n}");
        let script = format!("cat; exit {}", n % 100);
        let (output, code) = pod
            .exec(&client, "main", &["sh", "-c", &script], input.as_bytes())
            .await?;
        ensure!(
            output == input.as_bytes() && code == n % 100,
            "{n}: {code} {output:?}"
        );
        anyhow::Ok(())
    });
    futures::future::try_join_all(all).await?;
    Ok(())
}

#[tokio::test]
async fn capabilities_are_listed_and_invalid_requests_are_rejected() -> anyhow::Result<()> {
    let (_site, _agent, mut client) = Site::start(Options::default()).await?;
    let info = client
        .get_info(pb::GetInfoRequest::default())
        .await?
        .into_inner();
    for name in ["attach", "port-forward"] {
        ensure!(
            info.capabilities
                .iter()
                .any(|capability| capability == name),
            "{info:?}"
        );
    }
    let start = pb::PortForwardStart {
        uid: "none".to_owned(),
        port: 80,
    };
    let input = Some(port_forward_input::Input::Start(start));
    let status = client
        .port_forward(tokio_stream::iter([PortForwardInput { input }]))
        .await
        .unwrap_err();
    ensure!(
        ErrorReason::of(&status) == Some(ErrorReason::NotFound),
        "{status}"
    );
    let status = client
        .attach(tokio_stream::iter([first(Input::StdinClosed(true))]))
        .await
        .unwrap_err();
    ensure!(
        ErrorReason::of(&status) == Some(ErrorReason::InvalidRequest),
        "{status}"
    );
    Ok(())
}

/// What the program has answered to a client that has shown this.
fn got(shown: &str) -> Vec<&str> {
    let lines = shown.lines();
    lines.filter(|line| line.starts_with("got ")).collect()
}

#[tokio::test]
async fn knocctl_attaches_and_returns_the_exit_code() -> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let (pod, _) = server("attached")?;
    up(&pod, &client).await?;
    // After the end of its input a client stays until the program has been silent for a second, and a busy machine may need longer for
    // an answer: so the input ends after that.
    let attach = ["attach", "-i", "attached"];
    let mut first = Background::start_piped(site.knocctl(attach)?)?;
    first.say("one\n").await?;
    first.expect("got one\n").await?;
    first.end_input();
    let code = first.ends(SOON).await?;
    let shown = first.shown();
    ensure!(code == 0 && got(&shown) == ["got one"], "{code}: {shown}");
    let mut last = Background::start_piped(site.knocctl(attach)?)?;
    last.say("two\nend\n").await?;
    let code = last.ends(SOON).await?;
    let shown = last.shown();
    ensure!(code == 5 && got(&shown) == ["got two"], "{code}: {shown}");
    let wrong = site
        .knocctl(["attach", "attached"])?
        .stdin("")
        .output()
        .await?;
    ensure!(wrong.code == 1, "{wrong}");
    Ok(())
}

#[tokio::test]
async fn knocctl_forwards_ports_until_the_pod_ends() -> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let (pod, port) = server("forwarded")?;
    up(&pod, &client).await?;
    let local = free_port()?;
    let log = site.path("forward.log");
    let ports = format!("{local}:{port}");
    let mut forwarding = site
        .knocctl(["port-forward", "forwarded", &ports])?
        .spawn(&log)?;
    wait_for("it listens", SOON, async || {
        TcpStream::connect(("127.0.0.1", local)).await.map(drop)
    })
    .await?;
    let data = vec![7; 5 << 20];
    let mut stream = TcpStream::connect(("127.0.0.1", local)).await?;
    let (mut reader, mut writer) = stream.split();
    let send = async {
        writer.write_all(&data).await?;
        writer.shutdown().await
    };
    let mut answer = Vec::new();
    let answered = reader.read_to_end(&mut answer);
    tokio::try_join!(send, answered)?;
    ensure!(
        answer.strip_suffix(b"-end") == Some(&data),
        "{} bytes",
        answer.len()
    );
    pod.remove(&client).await?;
    let status = tokio::time::timeout(SOON, forwarding.wait()).await??;
    let said = std::fs::read_to_string(&log)?;
    ensure!(
        status.code() == Some(1) && said.contains("has ended"),
        "{status} {said}"
    );
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "a file of the test's own")]
fn write(path: impl AsRef<Path>, bytes: impl AsRef<[u8]>) -> std::io::Result<()> {
    std::fs::write(path, bytes)
}

fn tree(folder: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    std::fs::create_dir_all(folder.join("deep/er"))?;
    std::fs::create_dir(folder.join("empty"))?;
    write(folder.join("a file"), "text")?;
    write(folder.join("deep/er/\u{e9}"), [0, 255, 10])?;
    write(folder.join("run"), "#!/bin/sh\n")?;
    std::fs::set_permissions(folder.join("run"), std::fs::Permissions::from_mode(0o755))?;
    symlink("a file", folder.join("link"))?;
    Ok(())
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn remote(path: &Path) -> String {
    format!("copied:{}", path.display())
}

#[tokio::test]
async fn knocctl_copies_files_and_folders_both_ways() -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let (site, _agent, client) = Site::start(Options::default()).await?;
    let (pod, _) = server("copied")?;
    up(&pod, &client).await?;
    let (here, there) = (site.path("here"), site.path("there"));
    std::fs::create_dir(&there)?;
    tree(&here)?;
    // Copies a folder into a folder, then back under another name.
    site.knocctl(["cp", &text(&here), &remote(&there)])?
        .ok()
        .await?;
    let copied = there.join("here");
    ensure!(std::fs::read(copied.join("deep/er/\u{e9}"))? == [0, 255, 10]);
    ensure!(copied.join("empty").is_dir() && copied.join("link").is_symlink());
    let back = site.path("back");
    let said = site
        .knocctl(["cp", &remote(&copied), &text(&back)])?
        .ok()
        .await?;
    ensure!(std::fs::read(back.join("a file"))? == b"text" && back.join("empty").is_dir());
    ensure!(std::fs::metadata(back.join("run"))?.permissions().mode() & 0o111 == 0o111);
    ensure!(
        !back.join("link").exists() && said.stderr.contains("link"),
        "{said}"
    );
    // Copies one large file to a new name, then back into a folder.
    let bytes: Vec<u8> = (0..(64_u32 << 20) / 4)
        .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    write(site.path("big"), &bytes)?;
    let new = there.join("new");
    site.knocctl(["cp", &text(&site.path("big")), &remote(&new)])?
        .deadline(2 * SOON)
        .ok()
        .await?;
    ensure!(std::fs::read(&new)? == bytes);
    site.knocctl(["cp", &remote(&new), &text(&back)])?
        .deadline(2 * SOON)
        .ok()
        .await?;
    ensure!(std::fs::read(back.join("new"))? == bytes);
    a_copy_that_cannot_be(&site, &here, &there, &back).await
}

/// A missing path is named in the error, and nothing hangs.
async fn a_copy_that_cannot_be(
    site: &Site,
    here: &Path,
    there: &Path,
    back: &Path,
) -> anyhow::Result<()> {
    let missing = site
        .knocctl(["cp", &remote(&there.join("nix")), &text(back)])?
        .output()
        .await?;
    ensure!(
        missing.code == 1 && missing.stderr.contains("No such file"),
        "{missing}"
    );
    let missing = site
        .knocctl(["cp", &text(&here.join("nix")), &remote(there)])?
        .output()
        .await?;
    ensure!(
        missing.code == 1 && missing.stderr.contains("nix"),
        "{missing}"
    );
    let nowhere = site
        .knocctl(["cp", &text(here), "copied:/no/such/folder/x"])?
        .output()
        .await?;
    ensure!(
        nowhere.code == 1 && nowhere.stderr.contains("tar"),
        "{nowhere}"
    );
    Ok(())
}

#[tokio::test]
async fn the_last_output_of_an_attached_program_arrives() -> anyhow::Result<()> {
    let (_site, _agent, mut client) = Site::start(Options::default()).await?;
    let (pod, port) = server("words")?;
    up(&pod, &client).await?;
    let (input, inputs) = mpsc::channel(4);
    let start = pb::AttachStart {
        uid: "words".to_owned(),
        stdin: true,
        stdout: true,
        ..pb::AttachStart::default()
    };
    input.send(first(Input::Attach(start))).await?;
    let mut output = client
        .attach(ReceiverStream::new(inputs))
        .await?
        .into_inner();
    input
        .send(first(Input::Stdin("last\nend\n".into())))
        .await?;
    let mut seen = Vec::new();
    while let Some(item) = output.message().await? {
        seen.extend(item.output);
    }
    let exit = pb::ExecExit {
        code: 5,
        ..pb::ExecExit::default()
    };
    ensure!(
        seen == [
            Output::Started(true),
            Output::Stdout("got last\n".into()),
            Output::Exit(exit)
        ],
        "{seen:?}"
    );
    let start = pb::PortForwardStart {
        uid: "words".to_owned(),
        port: port.into(),
    };
    let message = PortForwardInput {
        input: Some(port_forward_input::Input::Start(start)),
    };
    let status = client.port_forward(tokio_stream::iter([message])).await;
    let connected = status.is_ok();
    ensure!(
        !connected,
        "a pod that has ended is forwarded to: {:?}",
        port_forward_output::Output::Connected(true)
    );
    Ok(())
}
