"""The rollout server: groups of completions with token ids and logprobs, by weights that follow the trainer."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response

from rollout_server.calls import CLIENT_GONE, ClientGone, measured, while_connected
from rollout_server.engines.base import Engine, EngineSettings, InFlight, Receiver
from rollout_server.prompts import rollout_prompts
from services import trail
from services.access import HttpSettings
from services.api import RolloutGroup, RolloutsRequest, RolloutsResponse
from services.contract import Version, WeightVersion
from services.gate import remaining_seconds
from services.http import create_app
from services.model_folder import model_folder
from services.problem import Problem
from services.startup import StartupError
from services.weights.follow import Follower
from services.weights.meeting import Meet

log = logging.getLogger(__name__)

ENGINES = ("transformers", "vllm")
CALL_SECONDS = 600.0
"""How long a call may take when its client names no deadline."""


@dataclass(frozen=True)
class Settings:
    """With `redis_url` and `run_id` the server follows that run's weights; `replica` is its name there, and deltas are
    applied to a copy of the weights in `mirror_dir`. `nodes`, `node_rank`, `leader`: one engine over several nodes
    (vLLM), of which number 0 is this server."""

    model: str
    http: HttpSettings = HttpSettings()
    revision: str | None = None
    dtype: str = "float32"
    device: str = "auto"
    threads: int | None = None
    engine: str = "transformers"
    max_model_len: int | None = None
    max_batch_sequences: int = 256
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.85
    trust_remote_code: bool = False
    served_model_name: str | None = None
    redis_url: str | None = None
    run_id: str | None = None
    replica: str = "rollout"
    poll_seconds: float = 0.2
    mirror_dir: Path | None = None
    in_flight: InFlight = "wait"
    broadcasts: bool = False
    nodes: int = 1
    node_rank: int = 0
    leader: str = "127.0.0.1"


def create(settings: Settings) -> FastAPI:
    """The app; its start-up loads the model. Raises StartupError when the settings cannot work."""
    engine = make_engine(settings)
    served = Served(engine)
    follower = _follower(settings, served)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        await engine.attach(app)
        if follower:
            await follower.start()
        try:
            yield
        finally:
            if follower:
                await follower.stop()
            await engine.stop()

    def ready() -> dict[str, str]:
        return {"engine": engine.state()} | ({"redis": follower.redis_state} if follower else {})

    app = create_app("rollout", version("rlif"), settings.http, ready, lifespan, __doc__ or "", death=engine.death)
    app.state.engine = engine
    _add_routes(app, engine, served)
    return app


def make_engine(settings: Settings) -> Engine:
    """Raises StartupError."""
    chosen = engine_settings(settings)
    if settings.engine == "vllm":
        from rollout_server.engines.vllm import VllmEngine

        return VllmEngine(chosen)
    from rollout_server.engines.transformers import TransformersEngine

    return TransformersEngine(chosen)


def engine_settings(settings: Settings) -> EngineSettings:
    """Raises StartupError."""
    if settings.engine not in ENGINES:
        raise StartupError(f"--engine {settings.engine}: choose one of {', '.join(ENGINES)}")
    if settings.nodes > 1 and settings.engine != "vllm":
        raise StartupError(f"--nodes {settings.nodes}: the transformers engine runs on one node; use engine vllm")
    if settings.broadcasts and settings.engine != "vllm":
        raise StartupError("weights.transport: the transformers engine takes part in no broadcasts; use engine vllm")
    if not 0 <= settings.node_rank < settings.nodes:
        raise StartupError(
            f"--node-rank {settings.node_rank}: choose 0 to {settings.nodes - 1} (--nodes {settings.nodes})"
        )
    if settings.tensor_parallel_size % settings.nodes:
        raise StartupError(
            f"--nodes {settings.nodes}: does not divide the {settings.tensor_parallel_size} GPUs of the engine "
            f"(tensor_parallel_size)"
        )
    return EngineSettings(
        model=model_folder(settings.model, settings.revision),
        served_name=settings.served_model_name or settings.model,
        dtype=settings.dtype,
        device=settings.device,
        threads=settings.threads,
        max_model_len=settings.max_model_len,
        max_batch_sequences=settings.max_batch_sequences,
        tensor_parallel_size=settings.tensor_parallel_size,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        trust_remote_code=settings.trust_remote_code,
        nodes=settings.nodes,
        node_rank=settings.node_rank,
        leader=settings.leader,
        in_flight=settings.in_flight,
        broadcasts=settings.broadcasts,
    )


class Served:
    """The version the engine serves, and waiting for a newer one."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._changed = asyncio.Condition()

    async def load(self, version: Version, directory: Path) -> None:
        await self.engine.load(version, directory)
        async with self._changed:
            self._changed.notify_all()

    async def receive(self, weights: WeightVersion, meet: Meet) -> WeightVersion:
        assert isinstance(self.engine, Receiver)
        taken = await self.engine.receive(weights, meet)
        async with self._changed:
            self._changed.notify_all()
        return taken

    async def at_least(self, wanted: Version, seconds: float) -> None:
        """Raises Problem (503) when `wanted` is not served within `seconds`."""
        if self.engine.version >= wanted:
            return
        log.info("waiting up to %.1f s for the trainer's weights %s; serving %s", seconds, wanted, self.engine.version)
        try:
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(lambda: self.engine.version >= wanted)
        except TimeoutError:
            detail = f"this server serves version {self.engine.version}, version {wanted} was asked for"
            raise Problem(503, "The weights have not arrived", detail, "min_weight_version", retry_after=2) from None


