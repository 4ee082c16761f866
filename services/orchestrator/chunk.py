"""One chunk's way: groups that go in one request to a rollout server, then to a reward server, then to the queue."""

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from services import traces, trail
from services.api import CompletionText, RewardGroup, RolloutRequest
from services.clients import Refused, RewardClient, RolloutClient, ServerFault, pause_before
from services.contract import Group, GroupScores, Sampling, ScoredGroup, Version, group_seed
from services.orchestrator.data import TaskSource
from services.orchestrator.pacing import Pace
from services.orchestrator.progress import GROUPS, SECONDS, RunFailed, Tally, Watch, made_by, newest_of
from services.orchestrator.routing import RETRIES
from services.orchestrator.servers import Servers
from services.queue import GroupQueue, Undone
from services.recipe import Recipe
from services.request import request_id

log = logging.getLogger(__name__)

FAULTS = 3
"""How often a call is tried whose server answers 5xx, or nonsense, before a group is given up."""
BURIED_IN_A_ROW = 10
UNANIMOUS = 1e-6
"""Advantages that differ by no more say the same of every completion."""
NOT_OF_THE_GROUP = (401, 403, 404, 405)
"""Refusals that speak of the caller's token or of the address, and would bury one group after the other."""

Answer = TypeVar("Answer")


class Identified(Protocol):
    group_id: str


Item = TypeVar("Item", bound=Identified)


@dataclass
class Desk:
    """What every chunk needs."""

    recipe: Recipe
    source: TaskSource
    pace: Pace
    queue: GroupQueue
    servers: Servers
    watch: Watch
    tally: Tally
    refills: tuple[Version | None, int] = (None, 0)
    """Groups left out since a version was published."""

    def matches(self, client: RewardClient) -> bool:
        """Whether that server is to score no group by older weights than made it."""
        follow = self.recipe.scorer.follow
        # A repeatable run must not depend on how soon the scorer noticed a new version either.
        wanted = follow == "match" or (follow == "online" and self.recipe.run.deterministic)
        return wanted and self.servers.has_scorer(client)

    def required(self, index: int) -> Version:
        """The oldest weights that may make group `index`: of this lineage, at most `max_staleness` steps back."""
        step = self.pace.required_step(index, self.watch.dead_below(index))
        return Version(lineage=self.watch.lineage, version=step)


@dataclass
class Chunk:
    """`floor` is the lowest step its groups may be made by; `waiting` for the trainer, with nothing at a server."""

    indices: list[int]
    floor: int
    waiting: bool = False


async def finish(chunk: Chunk, desk: Desk) -> None:
    """Bring every group of the chunk into the queue, or to the dead letters.

    Groups made by weights older than required (the trainer fell back to a checkpoint meanwhile) are asked for again.
    Raises RunFailed, StartupError, or a CallError when no server could be used.
    """
    indices = chunk.indices
    desk.tally.note_in_flight(len(indices))
    request_id.set(uuid.uuid4().hex)  # of all the chunk's calls, and in both servers' logs
    try:
        while indices:
            # Waiting for the weights is no part of the groups' way.
            least = await _weights(chunk, desk, indices)
            ids = [desk.source.group_id(index) for index in indices]
            spec = desk.servers.spec_name
            with traces.span("chunk", parent="", group_ids=ids, spec=spec, weight_version=str(least)):
                left = await _once(desk, indices, least)
            if left:
                GROUPS.labels("stale").inc(len(left))
                log.info("%d groups were made by weights of an outlived lineage: asking again", len(left))
            desk.tally.note_in_flight(len(left) - len(indices))
            indices = left
    finally:
        desk.tally.note_in_flight(-len(indices))


async def _once(desk: Desk, indices: list[int], least: Version) -> list[int]:
    """The groups' whole way, once; returns those that have to be asked for again."""
    groups = await _generate(desk, indices, least)
    fresh = [group for group in groups if made_by(group) >= desk.required(group.index)]
    scored = await _score(desk, fresh)
    # Scoring took a while: the lineage may have changed again.
    ready = [group for group in scored if made_by(group) >= desk.required(group.index)]
    kept = {group.group_id for group in scored}
    done = {group.index for group in fresh if group.group_id not in kept}
    for group in ready:
        try:
            if _is_refilled(desk, group):
                await _leave_out(desk, group)
            else:
                await _push(desk, group)
        except Undone as undone:
            log.info("%s: asking again", undone)
        else:
            done.add(group.index)
    return [group.index for group in groups if group.index not in done]


