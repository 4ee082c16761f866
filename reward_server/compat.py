"""Reward endpoints as other trainers call them: OpenRLHF's remote reward model and slime's remote rm.

Both want plain numbers and normalise by themselves, so they get the raw `reward` (the weighted sum). A completion whose
reward could not be computed has no number: the request is refused, unless the caller says by `?missing=0.0` what such a
completion is to count as.
"""

import hashlib
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator

from services.api import CompletionText, RewardGroup
from services.contract import CompletionScore, GroupScores, Reference, Task
from services.http import Problem

Label = str | int | float | None
Missing = Annotated[
    float | None, Query(allow_inf_nan=False, description="Stands for a reward that could not be computed.")
]
SpecName = Annotated[str | None, Query(description="Name of the spec; the server's default when left out.")]
ScoreGroups = Callable[[str | None, list[RewardGroup], Request], Awaitable[list[GroupScores]]]


class QueryLists(BaseModel):
    """OpenRLHF's body: `query[i]` is prompt and response in one text and begins with `prompts[i]`."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    query: list[str] = Field(min_length=1, max_length=8192)
    prompts: list[str]
    labels: list[Label] | None = None

    @model_validator(mode="after")
    def same_lengths(self) -> "QueryLists":
        for name in ("prompts", "labels"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.query):
                raise ValueError(f"{name}: {len(given)} entries for {len(self.query)} queries")
        return self


class OneAnswer(BaseModel):
    """slime's body."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    prompt: str
    response: str
    label: Label = None


def _group(prompt: str, label: Label, responses: list[str]) -> RewardGroup:
    identity = hashlib.sha256(f"{prompt}\x1f{label}".encode()).hexdigest()[:32]
    reference = None if label is None else Reference(answer=str(label))
    task = Task(task_id=identity, prompt=prompt, reference=reference)
    return RewardGroup(group_id=identity, task=task, completions=[CompletionText(text=text) for text in responses])


def _number(score: CompletionScore, missing: float | None, field: str) -> float:
    if score.valid:
        return score.reward
    if missing is not None:
        return missing
    failures = "; ".join(f"{name}: {part.outcome}: {part.detail}" for name, part in score.components.items())
    raise Problem(422, "No reward could be computed", f"{failures} (?missing=<number> lets it count as that)", field)


async def _scored(
    score_groups: ScoreGroups, spec: str | None, groups: list[RewardGroup], request: Request, label_field: str
) -> list[GroupScores]:
    try:
        return await score_groups(spec, groups, request)
    except Problem as problem:
        if (problem.field or "").endswith(".reference.answer"):
            problem.field = label_field
        raise


def router(score_groups: ScoreGroups) -> APIRouter:
    routes = APIRouter(tags=["compatibility"])

    @routes.post("/get_reward")
    async def get_reward(
        body: QueryLists, request: Request, spec: SpecName = None, missing: Missing = None
    ) -> dict[str, Any]:
        """OpenRLHF's remote reward model: `rewards` and `scores` in the order of the queries.

        `extra_logs` carries the raw values of each reward that has one for every query, and `valid` (1 or 0).
        """
        places: dict[tuple[str, Label], list[int]] = {}
        for place, (query, prompt) in enumerate(zip(body.query, body.prompts, strict=True)):
            if not query.startswith(prompt):
                raise Problem(422, "Query and prompt differ", "must begin with the prompt", f"query[{place}]")
            places.setdefault((prompt, body.labels[place] if body.labels else None), []).append(place)
        groups = [
            _group(prompt, label, [body.query[place][len(prompt) :] for place in members])
            for (prompt, label), members in places.items()
        ]
        found: dict[int, CompletionScore] = {}
        answered = await _scored(score_groups, spec, groups, request, "labels")
        for members, group in zip(places.values(), answered, strict=True):
            found.update(zip(members, group.scores, strict=True))
        scores = [found[place] for place in range(len(body.query))]
        rewards = [_number(score, missing, f"query[{place}]") for place, score in enumerate(scores)]
        columns = {name: [score.components[name].value for score in scores] for name in scores[0].components}
        extra = {name: values for name, values in columns.items() if None not in values}
        return {
            "rewards": rewards,
            "scores": rewards,
            "extra_logs": {**extra, "valid": [float(s.valid) for s in scores]},
        }

    @routes.post("/reward")
    async def reward(body: OneAnswer, request: Request, spec: SpecName = None, missing: Missing = None) -> float:
        """slime's remote reward model: one answer in, one number out."""
        groups = [_group(body.prompt, body.label, [body.response])]
        (group,) = await _scored(score_groups, spec, groups, request, "label")
        return _number(group.scores[0], missing, "response")

    return routes
