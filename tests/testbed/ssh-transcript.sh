#!/bin/bash
# From an empty cluster and an SSH login to a pod's log, over SSH alone: the command of README.md and those that it prints. Writes them with
# their times to docs/ssh-transcript.md (make ssh-transcript). The firewall of the login node lets SSH in and nothing else.
export PROFILE=ssh-only
. "$(dirname "$0")/kubelet.sh"
[ "$STACK" = full ] || die "STACK=$STACK ($why): this needs the full stack"
cd "$repository"
page=docs/ssh-transcript.md
work=$run/ssh-transcript
account=hpcuser2@10.77.0.2
home=$HPC_PREFIX/shared/home/hpcuser2

# The login of a person: ssh with a key and known hosts of its own. $work/bin/ssh is found before the machine's.
prepare() {
    rm -rf "$work"
    mkdir -p "$work/bin"
    rm -rf --one-file-system "${home:?}"/{.config,.local,bin}
    sed -i '/ knoc-kubelet$/d' "$home/.ssh/authorized_keys"
    echo "10.77.0.2 $(hpc exec login cat /etc/ssh/ssh_host_ed25519_key.pub)" >"$work/own_known_hosts"
    cat >"$work/config" <<CONF
Host *
    IdentityFile $HPC_PREFIX/ssh/id_ed25519
    IdentitiesOnly yes
    UserKnownHostsFile $work/own_known_hosts
CONF
    printf '#!/bin/sh\nexec /usr/bin/ssh -F %s/config "$@"\n' "$work" >"$work/bin/ssh"
    chmod 755 "$work/bin/ssh"
    # The bed's own agent and kubelet give way, so that ports and cluster are free.
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
    site=demo node=knoc-demo state=$work/kubelet pidfile=$run/kubelet-demo.pid
    mkdir -p "$state"
    launch
    wait_for 60 "the node $node Ready" kubectl wait --for=condition=Ready "node/$node" --timeout=1s
}
restore() {
    kubectl delete pod hello --ignore-not-found --now --timeout=30s >/dev/null 2>&1 || true
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
transcript() {
    local began=$SECONDS
    show "knocctl agent install --ssh $account --site demo --allow-namespace default --bundle bundle.yaml"
    registry_of_the_bed
    show "ssh-keygen -q -t ed25519 -N '' -C knoc-kubelet -f knoc-ssh"
    show "echo \"restrict,command=\\\"/home/hpcuser2/.local/bin/knoc-agent serve --stdio\\\" \$(cat knoc-ssh.pub)\" | ssh $account 'cat >>.ssh/authorized_keys'"
    show "ssh-keyscan -t ed25519 10.77.0.2 > known_hosts && ssh-keygen -lf known_hosts"
    show "kubectl create namespace $namespace && kubectl -n $namespace apply -f bundle.yaml"
    show "kubectl -n $namespace create secret generic knoc-ssh --from-file=ssh-privatekey=knoc-ssh --from-file=known_hosts --from-literal=host=10.77.0.2 --from-literal=remote_user=hpcuser2"
    show "helm install knoc $repository/deploy/chart/knoc --namespace $namespace --set agent.site=demo --set agent.address=ssh: --set agent.ssh.secret=knoc-ssh --set agent.ssh.onDemand=true"
    kubelet_of_the_bed
    show "kubectl get nodes"
    show "kubectl apply -f $repository/deploy/examples/hello.yaml"
    show "kubectl wait --for=condition=Ready pod/hello --timeout=60s"
    show "kubectl logs hello"
    show "kubectl exec hello -- hostname"
    printf '\n[%2d s] the end\n' "$((SECONDS - began))"
}

"$testbed/up.sh"
trap restore EXIT
prepare
transcript >"$work/out" 2>&1 || { cat "$work/out"; tail -5 "$log/kubelet.log"; die "the transcript was not written"; }
{
    printf '# From an SSH login to a pod'"'"'s log\n\nWritten by `make ssh-transcript`, %s. The login node lets SSH in and nothing else. The times are seconds since the beginning.\n' "$(date -u +%F)"
    printf 'Not shown: the registry of the test bed is added to the site file, and the kubelet runs as a process of the host with what its\nDeployment would mount, because the cluster of the test bed has no node for it.\n\n```\n'
    sed "s|$repository/||g; s|$work/||g; s/\x1b\[[0-9]*m//g" "$work/out"
    printf '```\n'
} >"$page"
say "$page is written"
