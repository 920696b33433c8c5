#!/bin/bash
# Starts the stack and leaves it running; if called again, starts only the parts that are not running.
. "$(dirname "$0")/lib.sh"
. "$testbed/stack.sh"
. "$testbed/profile.sh"
say "STACK=$STACK ($why), PROFILE=$PROFILE"
[ "$STACK" = local ] || [ "$HPC_SUITE" != bookworm ] \
    || die "HPC_SUITE=bookworm has Slurm 22.05 and no Apptainer and is used only by record-slurm.sh; trixie and sid run pods"
"$testbed/install.sh"

cluster_up() {
    local other
    for other in "$KNOC_BED"/hpc*/bin/hpc; do # addresses are fixed: one cluster per machine
        [ "$other" = "$HPC_PREFIX/bin/hpc" ] || ! "$other" exec ctl true 2>/dev/null || { say "stopping the other cluster, $other"; "$other" down; }
    done
    hpc up && "$testbed/hpc/images.sh"
    say "Slurm is up: $(hpc exec login sinfo -V), $(hpc exec login apptainer --version)"
}
control_plane_up() {
    local other
    if [ -z "$given_kubeconfig" ]; then
        for other in "$KNOC_BED"/kube*; do # ports are fixed: one control plane per machine, with its kubelet
            [ "$other" != "$KUBE_PREFIX" ] && alive "$other/run/kube-apiserver.pid" || continue
            say "stopping the other control plane, $other"
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
if [ "$STACK" != local ]; then
    [ "$(cat "$run/profile-agent" 2>/dev/null || echo direct)" = "$PROFILE" ] || "$testbed/agent.sh" down
    stop_other_profiles
    profile_network
fi
"$testbed/agent.sh" up
say "the agent is up: $(KNOCCTL_CONFIG=$run/knocctl.toml "$KNOC_BIN/knocctl" info 2>/dev/null | head -1)"
[ "$STACK" != full ] || { "$testbed/kubelet.sh" up; say "the kubelet is up: node $node is Ready"; }
say 'ready: eval "$(make -s env)"'
