#!/bin/bash
# Argo Workflows, unmodified, for tests/tests/l3_argo.rs (make argo): argo.sh build | up | down | running
# The controller and argoexec are built from the Go module of Argo Workflows, and gofakes3, an S3-like store, from its own. The controller
# is a process of this host with the ServiceAccount and the roles of Argo's own manifests, because the cluster of the test bed has no other
# node for it. The store runs on the node ctl, keeps everything in memory and asks for no password; compute nodes reach it as they reach
# the store of a site. The image of argoexec is a file of the site, and one with OpenMPI is in the registry. Pods can write below /scratch/argo of the nodes.
# Versions: v4.0.5 is the newest of Argo's releases that the Go module proxy serves (ADR 0064). Both programs listen only
# while the tests need them.
. "$(dirname "$0")/lib.sh"
. "$testbed/stack.sh"
version=v4.0.5
module=github.com/argoproj/argo-workflows/v4
store_version=v1.2.0
store_module=github.com/johannesboyne/gofakes3
bin=$tools/argo
sources=$bin/sources
images=$HPC_PREFIX/shared/images/argo
layout=/images/argo/layout # as the nodes see it
pidfile=$run/argo-controller.pid
store_pidfile=$run/argo-store.pid
kubeconfig=$run/argo.kubeconfig
store=10.78.0.2:9000 # on the node ctl
site_file=$agent_home_here/.config/knoc/agent.toml

# The sources of Argo Workflows. Modules have no symbolic links, and in Argo's repository some files of argoexec for Linux are links to
# those for macOS: go install does not build argoexec, and Go replaces no file of a module. So they are copied, and the links made again.
unpack() {
    local file linux
    rm -rf --one-file-system "${sources:?}"
    cp -r "$(go mod download -json $module@$version | jq -r .Dir)" "$sources"
    chmod -R u+w "$sources"
    for file in "$sources"/workflow/executor/osspecific/*_darwin.go; do
        linux=${file%_darwin.go}_linux.go
        [ -e "$linux" ] || ln -s "${file##*/}" "$linux"
    done
}
# Builds the three programs, unless they have these versions.
build() {
    local versions="$version $store_version"
    install_go
    [ "$(cat "$bin/.built" 2>/dev/null)" != "$versions" ] || return 0
    say "building Argo Workflows $version and gofakes3 $store_version (about 8 minutes, once)"
    mkdir -p "$bin"
    unpack
    export CGO_ENABLED=0
    (cd "$sources" && go_build "Argo Workflows" build -ldflags "-s -w -X $module.version=$version" -o "$bin/" ./cmd/workflow-controller ./cmd/argoexec)
    GOBIN=$bin go_build gofakes3 install -ldflags "-s -w" $store_module/cmd/gofakes3@$store_version
    echo "$versions" >"$bin/.built"
    trim_go_cache
}

