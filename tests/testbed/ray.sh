#!/bin/bash
# Ray of PyPI, for tests/tests/l3_ray.rs (make ray): ray.sh image
# Makes the image with its programs once (a minute or two; the wheel has 72 MB), a sandbox of the nodes: /images/ray. Python and what Ray's
# core needs beside itself are Debian's packages.
. "$(dirname "$0")/lib.sh"
. "$testbed/images.sh"
packages=python3-click,python3-filelock,python3-jsonschema,python3-msgpack,python3-packaging,python3-protobuf,python3-requests,python3-yaml

make_image() {
    local image=$1
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    debian_image "$image" "$packages"
    unpack_wheels "$image" --require-hashes -r "$testbed/ray.txt"
    rm -r "$image$modules/ray/jars" # for Java
    # Containers cannot write into the image, and would compile Ray at each start. Its libraries for machine learning are not used.
    chroot "$image" /usr/bin/python3 -m compileall -q -x '/ray/(air|data|llm|rllib|serve|train|tune)/' "$modules" >"$log/ray.log" 2>&1 \
        || say "some modules of Ray were not compiled: $log/ray.log"
    # The last step: whoever finds the program finds all of it.
    printf '#!/usr/bin/python3\nfrom ray.scripts.scripts import main\nmain()\n' >"$work/ray"
    install -m 755 "$work/ray" "$image/usr/local/bin/ray"
}

[ "${1:-}" = image ] || die "usage: ray.sh image"
make_once ray usr/local/bin/ray Ray make_image
