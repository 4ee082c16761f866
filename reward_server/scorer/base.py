"""A scorer as the server sees it, whichever engine runs the model: items in, scores of one weight version out."""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from prometheus_client import Counter

from reward_server.scorer.items import ItemScores, TokenItem
from services.contract import Version

log = logging.getLogger(__name__)

Follow = Literal["online", "match", "frozen", "ema"]

TOKENS = Counter("rlif_scorer_tokens_total", "Prompt and completion tokens that were scored")
FAILURES = Counter("rlif_scorer_failures_total", "Calls that failed", ["reason"])


class ScoringFailed(RuntimeError):
    """The model could not score these items (they were valid); the cause is chained."""


@dataclass(frozen=True)
class Scored:
    """`results` in the order of the items, all made by `version`."""

    results: list[ItemScores]
    version: Version


class Model(Protocol):
    """What is known of a scorer's model without asking it for scores. `max_length`: positions, or none."""

    tokenizer: Any
    vocab_size: int
    max_length: int | None
    device: Any

    def check(self, item: TokenItem) -> None:
        """Raises ValueError naming the field, the value and what would be valid."""


class Service(ABC):
    """`await score(...)` from any number of tasks of one event loop, between `start` and `stop`.

    follow: `online` scores with the newest weights at hand; `match` first waits for `min_weight_version`; `frozen`
    refuses new weights; `ema` serves a moving average of them, where the engine can keep one. `version` is the newest
    version that is part of the served weights; (0, 0) is the model as it was given.
    """

    backend: str

    def __init__(self, scorer: Model, follow: Follow):
        self.scorer, self.follow = scorer, follow
        self.version = Version()
        self._loaded = asyncio.Condition()

    @abstractmethod
    async def start(self) -> None: ...

    @abstractmethod
    async def stop(self) -> None:
        """Calls without an answer fail."""

    @abstractmethod
    def state(self) -> str:
        """ "ok", or why no call is being served: for readiness probes."""

    def death(self) -> str:
        """Why no call will ever be served again; empty while it can."""
        return ""

    @abstractmethod
    async def load(self, version: Version, directory: Path) -> None:
        """Serve the weights of a Hugging Face folder from the next call on: the `load` of a weight follower.

        Raises ValueError when they are not this model's, or must not be loaded; the old weights then keep serving.
        """

    @abstractmethod
    async def _answer(self, items: Sequence[TokenItem], tokens: int) -> Scored:
        """Scores of checked items; cancelled when nobody waits for them any more. Raises ScoringFailed."""

    @property
    def has_reference(self) -> bool:
        """Whether the scorer also has a reference model to compare with."""
        return False

    @property
    def waiting(self) -> int:
        """Calls whose turn has not come."""
        return 0

    async def score(
        self, items: Sequence[TokenItem], min_weight_version: Version | None = None, deadline_seconds: float = 300.0
    ) -> Scored:
        """Score items together, under one weight version.

        `min_weight_version` counts with `follow="match"` alone. Raises ValueError for a bad item (named `items[i]`),
        TimeoutError saying what was waited for, ScoringFailed when the model fails.
        """
        for number, item in enumerate(items):
            try:
                self.scorer.check(item)
            except ValueError as error:
                raise ValueError(f"items[{number}].{error}") from error
        ends = time.monotonic() + deadline_seconds
        if self.follow == "match" and min_weight_version is not None:
            await self._at_least(min_weight_version, deadline_seconds)
        if self.state() != "ok":
            raise ScoringFailed(f"the scorer is not running: {self.state()}")
        tokens = sum(map(len, items))
        try:
            async with asyncio.timeout(max(0.0, ends - time.monotonic())):
                return await self._answer(items, tokens)
        except TimeoutError:
            FAILURES.labels("deadline").inc()
            raise TimeoutError(
                f"scoring {len(items)} items ({tokens} tokens) took longer than {deadline_seconds:g} s "
                f"({self.waiting} calls were waiting)"
            ) from None

    async def _at_least(self, version: Version, deadline_seconds: float) -> None:
        if self.version >= version:
            return
        log.info("a call waits for weight version %s from the trainer; %s is served", version, self.version)
        try:
            async with asyncio.timeout(deadline_seconds), self._loaded:
                await self._loaded.wait_for(lambda: self.version >= version)
        except TimeoutError:
            FAILURES.labels("version").inc()
            raise TimeoutError(
                f"waited {deadline_seconds:g} s for weight version {version} from the trainer; {self.version} is served"
            ) from None

    async def _announce(self) -> None:
        """After `version` has changed."""
        async with self._loaded:
            self._loaded.notify_all()
