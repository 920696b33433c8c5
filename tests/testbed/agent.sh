#!/bin/bash
# The agent of the stack: agent.sh up | down | kill (-9) | running
. "$(dirname "$0")/lib.sh"
. "$testbed/stack.sh"
. "$testbed/profile.sh"
# The stacks full and slurm have one agent.
of=$STACK; [ "$of" != slurm ] || of=full
pidfile=$run/agent-$of.pid
config=$agent_home_here/.config/knoc

install_binaries() { # copies to a new name and renames, because a running binary cannot be written
    local name
    mkdir -p "$agent_home_here/bin"
    for name in knoc-agent knocctl; do
        [ -x "$KNOC_BIN/$name" ] || die "$KNOC_BIN/$name is missing: make build-tested"
        cmp -s "$KNOC_BIN/$name" "$agent_home_here/bin/$name" && continue
        cp "$KNOC_BIN/$name" "$agent_home_here/bin/.$name.new"
        mv "$agent_home_here/bin/.$name.new" "$agent_home_here/bin/$name"
        # Jobs execute a copy that is stored by version. Here one version is built many times, so the copy is removed; the agent is
        # restarted.
        [ "$name" != knoc-agent ] || rm -rf "$agent_home_here/.local/state/knoc/versions"
    done
}
# Settings of this site that differ from those that `init` detects.
configure() {
    [ ! -f "$config/agent.toml" ] || return 0
    "${as_agent[@]}" "$agent_home/bin/knoc-agent" init "${init_flags[@]}" >&2
    [ "$STACK" != local ] || return 0
    sed -i 's|^#* *image_roots *=.*|image_roots = ["/images", "/scratch"]|' "$config/agent.toml"
    # The nodes' shared file systems are one file system, so a report appears at once or never.
    sed -i 's|^# *report_grace *=.*|report_grace = "10s"|' "$config/agent.toml"
    cat >>"$config/agent.toml" <<CONF

[[registry]]
prefix = "$registry"
insecure = true

[[registry]]
prefix = "docker.io"
mirror = "$registry"
insecure = true
CONF
}
# The registry with a password; the site file of an older bed lacks it.
use_private_registry() {
    [ "$STACK" != local ] || return 0
    ! grep -q 'ctl:5001' "$config/agent.toml" || return 0
    printf '\n[[registry]]\nprefix = "ctl:5001"\ninsecure = true\n' >>"$config/agent.toml"
    stop "$pidfile"
}
# Lets pods reach the Service of l3_cluster; the site file of an older bed does not.
list_redis() {
    [ "$STACK" != local ] || return 0
    ! grep -q '^egress = .*knoc-redis' "$config/agent.toml" || return 0
    # The agent reads this table again by itself.
    sed -i -e '/^#* *egress = /d' -e '/^\[policy\]/a egress = ["default/kubernetes", "kube-system/kube-dns", "knoc-redis/redis"]' "$config/agent.toml"
}
# The agent serves one cluster, by default the first that connects; the bed has one cluster per version of Kubernetes.
serve_this_cluster() {
    local id
    [ "$STACK" = full ] || return 0
    id=$(kubectl get namespace kube-system -o 'jsonpath={.metadata.uid}')
    ! grep -q "^cluster_id = \"$id\"" "$config/agent.toml" || return 0
    sed -i "s|^#* *cluster_id *=.*|cluster_id = \"$id\"|" "$config/agent.toml"
    stop "$pidfile"
}
# The link of this profile; the agent is restarted if it had another one.
follow_profile() {
    [ "$STACK" != local ] || return 0 # its agent is another one
    profile_prepare
    profile_changed "$run/profile-agent" || return 0
    say "PROFILE=$PROFILE: restarting the agent"
    sed -i "s|^kubelet = .*|kubelet = \"$(profile_agent)\"|; /^# Of the profile /,\$d" "$config/agent.toml"
    [ -z "$(profile_site)" ] || { echo "# Of the profile $PROFILE"; profile_site; } >>"$config/agent.toml"
    stop "$pidfile"
    # What it has found out about another network.
    rm -f "$agent_home_here/.local/state/knoc/shim-route.json"
}
# knocctl's configuration for the host, derived from the one that `init` wrote.
configure_knocctl() {
    sed "s|$agent_home/|$agent_home_here/|g" "$config/knocctl.toml" >"$run/knocctl.toml"
    [ "$STACK" != full ] || profile_knocctl "$run/knocctl.toml"
}
# `hpc exec` stays as the parent of the process that it started on the node: the agent is that process, or its child.
agent_of() {
    local pid
    for pid in "$1" $(cat "/proc/$1/task/$1/children" 2>/dev/null); do
        [ "$(cat "/proc/$pid/comm" 2>/dev/null)" != knoc-agent ] || { echo "$pid"; return 0; }
    done
    return 1
}
up() {
    local pid
    install_binaries
    configure
    use_private_registry
    list_redis
    serve_this_cluster
    follow_profile
    configure_knocctl
    if alive "$pidfile"; then
        read -r pid _ <"$pidfile"
        ! cmp -s "/proc/$pid/exe" "$KNOC_BIN/knoc-agent" || return 0
        say "the agent's binary has changed: restarting the agent"
        stop "$pidfile"
    fi
    start "$pidfile" "$log/agent-$of.log" "${as_agent[@]}" "$agent_home/bin/knoc-agent" serve
    read -r pid _ <"$pidfile"
    wait_for 60 "the agent's process" agent_of "$pid" || { tail -20 "$log/agent-$of.log" >&2; exit 1; }
    pid=$(agent_of "$pid")
    echo "$pid $(start_time "$pid")" >"$pidfile"
    wait_for 90 "an answer of the agent on $agent_node" "$KNOC_BIN/knocctl" info || { tail -20 "$log/agent-$of.log" >&2; exit 1; }
}

export KNOCCTL_CONFIG=$run/knocctl.toml
init_flags=(--site $site --address "$agent_address")
[ "$STACK" != local ] || init_flags+=(--scheduler local --runtime process)
control "${1:-}"
