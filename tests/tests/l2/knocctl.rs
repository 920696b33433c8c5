//! Level 2: `knocctl` against the real agent, without Kubernetes.

use std::time::Duration;

use anyhow::ensure;
use knoc_tests::{
    Run, Terminal, doctor,
    site::{Options, Site},
    wait_for,
};

const SOON: Duration = Duration::from_mins(2);

const POD: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: hello}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: none
    command: [sh, -c, "echo hello $NAME; while :; do sleep 0.1; done"]
    env: [{name: NAME, value: world}]
"#;

async fn run_hello(site: &Site) -> anyhow::Result<()> {
    site.knocctl(["run", "-f", "-"])?.stdin(POD).ok().await?;
    wait_for("hello in the log", SOON, async || {
        let log = site.knocctl(["logs", "hello"])?.output().await?;
        if log.stdout == b"hello world\n" {
            Ok(())
        } else {
            Err(anyhow::anyhow!("{log}"))
        }
    })
    .await?;
    // The log may come from the files before the shim has its link.
    wait_for("a command runs", SOON, async || {
        let run = site.knocctl(["exec", "hello", "--", "true"])?;
        run.ok().await.map(drop)
    })
    .await
}

#[tokio::test]
async fn a_pod_is_run_shown_entered_and_deleted() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    run_hello(&site).await?;
    let pods = site.knocctl(["pods"])?.ok().await?;
    ensure!(
        pods.text().contains("hello") && pods.text().contains("Running"),
        "{pods}"
    );
    let json = site.knocctl(["pods", "-o", "json"])?.ok().await?;
    serde_json::from_slice::<serde_json::Value>(&json.stdout)?;
    let described = site.knocctl(["describe", "hello"])?.ok().await?;
    ensure!(described.text().contains("main"), "{described}");
    let output = site.knocctl(["exec", "-i", "hello", "--", "sh", "-c", "cat; exit 5"])?;
    let output = output.stdin("bytes\0\u{ff}").output().await?;
    ensure!(
        output.code == 5 && output.stdout == "bytes\0\u{ff}".as_bytes(),
        "{output}"
    );
    site.knocctl(["delete", "hello"])?.ok().await?;
    wait_for("no pod", SOON, async || {
        let pods = site.knocctl(["pods"])?.ok().await?;
        if pods.text().contains("Running") {
            Err(anyhow::anyhow!(pods.text()))
        } else {
            Ok(())
        }
    })
    .await
}

#[tokio::test]
async fn exec_has_a_real_terminal() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    run_hello(&site).await?;
    let knocctl = knoc_tests::site::binary("knocctl")?;
    let config = format!("KNOCCTL_CONFIG={}", site.path("knocctl.toml").display());
    let args = [
        &config,
        &knocctl.display().to_string(),
        "exec",
        "-it",
        "hello",
        "--",
        "sh",
    ];
    let mut terminal = Terminal::start("env", &args.map(AsRef::as_ref), 30, 90)?;
    terminal.type_text("stty size; echo be''gun\n")?;
    terminal.expect("begun").await?;
    terminal.expect("30 90").await?;
    // A shell discards the whole line on `^C`, so the next line prints the code.
    terminal.type_text("echo go''es; sleep 100\n")?;
    terminal.expect("goes").await?;
    terminal.type_text("\u{3}")?;
    terminal.type_text("echo co''de=$?\n")?;
    terminal.expect("code=130").await?;
    terminal.type_text("exit 4\n")?;
    ensure!(terminal.exit_code().await? == Some(4));
    Ok(())
}

#[tokio::test]
async fn script_shows_the_job_and_submits_nothing() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    let script = site.knocctl(["script", "-f", "-"])?.stdin(POD).ok().await?;
    ensure!(script.text().contains("shim"), "{script}");
    let pods = site.knocctl(["pods"])?.ok().await?;
    ensure!(!pods.text().contains("hello"), "{pods}");
    Ok(())
}

#[tokio::test]
async fn a_probe_job_checks_the_whole_chain() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    let findings = doctor::examine(site.knocctl(["doctor", "--probe"])?).await?;
    doctor::probed(&findings)?;
    let left = std::fs::read_dir(site.path("state/pods"))?.count();
    ensure!(left == 0, "{left} job directories are left: {findings:#?}");
    Ok(())
}

