# Selects the stack and defines its parts. Sourced after lib.sh.
#   full   real Kubernetes, Slurm and Apptainer (root on Linux)
#   slurm  the agent on Slurm and Apptainer, with knocctl (root on Linux)
#   local  the agent with its embedded scheduler, no container runtime, with knocctl (any user)

detect_stack() { # sets STACK and why
    case ${STACK:-} in
    full | slurm | local) why="STACK=$STACK was given" ;;
    '')
        if [ "$(id -u)" != 0 ]; then STACK=local why="without root there is no Slurm cluster to be made"
        elif ! command -v apt-get >/dev/null; then STACK=local why="the Slurm cluster is made of Debian packages, and apt-get is missing"
        elif ! unshare --mount --net --pid --fork true 2>/dev/null; then STACK=local why="this machine forbids namespaces"
        else STACK=full why="root on a Debian machine with namespaces"; fi
        ;;
    *) die "STACK=$STACK: known stacks are full, slurm and local" ;;
    esac
    export STACK
}

# The home of this stack's agent (as the agent sees it, and as this host sees it), and how to run a command there as its user.
locate_agent() {
    if [ "$STACK" = local ]; then
        agent_home=$KNOC_BED/local agent_home_here=$KNOC_BED/local agent_address=127.0.0.1:10350
        as_agent=(env HOME="$agent_home" XDG_RUNTIME_DIR="$agent_home/run" PATH="$agent_home/bin:$PATH")
    else
        agent_home=/home/hpcuser agent_home_here=$HPC_PREFIX/shared/home/hpcuser agent_address=10.77.0.2:10350
        as_agent=("$HPC_PREFIX/bin/hpc" exec "$agent_node" -u hpcuser -e XDG_RUNTIME_DIR=/run/user/2001
            -e PATH=/home/hpcuser/bin:/usr/local/bin:/usr/bin:/bin)
        [ -z "${KNOC_CRASH_AT:-}" ] || as_agent+=(-e "KNOC_CRASH_AT=$KNOC_CRASH_AT")
    fi
}

site=testbed
node=knoc-$site
namespace=knoc-system
registry=ctl:5000
own_kubeconfig=$KUBE_PREFIX/run/admin.kubeconfig
# A given kubeconfig is used instead of starting a control plane; the bed's own ones are those of its versions.
case ${KUBECONFIG:-} in '' | "$KNOC_BED"/kube*/run/admin.kubeconfig) given_kubeconfig= ;; *) given_kubeconfig=$KUBECONFIG ;; esac
export KUBECONFIG=${given_kubeconfig:-$own_kubeconfig}
# Uses the control plane's own kubectl; for a given cluster the machine's kubectl, if there is one.
kubectl() {
    if [ -n "$given_kubeconfig" ]; then command kubectl "$@"; else "$KUBE_PREFIX/bin/kubectl" "$@"; fi
}
agent_node=${KNOC_AGENT_NODE:-login} # the login node that the agent runs on; a profile may name another one
detect_stack
locate_agent
