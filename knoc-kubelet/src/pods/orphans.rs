//! Task: jobs whose pod this kubelet process never saw. The slow and careful way to end a job.
//!
//! Only records of our cluster id and our node, only after a live question was answered by 404 or another UID
//! ([`super::presence`]), lasting for [`GUARD`]; and more than max(5, 10 %) at once halts: then something is wrong with what we
//! see, not with the jobs. The way out is the operator's: `knocctl delete UID` ends a job, and what has ended is no danger.
//! A record whose job has ended (the leftover of a kubelet that died before `ForgetPod`, or whose pod was deleted while
//! none was there) has nothing to end: it goes as soon as the list says so.

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
    presence::{self, Ask, Presence, plausible},
};

/// How long a job must have been without a pod.
const GUARD: Duration = Duration::from_mins(10);
/// How often we look; soon after the start for what the last process left half done.
const ROUND: Duration = Duration::from_secs(5);

/// Looks every few seconds until `shutdown`. `missing` is how many pods a relist lacked implausibly
/// ([`super::watch`]); `halted` tells the node of both, the jobs that wait for a word of the operator.
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
        let ripe = ripe(&context, &mut since);
        let all = ours(&context).len();
        let orphans = if plausible(ripe.len(), all) {
            0
        } else {
            ripe.len()
        };
        let missing = *missing.borrow();
        if halt(&halted, orphans + missing) && orphans + missing > 0 {
            tracing::error!(
                orphans,
                missing,
                all,
                "too many jobs without a pod at once: none is ended; `knocctl delete UID` ends one"
            );
        }
        if orphans > 0 {
            continue;
        }
        for orphan in ripe {
            if is_gone(&context, &orphan).await {
                end(&context, &orphan).await;
            }
        }
    }
}

/// Records without a pod whose jobs have ended.
async fn forget_leftovers(context: &Context) {
    for orphan in strangers(context) {
        if orphan.1.phase() == PodPhase::Finished && is_gone(context, &orphan).await {
            end(context, &orphan).await;
        }
    }
}

/// Says how many jobs wait for the operator; true where that is news.
fn halt(halted: &watch::Sender<usize>, jobs: usize) -> bool {
    halted.send_if_modified(|known| std::mem::replace(known, jobs) != jobs)
}

/// PURE: is the record one of a pod of this cluster and this node? Of an older agent, which does not say the node, only a GET
/// can tell whether the pod is there, wherever it was.
fn is_ours(observed: &pb::PodObserved, cluster_id: &str, node: &str, ask: Ask) -> bool {
    let here = observed.node_name == node || (observed.node_name.is_empty() && ask == Ask::Get);
    observed.cluster_id == cluster_id && here
}

/// A pod that the agent knows.
type Orphan = (PodUid, Arc<pb::PodObserved>);

/// What the agent has for this cluster and this node.
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
        .filter(|(_, observed)| is_ours(observed, cluster_id, node, context.api.ask))
        .collect()
}

/// Those of ours that this process never saw.
fn strangers(context: &Context) -> Vec<Orphan> {
    let mut strangers = ours(context);
    strangers.retain(|(uid, _)| !context.pods.store.was_seen(uid));
    strangers
}

/// Those that have been so for long enough.
fn ripe(context: &Context, since: &mut HashMap<PodUid, Instant>) -> Vec<Orphan> {
    let now = Instant::now();
    let mut strangers = strangers(context);
    let here: HashSet<PodUid> = strangers.iter().map(|(uid, _)| uid.clone()).collect();
    since.retain(|uid, _| here.contains(uid));
    for uid in here {
        since.entry(uid).or_insert(now);
    }
    strangers.retain(|(uid, _)| {
        since
            .get(uid)
            .is_some_and(|at| now.duration_since(*at) >= GUARD)
    });
    strangers
}

/// Does the API server itself say that there is no such pod?
async fn is_gone(context: &Context, (uid, observed): &Orphan) -> bool {
    let which = (observed.namespace.as_str(), observed.name.as_str(), uid);
    presence::presence(
        &context.api.client,
        context.api.ask,
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
        "a job without a pod is ended or forgotten"
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
        tracing::warn!(%uid, %error, "the orphan could not be ended, trying again");
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
        for ask in [Ask::Get, Ask::OwnNode] {
            assert!(ours(&record("c", "n"), ask));
            assert!(!ours(&record("c", "other"), ask));
            assert!(!ours(&record("d", "n"), ask));
            assert!(!ours(&record("", "n"), ask));
        }
        // Of an older agent: only a GET can say something about it.
        assert!(ours(&record("c", ""), Ask::Get));
        assert!(!ours(&record("c", ""), Ask::OwnNode));
    }

    #[test]
    fn a_halt_is_told_when_it_changes() {
        let (halted, seen) = watch::channel(0);
        assert!(!halt(&halted, 0));
        assert!(halt(&halted, 7));
        assert!(!halt(&halted, 7), "said before");
        assert!(halt(&halted, 8));
        assert_eq!(*seen.borrow(), 8);
        assert!(halt(&halted, 0));
    }
}
