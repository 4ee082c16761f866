"""What a preflight measures of one prompt: figures out of scored groups, nothing decided yet.

A completion is *right* when the judge says so; without a judge, when it gives the answer that most of its group give.
Every interval is a bootstrap over the tasks (services/intervals.py). What could not be judged or scored is left out,
never counted as wrong or 0.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict

from services.contract import Outcome, ScoredGroup
from services.intervals import Interval, interval
from services.orchestrator.chunk import UNANIMOUS
from services.orchestrator.measures import JUDGED
from services.preflight.terms import Terms
from services.separation import Floats, best_of_n, group_auc, length_correlation, without_length

RECIPE = "recipe"
"""Name of the recipe's whole reward, the advantage, among the rewards."""


class Figures(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class RewardFigures(Figures):
    """`best`: how often the completion that the reward likes best is right, one drawn among equals; `gain`: that less
    the mean accuracy, and `over_majority` less the majority's, `over_recipe` less the recipe's own reward's, each on
    the same tasks. `auc` is of right against wrong inside groups, of the `mixed` groups that have both, and
    `beyond_length` of what the length does not explain of the reward. `length_correlation`: inside groups. `flat`: the
    share of groups of whose completions the reward says the same. Shares are from 0 to 1; none: nothing to measure."""

    name: str
    groups: int
    best: Interval | None
    gain: Interval | None
    over_majority: Interval | None
    over_recipe: Interval | None
    auc: Interval | None
    mixed: int
    beyond_length: Interval | None
    length_correlation: float | None
    flat: float | None


class PromptFigures(Figures):
    """One prompt. `accuracy` of a completion, `majority` of the most frequent answer, `any_right` of the tasks that
    some completion solves; `over_own`: accuracy less that with the recipe's own prompt. `length_auc`: of longer against
    shorter. Of the groups, `all_right` and `all_wrong` leave a verifiable reward without a gradient, and in `same_text`
    all completions are one text. Of the completions, `truncated` ran into the limit, `copies` repeat a text of their
    group. `length` in tokens. The recipe's own reward is the first of `rewards`."""

    name: str
    tasks: int
    failed: int
    accuracy: Interval | None
    over_own: Interval | None = None
    majority: Interval | None
    any_right: float | None
    length_auc: Interval | None
    all_right: float | None
    all_wrong: float | None
    same_text: float
    truncated: float
    copies: float
    length: float
    rewards: list[RewardFigures]

    @property
    def recipe(self) -> RewardFigures:
        return self.rewards[0]


@dataclass(frozen=True)
class Answers:
    """The completions of one task as parallel arrays; NaN where there is no verdict or no value. `right` and
    `in_majority` are 1 or 0."""

    task_id: str
    right: Floats
    in_majority: Floats
    rewards: dict[str, Floats]
    lengths: Floats
    texts: list[str]
    truncated: list[bool]

    def accuracy(self) -> float | None:
        known = self.right[~np.isnan(self.right)]
        return float(known.mean()) if len(known) else None

    def majority(self) -> float | None:
        """Chance that the majority's answer is right, one drawn among equally frequent ones."""
        voted = self.right[(self.in_majority == 1) & ~np.isnan(self.right)]
        return float(voted.mean()) if len(voted) else None

    def of(self, reward: str) -> tuple[Floats, Floats, Floats]:
        """(values, right, lengths) of the completions that have a value and a verdict."""
        values = self.rewards[reward]
        kept = ~np.isnan(values) & ~np.isnan(self.right)
        return values[kept], self.right[kept], self.lengths[kept]


def read(group: ScoredGroup, terms: Terms) -> Answers:
    def values(key: str | None) -> Floats:
        given = [None if key is None else score.components[key].value for score in group.scores]
        return np.array([np.nan if value is None else value for value in given])

    in_majority = values(terms.majority)
    right = in_majority
    if terms.judge is not None:
        outcomes = [score.components[terms.judge].outcome for score in group.scores]
        right = np.array([float(one == Outcome.correct) if one in JUDGED else np.nan for one in outcomes])
    advantages = np.array([score.advantage if score.valid else np.nan for score in group.scores])
    return Answers(
        task_id=group.task.task_id,
        right=right,
        in_majority=in_majority,
        rewards={RECIPE: advantages} | {name: values(key) for name, key in terms.intrinsic.items()},
        lengths=np.array([float(len(one.token_ids)) for one in group.completions]),
        texts=[one.text for one in group.completions],
        truncated=[one.finish_reason == "length" for one in group.completions],
    )


def _interval(values: Sequence[float | None]) -> Interval | None:
    return interval([value for value in values if value is not None])


def _difference(values: Sequence[float | None], others: Sequence[float | None]) -> Interval | None:
    """Of pairs in which both are there."""
    return interval([a - b for a, b in zip(values, others, strict=True) if a is not None and b is not None])


def _share(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


def _best(groups: Sequence[Answers], reward: str) -> list[float | None]:
    return [best_of_n(*group.of(reward)[:2]) for group in groups]


def _is_flat(values: Floats) -> bool:
    known = values[~np.isnan(values)]
    return not len(known) or float(known.max() - known.min()) <= UNANIMOUS


def _of_reward(
    groups: Sequence[Answers], reward: str, accuracy: Sequence[float | None], majority: Sequence[float | None]
) -> RewardFigures:
    best = _best(groups, reward)
    values, right, lengths = zip(*(group.of(reward) for group in groups), strict=True)
    areas = [group_auc(*both) for both in zip(values, right, strict=True)]
    rest = without_length(values, lengths)
    return RewardFigures(
        name=reward,
        groups=sum(value is not None for value in best),
        best=_interval(best),
        gain=_difference(best, accuracy),
        over_majority=_difference(best, majority),
        over_recipe=None if reward == RECIPE else _difference(best, _best(groups, RECIPE)),
        auc=_interval(areas),
        mixed=sum(area is not None for area in areas),
        beyond_length=_interval([group_auc(*both) for both in zip(rest, right, strict=True)]),
        length_correlation=length_correlation(values, lengths),
        flat=_share([_is_flat(group.rewards[reward]) for group in groups]),
    )


def _copies(texts: Sequence[str]) -> int:
    return sum(number - 1 for number in Counter(texts).values())


def measure(
    name: str, groups: Sequence[Answers], failed: int, terms: Terms, own: Sequence[Answers] | None = None
) -> PromptFigures:
    """The figures of one prompt's groups, at least one; `own` are those of the recipe's own prompt, to compare with."""
    accuracy = [group.accuracy() for group in groups]
    # Without a judge the majority is right by definition.
    majority = [None if terms.judge is None else group.majority() for group in groups]
    known = [value for value in accuracy if value is not None]
    over_own = None
    if own is not None:
        by_task = {group.task_id: group.accuracy() for group in own}
        over_own = _difference(accuracy, [by_task.get(group.task_id) for group in groups])
    count = sum(len(group.texts) for group in groups)
    areas = [group_auc(group.lengths[~np.isnan(group.right)], group.right[~np.isnan(group.right)]) for group in groups]
    return PromptFigures(
        name=name,
        tasks=len(groups),
        failed=failed,
        accuracy=_interval(accuracy),
        over_own=over_own,
        majority=_interval(majority),
        any_right=None if terms.judge is None else _share([value > 0 for value in known]),
        length_auc=_interval(areas),
        all_right=_share([value == 1 for value in known]),
        all_wrong=_share([value == 0 for value in known]),
        same_text=sum(len(set(group.texts)) == 1 for group in groups) / len(groups),
        truncated=sum(sum(group.truncated) for group in groups) / count,
        copies=sum(_copies(group.texts) for group in groups) / count,
        length=sum(float(group.lengths.sum()) for group in groups) / count,
        rewards=[_of_reward(groups, reward, accuracy, majority) for reward in groups[0].rewards],
    )