def _is_refilled(desk: Desk, group: ScoredGroup) -> bool:
    """Whether dynamic sampling leaves the group out. At most `max_refill` for each group of a step: where hardly any
    group is of two opinions, training on nothing beats waiting for ever."""
    pacing = desk.recipe.pacing
    advantages = [score.advantage for score in group.scores if score.valid]
    if not pacing.dynamic_sampling or (advantages and max(advantages) - min(advantages) > UNANIMOUS):
        return False
    version, count = desk.refills
    if version != desk.watch.version:
        version, count = desk.watch.version, 0
    most = int(pacing.max_refill * desk.recipe.trainer.groups_per_step)
    if count == most:
        log.warning("%d unanimous groups since weights %s: from now on they are trained on", count, version)
    desk.refills = (version, count + 1)
    return count < most


async def _weights(chunk: Chunk, desk: Desk, indices: list[int]) -> Version:
    """The newest weights, once they are new enough for the chunk."""
    chunk.waiting = True
    while True:
        required = max(desk.required(index) for index in indices)
        if desk.watch.version is not None and desk.watch.version >= required:
            chunk.waiting, chunk.floor = False, desk.watch.version.version
            return desk.watch.version
        chunk.floor = required.version
        await asyncio.sleep(desk.watch.poll_seconds)


async def _generate(desk: Desk, indices: list[int], least: Version) -> list[Group]:
    rollout, deadline = desk.recipe.rollout, desk.recipe.rollout.deadline_seconds
    place = {desk.source.group_id(index): index for index in indices}

    def request(group_id: str, index: int) -> RolloutRequest:
        task = desk.source.task(index)
        seed = group_seed(desk.recipe.run.seed, group_id) if desk.recipe.run.deterministic else rollout.sampling.seed
        return RolloutRequest(
            group_id=group_id,
            messages=task.messages,
            prompt=task.prompt,
            n=rollout.group_size,
            sampling=Sampling(**{**rollout.sampling.model_dump(), "seed": seed}),
            min_weight_version=least,
        )

    async def ask(requests: list[RolloutRequest]) -> list[Group]:
        async def call(client: RolloutClient) -> list[Group]:
            response = await client.rollouts(requests, deadline)
            made = [
                group.of(desk.source.task(place[group.group_id]), request.sampling, index=place[group.group_id])
                for request, group in zip(requests, response.groups, strict=True)
            ]
            oldest = min(made_by(group) for group in made)
            if oldest < least:
                raise ServerFault(client.url, f"made by weights {oldest}, {least} were asked for", "version")
            return made

        ids = [asked.group_id for asked in requests]
        with traces.span("rollout call", "client", group_ids=ids, weight_version=str(least)):
            return await _timed("rollout", desk.servers.rollouts.call(call))

    requests = [request(group_id, index) for group_id, index in place.items()]
    return await _ask_each(desk, "rollout", requests, lambda item: place[item.group_id], ask)


async def _score(desk: Desk, groups: list[Group]) -> list[ScoredGroup]:
    deadline, spec = desk.recipe.scorer.deadline_seconds, desk.servers.spec_name

    async def ask(groups: list[Group]) -> list[ScoredGroup]:
        async def call(client: RewardClient) -> list[GroupScores]:
            bodies = [reward_body(group, desk.matches(client)) for group in groups]
            try:
                scores = (await client.rewards(bodies, spec, deadline)).groups
            except Refused as error:
                if "spec" not in error.fields:
                    raise
                # It was restarted without a memory, or somebody deleted the spec.
                await desk.servers.install_specs(client)
                scores = (await client.rewards(bodies, spec, deadline)).groups
            for body, score in zip(bodies, scores, strict=True):
                served, least = score.scorer_weight_version, body.min_weight_version
                if served and least and served < least:
                    raise ServerFault(client.url, f"scored by weights {served}, {least} were asked for", "version")
            return scores

        ids = [group.group_id for group in groups]
        with traces.span("reward call", "client", group_ids=ids, spec=spec):
            scores = await _timed("reward", desk.servers.rewards.call(call))
        return [ScoredGroup.join(group, score) for group, score in zip(groups, scores, strict=True)]

    return await _ask_each(desk, "reward", groups, lambda item: item.index, ask) if groups else []


