#!/bin/bash
# Stops the processes that up.sh started, by pid, and no others. Running jobs end with their cluster; jobs of the local
# scheduler continue to their own end. --wipe also removes all state.
. "$(dirname "$0")/lib.sh"
. "$testbed/stack.sh"
export PROFILE=direct # stops the processes however the agent was reached
. "$testbed/profile.sh"
"$testbed/argo.sh" down
[ "$STACK" != full ] || "$testbed/redis.sh" down
"$testbed/kubelet.sh" down
forget_pod_route
for STACK in full slurm local; do STACK=$STACK "$testbed/agent.sh" down; done
stop_other_profiles
for prefix in "$KNOC_BED"/kube*; do KUBE_PREFIX=$prefix "$testbed/kube/proxy.sh" down; KUBE_PREFIX=$prefix "$testbed/kube/stop.sh"; done
# Stops the cluster of any HPC_SUITE.
for prefix in "$KNOC_BED"/hpc* "$HPC_PREFIX"; do [ ! -x "$prefix/bin/hpc" ] || "$prefix/bin/hpc" down; done
[ "${1:-}" = --wipe ] || exit 0
rm -rf --one-file-system "${KNOC_BED:?}"/kube*/run "${KNOC_BED:?}/local" "$run"
for prefix in "$KNOC_BED"/hpc* "$HPC_PREFIX"; do
    rm -rf --one-file-system "${prefix:?}"/nodes/* "$prefix"/shared/images/.*.packed "$prefix"/shared/home/hpcuser/{.config,.local,bin}
done
