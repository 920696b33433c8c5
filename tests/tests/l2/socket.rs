//! Level 2: the agent's unix socket and its clients. None of them trusts a socket in a folder that others may control.

use std::{
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use knoc_tests::{
    Run,
    site::{Options, Site, binary},
    wait_for,
};

const SOON: Duration = Duration::from_mins(2);

/// One of our programs with only this environment.
fn program(site: &Site, name: &str, runtime_dir: Option<&Path>) -> anyhow::Result<Run> {
    let run = Run::new(binary(name)?)
        .env_clear()
        .env("HOME", site.path(""))
        .env("KNOC_AGENT_CONFIG", site.path("agent.toml"));
    Ok(match runtime_dir {
        Some(dir) => run.env("XDG_RUNTIME_DIR", dir),
        None => run,
    })
}

/// The messages of `knocctl info` and `knoc-agent connect`; both must fail.
async fn refusals(site: &Site, runtime_dir: Option<&Path>) -> anyhow::Result<[String; 2]> {
    let info = program(site, "knocctl", runtime_dir)?.arg("info");
    let connect = program(site, "knoc-agent", runtime_dir)?.args(["connect", "--plain"]);
    let mut said = Vec::new();
    for run in [info, connect] {
        let output = run.output().await?;
        ensure!(output.code != 0, "it was taken for the agent: {output}");
        said.push(output.to_string());
    }
    said.try_into().ok().context("two programs")
}

/// Checks that both reach the agent.
async fn reach(site: &Site, runtime_dir: Option<&Path>) -> anyhow::Result<()> {
    let info = program(site, "knocctl", runtime_dir)?
        .arg("info")
        .ok()
        .await?;
    ensure!(info.text().contains("test"), "{info}");
    // An HTTP/2 client's first bytes, and an empty SETTINGS frame; the end of input ends the relay.
    let hello = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\u{4}\0\0\0\0\0";
    let connect = program(site, "knoc-agent", runtime_dir)?.args(["connect", "--plain"]);
    let answer = connect.stdin(hello).ok().await?;
    let link = answer.stdout.strip_prefix(b"KNOC-LINK/1 plain\n");
    let link = link.with_context(|| format!("no marker: {answer}"))?;
    ensure!(link.get(3) == Some(&4), "no SETTINGS: {answer}");
    Ok(())
}

fn mode(path: &Path, mode: u32) -> anyhow::Result<()> {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(())
}

/// A site whose state directory has a path longer than a socket's address, and no socket in its site file.
fn deep_site() -> anyhow::Result<(Site, PathBuf)> {
    let site = Site::new(Options {
        default_socket: true,
        ..Options::default()
    })?;
    let deep = site.path(&format!("{}/state", "x".repeat(120)));
    let text = std::fs::read_to_string(site.path("agent.toml"))?;
    let usual = format!("state_dir = \"{}\"", site.path("state").display());
    ensure!(text.contains(&usual), "{text}");
    let text = text.replace(&usual, &format!("state_dir = \"{}\"", deep.display()));
    site.put("agent.toml", &text)?;
    Ok((site, deep))
}

#[tokio::test]
async fn without_a_runtime_folder_the_socket_is_in_the_state_directory() -> anyhow::Result<()> {
    let (site, deep) = deep_site()?;
    let _agent = site.agent(&[]).await?;
    let socket = deep.join("socket/agent.sock");
    ensure!(socket.as_os_str().len() > 107 && socket.exists());
    reach(&site, None).await?;
    // A client with a runtime folder also finds the socket of an agent without one.
    let run = site.path("run");
    std::fs::create_dir(&run)?;
    mode(&run, 0o700)?;
    reach(&site, Some(&run)).await?;
    mode(socket.parent().context("a folder")?, 0o711)?;
    for said in refusals(&site, None).await? {
        ensure!(said.contains("mode 0711"), "{said}");
    }
    Ok(())
}

#[tokio::test]
async fn a_missing_or_foreign_runtime_folder_is_logged_and_not_used() -> anyhow::Result<()> {
    for (name, why) in [("nowhere", "No such file"), ("open", "writable by others")] {
        let (site, deep) = deep_site()?;
        let run = site.path(name);
        if name == "open" {
            std::fs::create_dir(&run)?;
            mode(&run, 0o777)?;
        }
        let text = run.display().to_string();
        let _agent = site.agent(&[("XDG_RUNTIME_DIR", &text)]).await?;
        ensure!(deep.join("socket/agent.sock").exists());
        let log = std::fs::read_to_string(site.path("agent.log"))?;
        ensure!(log.contains(&text) && log.contains(why), "{log}");
        reach(&site, Some(&run)).await?;
    }
    Ok(())
}

/// A listener of another user on that path: nobody connects to it.
#[tokio::test]
async fn a_socket_in_a_folder_that_others_can_write_is_not_used() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let folder = site.path("socket");
    std::fs::create_dir(&folder)?;
    let stranger = tokio::net::UnixListener::bind(folder.join("agent.sock"))?;
    mode(&folder, 0o755)?;
    for said in refusals(&site, None).await? {
        ensure!(said.contains("mode 0755"), "{said}");
    }
    // A link to a folder with the correct mode is not used either.
    let elsewhere = site.path("elsewhere");
    std::fs::rename(&folder, &elsewhere)?;
    mode(&elsewhere, 0o700)?;
    symlink(&elsewhere, &folder)?;
    for said in refusals(&site, None).await? {
        ensure!(said.contains("a symbolic link"), "{said}");
    }
    let heard = tokio::time::timeout(Duration::from_millis(200), stranger.accept()).await;
    ensure!(heard.is_err(), "somebody spoke to the stranger");
    // The agent does not listen there.
    let mut agent = site.agent_process(&[])?;
    let status = agent.ended(SOON).await?;
    ensure!(
        !status.success() && site.log().contains("a symbolic link"),
        "{}",
        site.log()
    );
    Ok(())
}

#[tokio::test]
async fn a_socket_of_another_host_names_that_host() -> anyhow::Result<()> {
    let (site, deep) = deep_site()?;
    let mut agent = site.agent(&[]).await?;
    reach(&site, None).await?;
    let pid = agent.pid().context("it has ended")?;
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid)?).context("no pid")?;
    rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
    agent.ended(SOON).await?;
    // The remaining files look as they do on another host that shares the folder.
    for said in refusals(&site, None).await? {
        ensure!(said.contains("no process of this host serves"), "{said}");
    }
    let lease = deep.join("agent.lease");
    let text = std::fs::read_to_string(&lease)?;
    let mut parsed: serde_json::Value = serde_json::from_str(&text)?;
    parsed["host"] = "login2.example".into();
    let path = lease.strip_prefix(site.path(""))?.display().to_string();
    site.put(&path, &parsed.to_string())?;
    let connect = program(&site, "knoc-agent", None)?
        .args(["connect", "--plain"])
        .output()
        .await?;
    let doctor = program(&site, "knocctl", None)?
        .arg("doctor")
        .output()
        .await?;
    for said in [connect, doctor] {
        ensure!(said.code != 0, "{said}");
        let text = format!("{}{said}", said.text());
        ensure!(text.contains("on login2.example"), "{text}");
    }
    site.put(&path, &text)?;
    // A new agent takes over the socket.
    let _agent = site.agent(&[]).await?;
    wait_for("the new agent is reached", SOON, async || {
        reach(&site, None).await
    })
    .await
}
