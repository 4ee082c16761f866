"""What an evaluation says: the figures of `results.json`, and the values of single items."""

from pydantic import Field

from services.contract import Wire
from services.evaluation.protocol import Protocol


class Figure(Wire):
    """A mean over `items` with its 95 % bootstrap interval (none for a single item)."""

    value: float
    low: float | None
    high: float | None
    items: int


class Certainty(Wire):
    """Self-certainty by `scorer`, in nats per token. `auc`, `r` (Z / sqrt(N)) and `p` (one-sided; where
    each item has one answer) compare right with wrong answers over all items, `group_auc` inside the items that have
    both. `surest`: of an item's answers the one of the highest certainty. `borda`: the answers' vote, weighted by the
    rank of certainty."""

    scorer: str
    right: float | None = None
    wrong: float | None = None
    auc: float | None = None
    r: float | None = None
    p: float | None = None
    group_auc: float | None = None
    surest: Figure | None = None
    borda: Figure | None = None


class TaskFigures(Wire):
    """`value` is the mean over items of the mean over their answers that were judged. `at_least` is what it would be
    if all that could not be had or judged (`failed`, counted by reason) were wrong. `left_out` counts the questions
    beyond `--limit`. Lengths are in tokens."""

    task: str
    title: str
    measure: str
    source: str
    sha256: str
    items: int
    left_out: int = 0
    samples: int
    seeds: list[int]
    value: Figure | None
    at_least: float
    failed: dict[str, int] = Field(default_factory=dict)
    by_seed: dict[str, float] = Field(default_factory=dict)
    pass_at: dict[str, Figure] = Field(default_factory=dict)
    majority: Figure | None = None
    further: dict[str, float] = Field(default_factory=dict)
    length: float | None = None
    stopped: float | None = None
    certainty: Certainty | None = None


class Results(Wire):
    """`identity` names the weights; nothing in here depends on when or how fast it was computed."""

    kind: str = "evaluation"
    model: str
    identity: str
    protocol: Protocol
    tasks: list[TaskFigures]


class ItemValue(Wire):
    """What `rlif compare` pairs by: the mean value of an item's `answers` that were judged."""

    task: str
    item: str
    value: float
    answers: int
