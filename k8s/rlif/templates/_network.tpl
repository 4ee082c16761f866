{{/* A peer: the pods of one part of this release. */}}
{{- define "rlif.peer" }}
- podSelector:
    matchLabels:
      {{- include "rlif.selector" . | nindent 6 }}
{{- end }}
{{- define "rlif.toDns" }}
- to:
    {{- toYaml .Values.networkPolicy.dns | nindent 4 }}
  ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- end }}
{{- define "rlif.toRedis" }}
{{- if .Values.redis.enabled }}
- to: {{- include "rlif.peer" (dict "root" . "part" "redis") | nindent 4 }}
  ports:
    - {port: {{ int .Values.redis.port }}, protocol: TCP}
{{- else }}
- ports:
    {{- range .Values.networkPolicy.redisPorts }}
    - {port: {{ int . }}, protocol: TCP}
    {{- end }}
  {{- with .Values.networkPolicy.redisPeers }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
{{- end }}
{{- define "rlif.toHub" }}
{{- if .Values.hub.enabled }}
- ports:
    - {port: 443, protocol: TCP}
  to:
    {{- toYaml .Values.networkPolicy.hubPeers | nindent 4 }}
{{- end }}
{{- end }}
{{- define "rlif.toBucket" }}
{{- if .Values.bucket.url }}
- ports:
    {{- range .Values.networkPolicy.bucketPorts }}
    - {port: {{ int . }}, protocol: TCP}
    {{- end }}
  to:
    {{- toYaml (.Values.networkPolicy.bucketPeers | default .Values.networkPolicy.hubPeers) | nindent 4 }}
{{- end }}
{{- end }}
{{- define "rlif.fromPrometheus" }}
{{- if .root.Values.monitoring.enabled }}
- from:
    {{- toYaml .root.Values.networkPolicy.prometheus | nindent 4 }}
  ports:
    - {port: {{ .port }}, protocol: TCP}
{{- end }}
{{- end }}
