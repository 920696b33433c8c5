//! Kubelets with their own nodes on the real control plane, with exactly the permissions of the chart and no agent: how they get
//! their certificates, and that a node's identity is sufficient.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, ensure};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use jiff::Timestamp;
use k8s_openapi::api::{
    certificates::v1::CertificateSigningRequest,
    core::v1::{Event, Node, Secret},
};
use knoc_link::pki::Validity;
use knoc_tests::{Run, World, ports::free_port, site::Daemon, wait_for, world::SOON};
use kube::{Api, api::ListParams};
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType};
use serde_json::json;

/// The host's address on the bed's network; the API server does not proxy to loopback addresses.
const ADDRESS: &str = "10.77.0.1";
const KEYS: &str = "lone-knoc-kubelet-keys";

/// A kubelet in addition to that of the bed.
struct Lone {
    world: World,
    node: String,
    port: u16,
    folder: tempfile::TempDir,
    more: Vec<(&'static str, String)>,
}

fn kube(file: &str) -> anyhow::Result<String> {
    let bed = std::env::var("KNOC_BED").context("KNOC_BED")?;
    let prefix = std::env::var("KUBE_PREFIX").unwrap_or_else(|_| format!("{bed}/kube"));
    Ok(std::fs::read_to_string(format!("{prefix}/run/{file}"))?)
}

fn put(path: &Path, text: &str) -> std::io::Result<()> {
    std::fs::File::create(path)
        .and_then(|mut file| std::io::Write::write_all(&mut file, text.as_bytes()))
}

/// Certificate and key of the cluster's CA.
fn signed(
    name: &str,
    group: &str,
    usage: ExtendedKeyUsagePurpose,
    validity: Validity,
) -> anyhow::Result<(String, String)> {
    let issuer = Issuer::from_ca_cert_pem(&kube("ca.crt")?, KeyPair::from_pem(&kube("ca.key")?)?)?;
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::OrganizationName, group);
    params.distinguished_name.push(DnType::CommonName, name);
    if usage == ExtendedKeyUsagePurpose::ServerAuth {
        params.subject_alt_names = vec![SanType::IpAddress(ADDRESS.parse()?)];
    }
    params.extended_key_usages = vec![usage];
    validity.apply(&mut params)?;
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, &issuer)?;
    Ok((certificate.pem(), key.serialize_pem()))
}

/// The last five hours of a lifetime of a hundred hours, so that renewal is due.
fn due() -> Validity {
    let now = Timestamp::now();
    Validity {
        from: now - Duration::from_hours(95),
        until: now + Duration::from_hours(5),
    }
}

impl Lone {
    /// Installs the chart with these values, and starts nothing.
    async fn install(test: &str, identity: &str, certificate: &str) -> anyhow::Result<Self> {
        let world = World::new(test).await?;
        let site = format!("lone-{:05x}", rand::random::<u32>() & 0xf_ffff);
        let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/chart/knoc");
        Run::new("helm")
            .args(["install", "lone", "--namespace", &world.namespace])
            .arg(chart)
            .args([
                "--set",
                "agent.address=login:10350,runtimeClass.create=false",
            ])
            .args([
                "--set",
                &format!("agent.site={site},identity.kind={identity}"),
            ])
            .args(["--set", &format!("server.certificate={certificate}")])
            .ok()
            .await?;
        let lone = Self {
            node: format!("knoc-{site}"),
            port: free_port()?,
            folder: tempfile::tempdir()?,
            more: vec![
                ("KNOC_IDENTITY_KIND", identity.to_owned()),
                ("KNOC_SERVER_CERTIFICATE", certificate.to_owned()),
            ],
            world,
        };
        let token = lone
            .world
            .kubectl(["create", "token", "knoc-kubelet"])
            .ok()
            .await?;
        lone.kubeconfig("kubeconfig", &json!({"token": token.text()}))
            .await?;
        Ok(lone)
    }

