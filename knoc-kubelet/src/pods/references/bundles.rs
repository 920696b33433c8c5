//! The watch of the `ClusterTrustBundles` that a projection selects: one by its name, or all of a signer with certain labels.
//!
//! Several objects have no version together, and a watch does not tell where the objects end that exist already. So a session lists
//! them, compares what stands for all their versions with what was read, and watches from the version of the list: every event
//! after it is a change.

use futures::StreamExt as _;
use k8s_openapi::{
    ClusterResourceScope,
    api::certificates::{v1, v1beta1},
};
use knoc_translate::TrustBundleKey;
use kube::{
    Api, Resource,
    api::{ListParams, WatchEvent, WatchParams},
};
use serde::de::DeserializeOwned;

use super::{ASK, End, Watch, failed, version_of_all};

/// How many bundles of a signer are read at most.
const BUNDLES: u32 = 500;

/// What a projection selects, as the API server reads it: the selectors of fields and of labels.
type Selectors = (String, Option<String>);

/// PURE: the selectors; None if nothing is selected, whatever there is.
fn selectors(selected: &TrustBundleKey) -> Option<Selectors> {
    match selected {
        TrustBundleKey::Named(name) => Some((format!("metadata.name={name}"), None)),
        TrustBundleKey::Signed { labels: None, .. } => None,
        TrustBundleKey::Signed {
            signer,
            labels: Some(labels),
        } => {
            let labels = Some(labels.clone()).filter(|labels| !labels.is_empty());
            Some((format!("spec.signerName={signer}"), labels))
        }
    }
}

/// PURE: the query that lists what a projection selects; None if it selects nothing, whatever there is.
pub(crate) fn list_params(selected: &TrustBundleKey) -> Option<ListParams> {
    let (fields, labels) = selectors(selected)?;
    let only = ListParams::default().fields(&fields).limit(BUNDLES);
    Some(match labels {
        Some(labels) => only.labels(&labels),
        None => only,
    })
}

fn watch_params(selected: &TrustBundleKey) -> Option<WatchParams> {
    let (fields, labels) = selectors(selected)?;
    let only = WatchParams::default().fields(&fields);
    Some(match labels {
        Some(labels) => only.labels(&labels),
        None => only,
    })
}

impl Watch {
    /// A session with the version of the API that the cluster has.
    pub(super) async fn bundles(
        &self,
        selected: &TrustBundleKey,
        resume: &mut Option<String>,
    ) -> End {
        let end = self
            .bundles_as::<v1::ClusterTrustBundle>(selected, resume)
            .await;
        if !matches!(end, End::Unknown) {
            return end;
        }
        self.bundles_as::<v1beta1::ClusterTrustBundle>(selected, resume)
            .await
    }

    async fn bundles_as<K>(&self, selected: &TrustBundleKey, resume: &mut Option<String>) -> End
    where
        K: Resource<DynamicType = (), Scope = ClusterResourceScope>
            + Clone
            + DeserializeOwned
            + std::fmt::Debug,
    {
        let (Some(list), Some(watch)) = (list_params(selected), watch_params(selected)) else {
            return End::Unknown;
        };
        let api: Api<K> = Api::all(self.client.clone());
        let from = match resume.clone() {
            Some(from) => from,
            None => match self.list(&api, &list).await {
                Ok(from) => from,
                Err(end) => return end,
            },
        };
        let events = match api.watch_metadata(&watch, &from).await {
            Ok(events) => events,
            Err(error) => return ended(&error),
        };
        *resume = Some(from);
        self.references.state().set_watched(self.which(), true);
        let mut events = std::pin::pin!(events);
        while let Some(event) = events.next().await {
            let object = match event {
                Err(error) => return ended(&error),
                Ok(WatchEvent::Error(status)) if status.code == 410 => return End::TooOld,
                Ok(WatchEvent::Error(status)) => return End::Failed(status.message),
                Ok(WatchEvent::Bookmark(bookmark)) => {
                    *resume = Some(bookmark.metadata.resource_version);
                    continue;
                }
                Ok(
                    WatchEvent::Added(object)
                    | WatchEvent::Modified(object)
                    | WatchEvent::Deleted(object),
                ) => object,
            };
            if object.metadata.resource_version.is_some() {
                *resume = object.metadata.resource_version;
            }
            self.doubted();
        }
        End::Closed
    }

    /// Compares what there is with what was read; returns the version from which a watch goes on.
    async fn list<K>(&self, api: &Api<K>, only: &ListParams) -> Result<String, End>
    where
        K: Clone + DeserializeOwned + std::fmt::Debug,
    {
        let listed = tokio::time::timeout(ASK, api.list_metadata(only)).await;
        let listed = listed.map_err(|_| End::Failed("the list is late".to_owned()))?;
        let listed = listed.map_err(|error| ended(&error))?;
        let all = listed.items.iter().map(|object| &object.metadata);
        self.observed(version_of_all(all));
        let version = listed.metadata.resource_version;
        version.ok_or_else(|| End::Failed("the list has no version".to_owned()))
    }
}

/// As [`failed`]; a cluster without this version of the API does not find it.
fn ended(error: &kube::Error) -> End {
    if let kube::Error::Api(status) = error
        && status.code == 404
    {
        return End::Unknown;
    }
    failed(error)
}
