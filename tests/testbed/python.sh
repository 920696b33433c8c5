#!/bin/bash
# Python with Kubernetes' client of PyPI, for tests/tests/l3_clients.rs: python.sh image
# Makes the image once (about a minute), a sandbox of the nodes: /images/python. Python is Debian's, the client is that of the interop suite.
. "$(dirname "$0")/lib.sh"
. "$testbed/images.sh"

make_image() {
    local image=$1
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    debian_image "$image" python3
    # node is for another client.
    grep -v '^nodejs' "$repository/tests/interop/requirements.txt" >"$work/requirements.txt"
    unpack_wheels "$image" -r "$work/requirements.txt"
    # Containers cannot write into the image, and would compile the client at each start.
    chroot "$image" /usr/bin/python3 -m compileall -q "$modules" >"$log/python.log" 2>&1 || say "some modules were not compiled: $log/python.log"
    # The last step: whoever finds the program finds all of it.
    printf '#!/bin/sh\nexec /usr/bin/python3 "$@"\n' >"$work/kubernetes-python"
    install -m 755 "$work/kubernetes-python" "$image/usr/local/bin/kubernetes-python"
}

[ "${1:-}" = image ] || die "usage: python.sh image"
make_once python usr/local/bin/kubernetes-python "Python with the Kubernetes client" make_image
