//! The shim's link: pushed reports, stop, exec, logs, values.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::too_many_lines,
    reason = "a test fails by panicking, and tells its story in one piece"
)]

mod harness;

use std::time::{Duration, Instant};

use harness::{
    DEADLINE, Job, isolated, running, sh,
    streams::{AT_GATE, SLEEPER, command, exec, gate, go, message, stop, up},
    terminated,
};
use knoc_proto::pb::{
    self, EndedBy, ExecStart, OutcomeKind, exec_input::Input, exec_output::Output,
    shim_client::ShimClient,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

#[tokio::test]
async fn reports_are_pushed_and_the_final_one_arrives() {
    let mut job = Job::new(vec![sh("a", &format!("{AT_GATE}; exit 9"))]);
    let gate = gate(&mut job);
    let mut agent = job.agent().await;
    job.start();
    let mut shim = agent.shim().await;
    let mut reports = shim
        .watch_report(pb::WatchReportRequest {})
        .await
        .unwrap()
        .into_inner();
    let mut last = pb::Report::default();
    let mut seen_running = false;
    while let Some(report) = reports.message().await.unwrap() {
        assert!(report.sequence > last.sequence);
        if running(&report) && !seen_running {
            seen_running = true;
            go(&mut shim, &gate).await;
        }
        last = report;
    }
    assert!(last.r#final && seen_running);
    assert_eq!(terminated(&last.containers[0]).exit_code, 9);
    assert_eq!(job.code().await, 64);
    assert_eq!(job.report(), last);
}

#[tokio::test]
async fn a_stop_is_graceful_and_idempotent() {
    let (mut job, _agent, mut shim) = up(sh("a", SLEEPER)).await;
    stop(&mut shim).await;
    stop(&mut shim).await;
    assert_eq!(job.code().await, 0);
    let report = job.report();
    assert_eq!(report.ended_by(), EndedBy::Stop);
    assert_eq!(report.outcome(), OutcomeKind::Succeeded);
}

#[tokio::test]
async fn exec_gives_streams_codes_and_errors() {
    let mut container = sh("a", SLEEPER);
    container.working_dir = "/usr/bin".to_owned();
    let (mut job, _agent, mut shim) = up(container).await;
    let ran = exec(
        &mut shim,
        command(&["sh", "-c", "echo out; echo err >&2; pwd; exit 7"]),
        b"",
    )
    .await;
    assert_eq!((ran.text(), ran.code()), ("out\n/usr/bin\n", 7));
    assert_eq!(ran.stderr, b"err\n");
    let ran = exec(&mut shim, command(&["sh", "-c", "kill -9 $$"]), b"").await;
    let exit = ran.exit.unwrap();
    assert_eq!((exit.code, exit.signal), (137, 9));
    let ran = exec(&mut shim, command(&["no-such-program"]), b"").await;
    let exit = ran.exit.unwrap();
    assert_eq!(exit.code, 127);
    assert!(
        exit.error.contains("executable file not found in $PATH"),
        "{}",
        exit.error
    );
    let status = shim
        .exec(tokio_stream::iter([message(Input::Start(ExecStart {
            container: "none".to_owned(),
            ..command(&["true"])
        }))]))
        .await
        .unwrap_err();
    assert_eq!(
        knoc_proto::reason::ErrorReason::of(&status),
        Some(knoc_proto::reason::ErrorReason::ContainerNotFound)
    );
    stop(&mut shim).await;
    job.code().await;
}

#[tokio::test]
async fn twenty_megabytes_go_both_ways_byte_for_byte() {
    let (mut job, _agent, mut shim) = up(sh("a", SLEEPER)).await;
    let mut state = 1_u32;
    let data: Vec<u8> = (0..20 << 20)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            u8::try_from(state >> 24).unwrap()
        })
        .collect();
    let start = ExecStart {
        stdin: true,
        ..command(&["cat"])
    };
    let began = Instant::now();
    let ran = exec(&mut shim, start, &data).await;
    eprintln!("20 MiB both ways: {:?}", began.elapsed());
    assert_eq!(ran.code(), 0);
    assert!(ran.stdout == data, "{} bytes came back", ran.stdout.len());
    // Half-close: the program sees the end and goes on.
    let start = ExecStart {
        stdin: true,
        ..command(&["sh", "-c", "wc -c; sleep 0.1; echo after"])
    };
    let ran = exec(&mut shim, start, b"12345").await;
    assert_eq!(
        ran.text().split_whitespace().collect::<Vec<_>>(),
        ["5", "after"]
    );
    stop(&mut shim).await;
    job.code().await;
}

