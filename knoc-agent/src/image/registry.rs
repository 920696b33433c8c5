//! What is asked of a registry: which digest a name has, the image's manifest and config, and its layers.
//!
//! Everything is bounded: a question's time, its answers' sizes, the redirects, and how many questions are in flight,
//! overall and of one registry. Everything that has a digest is compared with it. A question never carries credentials
//! but a token that the registry's own realm gave us for it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::{HeaderValue, Method, StatusCode, header};
use tokio::time::Instant;

use super::Settings;
use super::auth::{self, MAX_TOKEN};
use super::digest::Digest;
use super::file::ImageFile;
use super::guard::{self, Url};
use super::http::{Answer, Client, Request};
use super::manifest::{self, Descriptor, Image, MAX_CONFIG, MAX_MANIFEST, Manifest};
use super::reference::Source;
use super::slots::Slots;
use super::words::shown;

/// Questions in flight, which are short: manifests, configs, tokens.
const QUESTIONS: usize = 16;
/// Of them, to one registry.
const QUESTIONS_EACH: usize = 4;
/// Of the body of a refusal.
const MAX_REASONS: usize = 16 * 1024;
/// Tokens that are kept; when there are more, all are asked for again.
const MAX_TOKENS: usize = 256;
/// The digest of what would be answered.
const CONTENT_DIGEST: header::HeaderName = header::HeaderName::from_static("docker-content-digest");

/// An image as a registry has it. Thousands may wait for their pull, so it is small.
#[derive(Debug, Clone)]
pub(super) struct Found {
    /// Of the image for this platform.
    pub(super) digest: Digest,
    pub(super) image: Arc<Image>,
}

/// What an image says of itself.
#[derive(Debug)]
pub(super) struct Config {
    /// As the registry sent it; its digest was checked.
    pub(super) text: Vec<u8>,
    /// What is used of it.
    pub(super) file: ImageFile,
}

/// Asks registries.
#[derive(Debug)]
pub(super) struct RegistryClient {
    http: Client,
    questions: Arc<Slots>,
    /// By origin and repository.
    tokens: Mutex<HashMap<(String, String), (HeaderValue, Instant)>>,
    timeout: Duration,
}

impl RegistryClient {
    pub(super) fn new(settings: &Settings) -> Self {
        Self {
            http: Client::new(settings),
            questions: Slots::new(QUESTIONS, QUESTIONS_EACH),
            tokens: Mutex::default(),
            timeout: settings.registry_timeout,
        }
    }

    /// The digest that a name has now; `None` if the registry does not say, or refuses.
    ///
    /// Registries that count pulls do not count this question. A name with a digest is not asked about: no registry can
    /// change what it means.
    pub(super) async fn digest(&self, source: &Source) -> Result<Option<Digest>, String> {
        if let Some(digest) = source.reference.digest() {
            return Ok(Some(digest.clone()));
        }
        let ask = async {
            let path = format!("manifests/{}", source.reference.version());
            let answer = self.ask(source, Method::HEAD, &path, manifest::ACCEPT);
            let answer = answer.await?;
            let digest = answer.headers.get(CONTENT_DIGEST);
            let digest = digest.filter(|_| answer.status == StatusCode::OK);
            Ok(digest.and_then(|digest| digest.to_str().ok()?.parse().ok()))
        };
        self.question(source, ask).await
    }

    /// The image for this platform.
    pub(super) async fn resolve(&self, source: &Source) -> Result<Found, String> {
        let (digest, image) = self.question(source, self.image(source)).await?;
        Ok(Found {
            digest,
            image: Arc::new(image),
        })
    }

    /// What the image says of itself.
    pub(super) async fn config(&self, source: &Source, image: &Image) -> Result<Config, String> {
        let text = self.question(source, self.config_blob(source, &image.config));
        let text = text.await?;
        let file = ImageFile::of_oci(&text).map_err(|why| words(source, &why))?;
        Ok(Config { text, file })
    }

