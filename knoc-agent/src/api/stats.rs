//! `GetStats`: selects the pods whose usage is streamed.

use std::{collections::HashSet, sync::Arc};

use futures::Stream;
use knoc_proto::{ids::PodUid, pb};

use crate::{site::Site, stats::Stats};

/// Streams the usage of the running pods in `uids`, or of all running pods if `uids` is empty.
pub(super) fn stream(
    site: &Site,
    stats: &Arc<Stats>,
    uids: &[String],
) -> impl Stream<Item = pb::PodStats> + use<> {
    let (pods, _) = site.board.snapshot();
    let running: Vec<PodUid> = pods
        .iter()
        .filter(|pod| runs(pod.phase()))
        .filter_map(|pod| PodUid::try_from(pod.uid.as_str()).ok())
        .collect();
    stats.retain(&running.iter().cloned().collect::<HashSet<_>>());
    let wanted: HashSet<&str> = uids.iter().map(String::as_str).collect();
    let asked = running
        .into_iter()
        .filter(|uid| wanted.is_empty() || wanted.contains(uid.as_str()));
    let asked = asked.map(|uid| {
        let client = site.shim_links.client(&uid);
        (uid, client)
    });
    stats.of(asked.collect())
}

/// PURE: whether containers may run in this phase.
fn runs(phase: pb::PodPhase) -> bool {
    match phase {
        pb::PodPhase::Running | pb::PodPhase::Stopping | pb::PodPhase::Lost => true,
        pb::PodPhase::Unspecified
        | pb::PodPhase::Accepted
        | pb::PodPhase::Staging
        | pb::PodPhase::Throttled
        | pb::PodPhase::Submitting
        | pb::PodPhase::Queued
        | pb::PodPhase::Finished => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_or_has_ended_uses_nothing() {
        assert!(runs(pb::PodPhase::Running) && runs(pb::PodPhase::Stopping));
        assert!(!runs(pb::PodPhase::Queued) && !runs(pb::PodPhase::Finished));
    }
}
