# A site that lets nothing in. The agent connects to the kubelet.
. "$testbed/profiles/_accept.sh"

profile_network() {
    hpc open-port 10351
    hpc firewall login "out:${kubelet_address#*:}"
}
profile_site() { printf '[[dial_out]]\naddress = "%s"\n' "$kubelet_address"; }
