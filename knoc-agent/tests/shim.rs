//! The shim as a process: containers, restarts, stops, reports.

mod harness;

use std::time::{Duration, Instant};

use harness::{Job, isolated, running, sh, terminated};
use knoc_contract::jobdir::atomic;
use knoc_proto::pb::{self, EndedBy, OutcomeKind};
use nix::sys::signal::Signal;

#[tokio::test]
async fn two_containers_and_an_init_container() {
    let mut job = Job::new(vec![
        sh("a", "echo out; echo err >&2; exit 0"),
        sh("b", "test -n \"$MARK\" && exit 3"),
    ]);
    job.spec().init_containers = vec![sh("first", "echo prepared")];
    job.set_env("b", vec![("MARK", b"x".to_vec())]);
    job.start();
    assert_eq!(job.code().await, 64);
    let report = job.report();
    assert!(report.r#final);
    assert_eq!(report.outcome(), OutcomeKind::Failed);
    assert_eq!(report.ended_by(), EndedBy::Themselves);
    assert_eq!(terminated(&report.init_containers[0]).reason, "Completed");
    assert_eq!(terminated(&report.containers[0]).exit_code, 0);
    let failed = terminated(&report.containers[1]);
    assert_eq!((failed.exit_code, failed.reason.as_str()), (3, "Error"));
    assert!(failed.finished_at >= failed.started_at && failed.started_at > 0);
    assert_eq!(job.log("first", 0), "prepared\n");
    let mut lines: Vec<String> = job.log("a", 0).lines().map(str::to_owned).collect();
    lines.sort();
    assert_eq!(lines, ["err", "out"]);
    assert!(
        job.dir.values().unwrap().is_none(),
        "the values stay on disk"
    );
}

#[tokio::test]
async fn a_pod_that_succeeds() {
    let mut job = Job::new(vec![sh("a", "true")]);
    job.start();
    assert_eq!(job.code().await, 0);
    assert_eq!(job.report().outcome(), OutcomeKind::Succeeded);
}

#[tokio::test]
async fn a_failed_init_container_keeps_the_others_from_starting() {
    let mut job = Job::new(vec![sh("a", "true")]);
    job.spec().init_containers = vec![sh("first", "exit 5"), sh("second", "true")];
    job.start();
    assert_eq!(job.code().await, 64);
    let report = job.report();
    assert_eq!(terminated(&report.init_containers[0]).exit_code, 5);
    assert!(!job.log_path("a", 0).exists() && !job.log_path("second", 0).exists());
}

/// Programs print NUL-separated words; a log cannot carry NULs through `String`, so they come as octal.
#[tokio::test]
async fn argv_and_environment_are_exact_and_nothing_leaks() {
    let nasty = [
        "",
        " ",
        "a b",
        "$HOME `id` $(id)",
        "'\"\\",
        "--",
        "-n",
        "ünï\u{1F600}",
        "l\nf",
        "*",
        "$(MARK)",
        "$$(MARK)",
    ];
    let mut container = sh("a", "");
    let print = "tr '\\0' '\\n' </proc/self/environ | wc -l; for word; do printf '<%s>' \"$word\"; done; env";
    container.command = ["sh", "-c", print, "name"].map(str::to_owned).to_vec();
    container.args = nasty.map(str::to_owned).to_vec();
    let mut job = Job::new(vec![container]);
    job.set_env(
        "a",
        vec![
            ("MARK", b"m".to_vec()),
            ("WITH.DOT", b"1".to_vec()),
            ("QUOTES", b"'\"`$(id)\\ ; \t|&".to_vec()),
            ("EMPTY", Vec::new()),
            ("BYTES", b"\xc3\xa4=:,".to_vec()),
        ],
    );
    job.start();
    assert_eq!(job.code().await, 0, "{}", job.state_words());
    let log = job.log("a", 0);
    let words: String = nasty
        .iter()
        .map(|word| match *word {
            "$(MARK)" => "<m>".to_owned(),
            "$$(MARK)" => "<$(MARK)>".to_owned(),
            word => format!("<{word}>"),
        })
        .collect();
    assert!(log.contains(&words), "{log}");
    for line in [
        "MARK=m",
        "QUOTES='\"`$(id)\\ ; \t|&",
        "EMPTY=",
        "BYTES=ä=:,",
        "HOSTNAME=pod",
    ] {
        assert!(log.lines().any(|l| l.ends_with(line)), "{line} in {log}");
    }
    for leak in ["LEAKED", "KNOC_JOB_ID", "APPTAINER", "SINGULARITY", "SLURM"] {
        assert!(!log.contains(leak), "{leak} in {log}");
    }
}

#[tokio::test]
async fn a_program_that_is_not_there() {
    let mut container = sh("a", "");
    container.command = vec!["no-such-program".to_owned()];
    let mut job = Job::new(vec![container]);
    job.start();
    assert_eq!(job.code().await, 64);
    let ended = terminated(&job.report().containers[0]);
    assert_eq!(
        (ended.exit_code, ended.reason.as_str()),
        (128, "StartError")
    );
    let words = "exec: \"no-such-program\": executable file not found in $PATH";
    assert!(ended.message.contains(words), "{}", ended.message);
}

#[tokio::test]
async fn restarts_back_off_and_the_logs_of_the_last_two_stay() {
    let mut container = sh("a", "");
    let script =
        "n=$(cat $COUNT 2>/dev/null || echo 0); echo $((n+1)) > $COUNT; echo run $n; test $n -ge 3";
    container.command[2] = script.to_owned();
    let mut job = Job::new(vec![container]);
    job.spec().restart_policy = pb::RestartPolicy::OnFailure.into();
    let count = if isolated() {
        job.spec().volumes = vec![empty_dir("v")];
        job.spec().containers[0].mounts = vec![pb::Mount {
            volume: "v".to_owned(),
            path: "/count".to_owned(),
            ..Default::default()
        }];
        "/count/n".to_owned()
    } else {
        job.dir.path().join("count").display().to_string()
    };
    job.set_env("a", vec![("COUNT", count.into_bytes())]);
    job.start();
    assert_eq!(job.code().await, 0, "{}", job.state_words());
    let status = &job.report().containers[0];
    assert_eq!(status.restart_count, 3);
    assert_eq!(terminated(status).exit_code, 0);
    assert_eq!(status.last_termination.as_ref().unwrap().exit_code, 1);
    for attempt in 0..4 {
        let kept = attempt >= 2;
        assert_eq!(job.log_path("a", attempt).exists(), kept, "{attempt}");
        if kept {
            assert_eq!(job.log("a", attempt), format!("run {attempt}\n"));
        }
    }
}

/// A volume of the pod's own on the node's disk.
fn empty_dir(name: &str) -> pb::Volume {
    pb::Volume {
        name: name.to_owned(),
        source: Some(pb::volume::Source::EmptyDir(pb::EmptyDir::default())),
    }
}

/// Whether container `a` cannot be configured, and `b` has ended.
fn first_lacks_a_file(report: &pb::Report) -> bool {
    use pb::container_status::State;
    let [a, b] = &report.containers[..] else {
        return false;
    };
    let Some(State::Waiting(waiting)) = &a.state else {
        return false;
    };
    waiting.reason == "CreateContainerConfigError"
        && waiting.message.contains("not found in file")
        && matches!(b.state, Some(State::Terminated(_)))
}

#[tokio::test]
async fn a_variable_from_a_missing_file_is_waited_for_whatever_the_restart_policy() {
    let scratch = tempfile::tempdir().unwrap();
    let mut job = Job::new(vec![sh("a", "echo $WORD"), sh("b", "echo other")]);
    let settings = job.file.settings.as_mut().unwrap();
    settings.scratch = scratch.path().display().to_string();
    job.spec().volumes = vec![empty_dir("v")];
    let key = pb::FileKey {
        volume: "v".to_owned(),
        path: "variables".to_owned(),
        key: "WORD".to_owned(),
        optional: false,
    };
    job.values.env = vec![pb::ContainerEnv {
        container: "a".to_owned(),
        vars: vec![pb::EnvVar {
            name: "WORD".to_owned(),
            value: Some(pb::env_var::Value::File(key)),
        }],
    }];
    job.start();
    let report = job.until(first_lacks_a_file).await;
    let waiting = &report.containers[0];
    assert_eq!((waiting.restart_count, &*waiting.container_id), (0, ""));
    let mut own = std::fs::read_dir(scratch.path()).unwrap();
    let volume = own.next().unwrap().unwrap().path().join("v0");
    atomic::write(&volume.join("variables"), b"WORD='late'\n", 0o600).unwrap();
    assert_eq!(job.code().await, 0, "{}", job.state_words());
    let status = &job.report().containers[0];
    assert_eq!(status.restart_count, 0);
    assert_eq!(status.last_termination, None);
    assert_eq!(job.log("a", 0), "late\n");
}

#[tokio::test]
async fn a_container_that_cannot_be_configured_holds_up_no_stop() {
    let mut job = Job::new(vec![sh("a", "echo $WORD")]);
    job.spec().volumes = vec![empty_dir("v")];
    let mut mount = pb::Mount {
        volume: "v".to_owned(),
        path: "/v".to_owned(),
        ..Default::default()
    };
    "$(NONE)".clone_into(&mut mount.sub_path_expr);
    job.spec().containers[0].mounts = vec![mount];
    job.start();
    job.until(|report| {
        let state = &report.containers[0].state;
        matches!(state, Some(pb::container_status::State::Waiting(waiting))
            if waiting.reason == "CreateContainerConfigError" && waiting.message.contains("NONE"))
    })
    .await;
    job.signal(Signal::SIGUSR1);
    assert_eq!(job.code().await, 64, "{}", job.state_words());
    let report = job.report();
    assert_eq!(report.ended_by(), EndedBy::Stop);
    let state = &report.containers[0].state;
    assert!(
        matches!(state, Some(pb::container_status::State::Waiting(_))),
        "{state:?}"
    );
}

#[tokio::test]
async fn a_signal_from_outside_ends_the_containers_gracefully() {
    let mut job = Job::new(vec![sh(
        "a",
        "trap 'echo term; exit 42' TERM; echo up; while :; do sleep 0.05; done",
    )]);
    job.start();
    job.until(running).await;
    wait_for_log(&job, "a", "up\n").await;
    job.signal(Signal::SIGTERM);
    assert_eq!(job.code().await, 64);
    let report = job.report();
    assert_eq!(report.ended_by(), EndedBy::Signal);
    assert_eq!(terminated(&report.containers[0]).exit_code, 42);
    assert_eq!(job.log("a", 0), "up\nterm\n");
}

#[expect(clippy::disallowed_methods, reason = "a file of the test's own")]
/// Slurm kills a job soon after TERM; its warning ahead of the time limit and the agent's own signal leave all of it.
#[tokio::test]
async fn only_a_signal_from_outside_cuts_the_grace() {
    for (signal, seconds, by, reason, code) in [
        (Signal::SIGUSR2, 3, EndedBy::TimeLimit, "SlurmTimeLimit", 42),
        (Signal::SIGUSR1, 3, EndedBy::Stop, "", 42),
        (Signal::SIGTERM, 25, EndedBy::Signal, "", 137),
    ] {
        let trap = format!("trap 'sleep {seconds}; echo term; exit 42' TERM");
        let script = format!("{trap}; echo up; while :; do sleep 0.05; done");
        let mut job = Job::new(vec![sh("a", &script)]);
        let conf = job.dir.path().join("slurm.conf");
        std::fs::write(&conf, "KillWait=2\n").unwrap();
        let conf = conf.to_str().unwrap().to_owned();
        job.env = vec![
            ("SLURM_JOB_ID".to_owned(), "4711".to_owned()),
            ("SLURM_CONF".to_owned(), conf),
        ];
        job.start();
        wait_for_log(&job, "a", "up\n").await;
        job.signal(signal);
        assert_eq!(job.code().await, 64, "{signal}");
        let report = job.report();
        assert_eq!(report.ended_by(), by);
        assert_eq!(report.reason, reason);
        assert_eq!(
            terminated(&report.containers[0]).exit_code,
            code,
            "{signal}"
        );
    }
}

/// A deletion has a grace period of its own, and an agent without a link leaves it in the job directory.
#[tokio::test]
async fn the_agents_signal_has_the_grace_of_the_deletion() {
    for (asked, code) in [(Some(60), 42), (None, 137)] {
        let script = "trap 'sleep 6; exit 42' TERM; echo up; while :; do sleep 0.05; done";
        let mut job = Job::new(vec![sh("a", script)]);
        job.spec().termination_grace_period_seconds = 1;
        job.start();
        wait_for_log(&job, "a", "up\n").await;
        if let Some(seconds) = asked {
            job.dir.write_stop_grace(seconds).unwrap();
        }
        job.signal(Signal::SIGUSR1);
        assert_eq!(job.code().await, 64, "{asked:?}");
        let ended = terminated(&job.report().containers[0]).exit_code;
        assert_eq!(ended, code, "{asked:?}");
    }
}

#[tokio::test]
async fn values_that_expire_while_a_pod_runs_do_not_keep_it_from_restarting() {
    let mut job = Job::new(vec![sh("a", "sleep 0.5; exit 1")]);
    job.spec().restart_policy = pb::RestartPolicy::OnFailure.into();
    // Late enough for the first start on a loaded machine.
    let expiry = jiff::Timestamp::now().as_second() + 15;
    job.values.not_after = expiry;
    job.start();
    let expired = |_: &pb::Report| jiff::Timestamp::now().as_second() > expiry;
    let before = job.until(expired).await.containers[0].restart_count;
    job.until(|report| report.containers[0].restart_count > before + 1)
        .await;
    let report = job.report();
    assert!(!report.waits_for_values, "{report:?}");
}

#[tokio::test]
async fn values_that_have_expired_before_the_first_start_are_waited_for_within_bounds() {
    let mut job = Job::new(vec![sh("a", "true")]);
    job.values.not_after = 1;
    if let Some(settings) = &mut job.file.settings {
        settings.values_wait_ms = 300;
    }
    job.start();
    assert_eq!(job.code().await, 64);
    let report = job.report();
    assert_eq!(report.ended_by(), EndedBy::NoValues);
    assert_eq!(report.reason, "ValuesExpired");
    assert!(
        report.message.contains("create the pod again"),
        "{report:?}"
    );
}

#[tokio::test]
async fn the_deadline_kills_what_ignores_term() {
    let mut job = Job::new(vec![sh("a", "trap '' TERM; while :; do sleep 0.05; done")]);
    job.spec().active_deadline_seconds = 10;
    job.spec().termination_grace_period_seconds = 1;
    let began = Instant::now();
    job.start();
    assert_eq!(job.code().await, 64);
    assert!(began.elapsed() >= Duration::from_secs(11));
    let report = job.report();
    assert_eq!(report.ended_by(), EndedBy::Deadline);
    assert_eq!(report.reason, "DeadlineExceeded");
    let told = report.notes.iter();
    let told = told.filter(|note| note.reason == "DeadlineExceeded" && !note.warning);
    assert_eq!(told.count(), 1, "{:?}", report.notes);
    let ended = terminated(&report.containers[0]);
    assert_eq!((ended.exit_code, ended.signal), (137, 9));
}

/// A container that waits for its back-off, one that waits for its turn, and one whose init container runs.
#[tokio::test]
async fn the_deadline_ends_a_pod_in_whatever_it_is() {
    for init in ["true", "sleep 600"] {
        let mut job = Job::new(vec![sh("a", "exit 1"), sh("b", "sleep 600")]);
        job.spec().init_containers = vec![sh("first", init)];
        job.spec().restart_policy = pb::RestartPolicy::Always.into();
        job.spec().active_deadline_seconds = 3;
        job.spec().termination_grace_period_seconds = 1;
        if let Some(settings) = &mut job.file.settings {
            settings.backoff_initial_ms = 600_000;
        }
        job.start();
        assert_eq!(job.code().await, 64, "{init}");
        let report = job.report();
        assert_eq!(report.ended_by(), EndedBy::Deadline, "{init}");
        assert_eq!(report.reason, "DeadlineExceeded", "{init}");
    }
}

#[tokio::test]
async fn what_a_program_leaves_behind_dies_with_it() {
    let mut job = Job::new(vec![sh(
        "a",
        "sleep 333.25 & (setsid sleep 333.25 &) ; exit 7",
    )]);
    job.start();
    assert_eq!(job.code().await, 64);
    let left = std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter(|entry| {
            let cmdline = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            cmdline.windows(6).any(|window| window == b"333.25")
                && std::fs::read_link(entry.path().join("exe"))
                    .is_ok_and(|exe| !exe.to_string_lossy().contains("agent"))
        });
    assert_eq!(left.count(), 0);
}

#[tokio::test]
async fn a_second_job_is_surplus_and_a_requeued_one_goes_on_counting_where_its_pod_may() {
    let mut job = Job::new(vec![sh("a", "exit 1")]);
    job.start();
    assert_eq!(job.code().await, 64);
    job.env = vec![("KNOC_JOB_ID".to_owned(), "4712".to_owned())];
    job.spawn();
    assert_eq!(job.code().await, 66);
    job.env = vec![("KNOC_RESTART_COUNT".to_owned(), "1".to_owned())];
    job.dir.write_values(&job.values).unwrap();
    let before = job.report().sequence;
    job.spawn();
    assert_eq!(job.code().await, 66);
    assert_eq!(job.report().sequence, before);
    let mut again = job.file.clone();
    let spec = again.spec.as_mut().unwrap();
    let asked = ("knoc.io/requeue".to_owned(), "true".to_owned());
    spec.annotations.extend([asked]);
    spec.restart_policy = pb::RestartPolicy::OnFailure.into();
    spec.containers = vec![sh("a", "exit 0")];
    job.dir.write_spec(&again).unwrap();
    job.spawn();
    assert_eq!(job.code().await, 0);
    let report = job.report();
    assert!(report.sequence > before && report.restart == 1);
    assert_eq!(report.containers[0].restart_count, 1);
}

#[tokio::test]
async fn the_last_words_of_a_failed_container() {
    let mut container = sh("a", "echo one; echo last >&2; exit 1");
    container.termination_message_fallback_to_logs = true;
    let mut job = Job::new(vec![container]);
    job.start();
    job.code().await;
    assert!(
        terminated(&job.report().containers[0])
            .message
            .contains("last\n")
    );
    if isolated() {
        let mut default = sh("a", "printf hello >/dev/termination-log");
        let mut custom = sh("b", "printf there >/tmp/x/msg; echo y >/elsewhere");
        custom.termination_message_path = "/tmp/x/msg".to_owned();
        let mut bound = sh("c", "printf bound >/srv/result");
        bound.termination_message_path = "/srv/result".to_owned();
        default.tty = false;
        let mut job = Job::new(vec![default, custom, bound]);
        job.start();
        assert_eq!(job.code().await, 0, "{}", job.state_words());
        let messages: Vec<String> = job
            .report()
            .containers
            .iter()
            .map(|c| terminated(c).message)
            .collect();
        assert_eq!(messages, ["hello", "there", "bound"]);
    }
}

/// A directory of the image, and a path below a file of it.
#[tokio::test]
async fn a_termination_message_that_can_be_nowhere_is_an_error_that_names_the_field() {
    if !isolated() {
        return;
    }
    for path in ["/etc", "/etc/passwd/message"] {
        let mut container = sh("a", "true");
        container.termination_message_path = path.to_owned();
        let mut job = Job::new(vec![container]);
        job.start();
        assert_eq!(job.code().await, 64, "{path}: {}", job.state_words());
        let report = job.report();
        let ended = terminated(&report.containers[0]);
        assert_ne!(ended.exit_code, 0, "{path}: {ended:?}");
        assert!(
            ended.message.contains("terminationMessagePath"),
            "{path}: {ended:?}"
        );
    }
}

/// In a job with a memory limit of 200 MB.
#[tokio::test]
async fn an_oom_kill_is_named() {
    if harness::var("KNOC_TEST_OOM").is_none() {
        return;
    }
    let mut job = Job::new(vec![sh("a", "head -c 600000000 /dev/zero | tail")]);
    job.start();
    assert_eq!(job.code().await, 64);
    let ended = terminated(&job.report().containers[0]);
    assert_eq!((ended.exit_code, ended.reason.as_str()), (137, "OOMKilled"));
}

async fn wait_for_log(job: &Job, container: &str, text: &str) {
    let began = Instant::now();
    while !job.log_path(container, 0).exists() || job.log(container, 0) != text {
        assert!(began.elapsed() < harness::DEADLINE, "{}", job.state_words());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// All containers and attempts together, whatever each of them writes.
#[tokio::test]
async fn the_logs_of_a_pod_stay_within_their_bound() {
    let flood = "i=0; while [ $i -lt 60 ]; do head -c 60000 /dev/zero | tr '\\0' x | fold -w 1000; i=$((i+1)); done";
    let again = format!("{flood}; exit 1");
    let mut job = Job::new(vec![sh("a", &again), sh("b", flood)]);
    job.spec().restart_policy = pb::RestartPolicy::OnFailure.into();
    job.file.settings.as_mut().unwrap().log_max_pod_bytes = 4 << 20;
    job.start();
    job.until(|report| report.containers[0].restart_count >= 3)
        .await;
    let logs = job.dir.logs_dir();
    let files = ["a", "b"].into_iter().flat_map(|name| {
        let folder = std::fs::read_dir(logs.join(name)).unwrap();
        folder.map(|entry| entry.unwrap())
    });
    // A file that is removed while we look counts for nothing.
    let total: u64 = files
        .map(|entry| entry.metadata().map_or(0, |metadata| metadata.len()))
        .sum();
    // Of each of four series one batch more, twice: of 256 KiB, and what a stamp adds to each line.
    let most = (4 << 20) + 8 * (300 << 10);
    assert!((1 << 20..most).contains(&total), "{total}");
    let dropped = job.report().notes;
    assert!(
        dropped.iter().any(|note| note.reason == "LogFilesDropped"),
        "{dropped:?}"
    );
    job.signal(Signal::SIGKILL);
    job.wait().await;
}

/// What the shell that began it all has bounded softly does not bound the program, and our core limit is our own.
#[tokio::test]
async fn a_program_has_every_limit_of_its_job_but_for_two_usual_ones() {
    let mut job = Job::new(vec![sh(
        "a",
        "cat /proc/self/limits; ulimit -Sn; ulimit -Ss",
    )]);
    job.under = "ulimit -S -t 5000; ulimit -S -f 4000000; ulimit -S -n 300; ulimit -S -c 7; ulimit -S -s 1000";
    job.start();
    assert_eq!(job.code().await, 0, "{}", job.state_words());
    let log = job.log("a", 0);
    let limits = log.lines().filter(|line| line.starts_with("Max "));
    let mut seen = 0;
    for line in limits {
        let usual = line.starts_with("Max open files") || line.starts_with("Max stack size");
        // Columns of proc_pid_limits(5).
        let (soft, hard) = (line[26..47].trim(), line[47..68].trim());
        assert!(usual || soft == hard, "{line}");
        seen += 1;
    }
    assert_eq!(seen, 16, "{log}");
    assert!(log.ends_with("\n1024\n8192\n"), "{log}");
}
