//! Level 2: certificates that are denied, expired, issued by another CA or renewed while streams are open.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use jiff::{SignedDuration, Timestamp};
use knoc_link::{
    Credentials, Identity,
    pki::{Ca, CertifiedKey, Request, Validity, inspect_pem},
};
use knoc_proto::{
    pb::{self, agent_client::AgentClient, exec_input::Input, exec_output::Output},
    reason::ErrorReason,
};
use knoc_tests::{
    site::{Kubelet, NODE, Options, Pod, Site, container},
    wait_for,
};
use serde_json::json;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming, transport::Channel};

/// How long it may take until the connections of a denied certificate are cut.
const MINUTE: Duration = Duration::from_mins(1);
const SOON: Duration = Duration::from_mins(2);

type Client = AgentClient<Channel>;

fn ctl(name: &str) -> Identity {
    Identity::Ctl { name: name.into() }
}

fn hours() -> Validity {
    Validity::starting(Timestamp::now(), Duration::from_hours(5))
}

/// More than half over, and valid for so many seconds. Certificates count whole seconds, so these dates do too: a test
/// that compares the time with them must not expect more than the certificate says.
fn ending_in(seconds: i64) -> anyhow::Result<Validity> {
    let now = Timestamp::from_second(Timestamp::now().as_second())?;
    Ok(Validity {
        from: now.checked_sub(SignedDuration::from_secs(seconds * 3))?,
        until: now.checked_add(SignedDuration::from_secs(seconds))?,
    })
}

async fn watching(client: &mut Client) -> anyhow::Result<Streaming<pb::PodEvent>> {
    let mut stream = client.watch_pods(pb::WatchPodsRequest {}).await?;
    let first = stream.get_mut().message().await?;
    ensure!(first.is_some(), "an empty snapshot ends with Synced");
    Ok(stream.into_inner())
}

/// The stream ends within a minute.
async fn is_cut(stream: Streaming<pb::PodEvent>, what: &str) -> anyhow::Result<()> {
    is_cut_within(MINUTE, stream, what).await
}

async fn is_cut_within(
    limit: Duration,
    mut stream: Streaming<pb::PodEvent>,
    what: &str,
) -> anyhow::Result<()> {
    let ended = tokio::time::timeout(limit, async {
        while let Ok(Some(_)) = stream.message().await {}
    });
    ended.await.with_context(|| format!("{what} goes on"))
}

/// An echo process, over a stream that stays open.
struct Echo {
    input: mpsc::Sender<pb::ExecInput>,
    output: Streaming<pb::ExecOutput>,
}

impl Echo {
    async fn start(client: &mut Client, pod: &Pod) -> anyhow::Result<Self> {
        let start = pb::ExecStart {
            uid: pod.uid().to_owned(),
            container: "main".into(),
            command: vec!["/bin/cat".into()],
            stdin: true,
            stdout: true,
            stderr: true,
            ..pb::ExecStart::default()
        };
        let (input, inputs) = mpsc::channel(4);
        let start = Some(Input::Start(start));
        input.send(pb::ExecInput { input: start }).await?;
        let output = client.exec(ReceiverStream::new(inputs)).await?;
        let output = output.into_inner();
        let mut echo = Self { input, output };
        echo.say("first").await?;
        Ok(echo)
    }

