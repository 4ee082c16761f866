{{/* The pod of a rollout or reward server. (dict "root" $ "part" "rollout" "values" .Values.rollout), and for the pods of a group (LeaderWorkerSet) "role" leader or worker. */}}
{{- define "rlif.serverPod" -}}
metadata:
  {{- include "rlif.podMetadata" . | nindent 2 }}
spec:
  {{- include "rlif.pod" . | nindent 2 }}
  {{- include "rlif.awaitDemo" . | nindent 2 }}
  containers:
    - name: {{ .part }}
      image: {{ include "rlif.image" . | quote }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      args:
        - serve
        - {{ .part }}
        - --recipe=/etc/rlif/recipe.yaml
        - --host=0.0.0.0
        - --port={{ int .values.port }}
        {{- if .role }}
        - --nodes={{ int .values.nodesPerReplica }}
        - --node-rank=$(NODE_RANK)
        - --leader=$(LWS_LEADER_ADDRESS)
        {{- end }}
        {{- include "rlif.overrides" .root | nindent 8 }}
      env:
        {{- include "rlif.redisEnv" .root | trim | nindent 8 }}
        {{- include "rlif.secretEnv" (list "RLIF_API_TOKEN" (include "rlif.tokens" .root) "api-token") | nindent 8 }}
        {{- if eq .part "reward" }}
        {{- include "rlif.secretEnv" (list "RLIF_ADMIN_TOKEN" (include "rlif.tokens" .root) "admin-token") | nindent 8 }}
        {{- if .root.Values.sandbox.enabled }}
        {{- include "rlif.secretEnv" (list "RLIF_SANDBOX_TOKEN" (include "rlif.tokens" .root) "sandbox-token") | nindent 8 }}
        {{- end }}
        {{- end }}
        {{- if .role }}
        - name: NODE_RANK
          valueFrom:
            fieldRef: {fieldPath: "metadata.labels['leaderworkerset.sigs.k8s.io/worker-index']"}
        - name: VLLM_HOST_IP
          valueFrom:
            fieldRef: {fieldPath: status.podIP}
        {{- end }}
        {{- include "rlif.bucketEnv" .root | trim | nindent 8 }}
        {{- include "rlif.env" . | nindent 8 }}
      {{- if ne .role "worker" }}
      ports:
        - {name: http, containerPort: {{ int .values.port }}}
      {{- include "rlif.probes" (dict "values" .values "port" "http") | nindent 6 }}
      {{- end }}
      resources:
        {{- include "rlif.resources" . | nindent 8 }}
      securityContext:
        {{- include "rlif.containerSecurity" . | nindent 8 }}
      volumeMounts:
        {{- include "rlif.mounts" . | nindent 8 }}
        {{- if not .root.Values.bucket.url }}
        - {name: weights, mountPath: /weights, readOnly: true}
        {{- end }}
        - {name: shm, mountPath: /dev/shm}
  volumes:
    {{- include "rlif.volumes" . | nindent 4 }}
    {{- include "rlif.shm" . | nindent 4 }}
    {{- if not .root.Values.bucket.url }}
    - name: weights
      persistentVolumeClaim: {claimName: {{ include "rlif.claim" (dict "root" .root "name" "weights") }}}
    {{- end }}
{{- end -}}

{{/* Replicas with addresses of their own, and a Service for clients that want any of them. */}}
{{- define "rlif.server" -}}
{{- $name := printf "%s-%s" (include "rlif.fullname" .root) .part -}}
{{- $grouped := eq (include "rlif.grouped" .) "true" -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ $name }}
  labels:
    {{- include "rlif.labels" . | nindent 4 }}
    rlif/metrics: http
spec:
  selector:
    {{- include "rlif.selector" . | nindent 4 }}
    {{- if $grouped }}
    leaderworkerset.sigs.k8s.io/worker-index: "0"
    {{- end }}
  ports:
    - {name: http, port: {{ int .values.port }}, targetPort: http}
{{- if $grouped }}
---
# Its controller makes the headless Service of the same name.
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
metadata:
  name: {{ $name }}-pods
  labels:
    {{- include "rlif.labels" . | nindent 4 }}
spec:
  {{- if not .values.autoscaling.enabled }}
  replicas: {{ int .values.replicas }}
  {{- end }}
  # A leader without one of its workers can do nothing, and its engine cannot be joined again.
  startupPolicy: LeaderCreated
  networkConfig: {subdomainPolicy: Shared}
  leaderWorkerTemplate:
    size: {{ int .values.nodesPerReplica }}
    restartPolicy: RecreateGroupOnPodRestart
    leaderTemplate:
      {{- include "rlif.serverPod" (merge (dict "role" "leader") .) | nindent 6 }}
    workerTemplate:
      {{- include "rlif.serverPod" (merge (dict "role" "worker") .) | nindent 6 }}
{{- else }}
---
apiVersion: v1
kind: Service
metadata:
  name: {{ $name }}-pods
  labels:
    {{- include "rlif.labels" . | nindent 4 }}
spec:
  clusterIP: None
  # The orchestrator looks at readiness itself, and finds a pod's name as soon as there is a pod.
  publishNotReadyAddresses: true
  selector:
    {{- include "rlif.selector" . | nindent 4 }}
  ports:
    - {name: http, port: {{ int .values.port }}, targetPort: http}
---
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: {{ $name }}
  labels:
    {{- include "rlif.labels" . | nindent 4 }}
spec:
  {{- if not .values.autoscaling.enabled }}
  replicas: {{ int .values.replicas }}
  {{- end }}
  serviceName: {{ $name }}-pods
  podManagementPolicy: Parallel
  selector:
    matchLabels:
      {{- include "rlif.selector" . | nindent 6 }}
  template:
    {{- include "rlif.serverPod" (merge (dict "role" "") .) | nindent 4 }}
{{- end }}
{{- end -}}
