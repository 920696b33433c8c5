//! Level 2: links over SSH, through a real sshd on loopback. What is inside is TLS, except for a knocctl without a
//! certificate; the host key must be known, and every failure says what to do.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use knoc_tests::{
    site::{Kubelet, Options, Site, nothing_names},
    sshd::{Sshd, keygen},
    wait_for,
};
use serde_json::json;

const SOON: Duration = Duration::from_mins(2);

/// The message of a `knocctl info` that must fail.
async fn refused(run: knoc_tests::Run) -> anyhow::Result<String> {
    let output = run.arg("info").output().await?;
    ensure!(output.code != 0, "it was answered: {output}");
    Ok(output.stderr)
}

fn ssh_settings(sshd: &Sshd) -> Vec<(&'static str, String)> {
    vec![
        ("KNOC_AGENT_ADDRESS", "ssh:".to_owned()),
        (
            "KNOC_AGENT_SSH_FOLDER",
            sshd.secret_folder().display().to_string(),
        ),
    ]
}

fn borrowed<'a>(settings: &'a [(&'static str, String)]) -> Vec<(&'a str, &'a str)> {
    let all = settings.iter();
    all.map(|(name, value)| (*name, value.as_str())).collect()
}

#[tokio::test]
async fn a_pod_runs_through_a_login_whose_key_gives_no_shell() -> anyhow::Result<()> {
    let site = Site::new(Options {
        ssh_only: true,
        ..Options::default()
    })?;
    let agent = site.agent_process(&[])?;
    let sshd = Sshd::start(&site, "sshd", Some("knoc-agent connect")).await?;
    let api = Kubelet::prepare(&site).await?;
    let settings = ssh_settings(&sshd);
    let _kubelet = api.start(&site, &borrowed(&settings)).await?;
    let container =
        json!({"name": "main", "image": "process", "command": ["/bin/sh", "-c", "echo hello"]});
    api.create_pod("one", json!({"containers": [container]}))?;
    api.phase("one", "Succeeded", SOON).await?;
    // The login ends with the agent, and the link comes back with it.
    agent.kill().await?;
    let _agent = site.agent_process(&[])?;
    let container = json!({"name": "main", "image": "process", "command": ["/bin/true"]});
    api.create_pod("two", json!({"containers": [container]}))?;
    api.phase("two", "Succeeded", SOON).await?;
    Ok(())
}

#[tokio::test]
async fn who_is_served_over_ssh_is_decided_by_certificate() -> anyhow::Result<()> {
    let site = Site::new(Options {
        tables: "[policy]\nclients = ['kubelet/*']".into(),
        ..Options::default()
    })?;
    let _agent = site.agent_process(&[])?;
    let sshd = Sshd::start(&site, "sshd", None).await?;
    wait_for("the agent is there", SOON, async || {
        let plain = sshd.knocctl(&site, false, "")?.arg("info");
        plain.ok().await.map(|_| ())
    })
    .await?;
    let said = refused(sshd.knocctl(&site, true, "")?).await?;
    ensure!(said.contains("policy.clients"), "{said}");
    Ok(())
}

#[tokio::test]
async fn knocctl_needs_no_certificate_but_the_right_socket() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    let sshd = Sshd::start(&site, "sshd", None).await?;
    for certificate in [false, true] {
        let info = sshd
            .knocctl(&site, certificate, "")?
            .arg("info")
            .ok()
            .await?;
        ensure!(info.text().contains("test"), "{info}");
    }
    // A key whose forced command serves TLS.
    let forced = Sshd::start(&site, "forced", Some("knoc-agent connect")).await?;
    forced.knocctl(&site, true, "")?.arg("info").ok().await?;
    let said = refused(forced.knocctl(&site, false, "")?).await?;
    ensure!(
        said.contains("speaks TLS") && said.contains("--plain"),
        "{said}"
    );
    Ok(())
}

#[tokio::test]
async fn a_banner_before_the_stream_is_discarded() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    let forced = "echo 'Welcome to the cluster'; cat /etc/passwd; eval \"$SSH_ORIGINAL_COMMAND\"";
    let sshd = Sshd::start(&site, "sshd", Some(forced)).await?;
    sshd.knocctl(&site, true, "")?.arg("info").ok().await?;
    let endless = Sshd::start(&site, "endless", Some("yes")).await?;
    let said = refused(endless.knocctl(&site, true, "")?).await?;
    ensure!(said.contains("without its marker"), "{said}");
    Ok(())
}

#[tokio::test]
async fn a_login_without_knoc_agent_in_its_path_is_named() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let sshd = Sshd::start(&site, "sshd", None).await?;
    std::fs::remove_file(site.path("sshd/bin/knoc-agent"))?;
    let said = refused(sshd.knocctl(&site, true, "")?).await?;
    ensure!(said.contains("no knoc-agent on the login node"), "{said}");
    Ok(())
}

