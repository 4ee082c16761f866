"""The embedded engine: transformers on CPU or GPU, one batch at a time in a thread of its own.

One call of `generate` is one batch (cut into runs of `max_batch_sequences` rows when it is larger), so its outcome does
not depend on what else is being asked for.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from fastapi import FastAPI
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rollout_server.calls import BEGUN_AGAIN
from rollout_server.engines.base import Aborted, EngineSettings, Prompt
from rollout_server.engines.cache import fits
from rollout_server.engines.generation import Drawn, Emit, Row, generate, rows_of
from rollout_server.engines.stopping import StopStrings, cut
from services.contract import Completion, Version, VersionSpan
from services.model_folder import attention_for
from services.startup import StartupError
from services.weights.seconds import SECONDS
from services.weights.shapes import check_shapes, tensor_shapes

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TransformersEngine:
    name = "transformers"

    def __init__(self, settings: EngineSettings):
        """Reads configuration and tokenizer; `start` loads the weights. Raises StartupError."""
        self.settings = settings
        if settings.tensor_parallel_size > 1:
            raise StartupError("--tensor-parallel-size: the transformers engine runs on one device; use --engine vllm")
        trust = settings.trust_remote_code
        try:
            config = AutoConfig.from_pretrained(settings.model, trust_remote_code=trust)
            self.tokenizer = AutoTokenizer.from_pretrained(settings.model, trust_remote_code=trust)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise StartupError(f"--model {settings.served_name}: cannot be loaded: {reason}") from error
        if len(self.tokenizer) < 2:  # what transformers makes up for a folder that has no tokenizer
            raise StartupError(f"--model {settings.served_name}: has no tokenizer files")
        if not fits(config):
            raise StartupError(f"--model {settings.served_name}: has layers other than attention; use --engine vllm")
        self.config = config
        self.vocab_size = config.get_text_config().vocab_size
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        if settings.max_model_len and longest and settings.max_model_len > longest:
            raise StartupError(f"--max-model-len {settings.max_model_len}: the model takes at most {longest}")
        self.max_model_len = settings.max_model_len or longest or 4096
        if settings.dtype not in DTYPES:
            raise StartupError(f"--dtype {settings.dtype}: choose one of {', '.join(DTYPES)}")
        self.device = torch.device(_device(settings.device))
        self.version = Version()
        self.fault = "the model is not loaded yet"
        self._stopping = threading.Event()
        self._pending: tuple[Version, Path, float, Future] | None = None
        self._pending_lock = threading.Lock()
        # PyTorch's CPU thread count belongs to the calling thread, so it is set in the one that computes.
        self._worker = ThreadPoolExecutor(1, "generate", initializer=_use_threads, initargs=(settings.threads,))

    async def start(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._worker, self._start)

    def _start(self) -> None:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                self.settings.model,
                dtype=DTYPES[self.settings.dtype],
                attn_implementation=attention_for(self.config),
                trust_remote_code=self.settings.trust_remote_code,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise StartupError(f"--model {self.settings.served_name}: cannot be loaded: {reason}") from error
        self.model = cast(Any, model).to(self.device).eval()
        self.vocab_size = self.model.get_output_embeddings().weight.shape[0]
        stop_ids = self.model.generation_config.eos_token_id
        stop_ids = stop_ids if isinstance(stop_ids, list) else [stop_ids]
        self.eos_token_ids = sorted({*stop_ids, self.tokenizer.eos_token_id} - {None})
        self.fault = ""
        count = sum(parameter.numel() for parameter in self.model.parameters())
        log.info("loaded %s: %d parameters, %s on %s", self.settings.model, count, self.settings.dtype, self.device)

    def state(self) -> str:
        return self.fault or "ok"

    def death(self) -> str:
        return ""

    # ---- generation ------------------------------------------------------------------------------------------------

    async def generate(
        self, prompts: list[Prompt], emit: Emit | None = None, top_logprobs: int = 0
    ) -> list[list[Completion]]:
        """`emit` is called in the worker thread after every token, with `top_logprobs` alternatives each."""
        cancelled = threading.Event()
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._worker, self._generate, prompts, cancelled, emit, top_logprobs)
        finally:
            cancelled.set()

    def _generate(
        self, prompts: list[Prompt], cancelled: threading.Event, emit: Emit | None, top_logprobs: int
    ) -> list[list[Completion]]:
        self._load_pending()

        def aborted() -> bool:
            return cancelled.is_set() or self._stopping.is_set()

        if aborted() or self.fault:
            raise Aborted(self.fault or "aborted before the first token")
        rows = rows_of(prompts, self.max_model_len)
        size = self.settings.max_batch_sequences
        # What a client was sent already cannot be begun again; what was begun again must come to its end.
        may_restart = self.settings.in_flight == "abort" and emit is None
        completions: list[Completion] = []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            drawn, spans = self._draw(part, aborted, emit, top_logprobs, may_restart)
            completions += self._completions(part, drawn, spans)
        done = iter(completions)
        return [[next(done) for _ in range(prompt.n)] for prompt in prompts]

    def _draw(
        self, rows: list[Row], aborted: Callable[[], bool], emit: Emit | None, top_logprobs: int, may_restart: bool
    ) -> tuple[list[Drawn], list[VersionSpan]]:
        """One batch, and which versions made it from which token on."""
        spans = [VersionSpan(start=0, weight_version=self.version)]
        stops = StopStrings(self.tokenizer, {row.number: row.sampling.stop for row in rows if row.sampling.stop})

        def interrupted() -> bool:
            return aborted() or (may_restart and self._pending is not None)

        def swapped(step: int) -> bool:
            if self.settings.in_flight != "keep" or self._pending is None:
                return False
            self._load_pending()
            if self.fault:
                raise Aborted(self.fault)
            if self.version == spans[-1].weight_version:  # they were refused
                return False
            spans.append(VersionSpan(start=step, weight_version=self.version))
            return True

        try:
            drawn = generate(self.model, rows, self.eos_token_ids, stops, interrupted, emit, top_logprobs, swapped)
            return drawn, spans
        except Aborted:
            if aborted() or self.fault or not may_restart:
                raise
        self._load_pending()
        if self.fault:
            raise Aborted(self.fault)
        BEGUN_AGAIN.labels(self.name).inc(len(rows))
        return self._draw(rows, aborted, emit, top_logprobs, may_restart=False)

    def _completions(self, rows: list[Row], drawn: list[Drawn], spans: list[VersionSpan]) -> list[Completion]:
        texts = self.tokenizer.batch_decode([one.token_ids for one in drawn], skip_special_tokens=True)
        completions = []
        for row, one, text in zip(rows, drawn, texts, strict=True):
            made_by = [span for span in spans if span.start < len(one.token_ids)]
            completions.append(
                Completion(
                    text=cut(text, row.sampling.stop),
                    token_ids=one.token_ids,
                    logprobs=one.logprobs,
                    finish_reason="stop" if one.stopped else "length",
                    weight_version=spans[0].weight_version,
                    version_spans=made_by if len(made_by) > 1 else [],
                )
            )
        return completions

    # ---- weights ---------------------------------------------------------------------------------------------------

    async def load(self, version: Version, directory: Path) -> None:
        """The worker thread swaps weights before any batch that waits, or amid one (`in_flight`)."""
        outcome: Future = Future()
        with self._pending_lock:
            self._pending = (version, directory, time.monotonic(), outcome)
        self._worker.submit(self._load_pending)
        await asyncio.wrap_future(outcome)

    def _load_pending(self) -> None:
        with self._pending_lock:
            pending, self._pending = self._pending, None
        if pending is None:
            return
        version, directory, asked, outcome = pending
        began = time.monotonic()
        try:
            self._load(version, directory)
        except BaseException as error:
            outcome.set_exception(error)
        else:
            SECONDS.labels("rollout", "pause").observe(began - asked)
            SECONDS.labels("rollout", "swap").observe(time.monotonic() - began)
            outcome.set_result(None)

    def _load(self, version: Version, directory: Path) -> None:
        from safetensors import safe_open

        state = self.model.state_dict()
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        buffers = {name for name, _ in self.model.named_buffers()}
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        check_shapes(tensor_shapes(directory), shapes, optional={*tied, *buffers})
        # Until the last tensor is in, the model is a mixture of two versions and must not be served.
        self.fault = f"the weights of version {version} were not loaded completely"
        with torch.no_grad():
            for file in sorted(directory.glob("*.safetensors")):
                with safe_open(file, "pt") as tensors:
                    for name in tensors.keys():
                        # A tied tensor shares its storage with the one it is tied to, which the folder holds too.
                        if name not in tied:
                            state[name].copy_(tensors.get_tensor(name))
        self.version, self.fault = version, ""

    async def stop(self) -> None:
        self._stopping.set()
        await asyncio.to_thread(self._worker.shutdown, wait=True, cancel_futures=True)

    async def attach(self, app: FastAPI) -> None:
        from rollout_server.openai import attach

        attach(app, self)


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _device(wanted: str) -> str:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise StartupError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
