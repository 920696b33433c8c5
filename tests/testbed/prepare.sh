#!/bin/bash
# Builds the static binaries and installs what the stack needs, side by side: cargo first, the rest with what it leaves of
# the processors and the network (downloads, the end of its link-time optimisation). Quick where all is there.
. "$(dirname "$0")/lib.sh"
. "$testbed/stack.sh"
"$testbed/build-tools.sh"
# In a session of its own, so that all of it ends with us.
setsid nice "$testbed/install.sh" &
installing=$!
trap 'kill -- -$installing 2>/dev/null || true' EXIT
# Without crash points only if the caller wants those binaries (make demo, make bench).
goal=build-tested
[ "$KNOC_BIN" != "$built/release" ] || goal=build
make -C "$repository" "$goal"
# A stack that cannot be installed is no reason not to test the rest: `up` tries again, and says so.
wait $installing || say "the stack $STACK could not be installed, see above"
trap - EXIT
