//! Attach and exec at the shim, over its link.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod harness;

use std::time::{Duration, Instant};

use harness::{
    DEADLINE, Job, running, sh,
    streams::{command, message, stop, up},
};
use knoc_proto::{
    pb::{
        self, AttachStart, ExecInput, exec_input::Input, exec_output::Output,
        shim_client::ShimClient,
    },
    reason::ErrorReason,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Channel};

fn both() -> AttachStart {
    AttachStart {
        stdout: true,
        stderr: true,
        ..Default::default()
    }
}

fn with_stdin() -> AttachStart {
    AttachStart {
        stdin: true,
        ..both()
    }
}

/// One attached client.
struct Attached {
    input: mpsc::Sender<ExecInput>,
    output: Streaming<pb::ExecOutput>,
    text: String,
    errors: String,
    exit: Option<pb::ExecExit>,
}

impl Attached {
    async fn try_new(shim: &ShimClient<Channel>, start: AttachStart) -> Result<Self, Status> {
        let (input, inputs) = mpsc::channel(4);
        input.send(message(Input::Attach(start))).await.unwrap();
        let answer = shim.clone().attach(ReceiverStream::new(inputs)).await?;
        let mut attached = Self {
            input,
            output: answer.into_inner(),
            text: String::new(),
            errors: String::new(),
            exit: None,
        };
        let first = attached.output.message().await?.unwrap();
        assert_eq!(first.output, Some(Output::Started(true)));
        Ok(attached)
    }

    async fn new(shim: &ShimClient<Channel>, start: AttachStart) -> Self {
        Self::try_new(shim, start).await.unwrap()
    }

    async fn say(&self, text: &str) {
        let data = text.to_owned().into();
        self.input.send(message(Input::Stdin(data))).await.unwrap();
    }

    async fn close(&self) {
        self.input
            .send(message(Input::StdinClosed(true)))
            .await
            .unwrap();
    }

    /// Takes output until `enough`, or the end.
    async fn until(&mut self, enough: impl Fn(&Self) -> bool) {
        let taking = async {
            while !enough(self) {
                let Some(item) = self.output.message().await.unwrap() else {
                    return;
                };
                match item.output.unwrap() {
                    Output::Stdout(data) => self.text.push_str(std::str::from_utf8(&data).unwrap()),
                    Output::Stderr(data) => {
                        self.errors.push_str(std::str::from_utf8(&data).unwrap());
                    }
                    Output::Exit(exit) => self.exit = Some(exit),
                    Output::Started(_) => panic!("started twice"),
                }
            }
        };
        tokio::time::timeout(DEADLINE, taking)
            .await
            .expect("nothing more comes");
        assert!(
            enough(self),
            "ended with {:?} {:?} {:?}",
            self.text,
            self.errors,
            self.exit
        );
    }

    async fn exit(&mut self) -> pb::ExecExit {
        self.until(|all| all.exit.is_some()).await;
        assert!(self.output.message().await.unwrap().is_none());
        self.exit.clone().unwrap()
    }
}

async fn refused(shim: &ShimClient<Channel>, start: AttachStart) -> Status {
    match Attached::try_new(shim, start).await {
        Ok(_) => panic!("it is attached"),
        Err(status) => status,
    }
}

#[tokio::test]
async fn attached_clients_see_output_from_now_on_and_the_exit() {
    let script = "echo up; read line; echo out $line; echo err >&2; exit 7";
    let mut container = sh("a", script);
    container.stdin = true;
    let (mut job, _agent, shim) = up(container).await;
    let mut first = Attached::new(&shim, with_stdin()).await;
    let mut second = Attached::new(&shim, both()).await;
    let mut errors = Attached::new(
        &shim,
        AttachStart {
            stdout: false,
            ..both()
        },
    )
    .await;
    first.say("hello\n").await;
    for client in [&mut first, &mut second] {
        assert_eq!(client.exit().await.code, 7);
        assert_eq!(
            (client.text.as_str(), client.errors.as_str()),
            ("out hello\n", "err\n")
        );
    }
    assert_eq!(errors.exit().await.code, 7);
    assert_eq!(
        (errors.text.as_str(), errors.errors.as_str()),
        ("", "err\n")
    );
    assert_eq!(job.code().await, 64);
    assert_eq!(job.log("a", 0), "up\nout hello\nerr\n");
}