    async fn say(&mut self, word: &str) -> anyhow::Result<()> {
        let data = word.as_bytes().to_vec().into();
        let input = Some(Input::Stdin(data));
        self.input.send(pb::ExecInput { input }).await?;
        let mut heard = Vec::new();
        let hearing = async {
            while heard.len() < word.len() {
                let message = self.output.message().await?.context("the stream ended")?;
                if let Some(Output::Stdout(data)) = message.output {
                    heard.extend_from_slice(&data);
                }
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(SOON, hearing).await??;
        ensure!(heard == word.as_bytes());
        Ok(())
    }
}

async fn sleeper(site: &Site) -> anyhow::Result<Pod> {
    let client = site.client()?;
    let pod = Pod::new("up", vec![container("main", &["/bin/sleep", "600"], &[])]);
    pod.ensure(&client).await?;
    pod.running(&client, SOON).await?;
    Ok(pod)
}

async fn finding(client: &mut Client, check: &str) -> anyhow::Result<pb::Finding> {
    let request = pb::DiagnoseRequest { probe: false };
    let mut findings = client.diagnose(request).await?.into_inner();
    while let Some(finding) = findings.message().await? {
        if finding.check == check {
            return Ok(finding);
        }
    }
    anyhow::bail!("no finding {check}")
}

/// Requests a new certificate as the kubelet does.
async fn renewed(site: &Site, client: &mut Client) -> anyhow::Result<(CertifiedKey, Credentials)> {
    let request = Request::generate("test")?;
    let asked = pb::RenewCertificateRequest {
        request: request.der.into(),
    };
    let answer = client.renew_certificate(asked).await?.into_inner();
    let pair = CertifiedKey {
        cert_pem: answer.certificate,
        key_pem: request.key_pem,
    };
    let ca = std::fs::read_to_string(site.path("ca.crt"))?;
    let credentials = Credentials::from_pem(&ca, &pair.cert_pem, &pair.key_pem)?;
    Ok((pair, credentials))
}

#[tokio::test]
async fn a_denied_certificate_and_its_renewals_are_cut_within_a_minute() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    site.put_ca_key()?;
    let _agent = site.agent(&[]).await?;
    let pod = sleeper(&site).await?;
    let by_key = site.issue(&ctl("key"), ending_in(600)?)?;
    let by_serial = site.issue(&ctl("serial"), hours())?;
    let by_name = site.issue(&ctl("name"), hours())?;
    let denied = format!(
        "[policy]\ndenied = [\"sha256/{}\", \"serial/{}\", \"ctl/name\"]",
        by_key.info().spki,
        by_serial.info().serial
    );
    let mut old = site.client_with(by_key)?;
    let (_, renewal) = renewed(&site, &mut old).await?;
    ensure!(renewal.info().identity == Ok(ctl("key")));
    let mut streams = Vec::new();
    let mut clients = Vec::new();
    for (name, client) in [
        ("the denied key's stream", old),
        ("its renewal's stream", site.client_with(renewal)?),
        ("the denied serial's stream", site.client_with(by_serial)?),
        ("the denied name's stream", site.client_with(by_name)?),
    ] {
        let mut client = client;
        streams.push((name, watching(&mut client).await?));
        clients.push(client);
    }
    let mut stolen = Echo::start(&mut clients[1], &pod).await?;
    let mut served = Echo::start(&mut site.client()?, &pod).await?;
    site.put_tables(&denied)?;
    for (name, stream) in streams {
        is_cut(stream, name).await?;
    }
    ensure!(stolen.say("still there?").await.is_err(), "exec goes on");
    served.say("nobody else is cut").await?;
    for mut client in clients {
        wait_for("the refusal by name", SOON, async || {
            let answer = client.get_info(pb::GetInfoRequest::default()).await;
            let status = answer.err().ok_or("a denied certificate is served")?;
            let named = status.message().contains("policy.denied");
            if named && ErrorReason::of(&status) == Some(ErrorReason::PeerDenied) {
                Ok(())
            } else {
                Err(status.to_string())
            }
        })
        .await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_stream_ends_with_its_certificate_unless_that_was_renewed() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    site.put_ca_key()?;
    let _agent = site.agent(&[]).await?;
    let pod = sleeper(&site).await?;
    let dates = ending_in(60)?;
    let mut left = site.client_with(site.issue(&ctl("left"), dates)?)?;
    let mut kept = site.client_with(site.issue(&ctl("kept"), dates)?)?;
    let expires = watching(&mut left).await?;
    let mut goes_on = Echo::start(&mut kept, &pod).await?;
    let (pair, renewal) = renewed(&site, &mut kept).await?;
    let info = inspect_pem(&pair.cert_pem)?;
    ensure!(info.identity == Ok(ctl("kept")) && info.ancestors.len() == 1);
    is_cut_within(2 * MINUTE, expires, "the stream of an expired certificate").await?;
    ensure!(Timestamp::now() >= dates.until);
    // It is the same stream, on the connection that was opened with the old certificate.
    goes_on.say("after the end of the old certificate").await?;
    let mut new = site.client_with(renewal)?;
    new.get_info(pb::GetInfoRequest::default()).await?;
    Ok(())
}

#[tokio::test]
async fn a_replaced_ca_ends_open_connections_of_the_old_one() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    let mut client = site.client_with(site.issue(&ctl("old"), hours())?)?;
    let stream = watching(&mut client).await?;
    site.put("ca.crt", Ca::generate("another")?.cert_pem())?;
    is_cut(stream, "the stream of the replaced CA").await?;
    let answer = client.get_info(pb::GetInfoRequest::default()).await;
    ensure!(
        answer.is_err(),
        "a certificate of the replaced CA is served"
    );
    Ok(())
}

#[tokio::test]
async fn a_faulty_site_file_keeps_the_policy_and_is_reported() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    let mut denied = site.client_with(site.issue(&ctl("denied"), hours())?)?;
    let stream = watching(&mut denied).await?;
    site.put_tables("[policy]\ndenied = [\"ctl/denied\"]\nnamespaces = [\"a\"]")?;
    is_cut(stream, "the denied stream").await?;
    site.put_tables("[policy]\ndenied = [\"sha256/nonsense\"]")?;
    let mut client = site.client()?;
    let problem = wait_for("the agent names the mistake", MINUTE, async || {
        let answer = client.get_info(pb::GetInfoRequest::default()).await;
        let info = answer.map_err(|status| status.to_string())?.into_inner();
        let named = info.policy_problem.contains("policy.denied");
        if named {
            Ok(info.policy_problem)
        } else {
            Err(info.policy_problem)
        }
    });
    let problem = problem.await?;
    ensure!(problem.contains("agent.toml:"), "{problem}");
    wait_for("the log says what is in effect", SOON, async || {
        let log = site.log();
        ensure!(log.contains("the previous [policy] stays in effect"), log);
        Ok(())
    })
    .await?;
    let found = finding(&mut client, "policy: site file").await?;
    ensure!(
        !found.ok && found.detail.contains("policy.denied"),
        "{found:?}"
    );
    let answer = denied.get_info(pb::GetInfoRequest::default()).await;
    ensure!(answer.is_err(), "the denial was forgotten");
    let pod = Pod::new("p", vec![container("main", &["/bin/true"], &[])]);
    let answer = client.ensure_pod(pod.request).await;
    let status = answer.err().context("policy.namespaces was forgotten")?;
    ensure!(
        ErrorReason::of(&status) == Some(ErrorReason::PermissionDenied),
        "{status}"
    );
    Ok(())
}

