//! The real kubelet of a site, against the fake API server.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use super::{Daemon, Site, binary};
use crate::{fake_api::FakeApi, ports::free_port, wait_for};

/// The name of the kubelet's node.
pub const NODE: &str = "knoc-test";

/// The API server, and the files that its kubelet needs to start any number of times.
#[derive(Debug)]
pub struct Kubelet {
    /// The fake API server of this kubelet.
    pub api: FakeApi,
    port: u16,
}

impl Kubelet {
    /// Starts the API server and writes certificates and kubeconfig; `start` starts the kubelet.
    pub async fn prepare(site: &Site) -> anyhow::Result<Self> {
        let api = FakeApi::start().await?;
        api.kubeconfig(&site.path("kubeconfig"))?;
        let pair = knoc_link::pki::self_signed("kubelet")?;
        super::write(&site.path("serving.crt"), &pair.cert_pem)?;
        super::write(&site.path("serving.key"), &pair.key_pem)?;
        Ok(Self {
            api,
            port: free_port()?,
        })
    }

    /// The address of the kubelet's API.
    #[must_use]
    pub fn address(&self) -> std::net::SocketAddr {
        super::loopback(self.port)
    }

    /// A client of the kubelet's API, as the API server is one.
    pub fn client(&self, site: &Site) -> anyhow::Result<kube::Client> {
        let mut config = kube::Config::new(format!("https://{}", self.address()).parse()?);
        config.accept_invalid_certs = true;
        let path = |name: &str| site.path(name).display().to_string();
        config.auth_info.client_certificate = Some(path("ctl.crt"));
        config.auth_info.client_key = Some(path("ctl.key"));
        Ok(kube::Client::try_from(config)?)
    }

    /// Starts the kubelet and waits until its Node is Ready, and until it listens: the condition may be that of an earlier
    /// process.
    pub async fn start(&self, site: &Site, env: &[(&str, &str)]) -> anyhow::Result<Daemon> {
        let mut kubelet = self.process(site, env)?;
        wait_for("the node is Ready", super::START, async || {
            kubelet.still_runs()?;
            let node = self
                .api
                .get("v1", "nodes", "", NODE)
                .map_err(|error| error.to_string())?;
            let conditions = node["status"]["conditions"]
                .as_array()
                .cloned()
                .unwrap_or_default();
            let ready = conditions
                .iter()
                .find(|condition| condition["type"] == "Ready");
            match ready {
                Some(condition) if condition["status"] == "True" => Ok(()),
                _ => Err(format!("{conditions:?}")),
            }
        })
        .await
        .with_context(|| site_log(&site.path("kubelet.log")))?;
        wait_for("the kubelet listens", super::START, async || {
            kubelet.still_runs()?;
            let connected = TcpStream::connect(self.address()).await;
            connected.map(drop).map_err(|error| error.to_string())
        })
        .await
        .with_context(|| site_log(&site.path("kubelet.log")))?;
        Ok(kubelet)
    }

    /// Starts the kubelet without waiting.
    pub fn process(&self, site: &Site, env: &[(&str, &str)]) -> anyhow::Result<Daemon> {
        let path = |name: &str| site.path(name).display().to_string();
        let settings = [
            ("KNOC_AGENT_ADDRESS", site.address().to_string()),
            ("KNOC_AGENT_SITE", "test".to_owned()),
            ("KNOC_AGENT_CA", path("ca.crt")),
            ("KNOC_AGENT_CERT", path("kubelet.crt")),
            ("KNOC_AGENT_KEY", path("kubelet.key")),
            ("KNOC_KUBERNETES_KUBECONFIG", path("kubeconfig")),
            ("KNOC_KUBERNETES_NAMESPACE", "default".to_owned()),
            ("KNOC_KUBERNETES_IDENTITY", "test".to_owned()),
            ("KNOC_NODE_NAME", NODE.to_owned()),
            ("KNOC_NODE_INTERNAL_IP", "127.0.0.1".to_owned()),
            ("KNOC_SERVER_CERT", path("serving.crt")),
            ("KNOC_SERVER_KEY", path("serving.key")),
            ("KNOC_SERVER_CLIENT_CA", path("ca.crt")),
            ("KNOC_SERVER_LISTEN", format!("127.0.0.1:{}", self.port)),
        ];
        let mut all: Vec<(&str, &str)> = settings
            .iter()
            .map(|(name, value)| (*name, value.as_str()))
            .collect();
        all.extend_from_slice(env);
        let argv = [binary("knoc-kubelet")?];
        Daemon::start(&argv, &all, Path::new("/"), &site.path("kubelet.log"))
    }

    /// Creates a pod that is already bound to the node; returns its uid.
    pub fn create_pod(&self, name: &str, mut spec: Value) -> anyhow::Result<String> {
        spec["nodeName"] = json!(NODE);
        for (field, value) in [
            ("restartPolicy", json!("Never")),
            ("terminationGracePeriodSeconds", json!(5)),
            ("enableServiceLinks", json!(false)),
            ("serviceAccountName", json!("default")),
            ("dnsPolicy", json!("ClusterFirst")),
            ("schedulerName", json!("default-scheduler")),
        ] {
            if spec.get(field).is_none() {
                spec[field] = value;
            }
        }
        let pod = json!({
            "metadata": {"name": name}, "spec": spec,
            "status": {"phase": "Pending", "qosClass": "BestEffort"},
        });
        let pod = self.api.create("v1", "pods", "default", pod)?;
        Ok(pod["metadata"]["uid"]
            .as_str()
            .unwrap_or_default()
            .to_owned())
    }

    /// Waits until the pod has that phase.
    pub async fn phase(
        &self,
        name: &str,
        phase: &str,
        deadline: Duration,
    ) -> anyhow::Result<Value> {
        wait_for(
            &format!("the pod {name} is {phase}"),
            deadline,
            async || {
                let pod = self
                    .api
                    .get("v1", "pods", "default", name)
                    .map_err(|error| error.to_string())?;
                if pod["status"]["phase"] == phase {
                    Ok(pod)
                } else {
                    Err(pod["status"].to_string())
                }
            },
        )
        .await
    }

    /// Waits until the pod object is gone.
    pub async fn gone(&self, name: &str, deadline: Duration) -> anyhow::Result<()> {
        wait_for(
            &format!("the pod {name} is gone"),
            deadline,
            async || match self.api.get("v1", "pods", "default", name) {
                Ok(pod) => Err(pod.to_string()),
                Err(_) => Ok(()),
            },
        )
        .await
    }
}

fn site_log(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().rev().take(15).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join("\n")
}