    /// A layer, to be read.
    pub(super) async fn layer(
        &self,
        source: &Source,
        layer: &Descriptor,
    ) -> Result<Answer, String> {
        let ask = async {
            let path = format!("blobs/{}", layer.digest);
            let answer = self.ask(source, Method::GET, &path, "*/*").await?;
            let answer = accepted(answer).await?;
            match answer.length() {
                Some(length) if length != layer.size => Err(format!(
                    "layer {} has {length} bytes, and {} by its manifest",
                    layer.digest, layer.size
                )),
                Some(_) | None => Ok(answer),
            }
        };
        self.in_time(source, ask).await
    }

    /// Whether a registry is there: that it wants credentials or lacks something is an answer too.
    pub(super) async fn answers(&self, source: &Source) -> Result<(), String> {
        let ask = async {
            let request = Self::request(source, Method::GET, "", "*/*", None)?;
            self.http.ask(request).await.map(drop)
        };
        self.question(source, ask).await
    }

    async fn image(&self, source: &Source) -> Result<(Digest, Image), String> {
        let version = source.reference.version();
        let named = source.reference.digest();
        let (digest, text) = self.manifest(source, &version, named).await?;
        let digest = match manifest::read(&text)? {
            Manifest::Image(image) => return Ok((digest, image)),
            Manifest::Index(digest) => digest,
        };
        let version = digest.to_string();
        let (digest, text) = self.manifest(source, &version, Some(&digest)).await?;
        match manifest::read(&text)? {
            Manifest::Image(image) => Ok((digest, image)),
            Manifest::Index(_) => Err("the index names another index".to_owned()),
        }
    }

    async fn manifest(
        &self,
        source: &Source,
        version: &str,
        expected: Option<&Digest>,
    ) -> Result<(Digest, Vec<u8>), String> {
        let path = format!("manifests/{version}");
        let answer = self.ask(source, Method::GET, &path, manifest::ACCEPT);
        let mut answer = accepted(answer.await?).await?;
        let text = answer.whole(MAX_MANIFEST, "the manifest").await?;
        let announced = answer.headers.get(CONTENT_DIGEST);
        let announced: Option<Digest> = announced.and_then(|it| it.to_str().ok()?.parse().ok());
        let announced = announced.as_ref();
        for expected in expected.into_iter().chain(announced) {
            same(expected, &text)?;
        }
        let digest = expected.or(announced).cloned();
        Ok((digest.unwrap_or_else(|| Digest::of(&text)), text))
    }

    async fn config_blob(&self, source: &Source, config: &Descriptor) -> Result<Vec<u8>, String> {
        let path = format!("blobs/{}", config.digest);
        let answer = self.ask(source, Method::GET, &path, "*/*").await?;
        let mut answer = accepted(answer).await?;
        let text = answer.whole(MAX_CONFIG, "the image's config").await?;
        same(&config.digest, &text)?;
        if u64::try_from(text.len()).ok() != Some(config.size) {
            return Err("the image's config has another size than its manifest says".to_owned());
        }
        Ok(text)
    }

    /// A short exchange: waits for its turn, then has so much time for all of it.
    async fn question<T>(
        &self,
        source: &Source,
        ask: impl Future<Output = Result<T, String>>,
    ) -> Result<T, String> {
        let _place = self.questions.acquire(source.reference.registry()).await;
        self.in_time(source, ask).await
    }

    async fn in_time<T>(
        &self,
        source: &Source,
        ask: impl Future<Output = Result<T, String>>,
    ) -> Result<T, String> {
        let registry = source.reference.registry();
        let answer = tokio::time::timeout(self.timeout, ask).await;
        let late = |_elapsed| {
            let timeout = self.timeout;
            format!("the registry {registry} did not answer within {timeout:?}")
        };
        answer
            .map_err(late)
            .flatten()
            .map_err(|text| words(source, &text))
    }

