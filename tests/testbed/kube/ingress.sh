#!/bin/bash
# A real nginx in front of the Services of a namespace, on the node of proxy.sh: ingress.sh up NAMESPACE | down
# Its configuration is what an ingress controller would make of the Ingress objects of the namespace, once: nothing follows their changes.
# It reaches a Service at its ClusterIP, through kube-proxy, and listens at 10.75.0.2, port 80.
. "$(dirname "$0")/../lib.sh"
. "$testbed/stack.sh"
state=$KUBE_PREFIX/run
pidfile=$state/ingress.pid
listen=10.75.0.2:80

servers() { # servers NAMESPACE: a server for each rule, with a location for each path
    kubectl get ingresses,services -n "$1" -o json | jq -r --arg listen "$listen" '
        (.items | map(select(.kind == "Service"))) as $services
        | .items[] | select(.kind == "Ingress") | .spec.rules[]
        | "server { listen \($listen); server_name \(.host // "_");",
          (.http.paths[] | . as $path | .backend.service as $to
            | $services[] | select(.metadata.name == $to.name) | . as $service
            | .spec.ports[] | select(if $to.port.name then .name == $to.port.name else .port == $to.port.number end)
            | (if $path.pathType == "Exact" then "= " else "" end) as $exactly
            | "location \($exactly)\($path.path) { proxy_pass http://\($service.spec.clusterIP):\(.port); }"),
          "}"'
}
configuration() {
    # As many connections as there are pass: two for each client. A Service that does not answer is 504 before a test loses patience.
    printf '%s\n' "daemon off;" "user www-data;" "worker_processes 1;" "pid $state/ingress.nginx;" "error_log stderr warn;" \
        "events { worker_connections 2048; }" "http {" "access_log off;" "proxy_connect_timeout 30s;" 'proxy_set_header Host $host;' \
        "server { listen $listen default_server; return 404; }"
    servers "$1"
    echo "}"
}
up() {
    install_nginx
    "$testbed/kube/proxy.sh" up
    stop "$pidfile"
    configuration "$1" >"$state/ingress.conf"
    start "$pidfile" "$state/log/ingress.log" "$testbed/kube/proxy.sh" exec /usr/sbin/nginx -e stderr -c "$state/ingress.conf"
    wait_for 90 "nginx on $listen" listens || { tail -20 "$state/log/ingress.log" >&2; exit 1; }
}
listens() {
    alive "$pidfile" || { say "nginx has ended:"; tail -20 "$state/log/ingress.log" >&2; exit 1; }
    curl --noproxy '*' -sS --max-time 5 -o /dev/null "http://$listen"
}

case ${1:-}:${2:-} in
up:?*) up "$2" ;;
down:) stop "$pidfile" ;;
*) sed -n 2p "$0" >&2; exit 2 ;;
esac
