# Of the profiles whose agent dials the kubelet, which accepts connections at $kubelet_address. knocctl is a user on the login node:
# its connections are commands there, as on a site whose logins go through a gateway that KNoC does not know.
kubelet_address=10.77.0.1:8443

profile_agent() { echo none; }
profile_kubelet() { link_settings=(KNOC_AGENT_ADDRESS="accept:$kubelet_address"); }
profile_chart() { chart_values=(--set agent.address=accept --set dialIn.service.type=NodePort); }
profile_knocctl() {
    local word words=
    for word in "$HPC_PREFIX/bin/hpc" exec login -u hpcuser "$agent_home/bin/knoc-agent" connect; do words+=", \"$word\""; done
    sed -i "s|^address = .*|address = 'exec:[${words#, }]'|" "$1"
}