#[tokio::test]
async fn what_the_container_has_not_is_refused_by_name() {
    let (mut job, _agent, mut shim) = up(sh("a", harness::streams::SLEEPER)).await;
    let status = refused(&shim, with_stdin()).await;
    assert!(
        status.message().contains("stdin: true is not set"),
        "{status}"
    );
    assert_eq!(ErrorReason::of(&status), Some(ErrorReason::InvalidRequest));
    let status = refused(
        &shim,
        AttachStart {
            tty: true,
            ..both()
        },
    )
    .await;
    assert!(status.message().contains("has no terminal"), "{status}");
    let status = refused(
        &shim,
        AttachStart {
            container: "none".to_owned(),
            ..both()
        },
    )
    .await;
    assert_eq!(
        ErrorReason::of(&status),
        Some(ErrorReason::ContainerNotFound)
    );
    stop(&mut shim).await;
    job.code().await;
}

#[tokio::test]
async fn stdin_once_ends_with_its_first_client() {
    let mut container = sh("a", "echo up; cat; echo end; sleep 0.1; exit 3");
    container.stdin = true;
    container.stdin_once = true;
    let (mut job, _agent, shim) = up(container).await;
    let mut watching = Attached::new(&shim, both()).await;
    let first = Attached::new(&shim, with_stdin()).await;
    let status = refused(&shim, with_stdin()).await;
    assert!(
        status.message().contains("for one client only (stdinOnce"),
        "{status}"
    );
    first.say("all of it\n").await;
    watching.until(|all| all.text == "all of it\n").await;
    // Going away is an end as well.
    drop(first);
    assert_eq!(watching.exit().await.code, 3);
    assert_eq!(watching.text, "all of it\nend\n");
    job.code().await;
}

#[tokio::test]
async fn an_end_of_input_leaves_a_shared_stdin_open_and_detaches() {
    let mut container = sh(
        "a",
        "echo up; while read line; do echo got $line; done; exit 4",
    );
    container.stdin = true;
    let (mut job, _agent, mut shim) = up(container).await;
    let mut first = Attached::new(&shim, with_stdin()).await;
    first.say("one\n").await;
    first.close().await;
    let exit = first.exit().await;
    assert_eq!(
        (exit, first.text.as_str()),
        (pb::ExecExit::default(), "got one\n")
    );
    let mut second = Attached::new(&shim, with_stdin()).await;
    second.say("two\n").await;
    second.until(|all| all.text == "got two\n").await;
    stop(&mut shim).await;
    assert_eq!(second.exit().await.signal, 15);
    job.code().await;
}

#[tokio::test]
async fn a_terminal_is_attached_to_with_its_size() {
    let mut container = sh(
        "a",
        "echo up; read line; stty size; echo got $line; read line; stty size; exit 2",
    );
    container.stdin = true;
    container.tty = true;
    let mut job = Job::new(vec![container]);
    let mut agent = job.agent().await;
    job.start();
    let shim = agent.shim().await;
    job.until(running).await;
    let size = |width, height| Some(pb::TerminalSize { width, height });
    let start = AttachStart {
        tty: true,
        size: size(101, 33),
        ..with_stdin()
    };
    let mut client = Attached::new(&shim, start).await;
    let status = refused(&shim, both()).await;
    assert!(status.message().contains("has a terminal"), "{status}");
    client.say("hi\r").await;
    client
        .until(|all| all.text.contains("33 101") && all.text.contains("got hi"))
        .await;
    let smaller = Input::Resize(size(77, 22).unwrap());
    client.input.send(message(smaller)).await.unwrap();
    client.say("\r").await;
    assert_eq!(client.exit().await.code, 2);
    assert!(
        client.text.contains("22 77") && client.errors.is_empty(),
        "{}",
        client.text
    );
    job.code().await;
}

