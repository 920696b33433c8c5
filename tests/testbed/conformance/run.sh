#!/bin/bash
# Runs the upstream end-to-end suite against the stack that is up: run.sh [OPTION…] LIST…, as tests/src/bin/knoc-conformance.rs says.
# The suite counts a tainted node as no node, so the kubelet runs without its taint meanwhile. Some of its pods ask for privileges that
# they need only on SELinux hosts: the site allows them, without the privileges. Some mount folders below /tmp of the node, and one has a
# host port: the site allows those too. Some reach Services that they have made: cluster and site list all of them, and CoreDNS knows their
# names. The Kubernetes node offers no more than the compute nodes have, and of these one takes jobs, or with NODES=exclusive each job gets
# one (nodes.sh). Pods have the address of their compute node as status.podIP, unless KNOC_NODE_POD_IP says otherwise, so that Services have
# endpoints; the relay, which needs pods without an address, is then off. KNOC_NODE_POD_IP=own also needs KNOC_NODE_POD_RANGE; the kubelet
# then listens at the addresses of pods (kubelet.sh), so the API server reaches them. With
# NETWORK=host pods are in the networks of the compute nodes. The API server does not reach them there either: the control plane of this bed
# has no route to the compute nodes, and an ordinary user may not listen on the ports below 1024 there.
. "$(dirname "$0")/../lib.sh"
. "$testbed/stack.sh"
[ "$STACK" = full ] || die "the conformance suite needs STACK=full (STACK=$STACK: $why)"
"$testbed/kube/setup.sh" conformance
"$testbed/conformance/images.sh"
trim_go_cache
repositories=$run/conformance-repositories.yaml
printf 'promoterE2eRegistry: %s/e2e-test-images\ngcRegistry: %s\n' $registry $registry >"$repositories"
export KUBE_TEST_REPO_LIST=$repositories KNOC_REGISTRY=$registry
kubelet() { "$testbed/kubelet.sh" down; env "$@" "$testbed/kubelet.sh" up; } # kubelet SETTING=VALUE…: starts it again with these settings
policy() { # policy LINE…: replaces these settings of the policy; the agent reads them again by itself
    local lines=
    [ $# = 0 ] || lines=$(printf '\\n%s' "$@")
    sed -i -e '/^privileged *=/d; /^host_paths *=/d; /^host_ports *=/d; /^egress *=/d' -e "s|^\[policy\]$|&$lines|" "$agent_home_here/.config/knoc/agent.toml"
}
network() { # network [MODE]: the network of pods that ask for none, or that of the bed
    local file=$agent_home_here/.config/knoc/agent.toml
    [ -n "${1:-}" ] || grep -q '^network = ' "$file" || return 0
    sed -i -e '/^network = /d' -e "s|^\[job\]$|&${1:+\\nnetwork = \"$1\"}|" "$file"
    "$testbed/agent.sh" down
    "$testbed/agent.sh" up
}
egress=$(sed -n '/^egress *=/p' "$agent_home_here/.config/knoc/agent.toml") # what the site lists otherwise
# If this script is killed, sweep.sh does the same, and the agent's script lists Services again.
restore() { # all of it, whatever has failed; the code is that of the suite unless something could not be set back
    local code=$?
    "$testbed/kube/coredns.sh" down || code=1
    policy ${egress:+"$egress"} || code=1
    network || code=1
    kubelet -u KNOC_NODE_POD_IP -u KNOC_NODE_POD_RANGE || code=1
    "$testbed/conformance/nodes.sh" all || code=1
    exit $code
}
trap restore EXIT
policy 'privileged = "unprivileged"' 'host_paths = [{ path = "/tmp", writable = true }]' 'host_ports = ["21017"]' 'egress = ["default/kubernetes", "kube-system/kube-dns", "*/*"]'
network "${NETWORK:-}"
# It reads its policy now, and not some seconds after the first pods.
"$testbed/agent.sh" down
"$testbed/agent.sh" up
"$testbed/kube/coredns.sh" up
"$testbed/conformance/nodes.sh" "${NODES:-one}"
kubelet KNOC_NODE_TAINT=false KNOC_NODE_QUEUE_FACTOR=1 KNOC_NODE_POD_IP="${KNOC_NODE_POD_IP:-node}" KNOC_EGRESS_ALLOW='default/kubernetes,kube-system/kube-dns,*/*'
# The chart's own pod can run on no node of the bed, and tests of the scheduler wait until no pod is pending. The next start of the kubelet
# installs the chart again.
kubectl scale deployment --namespace $namespace --all --replicas=0 >/dev/null
cd "$repository"
cargo run -q -p knoc-tests --bin knoc-conformance -- "$@"
