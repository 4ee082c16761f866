"""From verdicts to figures: accuracy with its interval, pass@k, maj@k, and what certainty knows of right and wrong."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from services import separation
from services.contract import Score
from services.evaluation.benchmark import Benchmark
from services.evaluation.grading import Judge
from services.evaluation.ledger import Ledger
from services.evaluation.protocol import Asked, Protocol
from services.evaluation.results import Certainty, Figure, ItemValue, TaskFigures
from services.evaluation.sources import Questions
from services.evaluation.statistics import pass_at_k
from services.intervals import interval


@dataclass(frozen=True)
class Judged:
    """One answer asked for; `value` is none where there is no answer or no verdict, for the reason `failure`."""

    asked: Asked
    value: float | None
    failure: str = ""

    @property
    def is_right(self) -> bool:
        """Also of an answer that a judge prefers to the baseline's."""
        return self.value is not None and self.value > 0.5


def _component(ledger: Ledger, one: Asked, judge: Judge | None, term: str) -> Score | None:
    verdict = None if judge is None else ledger.verdicts.get((one.key, judge.key_of(one)))
    return None if verdict is None else verdict.components[term]


def _value(ledger: Ledger, one: Asked, judge: Judge | None, term: str) -> float | None:
    score = _component(ledger, one, judge, term)
    return None if score is None else score.value


def judged(benchmark: Benchmark, wanted: Sequence[Asked], right: Judge, ledger: Ledger) -> list[Judged]:
    """In the order that they were asked for."""

    def one(asked: Asked) -> Judged:
        if asked.key not in ledger.answers:
            return Judged(asked, None, "unanswered")
        scores = [_component(ledger, asked, right, term) for term in benchmark.main]
        values = [score.value for score in scores if score is not None and score.value is not None]
        if len(values) == len(scores):
            return Judged(asked, fmean(values))
        failures = (score.outcome.value for score in scores if score is not None and score.value is None)
        return Judged(asked, None, next(failures, "unjudged"))

    return [one(asked) for asked in wanted]


def _figure(values: Sequence[float]) -> Figure | None:
    if not values:
        return None
    found = interval(values)
    low, high = (found.low, found.high) if found else (None, None)
    return Figure(value=fmean(values), low=low, high=high, items=len(values))


def _groups(found: Sequence[Judged]) -> Iterator[tuple[str, list[list[Judged]]]]:
    """(item, its answers by seed)."""
    for item, answers in itertools.groupby(found, key=lambda one: one.asked.item.id):
        yield item, [list(group) for _, group in itertools.groupby(answers, key=lambda one: one.asked.seed)]


OfGroup = Callable[[list[Judged]], float | None]
"""A number of the answers to one item with one seed; none where they say nothing."""


def _mean_over_items(found: Sequence[Judged], of_group: OfGroup) -> Figure | None:
    values = []
    for _, groups in _groups(found):
        known = [value for value in map(of_group, groups) if value is not None]
        if known:
            values.append(fmean(known))
    return _figure(values)


def item_values(found: Sequence[Judged]) -> list[ItemValue]:
    values = []
    for item, groups in _groups(found):
        known = [one.value for group in groups for one in group if one.value is not None]
        if known:
            task = groups[0][0].asked.benchmark.name
            values.append(ItemValue(task=task, item=item, value=fmean(known), answers=len(known)))
    return values


def _pass_at(k: int) -> OfGroup:
    def of_group(group: list[Judged]) -> float | None:
        known = [one for one in group if one.value is not None]
        return pass_at_k(len(known), sum(one.is_right for one in known), k) if len(known) >= k else None

    return of_group


def _winner(ledger: Ledger, judge: Judge) -> OfGroup:
    """Whether the answer that a vote picks is right, the mean over tied ones; an item nobody answers is wrong."""

    def of_group(group: list[Judged]) -> float | None:
        votes = [(one, _value(ledger, one.asked, judge, judge.term)) for one in group]
        if all(vote is None for _, vote in votes):
            return None
        winners = [one.value for one, vote in votes if vote == 1.0]
        known = [value for value in winners if value is not None]
        return fmean(known) if known else None if winners else 0.0

    return of_group


