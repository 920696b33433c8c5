#!/bin/bash
# Python with Kubernetes' client of PyPI, for tests/tests/l3_clients.rs: python.sh image
# Makes the image once (about a minute), a sandbox of the nodes: /images/python. Python is Debian's, the client is that of the interop suite.
. "$(dirname "$0")/lib.sh"
. "$testbed/images.sh"
modules=/usr/local/lib/python3.13/dist-packages # of the image

# install_client INTO: unpacks the client and what it needs for the image's Python, whichever this host has.
install_client() {
    local into=$1
    apt_install python3 python3
    # Debian's python3 has the module venv, but not the packages that it needs.
    python3 -c 'import ensurepip' 2>/dev/null || apt_get python3-venv
    python3 -m venv "$work/python"
    # node is for another client.
    grep -v '^nodejs' "$repository/tests/interop/requirements.txt" >"$work/requirements.txt"
    "$work/python/bin/pip" install -q --disable-pip-version-check --no-deps --no-compile --only-binary=:all: --platform manylinux2014_x86_64 \
        --platform manylinux_2_28_x86_64 --implementation cp --python-version 3.13 --target "$into" -r "$work/requirements.txt"
    rm -rf "$into/bin"
}

make_image() {
    local image=$1
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    debian_image "$image" python3
    install_client "$image$modules"
    chmod -R a+rX "$image$modules"
    # Containers cannot write into the image, and would compile the client at each start.
    chroot "$image" /usr/bin/python3 -m compileall -q "$modules" >"$log/python.log" 2>&1 || say "some modules were not compiled: $log/python.log"
    # The last step: whoever finds the program finds all of it.
    printf '#!/bin/sh\nexec /usr/bin/python3 "$@"\n' >"$work/kubernetes-python"
    install -m 755 "$work/kubernetes-python" "$image/usr/local/bin/kubernetes-python"
}

[ "${1:-}" = image ] || die "usage: python.sh image"
make_once python usr/local/bin/kubernetes-python "Python with the Kubernetes client" make_image
