"""Where a run stands, in numbers and in plain words, read from its Redis."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from services import pause
from services.console.source import PATIENCE_SECONDS, Desk
from services.keys import Keys
from services.orchestrator.progress import lag
from services.queue import Depth
from services.redis import DeadlineExceeded, insist
from services.weights.pointer import heartbeats, newest_version

QUIET_SECONDS = 60.0
"""A status older than that is of a process that is gone, or hangs."""
ACTIONS = {
    "alarm": "an alarm is only told",
    "raise_beta": "an alarm raises the weight of the KL term",
    "roll_back": "an alarm takes the run back to a checkpoint from before it",
    "stop": "an alarm stops the run",
}


@dataclass(frozen=True)
class Replica:
    """`behind`: published versions that it does not serve yet; `silent`: seconds since it reported."""

    name: str
    service: str
    version: str
    behind: int
    silent: float


@dataclass(frozen=True)
class Guard:
    """`tone`: `good`, `bad` or `plain`. `alarms` that last, and all that were `told`, the newest first."""

    tone: str
    words: str
    alarms: tuple[str, ...] = ()
    told: tuple[str, ...] = ()


@dataclass(frozen=True)
class Overview:
    """`trouble`: why nothing could be read. `seconds_left` and `pace` (seconds a step): none where unknown."""

    run: str
    state: str
    tone: str
    step: int
    steps: int | None
    version: str
    staleness: float | None
    most_stale: int | None
    depth: Depth
    in_flight: int
    training_tokens: float
    generation_tokens: float
    groups: float
    pace: float | None
    seconds_left: float | None
    replicas: tuple[Replica, ...]
    guard: Guard
    evaluations: tuple[dict[str, Any], ...]
    paused: bool
    spec: str
    trouble: str = ""

    @property
    def left(self) -> str:
        return duration(self.seconds_left)


def duration(seconds: float | None) -> str:
    """Such as 2 h 05 min; a dash for none."""
    if seconds is None:
        return "\u2013"
    minutes, rest = divmod(max(0, round(seconds)), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


async def look(desk: Desk) -> Overview:
    """Raises nothing where redis is away: `trouble` says so."""
    try:
        return await _look(desk)
    except DeadlineExceeded as error:
        return _blank(desk.run_id, str(error))


def _blank(run: str, trouble: str) -> Overview:
    unknown = Guard("plain", "Unknown.")
    return Overview(
        run, "unreachable", "bad", 0, None, "\u2013", None, None, Depth(0, 0, 0, 0.0), 0, 0.0, 0.0, 0.0, None, None,
        (), unknown, (), False, "", trouble,
    )  # fmt: skip


async def _look(desk: Desk) -> Overview:
    keys, run_id, redis = Keys(desk.run_id), desk.run_id, desk.redis
    history = await desk.history()

    async def read() -> Any:
        return (
            await redis.hgetall(keys.status),
            await newest_version(redis, run_id),
            await heartbeats(redis, run_id),
            await redis.hvals(keys.verdicts),
            await redis.hvals(keys.evaluations),
            await pause.read(redis, run_id),
        )

    found = await insist(read, f"run {run_id}: read its state", PATIENCE_SECONDS)
    statuses, newest, beats, verdicts, evaluations, paused = found
    depth = await desk.queue.depth()
    trainer, orchestrator = (_status(statuses, name) for name in (b"trainer", b"orchestrator"))
    state, tone = words(trainer, orchestrator, paused.paused)
    last, pace = history.last or {}, history.pace()
    steps: int | None = trainer.get("steps")
    step = int(trainer.get("step") or last.get("step") or 0)
    left = None
    if steps is not None and pace is not None and trainer.get("state") in ("waiting", "training") and not paused.paused:
        left = (steps - step) * pace
    return Overview(
        run=run_id,
        state=state,
        tone=tone,
        step=step,
        steps=steps,
        version=str(newest) if newest else "none yet",
        staleness=last.get("staleness_mean"),
        most_stale=last.get("staleness_max"),
        depth=depth,
        in_flight=int(orchestrator.get("groups_in_flight", 0)),
        training_tokens=float(trainer.get("tokens_per_second", 0.0)),
        generation_tokens=float(orchestrator.get("tokens_per_second", 0.0)),
        groups=float(orchestrator.get("groups_per_second", 0.0)),
        pace=pace,
        seconds_left=left,
        replicas=tuple(
            Replica(
                beat.replica,
                beat.service,
                str(beat.version) if beat.version else "base model",
                lag(newest, beat.version),
                max(0.0, time.time() - beat.at),
            )
            for beat in beats
        ),
        guard=guard(orchestrator, [orjson.loads(body) for body in verdicts]),
        evaluations=_evaluations(evaluations),
        paused=paused.paused,
        spec=str(orchestrator.get("spec", "")),
    )


def _status(statuses: Mapping[bytes, bytes], name: bytes) -> dict[str, Any]:
    return orjson.loads(statuses[name]) if name in statuses else {}


def _evaluations(bodies: list[bytes]) -> tuple[dict[str, Any], ...]:
    """The last ones, newest first: step, tasks, metrics, whether it was the best."""
    found = sorted((orjson.loads(body) for body in bodies), key=lambda one: one["version"]["version"], reverse=True)
    return tuple(found[:8])


def words(trainer: Mapping[str, Any], orchestrator: Mapping[str, Any], paused: bool) -> tuple[str, str]:
    """What the run is doing, and whether that is `good`, `bad` or `plain`."""
    if not trainer and not orchestrator:
        return "nothing is known of this run yet", "plain"
    if trainer.get("state") == "done":
        return "finished", "good"
    if trainer.get("state") == "stopped":
        return "stopped, with a checkpoint", "plain"
    state = orchestrator.get("state", "")
    if state == "failed":
        return f"failed: {orchestrator.get('reason', 'the log says why')}", "bad"
    newest = max(float(part.get("at", 0.0)) for part in (trainer, orchestrator))
    if time.time() - newest > QUIET_SECONDS:
        return f"silent for {duration(time.time() - newest)}: is it still running?", "bad"
    if paused:
        return "paused: no new groups are admitted", "plain"
    if state == "stopping":
        return "stopping", "plain"
    if trainer.get("state") == "training":
        return "training", "good"
    if trainer.get("state") == "waiting" and state == "running":
        return "making groups for the next step", "good"
    return state or "starting", "plain"


def guard(orchestrator: Mapping[str, Any], verdicts: list[dict[str, Any]]) -> Guard:
    """The collapse guard in plain words. `verdicts`: the alarms that were told."""
    state = orchestrator.get("guard")
    told = tuple(str(one["message"]) for one in sorted(verdicts, key=lambda one: one["at"], reverse=True)[:8])
    if state is None:
        return Guard("plain", "It is off, or its orchestrator has not reported.", told=told)
    does = ACTIONS.get(state["action"], state["action"])
    if state["alarms"]:
        return Guard("bad", f"Alarm: this looks like a collapse; {does}.", tuple(state["alarms"]), told)
    if state["judged"] < state["baseline"]:
        seen = f"{state['judged']} of {state['baseline']} steps"
        return Guard("plain", f"It is still learning what is normal ({seen}); {does}.", told=told)
    return Guard("good", f"No sign of collapse up to step {state['judged']}; {does}.", told=told)
