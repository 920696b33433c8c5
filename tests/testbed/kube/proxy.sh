#!/bin/bash
# kube-proxy, unmodified, on a node of its own: proxy.sh up | down | exec COMMAND...
# The node is a network namespace that reaches this host and nothing else, as a node of the cluster reaches the kubelet's pod. `exec` runs
# a client of Services there; this host reaches NodePorts, and the nginx of ingress.sh, at 10.75.0.2. Only the namespace has rules of
# kube-proxy (nftables), so nothing changes for the other tests.
. "$(dirname "$0")/../lib.sh"
. "$testbed/stack.sh"
state=$KUBE_PREFIX/run
pidfile=$state/kube-proxy.pid
netns=knockube link=kube0
host=10.75.0.1 address=10.75.0.2
api=10.77.0.1 # the host's address that is in the API server's certificate

inside() { nsenter --net=/run/netns/$netns "$@"; }
network_down() {
    [ -e /run/netns/$netns ] || return 0
    # The link is gone when this returns; with the namespace it would go a moment later.
    ip link del $link 2>/dev/null || true
    ip netns del $netns
}
network_up() {
    network_down
    ip netns add $netns
    ip link add $link type veth peer name eth0 netns $netns
    ip addr add $host/24 dev $link
    ip link set $link up
    ip -n $netns addr add $address/24 dev eth0
    ip -n $netns link set lo up
    ip -n $netns link set eth0 up
    ip -n $netns route add default via $host
    # What comes in for a NodePort leaves by the same link. One family is enough, and starts faster.
    inside sh -c 'cd /proc/sys/net && echo 1 >ipv4/ip_forward && for name in all eth0; do echo 0 >ipv4/conf/$name/send_redirects; done
        [ ! -e ipv6/conf/all/disable_ipv6 ] || echo 1 >ipv6/conf/all/disable_ipv6'
}
# The user to whom Kubernetes' own roles give what kube-proxy needs.
kubeconfig() {
    local file=$state/kube-proxy.kubeconfig name=$state/kube-proxy server
    [ ! -f "$file" ] || return 0
    server=$(kubectl config view --minify -o 'jsonpath={.clusters[0].cluster.server}')
    (
        umask 077
        openssl req -new -newkey rsa:2048 -nodes -keyout "$name.key" -out "$name.csr" -subj /CN=system:kube-proxy 2>/dev/null
        openssl x509 -req -in "$name.csr" -CA "$state/ca.crt" -CAkey "$state/ca.key" -CAcreateserial -days 365 \
            -out "$name.crt" -extfile <(echo "extendedKeyUsage=clientAuth") 2>/dev/null
        rm "$name.csr"
        kubectl config --kubeconfig="$file.new" set-cluster knoc --server="https://$api:${server##*:}" \
            --certificate-authority="$state/ca.crt" --embed-certs
        kubectl config --kubeconfig="$file.new" set-credentials kube-proxy --client-certificate="$name.crt" \
            --client-key="$name.key" --embed-certs
        kubectl config --kubeconfig="$file.new" set-context default --cluster=knoc --user=kube-proxy
        kubectl config --kubeconfig="$file.new" use-context default
        mv "$file.new" "$file"
    ) >/dev/null
}
# The Service of the API server leads to this host.
works() {
    alive "$pidfile" || { say "kube-proxy has ended:"; tail -20 "$state/log/kube-proxy.log" >&2; exit 1; }
    inside curl --noproxy '*' -sSf --max-time 5 --cacert "$state/ca.crt" -o /dev/null https://10.96.0.1/livez
}
up() {
    [ -z "$given_kubeconfig" ] || die "KUBECONFIG is set: that cluster has its own kube-proxy"
    exec 7>"$state/proxy.lock"
    flock 7
    ! alive "$pidfile" || return 0
    apt_install nft nftables
    down
    network_up
    kubeconfig
    # It takes itself for the kubelet's node, since it waits half a minute for a node that does not exist. The system's limits of
    # connections stay as they are: they are those of this host.
    start "$pidfile" "$state/log/kube-proxy.log" nsenter --net=/run/netns/$netns "$KUBE_PREFIX/bin/kube-proxy" \
        --kubeconfig="$state/kube-proxy.kubeconfig" --hostname-override="$node" --proxy-mode=nftables --nodeport-addresses=$address/32 \
        --conntrack-max-per-core=0 --conntrack-tcp-timeout-established=0 --conntrack-tcp-timeout-close-wait=0 --oom-score-adj=0 \
        --metrics-bind-address=127.0.0.1:10249 --healthz-bind-address=127.0.0.1:10256 7>&-
    wait_for 60 "a Service through kube-proxy" works || { tail -20 "$state/log/kube-proxy.log" >&2; exit 1; }
}
down() { # with everything that runs on its node
    stop "$state/ingress.pid"
    stop "$pidfile"
    network_down
}

case ${1:-} in
up) up ;;
down) down ;;
exec)
    shift
    exec nsenter --net=/run/netns/$netns "$@"
    ;;
*) sed -n 2p "$0" >&2; exit 2 ;;
esac
