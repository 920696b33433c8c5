#!/bin/bash
# Builds the kubelet's OCI image without a container engine:
#   packaging/kubelet/build-image.sh [--ssh] [OUTPUT-FOLDER]       default: target/dist
#   --ssh   the variant with OpenSSH for `ssh:` addresses: VERSION-ssh. It contains ssh, dash (through which ssh reaches a jump
#           host) and their libraries from this machine, with their copyright files.
# Writes OUTPUT/knoc-kubelet-oci (an OCI layout: skopeo copy oci:…:VERSION docker://…) and OUTPUT/knoc-kubelet-VERSION.oci.tar
# (an oci-archive: podman load, ctr images import, docker load with containerd's image store).
# KNOC_BIN names the folder of the binary (default: the release build of `make build`). Needs only python3.
set -euo pipefail
cd "$(dirname "$0")/../.."
ssh=
[ "${1:-}" != --ssh ] || { ssh=yes; shift; }
target=x86_64-unknown-linux-musl
bin=${KNOC_BIN:-${CARGO_TARGET_DIR:-target}/$target/release}
out=${1:-${CARGO_TARGET_DIR:-target}/dist}
binary=$bin/knoc-kubelet

[ -x "$binary" ] || { echo "$binary is missing; build it with: make build" >&2; exit 1; }
# The image contains nothing but the binary, so there is no dynamic loader in it.
! LC_ALL=C grep -q 'ld-linux-x86-64' "$binary" || { echo "$binary is not static" >&2; exit 1; }
# What is shipped has no crash points (ADR 0080); the tests, which name KNOC_BIN, pack the binaries that they test.
[ -n "${KNOC_BIN:-}" ] || ! LC_ALL=C grep -q 'kubelet\.patch\.before' "$binary" ||
    { echo "$binary was built for the tests; build it with: make build" >&2; exit 1; }
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
more=()
if [ -n "$ssh" ]; then
    files=$(mktemp -d)
    trap 'rm -rf "$files"' EXIT
    packaging/kubelet/ssh-files.sh "$files"
    more=(--files "$files" --suffix=-ssh)
fi
python3 packaging/kubelet/oci_image.py --binary "$binary" --license LICENSE --version "$version" --output "$out" "${more[@]}"
