#!/bin/bash
# Dask of Debian, for tests/tests/l3_dask.rs: dask.sh image
# Makes the image with its programs once (about half a minute), a sandbox of the nodes: /images/dask.
. "$(dirname "$0")/lib.sh"
. "$testbed/stack.sh"
image=$HPC_PREFIX/shared/images/dask

[ "$STACK" = full ] || die "STACK=$STACK ($why): Dask is for the full stack"
[ "${1:-}" = image ] || die "usage: dask.sh image"
exec 9>"$run/dask.lock"
flock 9
[ ! -x "$image/usr/bin/dask-worker" ] || exit 0
say "making the image of Dask"
debian_image "$image" python3-distributed 9>&-
