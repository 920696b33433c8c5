#!/bin/bash
# metrics-server, unmodified, as a process of the host: metrics-server.sh up | down
# The API server finds it through a Service without a selector and an EndpointSlice with the host's address. It finds the
# kubelet through the Node, and checks its serving certificate.
. "$(dirname "$0")/../lib.sh"
. "$testbed/stack.sh"
state=$KUBE_PREFIX/run
pidfile=$state/metrics-server.pid
here=$testbed/kube/metrics-server
address=10.77.0.1 # an EndpointSlice must not have a loopback address
port=10443

certificate() { # signed by the cluster's CA, for the name that the API server uses
    [ ! -f "$state/metrics-server.crt" ] || return 0
    openssl req -new -newkey rsa:2048 -nodes -keyout "$state/metrics-server.key" -out "$state/metrics-server.csr" -subj /CN=metrics-server 2>/dev/null
    openssl x509 -req -in "$state/metrics-server.csr" -CA "$state/ca.crt" -CAkey "$state/ca.key" -CAcreateserial -days 365 \
        -out "$state/metrics-server.crt" -extfile <(echo "extendedKeyUsage=serverAuth"; echo "subjectAltName=DNS:metrics-server.kube-system.svc") 2>/dev/null
    rm "$state/metrics-server.csr"
}
objects() { # the objects of the upstream manifest without its Deployment
    sed -e "s|@CA@|$(base64 -w0 "$state/ca.crt")|" -e "s|@ADDRESS@|$address|" -e "s|@PORT@|$port|" "$here/objects.yaml" | kubectl apply -f - >/dev/null
}
kubeconfig() { # of its own ServiceAccount
    local file=$state/metrics-server.kubeconfig
    (
        umask 077
        kubectl config --kubeconfig="$file" set-cluster knoc --server="$(kubectl config view --minify -o 'jsonpath={.clusters[0].cluster.server}')" \
            --certificate-authority="$state/ca.crt" --embed-certs
        kubectl config --kubeconfig="$file" set-credentials metrics-server --token="$(kubectl create token metrics-server -n kube-system --duration=24h)"
        kubectl config --kubeconfig="$file" set-context default --cluster=knoc --user=metrics-server
        kubectl config --kubeconfig="$file" use-context default
    ) >/dev/null
}
up() {
    [ -z "$given_kubeconfig" ] || die "KUBECONFIG is set: that cluster has its own metrics-server"
    "$testbed/kube/setup.sh" metrics-server
    certificate
    objects
    if ! alive "$pidfile"; then
        kubeconfig
        start "$pidfile" "$state/log/metrics-server.log" "$KUBE_PREFIX/bin/metrics-server" --kubeconfig="$state/metrics-server.kubeconfig" \
            --authentication-kubeconfig="$state/metrics-server.kubeconfig" --authorization-kubeconfig="$state/metrics-server.kubeconfig" \
            --bind-address=$address --secure-port=$port --tls-cert-file="$state/metrics-server.crt" --tls-private-key-file="$state/metrics-server.key" \
            --kubelet-certificate-authority="$state/ca.crt" --kubelet-preferred-address-types=InternalIP --kubelet-use-node-status-port \
            --metric-resolution=15s
    fi
    wait_for 180 "APIService v1beta1.metrics.k8s.io" kubectl wait --for=condition=Available apiservice/v1beta1.metrics.k8s.io --timeout=1s \
        || { tail -20 "$state/log/metrics-server.log" >&2; exit 1; }
}

case ${1:-} in
up) up ;;
down)
    stop "$pidfile"
    # An APIService without a backend slows down every discovery.
    kubectl delete apiservice v1beta1.metrics.k8s.io --ignore-not-found >/dev/null 2>&1 || true
    ;;
*) sed -n 2p "$0" >&2; exit 2 ;;
esac
