"""vLLM's causal language models as pooling models: each asked row's output are the statistics of its distribution.

One mix-in for all of them: it takes the model's own LM head apart once (see `head`), and its pooler sends the final
hidden states of the rows that were asked for through that head in tiles. `Qwen2ForCausalLMScorer` and the like are made
of vLLM's own class of that name when they are first asked for.
"""

from collections.abc import Callable, Iterable, Set
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.pooler import PoolingParamsUpdate
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.interfaces_base import VllmModelForPooling
from vllm.tasks import PoolingTask
from vllm.v1.pool.metadata import PoolingMetadata

from reward_server.scorer.head import PROBE_TOKENS, Head, compare_logits
from reward_server.scorer.metrics import Wanted
from reward_server.scorer.shards import Shards
from reward_server.scorer.statistics import Statistics, tiled_statistics
from reward_server.scorer.vllm_plugin import ARCHITECTURES, scorer_of
from reward_server.scorer.vllm_rows import Asked, Pass

if TYPE_CHECKING:
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM as CausalModel
    from vllm.v1.worker.worker_base import WorkerBase as Worker
else:  # what the classes below are mixed into
    CausalModel = Worker = object

TASK: PoolingTask = "token_classify"


def __getattr__(name: str) -> type:
    """The scoring variant of an architecture of vLLM's."""
    for architecture in ARCHITECTURES:
        if name == scorer_of(architecture):
            base = ModelRegistry.models[architecture].load_model_cls()
            made = type(name, (ScoringMixin, base, VllmModelForPooling), {"__module__": __name__})
            globals()[name] = made
            return made
    raise AttributeError(name)


class ScoringMixin(CausalModel):
    """Before a causal language model's class in the order of bases."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.pooler = StatisticsPooler(self._head, self._shards)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        self.pooler.head = None  # the mean of its rows changes with the weights
        return super().load_weights(weights)

    def _head_layer(self) -> Any:
        layer = getattr(self, "lm_head", None)
        return self.model.embed_tokens if layer is None else layer

    def _head(self) -> Head:
        """This rank's shard of the LM head, without the rows that pad the vocabulary."""
        layer, processor = self._head_layer(), self.logits_processor
        if not isinstance(layer.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod):
            raise ValueError("model: its LM head is quantised, so its logits cannot be reproduced exactly")
        if processor.soft_cap is not None and processor.scale != 1.0:
            raise ValueError("model: it caps its logits before it scales them, which the scorer does not know")
        rows, bias = layer.shard_indices.num_org_elements, getattr(layer, "bias", None)
        if not rows:
            raise ValueError(f"model: a vocabulary of {layer.org_vocab_size} cannot be cut for {layer.tp_size} devices")
        return Head.of(
            layer.weight.detach()[:rows],
            None if bias is None else bias.detach()[:rows],
            processor.scale,
            processor.soft_cap,
        )

    def _shards(self) -> Shards | None:
        layer, ranks = self._head_layer(), get_tp_group()
        if ranks.world_size == 1:
            return None

        def gather(table: torch.Tensor) -> torch.Tensor:
            parts = table.new_empty(ranks.world_size * len(table), table.shape[1])
            torch.distributed.all_gather_into_tensor(parts, table.contiguous(), group=ranks.device_group)
            return parts.view(ranks.world_size, *table.shape)

        return Shards(layer.shard_indices.org_vocab_start_index, layer.org_vocab_size, gather)

    @torch.inference_mode()
    def check_head(self) -> None:
        """Raises ValueError when the model does something to its logits that our head does not."""
        head = self._head()
        hidden = torch.randn(PROBE_TOKENS, head.weight.shape[1], generator=torch.Generator().manual_seed(0))
        hidden = hidden.to(head.weight)
        logits = self.compute_logits(hidden)
        assert logits is not None  # every rank has all of them
        first = self._head_layer().shard_indices.org_vocab_start_index
        compare_logits(type(self).__name__, hidden, logits[:, first:], head)


