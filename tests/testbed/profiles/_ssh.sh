# Of the profiles whose link is SSH. The kubelet and knocctl log in as hpcuser, with a key that allows nothing but
# `knoc-agent connect`. `logins` are the addresses of the login nodes; `ssh_address` is the address of the agent.
ssh_folder=$run/ssh # in the form of the Secret

profile_agent() { echo none; }
profile_prepare() {
    local key keys=$agent_home_here/.ssh/authorized_keys host_key login
    mkdir -p "$ssh_folder"
    [ -f "$ssh_folder/ssh-privatekey" ] || ssh-keygen -q -t ed25519 -N '' -C knoc-link -f "$ssh_folder/ssh-privatekey"
    key=$(cat "$ssh_folder/ssh-privatekey.pub")
    # The same line whatever was there before.
    grep -v ' knoc-link$' "$keys" >"$keys.new" || true
    echo "restrict,command=\"$agent_home/bin/knoc-agent connect\" $key" >>"$keys.new"
    chown --reference="$keys" "$keys.new"
    chmod 600 "$keys.new"
    mv "$keys.new" "$keys"
    host_key=$(hpc exec login cat /etc/ssh/ssh_host_ed25519_key.pub)
    for login in "${logins[@]}"; do echo "$login $host_key"; done >"$ssh_folder/known_hosts"
    printf hpcuser >"$ssh_folder/remote_user"
    printf %s "${logins[0]}" >"$ssh_folder/host"
    # As in a mounted Secret.
    chmod 644 "$ssh_folder"/*
    chmod 700 "$ssh_folder"
}
profile_kubelet() { # reads the Secret again, as the chart would mount it
    local part
    mkdir -p "$state/ssh"
    for part in ssh-privatekey known_hosts remote_user host; do
        kubectl get secret knoc-ssh -n $namespace -o json | jq -r ".data[\"$part\"]" | base64 -d >"$state/ssh/$part"
    done
    link_settings=(KNOC_AGENT_ADDRESS="$ssh_address" KNOC_AGENT_SSH_FOLDER="$state/ssh")
}
profile_chart() {
    local part files=()
    for part in ssh-privatekey known_hosts remote_user host; do files+=(--from-file="$part=$ssh_folder/$part"); done
    kubectl create secret generic knoc-ssh -n $namespace "${files[@]}" --dry-run=client -o yaml | kubectl apply -f - >/dev/null
    chart_values=(--set "agent.address={$ssh_address}" --set agent.ssh.secret=knoc-ssh)
}
profile_knocctl() {
    local list=\"${ssh_address//,/\", \"}\"
    sed -i "s|^address = .*|address = [$list]\nssh-folder = \"$ssh_folder\"|" "$1"
}
