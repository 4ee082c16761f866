"""The collapse guard at work: reads what the trainer measured, raises alarms, and gives the orders the recipe asks for.

It keeps no state of its own: the numbers of steps and evaluations (one stream, judged in its order), alarms told and
orders given are in Redis, so that after a restart it judges the same history again, and tells and orders nothing twice.
"""

import asyncio
import logging
import time
from typing import Any

import orjson
from prometheus_client import Counter, Gauge

from services import commands, webhook
from services.commands import AnyOrder, EvaluationResult, Obeyed, RaiseBeta, RollBack, Stop
from services.contract import Version
from services.keys import Keys
from services.orchestrator.bands import EVALUATED, Alarm, Judge
from services.recipe import Recipe
from services.recipe_watching import Guard as Settings
from services.redis import insist

log = logging.getLogger(__name__)

RAISED = Gauge("rlif_guard_alarm", "Whether the signal has an alarm that is not over: 1 or 0", ["signal"])
ALARMS = Counter("rlif_guard_alarms_total", "Alarms raised", ["signal"])
ACTIONS = Counter("rlif_guard_actions_total", "Orders given to the trainer after an alarm", ["action"])
RATIO = Gauge("rlif_guard_baseline_ratio", "The signal's last value over that of the first steps", ["signal"])

COLUMNS = {
    "reward": "reward_mean",
    "length": "completion_length",
    "distinct": "distinct_2",
    "entropy": "entropy",
    "stopped": "stop_share",
    "answers": "answer_diversity",
    "kl": "kl",
}
"""A signal's name in the trainer's records."""
WAIT_SECONDS = 0.5
PATIENCE_SECONDS = 300.0
TELL_SECONDS = 20.0
BY_GUARD = "by the collapse guard: "
"""Who stopped the run, and why: what `rlif up` says in the end."""


