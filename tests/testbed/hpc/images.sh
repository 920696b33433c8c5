#!/bin/bash
# Makes the test images from Debian packages alone: in $HPC_PREFIX/shared/images (/images in every node) each as a sandbox
# (busybox/), OCI layout (busybox.oci, tag latest), archives and SIF; and pushes them to the registry http://ctl:5000/library.
# Also own:1 and own:2, which have their own entrypoint, arguments, variables and working directory, and print what they were started with.
# Also places, with files at paths that runtimes override, symbolic links, and accounts; its tags differ in their user and command; and
# bare:1, which contains one program and nothing else.
# ctl:5001 is the same registry for the user ann with the password pull-s3cr3t-of-ann alone.
# HPC_IMG_DEBIAN=1 adds debian (with python3, procps, curl).
. "$(dirname "$0")/../lib.sh"
images=$HPC_PREFIX/shared/images
root=$HPC_PREFIX/rootfs
node() { hpc exec login "$@"; }

busybox() {
    local tree=$images/busybox applet
    mkdir -p "$tree"/{bin,etc,tmp,proc,sys,dev,root,home,var/tmp,usr/bin,mnt,srv,run}
    chmod 1777 "$tree/tmp" "$tree/var/tmp"
    cp "$root/bin/busybox" "$tree/bin/"
    for applet in $(chroot "$root" busybox --list); do [ "$applet" = busybox ] || ln -sf busybox "$tree/bin/$applet"; done
    ln -s /bin/env "$tree/usr/bin/env"
    echo 'root:x:0:0:root:/root:/bin/sh' >"$tree/etc/passwd"
    echo 'root:x:0:' >"$tree/etc/group"
    touch "$tree"/etc/{resolv.conf,hosts,localtime}
}
debian() {
    mmdebstrap --quiet --mode=root --variant=minbase --include=python3-minimal,procps,curl --aptopt='Acquire::Check-Valid-Until "false"' \
        --aptopt='APT::Install-Recommends "false"' --dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' trixie "$images/debian"
    rm -rf "$images"/debian/dev/*
}
push() { # push LAYOUT:TAG NAME:TAG: copies the image to the registry
    node skopeo copy -q --insecure-policy --dest-tls-verify=false "oci:$1" "docker://ctl:5000/library/$2"
}
own() { # busybox and one script; the versions differ in a variable
    local layout=/images/own.oci version
    mkdir -p "$images/own/bin" "$images/own/srv/own"
    cat >"$images/own/bin/show" <<'SH'
#!/bin/sh
for word in "$0" "$@"; do printf '[%s]' "$word"; done
echo " in $PWD, colour=$COLOUR size=$SIZE"
SH
    chmod 755 "$images/own/bin/show"
    node skopeo copy -q --insecure-policy oci:/images/busybox.oci:latest "oci:$layout:base"
    node umoci insert --image "$layout:base" /images/own/bin/show /bin/show >/dev/null 2>&1
    node umoci insert --image "$layout:base" /images/own/srv/own /srv/own >/dev/null 2>&1
    for version in 1:blue 2:red; do
        node umoci config --image "$layout:base" --tag "${version%:*}" --clear=config.cmd --config.entrypoint /bin/show \
            --config.entrypoint entry --config.cmd cmd --config.cmd 'two words' --config.workingdir /srv/own \
            --config.env "COLOUR=${version#*:}" --config.env SIZE=7
        push "$layout:${version%:*}" "own:${version%:*}"
    done
    node skopeo copy -q --insecure-policy "oci:$layout:1" docker-archive:/images/own.docker.tar:own:1
    node apptainer -q build -F /images/own.sif docker-archive:/images/own.docker.tar
}
places() { # busybox with files in temporary folders, links where volumes are mounted, and its own accounts (same: with the HPC user's uid)
    local layout=/images/places.oci tree=$images/places line tag user
    mkdir -p "$tree"/{tmp/app,var/tmp,run/own,home/jovyan,root,etc}
    printf '#!/bin/sh\necho the program of the image\n' >"$tree/tmp/app/run"
    chmod 755 "$tree/tmp/app/run"
    echo data >"$tree/var/tmp/data"
    for line in run/own home/jovyan root; do echo "in $line" >"$tree/$line/file"; done
    chmod 1777 "$tree/tmp" "$tree/var/tmp"
    ln -s /run "$tree/var/run"
    ln -s /mnt "$tree/data"
    echo 'Europe/Nowhere' >"$tree/etc/localtime"
    printf '%s\n' root:x:0:0:root:/root:/bin/sh jovyan:x:1000:100::/home/jovyan:/bin/ash same:x:2001:2001::/home/same:/bin/sh >"$tree/etc/passwd"
    node skopeo copy -q --insecure-policy oci:/images/busybox.oci:latest "oci:$layout:base"
    node umoci insert --image "$layout:base" /images/places / >/dev/null 2>&1
    node umoci config --image "$layout:base" --clear=config.cmd --clear=config.entrypoint
    push "$layout:base" places:nocmd
    for line in 1:1000:100 name:jovyan unknown:4321 same:2001 root:; do
        tag=${line%%:*} user=${line#*:}
        node umoci config --image "$layout:base" --tag "$tag" --config.cmd /tmp/app/run --config.user "$user" --config.workingdir /home/jovyan
        push "$layout:$tag" "places:$tag"
    done
}
bare() { # one static program, and nothing else: no folders, no accounts
    local layout=/images/bare.oci
    mkdir -p "$images/bare"
    cp "$images/busybox/bin/busybox" "$images/bare/busybox"
    node umoci init --layout "$layout"
    node umoci new --image "$layout:1"
    node umoci insert --image "$layout:1" /images/bare / >/dev/null 2>&1
    node umoci config --image "$layout:1" --config.entrypoint /busybox --config.cmd echo --config.cmd bare
    push "$layout:1" bare:1
}
pack() { # pack NAME TAG: every form from the directory; in the registry as TAG and latest
    local name=$1 layout=/images/$1.oci
    chmod -R a+rX "$images/$name"
    node umoci init --layout "$layout"
    node umoci new --image "$layout:latest"
    node umoci insert --image "$layout:latest" "/images/$name" / >/dev/null 2>&1
    node umoci config --image "$layout:latest" --config.cmd /bin/sh --config.workingdir / \
        --config.env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    node skopeo copy -q --insecure-policy "oci:$layout:latest" "docker-archive:/images/$name.docker.tar:$name:latest"
    node skopeo copy -q --insecure-policy "oci:$layout:latest" "oci-archive:/images/$name.oci.tar:latest"
    node apptainer -q build -F "/images/$name.sif" "docker-archive:/images/$name.docker.tar"
    for tag in latest $2; do push "$layout:latest" "$name:$tag"; done
}

mkdir -p "$images"
wanted="busybox:1.36 own places bare"
[ "${HPC_IMG_DEBIAN:-0}" != 1 ] || wanted="$wanted debian:13"
for image in $wanted; do
    name=${image%:*}
    [ ! -f "$images/.$name.packed" ] || continue
    say "making the test image $name"
    rm -rf --one-file-system "${images:?}/$name" "$images/$name".*
    $name
    [ "$name" = "$image" ] || pack "$name" "${image#*:}"
    chmod -R a+rX "$images"
    touch "$images/.$name.packed"
done

private() { # the configuration is kept with the images, so that the node starts it again after a power cycle
    local folder=/var/spool/registry
    hpc exec ctl test -f $folder/private.yml || {
        hpc exec ctl tee $folder/htpasswd >/dev/null <<'PASSWD'
ann:$2y$05$abcdefghijklmnopqrstuu08vNveNVX/NqrkZmdjUn4Eb8dvmZoFe
PASSWD
        hpc exec ctl tee $folder/private.yml >/dev/null <<'YML'
version: 0.1
log: {level: warn}
storage:
  filesystem: {rootdirectory: /var/spool/registry}
auth:
  htpasswd: {realm: private, path: /var/spool/registry/htpasswd}
http: {addr: "10.78.0.2:5001", secret: hpc}
YML
    }
    hpc exec ctl bash -c 'exec 3<>/dev/tcp/10.78.0.2/5001' 2>/dev/null ||
        hpc exec ctl bash -c "docker-registry serve $folder/private.yml >/var/log/private.log 2>&1 </dev/null &"
}
private