#[tokio::test]
async fn a_terminal_has_a_size_that_changes_and_controls_jobs() {
    let (mut job, _agent, mut shim) = up(sh("a", SLEEPER)).await;
    let size = |width, height| pb::TerminalSize { width, height };
    let script = "tty; stty size; read line; stty size; echo got $line; trap 'echo int; exit 5' INT; echo ready; sleep 600; echo no";
    let start = ExecStart {
        stdin: true,
        tty: true,
        size: Some(size(101, 33)),
        ..command(&["sh", "-c", script])
    };
    let (sender, inputs) = mpsc::channel(16);
    sender.send(message(Input::Start(start))).await.unwrap();
    let mut output = shim
        .exec(ReceiverStream::new(inputs))
        .await
        .unwrap()
        .into_inner();
    let mut text = String::new();
    let (mut resized, mut interrupted, mut exit) = (false, false, None);
    while let Some(item) = output.message().await.unwrap() {
        match item.output.unwrap() {
            Output::Stdout(data) => text.push_str(std::str::from_utf8(&data).unwrap()),
            Output::Stderr(_) => panic!("a terminal has one stream"),
            Output::Exit(ended) => exit = Some(ended),
            Output::Started(_) => {}
        }
        if !resized && text.contains("33 101") {
            resized = true;
            sender
                .send(message(Input::Resize(size(77, 22))))
                .await
                .unwrap();
            sender
                .send(message(Input::Stdin("hi\r".into())))
                .await
                .unwrap();
        }
        if !interrupted && text.contains("ready") {
            interrupted = true;
            sender
                .send(message(Input::Stdin("\x03".into())))
                .await
                .unwrap();
        }
    }
    assert!(text.contains("/dev/pts/"), "{text}");
    assert!(text.contains("22 77") && text.contains("got hi"), "{text}");
    assert!(text.contains("int") && !text.contains("no\r"), "{text}");
    assert_eq!(exit.unwrap().code, 5, "{text}");
    stop(&mut shim).await;
    job.code().await;
}

