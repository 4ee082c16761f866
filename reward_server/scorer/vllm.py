"""The scorer model on vLLM: a pooling model on GPU or CPU, whose prefix cache holds a group's prompt once.

vLLM batches by itself. What this front adds: all items of a call are scored under one weight version (a change of
weights waits for the calls inside and holds back those that come), and no row is ever missing from an answer.
"""

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from reward_server.scorer.base import FAILURES, TOKENS, Follow, Scored, ScoringFailed, Service
from reward_server.scorer.gate import Gate
from reward_server.scorer.items import ItemScores, Span, TokenItem, check_item, collect, eos_ids
from reward_server.scorer.vllm_plugin import ARCHITECTURES, PLUGIN, SWITCH, register, scorer_of
from reward_server.scorer.vllm_rows import Asked, Pass
from services import vllm_process
from services.contract import Version, WeightVersion
from services.startup import StartupError
from services.weights.meeting import Meet
from services.weights.shapes import Tensors
from services.weights.vllm_server import CONFIG, Broadcasts

vllm_process.prepare(SWITCH, PLUGIN)  # before vLLM is imported, which reads the environment then

from vllm import PoolingParams  # noqa: E402
from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: E402
from vllm.inputs.engine import tokens_input  # noqa: E402
from vllm.v1.engine.exceptions import EngineDeadError  # noqa: E402

log = logging.getLogger(__name__)

CPU_BLOCK = 32
"""Tokens of a block of the prefix cache on CPU: a shared prompt is cut down to a multiple of it (vLLM's own is 128)."""


@dataclass(frozen=True)
class VllmSettings:
    """`model` is a local folder. `max_batch_tokens`: of one step; longer sequences are cut into chunks of that.

    `threads`: CPU threads (none: what vLLM takes). `share_prefixes`: whether equal prompts are computed once.
    `broadcasts`: whether weights may come that way.
    """

    model: Path
    served_name: str
    dtype: str = "bfloat16"
    device: str = "auto"
    threads: int | None = None
    max_model_len: int | None = None
    max_batch_tokens: int = 16384
    max_batch_sequences: int = 256
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.85
    trust_remote_code: bool = False
    share_prefixes: bool = True
    broadcasts: bool = False


class VllmModel:
    """What is known of the model before the engine has loaded it."""

    def __init__(self, settings: VllmSettings):
        """Raises StartupError: a device, an architecture or a setting that vLLM or the scorer cannot work with."""
        register()  # vLLM looks for plug-ins once a process: maybe before this one was switched on
        is_cpu = vllm_process.on_cpu(settings.device, settings.threads)
        self.args = _arguments(settings, is_cpu)
        config = vllm_process.model_config(self.args, settings.served_name)
        self.device = "cpu" if is_cpu else "cuda"
        self.vocab_size: int = config.get_vocab_size()
        self.max_length: int | None = config.max_model_len
        self.tensors = Tensors.of(settings.model, config.hf_text_config)
        self.tokenizer = AutoTokenizer.from_pretrained(settings.model, trust_remote_code=settings.trust_remote_code)
        if len(self.tokenizer) < 2:  # what transformers makes up for a folder that has no tokenizer
            raise StartupError(f"--model {settings.served_name}: has no tokenizer files")
        self.eos_ids = eos_ids(_generation_config(settings.model), config.hf_text_config, self.tokenizer)

    def check(self, item: TokenItem) -> None:
        """Raises ValueError naming the field, the value and what would be valid."""
        check_item(item, self.vocab_size, self.max_length)


