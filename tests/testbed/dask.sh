#!/bin/bash
# Dask of Debian, for tests/tests/l3_dask.rs: dask.sh image
# Makes the image with its programs once (about half a minute), a sandbox of the nodes: /images/dask.
. "$(dirname "$0")/lib.sh"
. "$testbed/images.sh"

make_image() { debian_image "$1" python3-distributed; }

[ "${1:-}" = image ] || die "usage: dask.sh image"
make_once dask usr/bin/dask-worker Dask make_image
