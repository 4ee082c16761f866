"""The reward server: scores completions with a scorer model, with verifiable rewards, and with mixes of them."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request, Response

from reward_server import catalogue, compat, plugins, scoring
from reward_server.calls import Calls
from reward_server.encoding import Encoder
from reward_server.evaluate import Means, score_groups
from reward_server.playground import page
from reward_server.preview import preview
from reward_server.rewards import REWARDS, math_verify
from reward_server.sandbox.choice import choose
from reward_server.scorer import engines
from reward_server.scorer.metrics import METRICS
from reward_server.spec_store import DEFAULT, MemoryStore, RedisStore, Specs
from reward_server.specs import SpecError, named_spec
from reward_server.workers import WorkerPool
from services.access import HttpSettings, require_admin
from services.api import (
    PreviewRequest,
    PreviewResponse,
    RewardEntry,
    RewardGroup,
    RewardsList,
    RewardsRequest,
    RewardsResponse,
    ScoreRequest,
    ScoreResponse,
    SpecEntry,
    SpecsList,
    SpecVersions,
)
from services.contract import GroupScores
from services.gate import remaining_seconds
from services.http import create_app
from services.model_folder import model_folder
from services.problem import Problem
from services.spec import RewardSpec
from services.startup import StartupError
from services.weights.follow import Follower

log = logging.getLogger(__name__)

CALL_SECONDS = 300.0
"""How long a call may take when its client names no deadline."""
LONGEST_CALL_SECONDS = 86400.0


@dataclass(frozen=True)
class Settings:
    """Without `model` the rewards that need a scorer are unavailable. `default_spec` may name a built-in spec.

    With `redis_url` and `run_id` the server follows that run's weights and keeps put specs there; `replica` is its name
    there, and deltas are applied to a copy of the weights in `mirror_dir`.
    `deterministic`: the last bits of a group's scores do not depend on what else was asked at the time.
    `reference_model` is a frozen model to compare the scorer's with (transformers).
    `sandbox` is what `--sandbox` takes (`reward_server.sandbox.choice`). `plugins` are rewards as module:function.
    """

    http: HttpSettings = HttpSettings()
    model: str | None = None
    revision: str | None = None
    reference_model: str | None = None
    engine: str = "transformers"
    dtype: str = "float32"
    device: str = "auto"
    threads: int | None = None
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.85
    max_model_len: int | None = None
    trust_remote_code: bool = False
    default_spec: RewardSpec | str | None = None
    follow: Literal["online", "match", "frozen", "ema"] = "online"
    ema_decay: float = 0.99
    deterministic: bool = False
    redis_url: str | None = None
    run_id: str | None = None
    replica: str = "reward"
    poll_seconds: float = 0.2
    mirror_dir: Path | None = None
    broadcasts: bool = False
    max_batch_tokens: int = 16384
    verifier_workers: int = 2
    plugins: tuple[str, ...] = ()
    sandbox: str = "none"


def create(settings: Settings) -> FastAPI:
    """The app, with its model loaded. Raises StartupError: model, sandbox or default spec cannot be used."""
    if settings.redis_url is not None and settings.run_id is None:
        raise StartupError("following a run needs its name beside the Redis URL")
    plugins.install(settings.plugins)
    sandbox = choose(settings.sandbox)
    service = engines.scorer_service(settings)
    workers = WorkerPool(settings.verifier_workers, warm_up=[math_verify.WARM_UP, *plugins.warm_ups()])
    encoder = Encoder(service.scorer.tokenizer, service.scorer.max_length) if service else None
    means = Means(workers, service, encoder, sandbox, http=Calls())
    specs = _specs(settings, means.have)

    def ready() -> dict[str, str]:
        states = {"verifier": workers.state, "specs": specs.store.state()}
        if sandbox:
            states["sandbox"] = sandbox.state()
        return {**states, "scorer": service.state()} if service else states

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if sandbox:
            await sandbox.start()
        if _starts_with_math(specs):
            workers.start()
        follower = _follower(settings, service)
        if service:
            await service.start()
        if follower:
            await follower.start()
        watching = asyncio.create_task(specs.store.watch())
        try:
            yield
        finally:
            watching.cancel()
            if follower:
                await follower.stop()
            if service:
                await service.stop()
            await workers.stop()
            if sandbox:
                await sandbox.stop()
            if means.http:
                await means.http.close()
            await specs.store.close()

    app = create_app(
        "reward", "0.1.0", settings.http, ready, lifespan, __doc__ or "", page.PATHS, service.death if service else str
    )
    _add_reward_routes(app, settings, specs, means)
    _add_spec_routes(app, specs)
    _add_model_routes(app, settings, means)
    return app


# ---- parts -----------------------------------------------------------------------------------------------------


def _specs(settings: Settings, have: frozenset[str]) -> Specs:
    given = settings.default_spec
    try:
        default = named_spec(given) if isinstance(given, str) else given
        if settings.redis_url is not None and settings.run_id is not None:
            return Specs(RedisStore(settings.redis_url, settings.run_id), default, have)
        return Specs(MemoryStore(), default, have)
    except SpecError as error:
        raise StartupError(f"the default reward spec: {error}") from error
    except ValueError as error:
        raise StartupError(str(error)) from error


def _starts_with_math(specs: Specs) -> bool:
    """Whether to have verifier processes up before the first request, rather than at the first that needs one."""
    default = specs.built_in.get(DEFAULT)
    return default is None or any("math-verify" in REWARDS[term.name].needs for term in default.rewards)


def _follower(settings: Settings, service: Any) -> Follower | None:
    if settings.model is None or settings.follow == "frozen" or settings.redis_url is None or settings.run_id is None:
        return None
    return Follower(
        redis_url=settings.redis_url,
        run_id=settings.run_id,
        replica=settings.replica,
        service="reward",
        url="",
        load=service.load,
        poll_seconds=settings.poll_seconds,
        mirror_dir=settings.mirror_dir,
        base=partial(model_folder, settings.model, settings.revision),
        receive=service.receive if settings.broadcasts else None,
    )


# ---- routes ----------------------------------------------------------------------------------------------------


def _seconds(request: Request) -> float:
    """What the caller allows, less a margin in which the verdicts that are there can still be sent."""
    if "x-deadline-seconds" not in request.headers:
        return CALL_SECONDS
    seconds = remaining_seconds(request, LONGEST_CALL_SECONDS)
    return seconds - min(1.0, 0.1 * seconds)


def _add_reward_routes(app: FastAPI, settings: Settings, specs: Specs, means: Means) -> None:
    async def score(name: str | None, groups: list[RewardGroup], request: Request) -> list[GroupScores]:
        deadline = time.monotonic() + _seconds(request)
        if means.workers.is_full:
            raise Problem(429, "The verifier is busy", f"{means.workers.waiting} checks wait already", retry_after=2)
        named = await specs.get(name, status=422)
        return await score_groups(named.spec, groups, means, deadline)

    @app.post("/v1/rewards", tags=["rewards"])
    async def rewards(body: RewardsRequest, request: Request) -> RewardsResponse:
        """Score groups by a spec: per completion the components with their outcomes, the reward and the advantage.

        A verdict that is not there by the deadline has the outcome `timeout`; it is never a 0.
        """
        return RewardsResponse(groups=await score(body.spec, body.groups, request))

    @app.get("/v1/rewards", tags=["rewards"])
    async def list_rewards() -> RewardsList:
        """Every reward: what it is and needs, its parameters' JSON schema, an example, whether it works here."""
        found = []
        for reward in REWARDS.values():
            missing = reward.missing(means.have)
            entry = catalogue.entry(reward)
            found.append(RewardEntry(**entry, available=missing is None, unavailable_because=missing))
        return RewardsList(rewards=found)

    app.include_router(compat.router(score, means))
    app.include_router(page.router(score, specs, means, settings.model, settings.http, _seconds))


