#!/bin/bash
# Runs the upstream end-to-end suite against the stack that is up: run.sh [OPTION…] LIST…, as tests/src/bin/knoc-conformance.rs says.
# The suite counts a tainted node as no node, so the kubelet runs without its taint meanwhile. Some of its pods ask for privileges that
# they need only on SELinux hosts: the site allows them, without the privileges. Some mount folders below /tmp of the node, and one has a
# host port: the site allows those too.
. "$(dirname "$0")/../lib.sh"
. "$testbed/stack.sh"
[ "$STACK" = full ] || die "the conformance suite needs STACK=full (STACK=$STACK: $why)"
"$testbed/kube/setup.sh" conformance
"$testbed/conformance/images.sh"
repositories=$run/conformance-repositories.yaml
printf 'promoterE2eRegistry: %s/e2e-test-images\ngcRegistry: %s\n' $registry $registry >"$repositories"
export KUBE_TEST_REPO_LIST=$repositories KNOC_REGISTRY=$registry
taint() { "$testbed/kubelet.sh" down; KNOC_NODE_TAINT=$1 "$testbed/kubelet.sh" up; }
policy() { # policy LINE…: replaces these settings of the policy; the agent reads them again by itself
    local lines=
    [ $# = 0 ] || lines=$(printf '\\n%s' "$@")
    sed -i -e '/^privileged *=/d; /^host_paths *=/d; /^host_ports *=/d' -e "s|^\[policy\]$|&$lines|" "$agent_home_here/.config/knoc/agent.toml"
}
# If this script is killed, sweep.sh does the same.
trap 'policy; taint true' EXIT
policy 'privileged = "unprivileged"' 'host_paths = [{ path = "/tmp", writable = true }]' 'host_ports = ["21017"]'
taint false
cd "$repository"
cargo run -q -p knoc-tests --bin knoc-conformance -- "$@"
