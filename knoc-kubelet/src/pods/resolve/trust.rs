//! Fetches `ClusterTrustBundles`, whose API a cluster may have in one of two versions, or not at all.

use std::collections::{BTreeMap, BTreeSet};

use futures::future::try_join_all;
use k8s_openapi::{
    ClusterResourceScope,
    api::certificates::{v1, v1beta1},
};
use knoc_translate::TrustBundleKey;
use kube::{Api, Client, Resource};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use serde::de::DeserializeOwned;

use super::{
    AT_ONCE, DEADLINE, ResolveError,
    room::{self, Keeping},
};
use crate::pods::references::{Version, list_params, version_of_all};

/// The characters of a line of PEM.
const LINE: usize = 64;

/// A version of the API.
trait Bundle:
    Resource<DynamicType = (), Scope = ClusterResourceScope>
    + Clone
    + DeserializeOwned
    + std::fmt::Debug
{
    fn certificates(&self) -> &str;
}

/// What a projection selects.
#[derive(Debug)]
pub(crate) struct Found {
    /// The certificates of all that it selects.
    pub(super) certificates: String,
    pub(super) version: Version,
}

/// What each projection selects; one that selects nothing is absent.
pub(crate) type AllFound = BTreeMap<TrustBundleKey, Found>;

impl Bundle for v1::ClusterTrustBundle {
    fn certificates(&self) -> &str {
        &self.spec.trust_bundle
    }
}

impl Bundle for v1beta1::ClusterTrustBundle {
    fn certificates(&self) -> &str {
        &self.spec.trust_bundle
    }
}

/// What each key selects.
pub(super) async fn get_all(
    client: &Client,
    keys: &[TrustBundleKey],
    keeping: &Keeping,
) -> Result<AllFound, ResolveError> {
    let mut all = AllFound::new();
    for some in keys.chunks(AT_ONCE) {
        let gets = some.iter().map(|key| async move {
            let _turn = room::turn().await;
            let mut found = get::<v1::ClusterTrustBundle>(client, key).await?;
            if found.is_none() {
                found = get::<v1beta1::ClusterTrustBundle>(client, key).await?;
            }
            // Many selections may have the same bundles.
            if let Some(found) = &found {
                keeping.add(found.certificates.len(), knoc_translate::TOO_MUCH)?;
            }
            Ok::<_, ResolveError>(found.map(|found| (key.clone(), found)))
        });
        let found = try_join_all(gets).await?;
        all.extend(found.into_iter().flatten());
    }
    Ok(all)
}

/// What the key selects; None if that is nothing, or if the cluster does not have this version of the API.
async fn get<K: Bundle>(
    client: &Client,
    key: &TrustBundleKey,
) -> Result<Option<Found>, ResolveError> {
    match tokio::time::timeout(DEADLINE, select::<K>(client, key)).await {
        Err(_) => Err(ResolveError::Late {
            what: format!("get {key}"),
        }),
        Ok(Err(source)) => Err(ResolveError::Get {
            kind: "clustertrustbundle",
            name: key.to_string(),
            source,
        }),
        Ok(Ok(found)) => {
            let version = version_of_all(found.iter().map(Resource::meta));
            Ok(version.map(|version| Found {
                certificates: together(found.iter().map(Bundle::certificates)),
                version: Some(version),
            }))
        }
    }
}

async fn select<K: Bundle>(client: &Client, key: &TrustBundleKey) -> kube::Result<Vec<K>> {
    let api: Api<K> = Api::all(client.clone());
    match key {
        TrustBundleKey::Named(name) => {
            let found = api.get_opt(name).await?;
            Ok(found.into_iter().collect())
        }
        TrustBundleKey::Signed { .. } => {
            let Some(only) = list_params(key) else {
                return Ok(Vec::new());
            };
            match api.list(&only).await {
                Ok(list) => Ok(list.items),
                Err(kube::Error::Api(status)) if status.code == 404 => Ok(Vec::new()),
                Err(error) => Err(error),
            }
        }
    }
}

/// PURE: the certificates of all bundles, each once. The order means nothing, so it is one that does not change.
fn together<'a>(bundles: impl Iterator<Item = &'a str>) -> String {
    let certificates: BTreeSet<Vec<u8>> = bundles
        .flat_map(|bundle| CertificateDer::pem_slice_iter(bundle.as_bytes()))
        .filter_map(Result::ok)
        .map(|certificate| certificate.to_vec())
        .collect();
    certificates.iter().map(|one| pem(one)).collect()
}

fn pem(certificate: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(certificate);
    let mut pem = "-----BEGIN CERTIFICATE-----\n".to_owned();
    for (at, letter) in text.chars().enumerate() {
        if at > 0 && at % LINE == 0 {
            pem.push('\n');
        }
        pem.push(letter);
    }
    pem.push_str("\n-----END CERTIFICATE-----\n");
    pem
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_certificate_is_in_the_file_once_and_without_what_surrounds_it() {
        let one = pem(&[1; 60]);
        let two = pem(&[2; 3]);
        let bundles = [format!("# a comment\n{two}{one}"), one.clone()];
        let bundles = bundles.iter().map(String::as_str);
        assert_eq!(together(bundles), format!("{one}{two}"));
        let longest = one.lines().map(str::len).max();
        assert_eq!(longest, Some(LINE));
        assert_eq!(together(std::iter::once("no certificate")), "");
    }
}
