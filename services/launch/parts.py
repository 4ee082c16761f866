"""The processes of one node: each part of the plan as the command that `rlif up` and the README name."""

import os
from dataclasses import dataclass
from pathlib import Path

from services.address import bound, free_port
from services.cli.launch import RLIF, environment
from services.launch.plan import Part, Plan
from services.recipe import Recipe
from services.redis import DURABLE, server_binary
from services.run_folder import private_folder, write_private
from services.startup import StartupError
from services.supervisor import CHECKPOINT_SECONDS, Service

TRAINER_RESTARTS = 3
"""A rank that dies makes all ranks start again from the newest checkpoint, this often in a row."""


@dataclass(frozen=True)
class Node:
    """A node as the others reach it. `ports` by part name, free ones that it chose."""

    name: str
    host: str
    ports: dict[str, int]

    def address(self, part: str) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.ports[part]}"


def choose_ports(plan: Plan, number: int, host: str) -> dict[str, int]:
    """A free port for every part of the node that others call."""
    return {part.name: free_port(bound(host)) for part in plan.nodes[number] if part.kind != "orchestrator"}


@dataclass(frozen=True)
class Workplace:
    """One node's view: what is planned, who is there, where the recipe lies."""

    recipe: Recipe
    recipe_path: Path
    plan: Plan
    nodes: list[Node]
    number: int
    attempt: str
    password: str
    """Of the run's own redis."""
    resume_from: Path | None = None
    """A model folder to begin with where there is no checkpoint."""

    @property
    def here(self) -> Node:
        return self.nodes[self.number]

    @property
    def redis_url(self) -> str | None:
        """Of the run's own redis; none when the recipe or RLIF_REDIS_URL names another."""
        found = next(self.plan.of("redis"), None)
        return f"redis://:{self.password}@{self.nodes[found[0]].address('redis')}/0" if found else None

    def servers(self, kind: str) -> dict[str, str]:
        """URLs of the run's own servers of a kind, by part name."""
        return {part.name: f"http://{self.nodes[number].address(part.name)}" for number, part in self.plan.of(kind)}

    def services(self) -> list[Service]:
        """Raises StartupError: fewer GPUs here than planned, or a file that cannot be written."""
        return [self._service(part) for part in self.plan.nodes[self.number]]

    def _service(self, part: Part) -> Service:
        makers = {"redis": self._redis, "orchestrator": self._orchestrator, "trainer": self._trainer}
        return makers.get(part.kind, self._server)(part)

    def _redis(self, part: Part) -> Service:
        directory = self.recipe.run.dir / "redis"
        settings = {
            "bind": bound(self.here.host),
            "port": self.here.ports[part.name],
            "requirepass": self.password,
            "dir": f'"{directory}"',
            **{key: value or '""' for key, value in DURABLE.items()},
        }
        file = directory / "redis.conf"
        try:
            binary = server_binary()
            private_folder(directory)
            write_private(file, "".join(f"{key} {value}\n" for key, value in settings.items()))
        except OSError as error:
            raise StartupError(f"run.dir: cannot write {file}: {error.strerror}") from error
        except RuntimeError as error:
            raise StartupError(str(error)) from error
        return Service(part.name, [binary, str(file)])

    def _server(self, part: Part) -> Service:
        section = self.recipe.rollout if part.kind == "rollout" else self.recipe.scorer
        argv = [*RLIF, "serve", part.kind, "--recipe", str(self.recipe_path)]
        argv += ["--host", bound(self.here.host), "--port", str(self.here.ports[part.name])]
        return Service(part.name, argv, env=environment(self.recipe, section.threads, self._devices(part)))

    def _orchestrator(self, part: Part) -> Service:
        rollouts = self.recipe.rollout.urls or self.servers("rollout").values()
        rewards = self.recipe.scorer.urls or self.servers("reward").values()
        argv = [*RLIF, "orchestrate", str(self.recipe_path)]
        argv += [f"rollout.urls=[{', '.join(rollouts)}]", f"scorer.urls=[{', '.join(rewards)}]"]
        return Service(part.name, argv, env={"RLIF_STATUS_HOST": bound(self.here.host)}, may_finish=True)

    def _trainer(self, part: Part) -> Service:
        first, first_part = next(self.plan.of("trainer"))
        argv = [*RLIF, "train", str(self.recipe_path), "--resume"]
        argv += ["--resume-from", str(self.resume_from)] if self.resume_from else []
        argv += ["--nodes", str(len(self.plan.trainer_nodes)), "--node-rank", str(part.number)]
        argv += ["--leader", self.nodes[first].address(first_part.name)]
        env = environment(self.recipe, self.recipe.trainer.threads, self._devices(part))
        env["RLIF_STATUS_HOST"] = bound(self.here.host)
        return Service(
            part.name,
            argv,
            env=env,
            may_finish=True,
            max_restarts=TRAINER_RESTARTS,
            stop_seconds=CHECKPOINT_SECONDS + 10,
        )

    def _devices(self, part: Part) -> list[str] | None:
        """Names of the part's GPUs among those that this process may use; none where the plan knows no GPUs."""
        if not self.plan.gpus_per_node:
            return None
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = shown.split(",") if shown else [str(number) for number in range(self.plan.gpus_per_node)]
        if len(names) < self.plan.gpus_per_node:
            raise StartupError(
                f"node {self.here.name}: {len(names)} GPUs (CUDA_VISIBLE_DEVICES={shown}), planned are "
                f"{self.plan.gpus_per_node}"
            )
        return [names[place] for place in part.gpus]
