{{/*
Everything that follows from the values and the model's preset, as JSON:
  layout, router, stages, fabric, dtype, path, mount, source, and for each group
  active, replicas, min, max, hosts, gpus, slots (members a pod can hold), pods, members.
*/}}
{{- define "whalepod.plan" -}}
{{- $v := .Values -}}
{{- $facts := get (.Files.Get "files/presets.yaml" | fromYaml) ($v.model.preset | default "custom") -}}
{{- $layout := $v.config.topology.layout | default $facts.layout -}}
{{- $router := $v.config.topology.router | default $facts.router -}}
{{- $active := dict "ingress" true "attention" true "experts" (eq $layout "afd") "router" (and (eq $layout "afd") (eq $router "own")) -}}
{{- $groups := dict -}}
{{- $gpus := 0 -}}
{{- range $role := list "ingress" "attention" "experts" "router" -}}
{{- $group := include "whalepod.plan.group" (list (index $v.groups $role) (index $facts.groups $role) $role) | fromJson -}}
{{- $_ := set $group "active" (get $active $role) -}}
{{- $_ := set $groups $role $group -}}
{{- if $group.active }}{{ $gpus = add $gpus (mul $group.pods $group.gpus) }}{{ end -}}
{{- end -}}
{{- $source := $v.model.source | default $facts.source -}}
{{- $repository := $v.model.repository | default $facts.repository | default "" -}}
{{- $plan := dict "facts" $facts "layout" $layout "router" $router "groups" $groups "gpus" $gpus "source" $source "repository" $repository -}}
{{- $_ := set $plan "fabric" ($v.config.cluster.fabric | default (ternary "nccl" "gloo" (gt (int $gpus) 0))) -}}
{{- $_ := set $plan "dtype" ($v.config.model.dtype | default $facts.dtype) -}}
{{- $_ := set $plan "fidelity" ($v.config.model.fidelity | default $facts.fidelity) -}}
{{- $_ := set $plan "download" (has $source (list "huggingface" "modelscope")) -}}
{{- $_ := set $plan "revision" ($v.model.revision | default (ternary "master" "main" (eq $source "modelscope"))) -}}
{{- $_ := set $plan "folder" ($v.model.path | default $facts.path | default (printf "%s/%s" (base $repository) ($plan.revision | replace "/" "-"))) -}}
{{- $_ := set $plan "path" (ternary $plan.folder (printf "/mnt/models/%s" (trimPrefix "/" $plan.folder)) (eq $source "image")) -}}
{{- $_ := set $plan "claim" ($v.model.existingClaim | default (printf "%s-model" (include "whalepod.fullname" .))) -}}
{{- $_ := set $plan "name" ($v.model.name | default ($v.model.preset | default "model")) -}}
{{- toJson $plan -}}
{{- end -}}

{{/* (list values preset role) */}}
{{- define "whalepod.plan.group" -}}
{{- $values := index . 0 -}}
{{- $preset := index . 1 -}}
{{- $replicas := include "whalepod.first" (list $values.replicas $preset.replicas) | int -}}
{{- $hosts := $values.hostsPerReplica | default 1 | int -}}
{{- $gpus := include "whalepod.first" (list $values.gpusPerHost (default 0 $preset.gpusPerHost)) | int -}}
{{- $slots := 1 -}}
{{- if ne (index . 2) "ingress" -}}
{{- $slots = $gpus | default (include "whalepod.first" (list $values.membersPerHost (default 1 $preset.membersPerHost))) | int -}}
{{- end -}}
{{- $pods := mul $replicas $hosts | int -}}
{{- dict "replicas" $replicas "min" ($values.minReplicas | default $replicas | int) "max" ($values.maxReplicas | default $replicas | int) "hosts" $hosts "gpus" $gpus "slots" $slots "pods" $pods "members" ($values.members | default (mul $pods $slots) | int) | toJson -}}
{{- end -}}

{{/* The configuration file as YAML: what `whalepod` reads, every key written out. (list root plan) */}}
{{- define "whalepod.config" -}}
{{- $v := (index . 0).Values -}}
{{- $plan := index . 1 -}}
{{- $groups := $plan.groups -}}
{{- $c := $v.config -}}
{{- $selector := dict "controller" (dict "whalepod/role" "ingress") -}}
{{- range $role, $group := $groups }}{{ if $group.active }}{{ $_ := set $selector $role (dict "whalepod/role" $role) }}{{ end }}{{ end -}}
{{- $model := dict "path" $plan.path "name" $plan.name "dtype" $plan.dtype "fidelity" $plan.fidelity -}}
{{- $topology := dict "layout" $plan.layout "router" $plan.router "stages" (int $c.topology.stages) "micro_batches" (int $c.topology.micro_batches) "micro_batch_rows" nil -}}
{{- if $c.topology.micro_batch_rows }}{{ $_ := set $topology "micro_batch_rows" (int $c.topology.micro_batch_rows) }}{{ end -}}
{{- $_ := set $topology "attention" (div (int $groups.attention.members) (int $c.topology.stages)) -}}
{{- $_ := set $topology "experts" (ternary (int $groups.experts.members) 2 $groups.experts.active) -}}
{{- $_ := set $topology "routers" (ternary (int $groups.router.members) 1 $groups.router.active) -}}
{{- $engine := dict "max_batch" (int $c.engine.max_batch) "max_queue" (int $c.engine.max_queue) "max_queue_tokens" (int64 $c.engine.max_queue_tokens) "max_step_tokens" (int $c.engine.max_step_tokens) "draft_tokens" (int $c.engine.draft_tokens) "cuda_graphs" $c.engine.cuda_graphs "deterministic" $c.engine.deterministic "prefix_snapshots" (int $c.engine.prefix_snapshots) "memory_gib" $c.engine.memory_gib "kv_format" $c.engine.kv_format "kv_tokens" (int64 $c.engine.kv_tokens) "max_context" nil -}}
{{- if $c.engine.max_context }}{{ $_ := set $engine "max_context" (int64 $c.engine.max_context) }}{{ end -}}
{{- $cluster := dict "fabric" $plan.fabric "step_deadline_s" $c.cluster.step_deadline_s "ready_timeout_s" $c.cluster.ready_timeout_s "drain_s" $c.cluster.drain_s "cpus_per_member" 1.0 "gpus_per_member" (ternary 1.0 0.0 (eq $plan.fabric "nccl")) "label_selector" $selector -}}
{{- $server := dict "host" "0.0.0.0" "http" $c.server.http "http_port" (int $c.server.http_port) "grpc_port" (int $c.server.grpc_port) "replicas" (int $groups.ingress.pods) "default_thinking" $c.server.default_thinking "max_body_bytes" (int64 $c.server.max_body_bytes) -}}
{{- dict "model" $model "topology" $topology "engine" $engine "cluster" $cluster "server" $server | toYaml -}}
{{- end -}}

{{/* What `whalepod serve-config` prints for that file. (list root plan) */}}
{{- define "whalepod.serveConfig" -}}
{{- $server := (index . 0).Values.config.server -}}
proxy_location: {{ ternary "EveryNode" "Disabled" (eq $server.http "proxy") }}
http_options:
  host: 0.0.0.0
  port: {{ int $server.http_port }}
applications:
- name: whalepod
  route_prefix: /
  import_path: whalepod.ingress.serve:build
  external_scaler_enabled: true
  args:
    config:
      {{- include "whalepod.config" . | nindent 6 }}
{{- end -}}
