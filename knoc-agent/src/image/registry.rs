//! What is asked of a registry: which digest a name has, and the image's config. No layers.

use std::sync::Arc;

use oci_client::client::{Client, ClientConfig, ClientProtocol, linux_amd64_resolver};
use oci_client::errors::OciDistributionError;
use oci_client::secrets::RegistryAuth;

use super::Settings;
use super::cache::ImageFile;
use super::reference::Source;

const USER_AGENT: &str = concat!("knoc-agent/", env!("CARGO_PKG_VERSION"));

/// One client for TLS, one for plain HTTP: they keep connections and tokens.
#[derive(Clone)]
pub(super) struct RegistryClient {
    secure: Arc<Client>,
    insecure: Arc<Client>,
    timeout: std::time::Duration,
}

impl std::fmt::Debug for RegistryClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegistryClient")
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

impl RegistryClient {
    pub(super) fn new(settings: &Settings) -> Self {
        // oci-client is built without a TLS provider of its own. A second installation is refused,
        // and the first one is ring too.
        rustls::crypto::ring::default_provider()
            .install_default()
            .ok();
        let client = |protocol| {
            let proxy = |name: &str| {
                let lower = settings.env.get(&name.to_lowercase());
                settings
                    .env
                    .get(name)
                    .or(lower)
                    .filter(|value| !value.is_empty())
                    .cloned()
            };
            Arc::new(Client::new(ClientConfig {
                protocol,
                platform_resolver: Some(Box::new(linux_amd64_resolver)),
                connect_timeout: Some(settings.registry_timeout),
                read_timeout: Some(settings.registry_timeout),
                user_agent: USER_AGENT,
                https_proxy: proxy("HTTPS_PROXY"),
                http_proxy: proxy("HTTP_PROXY"),
                no_proxy: proxy("NO_PROXY"),
                ..ClientConfig::default()
            }))
        };
        Self {
            secure: client(ClientProtocol::Https),
            insecure: client(ClientProtocol::Http),
            timeout: settings.registry_timeout,
        }
    }

    /// Digest of the image for this platform, and its config.
    pub(super) async fn resolve(&self, source: &Source) -> Result<(String, ImageFile), String> {
        let client = if source.insecure {
            &self.insecure
        } else {
            &self.secure
        };
        let ask = client.pull_manifest_and_config(&source.reference, &RegistryAuth::Anonymous);
        let answer = tokio::time::timeout(self.timeout, ask).await;
        let answer = answer.map_err(|_elapsed| {
            let registry = source.reference.resolve_registry();
            format!(
                "the registry {registry} did not answer within {:?}",
                self.timeout
            )
        })?;
        let (_manifest, digest, config) = answer.map_err(|err| words(source, &err))?;
        let config = ImageFile::of_oci(&config).map_err(|err| format!("its config: {err}"))?;
        Ok((digest, config))
    }
}

impl RegistryClient {
    /// Whether a registry is there: that it lacks the image is an answer too.
    pub(super) async fn answers(&self, source: &Source) -> Result<(), String> {
        let client = if source.insecure {
            &self.insecure
        } else {
            &self.secure
        };
        let ask = client.fetch_manifest_digest(&source.reference, &RegistryAuth::Anonymous);
        match tokio::time::timeout(self.timeout, ask).await {
            Err(_elapsed) => Err(format!("no answer within {:?}", self.timeout)),
            Ok(Err(err @ OciDistributionError::RequestError(_))) => Err(words(source, &err)),
            Ok(Ok(_) | Err(_)) => Ok(()),
        }
    }
}

/// The registry's own words, and what they are about.
fn words(source: &Source, err: &OciDistributionError) -> String {
    let name = source.reference.whole();
    let text = if let OciDistributionError::RegistryError { envelope, .. } = err {
        let words: Vec<&str> = envelope
            .errors
            .iter()
            .map(|error| error.message.as_str())
            .collect();
        words.join("; ")
    } else {
        knoc_proto::error::chain(err)
    };
    // What rustls says to an answer that is no TLS.
    let plain = !source.insecure && text.contains("InvalidContentType");
    let hint = if plain {
        " (plain HTTP needs insecure = true in [[registry]])"
    } else {
        ""
    };
    format!("{name}: {text}{hint}")
}
