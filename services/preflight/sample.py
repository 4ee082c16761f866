"""Answers to the tasks by the recipe's own servers, scored: the same two calls that training makes."""

import asyncio
import logging
from collections.abc import Callable, Sequence

from services import recipe as recipes
from services.api import RolloutRequest
from services.clients import Refused, RewardClient, RolloutClient, ServerFault
from services.contract import Group, ScoredGroup, Task, group_id, group_seed
from services.orchestrator.chunk import NOT_OF_THE_GROUP, reward_body
from services.orchestrator.servers import Servers
from services.recipe import Recipe
from services.spec import RewardSpec

log = logging.getLogger(__name__)

SUFFIX = ".preflight"
LONGEST_NAME = 64

Done = Callable[[int], None]


def with_spec(recipe: Recipe, spec: RewardSpec) -> Recipe:
    """The recipe as the preflight's servers read it: its rewards replaced, under a name that no run's spec goes by, and
    without an evaluation. Raises RecipeError."""
    tree = recipe.model_dump(mode="json")
    tree["run"]["name"] = recipe.run.name[: LONGEST_NAME - len(SUFFIX)] + SUFFIX
    tree["rewards"] = [term.model_dump(mode="json") for term in spec.rewards]
    tree["combine"] = spec.combine.model_dump(mode="json")
    tree["evaluation"] = None
    return recipes.parse(tree)


async def sample(
    recipe: Recipe, tasks: Sequence[Task], name: str, samples: int, servers: Servers, done: Done
) -> list[ScoredGroup]:
    """`samples` scored completions of every task, but for tasks that a server refuses. `name` is the prompt's: it and
    the recipe's seed decide what is drawn. `done` hears of every task.

    Raises CallError when a server cannot be used, StartupError when it cannot score by the spec.
    """
    slots = asyncio.Semaphore(recipe.pacing.max_requests_in_flight)
    size = recipe.rollout.groups_per_request

    async def batch(some: Sequence[Task]) -> list[ScoredGroup]:
        try:
            async with slots:
                return await _score(recipe, servers, await _answer(recipe, servers, some, name, samples))
        except (Refused, ServerFault) as error:
            if isinstance(error, Refused) and error.status in NOT_OF_THE_GROUP:
                raise
            if len(some) == 1:
                log.warning("task %s is left out: %s", some[0].task_id, error)
                return []
        return [group for task in some for group in await batch([task])]

    async def counted(some: Sequence[Task]) -> list[ScoredGroup]:
        found = await batch(some)
        done(len(some))
        return found

    parts = await asyncio.gather(*(counted(tasks[start : start + size]) for start in range(0, len(tasks), size)))
    return [group for part in parts for group in part]


async def _answer(recipe: Recipe, servers: Servers, tasks: Sequence[Task], name: str, samples: int) -> list[Group]:
    requests = []
    for task in tasks:
        group = group_id(f"{recipe.run.name}/{name}", 0, task.task_id)
        sampling = recipe.rollout.sampling.model_copy(update={"seed": group_seed(recipe.run.seed, group)})
        requests.append(
            RolloutRequest(group_id=group, messages=task.messages, prompt=task.prompt, n=samples, sampling=sampling)
        )

    async def ask(client: RolloutClient) -> list[Group]:
        response = await client.rollouts(requests, recipe.rollout.deadline_seconds)
        return [
            group.of(task, request.sampling)
            for task, request, group in zip(tasks, requests, response.groups, strict=True)
        ]

    return await servers.rollouts.call(ask)


async def _score(recipe: Recipe, servers: Servers, groups: list[Group]) -> list[ScoredGroup]:
    bodies = [reward_body(group) for group in groups]

    async def ask(client: RewardClient) -> list[ScoredGroup]:
        response = await client.rewards(bodies, servers.spec_name, recipe.scorer.deadline_seconds)
        return [ScoredGroup.join(group, score) for group, score in zip(groups, response.groups, strict=True)]

    return await servers.rewards.call(ask)
