//! Who can use the kubelet's API, tested by curl with real tokens and certificates that the real API server reviews.

use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Node, ServiceAccount};
use knoc_tests::{Run, World, wait_for, world::SOON};
use kube::ResourceExt as _;
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair, date_time_ymd};
use serde_json::json;

/// The folder of the bed's keys that sign tokens and certificates.
fn kube(file: &str) -> anyhow::Result<PathBuf> {
    let prefix = match std::env::var("KUBE_PREFIX") {
        Ok(prefix) => PathBuf::from(prefix),
        Err(_) => PathBuf::from(std::env::var("KNOC_BED").context("KNOC_BED")?).join("kube"),
    };
    Ok(prefix.join("run").join(file))
}

/// The kubelet's port, as the API server reaches it.
struct Kubelet {
    origin: String,
    folder: tempfile::TempDir,
}

/// The credentials of a client.
enum Caller<'a> {
    Nobody,
    Token(&'a str),
    /// Files `NAME.crt` and `NAME.key`.
    Certificate(&'a str),
}

impl Kubelet {
    async fn find(world: &World) -> anyhow::Result<Self> {
        let node = world.cluster_api::<Node>().get(&world.node).await?;
        let status = node.status.context("a node without status")?;
        let address = &status.addresses.context("no addresses")?[0].address;
        let endpoint = status
            .daemon_endpoints
            .and_then(|ends| ends.kubelet_endpoint);
        let port = endpoint.context("no port")?.port;
        Ok(Self {
            origin: format!("https://{address}:{port}"),
            folder: tempfile::tempdir()?,
        })
    }

    /// Status and body of the answer.
    async fn ask(
        &self,
        caller: Caller<'_>,
        method: &str,
        path: &str,
    ) -> anyhow::Result<(u16, String)> {
        let mut run = Run::new("curl")
            .args([
                "-sS",
                "--path-as-is",
                "-m",
                "90",
                "-X",
                method,
                "-w",
                "\n%{http_code}",
                "--cacert",
            ])
            .arg(kube("ca.crt")?);
        match caller {
            Caller::Nobody => {}
            Caller::Token(token) => {
                run = run.args(["-H", &format!("Authorization: Bearer {token}")]);
            }
            Caller::Certificate(name) => {
                let file = |end: &str| self.folder.path().join(format!("{name}.{end}"));
                run = run
                    .arg("--cert")
                    .arg(file("crt"))
                    .arg("--key")
                    .arg(file("key"));
            }
        }
        let output = run.arg(format!("{}{path}", self.origin)).ok().await?;
        let text = String::from_utf8(output.stdout)?;
        let (body, code) = text.rsplit_once('\n').context("curl said no code")?;
        Ok((code.parse()?, body.to_owned()))
    }

    /// A client certificate of that CA, as files.
    fn certificate(
        &self,
        name: &str,
        issuer: &Issuer<'_, KeyPair>,
        group: &str,
        expired: bool,
    ) -> anyhow::Result<()> {
        let mut params = CertificateParams::default();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.distinguished_name.push(DnType::CommonName, name);
        params
            .distinguished_name
            .push(DnType::OrganizationName, group);
        if expired {
            params.not_before = date_time_ymd(2001, 1, 1);
            params.not_after = date_time_ymd(2002, 1, 1);
        }
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, issuer)?;
        let file = |end: &str| self.folder.path().join(format!("{name}.{end}"));
        std::fs::File::create(file("crt"))
            .and_then(|mut to| std::io::Write::write_all(&mut to, certificate.pem().as_bytes()))?;
        std::fs::File::create(file("key")).and_then(|mut to| {
            std::io::Write::write_all(&mut to, key.serialize_pem().as_bytes())
        })?;
        Ok(())
    }
}

fn cluster_ca() -> anyhow::Result<Issuer<'static, KeyPair>> {
    let key = KeyPair::from_pem(&std::fs::read_to_string(kube("ca.key")?)?)?;
    let pem = std::fs::read_to_string(kube("ca.crt")?)?;
    Ok(Issuer::from_ca_cert_pem(&pem, key)?)
}

fn other_ca() -> anyhow::Result<Issuer<'static, KeyPair>> {
    let mut params = CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params
        .distinguished_name
        .push(DnType::CommonName, "kubernetes-ca");
    Ok(Issuer::new(params, KeyPair::generate()?))
}

async fn account(world: &World, name: &str) -> anyhow::Result<ServiceAccount> {
    world
        .kubectl(["create", "serviceaccount", name])
        .ok()
        .await?;
    Ok(world.api::<ServiceAccount>().get(name).await?)
}

async fn token(world: &World, account: &str, more: &[&str]) -> anyhow::Result<String> {
    let output = world
        .kubectl(["create", "token", account])
        .args(more)
        .ok()
        .await?;
    Ok(output.text())
}