def _follower(settings: Settings, served: Served) -> Follower | None:
    if (settings.redis_url is None) != (settings.run_id is None):
        raise StartupError("following weights needs both the Redis URL and the name of the run")
    if settings.redis_url is None or settings.run_id is None:
        return None
    try:
        return Follower(
            redis_url=settings.redis_url,
            run_id=settings.run_id,
            replica=settings.replica,
            service="rollout",
            url=f"http://{settings.http.host}",
            load=served.load,
            poll_seconds=settings.poll_seconds,
            mirror_dir=settings.mirror_dir,
            base=partial(model_folder, settings.model, settings.revision),
            receive=served.receive if settings.broadcasts else None,
        )
    except ValueError as error:
        raise StartupError(str(error)) from error


def _add_routes(app: FastAPI, engine: Engine, served: Served) -> None:
    @app.post("/v1/rollouts", response_model=RolloutsResponse, tags=["rollouts"])
    async def rollouts(body: RolloutsRequest, request: Request) -> Response:
        """Groups of completions, in the order of the requests.

        A request with a seed gets the same completions from the same weights, whatever else the server does.
        `min_weight_version` waits for those weights within the deadline, then answers 503.
        """
        seconds = remaining_seconds(request, CALL_SECONDS)
        prompts = await asyncio.to_thread(rollout_prompts, engine, body.requests)
        wanted = [asked.min_weight_version for asked in body.requests if asked.min_weight_version]
        if wanted:
            # The answer that says what is missing must leave before the deadline cuts the call off.
            await served.at_least(max(wanted), seconds - min(1.0, seconds / 5))
        try:
            groups = await while_connected(request, measured(engine, engine.generate(prompts)))
        except ClientGone:
            return Response(status_code=CLIENT_GONE)
        answer = RolloutsResponse(
            groups=[
                RolloutGroup(group_id=prompt.request_id, prompt_token_ids=prompt.token_ids, completions=completions)
                for prompt, completions in zip(prompts, groups, strict=True)
            ],
            model=engine.settings.served_name,
            weight_version=min(completion.weight_version for group in groups for completion in group),
        )
        for prompt, completions in zip(prompts, groups, strict=True):
            made = min(completion.weight_version for completion in completions)
            trail.note("is generated", prompt.request_id, weight_version=made)
        return Response(await asyncio.to_thread(answer.model_dump_json), media_type="application/json")

    @app.get("/v1/model", tags=["rollouts"])
    async def model() -> dict[str, Any]:
        """What is served: model, weight version, context length, vocabulary, engine."""
        return {
            "model": engine.settings.served_name,
            "weight_version": engine.version.model_dump(),
            "max_model_len": engine.max_model_len,
            "vocab_size": engine.vocab_size,
            "engine": engine.name,
            "dtype": engine.settings.dtype,
        }
