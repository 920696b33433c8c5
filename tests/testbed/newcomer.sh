#!/bin/bash
# Goes through README.md and docs/guide/install.md as a newcomer in each role would: the user of the HPC cluster by hand on the login node,
# the administrator of the Kubernetes cluster, the user of one namespace with rights in nothing else, and all of them leaving. Writes the
# commands with their times to docs/newcomer-transcript.md (make newcomer-transcript).
export PROFILE=direct
. "$(dirname "$0")/kubelet.sh"
[ "$STACK" = full ] || die "STACK=$STACK ($why): this needs the full stack"
cd "$repository"
page=docs/newcomer-transcript.md
work=$run/newcomer
. "$testbed/person.sh"

# A user who may do nothing but work in the namespace `team`.
own_namespace() {
    local file=$work/team.kubeconfig
    kubectl create namespace team >/dev/null
    kubectl -n team create serviceaccount tina >/dev/null
    kubectl -n team create rolebinding tina --clusterrole=edit --serviceaccount=team:tina >/dev/null
    kubectl config view --minify --raw --flatten >"$file"
    chmod 600 "$file"
    kubectl --kubeconfig "$file" config unset users >/dev/null
    kubectl -n team create token tina --duration=2h >"$work/token"
    kubectl --kubeconfig "$file" config set users.tina.tokenFile "$work/token" >/dev/null
    kubectl --kubeconfig "$file" config set-context --current --user=tina --namespace=team >/dev/null
}
prepare() {
    before_knoc
    kubectl delete namespace team --ignore-not-found >/dev/null
    own_namespace
    packaging/agent/build-tarball.sh "$work" >/dev/null
}
restore() {
    kubectl delete namespace team --ignore-not-found --timeout=60s >/dev/null 2>&1 || true
    rm -f "$work/token" "$work/team.kubeconfig"
    after_knoc
}
role() { printf '```\n\n## %s\n\n%s\n\n```\n' "$1" "$2"; }

hpc_user() {
    role "The HPC user: the agent" "On their own machine, with an SSH key for the login node and the package. The preflight names what this test bed lacks: the way to Docker Hub."
    show "knocctl doctor --preflight --probe --ssh $account --address $login -n team" || true
    show "scp -q knoc-agent-*.tar.gz $account:"
    show "ssh $account 'tar xzf knoc-agent-*.tar.gz && knoc-agent-*/install.sh'"
    show "ssh $account '.local/bin/knoc-agent init --site demo --address $login --namespace team'"
    registry_of_the_bed
    show "ssh $account '.local/bin/knoc-agent serve --detach'"
    show "ssh $account '.local/bin/knocctl doctor --probe'" || true
    show "scp -q $account:.config/knoc/kubelet-bundle.yaml kubelet-bundle-demo.yaml"
}
administrator() {
    role "The cluster administrator: the kubelet" "With the bundle, the name of the site and the address."
    show "kubectl create namespace $namespace"
    show "kubectl -n $namespace apply -f kubelet-bundle-demo.yaml"
    show "$install_chart_of_the_guide --set agent.address=$login:10350 --set agent.site=demo"
    agent_address=$login:10350
    kubelet_of_the_bed
    show "kubectl get node knoc-demo"
    show "kubectl wait node/knoc-demo --for=condition=AgentConnected --timeout=60s"
}
namespace_user() {
    local KUBECONFIG=$work/team.kubeconfig
    export KUBECONFIG
    role "The user of a namespace: the first pod" "With rights in the namespace \`team\` only."
    show "kubectl -n team auth can-i create pods"
    show "kubectl -n team apply -f $repository/deploy/examples/hello.yaml"
    show "kubectl -n team wait --for=condition=Ready pod/hello --timeout=10m"
    show "kubectl -n team logs hello"
    show "kubectl -n team exec hello -- hostname"
    show "kubectl -n team get pod hello -o jsonpath='{.metadata.annotations.knoc\\.io/job-id}{\"\\n\"}'"
    show "kubectl -n team delete pod hello"
}
leaving() {
    role "Leaving" "First the pods, then the kubelet and its node, then the agent."
    show "kubectl delete pods -A --field-selector spec.nodeName=knoc-demo"
    show "helm uninstall knoc --namespace $namespace"
    stop "$run/kubelet-demo.pid"
    show "kubectl delete node knoc-demo"
    show "kubectl delete namespace $namespace"
    show "ssh $account squeue --me"
    show "knocctl agent uninstall --ssh $account"
    show "ssh $account 'rm -r .config/knoc .local/state/knoc && ls -A'"
}
transcript() {
    local began=$SECONDS
    hpc_user
    administrator
    (namespace_user)
    leaving
    printf '\n[%2d s] the end\n' "$((SECONDS - began))"
}

questions() {
    cat <<'TEXT'

## Where the documents answer

| question | answer |
|---|---|
| Which port must be open? | 10350 of the login node for the cluster's nodes, or none with SSH: [Before you begin](guide/install.md#before-you-begin) |
| What happens after a year? | The certificates have been renewed over the link long before: [Certificates](guide/certificates.md) |
| Which Slurm job is my pod? | `knoc.io/job-id`: [The Slurm job of a pod](guide/using.md#the-slurm-job-of-a-pod) |
| How do I mount `/scratch`? | A `hostPath` volume, if the site lists it: [Data](guide/using.md#data) |
| How do I use a private image? | `imagePullSecrets`: [Images](guide/using.md#images) |
| Why is my pod Pending? | [A tree](guide/using.md#why-is-my-pod-pending) |
| How do I leave? | [Leaving](guide/operating.md#leaving) |
TEXT
}

"$testbed/up.sh"
trap restore EXIT
prepare
# A command that fails ends it, unless it says otherwise.
set +e
(set -e; transcript) >"$work/out" 2>&1
code=$?
set -e
[ $code = 0 ] || { cat "$work/out"; tail -5 "$log/kubelet.log"; die "the transcript was not written"; }
{
    printf '# A newcomer in each role\n\nWritten by `make newcomer-transcript`, %s: the commands of [install.md](guide/install.md) and [operating.md](guide/operating.md#leaving) on the\n' "$(date -u +%F)"
    printf 'test bed, from nothing to a pod'"'"'s log and back. The times are seconds since the beginning; reading is not counted. Not shown: the registry of\n'
    printf 'the test bed is added to the site file, and the kubelet runs as a process of the host with what its Deployment would mount, because the\ncluster of the test bed has no node for it; so nobody pulls the image from the registry that `helm install` names.\n'
    # The first role closes a block that was not opened.
    sed "s|$repository/||g; s|$work/||g; s/\x1b\[[0-9]*m//g" "$work/out" | sed '1d'
    printf '```\n'
    questions
} >"$page"
say "$page is written"
