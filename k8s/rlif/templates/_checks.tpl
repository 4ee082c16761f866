{{/* What a schema cannot see: values that contradict each other, or the recipe. Rendered with the recipe's ConfigMap. */}}
{{- define "rlif.checks" -}}
{{- $trainer := .Values.trainer -}}
{{- if and (gt (int $trainer.gpus) 0) (ne (int $trainer.gpus) (int $trainer.processesPerNode)) -}}
{{- fail (printf "trainer.processesPerNode: %d ranks on trainer.gpus: %d GPUs of a node; a rank has one GPU of its own" (int $trainer.processesPerNode) (int $trainer.gpus)) -}}
{{- end -}}
{{- range list "rollout" "reward" "sandbox" -}}
{{- $scaling := (index $.Values .).autoscaling -}}
{{- if and $scaling.enabled (gt (int $scaling.minReplicas) (int $scaling.maxReplicas)) -}}
{{- fail (printf "%s.autoscaling.minReplicas: %d is more than maxReplicas, %d" . (int $scaling.minReplicas) (int $scaling.maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- $claim := .Values.storage.run -}}
{{- if and (gt (int $trainer.nodes) 1) (not $claim.existingClaim) (not (has "ReadWriteMany" $claim.accessModes)) -}}
{{- fail (printf "storage.run.accessModes: %s with trainer.nodes: %d; several nodes write one checkpoint, so it must hold ReadWriteMany" (toJson $claim.accessModes) (int $trainer.nodes)) -}}
{{- end -}}
{{- $engine := include "rlif.setting" (dict "root" . "section" "rollout" "key" "engine") | default "transformers" -}}
{{- if and (eq $engine "vllm") (eq (int .Values.rollout.gpus) 0) (not .Values.rollout.image.repository) -}}
{{- fail "rollout.gpus: 0, but the recipe's rollout.engine is vllm, which the image without GPUs does not have: give it GPUs, use transformers, or name an image of your own (rollout.image)" -}}
{{- end -}}
{{- if and (eq $engine "transformers") (gt (int .Values.rollout.nodesPerReplica) 1) -}}
{{- fail (printf "rollout.nodesPerReplica: %d, but the recipe's rollout.engine is transformers, which runs on one device; use vllm" (int .Values.rollout.nodesPerReplica)) -}}
{{- end -}}
{{- $weights := dict "root" . "section" "weights" -}}
{{- if and (gt (int .Values.rollout.nodesPerReplica) 1) (eq (include "rlif.setting" (merge (dict "key" "transport") $weights)) "delta") (not (include "rlif.setting" (merge (dict "key" "mirror_dir") $weights))) -}}
{{- fail (printf "rollout.nodesPerReplica: %d with the recipe's weights.transport: delta: the nodes of an engine need one weights.mirror_dir that all of them may write; mount a ReadWriteMany claim of your own (rollout.extraVolumes) and name it, or use disk" (int .Values.rollout.nodesPerReplica)) -}}
{{- end -}}
{{- $model := include "rlif.setting" (dict "root" . "section" "model" "key" "path") -}}
{{- if and (not .Values.hub.enabled) $model (not (hasPrefix "/" $model)) -}}
{{- fail (printf "hub.enabled: false, but the recipe's model.path is %q, a name of the hub: put the model into storage.models and name its folder, e.g. /models/NAME" $model) -}}
{{- end -}}
{{- end -}}

{{/* What a key of the recipe is set to, by an override or in the recipe; empty where it is not. (dict "root" $ "section" "rollout" "key" "engine") */}}
{{- define "rlif.setting" -}}
{{- $section := index (include "rlif.recipe" .root | fromYaml) .section | default dict -}}
{{- $value := index $section .key -}}
{{- $prefix := printf "%s.%s=" .section .key -}}
{{- range .root.Values.overrides -}}
{{- if hasPrefix $prefix . -}}
{{- $value = trimPrefix $prefix . -}}
{{- end -}}
{{- end -}}
{{- if not (kindIs "invalid" $value) -}}
{{- $value -}}
{{- end -}}
{{- end -}}
