#!/bin/bash
# The kubelet of the full stack, on the host, with the chart's ServiceAccount: kubelet.sh up | down | kill (-9) | running
# KNOC_IDENTITY=node: runs as system:node:NAME, and this script approves the first certificate; KNOC_SERVING=csr: uses a serving
# certificate of the cluster's signer. KNOC_NODE_TAINT=false: the node is without its taint. KNOC_NODE_QUEUE_FACTOR, KNOC_NODE_POD_IP,
# KNOC_NODE_POD_RANGE, KNOC_NODE_POD_LISTENERS, KNOC_RELAY_ALLOW, KNOC_EGRESS_ALLOW: the kubelet's settings of these names. If pods have
# addresses of their own from KNOC_NODE_POD_RANGE, this host takes the range for its own, and the kubelet listens there by default.
. "$(dirname "$0")/lib.sh"
. "$testbed/stack.sh"
. "$testbed/profile.sh"
pidfile=$run/kubelet.pid
state=$run/kubelet
[ "$KUBE_VERSION" = 1.36 ] || state=$state-$KUBE_VERSION # certificates and tokens belong to one control plane
[ -z "$given_kubeconfig" ] || state=$run/kubelet-given
address=10.77.0.1 # of the host on the network of the login node; the API server does not proxy to loopback addresses
identity=${KNOC_IDENTITY:-serviceaccount}
serving=${KNOC_SERVING:-files}
# A given cluster does not share its CA's key, so the kubelet uses a self-signed certificate unless the API server rejected that before.
[ -z "$given_kubeconfig" ] || serving=${KNOC_SERVING:-$(cat "$state/serving" 2>/dev/null || echo self-signed)}

