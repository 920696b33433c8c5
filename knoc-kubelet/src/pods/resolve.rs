//! Fetches what a pod refers to: ConfigMaps, Secrets, service account tokens, service variables and claims with their volumes.
//!
//! Sends one GET per object, up to [`AT_ONCE`] of a kind at once and a limited number for all pods (see [`room`]), each with a
//! deadline: the kubelet needs only the right to `get`, and the start of a usual pod costs one round trip. A missing object is simply
//! absent from the result; [`knoc_translate::values`] decides whether that matters. Of an object only the keys for which the pod asks
//! are kept, until its values are sent; tokens are kept until they are due to be renewed.

mod room;
mod trust;

pub(crate) use room::Room;
#[cfg(test)]
pub(crate) use room::take_all;

use std::{collections::BTreeMap, time::Duration};

use futures::future::{join_all, try_join_all, try_join3};
use jiff::Timestamp;
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
        core::v1::{
            ConfigMap, PersistentVolume, PersistentVolumeClaim, Pod, Secret, ServiceAccount,
        },
    },
};
use knoc_proto::pb;
use knoc_translate::{FoundClaim, Keys, Needs, Resolved, Token, TokenRequestKey};
use kube::{Api, Client, Resource, api::PostParams};
use serde::de::DeserializeOwned;

use super::{
    references::{Key, Name, Version, list_params},
    services::Services,
};

/// The deadline of each request to the API server.
const DEADLINE: Duration = Duration::from_secs(10);

/// How many objects of one kind are fetched for one pod at once: it may name thousands, whether they exist or not.
const AT_ONCE: usize = 16;
/// The message for a pod with very many large pull secrets.
const TOO_MANY_CREDENTIALS: &str =
    "the image pull secrets of the pod have more than 24 MiB together";

/// The share of a token's lifetime after which it is renewed.
const TOKEN_LIFE: f64 = 0.8;
/// The longest time after which a token is renewed, seconds.
const TOKEN_AGE: i64 = 24 * 3600;
/// How much earlier a token is renewed at most, seconds, so that not all pods renew theirs at once.
const TOKEN_EARLY: i64 = 10;

/// Why something could not be fetched.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ResolveError {
    /// The API server denied the request or failed.
    #[error("get {kind} \"{name}\"")]
    Get {
        /// "configmap", "secret" …
        kind: &'static str,
        /// The object's name.
        name: String,
        /// The error of the API server.
        #[source]
        source: kube::Error,
    },
    /// No token was issued.
    #[error("request a token of service account \"{account}\"")]
    Token {
        /// The service account.
        account: String,
        /// The error of the API server.
        #[source]
        source: kube::Error,
    },
    /// The API server did not answer in time.
    #[error("{what}: no answer from the API server within {} s", DEADLINE.as_secs())]
    Late {
        /// What was requested.
        what: String,
    },
    /// No message has room for what the pod asks for.
    #[error("{0}")]
    TooMuch(&'static str),
    /// It is tried again soon.
    #[error(
        "much is being read for other pods, so there is no room yet for the ConfigMaps and Secrets of this one"
    )]
    Busy,
}

/// A token and when it is due to be renewed.
#[derive(Clone, Debug)]
pub(crate) struct CachedToken {
    token: Token,
    pub(crate) renew_at: Timestamp,
}

/// The tokens that were issued for one pod.
pub(crate) type Tokens = BTreeMap<TokenRequestKey, CachedToken>;

/// Fetches the credentials of pull secrets. Secrets that do not exist are absent from the result.
pub(crate) async fn pull_secrets(
    client: &Client,
    namespace: &str,
    names: &[String],
) -> Result<(BTreeMap<String, Secret>, Room), ResolveError> {
    let (keys, keeping) = (Keys::of_pull_secrets(names), room::Keeping::new());
    let secrets = get_all::<Secret>(client, "secret", namespace, names, |name, secret| {
        keeping.add(keys.trim_secret(name, secret), TOO_MANY_CREDENTIALS)
    });
    let secrets = secrets.await?;
    Ok((secrets, keeping.into_room()))
}

