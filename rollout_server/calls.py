"""One call of the engine on behalf of an HTTP request: cancelled with it, measured, its failures as problems."""

import asyncio
import time
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from prometheus_client import Counter, Gauge, Histogram

from rollout_server.engines.base import Aborted, Engine
from services import traces
from services.contract import Completion
from services.problem import Problem

Result = TypeVar("Result")

COMPLETIONS = Counter(
    "rlif_rollout_completions_total", "Completions made, by how they ended", ["engine", "finish_reason"]
)
TOKENS = Counter("rlif_rollout_tokens_total", "Completion tokens made", ["engine"])
BEGUN_AGAIN = Counter(
    "rlif_rollout_begun_again_total", "Completions begun again because new weights came (in_flight: abort)", ["engine"]
)
SECONDS = Histogram(
    "rlif_rollout_generate_seconds",
    "Time of one engine call, waiting included",
    ["engine"],
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
)
BATCH = Histogram(
    "rlif_rollout_call_completions",
    "Completions that one engine call made",
    ["engine"],
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
)
CALLS = Gauge("rlif_rollout_calls_in_flight", "Engine calls running or waiting", ["engine"])


CLIENT_GONE = 499
"""The status in logs and metrics of a call whose client hung up; nobody reads the answer."""


class ClientGone(Exception):
    """The client hung up, so the work was cancelled."""


async def measured(engine: Engine, work: Awaitable[list[list[Completion]]]) -> list[list[Completion]]:
    """Await an engine's `generate`. Raises Problem (503) when the engine cannot do it."""
    started = time.perf_counter()
    CALLS.labels(engine.name).inc()
    try:
        with traces.span("generate", engine=engine.name, weight_version=str(engine.version)):
            groups = await work
    except Aborted as error:
        raise Problem(503, "The engine cannot generate", str(error), retry_after=2) from error
    finally:
        CALLS.labels(engine.name).dec()
    SECONDS.labels(engine.name).observe(time.perf_counter() - started)
    BATCH.labels(engine.name).observe(sum(map(len, groups)))
    for completion in (completion for group in groups for completion in group):
        COMPLETIONS.labels(engine.name, completion.finish_reason).inc()
        TOKENS.labels(engine.name).inc(len(completion.token_ids))
    return groups


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Await `work`, cancelling it when the client hangs up (the body must have been read). Raises ClientGone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        # The engine must have let go of the work before the caller goes on.
        await asyncio.wait({task, gone})


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
