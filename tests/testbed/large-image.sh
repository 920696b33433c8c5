#!/bin/bash
# An image of 5 GB in 20 layers in the registry, for tests/tests/l3_large_image.rs (make large-image): large-image.sh up | down
# The layers are random, so nothing compresses them. Each has the same large file anew and a small one of its own, so the unpacked image
# and its SIF file are as large as one layer. At most 11 GB are on disk at the same time: 5 in the registry, 5 that the agent has fetched,
# and a layer or two. `down` takes the layers away again, also those of a run that was interrupted.
. "$(dirname "$0")/lib.sh"
. "$testbed/stack.sh"
layers=20 bytes=268435456
repositories=http://$registry/v2/library
store=/var/spool/registry/docker/registry/v2 # on the node ctl
work=/scratch/large-image                    # as the nodes see it
here=$HPC_PREFIX/shared$work
list=$run/large-image.layers

node() { hpc exec login "$@" </dev/null; }

upload() { # upload FILE DIGEST
    local location
    location=$(node curl -fsS -X POST -D - -o /dev/null "$repositories/large/blobs/uploads/" | tr -d '\r' | awk 'tolower($1) == "location:" { print $2 }')
    node curl -fsS -o /dev/null -T "$work/$1" "$location&digest=$2"
}
# The digest and the size of a file, as in a manifest.
describe() {
    printf '"digest":"sha256:%s","size":%s' "$(sha256sum <"$here/$1" | cut -d' ' -f1)" "$(stat -c %s "$here/$1")"
}
digest_of() { sed 's/^"digest":"\([^"]*\)".*/\1/' <<<"$1"; }

# Adds a layer to the registry and to `described` and `ids`.
layer() {
    local description digest
    rm -rf "$here/large"
    mkdir "$here/large"
    head -c $bytes /dev/urandom >"$here/large/data"
    echo "$1" >"$here/large/layer-$1"
    tar -C "$here" --owner=0 --group=0 -cf "$here/layer.tar" large
    description=$(describe layer.tar)
    digest=$(digest_of "$description")
    echo "$digest" >>"$list"
    upload layer.tar "$digest"
    described+=",{\"mediaType\":\"application/vnd.oci.image.layer.v1.tar\",$description}"
    ids+=",\"$digest\""
}

up() {
    local free number base digest config described= ids=
    free=$(df --output=avail -BG "$HPC_PREFIX" | tail -1 | tr -dc 0-9)
    [ "$free" -ge 12 ] || die "$HPC_PREFIX has only $free GB free; 12 GB are needed"
    down
    mkdir -p "$here"
    say "making an image of 5 GB in $layers layers"
    base=$(node curl -fsS -H 'Accept: application/vnd.oci.image.manifest.v1+json' "$repositories/busybox/manifests/latest")
    config=$(jq -r .config.digest <<<"$base")
    for digest in $(jq -r '.layers[].digest' <<<"$base"); do
        node curl -fsS -o /dev/null -X POST "$repositories/large/blobs/uploads/?mount=$digest&from=library/busybox"
    done
    for number in $(seq $layers); do layer "$number"; done
    node curl -fsS "$repositories/busybox/blobs/$config" | jq -c --argjson ids "[${ids#,}]" 'del(.history) | .rootfs.diff_ids += $ids' >"$here/config"
    config=$(describe config)
    upload config "$(digest_of "$config")"
    jq -c --argjson layers "[${described#,}]" --argjson config "{$config}" '.layers += $layers | .config += $config' <<<"$base" >"$here/manifest"
    node curl -fsS -o /dev/null -X PUT -H 'Content-Type: application/vnd.oci.image.manifest.v1+json' --data-binary "@$work/manifest" \
        "$repositories/large/manifests/1"
    rm -rf --one-file-system "${here:?}"
}

down() {
    local digest
    if [ -f "$list" ]; then
        while read -r digest; do
            digest=${digest#sha256:}
            hpc exec ctl rm -rf "$store/blobs/sha256/${digest:0:2}/${digest:?}" </dev/null
        done <"$list"
    fi
    hpc exec ctl rm -rf "$store/repositories/library/large" </dev/null
    rm -rf --one-file-system "${here:?}" "$list"
}

[ "$STACK" = full ] || die "STACK=$STACK ($why): the large image is for the full stack"
apt_install jq jq
exec 9>"$run/large-image.lock"
flock 9
case ${1:-} in
up | down) "$1" 9>&- ;;
*) die "usage: large-image.sh up | down" ;;
esac
