#!/bin/bash
# Runs the upstream end-to-end suite against the stack that is up: run.sh [OPTION…] LIST…, as tests/src/bin/knoc-conformance.rs says.
# The suite counts a tainted node as no node, so the kubelet runs without its taint meanwhile. Some of its pods ask for privileges that
# they need only on SELinux hosts: the site allows them, without the privileges.
. "$(dirname "$0")/../lib.sh"
. "$testbed/stack.sh"
[ "$STACK" = full ] || die "the conformance suite needs STACK=full (STACK=$STACK: $why)"
"$testbed/kube/setup.sh" conformance
"$testbed/conformance/images.sh"
repositories=$run/conformance-repositories.yaml
printf 'promoterE2eRegistry: %s/e2e-test-images\ngcRegistry: %s\n' $registry $registry >"$repositories"
export KUBE_TEST_REPO_LIST=$repositories KNOC_REGISTRY=$registry
taint() { "$testbed/kubelet.sh" down; KNOC_NODE_TAINT=$1 "$testbed/kubelet.sh" up; }
privileged() { # privileged reject|unprivileged: the agent reads its policy again by itself
    sed -i -e '/^privileged *=/d' -e "s/^\[policy\]$/&\nprivileged = \"$1\"/" "$agent_home_here/.config/knoc/agent.toml"
}
# If this script is killed, sweep.sh does the same.
trap 'privileged reject; taint true' EXIT
privileged unprivileged
taint false
cd "$repository"
cargo run -q -p knoc-tests --bin knoc-conformance -- "$@"
