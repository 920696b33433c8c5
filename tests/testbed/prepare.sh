#!/bin/bash
# Builds the static binaries and installs what the stack needs, in parallel: cargo has priority, the rest uses the CPU and network
# that it leaves (downloads, the end of its link-time optimisation). Fast if everything is already there.
. "$(dirname "$0")/lib.sh"
. "$testbed/stack.sh"
"$testbed/build-tools.sh"
# In its own session, so that all of it ends with this script.
setsid nice "$testbed/install.sh" &
installing=$!
trap 'kill -- -$installing 2>/dev/null || true' EXIT
# Without crash points only if the caller wants those binaries (make demo, make bench).
goal=build-tested
[ "$KNOC_BIN" != "$built/release" ] || goal=build
make -C "$repository" "$goal"
# If the stack cannot be installed, the other tests still run; `up` tries again and reports the error.
wait $installing || say "the stack $STACK could not be installed, see above"
trap - EXIT
