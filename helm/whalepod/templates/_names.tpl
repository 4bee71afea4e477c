{{/* Object names. KubeRay allows a RayService 47 characters and adds its own endings: 40 are ours. */}}
{{- define "whalepod.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- $full | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "whalepod.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "whalepod.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{/* What every pod and object of the release is selected by. */}}
{{- define "whalepod.selector" -}}
app.kubernetes.io/name: {{ .Values.nameOverride | default .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "whalepod.labels" -}}
{{ include "whalepod.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "whalepod.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* The first argument that is not null: (list a b). */}}
{{- define "whalepod.first" -}}
{{- if kindIs "invalid" (index . 0) }}{{ index . 1 }}{{ else }}{{ index . 0 }}{{ end -}}
{{- end -}}

{{/* Bytes of a quantity such as 12Gi, 500Mi, 3G or 1024. */}}
{{- define "whalepod.bytes" -}}
{{- $text := toString . -}}
{{- $number := regexFind "^[0-9.]+" $text | float64 -}}
{{- $units := dict "" 1 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- mulf $number (get $units (regexFind "[A-Za-z]*$" $text) | default 1) | int64 -}}
{{- end -}}

{{- define "whalepod.gb" -}}{{ printf "%.1f GB" (divf (float64 .) 1e9) }}{{- end -}}
