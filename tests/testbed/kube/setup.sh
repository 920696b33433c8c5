#!/bin/bash
# Builds the control plane of main.go (etcd, Kubernetes $KUBE_VERSION, kubectl; about 6 minutes on 2 cores), helm and
# metrics-server (unmodified, by a go.mod of its own) into $KUBE_PREFIX/bin. Does nothing when they are there. Versions stand
# in go.mod and go-VERSION.mod.
. "$(dirname "$0")/../lib.sh"
here=$testbed/kube
bin=$KUBE_PREFIX/bin
helm_version=v3.22.0
modules=$here/go-$KUBE_VERSION
[ "$KUBE_VERSION" != 1.36 ] || modules=$here/go
[ -f "$modules.mod" ] || die "KUBE_VERSION=$KUBE_VERSION: there is no $modules.mod; 1.36$(cd "$here" && printf ', %s' go-*.mod | sed 's/go-//g; s/\.mod//g') are known"
mkdir -p "$bin"

build_control_plane() {
    local stamp version minor vars=k8s.io/component-base/version name
    stamp=$(cat "$here/main.go" "$modules.mod" "$modules.sum" | sha256sum | cut -c1-16)
    [ "$(cat "$bin/.stamp" 2>/dev/null)" != "$stamp" ] || return 0
    install_go
    version=$(sed -n 's/^\(require \|\t\)k8s.io\/kubernetes \(v[^ ]*\).*/\2/p' "$modules.mod" | head -1)
    minor=${version#v1.} minor=${minor%%.*}
    say "building the Kubernetes $version control plane (about 6 minutes, once)"
    (cd "$here" && CGO_ENABLED=0 go build -trimpath -modfile="$modules.mod" -o "$bin/controlplane" \
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
build_metrics_server() {
    local module=$here/metrics-server stamp version
    stamp=$(cat "$module"/go.mod "$module"/go.sum | sha256sum | cut -c1-16)
    [ "$(cat "$bin/.metrics-server" 2>/dev/null)" != "$stamp" ] || return 0
    install_go
    version=$(sed -n 's/.*sigs.k8s.io\/metrics-server \(v[^ ]*\).*/\1/p' "$module/go.mod")
    say "building metrics-server $version (about 2 minutes, once)"
    (cd "$module" && CGO_ENABLED=0 go build -trimpath -o "$bin/metrics-server" -ldflags "-s -w" sigs.k8s.io/metrics-server/cmd/metrics-server)
    echo "$stamp" >"$bin/.metrics-server"
}
exec 9>"$KUBE_PREFIX/.setup.lock"
flock 9
build_control_plane
build_helm
build_metrics_server