class Guard:
    """`step` is the last one that was judged. `wake` is set whenever something was."""

    def __init__(self, recipe: Recipe, settings: Settings, redis: Any, wake: asyncio.Event):
        self.recipe, self.settings, self.redis, self.wake = recipe, settings, redis, wake
        self.keys = Keys(recipe.run.name)
        self.judge = Judge(settings)
        self.rows: list[dict[str, Any]] = []
        self.step, self.acted_at = 0, -settings.window
        self.pending = ""
        self._seen = self._judged = "0-0"
        self._telling: set[asyncio.Task] = set()

    def holds(self, version: Version) -> bool:
        """Whether a repeatable run waits: for the judgement of its newest step, or for an order to be obeyed."""
        return self.settings.action != "alarm" and (bool(self.pending) or self.step < version.version)

    def state(self) -> dict[str, Any]:
        """For the run's status: the last step judged, how many it takes to know what is normal, what it does about an
        alarm, and the alarms that are not over, in words."""
        alarms = [str(alarm) for alarm in self.judge.raised]
        return {
            "judged": self.step,
            "baseline": self.settings.baseline,
            "action": self.settings.action,
            "alarms": alarms,
        }

    async def follow(self) -> None:
        """Judge every step, until cancelled."""
        try:
            while True:
                for row in await self._read():
                    await self._take(row)
                self._judged = self._seen
                if self.pending and self.pending in await self._obeyed():
                    self.pending = ""
                self.wake.set()
        finally:
            for task in self._telling:
                task.cancel()

    async def note(self, result: EvaluationResult) -> None:
        """An evaluation that ended: returns when it was judged (by `follow`), or nobody did so for long."""
        row = {"step": result.version.version, "lineage": result.version.lineage, "start": 0}
        fields: Any = {"evaluation": orjson.dumps(row | {name: result.metrics.get(name) for name in EVALUATED})}
        what = f"run {self.keys.run_id}: note an evaluation for the guard"
        entry_id = (await insist(lambda: self.redis.xadd(self.keys.steps, fields), what, PATIENCE_SECONDS)).decode()
        ends = time.monotonic() + TELL_SECONDS
        while _place(self._judged) < _place(entry_id) and time.monotonic() < ends:
            await asyncio.sleep(0.01)

    async def _read(self) -> list[dict[str, Any]]:
        async def read() -> Any:
            return await self.redis.xread({self.keys.steps: self._seen}, block=int(WAIT_SECONDS * 1000))

        found = await insist(read, f"run {self.keys.run_id}: read the steps' numbers", PATIENCE_SECONDS)
        rows = []
        for _, entries in found or []:
            for entry_id, fields in entries:
                self._seen = entry_id.decode()
                if b"evaluation" in fields:
                    rows.append(orjson.loads(fields[b"evaluation"]))
                    continue
                line = orjson.loads(fields[b"line"])
                row = {name: line.get(column) for name, column in COLUMNS.items()}
                rows.append({**row, **{key: int(line[key]) for key in ("step", "lineage", "start")}})
        return rows

    async def _take(self, row: dict[str, Any]) -> None:
        if "reward" not in row:
            place = (row["lineage"], row["step"])
            if not any((one["lineage"], one["step"]) == place for one in self.rows if "reward" not in one):
                await self._judge(row)
            return
        last = next((known for known in reversed(self.rows) if "reward" in known), None)
        if last is not None and row["lineage"] > last["lineage"]:
            self._go_back(row["start"])
        elif last is not None and row["step"] <= last["step"]:
            return  # told twice
        if self.recipe.trainer.kl_beta == 0:
            row["kl"] = None  # nothing it could be measured from
        await self._judge(row)
        self.step = row["step"]

    def _go_back(self, step: int) -> None:
        """What came after `step` was undone, or lost with a trainer: judge what is left anew."""
        self.rows, self.judge = [row for row in self.rows if row["step"] <= step], Judge(self.settings)
        self.step, self.acted_at = step, -self.settings.window
        for row in self.rows:
            self.judge.look(row)

    async def _judge(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        alarms = self.judge.look(row)
        raised = {alarm.signal for alarm in self.judge.raised}
        for signal in self.judge.series:
            RAISED.labels(signal).set(signal in raised)
            ratio = self.judge.ratio(signal)
            if ratio is not None:
                RATIO.labels(signal).set(ratio)
        place = f"{row['lineage']}.{row['step']}" + ("" if "reward" in row else ".evaluated")
        now = max(row["step"], self.step)  # an evaluation ends when later steps were judged already
        if raised and self.settings.action != "alarm" and now - self.acted_at >= self.settings.window:
            self.acted_at = now
            await self._act(place, row["step"])
        for alarm in alarms:
            task = asyncio.create_task(self._tell(f"{place}.{alarm.signal}", alarm))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    async def _act(self, place: str, step: int) -> None:
        order = await self._order(f"guard-{place}", step)
        run_id = self.keys.run_id
        is_new = await insist(
            lambda: commands.send(self.redis, run_id, order), f"run {run_id}: order", PATIENCE_SECONDS
        )
        if order.id not in await self._obeyed():
            self.pending = order.id
        if is_new:
            ACTIONS.labels(order.kind).inc()
            log.error("the collapse guard orders %s: %s", order.kind, self._reason())

    async def _order(self, order_id: str, step: int) -> AnyOrder:
        settings, reason = self.settings, self._reason()
        if settings.action == "raise_beta":
            return RaiseBeta(id=order_id, factor=settings.beta_factor, cap=settings.beta_cap, reason=reason)
        if settings.action == "stop":
            return Stop(id=order_id, reason=f"{BY_GUARD}{reason}")
        since = max(1, min(alarm.since for alarm in self.judge.raised))
        given = await insist(
            lambda: commands.after(self.redis, self.keys.run_id, 0), f"run {self.keys.run_id}: orders", PATIENCE_SECONDS
        )
        obeyed = await self._obeyed()
        for one in given:
            landed = obeyed.get(one.id)
            if isinstance(one, RollBack) and one.id != order_id and landed is not None:
                if 0 <= step - landed.step <= settings.again_within:
                    again = f"again within {settings.again_within} steps of a roll-back to step {landed.step}: {reason}"
                    return Stop(id=order_id, reason=f"{BY_GUARD}{again}")
        return RollBack(id=order_id, before=since, rate_factor=settings.rate_factor, reason=reason)

    async def _obeyed(self) -> dict[str, Obeyed]:
        run_id = self.keys.run_id
        return await insist(
            lambda: commands.all_obeyed(self.redis, run_id), f"run {run_id}: orders obeyed", PATIENCE_SECONDS
        )

    def _reason(self) -> str:
        return "; ".join(str(alarm) for alarm in self.judge.raised)

    async def _tell(self, alarm_id: str, alarm: Alarm) -> None:
        """Noted after it was done: an alarm is rather told twice than never."""
        body = {
            "run": self.keys.run_id,
            "signal": alarm.signal,
            "step": alarm.step,
            "since": alarm.since,
            "value": alarm.value,
            "low": alarm.low,
            "high": alarm.high,
            "action": self.settings.action,
            "message": str(alarm),
            "at": time.time(),
        }

        key, what = self.keys.verdicts, f"run {self.keys.run_id}: note an alarm"
        if await insist(lambda: self.redis.hexists(key, alarm_id), what, PATIENCE_SECONDS):
            return
        ALARMS.labels(alarm.signal).inc()
        log.error("collapse guard: %s", alarm)
        if self.settings.webhook is not None:
            await webhook.post(self.settings.webhook, body)
        await insist(lambda: self.redis.hset(key, alarm_id, orjson.dumps(body)), what, PATIENCE_SECONDS)

    async def close(self) -> None:
        """Let alarms be told that are being told."""
        if self._telling:
            await asyncio.wait(self._telling, timeout=TELL_SECONDS)


def _place(entry_id: str) -> tuple[int, ...]:
    """In the order of a stream."""
    return tuple(map(int, entry_id.split("-")))
