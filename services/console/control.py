"""What changes a run: pause, resume, stop, another reward spec, dead letters made again.

All of it needs the admin token, in a header that no other site's page can make a browser send.
"""

import logging
import time
from typing import Any

import orjson
from fastapi import APIRouter, Depends, Request, Response

from services import commands, pause
from services.access import require_admin
from services.commands import Stop
from services.console import preview
from services.console.overview import QUIET_SECONDS, duration, look
from services.console.samples import ENTRY
from services.console.source import PATIENCE_SECONDS, Desk
from services.pages import session
from services.problem import Problem
from services.redis import DeadlineExceeded, insist
from services.spec import RewardSpec

log = logging.getLogger(__name__)

MOST_LETTERS = 200
"""Dead letters on one page."""
FROM_HERE = "from the console"


def _check_origin(request: Request) -> None:
    session.check_origin(request)


def router(desk: Desk) -> APIRouter:
    routes = APIRouter(prefix="/v1/run", tags=["run"], dependencies=[require_admin, Depends(_check_origin)])
    run_id = desk.run_id

    async def obey(what: str, call: Any) -> Any:
        """Raises Problem (503): redis is away."""
        try:
            return await insist(call, f"run {run_id}: {what}", PATIENCE_SECONDS)
        except DeadlineExceeded as error:
            raise Problem(503, "The run cannot be reached", str(error), retry_after=2) from error

    async def status(service: str) -> dict[str, Any]:
        """What a service last said of itself; empty when it never did."""
        body = await obey("read its state", lambda: desk.redis.hget(desk.queue.keys.status, service))
        return orjson.loads(body) if body else {}

    @routes.post("/pause", status_code=204)
    async def pause_run() -> Response:
        """Admit no new groups. Those on their way are finished and trained."""
        await obey("pause", lambda: pause.put(desk.redis, run_id, True))
        log.warning("run %s is paused %s", run_id, FROM_HERE)
        return Response(status_code=204)

    @routes.post("/resume", status_code=204)
    async def resume_run() -> Response:
        """Admit groups again."""
        await obey("resume", lambda: pause.put(desk.redis, run_id, False))
        log.warning("run %s is resumed %s", run_id, FROM_HERE)
        return Response(status_code=204)

    @routes.post("/stop", status_code=202)
    async def stop_run() -> dict[str, str]:
        """End the run after the step under way, with a checkpoint to resume from."""
        trainer, orchestrator = await status("trainer"), await status("orchestrator")
        if trainer.get("state") not in ("waiting", "training"):
            said = trainer.get("state", "none began yet")
            raise Problem(409, "Nothing to stop", f"no trainer of run {run_id} waits or trains ({said})")
        silent = [max(0.0, time.time() - one.get("at", 0.0)) for one in (trainer, orchestrator)]
        heard = f"the trainer was last heard of {duration(silent[0])} ago"
        if min(silent) > QUIET_SECONDS:  # a trainer that waits for groups is silent, too, and obeys
            also = f"the orchestrator {duration(silent[1])} ago" if orchestrator else "an orchestrator never"
            heard += f", {also}: if the trainer is gone, the next one of the run obeys"
        # One for each trainer, however often it is asked for: a second one would stop the trainer that resumes the run.
        order = Stop(id=f"console-stop-{trainer['lineage']}", reason=FROM_HERE)
        await obey("stop", lambda: commands.send(desk.redis, run_id, order))
        log.warning("run %s is told to stop %s", run_id, FROM_HERE)
        return {"order": order.id, "said": f"The run stops after the step under way, with a checkpoint; {heard}"}

    @routes.put("/spec")
    async def put_spec(spec: RewardSpec) -> dict[str, Any]:
        """Score the next groups by another spec, on all of the run's reward servers."""
        now = await look(desk)
        version = await preview.apply(desk, now.spec, spec)
        log.warning("run %s: spec %s is now version %d, %s, %s", run_id, now.spec, version, spec.spec_id, FROM_HERE)
        return {"name": now.spec, "version": version, "spec_id": spec.spec_id}

    @routes.post("/dead/{entry_id}/retry")
    async def retry(entry_id: str) -> dict[str, int]:
        """Make a group again that was given up, by the newest weights."""
        try:
            if not ENTRY.fullmatch(entry_id):
                raise KeyError(entry_id)
            return {"index": await desk.queue.retry(entry_id)}
        except DeadlineExceeded as error:
            raise Problem(503, "The run cannot be reached", str(error), retry_after=2) from error
        except KeyError as error:
            raise Problem(404, "No such dead letter", f"there is no entry {entry_id:.60}", "entry_id") from error
        except ValueError as error:
            raise Problem(409, "The group cannot be made again", str(error), "entry_id") from error

    return routes
