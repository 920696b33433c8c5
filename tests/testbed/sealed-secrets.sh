#!/bin/bash
# The walk-through with sealed-secrets of docs/guide/links.md (make sealed-secrets): the two Secrets of a kubelet whose link is SSH are
# sealed, created by the controller of sealed-secrets and used by the kubelet, and a pod runs. Each step is checked. The controller is a
# process of the host with the ServiceAccount of its own chart, because the cluster of the test bed has no node for it.
export PROFILE=ssh-only
. "$(dirname "$0")/kubelet.sh"
[ "$STACK" = full ] || die "STACK=$STACK ($why): this needs the full stack"
work=$run/sealed-secrets
controller_pid=$run/sealed-secrets.pid
controller=sealed-secrets-controller
port=18080
bin=$tools/sealed-secrets
certificate=http://$address:$port/v1/cert.pem

# Builds the programs with Go, unless they are those of go.mod.
build() {
    local sources=$testbed/sealed-secrets stamp
    install_go
    stamp=$(cat "$sources"/go.* | sha256sum)
    [ "$(cat "$bin/.built" 2>/dev/null)" != "$stamp" ] || return 0
    say "building kubeseal and the controller of sealed-secrets"
    mkdir -p "$bin"
    (cd "$sources" && go_locked build -trimpath -o "$bin/" github.com/bitnami/sealed-secrets/cmd/kubeseal github.com/bitnami/sealed-secrets/cmd/controller)
    echo "$stamp" >"$bin/.built"
    trim_go_cache
}
# The chart of the same version, with its roles and the definition of SealedSecret.
controller_up() {
    local chart
    chart=$(cd "$testbed/sealed-secrets" && go list -m -f '{{.Dir}}' github.com/bitnami/sealed-secrets)/helm/sealed-secrets
    helm upgrade --install sealed-secrets "$chart" --namespace kube-system --set fullnameOverride=$controller >"$log/sealed-secrets-helm.log" 2>&1 \
        || { cat "$log/sealed-secrets-helm.log" >&2; die "helm could not install the chart of sealed-secrets"; }
    kubectl scale deployment $controller --namespace kube-system --replicas=0 >/dev/null
    controller_process
    wait_for 60 "the certificate of the controller" kubeseal --fetch-cert --cert "$certificate"
}
# It looks for its ServiceAccount where a pod has it, so it has a /run of its own.
controller_process() {
    local server host
    server=$(kubectl config view --minify -o 'jsonpath={.clusters[0].cluster.server}')
    host=${server#https://}
    (
        umask 077
        mkdir -p "$work/account"
        kubectl create token $controller --namespace kube-system --duration=2h >"$work/account/token"
        kubectl config view --minify --raw --flatten -o 'jsonpath={.clusters[0].cluster.certificate-authority-data}' | base64 -d >"$work/account/ca.crt"
    )
    start "$controller_pid" "$log/sealed-secrets.log" unshare --mount --propagation private bash -c '
        account=$1 folder=/run/secrets/kubernetes.io/serviceaccount
        shift
        cd "$account" && mount -t tmpfs tmpfs /run && mkdir -p $folder && cp token ca.crt $folder && cd / && exec "$@"' \
        - "$work/account" env -i KUBERNETES_SERVICE_HOST="${host%:*}" KUBERNETES_SERVICE_PORT="${host##*:}" POD_NAMESPACE=kube-system \
        "$bin/controller" --update-status --key-prefix sealed-secrets-key --listen-addr "$address:$port" --listen-metrics-addr 127.0.0.1:18081
}
kubeseal() { "$bin/kubeseal" "$@"; }
# What the guide shows: seals the Secret that comes in, for its name and namespace. The certificate comes from the process itself, because
# the API server passes nothing on to a Service without pods.
seal() { kubeseal --cert "$certificate" --format yaml; }

# values NAME: the values of a Secret of the chart's namespace, in order.
values() { kubectl get secret "$1" --namespace $namespace -o json | jq -cS .data; }
# same NAME FILE: whether the Secret has the values in the file, and belongs to its SealedSecret.
same() {
    [ "$(values "$1")" = "$(cat "$2")" ] || { echo "other values"; return 1; }
    kubectl get secret "$1" --namespace $namespace -o json | jq -e '.metadata.ownerReferences[0].kind == "SealedSecret"' >/dev/null
}
refused() { # refused NAME: the SealedSecret says that a Secret of that name is there already
    kubectl get sealedsecret "$1" --namespace $namespace -o json | tee "$work/status" | jq -e '.status.conditions[0] | .status == "False" and (.message | test("already exists"))' >/dev/null \
        || { jq -c .status "$work/status"; return 1; }
}

seal_both() {
    local part files=()
    for part in ssh-privatekey known_hosts remote_user host; do files+=(--from-file="$part=$ssh_folder/$part"); done
    kubectl --namespace $namespace create secret generic knoc-ssh "${files[@]}" --dry-run=client -o yaml | seal >"$work/knoc-ssh.sealed.yaml"
    kubectl --namespace $namespace create -f "$agent_home_here/.config/knoc/kubelet-bundle.yaml" --dry-run=client -o yaml | seal >"$work/knoc-agent.sealed.yaml"
    for part in $(jq -r '.[]' "$work/knoc-ssh.json" "$work/knoc-agent.json"); do
        ! grep -qF "$part" "$work"/*.sealed.yaml || die "a sealed file has a value of the Secret as it is"
    done
}
walk_through() {
    local name
    for name in knoc-ssh knoc-agent; do values $name >"$work/$name.json"; done
    seal_both
    say "sealed: $(grep -c '^kind: SealedSecret' "$work"/*.sealed.yaml | sed 's|.*/||' | tr '\n' ' ')"
    # A Secret that was created without it is not replaced, unless its annotation allows that.
    kubectl apply -f "$work/knoc-ssh.sealed.yaml" -f "$work/knoc-agent.sealed.yaml" >/dev/null
    for name in knoc-ssh knoc-agent; do wait_for 30 "the SealedSecret $name is refused" refused $name; done
    kubectl annotate secret knoc-agent --namespace $namespace sealedsecrets.bitnami.com/managed=true >/dev/null
    kubectl delete secret knoc-ssh --namespace $namespace >/dev/null
    # The controller tries again when the SealedSecret changes.
    for name in knoc-ssh knoc-agent; do
        kubectl annotate sealedsecret $name --namespace $namespace knoc.io/again=1 >/dev/null
        wait_for 60 "the Secret $name by its SealedSecret" same $name "$work/$name.json"
    done
    say "both Secrets are created by the controller, with the same values"
    helm upgrade knoc "$repository/deploy/chart/knoc" --namespace $namespace --set agent.site=$site --set agent.address=ssh: \
        --set agent.ssh.secret=knoc-ssh >"$log/helm.log" 2>&1 || { cat "$log/helm.log" >&2; die "helm could not upgrade the chart"; }
    kubectl get deployment --namespace $namespace -o json | jq -e '[.items[].spec.template.spec.volumes[]?.secret.secretName] | contains(["knoc-ssh", "knoc-agent"])' >/dev/null \
        || die "the chart does not mount the two Secrets"
    launch
    wait_for 60 "the node $node Ready" ready
    kubectl delete pod sealed --ignore-not-found --now >/dev/null
    kubectl run sealed --image=busybox:1.36 --restart=Never --overrides='{"spec": {"runtimeClassName": "knoc"}}' --command -- echo "through sealed Secrets" >/dev/null
    wait_for 90 "the pod has succeeded" kubectl wait --for='jsonpath={.status.phase}=Succeeded' pod/sealed --timeout=1s
    [ "$(kubectl logs sealed)" = "through sealed Secrets" ] || die "the pod's log is $(kubectl logs sealed)"
    say "a pod has run, and its log came through the link"
}
restore() {
    [ $? = 0 ] || tail -n 5 "$log/sealed-secrets.log" "$log/kubelet.log" >&2 || true
    kubectl delete pod sealed --ignore-not-found --now >/dev/null 2>&1 || true
    stop "$pidfile"
    stop "$controller_pid"
    kubectl delete sealedsecrets --all --namespace $namespace >/dev/null 2>&1 || true
    kubectl delete secret knoc-ssh knoc-agent --namespace $namespace --ignore-not-found >/dev/null 2>&1 || true
    helm uninstall sealed-secrets --namespace kube-system >/dev/null 2>&1 || true
    kubectl delete crd sealedsecrets.bitnami.com --ignore-not-found >/dev/null 2>&1 || true
    kubectl delete secret --namespace kube-system -l sealedsecrets.bitnami.com/sealed-secrets-key >/dev/null 2>&1 || true
    rm -rf "$work"
    PROFILE=direct "$testbed/up.sh"
}

build
"$testbed/up.sh"
rm -rf "$work"
(umask 077; mkdir -p "$work")
trap restore EXIT
stop "$pidfile"
stop "$controller_pid"
controller_up
walk_through
say "the walk-through with sealed-secrets works"
