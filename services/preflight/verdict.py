"""Whether to go on, in words: what the figures of the recipe's own prompt say for and against training.

The thresholds are judgements. Those on separation come from ten base models of the demo's kind, whose runs with
self-certainty alone are known (docs/preflight.md has the table): in both that collapsed at once the surest of 8 answers
was right less often than an average one, and wherever self-certainty helped it was right more often.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from services.intervals import Interval
from services.preflight.figures import PromptFigures, RewardFigures

Level = Literal["go", "caution", "stop"]
SIGNS = ("go", "note", "caution", "stop")
"""In order of gravity."""

FEW = 16
"""Groups. A bootstrap of fewer gives intervals that are too narrow, so they decide nothing."""
SILENT = 0.95
"""Share of groups without any advantage: with so many, a step of 32 groups has one or two to learn from."""
QUIET = 0.5
"""The same: half of the generation is for nothing, and the steps are half as large as they look."""
SETTLED = 0.9
"""Share of groups all right or all wrong: only a tenth of the tasks can tell right from wrong completions."""
ENDLESS = 0.25
"""Share of completions cut off at the limit: every fourth is scored, and trained on, without its answer."""
COPIES = 0.5
"""Share of completions that repeat a text of their group: the group is half as large as it looks."""
NEUTRAL = 0.5
"""AUC of a reward that knows nothing of right and wrong."""


class Finding(BaseModel):
    """One sign, and what it alone would have the verdict be; a note changes nothing."""

    model_config = ConfigDict(extra="forbid")

    sign: Literal["go", "note", "caution", "stop"]
    text: str


class Verdict(BaseModel):
    """As grave as the gravest of the findings, which come first."""

    model_config = ConfigDict(extra="forbid")

    level: Level
    findings: list[Finding]

    @property
    def reasons(self) -> list[str]:
        """What speaks against training as gravely as the level says."""
        return [finding.text for finding in self.findings if finding.sign == self.level]


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def within(interval: Interval | None) -> str:
    """A share and its interval, in per cent."""
    return (
        "-" if interval is None else f"{percent(interval.mean)} ({100 * interval.low:.0f} to {100 * interval.high:.0f})"
    )


def points(interval: Interval) -> str:
    """A difference of shares and its interval, in percentage points."""
    low, high = 100 * interval.low, 100 * interval.high
    return f"{100 * interval.mean:+.1f} points ({low:+.1f} to {high:+.1f})"


def direction(gain: Interval, subject: str) -> Finding:
    """What it means that the answer which `subject` likes best is right that much more often than an average one."""
    if gain.low > 0:
        return Finding(
            sign="go", text=f"{subject} points at right answers here; that is no promise that training on it helps"
        )
    if gain.high < 0:
        return Finding(sign="stop", text=f"{subject} points at WRONG answers here: training on it is likely to do harm")
    return Finding(
        sign="caution", text=f"{subject} says nothing of right or wrong here: do not expect training on it to help"
    )


def _gradient(own: PromptFigures) -> Finding | None:
    flat = own.recipe.flat or 0.0
    text = f"in {percent(flat)} of the groups the recipe's reward says the same of every completion: they teach nothing"
    if flat >= SILENT and own.tasks >= FEW:
        return Finding(sign="stop", text=text)
    return Finding(sign="caution", text=text) if flat >= QUIET else None


def _shape(own: PromptFigures) -> list[Finding]:
    """Signs that need no answers."""
    found = []
    if own.truncated >= ENDLESS:
        text = f"{percent(own.truncated)} of the completions are cut off: raise rollout.sampling.max_tokens"
        found.append(Finding(sign="caution", text=text))
    if own.copies >= COPIES:
        text = f"{percent(own.copies)} of the completions repeat another of their group: raise the temperature"
        found.append(Finding(sign="caution", text=text))
    return found


def _order(reward: RewardFigures) -> list[Finding]:
    """Signs in the AUC inside groups, of a reward whose best answers have been judged already."""
    auc, found = reward.auc, []
    if reward.mixed < FEW or auc is None:
        text = f"only {reward.mixed} groups have right and wrong completions (of {FEW} that are needed): how the reward"
        return [Finding(sign="caution", text=f"{text} orders them cannot be told")]
    if auc.high < NEUTRAL:
        text = (
            f"inside groups a wrong completion is rewarded above a right one more often than not (AUC {auc.mean:.2f})"
        )
        found.append(Finding(sign="stop", text=text))
    elif auc.low <= NEUTRAL:
        text = f"inside groups the reward does not tell right from wrong completions (AUC {auc.mean:.2f})"
        found.append(Finding(sign="caution", text=text))
    elif reward.beyond_length is not None and reward.beyond_length.low <= NEUTRAL:
        text = f"length alone explains how the reward orders right and wrong completions (AUC {auc.mean:.2f}, "
        text += f"{reward.beyond_length.mean:.2f} without it): training on it may train length"
        found.append(Finding(sign="note", text=text))  # so it was with the demo's model, and training helped there

    return found


def _separation(own: PromptFigures, samples: int, trained: Sequence[str]) -> list[Finding]:
    reward = own.recipe
    if reward.groups < FEW or reward.gain is None or reward.best is None:
        text = f"only {reward.groups} groups could be judged (of {FEW} that are needed): give more --prompts"
        return [Finding(sign="caution", text=text)]
    sign = direction(reward.gain, "the recipe's reward")
    figures = (
        f"of {samples} completions the one it likes best is right in {percent(reward.best.mean)}, an average one in"
    )
    accuracy = percent(None if own.accuracy is None else own.accuracy.mean)
    text = f"{figures} {accuracy}, {points(reward.gain)}: {sign.text}"
    found = [Finding(sign=sign.sign, text=text), *_order(reward)]
    for part in own.rewards:
        # Where the whole does harm, that is said already.
        if part.name in trained and part.gain is not None and part.gain.high < 0 <= reward.gain.high:
            text = direction(part.gain, part.name).text
            found.append(Finding(sign="caution", text=f"a part of the recipe's reward, {text} ({points(part.gain)})"))
    settled = (own.all_right or 0.0) + (own.all_wrong or 0.0)
    if settled >= SETTLED:
        text = f"{percent(own.all_right)} of the tasks are always solved and {percent(own.all_wrong)} never"
        found.append(Finding(sign="caution", text=f"{text}: choose tasks of another difficulty"))
    return found


def _agreement(own: PromptFigures, samples: int) -> list[Finding]:
    """Without answers: whether the reward at least sides with the majority. That is no proof, so it stops nothing."""
    text = "there are no answers to judge by: nothing here tells whether what the reward likes is right"
    found, reward = [Finding(sign="caution", text=text)], own.recipe
    if reward.groups >= FEW and reward.gain is not None and reward.best is not None and own.accuracy is not None:
        shares = f"{percent(reward.best.mean)}, an average one in {percent(own.accuracy.mean)}, {points(reward.gain)}"
        text = f"of {samples} completions the one that the reward likes best agrees with the majority in {shares}"
        if reward.gain.high < 0:
            text += ": a bad sign, where the majority is right"
        found.append(Finding(sign="caution" if reward.gain.high < 0 else "note", text=text))
    return found


def decide(own: PromptFigures, samples: int, judged: bool, trained: Sequence[str]) -> Verdict:
    """`own` are the figures of the recipe's own prompt, `samples` completions a group; `judged`: answers are known;
    `trained` names the intrinsic rewards that the recipe trains on."""
    gradient = _gradient(own)
    found = [gradient] if gradient is not None else []
    found += _separation(own, samples, trained) if judged else _agreement(own, samples)
    found += _shape(own)
    signs = {finding.sign for finding in found}
    level: Level = "stop" if "stop" in signs else "caution" if "caution" in signs else "go"
    return Verdict(level=level, findings=sorted(found, key=lambda finding: -SIGNS.index(finding.sign)))
