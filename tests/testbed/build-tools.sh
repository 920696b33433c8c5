#!/bin/bash
# Installs the tools that build the Rust binaries: cargo, the musl target, musl-gcc.
. "$(dirname "$0")/lib.sh"
command -v cargo >/dev/null || missing cargo "curl --proto '=https' -sSf https://sh.rustup.rs | sh"
apt_install cc gcc
apt_install musl-gcc musl-tools
[ -d "$(rustc --print sysroot)/lib/rustlib/$target" ] || rustup target add $target || missing "the Rust target $target" "rustup target add $target"
