#!/bin/bash
# Makes the image /images/mpi of l3_mpi, a folder: MPICH and Open MPI as Debian packages them, busybox, and ring.c for each
# of both (/ring-mpich, /ring-openmpi). Does nothing if it is there. It downloads about 100 MB once.
. "$(dirname "$0")/../lib.sh"
images=$HPC_PREFIX/shared/images new=$HPC_PREFIX/shared/images/mpi.new
exec 7>"$run/mpi-image.lock"
flock 7
[ ! -d "$images/mpi" ] || exit 0
apt_install mmdebstrap mmdebstrap
say "making the test image mpi"
rm -rf --one-file-system "$new"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mirror=${HPC_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -v security | head -n 1)}
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" >"$work/sources"
# The packages are unpacked and not installed: libraries need no more.
mmdebstrap --quiet --mode=root --variant=extract --include=libmpich12,libopenmpi40,openmpi-common \
    --aptopt='APT::Install-Recommends "false"' --aptopt='Acquire::Check-Valid-Until "false"' trixie "$new" "$work/sources" 7>&-
rm -rf "$new"/{usr/share/{doc,man,locale},var/lib/apt,var/cache,dev} "$new"/usr/lib/gcc
for folder in bin lib lib64; do
    [ -e "$new/$folder" ] || { mkdir -p "$new/usr/$folder"; ln -s "usr/$folder" "$new/$folder"; }
done
mkdir -p "$new"/{etc,tmp,proc,sys,dev,root,home,var/tmp,mnt,srv,run}
# Whatever there is of a shell in the packages stays.
cp -an "$images/busybox/bin/." "$new/bin/"
cp -a "$images"/busybox/etc/{passwd,group} "$new/etc/"
libraries=$new/usr/lib/x86_64-linux-gnu
for made in "mpich libmpich.so.12" "openmpi libmpi.so.40 -DOPEN_MPI"; do
    read -r name library define <<<"$made"
    gcc -O1 $define -o "$new/ring-$name" "$testbed/mpi/ring.c" "$libraries/$library" \
        -Wl,--unresolved-symbols=ignore-in-shared-libs
done
chmod -R a+rX "$new"
mv "$new" "$images/mpi"