/// A token of the account that is signed with the cluster's own key and expires at that time.
async fn signed(account: &ServiceAccount, until: Timestamp) -> anyhow::Result<String> {
    let (name, namespace) = (account.name_any(), account.namespace().unwrap_or_default());
    let issuer = "https://kubernetes.default.svc";
    let began = until - SignedDuration::from_hours(1);
    let claims = json!({
        "iss": issuer, "aud": [issuer], "sub": format!("system:serviceaccount:{namespace}:{name}"),
        "iat": began.as_second(), "nbf": began.as_second(), "exp": until.as_second(),
        "kubernetes.io": {"namespace": namespace,
            "serviceaccount": {"name": name, "uid": account.uid()}},
    });
    let part = |value: serde_json::Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
    let text = format!("{}.{}", part(json!({"alg": "RS256"})), part(claims));
    let signature = Run::new("openssl")
        .args(["dgst", "-sha256", "-sign"])
        .arg(kube("sa.key")?)
        .stdin(text.clone())
        .ok()
        .await?;
    Ok(format!(
        "{text}.{}",
        BASE64_URL_SAFE_NO_PAD.encode(signature.stdout)
    ))
}

/// Allows the subject these verbs on these subresources of nodes; returns the name of the cluster-wide objects.
async fn grant(
    world: &World,
    subject: serde_json::Value,
    verbs: &[&str],
    subresources: &[&str],
) -> anyhow::Result<()> {
    let name = format!(
        "{}-{}",
        world.namespace,
        verbs.join("-") + &subresources.join("-")
    );
    let name = name.to_lowercase();
    let resources: Vec<_> = subresources
        .iter()
        .map(|one| format!("nodes/{one}"))
        .collect();
    let labels = json!({"knoc-test": world.namespace});
    let api = "rbac.authorization.k8s.io/v1";
    for object in [
        json!({"apiVersion": api, "kind": "ClusterRole", "metadata": {"name": name, "labels": labels},
            "rules": [{"apiGroups": [""], "resources": resources, "verbs": verbs}]}),
        json!({"apiVersion": api, "kind": "ClusterRoleBinding", "metadata": {"name": name, "labels": labels},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
            "subjects": [subject]}),
    ] {
        let apply = world.kubectl(["apply", "-f", "-"]);
        apply.stdin(object.to_string()).ok().await?;
    }
    // The API server learns of roles a moment later, and the kubelet remembers a denial for a while.
    let name = subject["name"].as_str().unwrap_or_default();
    let who = match subject["namespace"].as_str() {
        Some(namespace) => vec![format!("--as=system:serviceaccount:{namespace}:{name}")],
        None => vec!["--as=somebody".to_owned(), format!("--as-group={name}")],
    };
    for (verb, subresource) in verbs
        .iter()
        .flat_map(|verb| subresources.iter().map(move |one| (verb, one)))
    {
        let what = format!("{who:?} may {verb} nodes/{subresource}");
        wait_for(&what, SOON, async || {
            let subresource = format!("--subresource={subresource}");
            let ask = world.kubectl(["auth", "can-i", *verb, "nodes", &subresource]);
            ask.args(&who).ok().await
        })
        .await?;
    }
    Ok(())
}

async fn finish(world: World) -> anyhow::Result<()> {
    let label = format!("knoc-test={}", world.namespace);
    world
        .kubectl(["delete", "clusterrole,clusterrolebinding", "-l", &label])
        .ok()
        .await?;
    world.finish().await
}

fn subject(account: &ServiceAccount) -> serde_json::Value {
    json!({"kind": "ServiceAccount", "name": account.name_any(), "namespace": account.namespace()})
}

#[tokio::test]
async fn a_client_without_identity_is_answered_401() -> anyhow::Result<()> {
    let world = World::new("access-nobody").await?;
    let kubelet = Kubelet::find(&world).await?;
    let nobody = account(&world, "nobody").await?;
    kubelet.certificate("of-other-ca", &other_ca()?, "system:masters", false)?;
    kubelet.certificate("expired", &cluster_ca()?, "system:masters", true)?;
    let foreign = token(&world, "nobody", &["--audience=vault"]).await?;
    let now = Timestamp::now();
    let ended = signed(&nobody, now - SignedDuration::from_mins(1)).await?;
    for path in ["/healthz", "/pods", "/exec/ns/pod/c", "/nowhere"] {
        for (what, caller) in [
            ("anonymous", Caller::Nobody),
            ("a guess", Caller::Token("guess")),
            ("wrong audience", Caller::Token(&foreign)),
            ("expired token", Caller::Token(&ended)),
            ("another CA", Caller::Certificate("of-other-ca")),
            ("expired certificate", Caller::Certificate("expired")),
        ] {
            let answer = kubelet.ask(caller, "GET", path).await?;
            ensure!(
                answer == (401, "Unauthorized".to_owned()),
                "{what}, {path}: {answer:?}"
            );
        }
    }
    // The same token before its expiry is authenticated, but has no permissions.
    let lives = signed(&nobody, now + SignedDuration::from_mins(30)).await?;
    let answer = kubelet.ask(Caller::Token(&lives), "GET", "/pods").await?;
    let text = format!(
        "Forbidden (user=system:serviceaccount:{}:nobody, verb=get, resource=nodes, subresource(s)=[pods proxy])\n",
        world.namespace
    );
    ensure!(answer == (403, text), "{answer:?}");
    finish(world).await
}

