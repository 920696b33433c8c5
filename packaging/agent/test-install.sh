#!/bin/bash
# Unpacks the tarball and installs it in a temporary home folder, as an ordinary user even if run as root:
#   packaging/agent/test-install.sh TARBALL
set -euo pipefail
tarball=$(realpath "$1")
umask 022
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
home=$work/home
mkdir "$home" "$work/unpacked"
tar -xzf "$tarball" -C "$work/unpacked"
package=("$work"/unpacked/*)
as=(env -i "HOME=$home" PATH=/usr/bin:/bin)
if [ "$(id -u)" = 0 ]; then
    chown 65534:65534 "$home"
    as=(setpriv --reuid 65534 --regid 65534 --clear-groups "${as[@]}")
fi
fail() { echo "test-install: $*" >&2; exit 1; }
install() { "${as[@]}" sh "${package[0]}/install.sh" "$@" >"$work/out" 2>&1 || { cat "$work/out" >&2; fail "install.sh $*"; }; }
same() { cmp "$1" "$2" || fail "$1 is not $2"; }

# First installation: every file is in its place, the link resolves, and nothing else was written.
install
version=$("${as[@]}" "$home/.local/bin/knoc-agent" version | awk '{print $2}')
for name in knoc-agent knocctl; do
    same "$home/.local/bin/$name" "${package[0]}/$name"
    [ "$(readlink "$home/.local/bin/$name")" = "../lib/knoc/$version/$name" ] || fail "$name is not a link to its version"
done
same "$home/.local/share/bash-completion/completions/knocctl" "${package[0]}/completions/knocctl.bash"
unit=$home/.config/systemd/user/knoc-agent.service
grep -q "^ExecStart=$home/.local/bin/knoc-agent serve$" "$unit" || fail "the unit does not start the agent"
[ ! -e "$home/.config/knoc" ] && [ ! -e "$home/.local/state" ] || fail "configuration or state was touched"
[ -z "$(find "$home" -name '*.new*')" ] || fail "files left behind: $(find "$home" -name '*.new*')"

# Second installation: nothing changes. A running program keeps its file, because files are renamed and not written in place.
before=$(find "$home" -type f -exec sha256sum {} + | sort)
inode=$(stat -c %i "$home/.local/lib/knoc/$version/knoc-agent")
install
[ "$(find "$home" -type f -exec sha256sum {} + | sort)" = "$before" ] || fail "a second run changed files"
[ "$(stat -c %i "$home/.local/lib/knoc/$version/knoc-agent")" = "$inode" ] || fail "an unchanged binary was replaced"

# A unit that the user changed is kept.
echo "# mine" >>"$unit"
install
grep -q '^# mine$' "$unit" && [ -e "$unit.new" ] || fail "a changed unit was overwritten"
grep -q "kept your" "$work/out" || fail "the message that the unit was kept is missing"

# Another prefix, and errors that name the mistake.
install --prefix "$home/opt"
[ -x "$home/opt/bin/knocctl" ] || fail "--prefix was ignored"
! "${as[@]}" sh "${package[0]}/install.sh" --prefix relative >"$work/out" 2>&1 && grep -q "absolute path" "$work/out" || fail "a relative prefix was accepted"
! "${as[@]}" sh "${package[0]}/install.sh" --frob >"$work/out" 2>&1 && grep -q -- "--frob" "$work/out" || fail "an unknown argument was accepted"
echo "installation of $(basename "$tarball") as an ordinary user: ok"