def _powers_of_two(most: int) -> list[int]:
    found = [1]
    while found[-1] * 2 <= most:
        found.append(found[-1] * 2)
    return found


def _certainty(found: Sequence[Judged], judges: Mapping[str, Judge], ledger: Ledger, scorer: str) -> Certainty:
    judge = judges["certainty"]

    def known(group: Sequence[Judged]) -> list[tuple[float, Judged]]:
        values = [(_value(ledger, one.asked, judge, judge.term), one) for one in group]
        return [(value, one) for value, one in values if value is not None and one.value is not None]

    pairs = known(found)
    right = [value for value, one in pairs if one.is_right]
    wrong = [value for value, one in pairs if not one.is_right]
    apart = separation.mann_whitney_r(right, wrong)
    groups = [group for _, several in _groups(found) for group in several]
    is_alone = all(len(several) == 1 and len(several[0]) == 1 for _, several in _groups(found))
    said = Certainty(
        scorer=scorer,
        right=fmean(right) if right else None,
        wrong=fmean(wrong) if wrong else None,
        auc=separation.auc(right, wrong),
        r=apart and apart.r,
        p=apart and apart.p if is_alone else None,  # answers to one item depend on each other
    )
    if all(len(group) == 1 for group in groups):
        return said
    inside = [known(group) for group in groups]

    def surest(group: list[Judged]) -> float | None:
        mine = known(group)
        return separation.best_of_n([value for value, _ in mine], [one.value or 0.0 for _, one in mine])

    return said.model_copy(
        update={
            "group_auc": separation.in_group_auc(
                [[value for value, _ in group] for group in inside],
                [[one.is_right for _, one in group] for group in inside],
            ),
            "surest": _mean_over_items(found, surest),
            "borda": _mean_over_items(found, _winner(ledger, judges["borda"])) if "borda" in judges else None,
        }
    )


def figures(
    benchmark: Benchmark,
    questions: Questions,
    found: Sequence[Judged],
    judges: Mapping[str, Judge],
    ledger: Ledger,
    protocol: Protocol,
    scorer: str | None,
) -> TaskFigures:
    """`found` from `judged`."""
    items = item_values(found)
    answers = [ledger.answers[one.asked.key] for one in found if one.asked.key in ledger.answers]
    lengths = [len(answer.token_ids) for answer in answers if answer.token_ids is not None]
    seeds = {
        str(seed): [one.value for one in found if one.asked.seed == seed and one.value is not None]
        for seed in protocol.seeds
    }
    further = {}
    for term in judges["right"].spec.rewards:
        values = [_value(ledger, one.asked, judges["right"], term.key) for one in found]
        known = [value for value in values if value is not None]
        if known and len(judges["right"].spec.rewards) > 1:
            further[term.key] = fmean(known)
    if benchmark.further is not None:
        told = [
            (one.asked.item, ledger.answers[one.asked.key].text, one.value) for one in found if one.value is not None
        ]
        further |= benchmark.further(told) if told else {}
    powers = _powers_of_two(protocol.samples) if protocol.samples > 1 and benchmark.measure == "accuracy" else []
    return TaskFigures(
        task=benchmark.name,
        title=benchmark.title,
        measure=benchmark.measure,
        source=questions.source,
        sha256=questions.sha256,
        items=len(questions.items),
        left_out=questions.left_out,
        samples=protocol.samples,
        seeds=protocol.seeds,
        value=_figure([item.value for item in items]),
        at_least=sum(one.value or 0.0 for one in found) / len(found),
        failed=dict(sorted(Counter(one.failure for one in found if one.failure).items())),
        by_seed={seed: fmean(values) for seed, values in seeds.items() if values and len(seeds) > 1},
        pass_at={str(k): figure for k in powers if (figure := _mean_over_items(found, _pass_at(k))) is not None},
        majority=_mean_over_items(found, _winner(ledger, judges["majority"])) if "majority" in judges else None,
        further=further,
        length=fmean(lengths) if lengths else None,
        stopped=fmean(answer.finish_reason == "stop" for answer in answers) if answers else None,
        certainty=_certainty(found, judges, ledger, scorer) if scorer is not None else None,
    )
