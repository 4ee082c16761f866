"""Reward endpoints as other trainers call them: OpenRLHF's remote reward model and slime's remote rm.

Both send one sample a call and normalise over their groups by themselves, so they get the raw `reward` (the weighted
sum); a group's advantages mean nothing here. A completion of which some part of the reward could not be computed has
no number: the request is refused, unless the caller says by `?missing=0.0` what such a completion is to count as. (Both
repeat a refused request a few times and then stop the training.)

Prompts come with the chat template applied, and responses with the special token that ended them. The scorer reads both
as they stand, without adding a token; the other rewards read the response without that end.
"""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator

from reward_server.evaluate import Means
from services.api import CompletionText, RewardGroup
from services.contract import CompletionScore, GroupScores, Items, Message, Reference, Task
from services.problem import Problem

Label = str | int | float | Reference | None
"""What the trainer's data set has as label: an answer, or an object that is the task's whole reference."""
Missing = Annotated[
    float | None, Query(allow_inf_nan=False, description="Stands for a reward that could not be computed.")
]
SpecName = Annotated[str | None, Query(description="Name of the spec; the server's default when left out.")]
Ends = Annotated[
    list[str] | None,
    Query(
        description="Texts such as <|im_end|> that end a response and are no part of the answer. A server with a "
        "scorer model knows its special tokens already.",
        max_length=16,
    ),
]
ScoreGroups = Callable[[str | None, list[RewardGroup], Request], Awaitable[list[GroupScores]]]


class QueryLists(BaseModel):
    """OpenRLHF's body: `query[i]` is prompt and response in one text and begins with `prompts[i]`."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    query: Items[str] = Field(min_length=1, max_length=8192)
    prompts: Items[str]
    labels: Items[Label] | None = None

    @model_validator(mode="after")
    def same_lengths(self) -> "QueryLists":
        for name in ("prompts", "labels"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.query):
                raise ValueError(f"{name}: {len(given)} entries for {len(self.query)} queries")
        return self


class OneAnswer(BaseModel):
    """slime's body. The prompt is a list of messages when slime was not told to apply the chat template."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    prompt: str | Annotated[Items[Message], Field(min_length=1)]
    response: str
    label: Label = None


# ---- from their bodies to groups -------------------------------------------------------------------------------


def _group(
    prompt: str | list[Message], label: Label, responses: list[str], ends: list[str], encoder: Any
) -> RewardGroup:
    reference = label if isinstance(label, Reference | None) else Reference(answer=str(label))
    what = [prompt if isinstance(prompt, str) else [turn.model_dump() for turn in prompt], _plain(label)]
    identity = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
    if isinstance(prompt, str):
        task = Task(task_id=identity, prompt=prompt, reference=reference)
    else:
        task = Task(task_id=identity, messages=prompt, reference=reference)
    tokens = None
    if encoder is not None and isinstance(prompt, str):
        tokens = _tokens(encoder, prompt, "The prompt is too long")
    completions = [_completion(text, ends, encoder) for text in responses]
    return RewardGroup(group_id=identity, task=task, prompt_token_ids=tokens, completions=completions)


def _completion(response: str, ends: list[str], encoder: Any) -> CompletionText:
    text = response
    while ended := next((end for end in ends if end and text.endswith(end)), None):
        text = text.removesuffix(ended)
    if encoder is None or text == response:
        return CompletionText(text=text)
    return CompletionText(text=text, token_ids=_tokens(encoder, response, "A completion is too long"))


def _tokens(encoder: Any, text: str, title: str) -> list[int]:
    try:
        return encoder.completion(text, None)
    except ValueError as error:
        raise Problem(422, title, str(error).partition(": ")[2], "body") from error


def _plain(label: Label) -> Any:
    return label.model_dump() if isinstance(label, Reference) else label


# ---- from scores to their answers ------------------------------------------------------------------------------


