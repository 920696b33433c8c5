#!/bin/bash
# Builds into $KUBE_PREFIX/bin what is missing there; the versions are in go.mod and go-VERSION.mod:
#   setup.sh [control-plane] [helm] [metrics-server] [coredns] [kubectl] [conformance]
# control-plane: main.go (etcd, Kubernetes $KUBE_VERSION, kubectl; about 6 minutes on 2 cores). metrics-server: unmodified, with its
# own go.mod. coredns: with the plugins that a cluster's DNS has. kubectl: only kubectl, for a given cluster. conformance: the upstream
# end-to-end suite, ginkgo's test binary e2e.test, and agnhost, the program of its test image.
. "$(dirname "$0")/../lib.sh"
here=$testbed/kube
bin=$KUBE_PREFIX/bin
helm_version=v3.22.0
helm_module=helm.sh/helm/v3
modules=$here/go-$KUBE_VERSION
[ "$KUBE_VERSION" != 1.36 ] || modules=$here/go
[ -f "$modules.mod" ] || die "KUBE_VERSION=$KUBE_VERSION: there is no $modules.mod; 1.36$(cd "$here" && printf ', %s' go-*.mod | sed 's/go-//g; s/\.mod//g') are known"
mkdir -p "$bin"
export CGO_ENABLED=0

# kubernetes: its version, and the flags that put it into the programs.
kubernetes() {
    local minor vars=k8s.io/component-base/version
    version=$(sed -n 's/^\(require \|\t\)k8s.io\/kubernetes \(v[^ ]*\).*/\2/p' "$modules.mod" | head -1)
    minor=${version#v1.} minor=${minor%%.*}
    version_flags="-s -w -X $vars.gitVersion=$version -X $vars.gitMajor=1 -X $vars.gitMinor=$minor -X k8s.io/client-go/pkg/version.gitVersion=$version"
}
build_control_plane() {
    local stamp name
    stamp=$(cat "$here/main.go" "$modules.mod" "$modules.sum" | sha256sum | cut -c1-16)
    [ "$(cat "$bin/.stamp" 2>/dev/null)" != "$stamp" ] || return 0
    install_go
    kubernetes
    say "building the Kubernetes $version control plane (about 6 minutes and 2700 packages, once)"
    (cd "$here" && go_build "the control plane" build -modfile="$modules.mod" -ldflags "$version_flags" -o "$bin/controlplane" .)
    for name in etcd kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubectl; do
        rm -f "$bin/$name"
        printf '#!/bin/sh\nexec "%s/controlplane" %s "$@"\n' "$bin" $name >"$bin/$name"
        chmod +x "$bin/$name"
    done
    echo "$stamp" >"$bin/.stamp"
}
build_kubectl() {
    [ ! -x "$bin/kubectl" ] || return 0
    install_go
    kubernetes
    say "building kubectl $version (about 2 minutes, once)"
    (cd "$here" && go_build kubectl build -modfile="$modules.mod" -ldflags "$version_flags" -o "$bin/kubectl" k8s.io/kubernetes/cmd/kubectl)
}
build_helm() {
    local vars
    [ "$(cat "$bin/.helm" 2>/dev/null)" != $helm_version ] || return 0
    install_go
    say "building helm $helm_version (about a minute, once)"
    # If there is no cluster to ask (helm template, skaffold render), helm uses this as the version of Kubernetes.
    vars="-X $helm_module/pkg/chartutil.k8sVersionMajor=1 -X $helm_module/pkg/chartutil.k8sVersionMinor=36 -X $helm_module/internal/version.version=$helm_version"
    GOBIN=$bin go_build helm install -ldflags "-s -w $vars" $helm_module/cmd/helm@$helm_version
    echo $helm_version >"$bin/.helm"
}
build_metrics_server() {
    local module=$here/metrics-server stamp version
    stamp=$(cat "$module"/go.mod "$module"/go.sum | sha256sum | cut -c1-16)
    [ "$(cat "$bin/.metrics-server" 2>/dev/null)" != "$stamp" ] || return 0
    install_go
    version=$(sed -n 's/.*sigs.k8s.io\/metrics-server \(v[^ ]*\).*/\1/p' "$module/go.mod")
    say "building metrics-server $version (about 2 minutes, once)"
    (cd "$module" && go_build metrics-server build -ldflags "-s -w" -o "$bin/metrics-server" sigs.k8s.io/metrics-server/cmd/metrics-server)
    echo "$stamp" >"$bin/.metrics-server"
}
build_coredns() {
    local module=$here/coredns stamp version
    stamp=$(cat "$module"/main.go "$module"/go.mod "$module"/go.sum | sha256sum | cut -c1-16)
    [ "$(cat "$bin/.coredns" 2>/dev/null)" != "$stamp" ] || return 0
    install_go
    version=$(sed -n 's/.*github.com\/coredns\/coredns \(v[^ ]*\).*/\1/p' "$module/go.mod")
    say "building CoreDNS $version (about 2 minutes, once)"
    (cd "$module" && go_build CoreDNS build -ldflags "-s -w" -o "$bin/coredns" .)
    echo "$stamp" >"$bin/.coredns"
}
build_conformance() {
    local module=$testbed/conformance stamp
    [ "$KUBE_VERSION" = 1.36 ] || die "the conformance suite is that of Kubernetes 1.36, and KUBE_VERSION is $KUBE_VERSION"
    stamp=$(cat "$module"/go.mod "$module"/go.sum | sha256sum | cut -c1-16)
    [ "$(cat "$bin/.conformance" 2>/dev/null)" != "$stamp" ] || return 0
    install_go
    kubernetes
    say "building the end-to-end suite of Kubernetes $version (about 10 minutes, once)"
    (cd "$module" && go_build agnhost build -ldflags "-s -w" -o "$bin/agnhost" k8s.io/kubernetes/test/images/agnhost \
        && go_build "the end-to-end suite" test -c -ldflags "$version_flags" -o "$bin/e2e.test" k8s.io/kubernetes/test/e2e)
    echo "$stamp" >"$bin/.conformance"
}
exec 9>"$KUBE_PREFIX/.setup.lock"
flock 9
for part in "$@"; do
    case $part in
    control-plane) build_control_plane ;;
    helm) build_helm ;;
    metrics-server) build_metrics_server ;;
    coredns) build_coredns ;;
    kubectl) build_kubectl ;;
    conformance) build_conformance ;;
    *) die "$part: control-plane, helm, metrics-server, coredns, kubectl and conformance are known" ;;
    esac
done
trim_go_cache