/// Health and reflection reveal which services exist, so only clients that are served get an answer.
#[tokio::test]
async fn health_and_reflection_answer_only_those_who_are_served() -> anyhow::Result<()> {
    let site = Site::new(Options {
        tables: "[policy]\nclients = [\"ctl/test\"]".into(),
        ..Options::default()
    })?;
    let _agent = site.agent(&[]).await?;
    let asked = async |credentials: Credentials, path: &'static str| {
        let carrier = site.address().to_string().parse::<knoc_link::Carrier>()?;
        let expect = knoc_link::ExpectPeer::AnyAgent;
        let channel = knoc_link::dial(carrier, Some(credentials), expect)?;
        let mut grpc = tonic::client::Grpc::new(channel);
        grpc.ready().await?;
        let codec = tonic_prost::ProstCodec::<(), ()>::default();
        let messages = tokio_stream::iter([()]);
        let path = http::uri::PathAndQuery::from_static(path);
        let answer = grpc.streaming(tonic::Request::new(messages), path, codec);
        let first = match answer.await {
            Ok(mut answer) => answer.get_mut().message().await.map(drop),
            Err(status) => Err(status),
        };
        anyhow::Ok(first.err().map(|status| status.code()))
    };
    for path in [
        "/grpc.health.v1.Health/Check",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/knoc.v1.Agent/WatchNode",
    ] {
        let served = asked(site.issue(&ctl("test"), hours())?, path).await?;
        ensure!(served != Some(Code::PermissionDenied), "{path}: {served:?}");
        let refused = asked(site.issue(&ctl("other"), hours())?, path).await?;
        ensure!(
            refused == Some(Code::PermissionDenied),
            "{path}: {refused:?}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn renewals_are_for_certificates_past_half_of_their_life_and_bounded() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    let asked = || {
        let request = Request::generate("x")?.der.into();
        anyhow::Ok(pb::RenewCertificateRequest { request })
    };
    let reason = async |client: &mut Client| {
        let answer = client.renew_certificate(asked()?).await;
        let status = answer.err().context("it was renewed")?;
        anyhow::Ok((ErrorReason::of(&status), status.message().to_owned()))
    };
    let mut late = site.client_with(site.issue(&ctl("late"), ending_in(600)?)?)?;
    let (why, message) = reason(&mut late).await?;
    ensure!(
        why == Some(ErrorReason::Unsupported) && message.contains("ca.key"),
        "{message}"
    );
    site.put_ca_key()?;
    let mut early = site.client_with(site.issue(&ctl("early"), hours())?)?;
    let (why, message) = reason(&mut early).await?;
    ensure!(
        why == Some(ErrorReason::Unsupported) && message.contains("from"),
        "{message}"
    );
    let (why, message) = reason(&mut site.socket_client()?).await?;
    ensure!(why == Some(ErrorReason::PermissionDenied), "{message}");
    let mut given = 0;
    let refused = loop {
        match late.renew_certificate(asked()?).await {
            Ok(_) => given += 1,
            Err(status) => break status,
        }
        ensure!(given < 10, "without a bound");
    };
    ensure!(
        ErrorReason::of(&refused) == Some(ErrorReason::Overloaded),
        "{refused}"
    );
    ensure!(given > 0);
    Ok(())
}

