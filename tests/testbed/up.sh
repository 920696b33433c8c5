#!/bin/bash
# Brings the stack up and leaves it running; called again, it starts only what does not run.
. "$(dirname "$0")/lib.sh"
. "$testbed/stack.sh"
say "STACK=$STACK ($why)"
[ "$STACK" = local ] || [ "$HPC_SUITE" != bookworm ] \
    || die "HPC_SUITE=bookworm has Slurm 22.05 and no Apptainer: it is for record-slurm.sh alone; trixie and sid run pods"
"$testbed/install.sh"

cluster_up() {
    local other
    for other in "$KNOC_BED"/hpc*/bin/hpc; do # fixed addresses: one cluster a machine
        [ "$other" = "$HPC_PREFIX/bin/hpc" ] || ! "$other" exec ctl true 2>/dev/null || { say "ending the other cluster, $other"; "$other" down; }
    done
    hpc up && "$testbed/hpc/images.sh"
    say "Slurm is up: $(hpc exec login sinfo -V), $(hpc exec login apptainer --version)"
}
control_plane_up() {
    local other
    if [ -z "$given_kubeconfig" ]; then
        for other in "$KNOC_BED"/kube*; do # fixed ports: one control plane a machine, and the kubelet belongs to it
            [ "$other" != "$KUBE_PREFIX" ] && alive "$other/run/kube-apiserver.pid" || continue
            say "ending the other control plane, $other"
            "$testbed/kubelet.sh" down
            KUBE_PREFIX=$other "$testbed/kube/stop.sh"
        done
        "$testbed/kube/start.sh"
    fi
    say "Kubernetes is up: $(kubectl version -o json | jq -r .serverVersion.gitVersion)"
}

jobs=()
[ "$STACK" = local ] || { cluster_up & jobs+=($!); }
[ "$STACK" != full ] || { control_plane_up & jobs+=($!); }
for job in "${jobs[@]}"; do wait "$job"; done
"$testbed/agent.sh" up
say "the agent is up: $(KNOCCTL_CONFIG=$run/knocctl.toml "$KNOC_BIN/knocctl" info 2>/dev/null | head -1)"
[ "$STACK" != full ] || { "$testbed/kubelet.sh" up; say "the kubelet is up: node $node is Ready"; }
say 'ready: eval "$(make -s env)"'
