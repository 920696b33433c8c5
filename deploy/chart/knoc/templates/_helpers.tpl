{{- define "knoc.node" -}}
{{- .Values.node.name | default (printf "knoc-%s" .Values.agent.site) -}}
{{- end -}}

{{- /* Cluster-wide names carry the node, so that several sites can be installed side by side. */ -}}
{{- define "knoc.clusterName" -}}
{{- printf "knoc-kubelet-%s" (include "knoc.node" .) -}}
{{- end -}}

{{- define "knoc.fullname" -}}
{{- if contains "knoc" .Release.Name -}}
{{- printf "%s-kubelet" .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-knoc-kubelet" .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "knoc.selector" -}}
app.kubernetes.io/name: knoc-kubelet
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "knoc.labels" -}}
{{ include "knoc.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: knoc
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- /* Non-empty if an address is a login over SSH. */ -}}
{{- define "knoc.overSsh" -}}
{{- $over := "" -}}
{{- range (kindIs "slice" .Values.agent.address | ternary .Values.agent.address (list .Values.agent.address)) -}}
{{- if hasPrefix "ssh:" . }}{{ $over = "yes" }}{{ end -}}
{{- end -}}
{{- if and $over (not .Values.agent.ssh.secret) }}{{ fail "agent.ssh.secret is missing: an ssh: address needs a Secret with ssh-privatekey and known_hosts" }}{{ end -}}
{{- if and .Values.agent.ssh.secret (not $over) }}{{ fail "agent.ssh.secret is set, but agent.address names no ssh: address" }}{{ end -}}
{{- $over -}}
{{- end -}}

{{- define "knoc.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default (printf "%s%s" .Chart.AppVersion (ternary "-ssh" "" (not (empty .Values.agent.ssh.secret)))) }}
{{- end -}}
{{- end -}}

{{- /* What pods use of their namespace: values for environment and volumes, and tokens. */ -}}
{{- define "knoc.podRules" -}}
{{- if .Values.rbac.watchSecrets -}}
- apiGroups: [""]
  resources: [configmaps, secrets]
  verbs: [get, watch]
{{- else -}}
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, watch]
- apiGroups: [""]
  resources: [secrets]
  verbs: [get]
{{- end }}
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get]
- apiGroups: [""]
  resources: [serviceaccounts/token]
  verbs: [create]
{{- end -}}

{{- define "knoc.subject" -}}
- kind: ServiceAccount
  name: {{ .Values.serviceAccount.name }}
  namespace: {{ .Release.Namespace }}
{{- end -}}

{{- define "knoc.keys" -}}
{{- .Values.keys.secret | default (printf "%s-keys" (include "knoc.fullname" .)) -}}
{{- end -}}

{{- /* Non-empty if the kubelet has keys of its own to store: always, because it renews its certificate for the link. */ -}}
{{- define "knoc.ownKeys" -}}
yes
{{- end -}}

{{- /* Non-empty if the ServiceAccount makes CertificateSigningRequests. */ -}}
{{- define "knoc.asks" -}}
{{- if eq .Values.identity.kind "node" }}
{{- if not .Values.identity.bootstrapSecret }}yes{{ end }}
{{- else if eq .Values.server.certificate "csr" }}yes{{ end -}}
{{- end -}}

{{- /* Non-empty if pods may reach Services. */ -}}
{{- define "knoc.egress" -}}
{{- if not (has (.Values.egress.allow | toString) (list "off" "false")) }}yes{{ end -}}
{{- end -}}

{{- /* Non-empty if Services may lead to pods. */ -}}
{{- define "knoc.relay" -}}
{{- if not (has (.Values.relay.allow | toString) (list "off" "false")) -}}
{{- if ne .Values.node.podIP "none" }}{{ fail "relay.allow needs node.podIP=none: otherwise Kubernetes' own controllers publish the pods' addresses as endpoints, too" }}{{ end -}}
yes
{{- end -}}
{{- end -}}

{{- /* Non-empty if the kubelet's pod is in the network of its host, where no NetworkPolicy applies to it. */ -}}
{{- define "knoc.hostNetwork" -}}
{{- if .Values.hostNetwork -}}
{{- if and (include "knoc.relay" .) .Values.relay.networkPolicy.from }}{{ fail "relay.networkPolicy.from is of no effect with hostNetwork: NetworkPolicies do not apply to pods in the network of their host" }}{{ end -}}
yes
{{- end -}}
{{- end -}}

{{- /* Non-empty if the kubelet listens at the own addresses of pods. */ -}}
{{- define "knoc.podListeners" -}}
{{- if .Values.node.podListeners -}}
{{- if ne .Values.node.podIP "own" }}{{ fail "node.podListeners needs node.podIP=own: other pods have no address of their own" }}{{ end -}}
yes
{{- end -}}
{{- end -}}
