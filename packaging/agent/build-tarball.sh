#!/bin/bash
# Packs the static knoc-agent and knocctl with the installer, systemd user unit, completions and licence:
#   packaging/agent/build-tarball.sh [OUTPUT-FOLDER]       default: target/dist
# KNOC_BIN names the folder of the binaries (default: the release build of `make build`). The output is reproducible.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=x86_64-unknown-linux-musl
bin=${KNOC_BIN:-${CARGO_TARGET_DIR:-target}/$target/release}
out=${1:-${CARGO_TARGET_DIR:-target}/dist}
limit=$((10 << 20)) # bytes of knoc-agent
[ -z "${KNOC_BIN:-}" ] || limit=$((limit + (64 << 10))) # of the tests: with crash points

for name in knoc-agent knocctl; do
    [ -x "$bin/$name" ] || { echo "$bin/$name is missing; build it with: make build" >&2; exit 1; }
    ! LC_ALL=C grep -q 'ld-linux-x86-64' "$bin/$name" || { echo "$bin/$name is not static" >&2; exit 1; }
done
# What is shipped has no crash points (ADR 0080); the tests, which name KNOC_BIN, pack the binaries that they test.
[ -n "${KNOC_BIN:-}" ] || ! LC_ALL=C grep -q 'shim\.claim\.before' "$bin/knoc-agent" ||
    { echo "$bin/knoc-agent was built for the tests; build it with: make build" >&2; exit 1; }
size=$(stat -c %s "$bin/knoc-agent")
[ "$size" -le "$limit" ] || { echo "knoc-agent has $size bytes, more than $limit" >&2; exit 1; }

version=$("$bin/knoc-agent" version | awk '{print $2}')
name=knoc-agent-$version-x86_64-linux
stage=$(mktemp -d)
trap 'rm -r "$stage"' EXIT
mkdir -p "$stage/$name/completions" "$out"
install -m 755 "$bin/knoc-agent" "$bin/knocctl" packaging/agent/install.sh "$stage/$name"
install -m 644 packaging/agent/knoc-agent.service packaging/agent/README.md LICENSE "$stage/$name"
"$bin/knocctl" completions bash >"$stage/$name/completions/knocctl.bash"
"$bin/knocctl" completions zsh >"$stage/$name/completions/_knocctl"
"$bin/knocctl" completions fish >"$stage/$name/completions/knocctl.fish"
chmod 644 "$stage/$name/completions/"*

tar --create --directory "$stage" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@${SOURCE_DATE_EPOCH:-0}" "$name" |
    gzip --no-name --best >"$out/$name.tar.gz.new"
mv "$out/$name.tar.gz.new" "$out/$name.tar.gz"
(cd "$out" && sha256sum "$name.tar.gz" >"$name.tar.gz.sha256")
echo "$out/$name.tar.gz ($(stat -c %s "$out/$name.tar.gz") bytes, knoc-agent $size)"