def _add_spec_routes(app: FastAPI, specs: Specs) -> None:
    @app.get("/v1/specs", tags=["specs"])
    async def list_specs(spec_id: str | None = None) -> SpecsList:
        """Built-in specs (each reward, and the presets), the server's default, and those that were put.

        With `spec_id`: where the spec that a scored group names is, or was, known.
        """
        found = await specs.all() if spec_id is None else await specs.by_id(spec_id)
        return SpecsList(specs=[item.describe() for item in found])

    @app.get("/v1/specs/{name}", tags=["specs"])
    async def get_spec(name: str, version: Annotated[int | None, Query(ge=0)] = None) -> SpecEntry:
        """The newest version, or an earlier one."""
        return (await (specs.get(name) if version is None else specs.version(name, version))).describe()

    @app.get("/v1/specs/{name}/versions", tags=["specs"])
    async def list_versions(name: str) -> SpecVersions:
        """The versions of a name that are kept, oldest first."""
        return SpecVersions(versions=[item.describe() for item in await specs.history(name)])

    @app.post("/v1/specs/preview", tags=["specs"])
    async def preview_spec(body: PreviewRequest) -> PreviewResponse:
        """What a spec would make of scores that were measured before: rewards and advantages. Nothing is computed anew,
        and nothing is put."""
        return await asyncio.to_thread(preview, body.spec, body.groups, specs.have)

    @app.put("/v1/specs/{name}", tags=["specs"], dependencies=[require_admin])
    async def put_spec(name: str, spec: RewardSpec) -> SpecEntry:
        """Install or replace a spec, from the next request on. The name `default` steers requests that name none."""
        return (await specs.put(name, spec)).describe()

    @app.delete("/v1/specs/{name}", tags=["specs"], status_code=204, dependencies=[require_admin])
    async def delete_spec(name: str) -> Response:
        """Remove a spec that was put; `default` then is what the server was started with."""
        await specs.delete(name)
        return Response(status_code=204)


def _add_model_routes(app: FastAPI, settings: Settings, means: Means) -> None:
    def scorer_service() -> Any:
        if means.scorer is None:
            raise Problem(404, "No model", "this server was started without a scorer model")
        return means.scorer

    @app.get("/v1/model", tags=["scorer"])
    async def model() -> dict[str, Any]:
        """What the scorer runs, and the metrics that `/v1/score` knows: per token, and of a completion."""
        service = scorer_service()
        return {
            "model": settings.model,
            "weight_version": service.version.model_dump(),
            "vocab_size": service.scorer.vocab_size,
            "max_tokens": service.scorer.max_length,
            "backend": service.backend,
            "dtype": settings.dtype,
            "device": str(service.scorer.device),
            "follow": service.follow,
            "reference_model": settings.reference_model,
            "metrics": [
                {**metric.describe(name), "available": service.has_reference or not metric.needs_reference}
                for name, metric in METRICS.items()
            ],
        }

    @app.post("/v1/score", tags=["scorer"], response_model=ScoreResponse, response_model_exclude_none=True)
    async def score(body: ScoreRequest, request: Request) -> Response:
        """Scorer metrics of completions given as text or token ids, all under the one weight version that is named."""
        service = scorer_service()
        assert means.encoder is not None and settings.model is not None
        answer = await scoring.score(body, service, means.encoder, settings.model, _seconds(request))
        content = await asyncio.to_thread(scoring.as_json, answer) if body.per_token else scoring.as_json(answer)
        return Response(content, media_type="application/json")
