# How the kubelet and knocctl reach the agent of the full stack. Sourced after stack.sh.
#   PROFILE=direct    over TCP (default)
#   PROFILE=ssh-only  over SSH only: the agent opens no port for kubelets
# A profile is a file of its name in the folder `profiles`, which may define these functions; the defaults are those of `direct`:
#   profile_agent     prints the value of listen.kubelet in the agent's site file
#   profile_prepare   prepares the login node, after the agent was configured
#   profile_kubelet   sets the array link_settings: variables of the kubelet that name the link
#   profile_chart     sets the array chart_values: options of helm for the same link
#   profile_knocctl   changes the configuration of knocctl for the host, the file $1
PROFILE=${PROFILE:-direct}
export PROFILE

profile_agent() { echo "0.0.0.0:10350"; }
profile_prepare() { :; }
profile_kubelet() { link_settings=(KNOC_AGENT_ADDRESS="$agent_address"); }
profile_chart() { chart_values=(--set agent.address="$agent_address"); }
profile_knocctl() { :; }

if [ "$PROFILE" != direct ]; then
    [ "$STACK" = full ] || die "PROFILE=$PROFILE needs STACK=full, and this is STACK=$STACK"
    [ -f "$testbed/profiles/$PROFILE.sh" ] \
        || die "PROFILE=$PROFILE: known profiles are direct $(cd "$testbed/profiles" && echo *.sh | sed 's/\.sh//g')"
    . "$testbed/profiles/$PROFILE.sh"
fi
# profile_changed FILE: whether FILE names another profile, or none; then names this one there.
profile_changed() {
    [ "$(cat "$1" 2>/dev/null || echo direct)" != "$PROFILE" ] || return 1
    echo "$PROFILE" >"$1"
}