    fn request<'a>(
        source: &Source,
        method: Method,
        path: &str,
        accept: &'a str,
        bearer: Option<HeaderValue>,
    ) -> Result<Request<'a>, String> {
        let base = guard::base(source.reference.registry(), source.insecure)?;
        let path = match path {
            "" => base.path.clone(),
            path => format!("{}{}/{path}", base.path, source.reference.repository()),
        };
        Ok(Request {
            method,
            url: Url { path, ..base },
            accept,
            bearer,
            plain: source.insecure,
        })
    }

    /// Asks about a repository, with a token if one is demanded.
    async fn ask(
        &self,
        source: &Source,
        method: Method,
        path: &str,
        accept: &str,
    ) -> Result<Answer, String> {
        let bearer = self.token(source);
        let first = Self::request(source, method.clone(), path, accept, bearer)?;
        let answer = self.http.ask(first.clone()).await?;
        // Only the registry itself is given a token, no place that it redirects to.
        let demanded = answer.status == StatusCode::UNAUTHORIZED;
        if !demanded || !answer.url.same_origin(&first.url) {
            return Ok(answer);
        }
        let bearer = self.fetch_token(source, &answer).await?;
        drop(answer);
        let again = Self::request(source, method, path, accept, Some(bearer))?;
        self.http.ask(again).await
    }

    fn token_key(source: &Source) -> (String, String) {
        let reference = &source.reference;
        (
            format!("{} {}", source.insecure, reference.registry()),
            reference.repository().to_owned(),
        )
    }

    fn token(&self, source: &Source) -> Option<HeaderValue> {
        let tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        let (bearer, until) = tokens.get(&Self::token_key(source))?;
        (*until > Instant::now()).then(|| bearer.clone())
    }

    async fn fetch_token(&self, source: &Source, refused: &Answer) -> Result<HeaderValue, String> {
        let headers = refused.headers.get_all(header::WWW_AUTHENTICATE).iter();
        let challenge = auth::challenge(headers.map(HeaderValue::as_bytes));
        let challenge = challenge.map_err(|why| format!("{}: {why}", refused.url))?;
        let scope = format!("repository:{}:pull", source.reference.repository());
        let url = Url::parse(&auth::token_url(&challenge, &scope));
        let realm = &challenge.realm;
        let url = url.map_err(|why| format!("the token realm {realm:?} is refused: {why}"))?;
        let answer = self.http.ask(Request {
            method: Method::GET,
            url,
            accept: "application/json",
            bearer: None,
            plain: source.insecure,
        });
        let failed = |why: String| format!("the token realm: {why}");
        let answer = accepted(answer.await.map_err(failed)?).await;
        let mut answer = answer.map_err(failed)?;
        let body = answer.whole(MAX_TOKEN, "the token").await.map_err(failed)?;
        let token = auth::token(&body).map_err(failed)?;
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        if tokens.len() >= MAX_TOKENS {
            tokens.clear();
        }
        let until = Instant::now() + token.lifetime;
        tokens.insert(Self::token_key(source), (token.bearer.clone(), until));
        Ok(token.bearer)
    }
}

/// An answer that is a success; else the error is the registry's own reasons.
async fn accepted(mut answer: Answer) -> Result<Answer, String> {
    if answer.status.is_success() {
        return Ok(answer);
    }
    let body = answer.whole(MAX_REASONS, "its reason").await;
    let reasons = body.ok().and_then(|body| manifest::reasons(&body));
    Err(reasons.unwrap_or_else(|| format!("{} answers {}", answer.url, answer.status)))
}

fn same(expected: &Digest, content: &[u8]) -> Result<(), String> {
    let found = expected.same_of(content);
    if found == *expected {
        return Ok(());
    }
    Err(format!(
        "the registry sent another content than it announced: {found} instead of {expected}"
    ))
}

/// What the registry had a hand in, fit to be shown, and what it is about.
pub(super) fn words(source: &Source, text: &str) -> String {
    let name = source.reference.whole();
    if text.starts_with(&name) {
        return text.to_owned();
    }
    // What rustls says to an answer that is no TLS.
    let plain = !source.insecure && text.contains("InvalidContentType");
    let hint = if plain {
        " (plain HTTP needs insecure = true in [[registry]])"
    } else {
        ""
    };
    format!("{name}: {}{hint}", shown(text))
}
