"""Who runs where: a recipe, a number of nodes and their GPUs -> the parts of every node, for Slurm and Ray alike.

The rollout and reward servers are packed onto the first nodes, in order, each whole on one node; the nodes after them
train, with one rank a GPU (one a node without GPUs). On a single node the trainer gets the GPUs the servers leave. The
first node also holds redis and the orchestrator.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from services import recipe as recipes
from services.recipe import Recipe, RecipeError


@dataclass(frozen=True)
class Part:
    """One process (the trainer: one launcher of ranks) on a node. `gpus` are places among the node's GPUs."""

    kind: str
    number: int = 0
    gpus: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.number}" if self.kind in ("rollout", "reward", "trainer") else self.kind

    @property
    def on(self) -> str:
        """Name and GPUs, for people."""
        return f"{self.name} (GPU {','.join(map(str, self.gpus))})" if self.gpus else self.name


@dataclass(frozen=True)
class Plan:
    """`nodes[n]` are the parts of node n, in order of start."""

    nodes: tuple[tuple[Part, ...], ...]
    gpus_per_node: int
    ranks_per_node: int

    @property
    def ranks(self) -> int:
        return len(self.trainer_nodes) * self.ranks_per_node

    @property
    def trainer_nodes(self) -> list[int]:
        return [number for number, _ in self.of("trainer")]

    def of(self, *kinds: str) -> Iterator[tuple[int, Part]]:
        """(node, part) of every part of these kinds, in order of node."""
        for number, parts in enumerate(self.nodes):
            yield from ((number, part) for part in parts if part.kind in kinds)

    def table(self) -> list[str]:
        """One line a node; nodes that train alike share one."""
        lines: list[str] = []
        alone = [number for number, parts in enumerate(self.nodes) if [part.kind for part in parts] == ["trainer"]]
        for number, parts in enumerate(self.nodes):
            if number not in alone:
                lines.append(f"node {number}: " + ", ".join(part.on for part in parts))
        if alone:
            where = f"node {alone[0]}" if len(alone) == 1 else f"nodes {alone[0]}-{alone[-1]}"
            device = "GPU" if self.gpus_per_node else "CPU process"
            each = f"{self.ranks_per_node} {device}{'s' if self.ranks_per_node > 1 else ''} a node"
            lines.append(f"{where}: trainer, {self.ranks} rank{'s' if self.ranks > 1 else ''} ({each})")
        return lines


def _servers(recipe: Recipe, gpus_per_node: int) -> list[tuple[Part, int]]:
    """The servers this run starts for itself, and how many GPUs each takes."""
    wanted = []
    for kind, section in (("rollout", recipe.rollout), ("reward", recipe.scorer)):
        takes = section.tensor_parallel_size if gpus_per_node and section.device != "cpu" else 0
        if takes > gpus_per_node:
            key = "rollout" if kind == "rollout" else "scorer"
            raise RecipeError(
                f"{key}.tensor_parallel_size: {takes}, but a node has {gpus_per_node} GPUs and a server stays on one "
                f"node; choose at most {gpus_per_node}"
            )
        if not section.urls:
            wanted += [(Part(kind, number), takes) for number in range(section.replicas)]
    return wanted


def _pack(servers: list[tuple[Part, int]], gpus_per_node: int) -> list[list[Part]]:
    """First fit, in order. Without GPUs one node holds all."""
    nodes: list[list[Part]] = []
    used: list[int] = []
    for part, takes in servers:
        place = next((n for n, taken in enumerate(used) if taken + takes <= gpus_per_node), len(nodes))
        if place == len(nodes):
            nodes.append([])
            used.append(0)
        nodes[place].append(Part(part.kind, part.number, tuple(range(used[place], used[place] + takes))))
        used[place] += takes
    return nodes


def _refuse_gpus(recipe: Recipe) -> None:
    for key in ("rollout", "scorer", "trainer"):
        gpus = getattr(recipe, key).gpus
        if gpus is not None:
            raise RecipeError(
                f"{key}.gpus: {gpus} is for `rlif up`; on a cluster the plan deals the GPUs: leave it out"
            )


def make(recipe: Recipe, nodes: int, gpus_per_node: int) -> Plan:
    """The plan. Raises RecipeError naming the numbers: servers that do not fit, no node left to train on, completions
    of a step that are fewer than the ranks, `trainer.ranks` that says otherwise."""
    _refuse_gpus(recipe)
    servers = _servers(recipe, gpus_per_node)
    serving = _pack(servers, gpus_per_node)
    on_cpu = not gpus_per_node or recipe.trainer.device == "cpu"
    if nodes == 1:
        taken = sum(takes for _, takes in servers)
        left = gpus_per_node - taken
        if not on_cpu and left < 1:
            raise RecipeError(
                f"--nodes 1: the servers take {taken} GPUs of the node's {gpus_per_node}, which leaves none to train "
                f"on; use --nodes {len(serving) + 1} or more"
            )
        gpus = () if on_cpu else tuple(range(taken, gpus_per_node))
        trainers = {0: Part("trainer", 0, gpus)}
        ranks_per_node = 1 if on_cpu else left
    else:
        if len(serving) >= nodes:
            raise RecipeError(
                f"--nodes {nodes}: the servers ({recipe.rollout.replicas} x {recipe.rollout.tensor_parallel_size} GPUs "
                f"for rollouts, {recipe.scorer.replicas} x {recipe.scorer.tensor_parallel_size} for the scorer) take "
                f"{len(serving)} nodes of {gpus_per_node} GPUs, which leaves none to train on; use --nodes "
                f"{len(serving) + 1} or more"
            )
        gpus = () if on_cpu else tuple(range(gpus_per_node))
        trainers = {node: Part("trainer", node - len(serving), gpus) for node in range(len(serving), nodes)}
        ranks_per_node = 1 if on_cpu else gpus_per_node
    parts: list[list[Part]] = [list(serving[node]) if node < len(serving) else [] for node in range(nodes)]
    for node, part in trainers.items():
        parts[node].append(part)
    parts[0] = [*([] if recipes.redis_url(recipe) else [Part("redis")]), *parts[0], Part("orchestrator")]
    plan = Plan(tuple(map(tuple, parts)), gpus_per_node, ranks_per_node)
    _check_ranks(recipe, plan)
    return plan


def _check_ranks(recipe: Recipe, plan: Plan) -> None:
    trainer, group_size = recipe.trainer, recipe.rollout.group_size
    made_of = f"{len(plan.trainer_nodes)} trainer node(s) x {plan.ranks_per_node}"
    if "ranks" in trainer.model_fields_set and trainer.ranks != plan.ranks:
        raise RecipeError(
            f"trainer.ranks: {trainer.ranks}, but {made_of} make {plan.ranks}; leave it out (the plan fills it in)"
        )
    completions = trainer.groups_per_step * group_size
    if completions < plan.ranks:
        raise RecipeError(
            f"trainer.groups_per_step x rollout.group_size: {trainer.groups_per_step} x {group_size} = {completions} "
            f"completions leave some of {plan.ranks} ranks ({made_of}) without any; raise trainer.groups_per_step, or "
            "give fewer --nodes or --gpus-per-node"
        )


def fill(recipe: Recipe, plan: Plan) -> Recipe:
    """The recipe with an absolute `run.dir` and `trainer.ranks`, as every node reads it."""
    tree = recipe.model_dump(mode="json")
    tree["run"]["dir"] = str(recipe.run.dir.resolve())
    tree["trainer"]["ranks"] = plan.ranks
    return recipes.parse(tree)