#[tokio::test]
async fn a_probe_whose_job_cannot_run_says_where_the_chain_ends() -> anyhow::Result<()> {
    let site = Site::new(Options {
        prelude: "echo no such module >&2; exit 1\n".to_owned(),
        ..Options::default()
    })?;
    let _agent = site.agent(&[]).await?;
    let findings = doctor::examine(site.knocctl(["doctor", "--probe"])?).await?;
    let broken = findings.iter().filter(|finding| !finding.ok);
    let broken: Vec<_> = broken.map(|finding| finding.check.as_str()).collect();
    ensure!(broken == ["probe: report", "probe: link"], "{findings:#?}");
    Ok(())
}

#[tokio::test]
async fn doctor_names_an_agent_that_is_down_with_the_cause_and_the_fix() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let by_tcp = site.knocctl(["doctor"])?.output().await?;
    let cause = format!(
        "✗ link: port: connect to tcp:{}: Connection refused",
        site.address()
    );
    let cure = "\n  → nobody listens there: start the agent (`knoc-agent serve`)";
    ensure!(by_tcp.code == 1, "{by_tcp}");
    ensure!(
        by_tcp.text().contains(&cause) && by_tcp.text().contains(cure),
        "{}",
        by_tcp.text()
    );
    // As on the login node: without a configuration, knocctl uses the agent's socket.
    let by_socket = Run::new(knoc_tests::site::binary("knocctl")?)
        .env_clear()
        .env("HOME", site.path("scratch"))
        .env("XDG_RUNTIME_DIR", site.path("scratch"))
        .arg("doctor");
    let by_socket = by_socket.output().await?;
    let cure = "\n  → start the agent on this machine (`knoc-agent serve`)";
    ensure!(by_socket.code == 1, "{by_socket}");
    ensure!(
        by_socket.text().contains("✗ link: ") && by_socket.text().contains(cure),
        "{}",
        by_socket.text()
    );
    let _agent = site.agent(&[]).await?;
    let findings = doctor::examine(site.knocctl(["doctor"])?).await?;
    ensure!(findings.iter().all(|finding| finding.ok), "{findings:#?}");
    Ok(())
}

/// knocctl as a user runs it on the agent's host: without variables of the tests, with the agent's default socket.
fn beside_the_agent(site: &Site, args: &[&str]) -> anyhow::Result<Run> {
    let place = site.path("run/knoc");
    if !place.exists() {
        std::fs::create_dir_all(&place)?;
        std::fs::set_permissions(&place, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
        let socket = site.path("socket/agent.sock");
        std::os::unix::fs::symlink(socket, place.join("agent.sock"))?;
    }
    let run = Run::new(knoc_tests::site::binary("knocctl")?).env_clear();
    let run = run.env("HOME", site.path("home"));
    Ok(run.env("XDG_RUNTIME_DIR", site.path("run")).args(args))
}

#[tokio::test]
async fn without_a_file_the_socket_is_used() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    let doctor = beside_the_agent(&site, &["doctor"])?.ok().await?;
    ensure!(doctor.text().contains("/run/knoc/agent.sock"), "{doctor}");
    Ok(())
}

#[tokio::test]
async fn on_the_login_node_the_file_of_init_asks_for_no_certificate() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let address = site.address().to_string();
    let init = Run::new(knoc_tests::site::binary("knoc-agent")?).args(["init", "--site", "other"]);
    let init = init.args(["--address", &address, "--scheduler", "local"]);
    init.env("HOME", site.path("home")).ok().await?;
    ensure!(site.path("home/.config/knoc/knocctl.toml").is_file());
    // On another host, the only context of the file is used. This agent uses another CA than the one that `init` created.
    let away = beside_the_agent(&site, &["doctor"])?.output().await?;
    ensure!(
        away.code != 0 && away.text().contains("context other of"),
        "{away}"
    );
    let _agent = site.agent(&[]).await?;
    let info = beside_the_agent(&site, &["info"])?.ok().await?;
    ensure!(info.text().contains("test"), "{info}");
    let doctor = beside_the_agent(&site, &["doctor"])?.ok().await?;
    ensure!(doctor.text().contains("/run/knoc/agent.sock"), "{doctor}");
    // If the context or the file is given, it is used.
    let file = site.path("home/.config/knoc/knocctl.toml");
    for option in [
        ["--context", "other"],
        ["--config", &file.to_string_lossy()],
    ] {
        let args = [&option[..], &["doctor"]].concat();
        let asked = beside_the_agent(&site, &args)?.output().await?;
        ensure!(
            asked.code != 0 && asked.text().contains("context other of"),
            "{asked}"
        );
    }
    Ok(())
}
