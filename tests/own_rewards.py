"""Rewards as users write them, good and bad. Imported by the server and by its verifier processes."""

import asyncio
import math
import os
import time

import numpy as np
from pydantic import BaseModel, Field

from reward_server.reward import Params, Reward
from services.contract import Score


class ShortParams(BaseModel):
    words: int = Field(4, ge=1)


def short(completion: str, params: ShortParams) -> float | None:
    """Shorter is better."""
    count = len(completion.split())
    return None if count == 0 else min(1.0, params.words / count)


def all_of_it(prompt, completion, reference, unused=3):  # noqa: ARG001
    return float(prompt[-1]["content"] == "2+2?" and completion == reference["answer"] and reference["level"] == 3)


def longest(completions: list[str], reference=None) -> list[float | None]:
    most = max(map(len, completions))
    return [None if reference is None else float(len(text) == most) for text in completions]


def trl_style(prompts, completions, answer, hint, **columns):
    sizes = {len(column) for column in (prompts, answer, hint, *columns.values())}
    assert sizes == {len(completions)} and "completion_ids" in columns
    return [np.float32(text == wanted) for text, wanted in zip(completions, answer, strict=True)]


def trl_chat(completions, **columns):
    roles = {message["role"] for completion in completions for message in completion}
    assert roles == {"assistant"} and columns["prompts"][0][0]["role"] == "user"
    return [float(len(completion[0]["content"])) for completion in completions]


async def later(completion: str) -> float | None:
    """Answers after a while."""
    await asyncio.sleep(float(completion))
    return float(completion)


async def later_group(completions):
    raise LookupError(f"{len(completions)} are too many")


def moody(completion: str):
    """Does what the completion says."""
    if completion == "hang":
        while True:
            pass
    if completion == "sleep":
        time.sleep(60)
    if completion == "die":
        os._exit(3)
    if completion == "leave":
        raise SystemExit(1)
    if completion == "raise":
        raise LookupError("no such thing")
    odd = {"nan": math.nan, "text": "1.5", "list": [1], "none": None, "true": True, "big": 10**400}
    return odd.get(completion, 1)


def too_few(completions):
    return [1.0] * (len(completions) - 1)


class NeedyParams(Params):
    wanted: str


def needy(completion: str, params: NeedyParams) -> float:
    return float(params.wanted in completion)


async def _half(group, _params, _context):
    return [Score.of(0.5) for _ in group.completions]


HALF = Reward("half", "Half of everything.", (), (0.5, 0.5), Params, _half)


# ---- no rewards ----------------------------------------------------------------------------------------------------


def nothing_known(text):  # noqa: ARG001
    return 0.0


def one_too_many(completion, colour):  # noqa: ARG001
    return 0.0


def bare_params(completion, params):  # noqa: ARG001
    return 0.0


def positional(completion, /):  # noqa: ARG001
    return 0.0


def lost(completion: "Lost", params: "Lost"):  # noqa: ARG001, F821
    return 0.0


def length(completion):
    return float(len(completion))


def grpo(completion):
    return float(len(completion))


NUMBER = 5