#[tokio::test]
async fn the_agent_renews_its_own_certificate() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    site.put_ca_key()?;
    let agent = Identity::Agent {
        site: "test".into(),
    };
    let dates = ending_in(600)?;
    site.issue_files("agent", &agent, dates)?;
    let _agent = site.agent(&[]).await?;
    let mut stream = site.client()?.watch_node(pb::WatchNodeRequest {}).await?;
    let until = dates.until.as_second();
    let renewed = tokio::time::timeout(MINUTE, async {
        while let Some(node) = stream.get_mut().message().await? {
            if node.certificate_until > until {
                return anyhow::Ok(());
            }
        }
        anyhow::bail!("the watch ended")
    });
    renewed.await??;
    let pem = std::fs::read_to_string(site.path("agent.crt"))?;
    ensure!(inspect_pem(&pem)?.validity.until > dates.until);
    Ok(())
}

/// The mounted bundle expires while the kubelet runs. Its renewed certificate is in its Secret, and the next start uses it.
#[tokio::test]
async fn a_kubelet_outlives_its_bundle() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    site.put_ca_key()?;
    let identity = Identity::Kubelet { name: NODE.into() };
    let dates = ending_in(60)?;
    site.issue_files("kubelet", &identity, dates)?;
    let _agent = site.agent(&[]).await?;
    let kubelet = Kubelet::prepare(&site).await?;
    let running = kubelet.start(&site, &[]).await?;
    let secret = format!("knoc-kubelet-{NODE}-keys");
    let kept = wait_for("the renewed pair is kept", SOON, async || {
        let secret = kubelet.api.get("v1", "secrets", "default", &secret);
        let secret = secret.map_err(|error| error.to_string())?;
        let entry = secret["data"]["link.pem"].as_str().map(str::to_owned);
        entry.ok_or_else(|| secret.to_string())
    });
    ensure!(!kept.await?.is_empty());
    let command = json!(["/bin/sh", "-c", "sleep 1; echo done"]);
    let spec = json!({"containers": [{"name": "main", "image": "none", "command": command}]});
    kubelet.create_pod("before", spec.clone())?;
    kubelet.phase("before", "Succeeded", MINUTE).await?;
    running.kill().await?;
    wait_for("the bundle has ended", 2 * MINUTE, async || {
        let now = Timestamp::now();
        if now > dates.until {
            Ok(())
        } else {
            Err(now.to_string())
        }
    })
    .await?;
    let _running = kubelet.start(&site, &[]).await?;
    kubelet.create_pod("after", spec)?;
    kubelet.phase("after", "Succeeded", MINUTE).await?;
    let node = kubelet.api.get("v1", "nodes", "", NODE)?;
    let conditions = node["status"]["conditions"].as_array();
    let warned = conditions
        .into_iter()
        .flatten()
        .any(|one| one["type"] == "AgentCertificateExpiring" && one["status"] == "True");
    ensure!(
        warned,
        "a certificate of minutes ends within 30 days: {node}"
    );
    Ok(())
}