    /// A kubeconfig of that user.
    async fn kubeconfig(&self, file: &str, user: &serde_json::Value) -> anyhow::Result<()> {
        let view = Run::new("kubectl").args(["config", "view", "--minify", "--raw", "-o", "json"]);
        let view: serde_json::Value = serde_json::from_slice(&view.ok().await?.stdout)?;
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "lone",
            "clusters": [{"name": "lone", "cluster": view["clusters"][0]["cluster"]}],
            "users": [{"name": "lone", "user": user}],
            "contexts": [{"name": "lone", "context":
                {"cluster": "lone", "user": "lone", "namespace": self.world.namespace}}],
        });
        Ok(put(&self.folder.path().join(file), &text.to_string())?)
    }

    fn path(&self, file: &str) -> String {
        self.folder.path().join(file).display().to_string()
    }

    fn start(&self) -> anyhow::Result<Daemon> {
        let listen = format!("{ADDRESS}:{}", self.port);
        let (socket, kubeconfig) = (
            format!("unix:{}", self.path("none")),
            self.path("kubeconfig"),
        );
        let mut env = vec![
            ("KNOC_AGENT_ADDRESS", socket.as_str()),
            ("KNOC_KUBERNETES_KUBECONFIG", &kubeconfig),
            ("KNOC_KUBERNETES_NAMESPACE", &self.world.namespace),
            ("KNOC_KUBERNETES_IDENTITY", "lone"),
            ("KNOC_KEYS_SECRET", KEYS),
            ("KNOC_NODE_NAME", &self.node),
            ("KNOC_NODE_INTERNAL_IP", ADDRESS),
            ("KNOC_SERVER_LISTEN", &listen),
        ];
        env.extend(
            self.more
                .iter()
                .map(|(name, value)| (*name, value.as_str())),
        );
        let program = knoc_tests::site::binary("knoc-kubelet")?;
        let log = self.folder.path().join("log");
        Daemon::start(&[program], &env, self.folder.path(), &log)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Waits until the Node is Ready.
    async fn ready(&self) -> anyhow::Result<()> {
        self.condition("Ready", "KubeletReady").await.map(drop)
    }

    /// Waits until a condition of the Node is True with that reason; returns its message.
    async fn condition(&self, kind: &str, reason: &str) -> anyhow::Result<String> {
        let what = format!("{kind} of the lone node: {reason}");
        let outcome = wait_for(&what, SOON, async || {
            let now = self.world.condition(&self.node, kind).await?;
            let is = now.status == "True" && now.reason.as_deref() == Some(reason);
            ensure!(is, "{now:?}");
            Ok(now.message.unwrap_or_default())
        });
        outcome.await.with_context(|| self.log())
    }

    /// GETs the kubelet's `/healthz` through the API server, which verifies the serving certificate.
    fn proxied(&self) -> Run {
        let health = format!("/api/v1/nodes/{}/proxy/healthz", self.node);
        Run::new("kubectl").args(["get", "--raw", &health])
    }

    /// Waits until the API server refuses the serving certificate.
    async fn is_not_trusted(&self) -> anyhow::Result<()> {
        wait_for("the certificate is refused", SOON, async || {
            let refused = self.proxied().output().await?;
            ensure!(refused.stderr.contains("x509"), "{refused}");
            Ok(())
        })
        .await
    }

    /// The certificate that is served, as PEM.
    async fn served(&self) -> anyhow::Result<String> {
        let address = format!("{ADDRESS}:{}", self.port);
        let client = Run::new("openssl").args(["s_client", "-connect", &address]);
        let text = client.stdin("").output().await?.text();
        let (begin, end) = ("-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----");
        let first = text.find(begin).zip(text.find(end));
        let (from, until) = first.with_context(|| text.clone())?;
        Ok(text[from..until + end.len()].to_owned())
    }

    /// Approves the request for this purpose, as the Event says; returns the name of the request.
    async fn approve(&self, purpose: &str) -> anyhow::Result<String> {
        let api: Api<Event> = self.world.cluster_api();
        let fields = format!("involvedObject.name={}", self.node);
        let of = ListParams::default().fields(&fields);
        let command = format!("kubectl certificate approve knoc-{purpose}-");
        let told = wait_for("an Event that says what to approve", SOON, async || {
            let events = api.list(&of).await.map_err(|error| error.to_string())?;
            let texts: Vec<_> = events
                .items
                .into_iter()
                .filter_map(|event| event.message)
                .collect();
            let found = texts.iter().find(|text| text.contains(&command));
            found.cloned().ok_or_else(|| format!("{texts:?}"))
        });
        let told = told.await.with_context(|| self.log())?;
        let name = told.split(' ').next_back().context("no name")?.to_owned();
        Run::new("kubectl")
            .args(["certificate", "approve", &name])
            .ok()
            .await?;
        Ok(name)
    }

    /// An entry of the Secret of the keys.
    async fn kept(&self, entry: &str) -> anyhow::Result<Option<String>> {
        let secret = self.world.api::<Secret>().get(KEYS).await?;
        let value = secret.data.and_then(|mut data| data.remove(entry));
        Ok(value.map(|bytes| String::from_utf8_lossy(&bytes.0).into_owned()))
    }

    /// Stores a self-signed certificate of the node under that entry; returns what is stored.
    async fn keep_signed(&self, entry: &str, validity: Validity) -> anyhow::Result<String> {
        let name = format!("system:node:{}", self.node);
        let usage = match entry {
            "serving.pem" => ExtendedKeyUsagePurpose::ServerAuth,
            _ => ExtendedKeyUsagePurpose::ClientAuth,
        };
        let (certificate, key) = signed(&name, "system:nodes", usage, validity)?;
        let both = format!("{certificate}{key}");
        self.keep(entry, &both).await?;
        Ok(both)
    }

    async fn keep(&self, entry: &str, text: &str) -> anyhow::Result<()> {
        let patch = json!({"data": {entry: BASE64_STANDARD.encode(text)}}).to_string();
        self.world
            .kubectl(["patch", "secret", KEYS, "--type=merge", "-p", &patch])
            .ok()
            .await?;
        Ok(())
    }

    /// Waits until the entry exists and differs from `before`.
    async fn kept_anew(&self, entry: &str, before: Option<&str>) -> anyhow::Result<String> {
        let what = format!("another {entry} is kept");
        let outcome = wait_for(&what, SOON, async || {
            let kept = self
                .kept(entry)
                .await
                .map_err(|error| format!("{error:#}"))?;
            kept.filter(|text| Some(text.as_str()) != before)
                .ok_or_else(|| "as before".to_owned())
        });
        outcome.await.with_context(|| self.log())
    }

    /// The requests of this node, oldest first.
    async fn requests(&self) -> anyhow::Result<Vec<CertificateSigningRequest>> {
        let api: Api<CertificateSigningRequest> = self.world.cluster_api();
        let all = api.list(&ListParams::default()).await?;
        let mine = |one: &CertificateSigningRequest| {
            one.metadata
                .name
                .as_deref()
                .is_some_and(|name| name.contains(&self.node))
        };
        let mut mine: Vec<_> = all.items.into_iter().filter(mine).collect();
        mine.sort_by_key(|one| one.metadata.creation_timestamp.clone());
        Ok(mine)
    }

    async fn finish(self) -> anyhow::Result<()> {
        for request in self.requests().await? {
            let name = request.metadata.name.unwrap_or_default();
            Run::new("kubectl")
                .args(["delete", "csr", &name])
                .ok()
                .await?;
        }
        Run::new("kubectl")
            .args(["delete", "node", &self.node, "--ignore-not-found"])
            .ok()
            .await?;
        Run::new("helm")
            .args(["uninstall", "lone", "--namespace", &self.world.namespace])
            .ok()
            .await?;
        self.world.finish().await
    }
}

