//! Requests to a registry: the digest of a name, an image's manifest and config, and its layers.
//!
//! Everything is bounded: the time of a request, the sizes of answers, redirects, and the number of
//! requests in flight, in total and per registry. Everything that has a digest is checked against
//! it. A request carries the credentials of its [`Source`], or the token that the registry's own
//! realm issued for them. The site's library ([`Library`]) is asked by the same rules, with the token of the site.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use http::{HeaderValue, Method, StatusCode, header};
use tokio::time::Instant;

use super::{
    Settings,
    auth::{self, Challenge, MAX_TOKEN, Realm},
    digest::Digest,
    file::ImageFile,
    guard::{self, Url},
    http::{Answer, Client, Request},
    library::{self, Library},
    login::Login,
    manifest::{self, Descriptor, Image, MAX_CONFIG, MAX_MANIFEST, Manifest},
    reference::Source,
    slots::FairSlots,
    untrusted::shown,
};

/// How many short requests (manifests, configs, tokens) may be in flight.
const QUESTIONS: usize = 16;
/// How many of them to one host.
const QUESTIONS_EACH: usize = 4;
/// The largest body of an error response that is read.
const MAX_REASONS: usize = 16 * 1024;
/// How long a registry that demands a password is sent it without being asked.
const BASIC_LIFETIME: Duration = Duration::from_mins(5);
/// How many tokens are kept; if there are more, all are dropped and requested again.
const MAX_TOKENS: usize = 256;
/// How many indexes may lead to an image, one naming the next.
const MAX_INDEXES: usize = 3;
/// The header with the digest of the content.
const CONTENT_DIGEST: header::HeaderName = header::HeaderName::from_static("docker-content-digest");

/// An image that a registry has. Thousands may wait for their pull, so this is small.
#[derive(Debug, Clone)]
pub(super) struct Found {
    /// The digest of the image for this platform.
    pub(super) digest: Digest,
    pub(super) image: Arc<Image>,
}

/// An image's config.
#[derive(Debug)]
pub(super) struct Config {
    /// The text as the registry sent it; its digest was checked.
    pub(super) text: Vec<u8>,
    /// The parsed part that is used.
    pub(super) file: ImageFile,
}

/// What a token is for: the origin, the repository, and whose it is.
type TokenKey = (String, String, Option<Login>);

/// The client of all registries, and of the site's library.
#[derive(Debug)]
pub(super) struct RegistryClient {
    http: Client,
    library: Option<Library>,
    questions: Arc<FairSlots>,
    /// What registries accept, and until when.
    tokens: Mutex<HashMap<TokenKey, (HeaderValue, Instant)>>,
    timeout: Duration,
}

impl RegistryClient {
    pub(super) fn new(settings: &Settings) -> Self {
        Self {
            http: Client::new(settings),
            library: settings.library.clone(),
            questions: FairSlots::new(QUESTIONS, QUESTIONS_EACH),
            tokens: Mutex::default(),
            timeout: settings.registry_timeout,
        }
    }