# Applies the bundle that the agent's `init` wrote, and installs the chart.
install_chart() {
    kubectl create namespace $namespace --dry-run=client -o yaml | kubectl apply -f - >/dev/null
    kubectl apply -n $namespace -f "$agent_home_here/.config/knoc/kubelet-bundle.yaml" >/dev/null
    profile_chart
    # The kubelet's own pod cannot run on any node here, so there is no --wait.
    helm upgrade --install knoc "$repository/deploy/chart/knoc" --namespace $namespace "${chart_values[@]}" \
        --set agent.site=$site --set 'relay.allow={*/*}' --set identity.kind="$identity" --set server.certificate="$serving" >"$log/helm.log" 2>&1 || { cat "$log/helm.log" >&2; die "helm could not install the chart"; }
}
# Reads the bundle from the cluster, as the chart would mount it.
mount_bundle() {
    local part
    mkdir -p "$state"
    for part in ca.crt tls.crt tls.key; do
        kubectl get secret knoc-agent -n $namespace -o json | jq -r ".data[\"$part\"]" | base64 -d >"$state/agent-$part"
    done
    chmod 600 "$state"/*.key
}
serving_certificate() { # signed by the cluster's CA, for the address that the Node will publish
    local ca=$KUBE_PREFIX/run/ca
    # One of a control plane that was removed since is signed by another CA.
    ! openssl verify -CAfile "$ca.crt" "$state/serving.crt" >/dev/null 2>&1 || return 0
    openssl req -new -newkey rsa:2048 -nodes -keyout "$state/serving.key" -out "$state/serving.csr" -subj "/O=system:nodes/CN=system:node:$node" 2>/dev/null
    openssl x509 -req -in "$state/serving.csr" -CA "$ca.crt" -CAkey "$ca.key" -CAcreateserial -days 365 -out "$state/serving.crt" -extfile <(
        echo "keyUsage=critical,digitalSignature,keyEncipherment"
        echo "extendedKeyUsage=serverAuth"
        echo "subjectAltName=DNS:$node,IP:$address") 2>/dev/null
    rm "$state/serving.csr"
}
kubeconfig() { # of the chart's ServiceAccount, with exactly the permissions that the chart grants
    local file=$state/kubeconfig token=$state/token trust=()
    kubectl config view --minify --raw --flatten -o 'jsonpath={.clusters[0].cluster.certificate-authority-data}' | base64 -d >"$state/cluster-ca.crt"
    [ ! -s "$state/cluster-ca.crt" ] || trust=(--certificate-authority="$state/cluster-ca.crt" --embed-certs)
    (
        umask 077
        rm -f "$file" "$token"
        # In a file, because command lines are visible to everybody.
        kubectl create token knoc-kubelet -n $namespace --duration=24h >"$token"
        kubectl config --kubeconfig="$file" set-cluster knoc --server="$server" "${trust[@]}"
        kubectl config --kubeconfig="$file" set users.kubelet.tokenFile "$token"
        kubectl config --kubeconfig="$file" set-context knoc --cluster=knoc --user=kubelet --namespace=$namespace
        kubectl config --kubeconfig="$file" use-context knoc
    ) >/dev/null
}
# Sets `settings`: the kubelet's settings for how the cluster reaches it and identifies itself.
meet_the_cluster() {
    settings=(KNOC_SERVER_CERTIFICATE="$serving")
    if [ "$serving" = files ]; then
        serving_certificate
        settings+=(KNOC_SERVER_CERT="$state/serving.crt" KNOC_SERVER_KEY="$state/serving.key")
    fi
    # The CA of allowed clients: that of this control plane, or by default the CA that the cluster publishes.
    [ -n "$given_kubeconfig" ] || settings+=(KNOC_SERVER_CLIENT_CA="$KUBE_PREFIX/run/ca.crt")
    # An API server on another host uses the address on the route to it, which the kubelet detects itself.
    case $given_kubeconfig:$server in
    :* | *//localhost[:/]* | *//127.* | *//\[::1\]*) settings+=("KNOC_NODE_INTERNAL_IP=$address") ;;
    esac
}
# Lets this host answer at all addresses of the range, and of no range that an earlier kubelet had; without one it only removes that.
# A route that somebody else has made, such as another bed of this host, is used as it is and left there (forget_pod_route in lib.sh).
pod_route() { # pod_route [RANGE]
    [ "$(cat "$run/pod-route" 2>/dev/null || true)" = "${1:-}" ] || forget_pod_route
    [ -n "${1:-}" ] || return 0
    [ -z "$(ip route show table local type local exact "$1" dev lo)" ] || return 0
    # The note comes first: an interrupted script leaves no route that nobody removes.
    echo "$1" >"$run/pod-route"
    ip route add local "$1" dev lo || { rm -f "$run/pod-route"; die "cannot make the route of the pods' addresses: ip route add local $1 dev lo"; }
}
# Starts the kubelet's process with what is in the cluster.
launch() {
    local server settings link_settings relay='*/*' listeners=false
    case ${KNOC_NODE_POD_IP:-none} in none) ;; *) relay=off ;; esac # relayed pods have no address
    # A given cluster has its own routes.
    if [ "${KNOC_NODE_POD_IP:-none}" = own ] && [ -n "${KNOC_NODE_POD_RANGE:-}" ] && [ -z "$given_kubeconfig" ]; then
        listeners=${KNOC_NODE_POD_LISTENERS:-true}
    fi
    if [ "$listeners" = true ]; then pod_route "$KNOC_NODE_POD_RANGE"; else pod_route; fi
    server=$(kubectl config view --minify -o 'jsonpath={.clusters[0].cluster.server}')
    mount_bundle
    kubeconfig
    meet_the_cluster
    profile_kubelet
    start "$pidfile" "$log/kubelet.log" env -i PATH="$PATH" HOME="$state" ${KNOC_CRASH_AT:+KNOC_CRASH_AT="$KNOC_CRASH_AT"} \
        "${link_settings[@]}" KNOC_AGENT_SITE=$site \
        KNOC_AGENT_CA="$state/agent-ca.crt" KNOC_AGENT_CERT="$state/agent-tls.crt" KNOC_AGENT_KEY="$state/agent-tls.key" \
        KNOC_KUBERNETES_KUBECONFIG="$state/kubeconfig" KNOC_KUBERNETES_NAMESPACE=$namespace KNOC_KUBERNETES_IDENTITY=testbed \
        KNOC_NODE_NAME=$node KNOC_NODE_TAINT="${KNOC_NODE_TAINT:-true}" \
        KNOC_NODE_QUEUE_FACTOR="${KNOC_NODE_QUEUE_FACTOR:-}" KNOC_NODE_POD_IP="${KNOC_NODE_POD_IP:-}" KNOC_NODE_POD_RANGE="${KNOC_NODE_POD_RANGE:-}" \
        KNOC_NODE_POD_LISTENERS=$listeners \
        KNOC_IDENTITY_KIND="$identity" KNOC_KEYS_SECRET=knoc-kubelet-keys KNOC_RELAY_ALLOW="${KNOC_RELAY_ALLOW:-$relay}" \
        KNOC_EGRESS_ALLOW="${KNOC_EGRESS_ALLOW:-default/kubernetes,kube-system/kube-dns,knoc-redis/redis}" \
        KNOC_RELAY_ADDRESS=$address "${settings[@]}" \
        "$KNOC_BIN/knoc-kubelet"
}
up() {
    local pid chart_values
    if profile_changed "$run/profile-kubelet"; then
        say "PROFILE=$PROFILE: restarting the kubelet"
        stop "$pidfile"
    fi
    if alive "$pidfile"; then
        read -r pid _ <"$pidfile"
        ! cmp -s "/proc/$pid/exe" "$KNOC_BIN/knoc-kubelet" || return 0
        say "the kubelet's binary has changed: restarting the kubelet"
        stop "$pidfile"
    fi
    install_chart
    launch
    [ "$identity" = serviceaccount ] || wait_for 120 "a client certificate for the node" approved client
    [ "$serving" != csr ] || wait_for 120 "a serving certificate for the node" approved serving
    wait_for 120 "the node $node Ready" ready || { tail -20 "$log/kubelet.log" >&2; exit 1; }
    if [ "$serving" = self-signed ] && grep -q x509: < <(kubectl get --raw "/api/v1/nodes/$node/proxy/healthz" 2>&1); then
        say "this API server verifies kubelets: requesting a certificate from the cluster's signer"
        stop "$pidfile"
        kubectl patch secret knoc-kubelet-keys -n $namespace --type=json -p '[{"op": "remove", "path": "/data/serving.pem"}]' >/dev/null
        serving=csr
        echo $serving >"$state/serving"
        up
    fi
}
# Runs the command that the kubelet's Event shows; there is nothing to do if an approved certificate is already in the Secret.
approved() { # approved client|serving
    local request
    kubectl get secret knoc-kubelet-keys -n $namespace -o json | jq -e ".data[\"$1.pem\"] and (.data[\"$1-next.pem\"] | not)" >/dev/null && return
    request=$(kubectl get csr -o json | jq -r ".items[] | select(.metadata.name | startswith(\"knoc-$1-$node-\")) | select(.status.conditions | not) | .metadata.name")
    [ -z "$request" ] || kubectl certificate approve $request
    return 1
}
ready() {
    alive "$pidfile" || { say "the kubelet has ended:"; tail -n 20 "$log/kubelet.log" >&2; exit 1; }
    kubectl wait --for=condition=Ready "node/$node" --timeout=1s
}

[ "${BASH_SOURCE[0]}" != "$0" ] || control "${1:-}" # not if another script uses the functions
