# A site that lets SSH in, and nothing else. The agent opens no port for kubelets.
logins=(10.77.0.2)
ssh_address=ssh:
. "$testbed/profiles/_ssh.sh"

profile_network() {
    hpc open-port 10351
    hpc firewall login in:22
}
