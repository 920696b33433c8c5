#!/bin/bash
# Python and gRPC of Debian, for tests/tests/l3_probes_tls.rs: health.sh image
# Makes the image with its programs once (about half a minute), a sandbox of the nodes: /images/health.
. "$(dirname "$0")/lib.sh"
. "$testbed/images.sh"

make_image() { debian_image "$1" python3,python3-grpcio; }

[ "${1:-}" = image ] || die "usage: health.sh image"
make_once health usr/bin/python3 "Python and gRPC" make_image
