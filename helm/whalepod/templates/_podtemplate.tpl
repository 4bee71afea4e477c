{{/* A group's pod template. KubeRay takes the first container for Ray's. (list root plan role) */}}
{{- define "whalepod.podTemplate" -}}
{{- $root := index . 0 -}}
{{- $v := $root.Values -}}
{{- $plan := index . 1 -}}
{{- $role := index . 2 -}}
{{- $pod := include "whalepod.podValues" (list $root $role) | fromJson -}}
{{- $gpus := include "whalepod.gpus" . | int -}}
metadata:
  labels:
    {{- include "whalepod.selector" $root | nindent 4 }}
    whalepod/role: {{ $role }}
    {{- if $gpus }}
    whalepod/gpu: "true"
    {{- end }}
    {{- with $pod.labels }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- with $pod.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "whalepod.serviceAccount" $root }}
  automountServiceAccountToken: {{ and (eq $role "head") $v.autoscaling.enabled }}
  terminationGracePeriodSeconds: {{ int $v.termination.graceSeconds }}
  securityContext:
    {{- toYaml $v.podSecurityContext | nindent 4 }}
  {{- with $v.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $pod.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $pod.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $pod.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $pod.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with include "whalepod.affinity" . }}
  affinity:
    {{- . | nindent 4 }}
  {{- end }}
  {{- with $pod.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- range . }}
    {{- $own := dict "labelSelector" (dict "matchLabels" (merge (dict "whalepod/role" $role) (include "whalepod.selector" $root | fromYaml))) }}
    - {{- toYaml (merge (deepCopy .) $own) | nindent 6 }}
    {{- end }}
  {{- end }}
  {{- if and $gpus (eq $v.fabric.nvlinkDomain.mode "computeDomain") }}
  resourceClaims:
    - name: nvlink-domain
      resourceClaimTemplateName: {{ include "whalepod.fullname" $root }}-nvlink
  {{- end }}
  {{- if and $plan.download (ne $role "head") }}
  initContainers:
    - name: wait-for-model
      image: {{ include "whalepod.image" $root }}
      imagePullPolicy: {{ $v.image.pullPolicy }}
      command: [python3, /etc/whalepod/download_model.py, --wait, {{ $plan.path }}]
      securityContext:
        {{- toYaml $v.securityContext | nindent 8 }}
      resources:
        requests: {cpu: 50m, memory: 64Mi}
        limits: {memory: 128Mi}
      volumeMounts:
        - {name: scripts, mountPath: /etc/whalepod, readOnly: true}
        - {name: model, mountPath: /mnt/models, readOnly: true}
  {{- end }}
  containers:
    - name: ray-{{ ternary "head" "worker" (eq $role "head") }}
      image: {{ include "whalepod.image" $root }}
      imagePullPolicy: {{ $v.image.pullPolicy }}
      securityContext:
        {{- include "whalepod.security" . | nindent 8 }}
      ports:
        {{- if eq $role "head" }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        {{- end }}
        - {name: metrics, containerPort: 8080}
        {{- if has $role (list "head" "ingress") }}
        - {name: serve, containerPort: {{ int $v.config.server.http_port }}}
        - {name: serve-grpc, containerPort: {{ int $v.config.server.grpc_port }}}
        {{- end }}
      env:
        {{- include "whalepod.env" . | nindent 8 }}
      resources:
        {{- include "whalepod.resources" . | nindent 8 }}
      {{- include "whalepod.probes" . | nindent 6 }}
      volumeMounts:
        {{- include "whalepod.mounts" . | nindent 8 }}
        {{- with $pod.extraVolumeMounts }}{{ toYaml . | nindent 8 }}{{ end }}
  volumes:
    - {name: tmp, emptyDir: {sizeLimit: {{ $pod.tmpSize }}}}
    - {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ include "whalepod.shm" . }}}}
    - {name: scripts, configMap: {name: {{ include "whalepod.fullname" $root }}-scripts}}
    {{- if and (ne $role "head") (ne $plan.source "image") }}
    - {name: model, persistentVolumeClaim: {claimName: {{ $plan.claim }}, readOnly: true}}
    {{- end }}
    {{- with $pod.extraVolumes }}{{ toYaml . | nindent 4 }}{{ end }}
{{- end -}}

{{/*
Alive: the raylet. Ready: the ingress serves an epoch; a member's pod has members, all of them in it.
The head keeps KubeRay's own probes. A failing liveness probe waits 10 minutes: loading takes long.
*/}}
{{- define "whalepod.probes" -}}
{{- $root := index . 0 -}}
{{- $v := $root.Values -}}
{{- $role := index . 2 -}}
{{- if ne $role "head" -}}
livenessProbe:
  httpGet: {path: /api/healthz, port: 52365}
  initialDelaySeconds: 30
  periodSeconds: 5
  timeoutSeconds: 2
  failureThreshold: 120
readinessProbe:
  {{- if eq $role "ingress" }}
  httpGet: {path: /ready, port: serve}
  periodSeconds: 5
  timeoutSeconds: 6
  failureThreshold: 3
  {{- else if $v.health.membership.enabled }}
  exec:
    command: [python3, /etc/whalepod/member_ready.py, "http://{{ include "whalepod.fullname" $root }}-status:{{ int $v.config.server.http_port }}/status"]
  periodSeconds: {{ int $v.health.membership.periodSeconds }}
  timeoutSeconds: 8
  failureThreshold: {{ int $v.health.membership.failureThreshold }}
  {{- else }}
  httpGet: {path: /api/healthz, port: 52365}
  periodSeconds: 5
  timeoutSeconds: 2
  failureThreshold: 10
  {{- end }}
{{- end -}}
{{- end -}}