#[tokio::test]
async fn a_node_appears_when_its_certificate_is_approved_and_a_restart_needs_no_other_approval()
-> anyhow::Result<()> {
    let lone = Lone::install("id-approve", "node", "csr").await?;
    let kubelet = lone.start()?;
    let client = lone.approve("client").await?;
    lone.ready().await?;
    // The API server verifies kubelets, so no request succeeds before the serving certificate is approved.
    lone.is_not_trusted().await?;
    let serving = lone.approve("serving").await?;
    wait_for("the API server reaches the kubelet", SOON, async || {
        lone.proxied().ok().await
    })
    .await?;
    let requests = lone.requests().await?;
    let by: Vec<_> = requests
        .iter()
        .filter_map(|one| one.spec.username.clone())
        .collect();
    let account = format!(
        "system:serviceaccount:{}:knoc-kubelet",
        lone.world.namespace
    );
    ensure!(
        by == [account, format!("system:node:{}", lone.node)],
        "{by:?}"
    );
    // The ServiceAccount changes it, because the node itself is not allowed to.
    let api: Api<Node> = lone.world.cluster_api();
    wait_for("the taint of a lost agent", SOON, async || {
        let node = api
            .get(&lone.node)
            .await
            .map_err(|error| error.to_string())?;
        let taints = node.spec.and_then(|spec| spec.taints).unwrap_or_default();
        let there = taints
            .iter()
            .any(|taint| taint.key == "knoc.io/agent-disconnected");
        if there {
            Ok(())
        } else {
            Err(format!("{taints:?}"))
        }
    })
    .await?;
    kubelet.kill().await?;
    let again = lone.start()?;
    wait_for("the API server reaches the new one", SOON, async || {
        lone.proxied().ok().await
    })
    .await?;
    let names: Vec<_> = lone
        .requests()
        .await?
        .into_iter()
        .filter_map(|one| one.metadata.name)
        .collect();
    ensure!(names == [client, serving], "{names:?}");
    again.terminate().await?;
    lone.finish().await
}

