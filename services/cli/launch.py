"""From a recipe to the processes of a run on this machine."""

import os
import socket
import sys
from pathlib import Path

from services import recipe as recipes
from services.http import StartupError
from services.recipe import Recipe
from services.supervisor import Service

RLIF = [sys.executable, "-m", "services.cli.main"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _threads(count: int | None) -> dict[str, str]:
    return {} if count is None else {"OMP_NUM_THREADS": str(count)}


def _server(kind: str, number: int, port: int, resolved: Path, threads: int | None) -> Service:
    argv = [*RLIF, "serve", kind, "--recipe", str(resolved), "--port", str(port)]
    return Service(f"{kind}-{number}", argv, env=_threads(threads))


def _trainer(recipe: Recipe, resolved: Path, resume: bool) -> Service:
    ranks = recipe.trainer.ranks
    if ranks == 1:
        argv = [*RLIF, "train", str(resolved)]
    else:
        argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        argv += ["-m", "services.cli.main", "train", str(resolved)]
    restart_args = ["--resume"]
    if resume:
        argv, restart_args = argv + restart_args, []
    return Service("trainer", argv, env=_threads(recipe.trainer.threads), restart_args=restart_args, may_finish=True)


def prepare_run_dir(recipe: Recipe, resume: bool) -> None:
    """Raises StartupError when the folder belongs to an earlier run and `resume` was not asked for, or the reverse."""
    there = (recipe.run.dir / "recipe.yaml").exists()
    if there and not resume:
        raise StartupError(
            f"run.dir {recipe.run.dir} holds a run already: go on with --resume, or choose another run.dir"
        )
    if resume and not there:
        raise StartupError(f"run.dir {recipe.run.dir} holds no run to resume")
    recipe.run.dir.mkdir(parents=True, exist_ok=True)


def plan(recipe: Recipe, resume: bool) -> tuple[list[Service], Recipe]:
    """The run's processes in order of start, and the recipe with every address filled in (also written to the run's
    folder as `recipe.yaml`). Servers and redis that the recipe gives by URL are left to their owners."""
    prepare_run_dir(recipe, resume)
    run_dir = recipe.run.dir.resolve()
    rollout_ports = [] if recipe.rollout.urls else [free_port() for _ in range(recipe.rollout.replicas)]
    reward_ports = [] if recipe.scorer.urls else [free_port() for _ in range(recipe.scorer.replicas)]
    services = []
    redis_url = recipe.queue.url
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
    resolved.write_text(recipes.dump(filled))
    os.chmod(resolved, 0o600)  # a redis URL may carry a password
    for number, port in enumerate(rollout_ports):
        services.append(_server("rollout", number, port, resolved, recipe.rollout.threads))
    for number, port in enumerate(reward_ports):
        services.append(_server("reward", number, port, resolved, recipe.scorer.threads))
    services.append(_trainer(recipe, resolved, resume))
    services.append(Service("orchestrator", [*RLIF, "orchestrate", str(resolved)], may_finish=True))
    return services, filled
