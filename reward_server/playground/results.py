"""What came of one form: scores and rewards side by side, the tokens to shade, and the commands that ask the same."""

import asyncio
import json
import shlex
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Request

from reward_server import scoring
from reward_server.compat import ScoreGroups
from reward_server.evaluate import Means
from reward_server.playground.form import Form
from services.api import RewardGroup, RewardsRequest, ScoreRequest, ScoreResponse
from services.contract import GroupScores
from services.pages.shading import SHADINGS, Scale, Token, scale, tokens
from services.problem import Problem

MOST_TOKENS_SHOWN = 4096
"""Of all completions on one page; the scores are always of all tokens."""


@dataclass(frozen=True)
class Results:
    """`scored`, `rewarded`: none where that part failed, for one of `problems`, or where the server has no model.

    `tokens` and `unscored` run parallel to the completions; `unscored` counts tokens after the one that ended them.
    `commands` are shell commands by route.
    """

    group: RewardGroup
    commands: dict[str, str]
    scored: ScoreResponse | None = None
    rewarded: GroupScores | None = None
    problems: list[Problem] = field(default_factory=list)
    scales: list[Scale] = field(default_factory=list)
    tokens: list[list[Token]] = field(default_factory=list)
    unscored: list[int] = field(default_factory=list)


async def ask(
    form: Form, request: Request, score_groups: ScoreGroups, means: Means, model: str | None, seconds: float
) -> Results:
    """What `POST /v1/score` and `POST /v1/rewards` answer to the form. Raises FormFault."""
    group = form.group()
    body = RewardsRequest(spec=form.spec or None, groups=[group])
    commands = {"POST /v1/rewards": _command(request, "/v1/rewards", body)}
    asked = None
    if means.scorer is not None:
        asked = form.score_request()
        commands["POST /v1/score"] = _command(request, "/v1/score", asked)
    problems: list[Problem] = []

    async def scores() -> ScoreResponse | None:
        if asked is None or means.encoder is None or model is None:
            return None
        try:
            return await scoring.score(asked, means.scorer, means.encoder, model, seconds)
        except Problem as problem:
            problems.append(problem)
            return None

    async def rewards() -> GroupScores | None:
        try:
            return (await score_groups(body.spec, body.groups, request))[0]
        except Problem as problem:
            problems.append(problem)
            return None

    scored, rewarded = await asyncio.gather(scores(), rewards())
    results = Results(group, commands, scored, rewarded, problems)
    return await asyncio.to_thread(_with_tokens, results, means.encoder)


def _with_tokens(results: Results, encoder: Any) -> Results:
    if results.scored is None:
        return results
    scales = [scale(shading, results.scored.results) for shading in SHADINGS.values()]
    specials = frozenset(encoder.tokenizer.all_special_tokens)
    shown, unscored, room = [], [], MOST_TOKENS_SHOWN
    for completion, result in zip(results.group.completions, results.scored.results, strict=True):
        ids = encoder.completion(completion.text, None)
        entries = encoder.tokenizer.convert_ids_to_tokens(ids[: result.n_tokens])
        made = tokens(result, entries, specials, scales)[:room]
        room -= len(made)
        shown.append(made)
        unscored.append(len(ids) - result.n_tokens)
    return replace(results, scales=scales, tokens=shown, unscored=unscored)


def _command(request: Request, path: str, body: RewardsRequest | ScoreRequest) -> str:
    """A curl command that is safe to paste: what was typed is one quoted argument, with hidden characters escaped."""
    headers = ["-H 'Content-Type: application/json'"]
    if "rlif.refusal" in request.scope or "authorization" in request.headers:
        headers.append('-H "Authorization: Bearer $RLIF_API_TOKEN"')
    fields = body.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    url = shlex.quote(f"{request.url.scheme}://{request.url.netloc}{path}")
    return f"curl -s {url} {' '.join(headers)} -d {shlex.quote(json.dumps(fields, indent=2))}"
