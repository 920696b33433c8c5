# A site whose only way out is an HTTP proxy with a password. The agent connects to the kubelet through it. The proxy is tinyproxy,
# on the host, which allows no other port and closes connections that are idle for a minute.
. "$testbed/profiles/_accept.sh"
proxy_address=10.77.0.1:3128
proxy_pid=$run/proxy.pid

profile_network() {
    hpc open-port 10351
    hpc firewall login "out:${proxy_address#*:}"
    start_proxy
}
profile_site() {
    printf '[[dial_out]]\naddress = "%s"\nproxy = "http://%s"\n' "$kubelet_address" "$proxy_address"
    printf 'proxy_credentials = "%s/.config/knoc/proxy"\n' "$agent_home"
}
profile_prepare() {
    local file=$agent_home_here/.config/knoc/proxy
    install -m 600 --owner "$(stat -c %u "$agent_home_here")" --group "$(stat -c %g "$agent_home_here")" <(echo "knoc:$(cat "$run/proxy.password")") "$file"
}
profile_down() { stop "$proxy_pid"; }

start_proxy() {
    ! alive "$proxy_pid" || return 0
    apt_install tinyproxy tinyproxy-bin
    [ -f "$run/proxy.password" ] || (umask 077; head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$run/proxy.password")
    (
        umask 077
        printf '%s\n' "Port ${proxy_address#*:}" "Listen ${proxy_address%:*}" "User nobody" "Group nogroup" "Timeout 60" "MaxClients 100" "LogLevel Connect" \
            "Allow 10.77.0.2" "ConnectPort ${kubelet_address#*:}" "BasicAuth knoc $(cat "$run/proxy.password")" >"$run/proxy.conf"
    )
    start "$proxy_pid" "$log/proxy.log" tinyproxy -d -c "$run/proxy.conf"
    wait_for 60 "the proxy on $proxy_address" bash -c "exec 3<>/dev/tcp/${proxy_address%:*}/${proxy_address#*:}" || { tail -5 "$log/proxy.log" >&2; exit 1; }
}
