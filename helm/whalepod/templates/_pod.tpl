{{/* Values of a group's pods: `pods` with the group's own keys on top. (list root role) */}}
{{- define "whalepod.podValues" -}}
{{- $v := (index . 0).Values -}}
{{- $own := ternary $v.head (get $v.groups (index . 1)) (eq (index . 1) "head") -}}
{{- mergeOverwrite (deepCopy $v.pods) (deepCopy $own) | toJson -}}
{{- end -}}

{{/* (list root plan role) */}}
{{- define "whalepod.gpus" -}}
{{- if eq (index . 2) "head" }}0{{ else }}{{ int (index (index . 1).groups (index . 2)).gpus }}{{ end -}}
{{- end -}}

{{- define "whalepod.shm" -}}
{{- $pod := include "whalepod.podValues" (list (index . 0) (index . 2)) | fromJson -}}
{{- $pod.shmSize | default (ternary "8Gi" "1Gi" (gt (include "whalepod.gpus" . | int) 0)) -}}
{{- end -}}

{{/* Resources of a Ray container, with devices and claims. (list root plan role) */}}
{{- define "whalepod.resources" -}}
{{- $v := (index . 0).Values -}}
{{- $plan := index . 1 -}}
{{- $role := index . 2 -}}
{{- $small := eq $v.model.preset "demo" -}}
{{- $pod := include "whalepod.podValues" (list (index . 0) $role) | fromJson -}}
{{- $gpus := include "whalepod.gpus" . | int -}}
{{- $resources := dict -}}
{{- if not (kindIs "invalid" $pod.resources) -}}
{{- $resources = deepCopy $pod.resources -}}
{{- else if $gpus -}}
{{- $memory := printf "%dGi" (add 16 (mul 32 $gpus)) -}}
{{- $resources = dict "requests" (dict "cpu" (toString (mul 4 $gpus)) "memory" $memory) "limits" (dict "memory" $memory) -}}
{{- else if has $role (list "head" "ingress") -}}
{{- $memory := ternary "2Gi" "6Gi" $small -}}
{{- $resources = dict "requests" (dict "cpu" (ternary "250m" "2" $small) "memory" $memory) "limits" (dict "memory" $memory) -}}
{{- else -}}
{{- $slots := int (index $plan.groups $role).slots -}}
{{- $memory := printf "%dGi" (add (ternary 1 2 $small) (mul (ternary 1 4 $small) $slots)) -}}
{{- $resources = dict "requests" (dict "cpu" (ternary "250m" (toString $slots) $small) "memory" $memory) "limits" (dict "memory" $memory) -}}
{{- end -}}
{{- if $gpus -}}
{{- $limits := get $resources "limits" | default dict -}}
{{- $requests := get $resources "requests" | default dict -}}
{{- $_ := set $limits $v.gpu.resourceName (toString $gpus) -}}
{{- $_ := set $requests $v.gpu.resourceName (toString $gpus) -}}
{{- if $v.fabric.rdma.enabled -}}
{{- $_ := set $limits $v.fabric.rdma.resourceName (toString (int $v.fabric.rdma.count)) -}}
{{- $_ := set $requests $v.fabric.rdma.resourceName (toString (int $v.fabric.rdma.count)) -}}
{{- end -}}
{{- $_ := set $resources "limits" $limits -}}
{{- $_ := set $resources "requests" $requests -}}
{{- if eq $v.fabric.nvlinkDomain.mode "computeDomain" }}{{ $_ := set $resources "claims" (list (dict "name" "nvlink-domain")) }}{{ end -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "whalepod.env" -}}
{{- $v := (index . 0).Values -}}
{{- $pod := include "whalepod.podValues" (list (index . 0) (index . 2)) | fromJson -}}
- {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
- {name: HOME, value: /tmp}
- {name: RAY_AUTH_MODE, value: {{ $v.auth.ray.mode }}}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: {{ $v.termination.drainSeconds | quote }}}
{{- range $key, $value := $v.health.rayHealthCheck }}
- {name: RAY_health_check_{{ $key }}, value: {{ int64 $value | quote }}}
{{- end }}
{{- if include "whalepod.gpus" . | int }}
{{- range $key, $value := $v.fabric.ncclEnv }}
- {name: {{ $key }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}
{{- with $pod.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Affinity of the values, with NVLink domains and the ingress' spread added. */}}
{{- define "whalepod.affinity" -}}
{{- $root := index . 0 -}}
{{- $role := index . 2 -}}
{{- $pod := include "whalepod.podValues" (list $root $role) | fromJson -}}
{{- $affinity := deepCopy $pod.affinity -}}
{{- $labels := include "whalepod.selector" $root | fromYaml -}}
{{- $domain := $root.Values.fabric.nvlinkDomain -}}
{{- if and (eq $domain.mode "nodeAffinity") (include "whalepod.gpus" . | int) -}}
{{- $term := dict "labelSelector" (dict "matchLabels" (merge (dict "whalepod/gpu" "true") $labels)) "topologyKey" $domain.key -}}
{{- $near := get $affinity "podAffinity" | default dict -}}
{{- $key := "requiredDuringSchedulingIgnoredDuringExecution" -}}
{{- $_ := set $near $key (append (get $near $key | default list) $term) -}}
{{- $_ := set $affinity "podAffinity" $near -}}
{{- end -}}
{{- if eq $role "ingress" -}}
{{- $term := dict "weight" 100 "podAffinityTerm" (dict "labelSelector" (dict "matchLabels" (merge (dict "whalepod/role" "ingress") $labels)) "topologyKey" "kubernetes.io/hostname") -}}
{{- $apart := get $affinity "podAntiAffinity" | default dict -}}
{{- $key := "preferredDuringSchedulingIgnoredDuringExecution" -}}
{{- $_ := set $apart $key (append (get $apart $key | default list) $term) -}}
{{- $_ := set $affinity "podAntiAffinity" $apart -}}
{{- end -}}
{{- if $affinity }}{{ toYaml $affinity }}{{ end -}}
{{- end -}}

{{/* Whether the group reads the checkpoint. */}}
{{- define "whalepod.mounts" -}}
{{- $plan := index . 1 -}}
- {name: tmp, mountPath: /tmp}
- {name: shm, mountPath: /dev/shm}
- {name: scripts, mountPath: /etc/whalepod, readOnly: true}
{{- if and (ne (index . 2) "head") (ne $plan.source "image") }}
- {name: model, mountPath: /mnt/models, readOnly: true}
{{- end }}
{{- end -}}

{{- define "whalepod.security" -}}
{{- $v := (index . 0).Values -}}
{{- $context := deepCopy $v.securityContext -}}
{{- if and $v.fabric.rdma.enabled (include "whalepod.gpus" . | int) -}}
{{- $_ := set $context.capabilities "add" (append ($context.capabilities.add | default list) "IPC_LOCK" | uniq) -}}
{{- end -}}
{{- toYaml $context -}}
{{- end -}}