    /// The digest that a name has now; `None` if the registry does not report it, or returns an
    /// error.
    ///
    /// Registries that count pulls do not count this request. For a name with a digest no request
    /// is made, because the digest cannot change. A library says it with the rest ([`Self::resolve`]).
    pub(super) async fn digest(&self, source: &Source) -> Result<Option<Digest>, String> {
        if let Some(digest) = source.reference.digest() {
            return Ok(Some(digest.clone()));
        }
        if source.reference.in_library() {
            return Ok(None);
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

    /// Finds the image for this platform.
    pub(super) async fn resolve(&self, source: &Source) -> Result<Found, String> {
        let (digest, image) = self.question(source, self.image(source)).await?;
        Ok(Found {
            digest,
            image: Arc::new(image),
        })
    }

    /// Fetches the image's config.
    pub(super) async fn config(&self, source: &Source, image: &Image) -> Result<Config, String> {
        let text = self.question(source, self.config_blob(source, &image.config));
        let text = text.await?;
        let file = ImageFile::of_oci(&text).map_err(|why| describe(source, &why))?;
        Ok(Config { text, file })
    }

    /// Starts the download of a layer.
    pub(super) async fn layer(
        &self,
        source: &Source,
        layer: &Descriptor,
    ) -> Result<Answer, String> {
        let ask = async {
            let path = if source.reference.in_library() {
                "imagefile".to_owned()
            } else {
                format!("blobs/{}", layer.digest)
            };
            let answer = self.ask(source, Method::GET, &path, "*/*").await?;
            let answer = accepted(answer).await?;
            match answer.length() {
                Some(length) if length != layer.size => Err(format!(
                    "layer {} has {length} bytes, but its manifest announces {}",
                    layer.digest, layer.size
                )),
                Some(_) | None => Ok(answer),
            }
        };
        self.in_time(source, ask).await
    }

    /// Checks whether a registry answers; an answer that demands credentials or reports an unknown
    /// image is enough.
    pub(super) async fn answers(&self, source: &Source) -> Result<(), String> {
        let ask = async {
            let request = self.request(source, Method::GET, "", "*/*", None)?;
            self.http.ask(request).await.map(drop)
        };
        self.question(source, ask).await
    }

    async fn image(&self, source: &Source) -> Result<(Digest, Image), String> {
        if source.reference.in_library() {
            return self.in_library(source).await;
        }
        let mut version = source.reference.version();
        let mut named = source.reference.digest().cloned();
        for _ in 0..=MAX_INDEXES {
            let (digest, text) = self.manifest(source, &version, named.as_ref()).await?;
            match manifest::read(&text)? {
                Manifest::Image(image) => {
                    source.reference.fits(image.sif)?;
                    return Ok((digest, image));
                }
                Manifest::Index(digest) => {
                    version = digest.to_string();
                    named = Some(digest);
                }
            }
        }
        Err(format!("more than {MAX_INDEXES} indexes lead to the image"))
    }

    /// The file that the library has under the name.
    async fn in_library(&self, source: &Source) -> Result<(Digest, Image), String> {
        let answer = self.ask(source, Method::GET, "images", "application/json");
        let mut answer = answer.await?;
        let body = answer.whole(library::MAX_ANSWER, "what the library says");
        let body = body.await?;
        if !answer.status.is_success() {
            let said = library::reason(&body);
            return Err(said.unwrap_or_else(|| format!("{} answers {}", answer.url, answer.status)));
        }
        let (digest, image) = library::image(&body)?;
        if let Some(named) = source.reference.digest() {
            named.check(&digest)?;
        }
        Ok((digest, image))
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
            return Err(
                "the size of the image's config differs from the one in its manifest".to_owned(),
            );
        }
        Ok(text)
    }

    /// Makes a short request: waits for a slot, and then applies the deadline to the whole
    /// exchange.
    async fn question<T>(
        &self,
        source: &Source,
        ask: impl Future<Output = Result<T, String>>,
    ) -> Result<T, String> {
        let host = guard::host_of(source.reference.registry());
        let _place = self.questions.acquire(&host).await;
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
            .map_err(|text| describe(source, &text))
    }

    fn request<'a>(
        &self,
        source: &Source,
        method: Method,
        path: &str,
        accept: &'a str,
        authorization: Option<HeaderValue>,
    ) -> Result<Request<'a>, String> {
        let library = self.library.as_ref();
        let library = library.filter(|_| source.reference.in_library());
        let url = if let Some(library) = library {
            Url::parse(&library.url(&source.reference, path))?
        } else {
            let base = guard::base(source.reference.registry(), source.insecure)?;
            let path = match path {
                "" => base.path.clone(),
                path => format!("{}{}/{path}", base.path, source.reference.repository()),
            };
            Url { path, ..base }
        };
        Ok(Request {
            method,
            url,
            accept,
            authorization,
            plain: source.insecure,
        })
    }

    /// Sends a request about a repository, with credentials or a token if they are demanded.
    async fn ask(
        &self,
        source: &Source,
        method: Method,
        path: &str,
        accept: &str,
    ) -> Result<Answer, String> {
        let of_library = source.reference.in_library();
        let known = match &self.library {
            Some(library) if of_library => library.authorization().await?,
            Some(_) | None => self.token(source),
        };
        let first = self.request(source, method.clone(), path, accept, known)?;
        let answer = self.http.ask(first.clone()).await?;
        // Only the registry itself receives credentials, not a server that it redirects to.
        let demanded = answer.status == StatusCode::UNAUTHORIZED;
        if !demanded || of_library || !answer.url.same_origin(&first.url) {
            return Ok(answer);
        }
        let authorization = self.authorize(source, &answer).await?;
        drop(answer);
        let again = self.request(source, method, path, accept, Some(authorization))?;
        self.http.ask(again).await
    }

    fn token_key(source: &Source) -> TokenKey {
        let reference = &source.reference;
        (
            format!("{} {}", source.insecure, reference.registry()),
            reference.repository().to_owned(),
            source.login.clone(),
        )
    }

    fn token(&self, source: &Source) -> Option<HeaderValue> {
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        // The key has a pod's credentials, which must not outlive the token.
        tokens.retain(|_, (_, until)| *until > now);
        let known = tokens.get(&Self::token_key(source));
        known.map(|(bearer, _)| bearer.clone())
    }

    /// What the registry that sent this response demands.
    async fn authorize(
        &self,
        source: &Source,
        unauthorized: &Answer,
    ) -> Result<HeaderValue, String> {
        let headers = unauthorized
            .headers
            .get_all(header::WWW_AUTHENTICATE)
            .iter();
        let challenge = auth::challenge(headers.map(HeaderValue::as_bytes));
        let challenge = challenge.map_err(|why| format!("{}: {why}", unauthorized.url))?;
        match (challenge, &source.login) {
            (Challenge::Bearer(realm), _) => self.fetch_token(source, &realm).await,
            (Challenge::Basic, Some(login)) => {
                self.keep(source, &login.header(), BASIC_LIFETIME);
                Ok(login.header())
            }
            (Challenge::Basic, None) => Err(format!(
                "{}: it demands a user name and a password, and no imagePullSecret of the pod has any for it",
                unauthorized.url
            )),
        }
    }

    async fn fetch_token(&self, source: &Source, challenge: &Realm) -> Result<HeaderValue, String> {
        let scope = format!("repository:{}:pull", source.reference.repository());
        let url = Url::parse(&auth::token_url(challenge, &scope));
        let realm = &challenge.url;
        let url = url.map_err(|why| format!("the token realm {realm:?} is refused: {why}"))?;
        let answer = self.http.ask(Request {
            method: Method::GET,
            url,
            accept: "application/json",
            authorization: source.login.as_ref().map(Login::header),
            plain: source.insecure,
        });
        let failed = |why: String| format!("the token realm: {why}");
        let answer = accepted(answer.await.map_err(failed)?).await;
        let mut answer = answer.map_err(failed)?;
        let body = answer.whole(MAX_TOKEN, "the token").await.map_err(failed)?;
        let token = auth::token(&body).map_err(failed)?;
        self.keep(source, &token.bearer, token.lifetime);
        Ok(token.bearer)
    }

    fn keep(&self, source: &Source, header: &HeaderValue, lifetime: Duration) {
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        if tokens.len() >= MAX_TOKENS {
            tokens.clear();
        }
        let until = Instant::now() + lifetime;
        tokens.insert(Self::token_key(source), (header.clone(), until));
    }
}

