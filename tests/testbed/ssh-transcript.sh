#!/bin/bash
# From an empty cluster and an SSH login to a pod's log, over SSH alone: the command of README.md and those that it prints. Writes them with
# their times to docs/ssh-transcript.md (make ssh-transcript). The firewall of the login node lets SSH in and nothing else.
export PROFILE=ssh-only
. "$(dirname "$0")/kubelet.sh"
[ "$STACK" = full ] || die "STACK=$STACK ($why): this needs the full stack"
cd "$repository"
page=docs/ssh-transcript.md
work=$run/ssh-transcript
. "$testbed/person.sh"

restore() {
    kubectl delete pod hello --ignore-not-found --now --timeout=30s >/dev/null 2>&1 || true
    after_knoc
}
transcript() {
    local began=$SECONDS
    show "knocctl agent install --ssh $account --site demo --allow-namespace default"
    registry_of_the_bed
    show "ssh-keygen -q -t ed25519 -N '' -C knoc-kubelet -f knoc-ssh"
    show "echo \"restrict,command=\\\"/home/hpcuser2/.local/bin/knoc-agent serve --stdio\\\" \$(cat knoc-ssh.pub)\" | ssh $account 'cat >>.ssh/authorized_keys'"
    show "ssh-keyscan $login > known_hosts && ssh-keygen -lf known_hosts"
    show "kubectl create namespace $namespace && kubectl -n $namespace apply -f kubelet-bundle-demo.yaml"
    show "kubectl -n $namespace create secret generic knoc-ssh --from-file=ssh-privatekey=knoc-ssh --from-file=known_hosts --from-literal=host=$login --from-literal=remote_user=hpcuser2"
    show "$install_chart_of_the_guide --set agent.site=demo --set agent.address=ssh: --set agent.ssh.secret=knoc-ssh --set agent.ssh.onDemand=true"
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
before_knoc
# A command that fails ends it.
set +e
(set -e; transcript) >"$work/out" 2>&1
code=$?
set -e
[ $code = 0 ] || { cat "$work/out"; tail -5 "$log/kubelet.log"; die "the transcript was not written"; }
{
    printf '# From an SSH login to a pod'"'"'s log\n\nWritten by `make ssh-transcript`, %s. The login node lets SSH in and nothing else. The times are seconds since the beginning.\n' "$(date -u +%F)"
    printf 'Not shown: the registry of the test bed is added to the site file, and the kubelet runs as a process of the host with what its\nDeployment would mount, because the cluster of the test bed has no node for it; so nobody pulls the image from the registry that\n`helm install` names.\n\n```\n'
    sed "s|$repository/||g; s|$work/||g; s/\x1b\[[0-9]*m//g" "$work/out"
    printf '```\n'
} >"$page"
say "$page is written"
