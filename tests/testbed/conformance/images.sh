#!/bin/bash
# Makes the images of the upstream end-to-end suite from Debian packages and from agnhost (kube/setup.sh conformance), and pushes them
# to http://ctl:5000 under the names and tags of k8s.io/kubernetes/test/utils/image/manifest.go; does nothing if they are there.
#
# All images but pause have one layer in common: busybox, bash, curl, dig, getent, hostname, nc and nginx; sh.c says which shell its `sh` is. It
# calls itself Alpine Linux, as those of upstream do, because a test looks for that name. The agent forgets its images, as it
# would keep older ones of the same names.
. "$(dirname "$0")/../lib.sh"
. "$testbed/stack.sh"
images=$HPC_PREFIX/shared/images/conformance
layout=/images/conformance/layout # as the nodes see it
packages=bash-static,busybox-static,curl,bind9-dnsutils,hostname,netcat-openbsd,iproute2,libc-bin,nginx-light,ca-certificates
node() { hpc exec login "$@"; }

base() {
    local tree=$images/base name applet
    # Unpacked only: nothing in it needs to be configured.
    mmdebstrap --quiet --mode=root --variant=extract --include=$packages --aptopt='Acquire::Check-Valid-Until "false"' \
        --aptopt='APT::Install-Recommends "false"' --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' trixie "$tree"
    rm -rf "$tree"/{dev,var/lib/apt,var/lib/dpkg,var/cache}
    for name in bin sbin lib lib64; do [ -e "$tree/$name" ] || ln -s "usr/$name" "$tree/$name"; done
    mkdir -p "$tree"/{dev,proc,sys,root,home,mnt,srv,run,uploads,var/tmp,var/log/nginx,var/lib/nginx,var/cache/nginx,usr/local/bin}
    chmod 1777 "$tree/tmp" "$tree/var/tmp" "$tree/run" "$tree/var/log/nginx" "$tree/var/lib/nginx" "$tree/var/cache/nginx"
    for applet in $("$tree/usr/bin/busybox" --list); do
        [ -e "$tree/usr/bin/$applet" ] || [ -e "$tree/usr/sbin/$applet" ] || ln -s busybox "$tree/usr/bin/$applet"
    done
    ln -sf bash-static "$tree/usr/bin/bash"
    rm -f "$tree/usr/bin/sh"
    musl-gcc -static -Os -s -o "$tree/usr/bin/sh" "$testbed/conformance/sh.c"
    ln -sf nc.openbsd "$tree/usr/bin/nc"
    printf '%s\n' root:x:0:0:root:/root:/bin/sh nobody:x:65534:65534:nobody:/:/bin/false nginx:x:101:101::/var/lib/nginx:/bin/false \
        user-defined-in-image:x:1000:1000::/home/user-defined-in-image:/bin/sh >"$tree/etc/passwd"
    printf '%s\n' root:x:0: nogroup:x:65534: nginx:x:101: user-defined-in-image:x:1000: \
        group-defined-in-image:x:50000:user-defined-in-image >"$tree/etc/group"
    printf '%s\n' 'NAME="Alpine Linux"' ID=alpine 'PRETTY_NAME="Alpine Linux (a stand-in of packages of Debian)"' >"$tree/etc/os-release"
    touch "$tree"/etc/{resolv.conf,hosts,localtime}
    echo 'hosts: files dns' >"$tree/etc/nsswitch.conf"
    rm -rf "$tree"/etc/nginx/{sites-enabled,modules-enabled}
    printf '%s\n' 'pid /tmp/nginx.pid;' 'events {}' 'http { server { listen 80; root /usr/share/nginx/html; } }' >"$tree/etc/nginx/nginx.conf"
    chmod -R a+rX "$tree"
    chmod u-s,g-s -R "$tree"
    node umoci init --layout "$layout"
    node umoci new --image "$layout:base"
    node umoci insert --image "$layout:base" /images/conformance/base / >/dev/null 2>&1
    node umoci config --image "$layout:base" --config.env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        --config.workingdir / --config.cmd sh
}
# derived NAME BASE: a copy of the image BASE with the files of $images/NAME, if there are any
derived() {
    node umoci tag --image "$layout:$2" "$1"
    [ ! -d "$images/$1" ] || node umoci insert --image "$layout:$1" "/images/conformance/$1" / >/dev/null 2>&1
}
config() { local name=$1; shift; node umoci config --image "$layout:$name" "$@"; }
push() { # push NAME REPOSITORY:TAG…
    local name=$1 target
    shift
    for target in "$@"; do node skopeo copy -q --insecure-policy --dest-tls-verify=false "oci:$layout:$name" "docker://ctl:5000/$target"; done
}

