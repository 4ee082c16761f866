"""What another reward spec would have made of the last groups, before it is applied.

The components of these groups were measured; how a spec combines them is asked of the reward server, which computes
nothing anew. A component that the new spec has with other parameters than the spec it was measured by does not count.
"""

import math
from dataclasses import dataclass

import orjson
from pydantic import ValidationError

from services.api import PreviewGroup, SpecEntry
from services.clients import CallError, Refused, RewardClient
from services.console.samples import prompt_of
from services.console.source import Desk
from services.contract import ScoredGroup, Version
from services.orchestrator.progress import made_by
from services.problem import Problem, field_errors
from services.redis import DeadlineExceeded
from services.spec import RewardSpec

GROUPS = 100
ROWS = 10
"""Groups that change most, which are shown one by one."""
MOST_BYTES = 64 * 1024
PREVIEW_SECONDS = 60.0


@dataclass(frozen=True)
class Changed:
    """A group's completions: advantages as they were and as they would be; none for what would not be valid."""

    index: int
    prompt: str
    version: str
    before: list[float | None]
    after: list[float | None]
    moved: float


@dataclass(frozen=True)
class Preview:
    """`agreement`: correlation of the advantages before and after, none where one of them does not vary. `turned`: the
    share of completions whose advantage changes its sign. `missing`: components that were not measured."""

    spec_id: str
    groups: int
    completions: int
    agreement: float | None
    turned: float
    moved: float
    lost: int
    skipped: int
    missing: list[str]
    rows: list[Changed]


def read_spec(text: bytes) -> RewardSpec:
    """Raises Problem (422), naming the field."""
    try:
        return RewardSpec.model_validate(orjson.loads(text))
    except ValidationError as error:
        fault = field_errors(error)[0]
        raise Problem(422, "The reward spec is not valid", fault["message"], fault["field"]) from error
    except (ValueError, RecursionError) as error:
        raise Problem(422, "The reward spec is not JSON", str(error)[:200], "spec") from error


async def preview(desk: Desk, spec: RewardSpec) -> Preview:
    """Raises Problem: the spec cannot be computed there (422), nothing is kept or no server is known (409), or it does
    not answer (503)."""
    if not desk.rewards:
        raise Problem(409, "No reward server is known here", "give its address with --reward")
    groups = await desk.samples.last(GROUPS)
    if not groups:
        raise Problem(409, "There are no groups yet", "the preview needs scored groups (tracking.groups_kept)")
    try:
        known = {spec_id: await _spec_of(desk, spec_id) for spec_id in {group.spec_id for group in groups}}
        bodies = [_body(group, spec, known[group.spec_id]) for group in groups]
        answer = await desk.rewards[0].preview_spec(spec, bodies, PREVIEW_SECONDS)
    except CallError as error:
        raise refusal(error) from error
    rows = [
        _changed(group, [one.advantage if one.valid else None for one in scores.scores])
        for group, scores in zip(groups, answer.groups, strict=True)
    ]
    every = [pair for row in rows for pair in zip(row.before, row.after, strict=True)]
    pairs = [(old, new) for old, new in every if old is not None and new is not None]
    return Preview(
        spec_id=answer.spec_id,
        groups=len(rows),
        completions=sum(len(row.before) for row in rows),
        agreement=_correlation(pairs),
        turned=sum(old * new < 0 for old, new in pairs) / len(pairs) if pairs else 0.0,
        moved=math.fsum(abs(old - new) for old, new in pairs) / len(pairs) if pairs else 0.0,
        lost=sum(old is not None and new is None for old, new in every),
        skipped=sum(bool(scores.skipped) for scores in answer.groups),
        missing=answer.missing,
        rows=sorted(rows, key=lambda row: -row.moved)[:ROWS],
    )


async def _spec_of(desk: Desk, spec_id: str) -> RewardSpec | None:
    """What a spec's id stands for; none when the server does not know it any more (nothing counts as measured then)."""
    found = await desk.rewards[0].list_specs(spec_id, PREVIEW_SECONDS)
    return found[0].spec if found else None


def _body(group: ScoredGroup, spec: RewardSpec, measured_by: RewardSpec | None) -> PreviewGroup:
    wanted = {term.key: (term.name, term.params) for term in spec.rewards}
    had = {term.key: (term.name, term.params) for term in measured_by.rewards} if measured_by else {}
    keys = [key for key in group.scores[0].components if key in wanted and had.get(key) == wanted[key]]
    return PreviewGroup(
        group_id=group.group_id,
        source=group.task.source,
        size=len(group.completions),
        components={key: [score.components[key] for score in group.scores] for key in keys},
        weight_version=min((made.weight_version for made in group.completions), default=Version()),
    )


def _changed(group: ScoredGroup, after: list[float | None]) -> Changed:
    before = [score.advantage if score.valid else None for score in group.scores]
    moved = max(abs((old or 0.0) - (new or 0.0)) for old, new in zip(before, after, strict=True))
    return Changed(group.index, prompt_of(group.task)[-100:], str(made_by(group)), before, after, moved)


def _correlation(pairs: list[tuple[float, float]]) -> float | None:
    """Pearson's."""
    if len(pairs) < 2:
        return None
    mean_old, mean_new = (math.fsum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1))
    old, new = [pair[0] - mean_old for pair in pairs], [pair[1] - mean_new for pair in pairs]
    scale = math.sqrt(math.fsum(a * a for a in old) * math.fsum(b * b for b in new))
    return math.fsum(a * b for a, b in zip(old, new, strict=True)) / scale if scale else None


def refusal(error: CallError) -> Problem:
    """What a reward server said, as an answer of ours."""
    if isinstance(error, Refused) and error.status in (403, 409, 422):
        field = error.errors[0].get("field") if error.errors else None
        return Problem(error.status, "The reward server refuses the spec", error.detail or error.title, field)
    return Problem(503, "The reward server does not answer", str(error), retry_after=2)


async def apply(desk: Desk, name: str, spec: RewardSpec) -> int:
    """Put the spec under the run's name on every reward server, from their next request on. Returns its version there.
    Raises Problem; when only some have it, it says which."""
    if not desk.rewards:
        raise Problem(409, "No reward server is known here", "give its address with --reward")
    if not name:
        try:
            await desk.history()
        except DeadlineExceeded as error:
            raise Problem(503, "The run cannot be read", str(error), retry_after=2) from error
        raise Problem(409, "The run's spec is not known", "its orchestrator has not reported yet")
    first, *others = desk.rewards
    try:
        put = {first.url: await first.put_spec(name, spec, PREVIEW_SECONDS)}
    except CallError as error:
        raise refusal(error) from error
    failed = list[CallError]()
    for client in others:
        try:
            put[client.url] = await _put_where_it_differs(client, name, spec)
        except CallError as error:
            failed.append(error)
    if failed:
        detail = f"it is on {', '.join(put)}; not (for all that is known) on {'; '.join(map(str, failed))}"
        raise Problem(refusal(failed[0]).status, "Only some reward servers have the new spec", detail) from failed[0]
    return max(entry.version for entry in put.values())


async def _put_where_it_differs(client: RewardClient, name: str, spec: RewardSpec) -> SpecEntry:
    """Servers that keep their specs in the run's redis have it already: another put would be another version."""
    try:
        entry = await client.get_spec(name, deadline_seconds=PREVIEW_SECONDS)
        if entry.spec_id == spec.spec_id:
            return entry
    except Refused as error:
        if error.status != 404:
            raise
    return await client.put_spec(name, spec, PREVIEW_SECONDS)
