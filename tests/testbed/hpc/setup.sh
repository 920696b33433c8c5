#!/bin/bash
# Builds a small but real HPC cluster (Slurm with accounting, munge, Apptainer, an image registry) under $HPC_PREFIX,
# without systemd. A finished root file system is kept; the configuration is always rewritten.
#   HPC_SUITE=trixie|sid|bookworm   HPC_NODES=3   HPC_CPUS=32   HPC_MEM=64000 (MB a node)
. "$(dirname "$0")/../lib.sh"
nodes=${HPC_NODES:-3} cpus=${HPC_CPUS:-32} memory=${HPC_MEM:-64000}
here=$testbed/hpc
root=$HPC_PREFIX/rootfs-$HPC_SUITE
[ "$(id -u)" = 0 ] || die "the Slurm cluster is made of namespaces and needs root"

install_root() {
    local build=$HPC_PREFIX/.build-$HPC_SUITE work mirror packages hooks=() key='[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]'
    say "building the root file system of the cluster (Debian $HPC_SUITE; about a minute)"
    rm -rf --one-file-system "$build" "$root"
    work=$(mktemp -d)
    mirror=${HPC_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -v security | head -n 1)}
    echo "deb $key $mirror $HPC_SUITE main" >"$work/sources"
    packages=slurmctld,slurmd,slurm-client,slurmdbd,mariadb-server,munge,apptainer
    packages+=,fuse-overlayfs,squashfuse,fuse2fs,fuse3,e2fsprogs,squashfs-tools,uidmap,slirp4netns,passt,skopeo,umoci,docker-registry
    packages+=,busybox-static,procps,psmisc,iproute2,iputils-ping,ca-certificates,curl,jq,openssh-server,systemd-standalone-sysusers,tini,tzdata,netbase
    case $HPC_SUITE in
    bookworm) packages=${packages/,apptainer/} ;; # has none
    *) packages+=,util-linux-extra ;;
    esac
    if [ "$HPC_SUITE" = trixie ]; then # Apptainer is only in sid, and its package installs on trixie unchanged
        echo "deb $key $mirror sid main" >>"$work/sources"
        printf 'Package: *\nPin: release n=sid\nPin-Priority: 50\n\nPackage: apptainer\nPin: release n=sid\nPin-Priority: 990\n' >"$work/pin"
        hooks=(--setup-hook="mkdir -p \"\$1/etc/apt/preferences.d\"; cp '$work/pin' \"\$1/etc/apt/preferences.d/apptainer-from-sid\"")
    fi
    # A mirror may be a snapshot, in which sid is considered expired.
    mmdebstrap --quiet --mode=root --variant=apt --include="$packages" --aptopt='APT::Install-Recommends "false"' \
        --aptopt='Acquire::Check-Valid-Until "false"' --dpkgopt=force-unsafe-io "${hooks[@]}" \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/mariadb/*/*' --dpkgopt='path-include=/usr/share/mariadb/english/*' \
        --dpkgopt='path-include=/usr/share/mariadb/charsets/*' \
        --essential-hook='printf "#!/bin/sh\nexit 101\n" > "$1/usr/sbin/policy-rc.d"; chmod +x "$1/usr/sbin/policy-rc.d"' \
        "$HPC_SUITE" "$build" "$work/sources"
    rm -rf "$work"
    touch "$build/.hpc-complete"
    mv "$build" "$root"
}

write_users() {
    local user number=0 home
    chroot "$root" getent group hpc >/dev/null || chroot "$root" groupadd -g 2000 hpc
    : >"$root/etc/subuid"
    [ -f "$HPC_PREFIX/ssh/id_ed25519" ] || ssh-keygen -q -t ed25519 -N '' -C testbed -f "$HPC_PREFIX/ssh/id_ed25519"
    for user in hpcuser hpcuser2; do
        number=$((number + 1))
        chroot "$root" id $user >/dev/null 2>&1 || chroot "$root" useradd -u $((2000 + number)) -g hpc -M -d /home/$user -s /bin/bash $user
        chroot "$root" usermod -p '*' $user # no password, but not locked, so that sshd accepts public keys
        echo "$user:$((100000 + number * 100000)):65536" >>"$root/etc/subuid"
        home=$HPC_PREFIX/shared/home/$user
        [ -d "$home" ] || { mkdir -p "$home"; cp "$root"/etc/skel/.[!.]* "$home/" 2>/dev/null || true; }
        mkdir -p "$home/.ssh"
        cp "$HPC_PREFIX/ssh/id_ed25519.pub" "$home/.ssh/authorized_keys"
        chmod 700 "$home" "$home/.ssh"
        chown $((2000 + number)):2000 "$home" "$home"/.[!.]* "$home/.ssh/authorized_keys"
    done
    cp "$root/etc/subuid" "$root/etc/subgid"
    chmod 1777 "$HPC_PREFIX/shared/scratch"
    chmod 755 "$HPC_PREFIX/shared/images"
}

write_system() {
    local number
    {
        printf '127.0.0.1 localhost\n::1 localhost\n10.78.0.2 ctl\n10.78.0.3 login\n10.78.0.4 login2\n10.77.0.1 kubehost\n'
        for number in $(seq "$nodes"); do echo "10.78.0.$((10 + number)) c$number"; done
    } >"$root/etc/hosts"
    echo hpc >"$root/etc/hostname"
    : >"$root/etc/resolv.conf"
    [ -e "$root/etc/localtime" ] || cp -L "$root/usr/share/zoneinfo/UTC" "$root/etc/localtime" # Apptainer binds it
    [ -f "$HPC_PREFIX/munge.key" ] || (umask 077; head -c 1024 /dev/urandom >"$HPC_PREFIX/munge.key")
    mkdir -p "$root/etc/munge"
    install -m 400 "$HPC_PREFIX/munge.key" "$root/etc/munge/munge.key"
    chroot "$root" chown -R munge:munge /etc/munge
    chmod 700 "$root/etc/munge"
    mkdir -p "$root/scratch" "$root/images" "$root/.old" "$root/etc/ssh"
    cat >"$root/etc/docker/registry/hpc.yml" <<'YML'
version: 0.1
log: {level: warn}
storage:
  filesystem: {rootdirectory: /var/spool/registry}
  delete: {enabled: true}
http: {addr: "10.78.0.2:5000", secret: hpc}
YML
    cat >"$root/etc/ssh/sshd_config" <<'CONF'
Port 22
PermitRootLogin no
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PrintMotd no
Subsystem sftp internal-sftp
CONF
    chroot "$root" ssh-keygen -A >/dev/null
}

write_slurm() {
    local track=proctrack/linuxproc task=task/none gather=jobacct_gather/linux number gres
    mkdir -p "$root/etc/slurm"
    if [ -d /sys/fs/cgroup/memory ] && [ -d /sys/fs/cgroup/freezer ]; then
        # Cores are not constrained, because the configured CPUs do not exist.
        track=proctrack/cgroup task=task/cgroup gather=jobacct_gather/cgroup
        printf '%s\n' CgroupPlugin=cgroup/v1 CgroupMountpoint=/sys/fs/cgroup ConstrainCores=no ConstrainRAMSpace=yes \
            ConstrainSwapSpace=no ConstrainDevices=yes >"$root/etc/slurm/cgroup.conf"
    else
        say "no cgroup v1 memory controller here: Slurm will not enforce memory limits"
        rm -f "$root/etc/slurm/cgroup.conf"
        [ "$HPC_SUITE" = bookworm ] || echo CgroupPlugin=disabled >"$root/etc/slurm/cgroup.conf"
    fi
    {
        cat <<CONF
ClusterName=hpc
SlurmctldHost=ctl(10.78.0.2)
AuthType=auth/munge
# This is also the delay before a requeued job may start again (default 120 s).
AuthInfo=cred_expire=5
CredType=cred/munge
SlurmUser=slurm
SlurmdUser=root
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
SlurmctldLogFile=/var/log/slurmctld.log
SlurmdLogFile=/var/log/slurmd.log
SlurmctldDebug=info
SlurmdDebug=info
MailProg=/bin/true
ProctrackType=$track
TaskPlugin=$task
JobAcctGatherType=$gather
JobAcctGatherFrequency=task=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# More CPUs and memory than the hardware has.
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,default_queue_depth=1000,bf_interval=1,bf_continue,bf_max_job_test=1000
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=5
# A job that is lost in a fast power cycle is noticed sooner.
BatchStartTimeout=5
MessageTimeout=10
KillWait=3
MinJobAge=300
MaxJobCount=20000
MaxArraySize=2001
DefMemPerCPU=100
GresTypes=gpu
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=ctl
AccountingStorageEnforce=associations,limits,qos
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment,job_env,job_script
CONF
        for number in $(seq "$nodes"); do
            gres=
            [ "$number" != 1 ] || gres="Gres=gpu:fake:2 Feature=gpu"
            echo "NodeName=c$number NodeAddr=10.78.0.$((10 + number)) CPUs=$cpus Boards=1 SocketsPerBoard=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=$memory $gres State=UNKNOWN"
        done
        cat <<CONF
PartitionName=main Nodes=ALL Default=YES MaxTime=7-0 DefaultTime=01:00:00 State=UP
PartitionName=gpu Nodes=c1 MaxTime=1-0 DefaultTime=00:30:00 State=UP
PartitionName=short Nodes=ALL MaxTime=2 DefaultTime=1 State=UP PriorityTier=10
CONF
    } >"$root/etc/slurm/slurm.conf"
    echo 'NodeName=c1 Name=gpu Type=fake File=/dev/nvidia[0-1]' >"$root/etc/slurm/gres.conf"
    cat >"$root/etc/slurm/slurmdbd.conf" <<'CONF'
AuthType=auth/munge
DbdHost=ctl
SlurmUser=slurm
LogFile=/var/log/slurmdbd.log
PidFile=/run/slurm/slurmdbd.pid
DebugLevel=info
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
CONF
    chroot "$root" chown slurm: /etc/slurm/slurmdbd.conf
    chmod 600 "$root/etc/slurm/slurmdbd.conf"
}

mkdir -p "$HPC_PREFIX"/{bin,run,log,nodes,shared/home,shared/scratch,shared/images,ssh}
exec 9>"$HPC_PREFIX/.setup.lock"
flock 9
stamp=$(cat "$here/setup.sh" "$here/hpc" "$here/node-boot" "$here/node-init" | sha256sum | cut -c1-16)-$nodes-$cpus-$memory
[ "$(cat "$HPC_PREFIX/.stamp" 2>/dev/null)" != "$stamp" ] || exit 0
apt_install mmdebstrap mmdebstrap
apt_install ip iproute2
apt_install nsenter util-linux
apt_install ssh-keygen openssh-client
[ -f "$root/.hpc-complete" ] || install_root
ln -sfn "rootfs-$HPC_SUITE" "$HPC_PREFIX/rootfs"
write_users
write_system
write_slurm
install -m 755 "$here/node-init" "$root/usr/local/sbin/hpc-node-init"
install -m 755 "$here/hpc" "$HPC_PREFIX/bin/hpc"
install -m 755 "$here/node-boot" "$HPC_PREFIX/bin/hpc-node-boot"
printf '%s\n' "HPC_PREFIX=$HPC_PREFIX" "HPC_NODES=$nodes" "HPC_SUITE=$HPC_SUITE" >"$HPC_PREFIX/hpc.env"
echo "$stamp" >"$HPC_PREFIX/.stamp"
say "the cluster's root is built: $(chroot "$root" slurmctld -V), $(chroot "$root" apptainer --version 2>/dev/null || echo no Apptainer)"
