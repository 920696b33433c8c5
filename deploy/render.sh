#!/bin/bash
# Checks the chart and renders the plain manifests from it: deploy/render.sh [--check]
#   --check   writes nothing; fails if deploy/manifests/knoc.yaml differs from what the chart renders
# Needs helm >= 3.14, from HELM=/path/of/helm or from PATH.
set -euo pipefail
cd "$(dirname "$0")"
helm=${HELM:-helm}
kube=1.36.0  # a helm that was built by go install has no default version of Kubernetes
command -v "$helm" >/dev/null || { echo "helm is missing; install it with: go install helm.sh/helm/v3/cmd/helm@v3.22.0" >&2; exit 1; }

render() {
    echo "# Rendered by deploy/render.sh from the chart with manifests/values.yaml; edit those."
    printf -- '---\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: knoc-system\n'
    "$helm" template knoc chart/knoc --kube-version "$kube" --namespace knoc-system --values manifests/values.yaml
}
# Run helm's lint with warnings as errors; --quiet prints only problems.
"$helm" lint chart/knoc --strict --quiet --kube-version "$kube" --values manifests/values.yaml
rendered=$(render)
if [ "${1:-}" = --check ]; then
    diff -u manifests/knoc.yaml <(echo "$rendered") || { echo "deploy/manifests/knoc.yaml differs from what the chart renders; run deploy/render.sh" >&2; exit 1; }
else
    echo "$rendered" >manifests/knoc.yaml.new
    mv manifests/knoc.yaml.new manifests/knoc.yaml
fi
