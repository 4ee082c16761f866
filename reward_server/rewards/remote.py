"""`remote`: a reward that another server computes; the whole group travels in one call.

`wire: rlif` asks another rlif reward server by one of its specs, and takes the weighted sum (its `reward`) of each
completion. `wire: openrlhf` posts to OpenRLHF's remote reward model: {"query": [prompt + completion], "prompts": [...],
"labels": [the reference answer or null]} -> {"rewards": [...]} (or "scores"), a number each. Chat messages are written
out as paragraphs that begin with their role: give tasks a `prompt` where the other side wants a chat template.

Outcomes: `ok`; `error` (null, NaN or anything that is no number; another number of rewards than completions; a server
that refuses, breaks or cannot be reached, after retries), `timeout`, and with `wire: rlif` the failures found there.
Where completions go is up to whoever may put specs: see `reward_server.calls`.
"""

import time
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from reward_server.calls import CallFailed, Calls, KeyName, Url
from reward_server.encoding import as_text
from reward_server.reward import Context, Params, Reward
from services.api import RewardGroup
from services.clients import CallError, DeadlinePassed
from services.contract import CompletionScore, Outcome, Score


class RemoteParams(Params):
    url: Url = Field(
        description="`openrlhf`: the full address, e.g. http://host:5000/get_reward; `rlif`: the server's",
        examples=["http://127.0.0.1:8100"],
    )
    wire: Literal["rlif", "openrlhf"] = "rlif"
    spec: str | None = Field(None, min_length=1, max_length=128, description="with `rlif`: its spec; none: its default")
    seconds: float = Field(120.0, gt=0, le=3600, description="for the group, retries included")
    concurrency: int = Field(16, ge=1, le=1024, description="`openrlhf`: calls under way at once, from one server")
    key_env: KeyName | None = Field(None, description="environment variable (RLIF_KEY_...) that holds the bearer token")

    @model_validator(mode="after")
    def spec_of_rlif(self) -> Self:
        if self.spec is not None and self.wire != "rlif":
            raise ValueError("spec: only `wire: rlif` knows specs")
        return self


async def score(group: RewardGroup, params: RemoteParams, context: Context) -> list[Score]:
    assert context.http is not None
    started = time.monotonic()
    deadline = min(context.deadline, started + params.seconds)
    ask = _ask_rlif if params.wire == "rlif" else _ask_openrlhf
    try:
        scores = await ask(group, params, context.http, deadline)
    except CallFailed as failure:
        return [Score.failed(failure.outcome, failure.detail, time.monotonic() - started)] * len(group.completions)
    seconds = time.monotonic() - started
    return [item.model_copy(update={"seconds": seconds}) for item in scores]


# ---- OpenRLHF --------------------------------------------------------------------------------------------------


async def _ask_openrlhf(group: RewardGroup, params: RemoteParams, http: Calls, deadline: float) -> list[Score]:
    prompt, size = as_text(group.task), len(group.completions)
    label = group.task.reference.answer if group.task.reference else None
    body = {
        "query": [prompt + completion.text for completion in group.completions],
        "prompts": [prompt] * size,
        "labels": [label] * size,
    }
    return rewards_in(await http.post(params.url, body, params.key_env, deadline, params.concurrency), size)


def rewards_in(answer: Any, size: int) -> list[Score]:
    """One Score for each of `size` completions. Raises CallFailed: the answer is not for them."""
    found = answer.get("rewards", answer.get("scores")) if isinstance(answer, dict) else None
    if not isinstance(found, list):
        raise CallFailed(Outcome.error, "the answer has no list `rewards` or `scores`")
    if len(found) != size:
        raise CallFailed(Outcome.error, f"{len(found)} rewards came back for {size} completions")
    return [_number(value) for value in found]


def _number(value: Any) -> Score:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Score.failed(Outcome.error, f"the reward is not a number: {value!r:.100}")
    try:
        return Score.of(float(value))
    except OverflowError:
        return Score.failed(Outcome.error, "the reward is too large a number")


# ---- rlif ------------------------------------------------------------------------------------------------------


async def _ask_rlif(group: RewardGroup, params: RemoteParams, http: Calls, deadline: float) -> list[Score]:
    client = http.reward_client(params.url, params.key_env)
    try:
        seconds = max(0.001, deadline - time.monotonic())
        (answer,) = (await client.rewards([group], params.spec, seconds)).groups
    except DeadlinePassed as error:
        raise CallFailed(Outcome.timeout, str(error)) from error
    except CallError as error:
        raise CallFailed(Outcome.error, str(error)) from error
    if answer.skipped:
        return [Score.failed(Outcome.skipped, answer.skipped) for _ in answer.scores]
    return [_raw(item) for item in answer.scores]


def _raw(item: CompletionScore) -> Score:
    """The weighted sum of what the other server found, or why it found nothing."""
    if item.reward is not None:
        return Score.of(item.reward)
    failures = {name: part for name, part in item.components.items() if part.value is None}
    said = "; ".join(f"{name}: {part.outcome}: {part.detail}" for name, part in failures.items())
    outcomes = {part.outcome for part in failures.values()}
    outcome = outcomes.pop() if len(outcomes) == 1 else Outcome.error
    return Score.failed(outcome, said or "no reward of the spec has a value and a weight")


REWARD = Reward(
    name="remote",
    description="A reward computed by another server: an rlif reward server, or OpenRLHF's remote reward model.",
    needs=(),
    range=(None, None),
    params=RemoteParams,
    score=score,
)
