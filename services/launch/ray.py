"""A run on a Ray cluster: one placement-group bundle and one actor a node, with the node's parts as child processes.

The actor starts `rlif launch node`, the same command a Slurm task is; the nodes meet on the run's board. A node that is
lost ends the start, and the next one goes on from the newest checkpoint on whatever nodes there are.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from services.launch.plan import Plan
from services.recipe import Recipe
from services.startup import StartupError
from services.supervisor import EXIT_FAILED, die_with_parent

log = logging.getLogger(__name__)

NODES_SECONDS = 300.0
"""How long to wait for nodes that are free (an autoscaler may have to start them)."""
CONNECT_SECONDS = 10.0
CALL_SECONDS = 60.0
END_SECONDS = 300.0
"""How long the other nodes may go on after the first has ended: all end together, unless one was killed."""
STARTS = 4


class NodeLost(Exception):
    """An actor, or the machine under it, is gone."""


class NodeProcess:
    """The actor of one node: starts the node's command and tells what became of it."""

    def address(self) -> tuple[str, str]:
        """(host name and Ray's id of the node, address by which the other nodes reach it)."""
        node = ray.get_runtime_context().get_node_id()
        return f"{socket.gethostname()}-{node[:6]}", ray.util.get_node_ip_address()

    def start(self, argv: list[str], folder: str, threads: str | None) -> None:
        env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        if threads is not None:  # Ray sets it to the actor's CPUs; the parts set their own
            env["OMP_NUM_THREADS"] = threads
        self.process = subprocess.Popen(argv, cwd=folder, env=env, preexec_fn=die_with_parent)

    def poll(self) -> int | None:
        code = self.process.poll()
        return 128 - code if code is not None and code < 0 else code

    def terminate(self) -> None:
        self.process.terminate()


def connect(address: str) -> None:
    """Raises StartupError: there is no cluster."""
    try:
        host, _, port = address.rpartition(":")
        if host and port.isdigit() and "://" not in address:
            # Ray itself goes on trying for many minutes.
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(address=address, namespace="rlif", logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise StartupError(
            f"--address {address}: no Ray cluster answers ({reason}); start one (`ray start --head`) or name it"
        ) from error


def _reserve(recipe: Recipe, plan: Plan) -> Any:
    """Raises StartupError: not as many free nodes."""
    bundle = {"CPU": 1.0, **({"GPU": float(plan.gpus_per_node)} if plan.gpus_per_node else {})}
    group = placement_group([bundle] * len(plan.nodes), strategy="STRICT_SPREAD", name=f"rlif-{recipe.run.name}")
    if group.wait(NODES_SECONDS):
        return group
    remove_placement_group(group)
    there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    have = ", ".join(f"{each.get('CPU', 0):g} CPU/{each.get('GPU', 0):g} GPU" for each in there)
    raise StartupError(
        f"--nodes {len(plan.nodes)} --gpus-per-node {plan.gpus_per_node}: the Ray cluster had not as many free nodes "
        f"within {NODES_SECONDS:.0f} s; it has {len(there)} ({have})"
    )


def _actors(attempt: str, plan: Plan, group: Any) -> list[Any]:
    made = ray.remote(NodeProcess)
    return [
        made.options(
            name=f"rlif-{attempt}-{number}",
            num_cpus=1,
            num_gpus=plan.gpus_per_node,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number),
        ).remote()
        for number in range(len(plan.nodes))
    ]


def _ask(calls: list[Any], seconds: float = CALL_SECONDS) -> list[Any]:
    try:
        return ray.get(calls, timeout=seconds)
    except (RayActorError, GetTimeoutError) as error:
        raise NodeLost(str(error).strip().splitlines()[0]) from error


class Driver:
    """Carries a plan out on the connected cluster. SIGINT and SIGTERM stop the run with a checkpoint: 130 or 143."""

    def __init__(self, recipe: Recipe, plan: Plan, resume_from: Path | None):
        self.recipe, self.plan, self.resume_from = recipe, plan, resume_from
        self.stop_signal = 0

    def run(self) -> int:
        """Returns the exit code of the run. Raises StartupError when there are not enough nodes."""

        def on_signal(number: int, _frame: object) -> None:
            self.stop_signal = number

        previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for start in range(STARTS):
                try:
                    return self._start(f"ray-{ray.get_runtime_context().get_job_id()}-{start}")
                except NodeLost as error:
                    log.warning("a node is lost (%s); starting again from the newest checkpoint", error)
                    if self.stop_signal:
                        return 128 + self.stop_signal
            log.error("lost a node %d times: giving up", STARTS)
            return EXIT_FAILED
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _start(self, attempt: str) -> int:
        group = _reserve(self.recipe, self.plan)
        actors = _actors(f"{self.recipe.run.name}-{attempt}", self.plan, group)
        try:
            addresses = _ask([actor.address.remote() for actor in actors], NODES_SECONDS)
            threads = os.environ.get("OMP_NUM_THREADS")
            _ask(
                [
                    actor.start.remote(self._argv(number, name, host, attempt), os.getcwd(), threads)
                    for number, (actor, (name, host)) in enumerate(zip(actors, addresses, strict=True))
                ]
            )
            return self._watch(actors, self.recipe.run.dir / "cluster" / attempt / "stop")
        finally:
            for actor in actors:
                ray.kill(actor)  # its child dies with it
            remove_placement_group(group)

    def _argv(self, number: int, name: str, host: str, attempt: str) -> list[str]:
        return [
            sys.executable, "-m", "services.cli.main", "launch", "node", str(self.recipe.run.dir / "recipe.yaml"),
            "--nodes", str(len(self.plan.nodes)), "--gpus-per-node", str(self.plan.gpus_per_node),
            "--number", str(number), "--name", name, "--host", host, "--attempt", attempt,
            *(["--resume-from", str(self.resume_from)] if self.resume_from else []),
        ]  # fmt: skip

    def _watch(self, actors: list[Any], stop: Path) -> int:
        """Until every node has ended. The stop file asks for a checkpoint; SIGTERM comes to those that ignore it."""
        ends: float | None = None
        asked = False
        while True:
            codes = _ask([actor.poll.remote() for actor in actors])
            if None not in codes:
                return 128 + self.stop_signal if self.stop_signal and max(codes) >= 128 else max(codes)
            if self.stop_signal and not asked and stop.parent.exists():
                asked = True
                stop.touch()
                ends = time.monotonic() + END_SECONDS
            if ends is None and any(code is not None for code in codes):
                ends = time.monotonic() + END_SECONDS
            if ends is not None and time.monotonic() > ends:
                log.error("not every node has ended within %.0f s: stopping them", END_SECONDS)
                _ask([actor.terminate.remote() for actor in actors])
                return max(code for code in [*codes, EXIT_FAILED] if code is not None)
            time.sleep(0.5)
