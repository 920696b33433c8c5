#!/bin/bash
# Removes what an interrupted run of the tests, the benchmark or the upstream suite left: namespaces with their pods, jobs without a
# pod, limits of Slurm's accounts, armed crash points, a closed port, mounts on nodes, other agents, metrics-server, kube-proxy, and settings of the
# agent and the kubelet for one run. The stack is running before and after; pods of other namespaces continue.
. "$(dirname "$0")/lib.sh"
. "$testbed/stack.sh"
. "$testbed/profile.sh"
[ "$STACK" = full ] || die "STACK=$STACK ($why): only the full stack needs sweeping"

as_user() { hpc exec login -u hpcuser "$@"; }
as_admin() { hpc exec ctl sacctmgr -n -P "$@"; }
# Settings of a test for the agent or kubelet. Both are restarted and find their pods again.
afresh() {
    rm -f "$agent_home_here/knoc-crash-at"
    "$testbed/kubelet.sh" down
    "$testbed/agent.sh" down
    # Of l3_cut_nodes: the port for shims that compute nodes cannot reach, and what the agent found out then.
    profile_network
    rm -f "$agent_home_here/.local/state/knoc/shim-route.json"
    # Of l3_cut_mesh: compute nodes that did not reach each other.
    for netns in $(ip netns list | sed -n 's/^\(hpc-c[0-9][0-9]*\).*/\1/p'); do
        while ip -n "$netns" rule del priority 13 2>/dev/null; do :; done
    done
    unmount_all
    # Of conformance/run.sh, argo.sh, charts.sh, l3_data, and tests that drained nodes.
    sed -i '/^privileged *=/d; /^host_paths *=/d; /^host_ports *=/d; /^nfs *=/d; /^csi *=/d; /^pod_traffic *=/d; /^network *=/d; /^egress = .*"\*\/\*"/d; /^# l3_data$/,$d' \
        "$agent_home_here/.config/knoc/agent.toml"
    [ ! -e "$KUBE_PREFIX/run/coredns.pid" ] || "$testbed/kube/coredns.sh" down
    "$testbed/conformance/nodes.sh" all
    "$testbed/agent.sh" up
    "$testbed/kubelet.sh" up
}
# Of l3_faults_node and l3_disk: what they have mounted on nodes, over what is there. A program that still uses it keeps it until it ends.
unmount_all() {
    local node target left='$2 == "/usr/bin/pasta" || $2 ~ "^/home/hpcuser/.local/state/knoc/pods/[^/]*/logs$" || $2 ~ "^/home/hpcuser/t-"
        || ($1 == "none" && $2 == "/tmp" && $4 ~ "size=16384k") { print $2 }'
    left=${left//$'\n'/ }
    for node in login $(ip netns list | sed -n 's/^hpc-\(c[0-9][0-9]*\).*/\1/p'); do
        for target in $(hpc exec "$node" awk "$left" /proc/mounts || true); do
            hpc exec "$node" umount -l "$target" || say "$target on $node could not be unmounted"
        done
    done
}
# Agents that tests have started on the login node, each with a home of its own, and what they run there.
end_other_agents() {
    hpc exec login bash -c 'for process in /proc/[0-9]*; do
        ! grep -qz "^HOME=/home/hpcuser/t-" "$process/environ" 2>/dev/null || kill -KILL "${process#/proc/}" 2>/dev/null
    done; true'
}
# Of our tests, and of the upstream suite.
namespaces() { kubectl get namespaces -l knoc-test -o name && kubectl get namespaces -l e2e-framework -o name; }
no_namespaces() { [ -z "$(namespaces | tee /dev/stderr)" ]; }
# Jobs of the agent are knoc-UID; all others were submitted by hand.
foreign_jobs() { as_user squeue -h -o '%i|%j' | grep -vE '\|knoc-[0-9a-f]{8}-[0-9a-f-]{27}$' | cut -d'|' -f1; }
no_foreign_jobs() { [ -z "$(foreign_jobs | tee /dev/stderr)" ]; }
# A test's QOS has the name of its namespace; a test's account is any account that is not the bed's.
no_limits() {
    local name code=0
    for name in $(as_admin show qos format=Name | grep '^t-'); do as_admin -i delete qos "$name" || code=1; done
    for name in $(as_admin show account format=Account | grep '^t-'); do
        as_admin -i delete user hpcuser account="$name" && as_admin -i delete account "$name" || code=1
    done
    return $code
}

left=$(namespaces) jobs=$(foreign_jobs || true)
[ -z "$left$jobs" ] || say "removing what an earlier run left:" $left $jobs
afresh
[ -z "$left" ] || kubectl delete $left --wait=false --ignore-not-found >/dev/null
# Of l3_metrics: no namespace ends while an API that the API server offers has no server. A given cluster has its own metrics-server.
[ -n "$given_kubeconfig" ] || "$testbed/kube/metrics-server.sh" down
# Of the upstream suite: webhooks whose servers are gone keep what they watch. The bed has none of its own.
webhooks=$(kubectl get validatingwebhookconfigurations,mutatingwebhookconfigurations -o name | grep '/webhook-' || true)
crds=$(kubectl get customresourcedefinitions -o name | grep -E '/e2e-test-.*\.example\.com$|\.webhook\.example\.com$' || true)
[ -n "$given_kubeconfig" ] || [ -z "$webhooks$crds" ] || kubectl delete $webhooks $crds --wait=false >/dev/null
# Of l3_cluster: its Redis.
"$testbed/redis.sh" down
# Of l3_proxy: kube-proxy, nginx and their node.
"$testbed/kube/proxy.sh" down
# Of l3_chart: what its release has outside of its namespace.
kubectl delete clusterroles,clusterrolebindings,runtimeclasses,roles,rolebindings --all-namespaces -l app.kubernetes.io/instance=charttest >/dev/null
# Of l3_trust_bundles.
kubectl delete clustertrustbundles -l knoc-test --ignore-not-found >/dev/null 2>&1 || true # a given cluster may not have this kind
end_other_agents
[ -z "$jobs" ] || as_user scancel $jobs
wait_for 300 "no namespaces of tests" no_namespaces
wait_for 120 "no jobs but those of pods" no_foreign_jobs
wait_for 120 "no limits of tests" no_limits
# Of l3_convert: a partition with the name of its namespace.
for partition in $(as_user sinfo -h -a -o %R | grep '^t-' | sort -u || true); do
    hpc exec ctl scontrol delete "PartitionName=$partition" || say "the partition $partition could not be removed"
done
# The folders of tests on the nodes: homes of agents, images and data.
hpc exec login sh -c 'rm -rf --one-file-system /home/hpcuser/t-* /scratch/t-*' || say "some folders of tests could not be removed"
