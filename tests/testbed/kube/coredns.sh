#!/bin/bash
# CoreDNS, unmodified but for the list of its plugins, as a process of the host: coredns.sh up | down
# Pods find it through the Service kube-system/kube-dns, which has no selector, and an EndpointSlice with the host's address. It is there
# only for Kubernetes' own suite and tests/tests/l3_dns.rs: other tests are the DNS server of that name themselves.
. "$(dirname "$0")/../lib.sh"
. "$testbed/stack.sh"
state=$KUBE_PREFIX/run
pidfile=$state/coredns.pid
here=$testbed/kube/coredns
address=10.77.0.1 # an EndpointSlice must not have a loopback address
port=10053 ready=10054

kubeconfig() { # of its own ServiceAccount
    local file=$state/coredns.kubeconfig
    (
        umask 077
        kubectl config --kubeconfig="$file" set-cluster knoc --server="$(kubectl config view --minify -o 'jsonpath={.clusters[0].cluster.server}')" \
            --certificate-authority="$state/ca.crt" --embed-certs
        kubectl config --kubeconfig="$file" set-credentials coredns --token="$(kubectl create token coredns -n kube-system --duration=24h)"
        kubectl config --kubeconfig="$file" set-context default --cluster=knoc --user=coredns
        kubectl config --kubeconfig="$file" use-context default
    ) >/dev/null
}
corefile() { # as kubeadm writes it, without the names outside of the cluster
    printf '%s\n' ".:$port {" "    bind $address" "    errors" "    ready $address:$ready" \
        "    kubernetes cluster.local in-addr.arpa {" "        kubeconfig $state/coredns.kubeconfig" "        pods insecure" "        ttl 30" "    }" "    cache 30" "}" >"$state/Corefile"
}
is_ready() { curl --noproxy '*' -sSf --max-time 5 -o /dev/null "http://$address:$ready/ready"; }
up() {
    [ -z "$given_kubeconfig" ] || die "KUBECONFIG is set: that cluster has its own DNS"
    "$testbed/kube/setup.sh" coredns
    sed -e "s|@ADDRESS@|$address|" -e "s|@PORT@|$port|" "$here/objects.yaml" | kubectl apply -f - >/dev/null
    if ! alive "$pidfile"; then
        kubeconfig
        corefile
        start "$pidfile" "$state/log/coredns.log" "$KUBE_PREFIX/bin/coredns" -conf "$state/Corefile"
    fi
    wait_for 90 "CoreDNS" is_ready || { tail -20 "$state/log/coredns.log" >&2; exit 1; }
}
down() {
    stop "$pidfile"
    sed -e "s|@ADDRESS@|$address|" -e "s|@PORT@|$port|" "$here/objects.yaml" | kubectl delete --ignore-not-found -f - >/dev/null
}

case ${1:-} in
up) up ;;
down) down ;;
*) sed -n 2p "$0" >&2; exit 2 ;;
esac
