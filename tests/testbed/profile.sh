# How the kubelet and knocctl reach the agent of the full stack, and what the firewall between host and login node lets through.
# Sourced after stack.sh.
#   PROFILE=direct         over TCP, without a firewall (default)
#   PROFILE=ssh-only       SSH in, and nothing else
#   PROFILE=outbound-only  the agent dials the kubelet; nothing comes in
#   PROFILE=proxy-only     the agent dials the kubelet through an HTTP proxy with a password, which is its only way out
#   PROFILE=isolated       over TCP; compute nodes cannot reach the agent
#   PROFILE=two-logins     SSH in to two login nodes; the agent runs on the second, which is the second address of the kubelet
# A profile is a file of its name in the folder `profiles`, which may define these functions; the defaults are those of `direct`:
#   profile_network    filters the network between the nodes and the host
#   profile_agent      prints the value of listen.kubelet in the agent's site file
#   profile_site       prints what is added to the agent's site file
#   profile_prepare    prepares the login node, after the agent was configured
#   profile_kubelet    sets the array link_settings: variables of the kubelet that name the link
#   profile_chart      sets the array chart_values: options of helm for the same link
#   profile_knocctl    changes the configuration of knocctl for the host, the file $1
#   profile_down       stops what profile_network or profile_prepare started
PROFILE=${PROFILE:-direct}
export PROFILE

no_filter() {
    hpc firewall login off
    hpc open-port 10351
}
profile_network() { no_filter; }
profile_agent() { echo "0.0.0.0:10350"; }
profile_site() { :; }
profile_prepare() { :; }
profile_kubelet() { link_settings=(KNOC_AGENT_ADDRESS="$agent_address"); }
profile_chart() { chart_values=(--set agent.address="$agent_address"); }
profile_knocctl() { :; }
profile_down() { :; }

if [ "$PROFILE" != direct ]; then
    [ "$STACK" = full ] || die "PROFILE=$PROFILE needs STACK=full, and this is STACK=$STACK"
    [ -f "$testbed/profiles/$PROFILE.sh" ] \
        || die "PROFILE=$PROFILE: known profiles are direct $(cd "$testbed/profiles" && echo [a-z]*.sh | sed 's/\.sh//g')"
    . "$testbed/profiles/$PROFILE.sh"
fi
# profile_changed FILE: whether FILE names another profile, or none; then names this one there.
profile_changed() {
    [ "$(cat "$1" 2>/dev/null || echo direct)" != "$PROFILE" ] || return 1
    echo "$PROFILE" >"$1"
}
# stop_other_profiles: stops what the other profiles started.
stop_other_profiles() (
    for file in "$testbed"/profiles/[a-z]*.sh; do
        [ "$file" = "$testbed/profiles/$PROFILE.sh" ] || (. "$file" && profile_down)
    done
)
