//! Level 2: agents that dial their kubelet, and proxies on the way, with all that can be wrong with both.

use std::{net::SocketAddr, os::unix::fs::PermissionsExt, time::Duration};

use anyhow::{Context as _, ensure};
use jiff::{SignedDuration, Timestamp};
use knoc_link::{Identity, pki::Validity};
use knoc_tests::{
    proxy::{Behaviour, Proxy},
    site::{Daemon, Kubelet, NODE, Options, Site, binary, spare_address},
    wait_for,
};
use serde_json::json;

const SOON: Duration = Duration::from_mins(2);

/// A kubelet that waits for its agent at this address.
pub(super) fn accepting(address: SocketAddr) -> [(&'static str, String); 1] {
    [("KNOC_AGENT_ADDRESS", format!("accept:{address}"))]
}

pub(super) fn as_env<'a>(pairs: &'a [(&'static str, String)]) -> Vec<(&'a str, &'a str)> {
    pairs
        .iter()
        .map(|(name, value)| (*name, value.as_str()))
        .collect()
}

/// A site whose agent dials `address`, with further settings of that entry.
pub(super) fn dialling(address: &str, settings: &str) -> anyhow::Result<Site> {
    Site::new(Options {
        tables: format!("[[dial_out]]\naddress = \"{address}\"\n{settings}"),
        ..Options::default()
    })
}

/// Waits for a line of the log with these words; returns it.
pub(super) async fn logged(site: &Site, file: &str, words: &[&str]) -> anyhow::Result<String> {
    let path = site.path(file);
    wait_for(&format!("{words:?} in {file}"), SOON, async || {
        let log = std::fs::read_to_string(&path).unwrap_or_default();
        let line = log
            .lines()
            .find(|line| words.iter().all(|word| line.contains(word)));
        line.map(str::to_owned).ok_or_else(|| log.clone())
    })
    .await
}

/// Waits until the node says that its agent is connected.
pub(super) async fn connected(kubelet: &Kubelet) -> anyhow::Result<()> {
    wait_for("the node is connected to its agent", SOON, async || {
        let node = kubelet.api.get("v1", "nodes", "", NODE);
        let node = node.map_err(|error| error.to_string())?;
        let conditions = node["status"]["conditions"].as_array().cloned();
        let agent = conditions
            .unwrap_or_default()
            .into_iter()
            .find(|condition| condition["type"] == "AgentConnected");
        match agent {
            Some(condition) if condition["status"] == "True" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await
}

/// The spec of a pod of this command.
pub(super) fn program(command: &str) -> serde_json::Value {
    json!({"containers": [{"name": "main", "image": "none", "command": ["/bin/sh", "-c", command]}]})
}

#[tokio::test]
async fn a_kubelet_runs_pods_on_an_agent_that_dials_it() -> anyhow::Result<()> {
    let address = spare_address()?;
    let site = dialling(&address.to_string(), "kubelet = \"knoc-test\"")?;
    let agent = site.agent(&[]).await?;
    let kubelet = Kubelet::prepare(&site).await?;
    let accept = accepting(address);
    let running = kubelet.start(&site, &as_env(&accept)).await?;
    connected(&kubelet).await?;
    kubelet.create_pod("first", program("exit 0"))?;
    kubelet.phase("first", "Succeeded", SOON).await?;
    let uid = kubelet.create_pod("long", program("sleep 600"))?;
    kubelet.phase("long", "Running", SOON).await?;
    // Each side dies in turn, and the pod neither ends nor starts again.
    agent.kill().await?;
    let _agent = site.agent(&[]).await?;
    connected(&kubelet).await?;
    running.kill().await?;
    let _running = kubelet.start(&site, &as_env(&accept)).await?;
    connected(&kubelet).await?;
    kubelet.create_pod("last", program("exit 3"))?;
    kubelet.phase("last", "Failed", SOON).await?;
    kubelet.phase("long", "Running", SOON).await?;
    ensure!(site.claims(&uid)? == 1, "{} claims", site.claims(&uid)?);
    // The agent is still the server: it judges the kubelet by its certificate.
    site.put_tables("[policy]\ndenied = [\"kubelet/knoc-test\"]")?;
    logged(&site, "kubelet.log", &["policy.denied"]).await?;
    Ok(())
}

#[tokio::test]
async fn both_dial_through_a_proxy_that_asks_for_a_password() -> anyhow::Result<()> {
    let address = spare_address()?;
    let login = "Basic YW5uOnF1aXRlLXNlY3JldA==".to_owned();
    let proxy = Proxy::start(Behaviour::RelayWith(address, login.clone())).await?;
    let site = Site::new(Options::default())?;
    let credentials = site.path("proxy");
    site.put("proxy", "ann:quite-secret\n")?;
    std::fs::set_permissions(&credentials, PermissionsExt::from_mode(0o600))?;
    let (url, file) = (proxy.url(), credentials.display().to_string());
    site.put_tables(&format!(
        "[[dial_out]]\naddress = \"kubelet.example.org:443\"\nproxy = \"{url}\"\nproxy_credentials = \"{file}\""
    ))?;
    let _agent = site.agent(&[]).await?;
    let kubelet = Kubelet::prepare(&site).await?;
    let running = kubelet.start(&site, &as_env(&accepting(address))).await?;
    connected(&kubelet).await?;
    kubelet.create_pod("pod", program("exit 0"))?;
    let ended = kubelet.phase("pod", "Succeeded", SOON).await;
    ended.with_context(|| site.log())?;
    let requests = proxy.requests();
    let first = requests.first().context("no request")?;
    ensure!(
        first.starts_with("CONNECT kubelet.example.org:443 HTTP/1.1\r\n"),
        "{first}"
    );
    running.kill().await?;
    // The same for a kubelet that dials, and for knocctl.
    let way = Proxy::start(Behaviour::RelayWith(site.address(), login)).await?;
    let settings = [
        ("KNOC_AGENT_ADDRESS", "login.example.org:10350".to_owned()),
        ("KNOC_AGENT_PROXY", way.url()),
        ("KNOC_AGENT_PROXY_CREDENTIALS", file.clone()),
    ];
    let _running = kubelet.start(&site, &as_env(&settings)).await?;
    // The node's condition may still be that of the kubelet before.
    kubelet.create_pod("dialled", program("exit 0"))?;
    kubelet.phase("dialled", "Succeeded", SOON).await?;
    ensure!(!way.requests().is_empty(), "not through the proxy");
    let dir = site.path("").display().to_string();
    site.put(
        "knocctl.toml",
        &format!(
            "[contexts.site]\naddress = \"login.example.org:10350\"\nca = \"ca.crt\"\ncert = \"ctl.crt\"\nkey = \"ctl.key\"\n\
             proxy = \"{}\"\nproxy-credentials = \"{file}\"\n",
            way.url()
        ),
    )?;
    let before = way.requests().len();
    site.knocctl(["info"])?.ok().await?;
    ensure!(way.requests().len() > before, "knocctl asked for none");
    for log in ["agent.log", "kubelet.log"] {
        let text = std::fs::read_to_string(site.path(log))?;
        for secret in ["quite-secret", "YW5uOnF1aXRl"] {
            ensure!(!text.contains(secret), "{dir}{log} has the password");
        }
    }
    Ok(())
}

#[tokio::test]
async fn the_environments_proxy_is_used_unless_no_proxy_or_a_setting_says_otherwise()
-> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    let proxy = Proxy::start(Behaviour::Relay(site.address())).await?;
    let context = |settings: &str| {
        site.put(
            "knocctl.toml",
            &format!(
                "[contexts.site]\naddress = \"login.example.invalid:10350\"\nca = \"ca.crt\"\ncert = \"ctl.crt\"\n\
                 key = \"ctl.key\"\n{settings}"
            ),
        )
    };
    context("")?;
    let info = |name: &'static str, value: String, no_proxy: &str| {
        let run = site.knocctl(["info"])?;
        anyhow::Ok(run.env(name, value).env("no_proxy", no_proxy))
    };
    for name in ["HTTPS_PROXY", "https_proxy"] {
        info(name, proxy.url(), "")?.ok().await?;
    }
    ensure!(proxy.requests().len() >= 2, "{:?}", proxy.requests());
    let before = proxy.requests().len();
    let direct = info("HTTPS_PROXY", proxy.url(), ".example.invalid:10350")?;
    ensure!(direct.output().await?.code != 0);
    context("proxy = \"none\"\n")?;
    let direct = info("HTTPS_PROXY", proxy.url(), "")?.output().await?;
    ensure!(direct.code != 0);
    ensure!(proxy.requests().len() == before, "{:?}", proxy.requests());
    context("")?;
    let wrong = info("HTTPS_PROXY", "socks5://p:1".to_owned(), "")?
        .output()
        .await?;
    let text = wrong.stderr;
    ensure!(
        text.contains("HTTPS_PROXY") && text.contains("socks5"),
        "{text}"
    );
    Ok(())
}

/// The agent has one kubelet behind each of these proxies, and names each fault in its log and to `knocctl doctor`.
#[expect(clippy::too_many_lines, reason = "one table of faults")]
#[tokio::test]
async fn every_fault_of_a_proxy_is_named_with_its_cure() -> anyhow::Result<()> {
    let endless = [b"HTTP/1.1 200 OK\r\n".to_vec(), vec![b'x'; 1 << 20]].concat();
    let faults = [
        (
            Behaviour::Answer(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n".to_vec()),
            "asks for a user and a password (407)",
        ),
        (
            Behaviour::Answer(b"HTTP/1.1 403 Forbidden\r\n\r\n".to_vec()),
            "its operator has to allow this host and port",
        ),
        (
            Behaviour::Answer(b"HTTP/1.1 502 Bad Gateway\r\n\r\n".to_vec()),
            "cannot connect to kubelet",
        ),
        (Behaviour::Answer(endless), "longer than 8192 bytes"),
        (Behaviour::Silent, "did not answer within 8 s"),
        (
            Behaviour::Relay(spare_address()?),
            "ended the connection before it answered",
        ),
    ];
    let mut proxies = Vec::new();
    let mut tables = String::new();
    for (index, (behaviour, _)) in faults.iter().enumerate() {
        let proxy = Proxy::start(behaviour.clone()).await?;
        tables += "[[dial_out]]\n";
        tables += &[
            "address = \"kubelet",
            &index.to_string(),
            ".example.org:443\"\n",
        ]
        .concat();
        tables += &["proxy = \"", &proxy.url(), "\"\n"].concat();
        proxies.push(proxy);
    }
    let site = Site::new(Options {
        tables,
        ..Options::default()
    })?;
    let _agent = site.agent(&[]).await?;
    for (index, (_, words)) in faults.iter().enumerate() {
        let target = format!("kubelet{index}.example.org:443");
        logged(&site, "agent.log", &[&target, words]).await?;
    }
    // On a busy machine an attempt may have failed for another reason in between.
    let text = wait_for("doctor names each fault", SOON, async || {
        let text = site.knocctl(["doctor"])?.output().await?.text();
        for (index, (_, words)) in faults.iter().enumerate() {
            let check = format!("✗ link: dial out to kubelet{index}.example.org:443:");
            let line = text.lines().find(|line| line.starts_with(&check));
            ensure!(
                line.is_some_and(|line| line.contains(words)),
                "{check} {words}: {text}"
            );
        }
        Ok(text)
    })
    .await?;
    ensure!(
        text.contains("→ check `proxy` and `proxy_credentials`"),
        "{text}"
    );
    let log = std::fs::read_to_string(site.path("agent.log"))?;
    let lines = log
        .lines()
        .filter(|line| line.contains("cannot connect to the kubelet"))
        .count();
    let few = faults.len()..40;
    ensure!(few.contains(&lines), "{lines} lines in the log");
    Ok(())
}

/// A second agent of the site, with its own state directory and ports.
fn second_agent(site: &Site) -> anyhow::Result<Daemon> {
    let text = std::fs::read_to_string(site.path("agent.toml"))?;
    let (old, new) = (site.address().to_string(), spare_address()?.to_string());
    let (old_shim, new_shim) = (
        site.shim_address().to_string(),
        spare_address()?.to_string(),
    );
    let text = text
        .replace(&old, &new)
        .replace(&old_shim, &new_shim)
        .replace("/state\"", "/state2\"")
        .replace("/socket/", "/socket2/");
    site.put("second.toml", &text)?;
    let argv = [
        binary("knoc-agent")?,
        "serve".into(),
        "--config".into(),
        site.path("second.toml"),
    ];
    Daemon::start(&argv, &[], &site.path(""), &site.path("second.log"))
}

#[tokio::test]
async fn of_two_agents_that_dial_in_the_newer_one_serves_and_the_other_says_so()
-> anyhow::Result<()> {
    let address = spare_address()?;
    let site = dialling(&address.to_string(), "")?;
    let _first = site.agent(&[]).await?;
    let kubelet = Kubelet::prepare(&site).await?;
    let _running = kubelet.start(&site, &as_env(&accepting(address))).await?;
    connected(&kubelet).await?;
    // Its epoch is that of a later second.
    let began = Timestamp::now().as_second();
    wait_for("the next second", SOON, async || {
        let now = Timestamp::now().as_second();
        if now > began + 1 {
            Ok(())
        } else {
            Err(now.to_string())
        }
    })
    .await?;
    let mut second = second_agent(&site)?;
    logged(
        &site,
        "agent.log",
        &["another agent of this site", "serves the kubelet"],
    )
    .await?;
    logged(
        &site,
        "kubelet.log",
        &["a second agent of this site dialled in and was refused"],
    )
    .await?;
    logged(&site, "second.log", &["connected to the kubelet"]).await?;
    connected(&kubelet).await?;
    kubelet.create_pod("pod", program("exit 0"))?;
    kubelet.phase("pod", "Succeeded", SOON).await?;
    second.still_runs().map_err(anyhow::Error::msg)?;
    let uids: Vec<_> = std::fs::read_dir(site.path("state2/pods"))?.collect();
    ensure!(
        uids.len() == 1,
        "the pod is not the newer agent's: {uids:?}"
    );
    let report = site.knocctl(["doctor"])?.output().await?.text();
    ensure!(report.contains("stop one of the two agents"), "{report}");
    Ok(())
}

#[tokio::test]
async fn a_link_that_flaps_once_a_second_costs_no_pod_and_makes_no_duplicate() -> anyhow::Result<()>
{
    let address = spare_address()?;
    let proxy = Proxy::start(Behaviour::Relay(address)).await?;
    let settings = format!("proxy = \"{}\"", proxy.url());
    let site = dialling("kubelet.example.org:443", &settings)?;
    let mut agent = site.agent(&[]).await?;
    let kubelet = Kubelet::prepare(&site).await?;
    let _running = kubelet.start(&site, &as_env(&accepting(address))).await?;
    connected(&kubelet).await?;
    let mut uids = Vec::new();
    let mut beat = tokio::time::interval(Duration::from_secs(1));
    for number in 0..12 {
        beat.tick().await;
        proxy.cut();
        uids.push(kubelet.create_pod(&format!("p{number}"), program("sleep 2"))?);
    }
    for number in 0..12 {
        kubelet
            .phase(&format!("p{number}"), "Succeeded", SOON)
            .await?;
    }
    for uid in &uids {
        ensure!(
            site.claims(uid)? == 1,
            "{uid}: {} claims",
            site.claims(uid)?
        );
    }
    // About two dials for each cut (fewer on a busy machine, where the pauses between failed ones grow), and no storm.
    let dials = proxy.requests().len();
    ensure!((3..100).contains(&dials), "{dials} connections for 12 cuts");
    agent.still_runs().map_err(anyhow::Error::msg)
}

/// Many proxies end connections on which nothing is sent for a minute; this one is less patient.
#[tokio::test]
async fn a_proxy_that_ends_idle_connections_ends_none_of_a_link() -> anyhow::Result<()> {
    let address = spare_address()?;
    let patience = Duration::from_secs(45);
    let proxy = Proxy::start(Behaviour::RelayUnlessIdle(address, patience)).await?;
    let settings = format!("proxy = \"{}\"", proxy.url());
    let site = dialling("kubelet.example.org:443", &settings)?;
    let _agent = site.agent(&[]).await?;
    let kubelet = Kubelet::prepare(&site).await?;
    let _running = kubelet.start(&site, &as_env(&accepting(address))).await?;
    connected(&kubelet).await?;
    // The connection that waits for its use, and the kubelet's own, have nothing to do.
    let quiet = knoc_tests::stays("no connection ends", patience + patience / 3, async || {
        let idle = proxy.idle_ones();
        ensure!(idle == 0, "{idle} connections were idle");
        Ok(())
    });
    quiet.await?;
    let log = std::fs::read_to_string(site.path("kubelet.log"))?;
    ensure!(!log.contains("lost the link to the agent"), "{log}");
    kubelet.create_pod("pod", program("exit 0"))?;
    kubelet.phase("pod", "Succeeded", SOON).await?;
    Ok(())
}

#[tokio::test]
async fn a_clock_that_is_off_is_named_by_both_sides() -> anyhow::Result<()> {
    let now = Timestamp::now();
    let hour = SignedDuration::from_hours(1);
    let early = Validity {
        from: now.checked_add(hour)?,
        until: now.checked_add(hour * 2)?,
    };
    let late = Validity {
        from: now.checked_sub(hour * 2)?,
        until: now.checked_sub(hour)?,
    };
    // As if the clock of the host that issued the certificate were an hour ahead of the other one's, or behind it.
    let cases = [
        (
            "kubelet",
            early,
            "agent.log",
            "is not yet valid",
            "kubelet.log",
        ),
        (
            "agent",
            late,
            "kubelet.log",
            "certificate expired at",
            "agent.log",
        ),
    ];
    for (name, dates, judge, words, judged) in cases {
        let address = spare_address()?;
        let site = dialling(&address.to_string(), "")?;
        let identity = match name {
            "kubelet" => Identity::Kubelet { name: NODE.into() },
            _ => Identity::Agent {
                site: "test".into(),
            },
        };
        site.issue_files(name, &identity, dates)?;
        let _agent = site.agent_process(&[])?;
        let kubelet = Kubelet::prepare(&site).await?;
        let _running = kubelet.process(&site, &as_env(&accepting(address)))?;
        logged(&site, judge, &[words, "by the clock of this host"]).await?;
        logged(&site, judged, &["by the clock of the peer"]).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_kubelet_that_nobody_dials_says_why_in_its_nodes_condition() -> anyhow::Result<()> {
    let address = spare_address()?;
    let site = dialling(&address.to_string(), "")?;
    let identity = Identity::Agent {
        site: "another".into(),
    };
    let dates = Validity::starting(Timestamp::now(), Duration::from_hours(1));
    site.issue_files("agent", &identity, dates)?;
    let _agent = site.agent_process(&[])?;
    let kubelet = Kubelet::prepare(&site).await?;
    let _running = kubelet.process(&site, &as_env(&accepting(address)))?;
    logged(&site, "agent.log", &["the peer refused our certificate"]).await?;
    wait_for("the condition names the stranger", SOON, async || {
        let node = kubelet.api.get("v1", "nodes", "", NODE);
        let text = node.map_err(|error| error.to_string())?["status"]["conditions"].to_string();
        let named = text.contains("no agent has dialled in")
            && text.contains("spiffe://knoc/agent/another");
        if named { Ok(()) } else { Err(text) }
    })
    .await
}
