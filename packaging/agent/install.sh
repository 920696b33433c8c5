#!/bin/sh
# Installs knoc-agent and knocctl for the user who runs it. Do not run it as root.
#
#   ./install.sh [--prefix DIR]      default: ~/.local
#
# Installs the binaries in DIR/lib/knoc/VERSION with links to them in DIR/bin, and the systemd user unit and the shell
# completions in their usual folders. A running agent uses its old file until it is restarted, and jobs have their own
# copy. Configuration, certificates and state are never changed; `knoc-agent init --site SITE` creates
# them.
set -eu
umask 022

prefix=$HOME/.local
while [ $# -gt 0 ]; do
    case $1 in
    --prefix) [ $# -ge 2 ] || { echo "install.sh: --prefix needs a folder" >&2; exit 2; }; prefix=$2; shift 2 ;;
    --prefix=*) prefix=${1#*=}; shift ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "install.sh: unknown argument $1 (--prefix DIR, --help)" >&2; exit 2 ;;
    esac
done
case $prefix in /*) ;; *) echo "install.sh: --prefix must be an absolute path, it is $prefix" >&2; exit 2 ;; esac

here=$(cd "$(dirname "$0")" && pwd)
version=$("$here/knoc-agent" version | awk '{print $2}') || version=
[ -n "$version" ] || { echo "install.sh: $here/knoc-agent does not run on this machine ($(uname -sm))" >&2; exit 1; }
store=$prefix/lib/knoc/$version

# put FILE TARGET MODE: copies to a temporary name and renames it, so that no file is ever incomplete or written while it runs.
put() {
    mkdir -p "$(dirname "$2")"
    if [ -e "$2" ] && cmp -s "$1" "$2"; then return 0; fi
    cp "$1" "$2.new.$$"
    chmod "$3" "$2.new.$$"
    mv -f "$2.new.$$" "$2"
}
# The link is replaced atomically too, so that knoc-agent exists at all times.
link() {
    mkdir -p "$(dirname "$2")"
    if [ -d "$2" ] && [ ! -L "$2" ]; then echo "install.sh: $2 is a folder" >&2; exit 1; fi
    ln -s "$1" "$2.new.$$"
    mv -f "$2.new.$$" "$2"
}

for name in knoc-agent knocctl; do
    put "$here/$name" "$store/$name" 755
    link "../lib/knoc/$version/$name" "$prefix/bin/$name"
done
data=${XDG_DATA_HOME:-$HOME/.local/share}
config=${XDG_CONFIG_HOME:-$HOME/.config}
put "$here/completions/knocctl.bash" "$data/bash-completion/completions/knocctl" 644
put "$here/completions/_knocctl" "$data/zsh/site-functions/_knocctl" 644
put "$here/completions/knocctl.fish" "$data/fish/vendor_completions.d/knocctl.fish" 644

# If the user has changed the unit, keep it and write ours next to it. A unit is unchanged if some installed version wrote it.
unit=$config/systemd/user/knoc-agent.service
unchanged() {
    for known in "$prefix"/lib/knoc/*/knoc-agent.service; do
        if cmp -s "$known" "$unit"; then return 0; fi
    done
    return 1
}
if [ ! -e "$unit" ] || unchanged; then target=$unit; else target=$unit.new; fi
rendered=$(mktemp)
sed "s|@PREFIX@|$prefix|g" "$here/knoc-agent.service" >"$rendered"
put "$rendered" "$store/knoc-agent.service" 644
put "$rendered" "$target" 644
rm -f "$rendered"
[ "$target" = "$unit" ] || cmp -s "$unit" "$target" || echo "kept your $unit; the new unit is next to it as ${target##*/}"

echo "installed knoc-agent and knocctl $version in $prefix/bin"
case :$PATH: in *:"$prefix/bin":*) ;; *) echo "add $prefix/bin to your PATH" ;; esac
[ -e "$config/knoc/agent.toml" ] || echo "next: knoc-agent init --site SITE --address HOST --namespace NAMESPACE (see README.md), then read $config/knoc/agent.toml"
if systemctl --user show-environment >/dev/null 2>&1; then
    echo "start:   systemctl --user daemon-reload && systemctl --user enable --now knoc-agent"
    echo "upgrade: systemctl --user daemon-reload && systemctl --user restart knoc-agent   (jobs continue)"
    echo "to keep it running after you log out: loginctl enable-linger"
else
    echo "start:   knoc-agent serve --detach   (there is no systemd user session)"
fi
