#!/bin/bash
# Installs and builds once what the stack needs, and prints each step: Debian packages, Go, the control plane, the Slurm root.
. "$(dirname "$0")/lib.sh"
. "$testbed/stack.sh"
# The tests of links over SSH start an sshd of their own.
[ -x /usr/sbin/sshd ] || [ "$(id -u)" != 0 ] || apt_get openssh-server
[ "$STACK" != local ] || exit 0
[ "$(id -u)" = 0 ] || die "STACK=$STACK makes its own Slurm cluster of network namespaces, which needs root (sudo make ... STACK=$STACK).
Without root: STACK=local, the agent with its embedded scheduler. On a login node that has Slurm: docs/guide/install.md, which needs no root."
apt_install curl curl
apt_install openssl openssl
apt_install jq jq
# Both take long and use different resources (network and disk; CPU), so they run in parallel.
"$testbed/hpc/setup.sh" &
slurm=$!
if [ "$STACK" = full ]; then
    if [ -z "$given_kubeconfig" ]; then
        "$testbed/kube/setup.sh" control-plane helm
    else
        "$testbed/kube/setup.sh" $(type -P kubectl >/dev/null || echo kubectl) $(type -P helm >/dev/null || echo helm)
    fi
fi
wait $slurm