def _number(score: CompletionScore, missing: float | None, field: str) -> float:
    if score.reward is not None:
        return score.reward
    if missing is not None:
        return missing
    failures = "; ".join(f"{name}: {part.outcome}: {part.detail}" for name, part in score.components.items())
    raise Problem(422, "No reward could be computed", f"{failures} (?missing=<number> lets it count as that)", field)


def _logs(scores: list[CompletionScore], versions: list[int] | None) -> dict[str, list[float]]:
    """Columns that OpenRLHF averages. It joins samples of different calls: every call has to give the same columns."""
    logs: dict[str, list[float]] = {}
    for name in scores[0].components:
        values = [score.components[name].value for score in scores]
        logs[name] = [0.0 if value is None else value for value in values]
        logs[f"{name}/present"] = [float(value is not None) for value in values]
    logs["valid"] = [float(score.reward is not None) for score in scores]
    if versions is not None:
        logs["scorer_version"] = [float(version) for version in versions]
    return logs


def router(score_groups: ScoreGroups, means: Means) -> APIRouter:
    routes = APIRouter(tags=["compatibility"])

    async def scored(
        spec: str | None,
        samples: Sequence[tuple[str | list[Message], Label, list[str]]],
        ends: list[str] | None,
        request: Request,
        label_field: str,
    ) -> list[GroupScores]:
        known = [] if means.encoder is None else list(means.encoder.tokenizer.all_special_tokens)

        def made() -> list[RewardGroup]:
            return [_group(*sample, [*known, *(ends or [])], means.encoder) for sample in samples]

        try:
            return await score_groups(spec, await asyncio.to_thread(made), request)
        except Problem as problem:
            if (problem.field or "").endswith((".reference.answer", ".reference.tests")):
                problem.field = label_field
            raise

    def version(group: GroupScores) -> int:
        return (group.scorer_weight_version or means.scorer.version).version

    @routes.post("/get_reward")
    async def get_reward(
        body: QueryLists, request: Request, spec: SpecName = None, missing: Missing = None, end: Ends = None
    ) -> dict[str, Any]:
        """OpenRLHF's remote reward model: `rewards` and `scores` in the order of the queries.

        `extra_logs`: per reward its raw value (0 where there is none) and `<reward>/present` (1 or 0; divide the means
        for the mean over those that have a value), `valid` (1 where the reward is whole, else 0) and, with a scorer,
        `scorer_version`.
        """
        places: dict[tuple[str, str], list[int]] = {}
        labels = body.labels or [None] * len(body.query)
        for place, (query, prompt) in enumerate(zip(body.query, body.prompts, strict=True)):
            if not query.startswith(prompt):
                raise Problem(422, "Query and prompt differ", "must begin with the prompt", f"query[{place}]")
            places.setdefault((prompt, json.dumps(_plain(labels[place]))), []).append(place)
        samples = [
            (prompt, labels[members[0]], [body.query[place][len(prompt) :] for place in members])
            for (prompt, _), members in places.items()
        ]
        found: dict[int, CompletionScore] = {}
        versions: dict[int, int] = {}
        answered = await scored(spec, samples, end, request, "labels")
        for members, group in zip(places.values(), answered, strict=True):
            found.update(zip(members, group.scores, strict=True))
            if means.scorer is not None:
                versions.update(dict.fromkeys(members, version(group)))
        scores = [found[place] for place in range(len(body.query))]
        rewards = [_number(score, missing, f"query[{place}]") for place, score in enumerate(scores)]
        told = [versions[place] for place in range(len(scores))] if means.scorer is not None else None
        return {"rewards": rewards, "scores": rewards, "extra_logs": _logs(scores, told)}

    @routes.post("/reward")
    async def reward(
        body: OneAnswer, request: Request, spec: SpecName = None, missing: Missing = None, end: Ends = None
    ) -> float:
        """slime's remote reward model: one answer in, one number out."""
        (group,) = await scored(spec, [(body.prompt, body.label, [body.response])], end, request, "label")
        return _number(group.scores[0], missing, "response")

    return routes