/// sshd gives the command to the login shell of the user as `SHELL -c COMMAND`.
#[tokio::test]
async fn csh_and_fish_read_the_command_as_sh_does() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    for shell in ["tcsh", "fish"] {
        let program = format!("/usr/bin/{shell}");
        ensure!(
            std::path::Path::new(&program).is_file(),
            "{program} is missing: install the package {shell}"
        );
        let forced = format!("{program} -c \"$SSH_ORIGINAL_COMMAND\"");
        let sshd = Sshd::start(&site, shell, Some(&forced)).await?;
        let link = site.path(shell).join("bin/knoc-agent");
        let named = format!("ssh-program = \"{}\"", link.display());
        for (certificate, further) in [(true, ""), (false, ""), (true, &*named)] {
            let info = sshd.knocctl(&site, certificate, further)?.arg("info");
            let info = info.ok().await.with_context(|| shell)?;
            ensure!(info.text().contains("test"), "{info}");
        }
        // Each shell has its own words for a program that is not in PATH.
        std::fs::remove_file(&link)?;
        let said = refused(sshd.knocctl(&site, true, "")?).await?;
        ensure!(
            said.contains("no knoc-agent on the login node"),
            "{shell}: {said}"
        );
    }
    Ok(())
}

/// Sites that sign keys list none: sshd trusts their CA, and the certificate names the user.
#[tokio::test]
async fn a_key_that_the_site_has_signed_is_accepted_with_its_certificate() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    keygen(&site.path("user_ca")).await?;
    let trusted = format!("TrustedUserCAKeys {}/user_ca.pub", site.path("").display());
    let sshd = Sshd::with(&site, "sshd", None, &trusted).await?;
    site.put("sshd/authorized_keys", "")?;
    let said = refused(sshd.knocctl(&site, true, "")?).await?;
    ensure!(said.contains("the login was refused"), "{said}");
    let user = std::fs::read_to_string(sshd.secret_folder().join("remote_user"))?;
    for (validity, right) in [("20200101:20200102", false), ("-1h:+1h", true)] {
        let sign = knoc_tests::Run::new("ssh-keygen").args(["-q", "-I", "knoc", "-V", validity]);
        let sign = sign.args(["-n", &user, "-s"]).arg(site.path("user_ca"));
        sign.arg(site.path("sshd/login.pub")).ok().await?;
        let certificate = std::fs::read_to_string(site.path("sshd/login-cert.pub"))?;
        sshd.put_secret(&site, "ssh-certificate", &certificate)?;
        if right {
            sshd.knocctl(&site, true, "")?.arg("info").ok().await?;
        } else {
            let said = refused(sshd.knocctl(&site, true, "")?).await?;
            ensure!(said.contains("the login was refused"), "{said}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn every_way_to_fail_is_named_with_its_cure() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let sshd = Sshd::start(&site, "sshd", None).await?;
    // No agent: its program says so itself.
    let said = refused(sshd.knocctl(&site, true, "")?).await?;
    ensure!(
        said.contains("relay to the agent") && said.contains("start the agent"),
        "{said}"
    );
    let _agent = site.agent(&[]).await?;
    let program = "ssh-program = \"/nowhere/knoc-agent\"";
    let said = refused(sshd.knocctl(&site, true, program)?).await?;
    ensure!(said.contains("no knoc-agent on the login node"), "{said}");
    // A login that is not accepted.
    keygen(&site.path("other")).await?;
    let (right, other) = (
        std::fs::read_to_string(site.path("sshd/login"))?,
        std::fs::read_to_string(site.path("other"))?,
    );
    sshd.put_secret(&site, "ssh-privatekey", &other)?;
    let said = refused(sshd.knocctl(&site, true, "")?).await?;
    ensure!(
        said.contains("Permission denied") && said.contains("authorized_keys"),
        "{said}"
    );
    sshd.put_secret(&site, "ssh-privatekey", &right)?;
    // A host key that is another one, and none at all.
    let known = std::fs::read_to_string(sshd.secret_folder().join("known_hosts"))?;
    let wrong = std::fs::read_to_string(site.path("other.pub"))?;
    let wrong = format!("[127.0.0.1]:{} {wrong}", sshd.address().port());
    sshd.put_secret(&site, "known_hosts", &wrong)?;
    let said = refused(sshd.knocctl(&site, true, "")?).await?;
    ensure!(said.contains("is not the one in known_hosts"), "{said}");
    let none = wrong.replace("127.0.0.1", "127.0.0.2");
    sshd.put_secret(&site, "known_hosts", &none)?;
    let said = refused(sshd.knocctl(&site, true, "")?).await?;
    ensure!(said.contains("ssh-keyscan"), "{said}");
    ensure!(
        std::fs::read_to_string(sshd.secret_folder().join("known_hosts"))? == none,
        "ssh wrote the key"
    );
    std::fs::remove_file(sshd.secret_folder().join("known_hosts"))?;
    let said = refused(sshd.knocctl(&site, true, "")?).await?;
    ensure!(said.contains("kubectl create secret"), "{said}");
    sshd.put_secret(&site, "known_hosts", &known)?;
    // A jump host that is away.
    sshd.put_secret(&site, "proxy_jump", "127.0.0.1:1")?;
    let said = refused(sshd.knocctl(&site, true, "")?).await?;
    ensure!(said.contains("jump host"), "{said}");
    std::fs::remove_file(sshd.secret_folder().join("proxy_jump"))?;
    sshd.knocctl(&site, true, "")?.arg("info").ok().await?;
    Ok(())
}

#[tokio::test]
async fn a_jump_host_has_the_same_key_and_its_own_host_key() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    let login = Sshd::start(&site, "login", None).await?;
    let jump = Sshd::start(&site, "jump", None).await?;
    let key = std::fs::read_to_string(site.path("jump/authorized_keys"))?;
    let both = std::fs::read_to_string(site.path("login/authorized_keys"))? + &key;
    site.put("login/authorized_keys", &both)?;
    let known = |sshd: &Sshd| std::fs::read_to_string(sshd.secret_folder().join("known_hosts"));
    // The jump's Secret, with the login node behind it.
    let hosts = known(&jump)? + &known(&login)?;
    jump.put_secret(&site, "known_hosts", &hosts)?;
    let (port, jump_port) = (login.address().port(), jump.address().port());
    jump.put_secret(&site, "port", &port.to_string())?;
    jump.put_secret(&site, "proxy_jump", &format!("127.0.0.1:{jump_port}"))?;
    jump.knocctl(&site, true, "")?.arg("info").ok().await?;
    ensure!(jump.logins()?.0 > 0, "not through the jump host");
    // Without the jump host's own key nothing is sent.
    jump.put_secret(&site, "known_hosts", &known(&login)?)?;
    let said = refused(jump.knocctl(&site, true, "")?).await?;
    ensure!(said.contains("known_hosts has no key"), "{said}");
    Ok(())
}

#[tokio::test]
async fn of_two_login_nodes_one_is_enough() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    let sshd = Sshd::start(&site, "sshd", None).await?;
    let address = "[\"ssh:127.0.0.1:1\", \"ssh:\"]";
    let run = sshd.knocctl_at(&site, address, true, "")?;
    run.arg("info").ok().await?;
    let doctor = sshd.knocctl_at(&site, address, true, "")?.arg("doctor");
    let said = doctor.output().await?.text();
    ensure!(said.contains("another address answers"), "{said}");
    Ok(())
}

