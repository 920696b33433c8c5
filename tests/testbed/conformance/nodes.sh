#!/bin/bash
# Which compute nodes the suite's pods get: nodes.sh one | exclusive | all.
#   one        Most tests assume that two pods of one Kubernetes node are on one machine: they share a folder below /tmp, collide on a host
#              port, and a pod may ask for most of the node's CPUs. So all compute nodes but the first are drained. Jobs that run there
#              continue.
#              The suite's pods name no memory, so a processor comes with more than the bed's default: the runtime's own processes take
#              25 MB for each container, and some of the pods have three.
#   exclusive  A job gets whole nodes, as many sites have it. Two pods are then on two nodes and have two addresses.
#   all        as it was before, also after an interrupted test that drained nodes (World::away_from)
. "$(dirname "$0")/../lib.sh"
reason=conformance
slurm() { hpc exec ctl "$@"; }
nodes() { slurm sinfo -h -N -o '%N|%E' | sort -u; } # NAME|REASON; the reason of a node that takes jobs is none
update() { # update NODES SETTING…: nothing if there are no NODES
    local list
    list=$(paste -sd, <<<"$1")
    [ -z "$list" ] || slurm scontrol update nodename="$list" "${@:2}"
}
partition() { slurm scontrol update partitionname=main "$@"; }
case ${1:-} in
one)
    partition defmempercpu=256
    update "$(nodes | sed -n '2,$s/|none$//p')" state=drain reason=$reason
    ;;
exclusive) partition oversubscribe=exclusive ;;
all)
    partition oversubscribe=no defmempercpu=100
    update "$(nodes | sed -n "s/|\($reason\|knoc-tests\)$//p")" state=resume
    ;;
*) die "usage: nodes.sh one|exclusive|all" ;;
esac
