{{- define "rlif.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains "rlif" .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-rlif" (.Release.Name | trunc 35 | trimSuffix "-") -}}
{{- end -}}
{{- end -}}

{{/* What a Service or a policy finds the pods of one part by. (dict "root" $ "part" "rollout") */}}
{{- define "rlif.selector" -}}
app.kubernetes.io/name: rlif
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end -}}

{{- define "rlif.labels" -}}
{{ include "rlif.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: rlif
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* registry/repository:tag, or @digest, which wins. The part's own values win over `image`; a part with GPUs has an image of its own. */}}
{{- define "rlif.image" -}}
{{- $own := .values.image | default dict -}}
{{- $registry := hasKey $own "registry" | ternary $own.registry .root.Values.image.registry -}}
{{- $kind := gt (int (.values.gpus | default 0)) 0 | ternary "-gpu" "" -}}
{{- $name := $own.repository | default (printf "rlif-%s%s" .part $kind) -}}
{{- $path := empty $registry | ternary $name (printf "%s/%s" (trimSuffix "/" $registry) $name) -}}
{{- if $own.digest -}}
{{- printf "%s@%s" $path $own.digest -}}
{{- else -}}
{{- printf "%s:%s" $path ($own.tag | default .root.Values.image.tag | default .root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- define "rlif.tokens" -}}
{{- .Values.auth.existingSecret | default (printf "%s-tokens" (include "rlif.fullname" .)) -}}
{{- end -}}

{{- define "rlif.redisSecret" -}}
{{- .Values.redis.existingSecret | default (printf "%s-redis" (include "rlif.fullname" .)) -}}
{{- end -}}

{{/* (dict "root" $ "name" "weights"), a key of storage */}}
{{- define "rlif.claim" -}}
{{- (index .root.Values.storage .name).existingClaim | default (printf "%s-%s" (include "rlif.fullname" .root) .name) -}}
{{- end -}}