/// Returns a successful answer; otherwise the error is the registry's own reasons.
async fn accepted(mut answer: Answer) -> Result<Answer, String> {
    if answer.status.is_success() {
        return Ok(answer);
    }
    let body = answer.whole(MAX_REASONS, "its reason").await;
    let reasons = body.ok().and_then(|body| manifest::reasons(&body));
    Err(reasons.unwrap_or_else(|| format!("{} answers {}", answer.url, answer.status)))
}

fn same(expected: &Digest, content: &[u8]) -> Result<(), String> {
    expected.check(&expected.same_of(content))
}

/// An error message that may contain a registry's text: made safe to show, and prefixed with what
/// it is about.
pub(super) fn describe(source: &Source, text: &str) -> String {
    let (name, safe) = (source.reference.whole(), shown(text));
    // It was described before; or a server knows how that begins, so that it is made safe in any case.
    if safe.starts_with(&name) {
        return safe;
    }
    // The error that rustls reports if the answer is not TLS.
    let plain = !source.insecure && text.contains("InvalidContentType");
    let hint = if plain && source.reference.in_library() {
        " (plain HTTP needs http:// in images.library)"
    } else if plain {
        " (plain HTTP needs insecure = true in [[registry]])"
    } else {
        ""
    };
    format!("{name}: {safe}{hint}")
}
