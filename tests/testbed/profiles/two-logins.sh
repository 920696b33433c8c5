# Two login nodes that let SSH in, and nothing else. The agent runs on one of them at a time: by default on the second, so that the
# kubelet's first address leads to a login node without an agent. KNOC_AGENT_NODE=login starts it on the first (l3_profile).
logins=(10.77.0.2 10.76.0.2)
ssh_address=ssh:10.77.0.2,ssh:10.76.0.2
agent_node=${KNOC_AGENT_NODE:-login2}
locate_agent
. "$testbed/profiles/_ssh.sh"

profile_network() {
    hpc open-port 10351
    hpc node-up login2
    hpc firewall login in:22
    hpc firewall login2 in:22
}
profile_down() { [ ! -x "$HPC_PREFIX/bin/hpc" ] || hpc node-down login2; }
