#!/bin/bash
# Starts the fullest stack, runs an example pod and shows the results (make demo).
# demo.sh [--transcript FILE]
[ "${1:-}" != --transcript ] || transcript=$2
. "$(dirname "$0")/testbed/lib.sh"
. "$testbed/stack.sh"
"$testbed/up.sh"
eval "$("$testbed/env.sh")"
cd "$repository"

show() { # runs a command line as a reader would type it
    printf '\n\e[1m$ %s\e[0m\n' "$*"
    eval "$*"
}
on_kubernetes() {
    kubectl delete pod hello --ignore-not-found --wait=true >/dev/null
    show kubectl apply -f deploy/examples/hello.yaml
    show kubectl wait --for=condition=Ready pod/hello --timeout=60s
    show kubectl get nodes
    show kubectl get pods -o wide
    show kubectl logs hello
    show kubectl exec hello -- hostname
    uid=$(kubectl get pod hello -o 'jsonpath={.metadata.uid}')
    show knocctl exec "$uid" -- hostname
    show knocctl pods
    show "$HPC_PREFIX/bin/hpc exec login -u hpcuser squeue"
    cat <<'TEXT'

Next:
  eval "$(make -s env)"                 # kubectl, knocctl and their configuration
  kubectl apply -f deploy/examples/job.yaml    # 20 more pods; docs/guide/using.md says what the other examples need
  knocctl doctor                        # checks the whole chain
  make down
TEXT
}
on_the_agent_alone() {
    # Another name, because a pod `hello` of the full stack belongs to Kubernetes even while Kubernetes is down.
    local pod=hello-alone
    sed "s/^  name: hello$/  name: $pod/" deploy/examples/hello.yaml >"$run/$pod.yaml"
    knocctl delete $pod >/dev/null 2>&1 || true
    show knocctl info
    show knocctl run -f "$run/$pod.yaml"
    wait_for 60 "the pod $pod runs" sh -c "knocctl pods | grep '$pod .* 1/1 '"
    show knocctl pods
    show knocctl logs $pod
    show knocctl exec $pod -- hostname
    cat <<'TEXT'

Next:
  eval "$(make -s env)"    # knocctl and its configuration
  knocctl describe hello-alone
  knocctl doctor
  make down
TEXT
}
demo() {
    say "STACK=$STACK ($why)"
    case $STACK in full) on_kubernetes ;; *) on_the_agent_alone ;; esac
}
if [ -n "${transcript:-}" ]; then
    {
        printf '# A demo, as it ran\n\nWritten by `make demo-transcript`, %s, %s.\n\n```\n' "$(date -u +%F)" "$(. /etc/os-release && echo "$PRETTY_NAME")"
        demo 2>&1 | sed 's/\x1b\[[0-9]*m//g'
        echo '```'
    } | tee "$transcript"
else
    demo
fi
