#!/bin/bash
# Collects everything of a release in one folder, and publishes nothing:
#   packaging/release.sh [OUTPUT-FOLDER]       default: target/dist/release
# The agent's tarball, the kubelet's images as OCI archives, the chart, the list of crates (CycloneDX), their licences, the changes, and
# SHA256SUMS. The tree must be clean, so that the commit says what is in it. KNOC_BIN names the folder of the binaries (default: the
# release build of `make build`); then a changed tree is accepted, for the tests. The output is reproducible from the same binaries.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-${CARGO_TARGET_DIR:-target}/dist/release}
fail() { echo "release: $*" >&2; exit 1; }

[ -n "${KNOC_BIN:-}" ] || [ -z "$(git status --porcelain)" ] || fail "the tree has changes that are not committed: git status"
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
chart=$(sed -n 's/^version: //p' deploy/chart/knoc/Chart.yaml)
app=$(sed -n 's/^appVersion: //p' deploy/chart/knoc/Chart.yaml)
[ "$version" = "$chart" ] && [ "$version" = "$app" ] ||
    fail "Cargo.toml has version $version, Chart.yaml $chart with appVersion $app: make them the same"
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH

stage=$(mktemp -d)
trap 'rm -r "$stage"' EXIT
mkdir "$stage/release"
packaging/agent/build-tarball.sh "$stage"
packaging/kubelet/build-image.sh "$stage"
packaging/kubelet/build-image.sh --ssh "$stage"
cp "$stage"/knoc-agent-*.tar.gz "$stage"/knoc-kubelet-*.oci.tar "$stage/release"
tar --create --directory deploy/chart --sort=name --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX --mtime="@$SOURCE_DATE_EPOCH" knoc |
    gzip --no-name --best >"$stage/release/knoc-$version.tgz"
python3 packaging/sbom.py "$stage/release"
# The section of this version, or of what has no version yet.
section() { awk -v heading="## [$1]" 'index($0, "## [") == 1 { inside = index($0, heading) == 1 } inside' CHANGELOG.md; }
changes=$(section "$version")
[ -n "$changes" ] || changes=$(section Unreleased)
[ -n "$changes" ] || fail "CHANGELOG.md has neither a section [$version] nor [Unreleased]"
printf '%s\n' "$changes" >"$stage/release/CHANGES.md"
(cd "$stage/release" && LC_ALL=C sha256sum -- * >"$stage/SHA256SUMS" && mv "$stage/SHA256SUMS" .)

mkdir -p "$out"
rm -rf "$out.new" && cp -r "$stage/release" "$out.new"
rm -rf "${out:?}" && mv "$out.new" "$out"
echo "release $version of $(git log -1 --format=%h) in $out; nothing was published:"
(cd "$out" && ls -l | awk 'NR > 1 { printf "%12d  %s\n", $5, $9 }')
