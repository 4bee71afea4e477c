{{/* A RayCluster's spec. (list root plan) */}}
{{- define "whalepod.cluster" -}}
{{- $root := index . 0 -}}
{{- $plan := index . 1 -}}
{{- $v := $root.Values -}}
rayVersion: {{ $v.rayVersion }}
{{- if eq $v.auth.ray.mode "token" }}
authOptions:
  mode: token
  {{- with $v.auth.ray.existingSecret }}
  secretName: {{ . }}
  {{- end }}
{{- end }}
{{- with $v.gcsFaultTolerance }}
{{- if .enabled }}
gcsFaultToleranceOptions:
  redisAddress: {{ .redisAddress }}
  {{- with .redisUsername }}
  redisUsername: {value: {{ . | quote }}}
  {{- end }}
  {{- if .passwordSecretName }}
  redisPassword:
    valueFrom:
      secretKeyRef: {name: {{ .passwordSecretName }}, key: {{ .passwordSecretKey }}}
  {{- end }}
  {{- with .externalStorageNamespace }}
  externalStorageNamespace: {{ . }}
  {{- end }}
{{- end }}
{{- end }}
{{- if $v.autoscaling.enabled }}
enableInTreeAutoscaling: true
autoscalerOptions:
  version: {{ $v.autoscaling.version }}
  idleTimeoutSeconds: {{ int $v.autoscaling.idleTimeoutSeconds }}
  upscalingMode: Default
  # It writes where Ray's image has it write; the rest of the context holds.
  securityContext:
    {{- toYaml (omit $v.securityContext "readOnlyRootFilesystem") | nindent 4 }}
  resources:
    {{- toYaml $v.autoscaling.resources | nindent 4 }}
{{- end }}
{{- if and (eq $v.kind "RayCluster") (ne $v.upgradeStrategy "None") }}
upgradeStrategy: {type: {{ $v.upgradeStrategy }}}
{{- end }}
headGroupSpec:
  serviceType: ClusterIP
  # No CPUs: nothing of Serve's and none of our members may be placed here.
  rayStartParams:
    num-cpus: "0"
    {{- include "whalepod.startParams" (list $root "head") | nindent 4 }}
  labels:
    whalepod/role: head
  template:
    {{- include "whalepod.podTemplate" (list $root $plan "head") | nindent 4 }}
workerGroupSpecs:
{{- range $role := list "ingress" "attention" "experts" "router" }}
{{- $g := index $plan.groups $role }}
{{- if $g.active }}
  - groupName: {{ $role }}
    replicas: {{ int $g.replicas }}
    minReplicas: {{ int $g.min }}
    maxReplicas: {{ int $g.max }}
    numOfHosts: {{ int $g.hosts }}
    rayStartParams:
      {{- include "whalepod.startParams" (list $root $role) | nindent 6 }}
    # What placement asks for: one CPU (and one GPU) a member, on nodes of its role.
    resources:
      CPU: {{ int $g.slots | quote }}
      {{- if $g.gpus }}
      GPU: {{ int $g.gpus | quote }}
      {{- end }}
    labels:
      whalepod/role: {{ $role }}
    template:
      {{- include "whalepod.podTemplate" (list $root $plan $role) | nindent 6 }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Ports are pinned, so that the network policy can name them. (list root role) */}}
{{- define "whalepod.startParams" -}}
{{- $pod := include "whalepod.podValues" . | fromJson -}}
{{- if eq (index . 1) "head" -}}
dashboard-host: 0.0.0.0
{{ end -}}
metrics-export-port: "8080"
node-manager-port: "6380"
object-manager-port: "6381"
dashboard-agent-grpc-port: "6382"
runtime-env-agent-port: "6383"
dashboard-agent-listen-port: "52365"
min-worker-port: "10002"
max-worker-port: "19999"
object-store-memory: {{ int64 $pod.objectStoreMemory | quote }}
{{- end -}}

{{/* Labels that KubeRay passes on to a gang scheduler. */}}
{{- define "whalepod.gang" -}}
{{- $g := .Values.gang -}}
{{- if has $g.scheduler (list "yunikorn" "scheduler-plugins") }}
ray.io/gang-scheduling-enabled: "true"
{{- end }}
{{- with $g.queue }}
{{ if eq $g.scheduler "kai" }}kai.scheduler/queue{{ else if eq $g.scheduler "volcano" }}volcano.sh/queue-name{{ else }}yunikorn.apache.org/queue{{ end }}: {{ . }}
{{- end }}
{{- with $g.priorityClassName }}
ray.io/priority-class-name: {{ . }}
{{- end }}
{{- end -}}