/// fail2ban blocks after five failures within ten minutes.
#[tokio::test]
async fn a_refused_key_is_not_tried_again_for_a_minute_but_a_new_one_is() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    let sshd = Sshd::start(&site, "sshd", None).await?;
    let right = std::fs::read_to_string(site.path("sshd/login"))?;
    keygen(&site.path("other")).await?;
    let other = std::fs::read_to_string(site.path("other"))?;
    sshd.put_secret(&site, "ssh-privatekey", &other)?;
    let api = Kubelet::prepare(&site).await?;
    let settings = ssh_settings(&sshd);
    let _kubelet = api.process(&site, &borrowed(&settings))?;
    let log = || std::fs::read_to_string(site.path("kubelet.log")).unwrap_or_default();
    wait_for("the refusal is reported", SOON, async || {
        let log = log();
        ensure!(log.contains("authorized_keys"), log);
        Ok(())
    })
    .await?;
    // Control and bulk, and requests that fail at once meanwhile: one login.
    let refused = knoc_tests::stays("one login", Duration::from_secs(8), async || {
        let (_, refused) = sshd.logins()?;
        ensure!(refused == 1, "{refused} refused logins");
        Ok(())
    });
    refused.await.with_context(log)?;
    sshd.put_secret(&site, "ssh-privatekey", &right)?;
    wait_for("the new key is used", SOON, async || {
        let log = log();
        ensure!(log.contains("connected to the agent"), log);
        Ok(())
    })
    .await
}

