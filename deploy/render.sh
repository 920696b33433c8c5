#!/bin/bash
# Checks the chart and renders the plain manifests from it: deploy/render.sh [--check]
#   --check   renders nothing, fails where deploy/manifests/knoc.yaml is not what the chart renders
# Needs helm >= 3.14: HELM=/path/of/helm, else the one in PATH.
set -euo pipefail
cd "$(dirname "$0")"
helm=${HELM:-helm}
kube=1.36.0  # a helm built by go install knows no version of its own
command -v "$helm" >/dev/null || { echo "helm is missing; install it with: go install helm.sh/helm/v3/cmd/helm@v3.22.0" >&2; exit 1; }

render() {
    echo "# Rendered by deploy/render.sh from the chart with manifests/values.yaml; edit those."
    printf -- '---\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: knoc-system\n'
    "$helm" template knoc chart/knoc --kube-version "$kube" --namespace knoc-system --values manifests/values.yaml
}
# helm's own lint, warnings as errors; --quiet leaves out what is well.
"$helm" lint chart/knoc --strict --quiet --kube-version "$kube" --values manifests/values.yaml
rendered=$(render)
if [ "${1:-}" = --check ]; then
    diff -u manifests/knoc.yaml <(echo "$rendered") || { echo "deploy/manifests/knoc.yaml is not what the chart renders; run deploy/render.sh" >&2; exit 1; }
else
    echo "$rendered" >manifests/knoc.yaml.new
    mv manifests/knoc.yaml.new manifests/knoc.yaml
fi
