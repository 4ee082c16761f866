"""From a recipe to the processes of a run on this machine."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from services import recipe as recipes
from services.address import free_port
from services.recipe import Recipe
from services.run_folder import clear_untrained, write_private
from services.startup import StartupError
from services.supervisor import CHECKPOINT_SECONDS, Service

RLIF = [sys.executable, "-m", "services.cli.main"]


def environment(recipe: Recipe, threads: int | None, gpus: Sequence[int | str] | None = None) -> dict[str, str]:
    """What a process gets beside our own environment, which wins where it says something."""
    wanted = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # their output goes to log files
    # Idle OpenMP threads spin, and with several processes on the same cores they spin in each other's way: asleep where
    # generation overlaps training (3.6 s -> 1.2 s a step in benchmarks/step.py), briefly where they take turns.
    wanted |= {"OMP_WAIT_POLICY": "PASSIVE"} if recipe.pacing.max_staleness else {"GOMP_SPINCOUNT": "10000"}
    wanted = {key: value for key, value in wanted.items() if key not in os.environ}
    if gpus is not None:
        wanted["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    return wanted if threads is None else {**wanted, "OMP_NUM_THREADS": str(threads)}


def share(gpus: list[int] | None, number: int, replicas: int) -> list[int] | None:
    """The devices of replica `number`."""
    if gpus is None:
        return None
    size = len(gpus) // replicas
    return gpus[number * size : (number + 1) * size]


def _server(kind: str, number: int, port: int, resolved: Path, env: dict[str, str]) -> Service:
    argv = [*RLIF, "serve", kind, "--recipe", str(resolved), "--port", str(port)]
    return Service(f"{kind}-{number}", argv, env=env)


def _trainer(recipe: Recipe, resolved: Path, resume: bool) -> Service:
    argv = [*RLIF, "train", str(resolved)]
    restart_args = ["--resume"]
    if resume:
        argv, restart_args = argv + restart_args, []
    env = environment(recipe, recipe.trainer.threads, recipe.trainer.gpus)
    stop_seconds = CHECKPOINT_SECONDS + 10
    return Service("trainer", argv, env=env, restart_args=restart_args, may_finish=True, stop_seconds=stop_seconds)


def plan(recipe: Recipe, resume: bool) -> tuple[list[Service], Recipe, int]:
    """The run's processes in order of start, the recipe with every address filled in (also written to the run's
    folder as `recipe.yaml`), and the console's port. Servers and redis that the recipe gives by URL are left to their
    owners."""
    run_dir = recipe.run.dir.resolve()
    if not resume:
        clear_untrained(run_dir)
    rollout_ports = [] if recipe.rollout.urls else [free_port() for _ in range(recipe.rollout.replicas)]
    reward_ports = [] if recipe.scorer.urls else [free_port() for _ in range(recipe.scorer.replicas)]
    services = []
    redis_url = recipes.redis_url(recipe)
    if redis_url is None:
        from services.redis import EmbeddedRedis

        redis = EmbeddedRedis(run_dir / "redis")
        redis_url = redis.url
        services.append(Service("redis", redis.argv))
    tree = recipe.model_dump(mode="json")
    tree["run"]["dir"] = str(run_dir)
    tree["queue"]["url"] = redis_url
    tree["rollout"]["urls"] = recipe.rollout.urls or [f"http://127.0.0.1:{port}" for port in rollout_ports]
    tree["scorer"]["urls"] = recipe.scorer.urls or [f"http://127.0.0.1:{port}" for port in reward_ports]
    filled = recipes.parse(tree)
    resolved = run_dir / "recipe.yaml"
    try:
        write_private(resolved, recipes.dump(filled))
    except OSError as error:
        raise StartupError(f"cannot write {resolved}: {error.strerror}") from error
    for number, port in enumerate(rollout_ports):
        gpus = share(recipe.rollout.gpus, number, recipe.rollout.replicas)
        env = environment(recipe, recipe.rollout.threads, gpus)
        services.append(_server("rollout", number, port, resolved, env))
    for number, port in enumerate(reward_ports):
        gpus = share(recipe.scorer.gpus, number, recipe.scorer.replicas)
        env = environment(recipe, recipe.scorer.threads, gpus)
        services.append(_server("reward", number, port, resolved, env))
    services.append(_trainer(recipe, resolved, resume))
    port = free_port() if recipe.tracking.metrics_port is None else recipe.tracking.metrics_port + 1
    argv = [*RLIF, "orchestrate", str(resolved), "--port", str(port)]
    services.append(Service("orchestrator", argv, may_finish=True))
    return services, filled, port
