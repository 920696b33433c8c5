#!/bin/bash
# Ends what up.sh started, by pid, and nothing else. Jobs that run end with their cluster. --wipe forgets all state too.
. "$(dirname "$0")/lib.sh"
. "$testbed/stack.sh"
"$testbed/kubelet.sh" down
for STACK in full slurm local; do STACK=$STACK "$testbed/agent.sh" down; done
"$testbed/kube/stop.sh"
[ ! -x "$HPC_PREFIX/bin/hpc" ] || hpc down
[ "${1:-}" = --wipe ] || exit 0
rm -rf --one-file-system "${KUBE_PREFIX:?}/run" "${KNOC_BED:?}/local" "${HPC_PREFIX:?}"/nodes/* "$HPC_PREFIX"/shared/images/.*.packed \
    "$HPC_PREFIX"/shared/home/hpcuser/{.config,.local,bin} "$run"
