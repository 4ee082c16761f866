"""The vLLM engine: `AsyncLLM` on GPU or CPU, with weights reloaded in place between completions."""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from rollout_server.calls import BEGUN_AGAIN
from rollout_server.engines.base import Aborted, EngineSettings, Prompt
from rollout_server.engines.vllm_plugin import PLUGIN, SWITCH
from services import vllm_process
from services.contract import Completion, Version, VersionSpan, WeightVersion
from services.weights.meeting import Meet
from services.weights.seconds import SECONDS
from services.weights.shapes import Tensors
from services.weights.vllm_server import CONFIG, Broadcasts

vllm_process.prepare(SWITCH, PLUGIN)  # before vLLM is imported, which reads the environment then

from vllm import SamplingParams  # noqa: E402
from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: E402
from vllm.inputs.engine import tokens_input  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402
from vllm.v1.engine.exceptions import EngineDeadError  # noqa: E402

log = logging.getLogger(__name__)

OPENAI_ROUTES = {"/v1/completions": "POST", "/v1/chat/completions": "POST", "/v1/models": "GET"}


class VllmEngine:
    name = "vllm"

    def __init__(self, settings: EngineSettings):
        """Checks the configuration; `start` loads the model. Raises StartupError."""
        self.settings = settings
        is_cpu = vllm_process.on_cpu(settings.device, settings.threads)
        self.args = arguments(settings, is_cpu)
        config = vllm_process.model_config(AsyncEngineArgs.from_cli_args(self.args), settings.served_name)
        self.vocab_size, self.max_model_len = config.get_vocab_size(), config.max_model_len
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(settings.model, trust_remote_code=settings.trust_remote_code)
        self.tensors = Tensors.of(settings.model, config.hf_text_config)
        self.version = Version()
        self.fault = "the model is not loaded yet"
        self.broadcasts = Broadcasts(settings.tensor_parallel_size)
        self._loading = asyncio.Lock()
        self._begun_again = 0
        """Calls that were aborted for new weights once, and run to their end."""

    async def start(self) -> None:
        self.llm = await vllm_process.start(AsyncEngineArgs.from_cli_args(self.args))
        self.fault = ""

    def state(self) -> str:
        return self.fault or vllm_process.death(self.llm) or "ok"

    def death(self) -> str:
        return self.broadcasts.lost or (vllm_process.death(self.llm) if hasattr(self, "llm") else "")

    # ---- generation ------------------------------------------------------------------------------------------------

    async def generate(self, prompts: list[Prompt]) -> list[list[Completion]]:
        if self.state() != "ok":
            raise Aborted(self.state())
        tasks = [asyncio.ensure_future(self._generate(prompt)) for prompt in prompts]
        try:
            return await asyncio.gather(*tasks)
        except EngineDeadError as error:
            raise Aborted(f"vLLM's engine died: {error}") from error
        finally:
            for task in tasks:
                task.cancel()

    async def _generate(self, prompt: Prompt) -> list[Completion]:
        sampling = prompt.sampling
        is_greedy = sampling.temperature == 0
        params = SamplingParams(
            # vLLM refuses to make the same greedy completion n times.
            n=1 if is_greedy else prompt.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=min(sampling.max_tokens, self.max_model_len - len(prompt.token_ids)),
            # vLLM adds 0 .. n-1 to the seed, and keeps it in 64 signed bits.
            seed=None if sampling.seed is None else sampling.seed % 2**62,
            stop=sampling.stop,
            logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        completions = await self._draw(prompt, params, prompt.request_id)
        if any(one.finish_reason == "abort" for one in completions) and self.settings.in_flight == "abort":
            BEGUN_AGAIN.labels(self.name).inc(len(completions))
            self._begun_again += 1
            try:
                completions = await self._draw(prompt, params, f"{prompt.request_id}-again")
            finally:
                self._begun_again -= 1
        return completions * prompt.n if is_greedy else completions

    async def _draw(self, prompt: Prompt, params: SamplingParams, request_id: str) -> list[Completion]:
        final = None
        async for output in self.llm.generate(tokens_input(prompt.token_ids), params, request_id):
            final = output
        if final is None:
            raise Aborted(f"vLLM returned nothing for {request_id}")
        return [_completion(output) for output in final.outputs]

    # ---- weights ---------------------------------------------------------------------------------------------------

    async def load(self, version: Version, directory: Path) -> None:
        """The scheduler holds back what waits, deals with what runs, and forgets its caches: what is kept in flight has
        its keys and values computed anew, so every token is wholly of the version that its span names."""
        await asyncio.to_thread(self.tensors.check, directory)
        async with self._loading:
            await self._pause()
            await self._swap(version, vllm_process.replace_weights(self.llm, version, directory))

    async def receive(self, weights: WeightVersion, meet: Meet) -> WeightVersion:
        """As `load`; between pausing and swapping it waits for the others that the weights are broadcast to."""
        self.tensors.check_manifest(weights.manifest)
        async with self._loading:
            await self._pause()
            paused = time.monotonic()
            try:
                ticket = await meet(self.broadcasts.session, self.broadcasts.workers)
                await self.broadcasts.open(self.llm, ticket)
            except BaseException:
                if not self.fault and not self.broadcasts.lost:
                    await self.llm.resume_generation()
                raise
            SECONDS.labels("rollout", "meet").observe(time.monotonic() - paused)
            await self._swap(ticket.weights.id, self.broadcasts.take(self.llm, ticket))
            return ticket.weights

    async def _pause(self) -> None:
        asked = time.monotonic()
        mode = self.settings.in_flight if not self._begun_again or self.settings.in_flight != "abort" else "wait"
        await self.llm.pause_generation(mode=mode, clear_cache=True)
        SECONDS.labels("rollout", "pause").observe(time.monotonic() - asked)

    async def _swap(self, version: Version, swapping: Awaitable[None]) -> None:
        paused = time.monotonic()
        # Until the last tensor is in, the model is a mixture of two versions and stays paused.
        self.fault = f"the weights of version {version} were not loaded completely"
        await swapping
        self.version, self.fault = version, ""
        swapped = time.monotonic()
        await self.llm.resume_generation()
        SECONDS.labels("rollout", "swap").observe(swapped - paused)
        SECONDS.labels("rollout", "resume").observe(time.monotonic() - swapped)

    async def stop(self) -> None:
        await asyncio.to_thread(self.llm.shutdown)

    # ---- OpenAI ----------------------------------------------------------------------------------------------------

    async def attach(self, app: FastAPI) -> None:
        """vLLM's own OpenAI server, behind our gate; of its many routes only those in `OPENAI_ROUTES`."""
        from starlette.routing import Route
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.openai.chat_completion.api_router import attach_router as attach_chat
        from vllm.entrypoints.openai.completion.api_router import attach_router as attach_completions
        from vllm.entrypoints.openai.models.api_router import attach_router as attach_models
        from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

        inner = FastAPI()
        for attach in (attach_models, attach_completions, attach_chat):
            attach(inner)
        init_exception_handler(inner)
        await init_app_state(self.llm, inner.state, self.args, await self.llm.get_supported_tasks())
        app.router.routes.extend(Route(path, inner, methods=[method]) for path, method in OPENAI_ROUTES.items())


def arguments(settings: EngineSettings, is_cpu: bool) -> Any:
    """vLLM's own parsed command line: its OpenAI server is set up from that."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    options: dict[str, Any] = {
        "model": settings.model,
        "served-model-name": settings.served_name,
        "dtype": settings.dtype,
        "logprobs-mode": "processed_logprobs",
        "max-num-seqs": settings.max_batch_sequences,
        "tensor-parallel-size": settings.tensor_parallel_size,
        "seed": 0,
        # Sampling defaults are the request's alone, as with the other engine; its EOS tokens are read all the same.
        "generation-config": "vllm",
    }
    if settings.max_model_len is not None:
        options["max-model-len"] = settings.max_model_len
    if settings.nodes > 1:
        options |= {"nnodes": settings.nodes, "node-rank": settings.node_rank, "master-addr": settings.leader}
        options["distributed-executor-backend"] = "mp"
    if not is_cpu:
        options["gpu-memory-utilization"] = settings.gpu_memory_utilization
    if settings.broadcasts:
        options["weight-transfer-config"] = json.dumps(CONFIG)
    flags = ["--no-enable-log-requests", "--no-use-tqdm-on-load", "--enable-prefix-caching"]
    flags += ["--enforce-eager"] if is_cpu else []
    flags += ["--trust-remote-code"] if settings.trust_remote_code else []
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return make_arg_parser(FlexibleArgumentParser()).parse_args(words + flags)


def _completion(output: Any) -> Completion:
    spans = [
        VersionSpan(start=span.start, weight_version=_version(span.version)) for span in output.weight_versions or []
    ]
    token_ids = list(output.token_ids)
    return Completion(
        text=output.text,
        token_ids=token_ids,
        logprobs=[position[token].logprob for position, token in zip(output.logprobs, token_ids, strict=True)],
        finish_reason=output.finish_reason if output.finish_reason in ("stop", "length") else "abort",
        weight_version=spans[0].weight_version if spans else Version(),
        version_spans=spans if len(spans) > 1 else [],
    )


def _version(label: str) -> Version:
    lineage, _, step = label.partition(".")
    return Version(lineage=int(lineage), version=int(step))