/// Fetches everything that `needs` names, as far as the pod asks for it; the trust bundles once more with their versions, for
/// [`versions`].
pub(crate) async fn resolve(
    client: &Client,
    services: &Services,
    pod: &Pod,
    needs: &Needs,
    allocatable: &pb::Resources,
    tokens: &mut Tokens,
    now: Timestamp,
) -> Result<(Resolved, trust::AllFound, Room), ResolveError> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let due = due(needs, tokens, now);
    let (keys, keeping) = (knoc_translate::keys(pod), room::Keeping::new());
    let keep = |bytes| keeping.add(bytes, knoc_translate::TOO_MUCH);
    let keep_map = |name: &str, map: &mut ConfigMap| keep(keys.trim_config_map(name, map));
    let keep_secret = |name: &str, secret: &mut Secret| keep(keys.trim_secret(name, secret));
    let links = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.enable_service_links)
        .unwrap_or(true);
    let (objects, issued, trust) = try_join3(
        try_join3(
            get_all(client, "configmap", namespace, &needs.config_maps, keep_map),
            get_all(client, "secret", namespace, &needs.secrets, keep_secret),
            async { Ok(services.variables(namespace, links).await) },
        ),
        issue_all(client, pod, &due, now),
        trust::get_all(client, &needs.trust_bundles, &keeping),
    )
    .await?;
    tokens.extend(issued);
    let (config_maps, secrets, services) = objects;
    let certificates = trust.iter();
    let certificates = certificates.map(|(key, found)| (key.clone(), found.certificates.clone()));
    let resolved = Resolved {
        config_maps,
        secrets,
        tokens: tokens
            .iter()
            .map(|(ask, kept)| (ask.clone(), kept.token.clone()))
            .collect(),
        trust_bundles: certificates.collect(),
        services,
        allocatable: allocatable.clone(),
    };
    Ok((resolved, trust, keeping.into_room()))
}

/// Fetches objects. `keep` leaves of each what is needed, and decides whether it can be kept.
async fn get_all<K>(
    client: &Client,
    kind: &'static str,
    namespace: &str,
    names: &[String],
    keep: impl Fn(&str, &mut K) -> Result<(), ResolveError> + Send + Sync,
) -> Result<BTreeMap<String, K>, ResolveError>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + DeserializeOwned
        + std::fmt::Debug,
{
    let api: Api<K> = Api::namespaced(client.clone(), namespace);
    let mut all = BTreeMap::new();
    for some in names.chunks(AT_ONCE) {
        let gets = some.iter().map(|name| {
            let (api, keep) = (api.clone(), &keep);
            async move {
                let _turn = room::turn().await;
                let mut found = get(&api, kind, name).await?;
                if let Some(object) = &mut found {
                    keep(name, object)?;
                }
                Ok::<_, ResolveError>(found.map(|object| (name.clone(), object)))
            }
        });
        let found = try_join_all(gets).await?;
        all.extend(found.into_iter().flatten());
    }
    Ok(all)
}

async fn get<K>(api: &Api<K>, kind: &'static str, name: &str) -> Result<Option<K>, ResolveError>
where
    K: Clone + DeserializeOwned + std::fmt::Debug,
{
    match tokio::time::timeout(DEADLINE, api.get_opt(name)).await {
        Err(_) => Err(ResolveError::Late {
            what: format!("get {kind} \"{name}\""),
        }),
        Ok(Err(source)) => Err(ResolveError::Get {
            kind,
            name: name.to_owned(),
            source,
        }),
        Ok(Ok(found)) => Ok(found),
    }
}

/// Fetches the pod's claims of these names, and the volumes that they name.
pub(crate) async fn claims(
    client: &Client,
    pod: &Pod,
    names: &[String],
) -> Result<BTreeMap<String, FoundClaim>, ResolveError> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let kind = "persistentvolumeclaim";
    let claims: BTreeMap<_, PersistentVolumeClaim> =
        get_all(client, kind, namespace, names, |_, _| Ok(())).await?;
    let volumes: Api<PersistentVolume> = Api::all(client.clone());
    let gets = claims.into_iter().map(|(name, claim)| {
        let volumes = volumes.clone();
        async move {
            let _turn = room::turn().await;
            let spec = claim.spec.as_ref();
            let volume = spec.and_then(|spec| spec.volume_name.clone());
            let volume = match volume.filter(|volume| !volume.is_empty()) {
                Some(volume) => get(&volumes, "persistentvolume", &volume).await?,
                None => None,
            };
            let claim = Some(claim);
            Ok((name, FoundClaim { claim, volume }))
        }
    });
    join_all(gets).await.into_iter().collect()
}

async fn issue_all(
    client: &Client,
    pod: &Pod,
    asks: &[TokenRequestKey],
    now: Timestamp,
) -> Result<Vec<(TokenRequestKey, CachedToken)>, ResolveError> {
    let mut all = Vec::new();
    for some in asks.chunks(AT_ONCE) {
        let issues = some.iter().map(|ask| async move {
            let kept = issue(client, pod, ask, now).await?;
            Ok((ask.clone(), kept))
        });
        let found: Result<Vec<_>, ResolveError> = join_all(issues).await.into_iter().collect();
        all.extend(found?);
    }
    Ok(all)
}