make_images() {
    local animal upstream
    upstream=$(cd "$testbed/conformance" && go list -m -f '{{.Dir}}' k8s.io/kubernetes)
    base
    push base e2e-test-images/busybox:1.37.0-1 e2e-test-images/glibc-dns-testing:2.0.0

    install -D -m 755 "$KUBE_PREFIX/bin/agnhost" "$images/agnhost/agnhost"
    ln -s agnhost "$images/agnhost/agnhost-2"
    install -m 644 "$upstream"/test/images/agnhost/porter/localhost.{crt,key} "$images/agnhost"
    derived agnhost base
    config agnhost --config.entrypoint /agnhost --clear=config.cmd --config.cmd pause --config.exposedports 80 --config.exposedports 8080
    push agnhost e2e-test-images/agnhost:2.63.0 e2e-test-images/agnhost:2.55

    for animal in kitten nautilus; do
        mkdir "$images/$animal"
        install -m 644 "$upstream/test/images/$animal/html/"* "$images/$animal"
        derived $animal agnhost
        config $animal --clear=config.cmd --config.cmd test-webserver
        push $animal e2e-test-images/$animal:1.8
    done

    derived nonroot base
    config nonroot --config.user 1234
    push nonroot e2e-test-images/nonroot:1.5

    mkdir -p "$images/nonewprivs/usr/local/bin"
    (cd "$testbed/conformance" && CGO_ENABLED=0 go_locked build -trimpath -ldflags "-s -w" -o "$images/nonewprivs/usr/local/bin/nnp" \
        k8s.io/kubernetes/test/images/nonewprivs)
    chmod u+s,g+s "$images/nonewprivs/usr/local/bin/nnp"
    derived nonewprivs base
    config nonewprivs --clear=config.cmd --config.cmd nnp
    push nonewprivs e2e-test-images/nonewprivs:1.4

    derived nginx base
    config nginx --clear=config.cmd --config.cmd nginx --config.cmd -g --config.cmd 'daemon off;' --config.exposedports 80
    push nginx e2e-test-images/nginx:1.15-4 e2e-test-images/nginx:1.27-0

    mkdir "$images/pause"
    musl-gcc -static -Os -s -DVERSION=3.10.2 -o "$images/pause/pause" "$upstream/build/pause/linux/pause.c"
    node umoci new --image "$layout:scratch"
    derived pause scratch
    config pause --config.entrypoint /pause --config.user 65535:65535
    push pause pause:3.10.2
}

stamp=$(cat "$0" "$testbed/conformance/sh.c" "$testbed/conformance/go.sum" | sha256sum | cut -c1-16)
[ "$(cat "$images/.stamp" 2>/dev/null)" != "$stamp" ] || exit 0
say "making the images of the conformance suite"
apt_install musl-gcc musl-tools
apt_install mmdebstrap mmdebstrap
rm -rf --one-file-system "$images"
mkdir -p "$images"
make_images
chmod -R a+rX "$images"
"$testbed/agent.sh" down
rm -rf --one-file-system "$agent_home_here/.local/state/knoc/images"
"$testbed/agent.sh" up
echo "$stamp" >"$images/.stamp"
