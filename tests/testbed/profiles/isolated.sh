# Compute nodes cannot reach the agent's port for shims.
profile_network() {
    hpc firewall login off
    hpc close-port 10351
}