async fn issue(
    client: &Client,
    pod: &Pod,
    ask: &TokenRequestKey,
    now: Timestamp,
) -> Result<CachedToken, ResolveError> {
    let meta = &pod.metadata;
    let spec = pod.spec.as_ref();
    let account = spec.and_then(|spec| spec.service_account_name.clone());
    let account = account.unwrap_or_else(|| "default".to_owned());
    let request = TokenRequest {
        spec: Some(TokenRequestSpec {
            audiences: Some(ask.audience.clone())
                .filter(|text| !text.is_empty())
                .map(|audience| vec![audience]),
            expiration_seconds: Some(ask.expiration),
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Pod".to_owned()),
                name: meta.name.clone(),
                uid: meta.uid.clone(),
            }),
            ..TokenRequestSpec::default()
        }),
        ..TokenRequest::default()
    };
    let namespace = meta.namespace.as_deref().unwrap_or("default");
    let api: Api<ServiceAccount> = Api::namespaced(client.clone(), namespace);
    let params = PostParams::default();
    let answer = api.create_token_request(&account, &params, &request);
    let answer = match tokio::time::timeout(DEADLINE, answer).await {
        Err(_) => {
            return Err(ResolveError::Late {
                what: format!("request a token of \"{account}\""),
            });
        }
        Ok(Err(source)) => return Err(ResolveError::Token { account, source }),
        Ok(Ok(answer)) => answer,
    };
    let status = answer.status.unwrap_or_default();
    let (Some(token), Some(expires)) = (status.token, status.expiration_timestamp) else {
        return Err(ResolveError::Late {
            what: format!("request a token of \"{account}\""),
        });
    };
    let expires = expires.0;
    Ok(CachedToken {
        renew_at: renewal(now, expires, rand::random_range(0..=TOKEN_EARLY)),
        token: Token { token, expires },
    })
}

/// PURE: which of the needed tokens are to be requested at `now`: those that were never issued, and those that are due.
fn due(needs: &Needs, tokens: &Tokens, now: Timestamp) -> Vec<TokenRequestKey> {
    let is_due = |ask: &&TokenRequestKey| tokens.get(*ask).is_none_or(|kept| kept.renew_at <= now);
    needs.tokens.iter().filter(is_due).cloned().collect()
}

/// PURE: when to renew a token that was issued at `now`: after 80 % of its lifetime or a day, less `early` seconds, which are at
/// most a quarter of that time.
fn renewal(now: Timestamp, expires: Timestamp, early: i64) -> Timestamp {
    let life = expires.duration_since(now).as_secs_f64().max(0.0);
    #[expect(
        clippy::cast_possible_truncation,
        reason = "seconds of a token's life, far below 2^53"
    )]
    let seconds = ((life * TOKEN_LIFE) as i64).min(TOKEN_AGE);
    let early = early.min(seconds / 4);
    now.checked_add(jiff::SignedDuration::from_secs(seconds - early))
        .unwrap_or(expires)
}

/// When the tokens are due to be renewed; None if there are none.
pub(crate) fn renew_at(tokens: &Tokens) -> Option<Timestamp> {
    tokens.values().map(|kept| kept.renew_at).min()
}

/// When to read objects again that nothing watches.
pub(crate) fn look_at(now: Timestamp) -> Option<Timestamp> {
    let jittered = jiff::SignedDuration::from_secs(rand::random_range(50..=70i64));
    now.checked_add(jittered).ok()
}

/// The objects that may change, with the versions that were read. The cluster's CA changes only with the cluster, so it
/// is read again together with the token. An immutable object counts if the pod is not `complete`: it may be the one that
/// lacks a key, and then it has to be deleted and created again.
pub(crate) fn versions(
    namespace: &str,
    needs: &Needs,
    resolved: &Resolved,
    trust: &trust::AllFound,
    complete: bool,
) -> BTreeMap<Key, Version> {
    let is_fixed = |immutable: Option<bool>| complete && immutable == Some(true);
    let named = |name: &String| Name {
        namespace: namespace.to_owned(),
        name: name.clone(),
    };
    let maps = needs.config_maps.iter().filter_map(|name| {
        let found = resolved.config_maps.get(name);
        let fixed = found.is_some_and(|map| is_fixed(map.immutable));
        let version = found.and_then(|map| map.metadata.resource_version.clone());
        let changes = !fixed && name != "kube-root-ca.crt";
        changes.then(|| (Key::ConfigMap(named(name)), version))
    });
    let secrets = needs.secrets.iter().filter_map(|name| {
        let found = resolved.secrets.get(name);
        let fixed = found.is_some_and(|secret| is_fixed(secret.immutable));
        let version = found.and_then(|secret| secret.metadata.resource_version.clone());
        (!fixed).then(|| (Key::Secret(named(name)), version))
    });
    let selections = needs.trust_bundles.iter();
    let selections = selections.filter(|key| list_params(key).is_some());
    let selections = selections.map(|key| {
        let version = trust.get(key).and_then(|found| found.version.clone());
        (Key::TrustBundles(key.clone()), version)
    });
    maps.chain(secrets).chain(selections).collect()
}

#[cfg(test)]
mod tests;
