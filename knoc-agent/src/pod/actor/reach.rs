//! What the tasks that bring something to a running shim have in common.

use std::time::Duration;

use knoc_proto::ids::PodUid;

use crate::{shim_links::Client, shim_steps::Use, site::Site};

/// The first and the longest pause after an image could not be found, as in Kubernetes.
pub(super) const IMAGE_AGAIN: [Duration; 2] = [Duration::from_secs(10), Duration::from_mins(5)];
/// The first and the longest pause after the shim did not take something.
pub(super) const GIVE_AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_mins(1)];

/// The pause before the next try; none before the first one.
pub(super) fn pause(tries: u32, [first, longest]: [Duration; 2]) -> Duration {
    let Some(earlier) = tries.checked_sub(1) else {
        return Duration::ZERO;
    };
    let pause = first.saturating_mul(1 << earlier.min(10)).min(longest);
    pause.mul_f64(rand::random_range(0.75..1.25))
}

/// The shim of a pod, if it can do that. If compute nodes cannot reach the agent, a job step carries the link while the
/// second value, if there is one, is held.
pub(super) async fn client(
    site: &Site,
    uid: &PodUid,
    capability: &'static str,
) -> Result<(Client, Option<Use>), String> {
    let text = |status: tonic::Status| status.message().to_owned();
    let used = match site.shim_links.client(uid) {
        Some(_) => site.shim_steps.held(uid),
        None => site.shim_steps.reach(uid).await.map_err(text)?,
    };
    let able = site.shim_links.able(uid, capability);
    let no_link = || {
        Err(tonic::Status::unavailable(
            "the shim has no link to the agent now",
        ))
    };
    Ok((able.unwrap_or_else(no_link).map_err(text)?, used))
}