/// A site may allow a user one session at a time; the lock stands for that limit.
#[tokio::test]
async fn one_session_is_enough_for_pods_and_their_streams() -> anyhow::Result<()> {
    let site = Site::new(Options {
        ssh_only: true,
        ..Options::default()
    })?;
    let _agent = site.agent_process(&[])?;
    let forced = format!(
        "exec 9>{}; flock -n 9 || {{ echo \"Too many logins for 'ann'.\" >&2; exit 254; }}; exec knoc-agent connect",
        site.path("session").display()
    );
    let sshd = Sshd::start(&site, "sshd", Some(&forced)).await?;
    let api = Kubelet::prepare(&site).await?;
    let settings = ssh_settings(&sshd);
    let _kubelet = api.start(&site, &borrowed(&settings)).await?;
    let command = json!(["/bin/sh", "-c", "echo hello; exec sleep 600"]);
    let container = json!({"name": "main", "image": "process", "command": command});
    api.create_pod("one", json!({"containers": [container]}))?;
    api.phase("one", "Running", SOON).await?;
    let client = api.client(&site)?;
    for _ in 0..3 {
        let request = http::Request::get("/containerLogs/default/one/main").body(Vec::new())?;
        let text = client.request_text(request).await?;
        ensure!(text == "hello\n", "{text}");
    }
    let log = std::fs::read_to_string(site.path("kubelet.log"))?;
    ensure!(log.matches("allows one session only").count() == 1, "{log}");
    ensure!(!log.contains("lost the link to the agent"), "{log}");
    Ok(())
}

#[tokio::test]
async fn an_agent_starts_on_demand_once_and_ends_without_a_link() -> anyhow::Result<()> {
    let site = Site::new(Options {
        ssh_only: true,
        default_socket: true,
        // Long enough for the slowest of several logins to find the agent of the first.
        tables: "[serve]\nlinger = '20s'".into(),
        ..Options::default()
    })?;
    let sshd = Sshd::start(&site, "sshd", Some("knoc-agent serve --stdio")).await?;
    let info = || anyhow::Ok(sshd.knocctl(&site, true, "")?.arg("info"));
    // Several at once: one of them starts the agent, and all join it.
    let [first, second, third] = [info()?, info()?, info()?];
    let (first, second, third) = tokio::join!(first.ok(), second.ok(), third.ok());
    for answer in [first, second, third] {
        let log = std::fs::read_to_string(site.path("state/agent.log")).unwrap_or_default();
        answer.with_context(|| log)?;
    }
    let log = std::fs::read_to_string(site.path("state/agent.log"))?;
    ensure!(log.matches("serving knocctl").count() == 1, "{log}");
    nothing_names(&site.path("agent.toml"), None).await?;
    let log = std::fs::read_to_string(site.path("state/agent.log"))?;
    ensure!(
        log.contains("no link for this long") && log.contains("stopped"),
        "{log}"
    );
    info()?.ok().await?;
    // An agent that cannot start says why.
    nothing_names(&site.path("agent.toml"), None).await?;
    std::fs::set_permissions(
        site.path("state"),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )?;
    let said = refused(sshd.knocctl(&site, true, "")?).await?;
    ensure!(said.contains("mode 755"), "{said}");
    Ok(())
}

#[tokio::test]
async fn a_kubelet_without_known_hosts_does_not_start_and_says_how_to_get_them()
-> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let sshd = Sshd::start(&site, "sshd", None).await?;
    std::fs::remove_file(sshd.secret_folder().join("known_hosts"))?;
    let api = Kubelet::prepare(&site).await?;
    let settings = ssh_settings(&sshd);
    let mut kubelet = api.process(&site, &borrowed(&settings))?;
    let status = kubelet.ended(SOON).await?;
    let log = std::fs::read_to_string(site.path("kubelet.log"))?;
    ensure!(!status.success() && log.contains("ssh-keyscan"), "{log}");
    ensure!(sshd.logins()? == (0, 0), "it tried to log in");
    Ok(())
}

/// The agent of a shared state directory runs on another login node: TLS is relayed to its port.
#[tokio::test]
async fn a_login_node_without_the_agent_relays_to_the_one_that_has_it() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    let sshd = Sshd::start(&site, "sshd", None).await?;
    // As on the other node: the sockets are there and not served, and the lease names a host.
    let lease = site.path("state/agent.lease");
    let mut parsed: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&lease)?)?;
    parsed["host"] = "localhost".into();
    site.put("state/agent.lease", &parsed.to_string())?;
    std::fs::remove_file(site.path("socket/tls-agent.sock"))?;
    sshd.knocctl(&site, true, "")?.arg("info").ok().await?;
    std::fs::remove_file(site.path("socket/agent.sock"))?;
    let said = refused(sshd.knocctl(&site, false, "")?).await?;
    ensure!(said.contains("it runs on localhost"), "{said}");
    Ok(())
}
