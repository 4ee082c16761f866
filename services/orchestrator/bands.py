"""When a run collapses: a pure judgement over the numbers of its steps, one after the other.

A signal has a baseline, the median of its first values, and a spread, 1.4826 times their median absolute deviation (a
standard deviation, for Gaussian noise, that a few outliers do not move). A value is out of its band when it is beyond
the factor the recipe gives *and* further than `sigmas` spreads from the baseline: the factor keeps slow learning from
being called a collapse, the spread keeps a noisy signal's noise from it. An alarm is raised when `votes` of the last
`window` values are out while the reward holds or rises, and is over when none of them is. A limit is out by itself,
from the first step on and whatever the reward does.

Flat noise: with the defaults, of 1000 synthetic runs of 300 steps whose six signals were Gaussian with a standard
deviation of 20 % of their mean, 1 raised an alarm; at 40 %, 61 did (tests/test_bands.py repeats the first in small).
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from services.recipe_watching import Band, Guard

PER_STEP = ("length", "distinct", "entropy", "stopped", "answers", "kl")
TO_SIGMA = 1.4826
"""From the median absolute deviation of Gaussian noise to its standard deviation."""
REWARD_SPREADS, REWARD_SLACK = 2.0, 0.05
"""The reward holds unless its recent median is lower by more than so many spreads of the baseline, and this share."""
EVALUATED, IN_A_ROW = {"accuracy": 1, "auc": 2}, 2
"""Evaluations give few values: the first is the baseline (of the model before training), or the first two where one is
too noisy - a base model has few right answers to tell from wrong ones -, and two in a row are an alarm."""


@dataclass(frozen=True)
class Alarm:
    """`step` raised it; `since` is the first step that was out. `low`, `high`: the band, none where it is open."""

    signal: str
    step: int
    since: int
    value: float
    low: float | None
    high: float | None
    is_limit: bool

    def __str__(self) -> str:
        is_low = self.low is not None and self.value < self.low
        edge = f"below {self.low:.4g}" if is_low else f"above {self.high:.4g}"
        why = "a limit by itself" if self.is_limit else "while the reward holds or rises"
        return f"step {self.step}: {self.signal} is {self.value:.4g}, {edge} since step {self.since} ({why})"


@dataclass(frozen=True)
class Baseline:
    """What is normal: `centre` and `spread` of a signal's first values."""

    centre: float
    spread: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Baseline":
        centre = median(values)
        return cls(centre, TO_SIGMA * median(abs(value - centre) for value in values))


@dataclass(frozen=True)
class Look:
    """One value, looked at. `out` is the edge that it is beyond: the band's or the limit's."""

    step: int
    value: float
    out: str
    low: float | None
    high: float | None


@dataclass
class Series:
    """One signal's values, as far as they matter: the first `count`, and how the last `window` were looked at."""

    name: str
    band: Band
    count: int
    votes: int
    window: int
    sigmas: float
    first: list[float] = field(default_factory=list)
    looks: deque[Look] = field(init=False)
    raised: Alarm | None = None

    def __post_init__(self) -> None:
        self.looks = deque(maxlen=self.window)

    def edges(self) -> tuple[float | None, float | None]:
        """The band around the baseline; open before there is one, and around a baseline of 0, which has no factors."""
        if len(self.first) < self.count:
            return None, None
        usual = Baseline.of(self.first)
        if usual.centre == 0:
            return None, None
        margin = self.sigmas * usual.spread
        below = None if self.band.low is None else min(usual.centre * self.band.low, usual.centre - margin)
        above = None if self.band.high is None else max(usual.centre * self.band.high, usual.centre + margin)
        return below, above

    def look(self, step: int, value: float, reward_holds: bool) -> Alarm | None:
        """Take the next value; returns an alarm that it raises."""
        low, high = self.edges()
        if _beyond(value, self.band.at_least, self.band.at_most):
            found = Look(step, value, "limit", self.band.at_least, self.band.at_most)
        else:
            found = Look(step, value, "band" if _beyond(value, low, high) else "", low, high)
        self.looks.append(found)
        if len(self.first) < self.count:
            self.first.append(value)
        out = [one for one in self.looks if one.out]
        limits = [one for one in out if one.out == "limit"]
        if not out:
            self.raised = None
        if self.raised is not None or not found.out:
            return None
        if len(limits) >= self.votes or (len(out) >= self.votes and reward_holds):
            counted = limits if len(limits) >= self.votes else out
            is_limit = counted is limits
            self.raised = Alarm(self.name, step, counted[0].step, value, found.low, found.high, is_limit)
            return self.raised
        return None


def _beyond(value: float, low: float | None, high: float | None) -> bool:
    return (low is not None and value < low) or (high is not None and value > high)


class Judge:
    """Looks at the rows of a history, in order. A row is {signal: number or none} with "step" and "reward"; the row of
    an evaluation has "step" and what it measured alone."""

    def __init__(self, guard: Guard):
        self.guard = guard
        self.rewards: list[float] = []
        self.recent: deque[float] = deque(maxlen=2 * guard.window)
        self.series: dict[str, Series] = {}
        for name in PER_STEP:
            band = getattr(guard.bands, name)
            if band is not None:
                self.series[name] = Series(name, band, guard.baseline, guard.votes, guard.window, guard.sigmas)
        for name, first in EVALUATED.items():
            band = getattr(guard.bands, name)
            if band is not None:
                self.series[name] = Series(name, band, first, IN_A_ROW, IN_A_ROW, guard.sigmas)

    def look(self, row: Mapping[str, float | None]) -> list[Alarm]:
        """The alarms that the row raises."""
        step, reward = int(row["step"] or 0), row.get("reward")
        if reward is not None:
            self.recent.append(reward)
            if len(self.rewards) < self.guard.baseline:
                self.rewards.append(reward)
        holds, alarms = self.reward_holds, list[Alarm]()
        for name, series in self.series.items():
            value = row.get(name)
            alarm = None if value is None else series.look(step, value, holds)
            if alarm is not None:
                alarms.append(alarm)
        return alarms

    @property
    def reward_holds(self) -> bool:
        """Whether the reward is not well below where it began, or where it was a window ago: one that fell with the
        policy and is rising on it, or at rest, holds too. No before there is a baseline."""
        if len(self.rewards) < self.guard.baseline:
            return False
        usual = Baseline.of(self.rewards)
        slack = max(REWARD_SPREADS * usual.spread, REWARD_SLACK * abs(usual.centre))
        rewards, window = list(self.recent), self.guard.window
        before = rewards[:-window]
        floor = min(usual.centre, median(before)) if len(before) == window else usual.centre
        return median(rewards[-window:]) >= floor - slack

    @property
    def raised(self) -> list[Alarm]:
        """The alarms that are not over."""
        return [series.raised for series in self.series.values() if series.raised is not None]

    def ratio(self, signal: str) -> float | None:
        """The signal's last value over its baseline; none before there is one."""
        series = self.series[signal]
        if len(series.first) < series.count or not series.looks:
            return None
        centre = Baseline.of(series.first).centre
        return series.looks[-1].value / centre if centre else None
