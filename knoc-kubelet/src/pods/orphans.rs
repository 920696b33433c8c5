//! Task: ends jobs whose pod this kubelet process never saw, slowly and carefully.
//!
//! Only records of our cluster id and our node count. A job is ended only if the API server answered a live request
//! with 404 or another UID ([`super::presence`]) and the pod has been missing for [`GUARD`]. If more than max(5, 10 %)
//! of the jobs were to end at once none is ended, since then it is more likely that our view of the cluster is wrong.
//! The operator resolves this with `knocctl delete UID`.
//!
//! A record whose job has ended (because a kubelet died before `ForgetPod`, or because its pod was deleted while no
//! kubelet ran) puts nothing at risk: it is forgotten as soon as the API server confirms that its pod is gone.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use knoc_proto::{
    ids::PodUid,
    pb::{self, PodPhase},
    reason::ErrorReason,
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    controller::Context,
    presence::{self, PodLookup, Presence, plausible},
};

/// How long a job must have been without a pod before it is ended.
const GUARD: Duration = Duration::from_mins(10);
/// How often the records are checked; short, so that what the last process left half done is finished soon.
const ROUND: Duration = Duration::from_secs(5);

/// Checks every few seconds until `shutdown`. `missing` is how many pods a relist lacked implausibly
/// ([`super::watch`]); `halted` tells the node how many jobs, of both kinds, wait for the operator.
pub(crate) async fn run(
    context: Arc<Context>,
    missing: watch::Receiver<usize>,
    halted: watch::Sender<usize>,
    shutdown: CancellationToken,
) {
    let mut since: HashMap<PodUid, Instant> = HashMap::new();
    loop {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(ROUND) => {}
        }
        if !*context.pods.listed.borrow() || !context.site.link.borrow().is_up() {
            continue;
        }
        forget_leftovers(&context).await;
        let overdue = overdue(&context, &mut since);
        let all = ours(&context).len();
        let orphans = if plausible(overdue.len(), all) {
            0
        } else {
            overdue.len()
        };
        let missing = *missing.borrow();
        if halt(&halted, orphans + missing) && orphans + missing > 0 {
            tracing::error!(
                orphans,
                missing,
                all,
                "too many jobs without a pod at once, none is ended; check the cluster, or end single jobs with `knocctl delete UID`"
            );
        }
        if orphans > 0 {
            continue;
        }
        for orphan in overdue {
            if is_gone(&context, &orphan).await {
                end(&context, &orphan).await;
            }
        }
    }
}

/// Forgets the records without a pod whose jobs have ended.
async fn forget_leftovers(context: &Context) {
    for orphan in unseen(context) {
        if orphan.1.phase() == PodPhase::Finished && is_gone(context, &orphan).await {
            end(context, &orphan).await;
        }
    }
}

/// Publishes how many jobs wait for the operator; true if the number changed.
fn halt(halted: &watch::Sender<usize>, jobs: usize) -> bool {
    halted.send_if_modified(|known| std::mem::replace(known, jobs) != jobs)
}

/// PURE: is the record one of a pod of this cluster and this node? The records of older agents do not name the node.
/// Only a GET can tell whether the pod of such a record exists, since it finds the pod on any node.
fn is_ours(observed: &pb::PodObserved, cluster_id: &str, node: &str, ask: PodLookup) -> bool {
    let here =
        observed.node_name == node || (observed.node_name.is_empty() && ask == PodLookup::Get);
    observed.cluster_id == cluster_id && here
}

/// A pod that the agent knows.
type Orphan = (PodUid, Arc<pb::PodObserved>);

/// The agent's records of this cluster and this node.
fn ours(context: &Context) -> Vec<Orphan> {
    let (cluster_id, node) = (context.site.agent.cluster_id(), context.node.name());
    let known = context.pods.store.observed_uids().into_iter();
    known
        .filter_map(|uid| {
            context
                .pods
                .store
                .observed(&uid)
                .map(|observed| (uid, observed))
        })
        .filter(|(_, observed)| is_ours(observed, cluster_id, node, context.api.pod_lookup))
        .collect()
}

/// Those of our records whose pod this process never saw.
fn unseen(context: &Context) -> Vec<Orphan> {
    let mut unseen = ours(context);
    unseen.retain(|(uid, _)| !context.pods.store.has_seen(uid));
    unseen
}

/// Those whose pod has been missing for long enough.
fn overdue(context: &Context, since: &mut HashMap<PodUid, Instant>) -> Vec<Orphan> {
    let now = Instant::now();
    let mut unseen = unseen(context);
    let here: HashSet<PodUid> = unseen.iter().map(|(uid, _)| uid.clone()).collect();
    since.retain(|uid, _| here.contains(uid));
    for uid in here {
        since.entry(uid).or_insert(now);
    }
    unseen.retain(|(uid, _)| {
        since
            .get(uid)
            .is_some_and(|at| now.duration_since(*at) >= GUARD)
    });
    unseen
}

/// Does the API server itself say that the pod does not exist?
async fn is_gone(context: &Context, (uid, observed): &Orphan) -> bool {
    let which = (observed.namespace.as_str(), observed.name.as_str(), uid);
    presence::presence(
        &context.api.client,
        context.api.pod_lookup,
        context.node.name(),
        which,
    )
    .await
        == Presence::Gone
}

async fn end(context: &Context, (uid, observed): &Orphan) {
    tracing::warn!(
        %uid,
        namespace = observed.namespace,
        name = observed.name,
        "ending or forgetting a job without a pod"
    );
    let ended = if observed.phase() == PodPhase::Finished {
        context.site.agent.forget_pod(uid).await
    } else {
        context
            .site
            .agent
            .delete_pod(uid, None, "orphan: no such pod in Kubernetes")
            .await
            .map(drop)
    };
    if let Err(status) = ended
        && ErrorReason::of(&status) != Some(ErrorReason::NotFound)
    {
        let error = knoc_proto::error::chain(&status);
        tracing::warn!(%uid, %error, "could not end or forget a job without a pod, trying again");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_other_nodes_and_clusters_are_not_ours() {
        let record = |cluster: &str, node: &str| pb::PodObserved {
            cluster_id: cluster.to_owned(),
            node_name: node.to_owned(),
            ..pb::PodObserved::default()
        };
        let ours = |record: &pb::PodObserved, ask| is_ours(record, "c", "n", ask);
        for ask in [PodLookup::Get, PodLookup::OwnNode] {
            assert!(ours(&record("c", "n"), ask));
            assert!(!ours(&record("c", "other"), ask));
            assert!(!ours(&record("d", "n"), ask));
            assert!(!ours(&record("", "n"), ask));
        }
        // A record of an older agent: only a GET can tell whether its pod exists.
        assert!(ours(&record("c", ""), PodLookup::Get));
        assert!(!ours(&record("c", ""), PodLookup::OwnNode));
    }

    #[test]
    fn a_halt_is_published_when_it_changes() {
        let (halted, seen) = watch::channel(0);
        assert!(!halt(&halted, 0));
        assert!(halt(&halted, 7));
        assert!(!halt(&halted, 7), "said before");
        assert!(halt(&halted, 8));
        assert_eq!(*seen.borrow(), 8);
        assert!(halt(&halted, 0));
    }
}