#[tokio::test]
async fn a_client_that_does_not_read_is_detached_and_the_program_goes_on() {
    // Far more than all buffers on the way hold.
    let mut container = sh(
        "a",
        "echo up; read go; head -c 67108864 /dev/zero; echo; echo done; read end; exit 6",
    );
    container.stdin = true;
    let (mut job, _agent, shim) = up(container).await;
    let mut slow = Attached::new(&shim, both()).await;
    let other = Attached::new(&shim, with_stdin()).await;
    other.say("go\n").await;
    let began = Instant::now();
    // Nobody reads, yet the program comes to its end of output.
    while !job.log("a", 0).ends_with("done\n") {
        assert!(began.elapsed() < DEADLINE, "the program is held up");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let exit = slow.exit().await;
    assert!(exit.error.contains("too slowly"), "{exit:?}");
    assert!(slow.text.len() < 67_108_864);
    let mut third = Attached::new(&shim, with_stdin()).await;
    third.say("end\n").await;
    assert_eq!(third.exit().await.code, 6);
    job.code().await;
}

#[tokio::test]
async fn a_client_that_is_gone_means_hup_then_term_then_kill() {
    let (mut job, _agent, mut shim) = up(sh("a", harness::streams::SLEEPER)).await;
    let told = job.dir.path().join("told");
    // It hears of both and ends of neither.
    let script = format!(
        "t={}; trap 'echo hup >>$t' HUP; trap 'echo term >>$t' TERM; echo ready >>$t; while :; do sleep 0.05; done # 555.1",
        told.display()
    );
    let (input, inputs) = mpsc::channel(4);
    let start = command(&["sh", "-c", &script]);
    input.send(message(Input::Start(start))).await.unwrap();
    let output = shim.exec(ReceiverStream::new(inputs)).await.unwrap();
    let text = || std::fs::read_to_string(&told).unwrap_or_default();
    until("ready", || text() == "ready\n").await;
    drop((input, output));
    until("killed", || {
        children_of(job.pid())
            .iter()
            .all(|line| !line.contains("555.1"))
    })
    .await;
    assert_eq!(text(), "ready\nhup\nterm\n");
    let zombies = || {
        children_of(job.pid())
            .iter()
            .filter(|line| line.starts_with('Z'))
            .count()
    };
    until("reaped", || zombies() == 0).await;
    stop(&mut shim).await;
    job.code().await;
}

/// Waits until it is so.
async fn until(what: &str, so: impl Fn() -> bool) {
    let began = Instant::now();
    while !so() {
        assert!(began.elapsed() < DEADLINE, "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// State and command line of all processes below `pid`.
fn children_of(pid: i32) -> Vec<String> {
    let mut found = Vec::new();
    let mut parents = vec![pid.to_string()];
    let stats: Vec<(String, String, String)> = std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| {
            let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
            let mut fields = stat.rsplit_once(") ")?.1.split(' ');
            let (state, parent) = (fields.next()?.to_owned(), fields.next()?.to_owned());
            Some((entry.file_name().into_string().ok()?, parent, state))
        })
        .collect();
    while let Some(parent) = parents.pop() {
        for (pid, _, state) in stats.iter().filter(|(_, above, _)| *above == parent) {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            found.push(format!("{state} {}", String::from_utf8_lossy(&line)));
            parents.push(pid.clone());
        }
    }
    found
}

/// Whether a process whose command line contains `text` runs.
fn runs(text: &str) -> bool {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = processes.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    lines
        .into_iter()
        .any(|line| String::from_utf8_lossy(&line).contains(text))
}

#[tokio::test]
async fn an_exec_does_not_outlive_a_shim_that_is_killed() {
    let (mut job, _agent, mut shim) = up(sh("a", harness::streams::SLEEPER)).await;
    let mark = job.dir.path().join("exec").display().to_string();
    let (input, inputs) = mpsc::channel(4);
    let start = command(&["sh", "-c", "echo up; while :; do sleep 600; done", &mark]);
    input.send(message(Input::Start(start))).await.unwrap();
    let answer = shim.exec(ReceiverStream::new(inputs)).await.unwrap();
    let mut output = answer.into_inner();
    loop {
        let item = output.message().await.unwrap().expect("it goes on");
        if matches!(item.output, Some(Output::Stdout(_))) {
            break;
        }
    }
    assert!(runs(&mark));
    job.signal(nix::sys::signal::Signal::SIGKILL);
    until("the exec has ended", || !runs(&mark)).await;
    job.wait().await;
}

#[tokio::test]
async fn an_exec_ends_with_its_container() {
    let mut first = sh("a", "echo up; read line; exit 3");
    first.stdin = true;
    let mut job = Job::new(vec![first, sh("b", harness::streams::SLEEPER)]);
    let mut agent = job.agent().await;
    job.start();
    let mut shim = agent.shim().await;
    job.until(running).await;
    let attached = Attached::new(
        &shim,
        AttachStart {
            container: "a".to_owned(),
            ..with_stdin()
        },
    )
    .await;
    let (input, inputs) = mpsc::channel(4);
    let mut start = command(&["sleep", "600"]);
    start.container = "a".to_owned();
    input.send(message(Input::Start(start))).await.unwrap();
    let mut output = shim
        .exec(ReceiverStream::new(inputs))
        .await
        .unwrap()
        .into_inner();
    let begun = output.message().await.unwrap().and_then(|item| item.output);
    assert!(matches!(begun, Some(Output::Started(_))), "{begun:?}");
    attached.say("end\n").await;
    let mut last = None;
    while let Some(item) = output.message().await.unwrap() {
        last = item.output;
    }
    match last {
        Some(Output::Exit(exit)) => assert_eq!(exit.code, 137),
        other => panic!("{other:?}"),
    }
    stop(&mut shim).await;
    job.code().await;
}

#[tokio::test]
async fn two_hundred_execs_at_once() {
    let (mut job, _agent, mut shim) = up(sh("a", harness::streams::SLEEPER)).await;
    let gate = tokio::sync::Barrier::new(200);
    let all = (0..200).map(|n: i32| {
        let (mut shim, gate) = (shim.clone(), &gate);
        async move {
            let (input, inputs) = mpsc::channel(4);
            let script = format!("cat; exit {}", n % 100);
            let start = pb::ExecStart {
                stdin: true,
                ..command(&["sh", "-c", &script])
            };
            input.send(message(Input::Start(start))).await.unwrap();
            let mut output = shim
                .exec(ReceiverStream::new(inputs))
                .await
                .unwrap()
                .into_inner();
            assert_eq!(
                output.message().await.unwrap().unwrap().output,
                Some(Output::Started(true))
            );
            // All run at the same time.
            gate.wait().await;
            let text = n.to_string();
            input
                .send(message(Input::Stdin(text.clone().into())))
                .await
                .unwrap();
            input.send(message(Input::StdinClosed(true))).await.unwrap();
            let mut got = Vec::new();
            loop {
                match output.message().await.unwrap().unwrap().output.unwrap() {
                    Output::Stdout(data) => got.extend_from_slice(&data),
                    Output::Exit(exit) => {
                        break assert_eq!((got, exit.code), (text.into_bytes(), n % 100));
                    }
                    other @ (Output::Stderr(_) | Output::Started(_)) => panic!("{other:?}"),
                }
            }
        }
    });
    tokio::time::timeout(2 * DEADLINE, futures::future::join_all(all))
        .await
        .unwrap();
    stop(&mut shim).await;
    job.code().await;
}

/// The target of the release build is 5 MiB with its code; what is measured here is what this process alone uses.
#[tokio::test]
async fn a_shim_at_rest_is_small() {
    let (mut job, _agent, mut shim) = up(sh("a", harness::streams::SLEEPER)).await;
    let _reports = shim.watch_report(pb::WatchReportRequest {}).await.unwrap();
    assert_eq!(
        harness::streams::exec(&mut shim, command(&["true"]), b"")
            .await
            .code(),
        0
    );
    let status = std::fs::read_to_string(format!("/proc/{}/status", job.pid())).unwrap();
    let kib = |name: &str| {
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap();
        line.split_whitespace()
            .next()
            .unwrap()
            .parse::<u32>()
            .unwrap()
    };
    eprintln!(
        "RSS {} KiB, of that private {} KiB",
        kib("VmRSS:"),
        kib("RssAnon:")
    );
    eprintln!("{}", smaps(job.pid()));
    assert!(kib("RssAnon:") < 4096, "{status}");
    stop(&mut shim).await;
    job.code().await;
}

/// Resident memory by what it maps, the largest first.
fn smaps(pid: i32) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let mut sums = std::collections::BTreeMap::<String, u64>::new();
    let mut name = String::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        match fields.as_slice() {
            ["Rss:", kib, _] => {
                *sums.entry(name.clone()).or_default() += kib.parse::<u64>().unwrap();
            }
            [range, modes, _, _, _, rest @ ..] if range.contains('-') => {
                name = format!("{modes} {}", rest.join(" "));
            }
            _ => {}
        }
    }
    let mut sums: Vec<_> = sums.into_iter().collect();
    sums.sort_by_key(|(_, kib)| std::cmp::Reverse(*kib));
    let lines = sums.iter().take(12);
    let lines: Vec<_> = lines
        .map(|(name, kib)| format!("{kib:>7} KiB {name}"))
        .collect();
    lines.join("\n")
}
