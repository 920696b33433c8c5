#!/bin/bash
# Redis of Debian, for tests/tests/l3_cluster.rs: redis.sh image | up | down
# `image` makes the image with its programs once (about half a minute), a sandbox of the nodes: /images/redis. `up` does so, too, and starts a server on this
# host, which stands for a server in the cluster. It keeps everything in memory, and listens only while the tests need it.
. "$(dirname "$0")/lib.sh"
. "$testbed/images.sh"
image=$HPC_PREFIX/shared/images/redis
pidfile=$run/redis.pid
address=10.77.0.1 # of the host on the network of the login node
port=6379

make_image() { debian_image "$1" redis-server; }
answers() { (exec 3<>"/dev/tcp/$address/$port" && printf 'PING\r\n' >&3 && read -r -t 2 line <&3 && [ "${line:0:5}" = +PONG ]); }
up() {
    alive "$pidfile" || start "$pidfile" "$log/redis.log" chroot "$image" /usr/bin/redis-server --bind $address --port $port \
        --protected-mode no --save '' --appendonly no --dir /tmp
    wait_for 90 "Redis at $address:$port" answers || { tail -5 "$log/redis.log" >&2; exit 1; }
}

case ${1:-} in
image | up) make_once redis usr/bin/redis-server Redis make_image ;;
down) exec 9>"$run/redis.lock"; flock 9 ;;
*) die "usage: redis.sh image | up | down" ;;
esac
case $1 in
image) ;;
up) up 9>&- ;;
down) stop "$pidfile" ;;
esac
