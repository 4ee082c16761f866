"""One node of a run over several machines: it meets the others on the run's board, runs its parts, and ends with them.

Every node ends with the same exit code, that of the first outcome: 0 training is done; 1 a part failed; 2 a part
refused; 143 stopped, with a checkpoint where there was time for one.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import httpx

from services import recipe as recipes
from services.launch import credentials
from services.launch.board import Board, Ended, Outcome
from services.launch.parts import Node, Workplace, choose_ports
from services.launch.plan import make
from services.recipe import RecipeError
from services.run_folder import check_own, only_one
from services.startup import StartupError
from services.steps import why_stopped
from services.supervisor import EXIT_FAILED, EXIT_REFUSED, Service, supervise

log = logging.getLogger(__name__)

MUSTER_SECONDS = 180.0
READY_SECONDS = 1800.0
"""Large models take long to load from a shared disk."""
END_SECONDS = 240.0
LAST_SECONDS = 60.0
"""How long the orchestrator may take to see that the trainer is done."""
ABANDON_SECONDS = 10.0
STOPPED = 143
DONE = "training is done"

Tick = Callable[[list[Service]], None]


class Readiness:
    """Asks servers for /readyz, in a thread of its own, until each has said yes. `waiting`: those that have not, with
    what they said last."""

    def __init__(self, servers: dict[str, str]):
        self.servers = servers
        self.waiting = dict.fromkeys(servers, "no answer yet")
        self.since = time.monotonic()
        threading.Thread(target=self._ask, name="readiness", daemon=True).start()

    def _ask(self) -> None:
        while self.waiting:
            for name in list(self.waiting):
                try:
                    answer = httpx.get(f"{self.servers[name]}/readyz", timeout=5)
                except httpx.HTTPError as error:
                    self.waiting[name] = str(error)
                    continue
                if answer.status_code == 200:
                    log.info("%s is ready", name)
                    del self.waiting[name]
                else:
                    self.waiting[name] = answer.text
            time.sleep(0.5)

    @property
    def overdue(self) -> str | None:
        """Who was not ready in time, and why; none while there is time."""
        if not self.waiting or time.monotonic() - self.since < READY_SECONDS:
            return None
        return f"not ready within {READY_SECONDS:.0f} s: " + "; ".join(f"{k}: {v}" for k, v in self.waiting.items())


def run_node(
    recipe_path: Path,
    nodes: int,
    gpus_per_node: int,
    number: int,
    name: str,
    host: str,
    attempt: str,
    resume_from: Path | None,
    tick: Tick,
) -> int:
    """Run node `number` of `nodes`, reached by the others as `host`, until the run ends. Returns the exit code.

    `recipe_path` is the recipe in run.dir, which all nodes share; `attempt` names this start of the run; without a
    checkpoint it trains on from the folder `resume_from`. `tick` is called a few times a second on the first node.
    Raises StartupError and RecipeError (this node refuses; the others end too).
    """
    try:
        recipe = recipes.load(recipe_path)
    except RecipeError as error:
        raise StartupError(f"node {name}: {error} (run.dir has to be a folder that all nodes share)") from error
    check_own(recipe.run.dir)
    board = Board(recipe.run.dir, attempt)
    try:
        password = credentials.take(recipe.run.dir)
        plan = make(recipe, nodes, gpus_per_node)
        with only_one(recipe.run.dir) if number == 0 else nullcontext():
            crew = _muster(board, number, nodes, Node(name, host, choose_ports(plan, number, host)))
            log.info("node %s has met the others: %s", name, ", ".join(node.name for node in crew))
            place = Workplace(recipe, recipe_path, plan, crew, number, attempt, password, resume_from)
            return _work(board, place, tick)
    except Ended as end:
        if number == 0 and end.outcome.code == 0:
            credentials.remove(recipe.run.dir)
        log.log(logging.INFO if end.outcome.code == 0 else logging.ERROR, "%s", end)
        return end.outcome.code
    except (StartupError, RecipeError) as error:
        board.settle(Outcome(EXIT_REFUSED, str(error), name))
        raise
    except Exception as error:  # the others must not wait for this node
        board.settle(Outcome(EXIT_FAILED, repr(error), name))
        raise


def _muster(board: Board, number: int, nodes: int, here: Node) -> list[Node]:
    board.post(f"node-{number}", asdict(here))
    try:
        found = board.gather([f"node-{other}" for other in range(nodes)], MUSTER_SECONDS)
    except TimeoutError as missing:
        raise StartupError(
            f"run.dir: after {MUSTER_SECONDS:.0f} s {here.name} sees nothing of {missing} in {board.folder}: every "
            "node has to start, and to see that folder at the same path (a shared file system)"
        ) from None
    return [Node(**each) for each in found]


def _work(board: Board, place: Workplace, tick: Tick) -> int:
    """Raises Ended with how the run ended."""
    if place.redis_url:
        os.environ["RLIF_REDIS_URL"] = place.redis_url
    name, is_head, is_alone = place.here.name, place.number == 0, len(place.nodes) == 1
    services = place.services()
    trainer = next((service for service in services if service.name.startswith("trainer")), None)
    head = _Head(board, place, services) if is_head else None

    def until() -> int | None:
        outcome = board.outcome()
        if outcome:
            if trainer:  # redis may be gone: no time for a checkpoint that nobody would acknowledge
                trainer.stop_seconds = ABANDON_SECONDS
            return outcome.code
        if trainer and board.stop_asked:
            return STOPPED
        return head.look() if head else None

    main = trainer.name if trainer and (is_alone or not is_head) else None
    code = supervise(services, main, place.recipe.run.dir / "logs" / name, tick if is_head else None, until)
    fault = next((service.fault for service in services if service.fault), "")
    if fault:
        board.settle(Outcome(code, fault, name))
    elif trainer and not is_head and (code == 0 or board.stop_asked):
        board.post(f"finished-{place.number}", {"code": code})
        try:
            board.gather(["outcome"], END_SECONDS)
        except TimeoutError:
            log.error("node %s has finished, but the first node did not end the run", name)
            return code or EXIT_FAILED
    raise Ended(board.settle(Outcome(*_end(place.recipe.run.dir, code), name)))


def _end(run_dir: Path, code: int) -> tuple[int, str]:
    """The run's exit code and its reason, by the trainer's exit code."""
    if code:
        return code, f"stopped with exit code {code}"
    why = why_stopped(run_dir)
    return (EXIT_FAILED, f"stopped {why}") if why else (0, DONE)


class _Head:
    """What the first node looks after for all: servers that never get ready, trainers that have finished."""

    def __init__(self, board: Board, place: Workplace, services: list[Service]):
        self.board, self.name, self.run_dir = board, place.here.name, place.recipe.run.dir
        self.readiness = Readiness(place.servers("rollout") | place.servers("reward"))
        self.elsewhere = [f"finished-{number}" for number in place.plan.trainer_nodes if number != 0]
        self.orchestrator = next(service for service in services if service.name == "orchestrator")
        self.orchestrator.start_when = lambda: not self.readiness.waiting
        self.trainer_here = next((service for service in services if service.name.startswith("trainer")), None)
        self.finished_at: float | None = None

    def look(self) -> int | None:
        """An exit code when the run is over."""
        overdue = self.readiness.overdue
        if overdue:
            return self._settle(EXIT_FAILED, overdue)
        said = [self.board.read(name) for name in self.elsewhere]
        if not said or None in said or (self.trainer_here and not self.trainer_here.finished):
            return None
        code = max(each["code"] for each in said)
        if code:
            return self._settle(code, "stopped as asked; the next start goes on from the newest checkpoint")
        self.finished_at = self.finished_at or time.monotonic()
        if self.orchestrator.finished or time.monotonic() - self.finished_at > LAST_SECONDS:
            return self._settle(*_end(self.run_dir, 0))
        return None

    def _settle(self, code: int, reason: str) -> int:
        return self.board.settle(Outcome(code, reason, self.name)).code