#[tokio::test]
async fn a_due_client_certificate_is_renewed_without_an_administrator() -> anyhow::Result<()> {
    let lone = Lone::install("id-renew", "node", "self-signed").await?;
    let name = format!("system:node:{}", lone.node);
    let old = lone.keep_signed("client.pem", due()).await?;
    let kubelet = lone.start()?;
    lone.ready().await?;
    lone.kept_anew("client.pem", Some(&old)).await?;
    let requests = lone.requests().await?;
    ensure!(requests.len() == 1, "{requests:?}");
    ensure!(
        requests[0].spec.username.as_deref() == Some(&name),
        "{requests:?}"
    );
    ensure!(
        lone.kept("client-next.pem").await?.is_none(),
        "the key of the request is left"
    );
    lone.ready().await?;
    kubelet.terminate().await?;
    lone.finish().await
}

#[tokio::test]
async fn a_due_serving_certificate_is_renewed_by_request_and_served_without_a_restart()
-> anyhow::Result<()> {
    let lone = Lone::install("id-serving", "node", "csr").await?;
    let name = format!("system:node:{}", lone.node);
    let fresh = Validity::starting(Timestamp::now(), Duration::from_hours(24));
    lone.keep_signed("client.pem", fresh).await?;
    let old = lone.keep_signed("serving.pem", due()).await?;
    let mut kubelet = lone.start()?;
    lone.ready().await?;
    // Until the request is approved, the old certificate is served, and the node shows what it is waiting for.
    let waits = lone
        .condition("ServingCertificate", "AwaitingApproval")
        .await?;
    let served = wait_for("a certificate is served", SOON, async || {
        lone.served().await
    });
    ensure!(old.contains(&served.await?), "another is served");
    wait_for("the API server reaches the kubelet", SOON, async || {
        lone.proxied().ok().await
    })
    .await?;
    let request = lone.approve("serving").await?;
    let text =
        format!("kubectl certificate approve {request}; the certificate in use is valid until");
    ensure!(waits.contains(&text), "{waits}");
    let new = lone.kept_anew("serving.pem", Some(&old)).await?;
    wait_for("the new certificate is served", SOON, async || {
        let served = lone.served().await?;
        ensure!(new.contains(&served), "{served}");
        Ok(())
    })
    .await?;
    lone.proxied().ok().await?;
    lone.condition("ServingCertificate", "Valid").await?;
    kubelet.still_runs().map_err(anyhow::Error::msg)?;
    let requests = lone.requests().await?;
    let by: Vec<_> = requests
        .iter()
        .map(|one| (one.metadata.name.as_deref(), one.spec.username.as_deref()))
        .collect();
    ensure!(by == [(Some(&*request), Some(&*name))], "{by:?}");
    ensure!(
        lone.kept("serving-next.pem").await?.is_none(),
        "the key of the request is left"
    );
    kubelet.terminate().await?;
    lone.finish().await
}

