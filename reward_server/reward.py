"""What a reward is: a scoring function with typed parameters, and what it needs, says and ranges over."""

import importlib.util
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from reward_server.workers import Turn, WorkerPool
from services.api import RewardGroup
from services.contract import Score, Version

Need = Literal["scorer", "reference.answer", "math-verify"]


class Params(BaseModel):
    """Parameters of a reward; unknown names, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


@dataclass
class Context:
    """What a reward may use while it scores one group.

    `deadline` is in time.monotonic() seconds; `field` is where the request holds the group. `scorer` (a
    reward_server.scorer.service.ScorerService) and `encoder` (a reward_server.encoding.Encoder) are there when the
    server has a model.
    """

    workers: WorkerPool
    deadline: float
    turn: Turn
    field: str = "groups[0]"
    scorer: Any = None
    encoder: Any = None
    weight_version: Version | None = None

    def scored_by(self, version: Version) -> None:
        """Say which weights made a score; of several, the oldest stands for the group."""
        self.weight_version = version if self.weight_version is None else min(version, self.weight_version)


@dataclass(frozen=True)
class Reward:
    """`score(group, params, context)` gives one Score a completion, in order. `range` ends are none where unbounded."""

    name: str
    description: str
    needs: tuple[Need, ...]
    range: tuple[float | None, float | None]
    params: type[Params]
    score: Callable[[RewardGroup, Any, Context], Awaitable[list[Score]]]

    def missing(self, has_scorer: bool) -> str | None:
        """Why this server cannot compute the reward; none when it can."""
        if "scorer" in self.needs and not has_scorer:
            return "it needs a scorer model, and the server was started without one"
        if "math-verify" in self.needs and importlib.util.find_spec("math_verify") is None:
            return "it needs the package math-verify, which is not installed (pip install 'rlif[verify]')"
        return None