class WorkerExtension(Worker):
    """What the server may call in every worker (vLLM's `worker_extension_cls`)."""

    def check_scorer_head(self) -> None:
        model: Any = self.get_model()
        model.check_head()


class StatisticsPooler(Pooler):
    """Rows of a request come back over several steps when its prefill is cut into chunks: they are kept, as numbers
    rather than hidden states, until the last one is there."""

    def __init__(self, make_head: Callable[[], Head], make_shards: Callable[[], Shards | None]):
        super().__init__()
        self._make_head, self._make_shards = make_head, make_shards
        self.head: Head | None = None
        self.shards: Shards | None = None

    def get_supported_tasks(self) -> Set[PoolingTask]:
        return {TASK}

    def get_pooling_updates(self, task: PoolingTask) -> PoolingParamsUpdate:
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata) -> list[torch.Tensor | None]:
        """hidden_states [tokens of this step, H]; per request a float64 [rows, columns], or none while it is cut."""
        if self.head is None:
            self.head, self.shards = self._make_head(), self._make_shards()
        cursor = pooling_metadata.get_pooling_cursor()
        counts, ends = cursor.num_scheduled_tokens_cpu.tolist(), cursor.seq_lens_cpu.tolist()
        tokens = pooling_metadata.get_prompt_token_ids_cpu()
        asked = [
            Asked.from_wire(params.extra_kwargs, len(ids))
            for params, ids in zip(pooling_metadata.pooling_params, tokens, strict=True)
        ]
        rows = _Rows()
        spans = []
        offset = 0
        for request, ids, count, end in zip(asked, tokens, counts, ends, strict=True):
            here = offset - (end - count)  # where a row of the sequence lies among those of this step
            spans.append([rows.add(part, part.within(end - count, end), here, ids) for part in request.passes])
            offset += count
        statistics = rows.statistics(hidden_states, self.head, self.shards, asked)
        finished = cursor.get_finished_mask()
        outputs: list[torch.Tensor | None] = []
        for number, request in enumerate(asked):
            kept = pooling_metadata.pooling_states[number].hidden_states_cache
            for place, (part, (first, span)) in enumerate(zip(request.passes, spans[number], strict=True)):
                table = request.table(statistics.rows(span))
                if place == len(kept):
                    kept.append(table)
                else:  # a request that was preempted begins again: what it has already is computed anew
                    kept[place] = torch.cat([kept[place][: first - part.first], table])
            outputs.append(torch.cat(kept) if finished[number] else None)
        return outputs


class _Rows:
    """The rows of one step that go through the head, of all requests together."""

    def __init__(self) -> None:
        self.places: list[int] = []
        self.chosen: list[int] = []
        self.temperatures: list[float] = []

    def add(self, part: Pass, rows: range, offset: int, ids: torch.Tensor) -> tuple[int, slice]:
        """Row t lies at `offset + t` of the step. Returns the first row, and where their statistics will be."""
        before = len(self.places)
        self.places += range(offset + rows.start, offset + rows.stop)
        chosen = ids[rows.start + 1 : rows.stop + 1].tolist()
        self.chosen += chosen + [0] * (len(rows) - len(chosen))  # nothing comes after the last row of a sequence
        self.temperatures += [part.temperature] * len(rows)
        return rows.start, slice(before, len(self.places))

    def statistics(
        self, hidden_states: torch.Tensor, head: Head, shards: Shards | None, asked: list[Asked]
    ) -> Statistics:
        def on_device(values: list, dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype).to(hidden_states.device, non_blocking=True)

        return tiled_statistics(
            hidden_states[on_device(self.places, torch.int64)],
            head,
            on_device(self.chosen, torch.int64),
            on_device(self.temperatures, torch.float64),
            Wanted.of(request.columns for request in asked),
            shards=shards,
        )
