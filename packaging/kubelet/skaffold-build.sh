#!/bin/bash
# Skaffold's custom builder for the kubelet's image (deploy/skaffold.yaml): builds the image with build-image.sh and copies it
# with skopeo to the place that skaffold asks for. Skaffold sets:
#   IMAGE         registry/name:tag
#   PUSH_IMAGE    true: push to that registry with the credentials of docker, podman or skopeo login;
#                 false: load into the local Docker engine, for local clusters such as kind and minikube
# REGISTRY_INSECURE=1: the registry uses plain HTTP, or a certificate that is not trusted.
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
# No signature policy is needed: the source was built here.
skopeo --insecure-policy copy "${flags[@]}" "oci:$dist/knoc-kubelet-oci:$version" "$to"