node() { hpc exec login "$@"; }
push() { # push NAME NAME:TAG: copies the image of the layout to the registry
    node skopeo copy -q --insecure-policy --dest-tls-verify=false "oci:$layout:$1" "docker://$registry/library/$2"
}
# As the image of upstream: argoexec in PATH, and a user that is not root. It has a shell, for those who look around in it. Pods take it from
# a SIF file of the site, compressed with lz4: from the one that Apptainer makes of an image of a registry, argoexec starts three times as
# slowly, and on a busy machine of two cores the controller then stops `wait` before it has begun (ADR 0064).
executor_image() {
    install -D -m 755 "$bin/argoexec" "$images/argoexec/argoexec"
    node skopeo copy -q --insecure-policy oci:/images/busybox.oci:latest "oci:$layout:argoexec"
    node umoci insert --image "$layout:argoexec" /images/argo/argoexec/argoexec /bin/argoexec >/dev/null 2>&1
    node umoci config --image "$layout:argoexec" --clear=config.cmd --config.entrypoint argoexec --config.user 8737
    node skopeo copy -q --insecure-policy "oci:$layout:argoexec" docker-archive:/images/argo/argoexec/image.tar:argoexec:1
    node apptainer -q build -F --mksquashfs-args '-comp lz4' /images/argo/argoexec.sif docker-archive:/images/argo/argoexec/image.tar
}
# OpenMPI and mpi4py of Debian, with the benchmarks of mpi4py.
mpi_image() {
    mmdebstrap --quiet --mode=root --variant=minbase --include=openmpi-bin,python3-mpi4py --aptopt='Acquire::Check-Valid-Until "false"' \
        --aptopt='APT::Install-Recommends "false"' --dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' trixie "$images/mpi4py"
    rm -rf "$images"/mpi4py/dev/* "$images"/mpi4py/var/{lib/apt/lists,cache/apt}/*
    chmod -R a+rX "$images/mpi4py"
    node umoci new --image "$layout:mpi4py"
    node umoci insert --image "$layout:mpi4py" /images/argo/mpi4py / >/dev/null 2>&1
    node umoci config --image "$layout:mpi4py" --config.cmd /bin/sh --config.workingdir / \
        --config.env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    push mpi4py mpi4py:1
}
make_images() {
    local stamp made=$HPC_PREFIX/shared/images/.argo.packed # down.sh --wipe removes it with the registry
    stamp=$({ declare -f executor_image mpi_image push; cat "$bin/.built"; } | sha256sum | cut -c1-16)
    [ "$(cat "$made" 2>/dev/null)" != "$stamp" ] || return 0
    say "making the images of argoexec and of OpenMPI"
    apt_install mmdebstrap mmdebstrap
    ! alive "$store_pidfile" || stop "$store_pidfile"
    rm -rf --one-file-system "${images:?}"
    mkdir -p "$images"
    install -m 755 "$bin/gofakes3" "$images/gofakes3"
    executor_image
    mpi_image
    rm -rf --one-file-system "$images/layout" "$images/mpi4py" "$images/argoexec" # the registry has them
    chmod -R a+rX "$images"
    echo "$stamp" >"$made"
}

# Lets pods write below /scratch/argo. sweep.sh and `down` remove it.
site_allows() {
    local line='host_paths = [{ path = "/scratch/argo", writable = true }]'
    hpc exec login -u hpcuser mkdir -p /scratch/argo
    ! grep -qxF "$line" "$site_file" || return 0
    sed -i -e '/^host_paths *=/d' -e "s|^\[policy\]\$|&\n$line|" "$site_file"
    grep -qxF "$line" "$site_file" || die "$site_file has no table [policy]"
    # The agent reads the file again by itself within ten seconds; after a restart it has read it.
    "$testbed/agent.sh" down
    "$testbed/agent.sh" up
}
store_up() {
    alive "$store_pidfile" || start "$store_pidfile" "$log/argo-store.log" "$HPC_PREFIX/bin/hpc" exec ctl \
        /images/argo/gofakes3 -backend memory -initialbucket artifacts -host $store
    wait_for 20 "the store at $store" node curl -sSf -o /dev/null "http://$store/artifacts" \
        || { tail -5 "$log/argo-store.log" >&2; exit 1; }
}

apply() { kubectl apply "$@" >/dev/null; }
# The objects of Argo's manifests without its Deployments, and its configuration. The definitions are those without schemas of templates.
objects() {
    local manifests=$sources/manifests roles
    roles=$manifests/cluster-install-no-crds/workflow-controller-rbac
    apply --server-side --force-conflicts -k "$manifests/base/crds/minimal"
    kubectl create namespace argo --dry-run=client -o yaml | apply -f -
    apply --namespace argo -f "$manifests/base/workflow-controller/workflow-controller-sa.yaml" \
        -f "$roles/workflow-controller-clusterrole.yaml" -f "$roles/workflow-controller-role.yaml"
    # In the manifests, kustomize adds the namespace.
    kubectl create clusterrolebinding argo-binding --clusterrole=argo-cluster-role --serviceaccount=argo:argo --dry-run=client -o yaml | apply -f -
    kubectl create rolebinding argo-binding --namespace argo --role=argo-role --serviceaccount=argo:argo --dry-run=client -o yaml | apply -f -
    configuration | apply -f -
    kubectl wait --for=condition=Established crd/workflows.argoproj.io crd/workflowtaskresults.argoproj.io --timeout=30s >/dev/null
}
# The executor needs more memory than the bed's nodes give to a job that asks for none. The image-root makes /argo/argoexec.sif a file below
# /images; the example image-root.yaml has the same.
configuration() {
    cat <<END
apiVersion: v1
kind: ConfigMap
metadata: {name: workflow-controller-configmap, namespace: argo}
data:
  config: |
    metricsConfig: {enabled: false}
    executor:
      resources:
        requests: {cpu: 100m, memory: 64Mi}
        limits: {memory: 256Mi}
    mainContainer:
      resources:
        limits: {memory: 256Mi}
    workflowDefaults:
      spec:
        podMetadata:
          annotations: {slurm-job.knoc.io/image-root: /images}
    artifactRepository:
      s3:
        endpoint: $store
        bucket: artifacts
        region: us-east-1
        insecure: true
        accessKeySecret: {name: argo-store, key: accesskey}
        secretKeySecret: {name: argo-store, key: secretkey}
END
}
account() { # the kubeconfig of Argo's own ServiceAccount
    (
        umask 077
        kubectl config --kubeconfig="$kubeconfig" set-cluster knoc --server="$(kubectl config view --minify -o 'jsonpath={.clusters[0].cluster.server}')" \
            --certificate-authority="$KUBE_PREFIX/run/ca.crt" --embed-certs
        kubectl config --kubeconfig="$kubeconfig" set-credentials argo --token="$(kubectl create token argo --namespace argo --duration=24h)"
        kubectl config --kubeconfig="$kubeconfig" set-context default --cluster=knoc --user=argo --namespace=argo
        kubectl config --kubeconfig="$kubeconfig" use-context default
    ) >/dev/null
}
controller_up() {
    if ! alive "$pidfile"; then
        account
        start "$pidfile" "$log/argo-controller.log" env -i PATH="$PATH" HOME="$run" LEADER_ELECTION_DISABLE=true \
            "$bin/workflow-controller" --kubeconfig="$kubeconfig" --namespace=argo --qps=50 --burst=100 \
            --executor-image=/argo/argoexec.sif --executor-image-pull-policy=IfNotPresent
    fi
    wait_for 60 "the controller of Argo Workflows" curl -sSf -o /dev/null http://127.0.0.1:6060/healthz \
        || { tail -20 "$log/argo-controller.log" >&2; exit 1; }
}
up() {
    [ "$STACK" = full ] || die "STACK=$STACK ($why): Argo Workflows needs the full stack"
    [ -z "$given_kubeconfig" ] || die "KUBECONFIG is set: Argo Workflows is installed only in a cluster of the test bed"
    build
    make_images
    site_allows
    store_up
    objects
    controller_up
    say "Argo Workflows $version is up: $(kubectl get crd workflows.argoproj.io -o name)"
}

case ${1:-} in
build) build ;;
up) up ;;
down)
    stop "$pidfile"
    stop "$store_pidfile"
    rm -f "$kubeconfig"
    [ ! -f "$site_file" ] || sed -i '/^host_paths = \[{ path = "\/scratch\/argo"/d' "$site_file"
    ;;
running) alive "$pidfile" && alive "$store_pidfile" ;;
*) sed -n 2p "$0" >&2; exit 2 ;;
esac
