#!/bin/bash
# Stops the processes that start.sh started, by their pid files.
. "$(dirname "$0")/../lib.sh"
for name in ingress kube-proxy metrics-server kube-scheduler kube-controller-manager kube-apiserver etcd; do stop "$KUBE_PREFIX/run/$name.pid"; done
