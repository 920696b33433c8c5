# Sourced: a person with an account on the login node of the test bed, who has neither KNoC nor root there (newcomer.sh,
# ssh-transcript.sh). The caller has sourced kubelet.sh and sets $work, the folder of the person's own machine.
login=10.77.0.2
account=hpcuser2@$login
home=$HPC_PREFIX/shared/home/hpcuser2
# What docs/guide/install.md and README.md type to install the chart. The registry is theirs: nobody pulls the image here.
install_chart_of_the_guide="helm install knoc $repository/deploy/chart/knoc --namespace $namespace --set image.repository=registry.example.org/knoc-kubelet"

# The person's machine and account as they were before KNoC, with ssh and scp that have a key and known hosts of their own: $work/bin is
# found before the machine's. The bed's own agent and kubelet give way, so that ports and cluster are free.
before_knoc() {
    local name
    rm -rf "$work"
    mkdir -p "$work/bin"
    rm -rf --one-file-system "${home:?}"/{.config,.local,bin} "$home"/knoc-agent-*
    sed -i '/ knoc-kubelet$/d' "$home/.ssh/authorized_keys"
    echo "$login $(hpc exec login cat /etc/ssh/ssh_host_ed25519_key.pub)" >"$work/own_known_hosts"
    cat >"$work/config" <<CONF
Host *
    IdentityFile $HPC_PREFIX/ssh/id_ed25519
    IdentitiesOnly yes
    UserKnownHostsFile $work/own_known_hosts
CONF
    for name in ssh scp; do
        printf '#!/bin/sh\nexec /usr/bin/%s -F %s/config "$@"\n' $name "$work" >"$work/bin/$name"
        chmod 755 "$work/bin/$name"
    done
    "$testbed/kubelet.sh" down
    "$testbed/agent.sh" down
    helm uninstall knoc --namespace $namespace >/dev/null 2>&1 || true
    kubectl delete namespace $namespace --ignore-not-found >/dev/null
    kubectl delete node $node --ignore-not-found >/dev/null
}
# What is particular to this test bed, and not shown: the registry of its images, and the process of the kubelet, which its Deployment
# cannot start because the cluster has no other node.
registry_of_the_bed() {
    printf '\n[[registry]]\nprefix = "docker.io"\nmirror = "%s"\ninsecure = true\n' "$registry" >>"$home/.config/knoc/agent.toml"
}
kubelet_of_the_bed() {
    local chart_values
    site=demo node=knoc-demo state=$work/kubelet pidfile=$run/kubelet-demo.pid
    mkdir -p "$state"
    launch
    wait_for 60 "the node $node Ready" kubectl wait --for=condition=Ready "node/$node" --timeout=1s
}
# The bed without what the person has installed.
after_knoc() {
    stop "$run/kubelet-demo.pid"
    kubectl delete node knoc-demo --ignore-not-found >/dev/null 2>&1 || true
    helm uninstall knoc --namespace $namespace >/dev/null 2>&1 || true
    PATH=$work/bin:$PATH knocctl agent uninstall --ssh $account --force >/dev/null 2>&1 || true
    PROFILE=direct "$testbed/up.sh"
}
show() { # runs a command line as a reader would type it, with the time since the beginning
    printf '\n[%2d s] $ %s\n' "$((SECONDS - began))" "$*"
    (cd "$work" && PATH=$work/bin:$KNOC_BIN:$PATH && eval "$*")
}
