#!/bin/bash
# Ends what up.sh started, by pid, and nothing else. Jobs that run end with their cluster; those of the
# local scheduler go on to their own end, as jobs do. --wipe forgets all state too.
. "$(dirname "$0")/lib.sh"
. "$testbed/stack.sh"
"$testbed/kubelet.sh" down
for STACK in full slurm local; do STACK=$STACK "$testbed/agent.sh" down; done
for prefix in "$KNOC_BED"/kube*; do KUBE_PREFIX=$prefix "$testbed/kube/stop.sh"; done
[ ! -x "$HPC_PREFIX/bin/hpc" ] || hpc down
[ "${1:-}" = --wipe ] || exit 0
rm -rf --one-file-system "${KNOC_BED:?}"/kube*/run "${KNOC_BED:?}/local" "${HPC_PREFIX:?}"/nodes/* "$HPC_PREFIX"/shared/images/.*.packed \
    "$HPC_PREFIX"/shared/home/hpcuser/{.config,.local,bin} "$run"
