#!/bin/bash
# The images of tests/tests/l3_charts.rs, and what its claims need (make charts): charts.sh up | down
# `up` makes the images once, from Debian's packages (Ray from PyPI), pushes them to the registry under charts/, and lets pods write below
# /scratch/charts of the nodes. Each image is what the original of its chart is to a pod: a program, an entrypoint, a user, and the folders
# in which the chart mounts something. Where Debian has no such program, tests/charts/stand-in.py answers in its place.
. "$(dirname "$0")/lib.sh"
. "$testbed/stack.sh"
images=$HPC_PREFIX/shared/images/charts
layout=/images/charts/layout # as the nodes see it
site_file=$agent_home_here/.config/knoc/agent.toml
stand_in=$repository/tests/charts/stand-in.py

node() { hpc exec login "$@"; }
# image NAME PACKAGES CONFIGURATION...: an image of Debian with these packages and what `extra_NAME` adds, in the registry as charts/NAME:13.
image() {
    local name=$1 packages=$2 tree=$images/$1 stamp made=$HPC_PREFIX/shared/images/.charts-$1.packed # down.sh --wipe removes it with the registry
    shift 2
    stamp=$({ echo "$packages $*"; declare -f "extra_$name"; [[ $name != @(grafana|spark) ]] || cat "$stand_in"; } | sha256sum | cut -c1-16)
    [ "$(cat "$made" 2>/dev/null)" != "$stamp" ] || return 0
    say "making the image charts/$name"
    rm -rf --one-file-system "${images:?}/layout"
    debian_image "$tree" "$packages"
    "extra_$name" "$tree"
    chmod -R a+rX "$tree"
    node umoci init --layout "$layout"
    node umoci new --image "$layout:$name"
    node umoci insert --image "$layout:$name" "/images/charts/$name" / >/dev/null 2>&1
    node umoci config --image "$layout:$name" --config.workingdir / \
        --config.env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"
    node skopeo copy -q --insecure-policy --dest-tls-verify=false "oci:$layout:$name" "docker://$registry/charts/$name:13"
    rm -rf --one-file-system "${tree:?}" "${images:?}/layout" # the registry has it
    echo "$stamp" >"$made"
}
account() { # account TREE NAME UID HOME
    echo "$2:x:$3:0::$4:/bin/bash" >>"$1/etc/passwd"
    install -d -m 1777 "$1$4" # pods run as the HPC user, whatever the image calls its user
}
program() { # program TREE PATH: the standard input, as a program
    install -D -m 755 /dev/stdin "$1$2"
}

extra_redis() { mkdir -p "$1"/opt/redis/{etc,mounted-etc,secrets,scripts} "$1"/{health,data}; }

extra_postgresql() {
    mkdir -p "$1"/opt/postgresql/{conf,tmp,secrets} "$1/var/lib/chart"
    ln -s "$(cd "$1/usr/lib/postgresql" && ls -d [0-9]*)" "$1/usr/lib/postgresql/current"
    # As the original's: makes the database where there is none, then serves it.
    program "$1" /opt/postgresql/run <<'END'
#!/bin/bash
set -euo pipefail
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    echo "making the database in $PGDATA"
    mkdir -p -m 700 "$PGDATA"
    initdb --username=postgres --auth=scram-sha-256 --pwfile="$POSTGRES_PASSWORD_FILE" --encoding=UTF8 --locale=C.UTF-8
    echo 'host all all all scram-sha-256' >>"$PGDATA/pg_hba.conf"
    echo "CREATE DATABASE $POSTGRES_DATABASE" | postgres --single -D "$PGDATA" postgres
fi
touch /opt/postgresql/tmp/.initialized
exec postgres -D "$PGDATA" -c listen_addresses='*' -c port="$POSTGRESQL_PORT_NUMBER" -c unix_socket_directories=/tmp
END
}

