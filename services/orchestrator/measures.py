"""What an evaluation says: pure functions of scored groups."""

from collections.abc import Sequence

from services.contract import Outcome, ScoredGroup
from services.separation import auc

JUDGED = frozenset({Outcome.correct, Outcome.wrong, Outcome.no_answer})


def measure(groups: Sequence[ScoredGroup], judge: str, certainty: str | None) -> dict[str, float]:
    """Metrics by name, those left out that no completion has a value for: `accuracy` of the term `judge`, and of every
    term that judges `accuracy.<term>`, the share of `correct`; `value.<term>`, the mean raw value; `length` in tokens;
    `stopped`, the share that ended by itself; with the key of a term `certainty`, `auc` of its value for right against
    wrong answers by `judge`."""
    completions = [one for group in groups for one in group.completions]
    components = [score.components for group in groups for score in group.scores]
    found = {
        "length": sum(len(one.token_ids) for one in completions) / len(completions),
        "stopped": sum(one.finish_reason == "stop" for one in completions) / len(completions),
    }
    for name in sorted({name for those in components for name in those}):
        scores = [those[name] for those in components if name in those]
        values = [score.value for score in scores if score.value is not None]
        judged = [score.outcome == Outcome.correct for score in scores if score.outcome in JUDGED]
        if values:
            found[f"value.{name}"] = sum(values) / len(values)
        if judged:
            found[f"accuracy.{name}"] = sum(judged) / len(judged)
    if f"accuracy.{judge}" in found:
        found["accuracy"] = found[f"accuracy.{judge}"]
    if certainty is not None:
        sides: dict[bool, list[float]] = {True: [], False: []}
        for those in components:
            if judge in those and certainty in those and those[judge].outcome in JUDGED:
                value = those[certainty].value
                if value is not None:
                    sides[those[judge].outcome == Outcome.correct].append(value)
        area = auc(sides[True], sides[False])
        if area is not None:
            found["auc"] = area
    return found
