//! Task: jobs whose pod this kubelet process never saw. The slow and careful way to end a job.
//!
//! Only for the same cluster id, only after a live list said that no such pod is on our node, lasting for [`GUARD`]; and more than
//! max(5, 10 %) at once halts: then something is wrong with what we see, not with the jobs.
//! A record whose job has ended (the leftover of a kubelet that died before `ForgetPod`, or whose pod was deleted while
//! none was there) has nothing to end: it goes as soon as the list says so.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::core::v1::Pod;
use knoc_proto::{
    pb::{self, PodPhase},
    reason::ErrorReason,
};
use kube::{Api, api::ListParams};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{controller::Context, store::Uid};

/// How long a job must have been without a pod.
const GUARD: Duration = Duration::from_mins(10);
/// How often we look; soon after the start for what the last process left half done.
const ROUND: Duration = Duration::from_secs(5);
const DEADLINE: Duration = Duration::from_secs(10);

/// PURE: may so many of so many be ended at once?
fn plausible(orphans: usize, all: usize) -> bool {
    orphans <= 5.max(all / 10)
}

/// Looks every few seconds until `shutdown`. `halted` tells the node how many orphans wait for a word of the operator.
pub(crate) async fn run(
    context: Arc<Context>,
    halted: watch::Sender<usize>,
    shutdown: CancellationToken,
) {
    let mut since: HashMap<Uid, Instant> = HashMap::new();
    loop {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(ROUND) => {}
        }
        if !*context.listed.borrow() || !context.link.borrow().is_up() {
            continue;
        }
        forget_leftovers(&context).await;
        let ripe = ripe(&context, &mut since);
        let all = context.store.observed_uids().len();
        if !plausible(ripe.len(), all) {
            tracing::error!(
                orphans = ripe.len(),
                all,
                "too many jobs without a pod at once: none is ended"
            );
            halted.send_replace(ripe.len());
            continue;
        }
        halted.send_replace(0);
        for observed in ripe {
            if is_gone(&context, &observed).await {
                end(&context, &observed).await;
            }
        }
    }
}

/// Records without a pod whose jobs have ended.
async fn forget_leftovers(context: &Context) {
    for observed in strangers(context) {
        if observed.phase() == PodPhase::Finished && is_gone(context, &observed).await {
            end(context, &observed).await;
        }
    }
}

/// What the agent has for this cluster and this process never saw.
fn strangers(context: &Context) -> Vec<Arc<pb::PodObserved>> {
    let unseen = context.store.observed_uids().into_iter();
    let unseen = unseen.filter(|uid| !context.store.was_seen(uid));
    let cluster_id = context.agent.cluster_id();
    unseen
        .filter_map(|uid| context.store.observed(&uid))
        .filter(|observed| observed.cluster_id == cluster_id)
        .collect()
}

/// Those that have been so for long enough.
fn ripe(context: &Context, since: &mut HashMap<Uid, Instant>) -> Vec<Arc<pb::PodObserved>> {
    let now = Instant::now();
    let mut strangers = strangers(context);
    let here: HashSet<Uid> = strangers
        .iter()
        .map(|observed| observed.uid.as_str().into())
        .collect();
    since.retain(|uid, _| here.contains(uid));
    for uid in here {
        since.entry(uid).or_insert(now);
    }
    strangers.retain(|observed| {
        since
            .get(observed.uid.as_str())
            .is_some_and(|at| now.duration_since(*at) >= GUARD)
    });
    strangers
}

/// Does the API server itself say that there is no such pod on this node?
///
/// A list of one: a node may list its own pods, but not get one that is none, so a GET would say 403 where 404 is meant. As
/// current as a GET, since no resource version is named.
async fn is_gone(context: &Context, observed: &pb::PodObserved) -> bool {
    let api: Api<Pod> = Api::namespaced(context.client.clone(), &observed.namespace);
    let fields = format!(
        "metadata.name={},spec.nodeName={}",
        observed.name, context.node
    );
    let params = ListParams::default().fields(&fields);
    match tokio::time::timeout(DEADLINE, api.list(&params)).await {
        Ok(Ok(found)) => found
            .iter()
            .all(|pod| pod.metadata.uid.as_deref() != Some(observed.uid.as_str())),
        Ok(Err(_)) | Err(_) => false,
    }
}

async fn end(context: &Context, observed: &pb::PodObserved) {
    let uid = observed.uid.as_str();
    tracing::warn!(
        uid,
        namespace = observed.namespace,
        name = observed.name,
        "a job without a pod is ended or forgotten"
    );
    let ended = if observed.phase() == PodPhase::Finished {
        context.agent.forget_pod(uid).await
    } else {
        context
            .agent
            .delete_pod(uid, -1, "orphan: no such pod in Kubernetes")
            .await
            .map(drop)
    };
    if let Err(status) = ended
        && ErrorReason::of(&status) != Some(ErrorReason::NotFound)
    {
        let error = knoc_proto::error::chain(&status);
        tracing::warn!(uid, %error, "the orphan could not be ended, trying again");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sudden_desert_is_not_believed() {
        assert!(plausible(5, 5));
        assert!(!plausible(6, 10));
        assert!(plausible(10, 100));
        assert!(!plausible(11, 100));
        assert!(plausible(0, 0));
    }
}