def reward_body(group: Group, matched: bool = False) -> RewardGroup:
    """What a reward server is sent of a group. `matched`: it is to be scored by no older weights than made it."""
    return RewardGroup(
        group_id=group.group_id,
        task=group.task,
        prompt_token_ids=group.prompt_token_ids,
        completions=[
            CompletionText(text=made.text, token_ids=made.token_ids, finish_reason=made.finish_reason)
            for made in group.completions
        ],
        weight_version=newest_of(group),
        min_weight_version=newest_of(group) if matched else None,
    )


async def _ask_each(
    desk: Desk,
    service: str,
    items: list[Item],
    index: Callable[[Item], int],
    ask: Callable[[list[Item]], Awaitable[list[Answer]]],
) -> list[Answer]:
    """`ask` for all at once; if that is refused, one by one, so that only those refused by themselves are given up."""
    try:
        return await _insist(service, items, ask)
    except (Refused, ServerFault) as error:
        if isinstance(error, Refused) and error.status in NOT_OF_THE_GROUP:
            raise RunFailed(f"the {service} server cannot be used: {error}") from error
        if len(items) == 1:
            await _bury(desk, items[0].group_id, index(items[0]), f"{service}: {error}")
            return []
        log.warning("%d groups are asked for one by one: %s", len(items), error)
    return [answer for item in items for answer in await _ask_each(desk, service, [item], index, ask)]


async def _insist(
    service: str, items: list[Item], ask: Callable[[list[Item]], Awaitable[list[Answer]]]
) -> list[Answer]:
    for attempt in range(1, FAULTS):
        try:
            return await ask(items)
        except ServerFault as error:
            pause = pause_before(attempt)
            RETRIES.labels(service, error.cause).inc()
            log.warning("%s; trying again in %.1f s", error, pause)
            await asyncio.sleep(pause)
    return await ask(items)


async def _timed(service: str, call: Awaitable[Answer]) -> Answer:
    started = time.perf_counter()
    answer = await call
    SECONDS.labels(service).observe(time.perf_counter() - started)
    return answer


async def _push(desk: Desk, group: ScoredGroup) -> None:
    made = made_by(group)
    with traces.span("queue push", "producer", group_id=group.group_id, weight_version=str(made)):
        is_new = await desk.queue.push(group)
    if is_new:
        await _keep(desk, group)
        desk.tally.note_pushed(group, desk.watch.version or made)
        trail.note("is pushed", group.group_id, index=group.index, spec_id=group.spec_id, weight_version=made)
    else:
        GROUPS.labels("duplicate").inc()


async def _keep(desk: Desk, group: ScoredGroup) -> None:
    """For the console's samples."""
    if desk.recipe.tracking.groups_kept:
        await desk.queue.keep(group, desk.recipe.tracking.groups_kept)


async def _leave_out(desk: Desk, group: ScoredGroup) -> None:
    if await desk.queue.leave_out(group.group_id, group.index):
        await _keep(desk, group)
        GROUPS.labels("unanimous").inc()
        desk.tally.left_out += 1
    # It was made and scored: the servers work.
    desk.tally.buried_in_a_row = 0
    await desk.watch.refresh()


async def _bury(desk: Desk, group_id: str, index: int, reason: str) -> None:
    if await desk.queue.bury(group_id, index, reason):
        GROUPS.labels("buried").inc()
        desk.tally.buried += 1
    desk.tally.buried_in_a_row += 1
    if desk.tally.buried_in_a_row > BURIED_IN_A_ROW:
        raise RunFailed(f"{desk.tally.buried_in_a_row} groups in a row failed for good, the last one: {reason}")
    await desk.watch.refresh()