#[tokio::test]
async fn a_client_that_goes_away_hangs_up_its_process() {
    let (mut job, _agent, mut shim) = up(sh("a", SLEEPER)).await;
    let (sender, inputs) = mpsc::channel(4);
    let start = command(&["sh", "-c", "echo $$ >/tmp/hung-up; exec sleep 444.5"]);
    sender.send(message(Input::Start(start))).await.unwrap();
    let mut output = shim
        .exec(ReceiverStream::new(inputs))
        .await
        .unwrap()
        .into_inner();
    assert!(matches!(
        output.message().await.unwrap().unwrap().output,
        Some(Output::Started(true))
    ));
    drop((sender, output));
    let began = Instant::now();
    while processes_with("444.5") > 0 {
        assert!(began.elapsed() < DEADLINE, "the process goes on");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    stop(&mut shim).await;
    job.code().await;
}

fn processes_with(word: &str) -> usize {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let cmdlines = entries.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    cmdlines
        .filter(|cmdline| {
            cmdline
                .split(|byte| *byte == 0)
                .any(|part| part == word.as_bytes())
        })
        .count()
}

#[tokio::test]
async fn many_execs_at_once() {
    let (mut job, _agent, shim) = up(sh("a", SLEEPER)).await;
    let began = Instant::now();
    let all = (0..100).map(|n| {
        let mut shim = shim.clone();
        async move {
            let words = [
                "sh".to_owned(),
                "-c".to_owned(),
                format!("echo {n}; exit {n}"),
            ];
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            let ran = exec(&mut shim, command(&words), b"").await;
            assert_eq!((ran.text().trim(), ran.code()), (n.to_string().as_str(), n));
        }
    });
    futures::future::join_all(all).await;
    eprintln!("100 execs: {:?}", began.elapsed());
    let mut shim = shim;
    let began = Instant::now();
    for _ in 0..10 {
        assert_eq!(exec(&mut shim, command(&["true"]), b"").await.code(), 0);
    }
    eprintln!("exec true: {:?}", began.elapsed() / 10);
    stop(&mut shim).await;
    job.code().await;
}

#[tokio::test]
async fn an_exec_is_where_the_container_is() {
    if !isolated() {
        return;
    }
    let mut container = sh("a", "trap 'exit 33' TERM; while :; do sleep 0.05; done");
    container.working_dir = "/made/here".to_owned();
    let mut job = Job::new(vec![container]);
    job.set_env("a", vec![("MARK", b"here".to_vec())]);
    let mut agent = job.agent().await;
    job.start();
    let mut shim = agent.shim().await;
    job.until(running).await;
    let script = "for n in user mnt pid ipc uts net cgroup; do \
                  test \"$(readlink /proc/1/ns/$n)\" = \"$(readlink /proc/self/ns/$n)\" || echo $n; done; \
                  test \"$(tr '\\0' '\\n' </proc/1/environ | sort)\" = \"$(env | grep -v -e ^SHLVL -e ^OLDPWD -e ^PWD= -e ^_= | sort)\" || echo env; \
                  pwd; hostname; cat /etc/hosts | tail -1; id -u; grep -E 'NoNewPrivs|CapEff' /proc/self/status; \
                  touch /root-is-writable && echo writable; ls /proc/self/fd | wc -l";
    let ran = exec(&mut shim, command(&["sh", "-c", script]), b"").await;
    let lines: Vec<&str> = ran.text().lines().collect();
    assert_eq!(lines[..2], ["/made/here", "pod"], "{ran:?}");
    assert!(lines[2].ends_with("\tpod"), "{ran:?}");
    assert!(
        ran.text().contains("NoNewPrivs:\t1") && ran.text().contains("writable"),
        "{ran:?}"
    );
    eprintln!("{}", ran.text());
    let ran = exec(&mut shim, command(&["kill", "-TERM", "1"]), b"").await;
    assert_eq!(ran.code(), 0);
    assert_eq!(job.code().await, 64);
    assert_eq!(terminated(&job.report().containers[0]).exit_code, 33);
}

/// Follows the log to its end. The program waits at its gate after its first line.
async fn followed(shim: &mut ShimClient<Channel>, gate: &str) -> Vec<u8> {
    let request = pb::ReadLogsRequest {
        follow: true,
        tail_lines: -1,
        ..Default::default()
    };
    let mut stream = shim.read_logs(request).await.unwrap().into_inner();
    let mut all = Vec::new();
    while let Some(chunk) = stream.message().await.unwrap() {
        if all.is_empty() {
            go(shim, gate).await;
        }
        all.extend_from_slice(&chunk.data);
    }
    all
}

#[tokio::test]
async fn logs_are_followed_with_little_delay_to_the_end() {
    let lines = "for n in 1 2 3 4 5; do date +%s%N 2>/dev/null; sleep 0.1; done; printf end";
    let script = format!("echo begin; {AT_GATE}; {lines}");
    let mut job = Job::new(vec![sh("a", &script)]);
    let gate = gate(&mut job);
    let mut agent = job.agent().await;
    job.start();
    let mut shim = agent.shim().await;
    job.until(running).await;
    let text = String::from_utf8(followed(&mut shim, &gate).await).unwrap();
    assert_eq!(text.lines().count(), 7, "{text}");
    assert!(text.ends_with("\nend"));
    assert_eq!(job.code().await, 0);
}

#[tokio::test]
async fn a_hundred_megabytes_of_log_stay_whole() {
    let line = "0123456789abcdefghijklmnopqrstuvwxyz 0123456789abcdefghijklmnopqrstuvwxyz 0123456789 abcdefgh";
    let script = format!("echo '{line}'; {AT_GATE}; yes '{line}' | head -c 104857600");
    let mut job = Job::new(vec![sh("a", &script)]);
    let gate = gate(&mut job);
    let mut agent = job.agent().await;
    let began = Instant::now();
    job.start();
    let mut shim = agent.shim().await;
    job.until(running).await;
    let text = followed(&mut shim, &gate).await;
    eprintln!("100 MiB of log written, followed: {:?}", began.elapsed());
    assert_eq!(text.len(), line.len() + 1 + 104_857_600);
    assert!(text.chunks(line.len() + 1).all(|chunk| {
        line.as_bytes()
            .starts_with(chunk.strip_suffix(b"\n").unwrap_or(chunk))
    }));
    job.code().await;
}

#[tokio::test]
async fn expired_values_are_waited_for_and_new_ones_are_seen() {
    let mut job = Job::new(vec![sh("a", "echo $MARK; sleep 60")]);
    job.values.not_after = 1;
    let mut agent = job.agent().await;
    job.start();
    let mut shim = agent.shim().await;
    let waits = |report: &pb::Report| match &report.containers[0].state {
        Some(pb::container_status::State::Waiting(waiting)) => {
            waiting.reason == "CreateContainerConfigError"
        }
        _ => false,
    };
    job.until(|report| !report.containers.is_empty() && waits(report))
        .await;
    job.values.revision = 2;
    job.values.not_after = 0;
    job.set_env("a", vec![("MARK", b"fresh".to_vec())]);
    shim.update_values(job.values.clone()).await.unwrap();
    job.until(running).await;
    let began = Instant::now();
    while job.log("a", 0) != "fresh\n" {
        assert!(began.elapsed() < DEADLINE);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let stop = pb::StopRequest {
        grace_seconds: 0,
        reason: String::new(),
    };
    shim.stop(stop).await.unwrap();
    assert_eq!(job.code().await, 64);
}

#[tokio::test]
async fn volumes_are_mounted_and_refreshed() {
    if !isolated() {
        return;
    }
    let volume = |name: &str, source| pb::Volume {
        name: name.to_owned(),
        source: Some(source),
    };
    let mount = |volume: &str, path: &str| pb::Mount {
        volume: volume.to_owned(),
        path: path.to_owned(),
        ..Default::default()
    };
    let mut a = sh(
        "a",
        "echo shared >/tmp/shared/x; trap 'exit 0' TERM; while :; do sleep 0.05; done",
    );
    a.mounts = vec![
        mount("cm", "/etc/my,conf:ig"),
        mount("empty", "/tmp/shared"),
        mount("mem", "/mem"),
    ];
    let mut b = sh(
        "b",
        "while ! cat /in/x; do sleep 0.05; done; trap 'exit 0' TERM; while :; do sleep 0.05; done",
    );
    b.mounts = vec![mount("empty", "/in")];
    let mut job = Job::new(vec![a, b]);
    job.spec().volumes = vec![
        volume("cm", pb::volume::Source::Files(pb::FilesVolume {})),
        volume(
            "empty",
            pb::volume::Source::EmptyDir(pb::EmptyDir::default()),
        ),
        volume(
            "mem",
            pb::volume::Source::EmptyDir(pb::EmptyDir {
                memory: true,
                ..Default::default()
            }),
        ),
    ];
    let files = |data: &'static str| {
        let file = pb::VolumeFile {
            path: "d/key".to_owned(),
            data: data.into(),
            mode: 0o440,
        };
        vec![pb::VolumeFiles {
            volume: "cm".to_owned(),
            files: vec![file],
        }]
    };
    job.values.files = files("one");
    let mut agent = job.agent().await;
    job.start();
    let mut shim = agent.shim().await;
    job.until(running).await;
    let cat = || {
        command(&[
            "sh",
            "-c",
            "cat '/etc/my,conf:ig/d/key'; ls -l '/etc/my,conf:ig/..data/d/key' | cut -c1-10; touch '/etc/my,conf:ig/x' 2>/dev/null || echo ro; stat -f -c %T /mem",
        ])
    };
    let ran = exec(&mut shim, cat(), b"").await;
    assert_eq!(ran.text(), "one-r--r-----\nro\ntmpfs\n", "{ran:?}");
    job.values.revision = 2;
    job.values.files = files("two");
    shim.update_values(job.values.clone()).await.unwrap();
    let ran = exec(&mut shim, cat(), b"").await;
    assert!(ran.text().starts_with("two-r--"), "{ran:?}");
    stop(&mut shim).await;
    assert_eq!(job.code().await, 0);
    assert!(job.log("b", 0).ends_with("shared\n"));
}

#[tokio::test]
async fn a_pod_in_the_nodes_network_has_no_address_of_its_own_and_starts_without() {
    use knoc_proto::{pb::mesh_control::Control, reason::ErrorReason};

    let mut job = Job::new(vec![sh("a", SLEEPER)]);
    "10.200.0.0/16".clone_into(&mut job.spec().pod_range);
    job.spec().set_network(pb::NetworkMode::Host);
    let mut agent = job.agent().await;
    job.start();
    let mut shim = agent.shim().await;
    job.until(running).await;
    let address = pb::MeshAddress {
        address: "10.200.0.3".to_owned(),
        ..pb::MeshAddress::default()
    };
    let first = pb::MeshControl {
        control: Some(Control::Address(address)),
    };
    let refused = shim.join_mesh(tokio_stream::iter([first])).await;
    let refused = refused.unwrap_err();
    assert_eq!(ErrorReason::of(&refused), Some(ErrorReason::InvalidRequest));
    let first = pb::MeshBytes {
        content: Some(pb::mesh_bytes::Content::Carried(pb::MeshCarried::default())),
    };
    let refused = shim.mesh_stream(tokio_stream::iter([first])).await;
    let refused = refused.unwrap_err();
    assert_eq!(ErrorReason::of(&refused), Some(ErrorReason::NotFound));
    stop(&mut shim).await;
    job.code().await;
    let network = job.report().network.unwrap();
    assert!(network.address.is_empty(), "{network:?}");
}
