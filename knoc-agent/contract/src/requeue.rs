//! Whether a pod may run again after Slurm has requeued its job. The agent submits the job accordingly, and the shim
//! checks it again before it claims the job directory. PURE.

use knoc_proto::pb;

/// The annotation that asks for it.
const REQUEUE: &str = "knoc.io/requeue";

/// Has the pod asked for it, and does its restart policy allow it?
#[must_use]
pub fn may_run_again(spec: &pb::PodSpec) -> bool {
    let asked = spec
        .annotations
        .get(REQUEUE)
        .is_some_and(|value| value == "true");
    asked && spec.restart_policy() != pb::RestartPolicy::Never
}
