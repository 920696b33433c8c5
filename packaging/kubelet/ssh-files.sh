#!/bin/bash
# Copies into a folder what the image's variant with OpenSSH contains beside the kubelet: ssh-files.sh FOLDER
set -euo pipefail
folder=$1
programs=(/usr/bin/ssh /bin/dash)
for program in "${programs[@]}"; do
    [ -x "$program" ] || { echo "$program is missing; install it with: sudo apt-get install -y openssh-client dash" >&2; exit 1; }
done
copy() { # copy FILE: to the same path, whatever links lead to it
    mkdir -p "$folder$(dirname "$1")"
    cp -L "$1" "$folder$1"
}
# The package that a file belongs to, under either name of a merged /usr.
package() {
    { dpkg-query -S "$1" || dpkg-query -S "$(readlink -f "$1")" || dpkg-query -S "/usr$1"; } 2>/dev/null | head -1 | cut -d: -f1
}
mapfile -t libraries < <(ldd "${programs[@]}" | grep -o '/[^ ]*\.so[^ ]*' | sort -u)
for file in "${programs[@]}" "${libraries[@]}"; do
    copy "$file"
    name=$(package "$file")
    [ -n "$name" ] && [ -f "/usr/share/doc/$name/copyright" ] || { echo "$file has no copyright file; build this variant on Debian" >&2; exit 1; }
    [ -f "$folder/usr/share/doc/$name/copyright" ] || copy "/usr/share/doc/$name/copyright"
done
mv "$folder/bin/dash" "$folder/bin/sh"
# ssh wants a line for the user that it runs as.
mkdir -p "$folder/etc"
echo 'nonroot:x:65532:65532::/:/bin/sh' >"$folder/etc/passwd"
echo 'nonroot:x:65532:' >"$folder/etc/group"
printf 'passwd: files\ngroup: files\nhosts: files dns\n' >"$folder/etc/nsswitch.conf"