/// An account, its permissions, and the expected answer to each of its requests.
struct Case {
    account: &'static str,
    verbs: &'static [&'static str],
    subresources: &'static [&'static str],
    requests: &'static [(&'static str, &'static str, u16)],
}

const EXEC: &str = "/exec/ns/pod/c?command=id&output=1";

const CASES: [Case; 5] = [
    Case {
        account: "none",
        verbs: &[],
        subresources: &[],
        requests: &[
            ("GET", "/pods", 403),
            ("GET", "/healthz", 403),
            ("GET", EXEC, 403),
        ],
    },
    Case {
        account: "pods",
        verbs: &["get"],
        subresources: &["pods"],
        requests: &[
            ("GET", "/pods", 200),
            ("GET", "/healthz", 403),
            ("GET", "/containerLogs/ns/pod/c", 403),
        ],
    },
    Case {
        account: "healthz",
        verbs: &["get"],
        subresources: &["healthz"],
        requests: &[("GET", "/healthz/ping", 200), ("GET", "/pods", 403)],
    },
    Case {
        account: "proxy",
        verbs: &["get"],
        subresources: &["proxy"],
        requests: &[
            ("GET", "/pods", 200),
            ("GET", "/healthz", 200),
            ("GET", "/containerLogs/ns/pod/c", 404),
            ("GET", EXEC, 403),
            ("POST", EXEC, 403),
            ("POST", "/pods", 403),
            ("GET", "/attach/ns/pod/c", 403),
            ("GET", "/portForward/ns/pod", 403),
            ("GET", "/stats/summary", 403),
        ],
    },
    Case {
        account: "creator",
        verbs: &["create"],
        subresources: &["proxy"],
        requests: &[
            ("GET", EXEC, 404),
            ("POST", EXEC, 404),
            ("GET", "/pods", 403),
        ],
    },
];

#[tokio::test]
async fn rights_are_those_of_the_fine_grained_subresources() -> anyhow::Result<()> {
    let world = World::new("access-rights").await?;
    let kubelet = Kubelet::find(&world).await?;
    for case in &CASES {
        let Case {
            account: name,
            verbs,
            subresources,
            requests,
        } = *case;
        let account = account(&world, name).await?;
        if !verbs.is_empty() {
            grant(&world, subject(&account), verbs, subresources).await?;
        }
        let token = token(&world, name, &[]).await?;
        for (method, path, wanted) in requests {
            let answer = kubelet.ask(Caller::Token(&token), method, path).await?;
            // After authorization, a handler may reject the request for its own reasons.
            let passed = !matches!(answer.0, 401 | 403);
            let fits = if *path == EXEC && *wanted == 404 {
                passed
            } else {
                answer.0 == *wanted
            };
            ensure!(fits, "{name}: {method} {path}: {answer:?}, not {wanted}");
        }
    }
    finish(world).await
}

#[tokio::test]
async fn a_certificate_of_the_clusters_ca_has_the_rights_of_its_group() -> anyhow::Result<()> {
    let world = World::new("access-group").await?;
    let kubelet = Kubelet::find(&world).await?;
    let group = format!("monitors-{}", world.namespace);
    kubelet.certificate("monitor", &cluster_ca()?, &group, false)?;
    kubelet.certificate("admin", &cluster_ca()?, "system:masters", false)?;
    let subject = json!({"kind": "Group", "apiGroup": "rbac.authorization.k8s.io", "name": group});
    grant(&world, subject, &["get"], &["pods"]).await?;
    for (name, path, wanted) in [
        ("monitor", "/pods", 200),
        ("monitor", "/healthz", 403),
        ("admin", "/healthz", 200),
        ("admin", "/nowhere", 404),
    ] {
        let answer = kubelet.ask(Caller::Certificate(name), "GET", path).await?;
        ensure!(
            answer.0 == wanted,
            "{name} {path}: {answer:?}, not {wanted}"
        );
    }
    finish(world).await
}
