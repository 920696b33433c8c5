#!/bin/bash
# Measures what each way to the agent costs and checks what works there, profile by profile, and writes the table in
# docs/guide/links.md (make links). QUICK=1 takes few samples.
. "$(dirname "$0")/lib.sh"
. "$testbed/stack.sh"
[ "$STACK" = full ] || die "STACK=$STACK ($why): the ways to the agent are those of the full stack"
cd "$repository"
rows=$log/links.jsonl
rm -f "$rows"
bench() { cargo run -q --release --target "$target" -p knoc-tests --bin knoc-bench -- ${QUICK:+--quick} "$@"; }

export PROFILE=direct
"$testbed/up.sh"
"$testbed/sweep.sh"
trap 'PROFILE=direct "$testbed/up.sh"' EXIT # the others find the usual way again
for PROFILE in direct ssh-only two-logins outbound-only proxy-only isolated; do
    "$testbed/up.sh"
    eval "$("$testbed/env.sh")"
    # The floor's relay on the login node (tests/src/bench/relay.rs).
    ! rules=$(cat "$HPC_PREFIX/run/firewall-login" 2>/dev/null) || hpc firewall login in:19201 $rules
    bench links "$rows"
done
bench links-page "$rows"
