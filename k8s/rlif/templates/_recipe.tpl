{{/* The recipe as a mapping: a whole file (--set-file recipeFile=...), or the values under `recipe`. */}}
{{- define "rlif.recipe" -}}
{{- if .Values.recipeFile -}}
{{- if .Values.recipe -}}
{{- fail "recipe, recipeFile: give one of the two" -}}
{{- end -}}
{{- $tree := fromYaml .Values.recipeFile -}}
{{- if hasKey $tree "Error" -}}
{{- fail (printf "recipeFile: is not YAML: %s" $tree.Error) -}}
{{- end -}}
{{- if hasKey ($tree.queue | default dict) "url" -}}
{{- fail "recipeFile: queue.url may hold a password, and a recipe lies in a ConfigMap: leave it out; redis.existingSecret names redis" -}}
{{- end -}}
{{- .Values.recipeFile -}}
{{- else -}}
{{- toYaml .Values.recipe -}}
{{- end -}}
{{- end -}}

{{- define "rlif.run" -}}
{{- $run := (include "rlif.recipe" . | fromYaml).run | default dict -}}
{{- required "recipe.run.name: is required, e.g. --set recipe.run.name=gsm8k (or a whole recipe: --set-file recipeFile=recipes/gsm8k.yaml)" $run.name -}}
{{- end -}}

{{/* How many addresses the orchestrator is given: replicas that are not there are set aside until they come. */}}
{{- define "rlif.addresses" -}}
{{- $values := index .root.Values .part -}}
{{- $most := $values.autoscaling.enabled | ternary $values.autoscaling.maxReplicas $values.replicas | int -}}
{{- $name := printf "%s-%s" (include "rlif.fullname" .root) .part -}}
{{- $pod := eq (include "rlif.grouped" .) "true" | ternary (printf "%s-pods" $name) $name -}}
{{- $urls := list -}}
{{- range until $most -}}
{{- $urls = append $urls (printf "http://%s-%d.%s-pods:%d" $pod . $name (int $values.port)) -}}
{{- end -}}
{{- toJson $urls -}}
{{- end -}}

{{/* Whether a replica is several pods (LeaderWorkerSet). */}}
{{- define "rlif.grouped" -}}
{{- and (eq .part "rollout") (gt (int .root.Values.rollout.nodesPerReplica) 1) -}}
{{- end -}}

{{- define "rlif.ranks" -}}
{{- mul (int .Values.trainer.nodes) (int .Values.trainer.processesPerNode) -}}
{{- end -}}

{{/* What the chart knows better than the recipe, as arguments that win over it. The same for every part. */}}
{{- define "rlif.overrides" -}}
{{- $run := include "rlif.run" . -}}
{{- $sandbox := printf "http://%s-sandbox:%d" (include "rlif.fullname" .) (int .Values.sandbox.port) -}}
{{- $all := list
  (printf "run.dir=/runs/%s" $run)
  (printf "weights.dir=/weights/%s" $run)
  (printf "rollout.urls=%s" (include "rlif.addresses" (dict "root" . "part" "rollout")))
  (printf "scorer.urls=%s" (include "rlif.addresses" (dict "root" . "part" "reward")))
  (printf "trainer.ranks=%s" (include "rlif.ranks" .))
  (printf "tracking.metrics_port=%d" (int .Values.metricsPort))
-}}
{{- $shards := mul (int .Values.rollout.gpus) (int .Values.rollout.nodesPerReplica) | int -}}
{{- if gt $shards 1 -}}
{{- $all = append $all (printf "rollout.tensor_parallel_size=%d" $shards) -}}
{{- end -}}
{{- if gt (int .Values.reward.gpus) 1 -}}
{{- $all = append $all (printf "scorer.tensor_parallel_size=%d" (int .Values.reward.gpus)) -}}
{{- end -}}
{{- $set := dict "root" . "section" "weights" -}}
{{- if and (eq (include "rlif.setting" (merge (dict "key" "transport") $set)) "delta") (not (include "rlif.setting" (merge (dict "key" "mirror_dir") $set))) -}}
{{- /* A copy of the weights: /tmp is smaller than a model. */ -}}
{{- $all = append $all "weights.mirror_dir=/cache/mirror" -}}
{{- end -}}
{{- if .Values.sandbox.enabled -}}
{{- $all = append $all (printf "scorer.sandbox=%s" $sandbox) -}}
{{- end -}}
{{- $given := list -}}
{{- range .Values.overrides -}}
{{- /* Kubernetes would put the values of variables, secrets too, in the place of $(NAME). */ -}}
{{- $given = append $given (replace "$" "$$" .) -}}
{{- end -}}
{{- toYaml (concat $all $given) -}}
{{- end -}}