class VllmService(Service):
    backend = "vllm"

    def __init__(self, settings: VllmSettings, follow: Follow = "online"):
        """`start` loads the model. Raises StartupError."""
        if follow == "ema":
            raise StartupError("follow: vLLM serves no moving average of the weights; use --engine transformers")
        self.model = VllmModel(settings)
        super().__init__(self.model, follow)
        self.share_prefixes = settings.share_prefixes
        self.fault = "not started"
        self.broadcasts = Broadcasts(settings.tensor_parallel_size)
        self._gate = Gate()

    async def start(self) -> None:
        self.llm = await vllm_process.start(self.model.args)
        try:
            await self.llm.collective_rpc("check_scorer_head")
        except Exception as error:  # however it fails, there is nothing to score with
            await self.stop()
            raise StartupError(f"--engine vllm: {error}") from error
        self.fault = ""

    async def stop(self) -> None:
        self.fault = self.fault or "stopped"
        await asyncio.to_thread(self.llm.shutdown)
        del self.llm  # at the end of the process its finaliser could not work any more

    def state(self) -> str:
        return self.fault or vllm_process.death(self.llm) or "ok"

    def death(self) -> str:
        return self.broadcasts.lost or (vllm_process.death(self.llm) if hasattr(self, "llm") else "")

    # ---- scoring -----------------------------------------------------------------------------------------------

    async def _answer(self, items: Sequence[TokenItem], tokens: int) -> Scored:
        async with self._gate.passing():
            if self.fault:
                raise ScoringFailed(f"the scorer is not running: {self.fault}")
            version = self.version
            tasks = [asyncio.ensure_future(self._score(item, version)) for item in items]
            try:
                results = await asyncio.gather(*tasks)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                FAILURES.labels("model").inc()
                reason = self.state() if isinstance(error, EngineDeadError) else f"{type(error).__name__}: {error}"
                raise ScoringFailed(f"the model failed: {reason}") from error
            finally:
                for task in tasks:
                    task.cancel()
        TOKENS.inc(tokens)
        return Scored(results, version)

    async def _score(self, item: TokenItem, version: Version) -> ItemScores:
        end = item.scored_length(self.model.eos_ids)
        if not end:
            return ItemScores(0)
        asked, span = rows_of(item, end, self.model.vocab_size)
        ids = [*item.prompt_ids, *item.completion_ids[:end]]
        table = await self._rows(ids, asked, version, self.share_prefixes)
        if len(table) != asked.rows:
            # A request that vLLM put back and took up again finds its own blocks in the cache; without it, none.
            table = await self._rows(ids, asked, version, use_cache=False)
        if len(table) != asked.rows:
            raise ScoringFailed(f"vLLM returned {len(table)} rows of {asked.rows}")
        return collect(item, asked.statistics(table, self.model.vocab_size), span)

    async def _rows(self, ids: list[int], asked: Asked, version: Version, use_cache: bool) -> Any:
        prompt, params = tokens_input(ids, cache_salt=str(version)), pooling_params(asked, use_cache)
        final = None
        async for output in self.llm.encode(prompt, params, uuid.uuid4().hex):
            final = output
        if final is None:
            raise ScoringFailed("vLLM returned nothing")
        return final.outputs.data

    # ---- weights -----------------------------------------------------------------------------------------------

    async def load(self, version: Version, directory: Path) -> None:
        if self.follow == "frozen":
            raise ValueError("follow: a frozen scorer takes no new weights")
        await asyncio.to_thread(self.model.tensors.check, directory)
        async with self._gate.closed():
            await self._swap(version, vllm_process.replace_weights(self.llm, version, directory))
        await self._announce()

    async def receive(self, weights: WeightVersion, meet: Meet) -> WeightVersion:
        """Take part in a broadcast of these weights, or of newer ones; returns which. Raises NotCalled, WeightsMismatch
        and ValueError before anything changed."""
        self.model.tensors.check_manifest(weights.manifest)
        async with self._gate.closed():
            ticket = await meet(self.broadcasts.session, self.broadcasts.workers)
            await self.broadcasts.open(self.llm, ticket)
            await self._swap(ticket.weights.id, self.broadcasts.take(self.llm, ticket))
        await self._announce()
        return ticket.weights

    async def _swap(self, version: Version, swapping: Awaitable[None]) -> None:
        # Until the last tensor is in, the model is a mixture of two versions and scores nothing.
        self.fault = f"the weights of version {version} were not loaded completely"
        await swapping
        self.version, self.fault = version, ""


def pooling_params(asked: Asked, use_cache: bool = True) -> PoolingParams:
    return PoolingParams(task="token_classify", skip_reading_prefix_cache=not use_cache, extra_kwargs=asked.to_wire())


def rows_of(item: TokenItem, end: int, vocab_size: int) -> tuple[Asked, Span]:
    """The rows that predict an item's first `end` completion tokens, those of the tokens, or both; and where they lie
    in the answer."""
    start, passes = len(item.prompt_ids), []
    shifted = unshifted = None
    if item.unshifted != set(item.metrics):
        passes.append(Pass(start - 1, start - 1 + end, item.temperature))
        shifted = slice(0, end)
    if item.unshifted:
        unshifted = slice(end * len(passes), end * len(passes) + end)
        passes.append(Pass(start, start + end, 1.0))
    fields = {"lse": 1, "mean_logit": 1, **item.fields}
    columns = {name: min(count, vocab_size) for name, count in fields.items()}
    return Asked(tuple(passes), columns), Span(shifted, unshifted)


def _generation_config(folder: Path) -> GenerationConfig | None:
    return GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").exists() else None


def _arguments(settings: VllmSettings, is_cpu: bool) -> AsyncEngineArgs:
    """Raises StartupError: an architecture that the scorer does not know."""
    try:
        config = AutoConfig.from_pretrained(settings.model, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise StartupError(f"--model {settings.served_name}: {reason}") from error
    architecture = (config.architectures or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise StartupError(
            f"--model {settings.served_name}: its architecture is {architecture}; --engine vllm scores "
            f"{', '.join(ARCHITECTURES)}; use --engine transformers"
        )
    options: dict[str, Any] = {
        "model": str(settings.model),
        "runner": "pooling",
        "hf_overrides": {"architectures": [scorer_of(architecture)]},
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_batched_tokens": settings.max_batch_tokens,
        "max_num_seqs": min(settings.max_batch_sequences, settings.max_batch_tokens),
        "tensor_parallel_size": settings.tensor_parallel_size,
        "trust_remote_code": settings.trust_remote_code,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": True,
        "scheduler_cls": "reward_server.scorer.vllm_scheduler.ScorerScheduler",
        "worker_extension_cls": "reward_server.scorer.vllm_model.WorkerExtension",
        "seed": 0,
        "use_tqdm_on_load": False,
        "disable_log_stats": True,
    }
    if settings.broadcasts:
        options["weight_transfer_config"] = CONFIG
    cpu_only = {"enforce_eager": True, "block_size": CPU_BLOCK}
    gpu_only = {"gpu_memory_utilization": settings.gpu_memory_utilization}
    return AsyncEngineArgs(**options, **(cpu_only if is_cpu else gpu_only))