#[tokio::test]
async fn a_bootstrap_kubeconfig_asks_for_the_first_certificate() -> anyhow::Result<()> {
    let mut lone = Lone::install("id-bootstrap", "node", "self-signed").await?;
    let group = format!("system:bootstrappers:{}", lone.world.namespace);
    for role in [
        "system:node-bootstrapper",
        "system:certificates.k8s.io:certificatesigningrequests:nodeclient",
    ] {
        let binding = format!(
            "{}-{}",
            lone.world.namespace,
            role.rsplit(':').next().unwrap_or(role)
        );
        Run::new("kubectl")
            .args([
                "create",
                "clusterrolebinding",
                &binding,
                "--clusterrole",
                role,
                "--group",
                &group,
            ])
            .ok()
            .await?;
    }
    let validity = Validity::starting(Timestamp::now(), Duration::from_hours(1));
    let usage = ExtendedKeyUsagePurpose::ClientAuth;
    let (certificate, key) = signed("system:bootstrap:abcdef", &group, usage, validity)?;
    let user = json!({"client-certificate-data": BASE64_STANDARD.encode(certificate),
        "client-key-data": BASE64_STANDARD.encode(key)});
    lone.kubeconfig("bootstrap", &user).await?;
    lone.more
        .push(("KNOC_IDENTITY_BOOTSTRAP_KUBECONFIG", lone.path("bootstrap")));
    let kubelet = lone.start()?;
    lone.ready().await?;
    let requests = lone.requests().await?;
    let by = requests
        .first()
        .and_then(|one| one.spec.username.as_deref());
    ensure!(by == Some("system:bootstrap:abcdef"), "{requests:?}");
    kubelet.terminate().await?;
    for role in ["system:node-bootstrapper", "nodeclient"] {
        let end = role.rsplit(':').next().unwrap_or(role);
        let binding = format!("{}-{end}", lone.world.namespace);
        Run::new("kubectl")
            .args(["delete", "clusterrolebinding", &binding])
            .ok()
            .await?;
    }
    lone.finish().await
}

#[tokio::test]
async fn a_self_signed_certificate_is_kept_and_served_after_a_kill() -> anyhow::Result<()> {
    let lone = Lone::install("id-self", "serviceaccount", "self-signed").await?;
    let kubelet = lone.start()?;
    lone.ready().await?;
    let kept = lone.kept_anew("serving.pem", None).await?;
    put(&lone.folder.path().join("serving.pem"), &kept)?;
    kubelet.kill().await?;
    let again = lone.start()?;
    // The request is denied, but curl has verified the server's certificate.
    let url = format!("https://{ADDRESS}:{}/healthz", lone.port);
    let ask = async || {
        let curl = Run::new("curl").args(["-sS", "--cacert", &lone.path("serving.pem"), &url]);
        let answer = curl.ok().await.map_err(|error| format!("{error:#}"))?;
        if answer.text() == "Unauthorized" {
            Ok(())
        } else {
            Err(answer.to_string())
        }
    };
    wait_for("the kept certificate is served", SOON, ask).await?;
    ensure!(
        lone.kept("serving.pem").await? == Some(kept),
        "another was made"
    );
    // It can read its own Secret and no other.
    let account = format!(
        "--as=system:serviceaccount:{}:knoc-kubelet",
        lone.world.namespace
    );
    let secret = format!("secret/{KEYS}");
    for (question, wanted) in [
        (["patch", secret.as_str()], "yes"),
        (["create", "secrets"], "no"),
        (["list", "secrets"], "no"),
        (["patch", "secret/other"], "no"),
    ] {
        let can = lone
            .world
            .kubectl(["auth", "can-i", &account])
            .args(question)
            .output()
            .await?;
        ensure!(can.text() == wanted, "{question:?}: {can}");
    }
    again.terminate().await?;
    lone.finish().await
}