extra_nginx() {
    mkdir -p "$1"/opt/nginx/{conf/server_blocks,logs,tmp} "$1"/emptydir
    ln -s /dev/stdout "$1/opt/nginx/logs/access.log"
    ln -s /dev/stderr "$1/opt/nginx/logs/error.log"
    cat >"$1/etc/nginx/nginx.conf" <<'END'
worker_processes 2;
error_log /opt/nginx/logs/error.log;
pid /opt/nginx/tmp/nginx.pid;
events {}
http {
    include mime.types;
    access_log /opt/nginx/logs/access.log;
    client_body_temp_path /opt/nginx/tmp/client_body;
    proxy_temp_path /opt/nginx/tmp/proxy;
    fastcgi_temp_path /opt/nginx/tmp/fastcgi;
    scgi_temp_path /opt/nginx/tmp/scgi;
    uwsgi_temp_path /opt/nginx/tmp/uwsgi;
    include /opt/nginx/conf/server_blocks/*.conf;
}
END
}

extra_grafana() {
    mkdir -p "$1"/etc/grafana/provisioning/datasources "$1"/var/lib/grafana
    program "$1" /opt/stand-in <"$stand_in"
    printf '#!/bin/sh\nexec /opt/stand-in grafana "$@"\n' | program "$1" /run.sh
    account "$1" grafana 472 /home/grafana
}
extra_spark() {
    mkdir -p "$1"/opt/spark/{conf,work-dir}
    program "$1" /opt/stand-in <"$stand_in"
    printf '#!/bin/sh\nexec /opt/stand-in spark "$@"\n' | program "$1" /opt/entrypoint.sh
    account "$1" spark 185 /opt/spark/work-dir
}

extra_jupyter() { account "$1" jovyan 1000 /home/jovyan; }

extra_dask() { :; }

# Debian has no Ray. pip of this host installs the wheels for the Python of the image.
extra_ray() {
    local python
    install_pip
    python=$(cd "$1/usr/lib" && ls -d python3.[0-9]*)
    "$tools/charts-pip/bin/pip" install -q --disable-pip-version-check --only-binary=:all: --implementation cp --no-compile \
        --python-version "${python#python}" --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 \
        --target "$1/usr/local/lib/$python/dist-packages" 'ray[default]==2.60.0'
    # A root that is read-only keeps no compiled modules, and each of Ray's processes would compile them again. Templates cannot be compiled.
    chroot "$1" python3 -m compileall -q "/usr/local/lib/$python/dist-packages" >/dev/null 2>&1 || true
    # The one that pip writes names the Python of this host.
    rm -rf "$1/usr/local/lib/$python/dist-packages/bin"
    program "$1" /usr/local/bin/ray <<'END'
#!/usr/bin/python3
import sys
from ray.scripts.scripts import main
sys.exit(main())
END
    account "$1" ray 1000 /home/ray
    install -d -m 1777 "$1/tmp/ray"
}
install_pip() {
    [ ! -x "$tools/charts-pip/bin/pip" ] || return 0
    python_env "$tools/charts-pip"
}

extra_git() { mkdir -p "$1"/builds "$1"/cache; }

make_images() {
    mkdir -p "$images"
    image redis redis-server,bash --config.user 1001 --config.cmd redis-server
    image postgresql postgresql --config.user 1001 --config.cmd /opt/postgresql/run \
        --config.env PATH=/usr/lib/postgresql/current/bin:/usr/local/bin:/usr/bin:/bin
    image nginx nginx-light --config.user 1001 --config.cmd nginx --config.cmd -e --config.cmd /dev/stderr --config.cmd -g --config.cmd 'daemon off;'
    image grafana python3 --config.user 472 --config.entrypoint /run.sh
    image spark python3 --config.user 185 --config.entrypoint /opt/entrypoint.sh --config.workingdir /opt/spark/work-dir
    image jupyter jupyter-server,python3-ipykernel,python3-jupyter-client --config.user 1000 --config.cmd jupyter-server --config.workingdir /home/jovyan
    image dask python3-distributed
    image ray python3,procps,wget,bash --config.user 1000
    image git git,bash,ca-certificates
}

# Lets pods write below /scratch/charts. sweep.sh and `down` remove it.
site_allows() {
    local line='host_paths = [{ path = "/scratch/charts", writable = true }]'
    hpc exec login -u hpcuser mkdir -p /scratch/charts
    ! grep -qxF "$line" "$site_file" || return 0
    sed -i -e '/^host_paths *=/d' -e "s|^\[policy\]\$|&\n$line|" "$site_file"
    grep -qxF "$line" "$site_file" || die "$site_file has no table [policy]"
    # The agent reads the file again by itself within ten seconds; after a restart it has read it.
    "$testbed/agent.sh" down
    "$testbed/agent.sh" up
}
up() {
    [ "$STACK" = full ] || die "STACK=$STACK ($why): the charts need the full stack"
    make_images
    site_allows
}

exec 9>"$run/charts.lock"
flock 9
case ${1:-} in
up) up 9>&- ;;
down)
    [ ! -f "$site_file" ] || sed -i '/^host_paths = \[{ path = "\/scratch\/charts"/d' "$site_file"
    [ ! -x "$HPC_PREFIX/bin/hpc" ] || hpc exec login -u hpcuser rm -rf /scratch/charts 2>/dev/null || true
    ;;
*) die "usage: charts.sh up | down" ;;
esac
