#!/bin/bash
# Skaffold's custom builder for the kubelet's image (deploy/skaffold.yaml): the image of build-image.sh, copied by skopeo to
# where skaffold wants it. Skaffold sets:
#   IMAGE         registry/name:tag
#   PUSH_IMAGE    true: to that registry, by the credentials that docker, podman or skopeo login left;
#                 false: into the local Docker engine, for clusters of this machine such as kind and minikube
# REGISTRY_INSECURE=1: a registry with plain HTTP, or with a certificate that nobody knows.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${IMAGE:?skaffold sets it}" "${PUSH_IMAGE:?skaffold sets it}"
type -P skopeo >/dev/null || { echo "skopeo is missing; install it with: sudo apt-get install -y skopeo" >&2; exit 1; }
dist=${CARGO_TARGET_DIR:-target}/dist
packaging/kubelet/build-image.sh "$dist"
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
flags=()
if [ "$PUSH_IMAGE" = true ]; then
    to=docker://$IMAGE
    [ -z "${REGISTRY_INSECURE:-}" ] || flags+=(--dest-tls-verify=false)
else
    to=docker-daemon:$IMAGE
fi
# No signature policy: the source was made here a moment ago.
skopeo --insecure-policy copy "${flags[@]}" "oci:$dist/knoc-kubelet-oci:$version" "$to"
