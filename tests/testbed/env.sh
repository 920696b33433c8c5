#!/bin/bash
# Prints shell exports for other test suites and tools: eval "$(make -s env)".
. "$(dirname "$0")/lib.sh"
. "$testbed/stack.sh"
. "$testbed/profile.sh"
export_line() { printf 'export %s=%q\n' "$1" "$2"; }
export_line KNOC_BED "$KNOC_BED"
export_line KNOC_BIN "$KNOC_BIN"
export_line STACK "$STACK"
export_line PROFILE "$PROFILE"
export_line KUBE_VERSION "$KUBE_VERSION"
export_line KNOCCTL_CONFIG "$run/knocctl.toml"
path=$KNOC_BIN
if [ "$STACK" != local ]; then
    export_line HPC_PREFIX "$HPC_PREFIX"
    export_line KNOC_REGISTRY $registry
fi
if [ "$STACK" = full ]; then
    export_line KUBECONFIG "$KUBECONFIG"
    export_line KNOC_NODE $node
    path=$path:$KUBE_PREFIX/bin
fi
echo "export PATH=$(printf %q "$path"):\$PATH"
