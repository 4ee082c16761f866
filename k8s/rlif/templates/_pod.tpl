{{/* What all pods of the chart have in common; the restricted Pod Security profile. (dict "root" $ "part" "rollout" "values" .Values.rollout) */}}
{{- define "rlif.pod" -}}
serviceAccountName: {{ .root.Values.serviceAccount.name | default (include "rlif.fullname" .root) }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .user | default 10001 }}
  runAsGroup: {{ .user | default 10001 }}
  fsGroup: {{ .user | default 10001 }}
  # A volume of checkpoints is not walked at every start.
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    {{- toYaml (.values.seccompProfile | default (dict "type" "RuntimeDefault")) | nindent 4 }}
{{- with .values.terminationGracePeriodSeconds }}
terminationGracePeriodSeconds: {{ . }}
{{- end }}
{{- with .values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- range . }}
  - {{- toYaml (merge (dict "labelSelector" (dict "matchLabels" (include "rlif.selector" $ | fromYaml))) .) | nindent 4 }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* No label that a new version of the chart changes: it would start every pod anew. */}}
{{- define "rlif.podMetadata" -}}
labels:
  {{- include "rlif.selector" . | nindent 2 }}
  {{- with .values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  checksum/recipe: {{ include "rlif.recipe" .root | sha256sum }}
  {{- with .values.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "rlif.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Requests and limits with the part's GPUs in both, as extended resources want it. */}}
{{- define "rlif.resources" -}}
{{- $resources := deepCopy .values.resources -}}
{{- if gt (int (.values.gpus | default 0)) 0 -}}
{{- $gpus := dict .root.Values.gpuResource (int .values.gpus) -}}
{{- $resources = mergeOverwrite (dict "requests" (dict) "limits" (dict)) $resources (dict "requests" $gpus "limits" $gpus) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* One variable out of a Secret. (list NAME SECRET KEY) */}}
{{- define "rlif.secretEnv" -}}
- name: {{ index . 0 }}
  valueFrom:
    secretKeyRef: {name: {{ index . 1 }}, key: {{ index . 2 }}}
{{- end -}}

{{/* Where Redis is. The password travels in variables only. */}}
{{- define "rlif.redisEnv" -}}
{{- if .Values.redis.enabled }}
{{ include "rlif.secretEnv" (list "RLIF_REDIS_PASSWORD" (include "rlif.redisSecret" .) "password") }}
- name: RLIF_REDIS_URL
  value: redis://:$(RLIF_REDIS_PASSWORD)@{{ include "rlif.fullname" . }}-redis:{{ int .Values.redis.port }}/0
{{- else }}
{{ include "rlif.secretEnv" (list "RLIF_REDIS_URL" (required "redis.existingSecret: is required with redis.enabled=false (a Secret whose key `url` is rediss://...)" .Values.redis.existingSecret) "url") }}
{{- end }}
{{- end -}}

{{/* Where the versions of the weights are, for those who write and read them. Without a Secret, a role gives the keys. */}}
{{- define "rlif.bucketEnv" -}}
{{- with .Values.bucket }}
{{- if .url }}
- {name: AWS_REGION, value: {{ .region }}}
{{- with .endpoint }}
- {name: AWS_ENDPOINT_URL, value: {{ . | quote }}}
{{- end }}
{{- with .existingSecret }}
{{ include "rlif.secretEnv" (list "AWS_ACCESS_KEY_ID" . "access-key-id") }}
{{ include "rlif.secretEnv" (list "AWS_SECRET_ACCESS_KEY" . "secret-access-key") }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Everything that is written lies in /cache and /tmp; the root file system is read-only. */}}
{{- define "rlif.env" -}}
- {name: HOME, value: /cache}
- {name: XDG_CACHE_HOME, value: /cache}
- {name: HF_HOME, value: /cache/huggingface}
- {name: TRITON_CACHE_DIR, value: /cache/triton}
- {name: HF_HUB_DISABLE_PROGRESS_BARS, value: "1"}
- {name: RLIF_LOG_FORMAT, value: json}
{{- if .root.Values.hub.enabled }}
{{- with .root.Values.hub.existingSecret }}
{{ include "rlif.secretEnv" (list "HF_TOKEN" . "token") }}
{{- end }}
{{- else }}
- {name: HF_HUB_OFFLINE, value: "1"}
- {name: HF_DATASETS_OFFLINE, value: "1"}
{{- end }}
{{- with .values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "rlif.mounts" -}}
- {name: recipe, mountPath: /etc/rlif, readOnly: true}
- {name: tmp, mountPath: /tmp}
- {name: cache, mountPath: /cache}
{{- if .root.Values.storage.models.existingClaim }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- if .root.Values.hub.cacheClaim }}
- {name: hub, mountPath: /cache/huggingface}
{{- end }}
{{- if .root.Values.demo.enabled }}
- {name: demo, mountPath: /demo, readOnly: true}
{{- end }}
{{- with .values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "rlif.volumes" -}}
- name: recipe
  configMap: {name: {{ include "rlif.fullname" .root }}-recipe}
- name: tmp
  emptyDir: {sizeLimit: {{ .values.tmpSize | default "4Gi" }}}
- name: cache
  emptyDir: {sizeLimit: {{ .values.cacheSize | default "16Gi" }}}
{{- with .root.Values.storage.models.existingClaim }}
- name: models
  persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
{{- end }}
{{- with .root.Values.hub.cacheClaim }}
- name: hub
  persistentVolumeClaim: {claimName: {{ . }}}
{{- end }}
{{- if .root.Values.demo.enabled }}
- name: demo
  persistentVolumeClaim: {claimName: {{ include "rlif.claim" (dict "root" .root "name" "demo") }}}
{{- end }}
{{- with .values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Shared memory between a pod's processes (vLLM's queues, NCCL); counts as the pod's memory. */}}
{{- define "rlif.shm" -}}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ .values.shmSize }}}
{{- end -}}

{{/* Ends once the demo's model and data are there; after 30 minutes it fails and is started anew. */}}
{{- define "rlif.awaitDemo" -}}
{{- if .root.Values.demo.enabled }}
initContainers:
  - name: await-demo
    image: {{ include "rlif.image" . | quote }}
    imagePullPolicy: {{ .root.Values.image.pullPolicy }}
    command: [sh, -c]
    args:
      - |
        tries=0
        until [ -f /demo/recipe.yaml ]; do
          tries=$((tries + 1))
          [ $tries -le 900 ] || { echo "waited 30 minutes for the Job that makes /demo/recipe.yaml" >&2; exit 1; }
          sleep 2
        done
    resources:
      requests: {cpu: 10m, memory: 32Mi}
      limits: {cpu: 100m, memory: 64Mi}
    securityContext:
      {{- include "rlif.containerSecurity" . | nindent 6 }}
    volumeMounts:
      - {name: demo, mountPath: /demo, readOnly: true}
{{- end }}
{{- end -}}

{{/* Probes of an rlif server on a named port. A server answers only once its model is loaded. */}}
{{- define "rlif.probes" -}}
startupProbe:
  httpGet: {path: /healthz, port: {{ .port }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ div (int .values.startupSeconds) 5 }}
livenessProbe:
  httpGet: {path: /healthz, port: {{ .port }}}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /readyz, port: {{ .port }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
{{- end -}}
