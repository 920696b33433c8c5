#!/bin/bash
# Runs the tests that this machine supports, and ends with a table by level and a line of totals (make test).
# If STACK=full is given, a stack that does not start, or a skipped test, is a failure; skipped tests of the upstream suite are not. The time
# is that of the tests, without compiling and without starting the stack.
given_stack=${STACK:-}
. "$(dirname "$0")/testbed/lib.sh"
. "$testbed/stack.sh"
. "$testbed/profile.sh"
cd "$repository"
export RUST_BACKTRACE=0 RUST_LIB_BACKTRACE=0 # the error already describes what was seen
# Everything is compiled once. What cargo would keep for the next change of a file takes as much room as all binaries together.
export CARGO_INCREMENTAL=0
say "STACK=$STACK ($why), PROFILE=$PROFILE"
results=$log/tests
mkdir -p "$results"
rm -f "$results"/*
reasons=()
# A full disk fails in many places, of which few name the cause.
for place in "$repository" "$KNOC_BED"; do
    free=$(df --output=avail -BG "$place" | tail -1 | tr -dc 0-9)
    [ "$free" -ge 10 ] || { say "$place has only $free GB free"; reasons+=("$place had only $free GB free when the tests began"); }
done
total_passed=0 total_failed=0 total_skipped=0

# suite LEVEL CARGO-ARGUMENTS...: runs the suite, shows its output and keeps it.
suite() {
    local level=$1 code=0
    shift
    say "$level: cargo test $*"
    cargo test --no-fail-fast "$@" 2>&1 | tee -a "$results/$level" || code=$?
    # A suite that ends without a result line (it did not compile, or it crashed) counts as one failure.
    [ $code = 0 ] || grep -q '^test result: FAILED' "$results/$level" || echo "test result: FAILED. 0 passed; 1 failed; 0 ignored" >>"$results/$level"
}
# skip LEVEL REASON CARGO-ARGUMENTS...: counts the tests that are not run.
skip() {
    local level=$1 reason=$2 count
    shift 2
    count=$(cargo test -q "$@" -- --list 2>/dev/null | grep -c ': test$' || true)
    echo "test result: ok. 0 passed; 0 failed; $count ignored" >>"$results/$level"
    reasons+=("skipped: $level: $reason")
}
# test result: ok. P passed; F failed; S ignored; M measured; O filtered out; finished in T.TTs
row() { # row LEVEL WHAT [SECONDS-IT-MAY-TAKE]
    local passed failed skipped seconds
    read -r passed failed skipped seconds < <(awk '/^test result: / { p += $4; f += $6; s += $8; t += $NF }
        END { print p + 0, f + 0, s + 0, int(t + 0.5) }' "$results/$1")
    printf '%-13s %-46s %7d %7d %8d %6d s\n' "$1" "$2" "$passed" "$failed" "$skipped" "$seconds"
    [ "$seconds" -lt "${3:-$((seconds + 1))}" ] || reasons+=("$1 took $seconds s: it is to take less than $3")
    total_passed=$((total_passed + passed)) total_failed=$((total_failed + failed)) total_skipped=$((total_skipped + skipped))
}
tests_named() { (cd tests/tests && ls $1 2>/dev/null | sed 's/\.rs$//; s/^/--test /'); }

# The tests of links start an sshd of their own, with bash, csh and fish as login shells, and an nginx of their own.
install_servers() {
    apt_install tcsh tcsh
    apt_install fish fish
    install_server /usr/sbin/sshd openssh-server ssh.service ssh.socket
    install_nginx
}

# Level 2 needs no root: cargo starts its tests as an ordinary user, if that user can read this folder.
l2_user="no root"
l2() {
    local ordinary="$testbed/ordinary.sh"
    if [ "$(id -u)" = 0 ]; then
        if $ordinary "$KNOC_BIN/knoc-agent" version >/dev/null 2>&1 && $ordinary cat tests/tests/tidy.rs >/dev/null 2>&1; then
            local -x CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER=$ordinary
        else
            l2_user="as root" # no other user can read this folder
        fi
    fi
    # Most tests spend their time waiting; the floods of connections use the CPU and are timed, so they run alone.
    suite L2 -p knoc-tests --test l2 -- --test-threads=16 --skip flood::
    suite L2 -p knoc-tests --test l2 flood:: -- --test-threads=1
}

# profile NAME full|smoke: another way to the agent. Full: what depends on it, and a kill of each side; the rest does not know how the
# agent is reached. Smoke: one pod with its log, commands, copies and deletion.
profile() {
    local -x PROFILE=$1
    local core='l3_profile.rs l3_pods.rs l3_logs.rs l3_streams.rs l3_kubectl.rs l3_delete.rs l3_knocctl.rs'
    [ "$2" = full ] || core=l3_profile.rs
    if "$testbed/up.sh" && "$testbed/sweep.sh"; then
        eval "$("$testbed/env.sh")"
        suite "$1" -p knoc-tests $(tests_named "$core") -- --test-threads=4
        [ "$1" != two-logins ] || suite "$1" -p knoc-tests --test l3_two_logins -- --test-threads=1
        [ "$2" != full ] \
            || suite "$1" -p knoc-tests --test l3_faults -- --test-threads=1 an_agent_that_is_down a_kubelet_that_was_killed
    else
        echo "test result: FAILED. 0 passed; 1 failed; 0 ignored" >>"$results/$1"
    fi
}
# conformance: the part of the upstream suite that fits into every run, on the stack that is up, as `make conformance` runs the lists: with the
# same programs and images, and with the same NODES, SIDE, LIMIT, MINUTES, NETWORK and KNOC_NODE_POD_IP. Its page is not that of docs.
conformance_list=$repository/tests/conformance/ci.txt
conformance_minutes=${MINUTES:-8} # after these no further test is started
conformance_skipped=0
conformance() {
    local code=0 counts passed failed left seconds line
    say "conformance: $conformance_list; after $conformance_minutes minutes no further test is started"
    "$testbed/conformance/run.sh" --page "$results/conformance.md" --minutes "$conformance_minutes" --limit "${LIMIT:-600}" \
        ${SIDE:+--side "$SIDE"} "$conformance_list" 2>&1 | tee "$results/conformance" || code=$?
    counts=$(sed -n 's/^conformance: \([0-9]*\) passed, \([0-9]*\) failed, \([0-9]*\) not started, \([0-9]*\) s$/\1 \2 \3 \4/p' "$results/conformance")
    read -r passed failed left seconds <<<"${counts:-0 0 0 0}"
    # A suite that was not built, was interrupted, or could not set the stack back counts as one failure.
    if [ -z "$counts" ] || { [ $code != 0 ] && [ "$failed" = 0 ]; }; then
        failed=1
        reasons+=("failed: conformance: it ended with code $code, see above")
    fi
    while read -r line; do reasons+=("$line"); done < <(
        sed -n '/^conformance: FAILED in /{N;s/^conformance: FAILED in [0-9]* s: \(.*\)\nconformance: */failed: \1: /p}' "$results/conformance")
    [ "$left" = 0 ] || reasons+=("skipped: conformance: $left tests were not started within $conformance_minutes minutes")
    conformance_skipped=$left
    echo "test result: ok. $passed passed; $failed failed; $left ignored; 0 measured; 0 filtered out; finished in $seconds.00s" >>"$results/conformance"
}
# skip_conformance REASON: counts its tests as skipped.
skip_conformance() {
    conformance_skipped=$(grep -c '^\[' "$conformance_list")
    echo "test result: ok. 0 passed; 0 failed; $conformance_skipped ignored" >"$results/conformance"
    reasons+=("skipped: conformance: $1")
}
if [ "$PROFILE" != direct ]; then
    how=full of="the core of L3"
    [ -z "${SMOKE:-}" ] || how=smoke of="one pod"
    profile "$PROFILE" $how
    "$testbed/kubelet.sh" down
    "$testbed/agent.sh" down
    echo
    printf '%-13s %-46s %7s %7s %8s %8s\n' level what passed failed skipped time
    row "$PROFILE" "$of, PROFILE=$PROFILE"
    grep -h '^test .* FAILED$' "$results"/* | sed 's/^test \(.*\) \.\.\. FAILED/failed: \1/' || true
    echo "$total_passed passed, $total_failed failed, $total_skipped skipped"
    [ $total_failed = 0 ]
    exit
fi

# The other programs that levels 2 and 3 need are installed and built while the unit tests are compiled; a failure is reported when they
# are needed.
install_servers &
[ "$STACK" != full ] || {
    nice "$testbed/kube/setup.sh" metrics-server coredns && nice "$testbed/interop.sh"
    [ "$KUBE_VERSION" != 1.36 ] || [ "$conformance_minutes" = 0 ] || nice "$testbed/kube/setup.sh" conformance
} &
suite unit --workspace --exclude knoc-tests
suite unit -p knoc-tests --lib --bins $(tests_named 'tidy*.rs')
wait
l2

# Faults (nodes that go down, processes that are killed) would affect other tests, so these tests run alone, one after the other.
# l3_argo, l3_ray, l3_charts and l3_large_image are not among them: make argo builds and starts Argo Workflows (ADR 0064), and make ray, make charts and
# make large-image make large images.
faults=$(tests_named 'l3_faults*.rs l3_crash*.rs l3_cut*.rs')
others=$(tests_named 'l3_*.rs' | grep -v 'l3_faults\|l3_crash\|l3_cut\|l3_two_logins\|l3_argo\|l3_ray\|l3_charts\|l3_large_image')
own_ca='l3_access.rs l3_dns.rs l3_identity.rs l3_metrics.rs l3_proxy.rs l3_trust_bundles.rs'
if [ "$STACK" != full ]; then
    skip L3 "STACK=$STACK ($why); the real stack is STACK=full" -p knoc-tests $others $faults
elif ! "$testbed/up.sh"; then
    skip L3 "the stack did not come up, see above" -p knoc-tests $others $faults
    [ "$given_stack" != full ] || total_failed=1
elif ! "$testbed/sweep.sh"; then
    skip L3 "what an earlier run left could not be taken away, see above" -p knoc-tests $others $faults
    [ "$given_stack" != full ] || total_failed=1
elif ! "$testbed/interop.sh"; then
    skip L3 "the clients of the interop suite could not be installed, see above" -p knoc-tests $others $faults
    [ "$given_stack" != full ] || total_failed=1
else
    # What tests start and run is built and made before them, once: a test has other deadlines than a download. If one fails, its test tries again
    # and says why.
    "$testbed/kube/setup.sh" metrics-server coredns || say "metrics-server or CoreDNS could not be built, see above"
    for name in redis dask health python; do "$testbed/$name.sh" image || say "the image of $name.sh could not be made, see above"; done
    eval "$("$testbed/env.sh")"
    if [ -n "$given_kubeconfig" ]; then
        skip L3 "KUBECONFIG was given: these want the CA of a control plane of our own" -p knoc-tests $(tests_named "$own_ca")
        others=$(grep -v 'l3_access\|l3_dns\|l3_identity\|l3_metrics\|l3_proxy\|l3_trust_bundles' <<<"$others")
    fi
    suite L3 -p knoc-tests $others -- --test-threads=8
    [ -z "$faults" ] || suite L3 -p knoc-tests $faults -- --test-threads=1
    # The core suites once more with a kubelet that is a node: NodeRestriction limits it, and its certificates come from the cluster.
    core='l3_access.rs l3_pods.rs l3_kubectl.rs l3_delete.rs'
    "$testbed/kubelet.sh" down
    if [ -n "$given_kubeconfig" ]; then
        skip node "KUBECONFIG was given: whether it has the Node authorizer is not known" -p knoc-tests $(tests_named "$core")
    elif KNOC_IDENTITY=node KNOC_SERVING=csr "$testbed/kubelet.sh" up; then
        suite node -p knoc-tests $(tests_named "$core") -- --test-threads=8
    else
        echo "test result: FAILED. 0 passed; 1 failed; 0 ignored" >>"$results/node"
    fi
    "$testbed/kubelet.sh" down
    # Whatever needs it fails; the other results are still shown.
    "$testbed/kubelet.sh" up || { reasons+=("failed: the kubelet did not come up after the tests of its identity"); total_failed=$((total_failed + 1)); }
    if [ -n "$given_kubeconfig" ]; then
        skip_conformance "KUBECONFIG was given: it wants a control plane of our own"
    elif [ "$KUBE_VERSION" != 1.36 ]; then
        skip_conformance "KUBE_VERSION=$KUBE_VERSION: the suite is that of Kubernetes 1.36"
    elif [ "$conformance_minutes" = 0 ]; then
        skip_conformance "MINUTES=0"
    else
        conformance
    fi
    # The other ways to the agent: the two that differ most in full, the others with one pod.
    if [ -z "$given_kubeconfig" ]; then
        for name in ssh-only outbound-only; do profile $name full; done
        for name in proxy-only isolated two-logins; do profile $name smoke; done
        "$testbed/up.sh" || { reasons+=("failed: the stack did not come up with PROFILE=$PROFILE again"); total_failed=$((total_failed + 1)); }
    else
        reasons+=("KUBECONFIG was given: the other profiles were not tested")
    fi
fi
[ -f "$results/conformance" ] || skip_conformance "it runs with level 3"

echo
printf '%-13s %-46s %7s %7s %8s %8s\n' level what passed failed skipped time
row unit "decisions, parsers, protocols, in one process"
row L2 "real binaries, TLS, local scheduler, $l2_user" 90
row L3 "Kubernetes, Slurm, Apptainer"
[ ! -f "$results/node" ] || row node "the core of L3 with the identity of a node"
row conformance "Kubernetes' own suite, tests/conformance/ci.txt"
for name in ssh-only outbound-only proxy-only isolated two-logins; do
    [ ! -f "$results/$name" ] || row $name "the core of L3, or one pod, PROFILE=$name"
done
grep -h '^test .* ignored, ' "$results"/* | sed 's/^test \(.*\) \.\.\. ignored, /skipped: \1: /' || true
for reason in "${reasons[@]}"; do echo "$reason"; done
grep -h '^test .* FAILED$' "$results"/* | sed 's/^test \(.*\) \.\.\. FAILED/failed: \1/' || true
[ "$given_stack" != full ] || total_failed=$((total_failed + total_skipped - conformance_skipped))
echo "$total_passed passed, $total_failed failed, $total_skipped skipped"
[ $total_failed = 0 ]
