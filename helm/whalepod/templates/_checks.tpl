{{/* Refuse what cannot work, with the value's name and the way out. (list root plan) */}}
{{- define "whalepod.check" -}}
{{- $root := index . 0 -}}
{{- $v := $root.Values -}}
{{- $plan := index . 1 -}}
{{- if not $v.model.preset }}{{ fail "\n\nmodel.preset is empty; name the model: --set model.preset=flash (or pro, demo, custom)" }}{{ end -}}
{{- if eq (toString $v.image.tag) "latest" }}{{ fail "\n\nimage.tag is latest, which changes under running pods; name a version, or image.digest" }}{{ end -}}
{{- if gt (len (include "whalepod.fullname" $root)) 40 }}{{ fail (printf "\n\nfullnameOverride %s has %d characters; KubeRay's names leave room for 40" $v.fullnameOverride (len $v.fullnameOverride)) }}{{ end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" (include "whalepod.fullname" $root)) }}{{ fail (printf "\n\nthe release's name gives %s, which KubeRay refuses; begin it with a letter and use a-z, 0-9 and -" (include "whalepod.fullname" $root)) }}{{ end -}}
{{- if semverCompare "<2.60.0-0" $v.rayVersion }}{{ fail (printf "\n\nrayVersion is %s; whalepod needs Ray 2.60" $v.rayVersion) }}{{ end -}}
{{- include "whalepod.check.model" . -}}
{{- include "whalepod.check.topology" . -}}
{{- include "whalepod.check.memory" . -}}
{{- include "whalepod.check.cluster" . -}}
{{- include "whalepod.check.network" . -}}
{{- end -}}

{{- define "whalepod.check.model" -}}
{{- $m := (index . 0).Values.model -}}
{{- $plan := index . 1 -}}
{{- $bytes := int64 ($m.bytes | default $plan.facts.bytes | default 0) -}}
{{- if and $plan.download (not $plan.repository) }}{{ fail (printf "\n\nmodel.repository is empty; with model.source=%s name the hub's repository as owner/name" $plan.source) }}{{ end -}}
{{- if and (eq $plan.source "pvc") (not $m.existingClaim) }}{{ fail "\n\nmodel.existingClaim is empty; with model.source=pvc name the claim that holds the checkpoint" }}{{ end -}}
{{- if and (eq $plan.source "pvc") (not $m.path) }}{{ fail "\n\nmodel.path is empty; with model.source=pvc name the checkpoint's folder in the claim" }}{{ end -}}
{{- if and (eq $plan.source "image") (not (hasPrefix "/" $plan.folder)) }}{{ fail (printf "\n\nmodel.path is %q; with model.source=image name the checkpoint's folder in the image, as /models/demo" (toString $m.path)) }}{{ end -}}
{{- if and (eq $plan.source "image") $m.existingClaim }}{{ fail (printf "\n\nmodel.existingClaim is %s, but model.source=image reads no claim; set model.source=pvc, or leave the claim out" $m.existingClaim) }}{{ end -}}
{{- if contains ".." $plan.folder }}{{ fail (printf "\n\nmodel.path is %s; it must not leave the volume" $plan.folder) }}{{ end -}}
{{- if and $plan.download (not $m.existingClaim) -}}
{{- $size := $m.volume.size | default $plan.facts.volume -}}
{{- if not $size }}{{ fail "\n\nmodel.volume.size is not set; name the size of the claim to download a custom model to" }}{{ end -}}
{{- if lt (include "whalepod.bytes" $size | int64) $bytes }}{{ fail (printf "\n\nmodel.volume.size is %s; the checkpoint has %s" $size (include "whalepod.gb" $bytes)) }}{{ end -}}
{{- end -}}
{{- end -}}

{{- define "whalepod.check.topology" -}}
{{- $root := index . 0 -}}
{{- $v := $root.Values -}}
{{- $plan := index . 1 -}}
{{- $a := $plan.groups.attention -}}
{{- $stages := int $v.config.topology.stages -}}
{{- $experts := int ($v.model.experts | default $plan.facts.experts | default 0) -}}
{{- $layers := int ($v.model.layers | default $plan.facts.layers | default 0) -}}
{{- if and (eq $plan.layout "single") (or (ne (int $a.members) 1) (ne $stages 1)) }}{{ fail (printf "\n\nconfig.topology.layout is single, which has one member, but groups.attention gives %d and stages %d; set both to 1, or layout to ep or afd" (int $a.members) $stages) }}{{ end -}}
{{- if and (eq $plan.layout "ep") (ne $stages 1) }}{{ fail (printf "\n\nconfig.topology.layout is ep, which has no stages (config.topology.stages=%d); use afd" $stages) }}{{ end -}}
{{- if and $v.config.engine.draft_tokens (gt $stages 1) }}{{ fail (printf "\n\nconfig.engine.draft_tokens is %d, which needs config.topology.stages=1 (found %d); drafts are made where both ends of the model are" (int $v.config.engine.draft_tokens) $stages) }}{{ end -}}
{{- if mod (int $a.members) $stages }}{{ fail (printf "\n\n%d attention members cannot form replicas of config.topology.stages=%d; make groups.attention a multiple of it" (int $a.members) $stages) }}{{ end -}}
{{- if and $layers (gt $stages $layers) }}{{ fail (printf "\n\nconfig.topology.stages is %d, but the model has %d layers" $stages $layers) }}{{ end -}}
{{- $holders := ternary $plan.groups.experts.members $a.members (eq $plan.layout "afd") -}}
{{- if and $experts (gt (int $holders) $experts) }}{{ fail (printf "\n\n%d members would share %d experts a layer, so some would hold none; use at most %d" (int $holders) $experts $experts) }}{{ end -}}
{{- range $role, $g := $plan.groups -}}
{{- if $g.active -}}
{{- $gpus := int $g.gpus -}}
{{- if gt $gpus (int $v.gpu.perNode) }}{{ fail (printf "\n\ngroups.%s.gpusPerHost is %d, but a node has gpu.perNode=%d; use more replicas or hostsPerReplica" $role $gpus (int $v.gpu.perNode)) }}{{ end -}}
{{- if gt (int $g.members) (mul $g.pods $g.slots | int) }}{{ fail (printf "\n\ngroups.%s.members is %d, but %d pod(s) of %d have room for %d" $role (int $g.members) (int $g.pods) (int $g.slots) (mul $g.pods $g.slots | int)) }}{{ end -}}
{{- if ne $role "ingress" -}}
{{- if and (eq $plan.fabric "nccl") (eq $gpus 0) }}{{ fail (printf "\n\ngroups.%s.gpusPerHost is 0, but the fabric is nccl, which every member needs a GPU for; give all groups GPUs, or none" $role) }}{{ end -}}
{{- if and (eq $plan.fabric "gloo") $gpus }}{{ fail (printf "\n\ngroups.%s.gpusPerHost is %d, but config.cluster.fabric=gloo computes on CPUs; leave the fabric out, or set gpusPerHost to 0" $role $gpus) }}{{ end -}}
{{- end -}}
{{- if and $gpus (index $v.groups $role).membersPerHost }}{{ fail (printf "\n\ngroups.%s.membersPerHost is for CPU pods; a pod with %d GPUs holds %d members" $role $gpus $gpus) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Weights of a member against its GPU, or of a pod's members against the pod's memory. */}}
{{- define "whalepod.check.memory" -}}
{{- $root := index . 0 -}}
{{- $v := $root.Values -}}
{{- $plan := index . 1 -}}
{{- $facts := $plan.facts -}}
{{- $width := ternary 2 4 (eq $plan.dtype "bf16") -}}
{{- $attention := int64 0 -}}
{{- $experts := int64 0 -}}
{{- if and (eq $v.gpu.weights "stored") $facts.stored -}}
{{- $attention = int64 $facts.stored.attention -}}
{{- if $v.config.engine.draft_tokens }}{{ $attention = add $attention (int64 $facts.stored.mtp) }}{{ end -}}
{{- $experts = int64 $facts.stored.experts -}}
{{- else if or $facts.parameters (and $v.model.attentionParameters $v.model.expertParameters) -}}
{{- $parameters := $facts.parameters | default dict -}}
{{- $attention = mul (int64 ($v.model.attentionParameters | default $parameters.attention)) $width -}}
{{- if $v.config.engine.draft_tokens }}{{ $attention = add $attention (mul (int64 (default 0 $parameters.mtp)) $width) }}{{ end -}}
{{- $experts = mul (int64 ($v.model.expertParameters | default $parameters.experts)) $width -}}
{{- end -}}
{{- $count := int64 ($v.model.experts | default $facts.experts | default 0) -}}
{{- if and $attention $count -}}
{{- $afd := eq $plan.layout "afd" -}}
{{- $holders := int64 (ternary $plan.groups.experts.members $plan.groups.attention.members $afd) -}}
{{- $held := div (add $count $holders -1) $holders -}}
{{- $share := mul (div $experts $count) $held -}}
{{- $stage := div $attention (int64 $v.config.topology.stages) -}}
{{- $needs := ternary (dict "attention" $stage "experts" $share) (dict "attention" (add $stage $share)) $afd -}}
{{- range $role, $need := $needs -}}
{{- $g := index $plan.groups $role -}}
{{- if $g.gpus -}}
{{- $room := mul (int64 ($v.gpu.memoryMiB | default $facts.gpuMemoryMiB | default 81559)) 1048576 -}}
{{- if gt (float64 $need) (mulf (float64 $room) (float64 $v.gpu.weightShare)) -}}
{{- fail (printf "\n\ngroups.%s: each of %d members must hold %s of weights (%s, %s of %s experts a layer), but a GPU has %s, of which gpu.weightShare=%v may be weights; use more GPUs, or layout afd to keep the attention side off the experts' GPUs" $role (int $g.members) (include "whalepod.gb" $need) (ternary "as stored" (printf "dequantised to %s" $plan.dtype) (eq $v.gpu.weights "stored")) (toString $held) (toString $count) (include "whalepod.gb" $room) $v.gpu.weightShare) -}}
{{- end -}}
{{- else -}}
{{- $limit := dig "limits" "memory" "" (include "whalepod.resources" (list $root $plan $role) | fromYaml) -}}
{{- $all := mul $need (int64 $g.slots) -}}
{{- if and $limit (gt (float64 $all) (mulf (include "whalepod.bytes" $limit | float64) (float64 $v.gpu.weightShare))) -}}
{{- fail (printf "\n\ngroups.%s: the %d member(s) of a pod hold %s of weights, but its memory limit is %s; raise groups.%s.resources.limits.memory, or use more pods or GPUs" $role (int $g.slots) (include "whalepod.gb" $all) $limit $role) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $role := list "ingress" "attention" "experts" "router" -}}
{{- $g := index $plan.groups $role -}}
{{- $limit := dig "limits" "memory" "" (include "whalepod.resources" (list $root $plan $role) | fromYaml) -}}
{{- $shm := include "whalepod.shm" (list $root $plan $role) -}}
{{- if and $g.active $limit (ge (include "whalepod.bytes" $shm | int64) (include "whalepod.bytes" $limit | int64)) -}}
{{- fail (printf "\n\ngroups.%s: shmSize %s counts against the memory limit %s and leaves nothing; lower it or raise resources.limits.memory" $role $shm $limit) -}}
{{- end -}}
{{- end -}}
{{- end -}}
