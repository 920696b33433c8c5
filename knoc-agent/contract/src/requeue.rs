//! PURE: whether a pod may run again after Slurm has requeued its job. The agent submits the job
//! accordingly, and the shim checks it again before it claims the job directory.

use knoc_proto::pb;

/// The annotation with which a pod asks to be requeued.
const REQUEUE: &str = "knoc.io/requeue";

/// Whether the pod asks to be requeued and its restart policy allows it.
#[must_use]
pub fn may_run_again(spec: &pb::PodSpec) -> bool {
    let asked = spec
        .annotations
        .get(REQUEUE)
        .is_some_and(|value| value == "true");
    asked && spec.restart_policy() != pb::RestartPolicy::Never
}
