"""What a preflight has scored: the recipe's own reward, and measured beside it a judge and the intrinsic rewards.

All of it is one spec, so that every figure is of the same completions and the advantage is the one that the recipe
would train on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.contract import Task
from services.recipe import Recipe
from services.spec import RewardSpec, RewardTerm

INTRINSIC = (
    "self_certainty",
    "token_entropy",
    "varentropy",
    "mean_logprob",
    "sequence_logprob",
    "mean_probability",
    "topk_confidence",
    "margin",
)
"""Those of the scoring pass. Not `perplexity`, which orders completions as `mean_logprob` does."""
MAJORITY, WEIGHTED = "majority_vote", "certainty_weighted_vote"
PROGRAMS = ("code_tests", "code_output")
JUDGES = ("math_verify", "gsm8k", "multiple_choice", "exact_match", "json_schema", *PROGRAMS)
"""Rewards whose outcome is `correct` or `wrong`."""


@dataclass(frozen=True)
class Terms:
    """`spec` is what the servers are given. Keys of its terms: `judge` (none: nothing tells right from wrong),
    `majority` (none: the answers cannot be compared), `intrinsic` by reward name, votes among them; `trained` are those
    of them that the recipe trains on."""

    spec: RewardSpec
    judge: str | None
    majority: str | None
    intrinsic: dict[str, str]
    trained: tuple[str, ...]


def find_judge(recipe: Recipe, spec: RewardSpec, tasks: Sequence[Task]) -> RewardTerm | None:
    """What tells right from wrong: the first judge of the recipe's evaluation or of its reward, else the one that fits
    the references; none where the tasks have none."""
    evaluation: list[RewardTerm] = []
    if recipe.evaluation is not None:
        given = recipe.evaluation.rewards
        evaluation = [RewardTerm(name=given)] if isinstance(given, str) else given
    sources = {task.source for task in tasks}
    for term in [*evaluation, *spec.rewards]:
        if term.name in JUDGES and (term.sources is None or not sources.isdisjoint(term.sources)):
            return term
    references = [task.reference for task in tasks if task.reference is not None]
    if any(reference.tests for reference in references) and recipe.scorer.sandbox != "none":
        return RewardTerm(name="code_tests")
    if any(reference.answer is not None for reference in references):
        return RewardTerm(name="math_verify")
    return None


def _answers_of(judge: RewardTerm | None) -> dict[str, Any] | None:
    """How a vote finds the answers that the judge would look at; none where two answers cannot be compared."""
    if judge is None or judge.name == "gsm8k":
        return {}
    if judge.name == "math_verify":
        return {"anchored": judge.params.get("anchored", False)}
    if judge.name == "exact_match":
        regex = {"answer": "regex", "regex": judge.params["regex"]} if judge.params.get("regex") else {"answer": "text"}
        return {**regex, "case": judge.params.get("case", True)}
    return None


def measured(spec: RewardSpec, judge: RewardTerm | None, sources: set[str]) -> Terms:
    """The recipe's spec with what is missing added at weight 0. Rewards that it has for all the tasks' `sources` stay
    as it has them."""
    terms = list(spec.rewards)

    def key_of(name: str, params: dict[str, Any], own_params: bool = False) -> str:
        """Of the recipe's term, or of a new one. `own_params`: only a term with these very parameters will do."""
        for term in terms:
            routed = term.sources is None or sources <= set(term.sources)
            if term.name == name and routed and (not own_params or term.params == params):
                return term.key
        is_free = all(term.key != name for term in terms)
        added = RewardTerm(name=name, label=None if is_free else f"{name}.preflight", weight=0.0, params=params)
        terms.append(added)
        return added.key

    intrinsic = {name: key_of(name, {}) for name in INTRINSIC}
    answers = _answers_of(judge)
    if answers is not None:
        intrinsic |= {name: key_of(name, answers) for name in (MAJORITY, WEIGHTED)}
    judged = None if judge is None else key_of(judge.name, judge.params, own_params=True)
    weighted = {term.key for term in spec.rewards if term.weight}
    return Terms(
        spec=RewardSpec(rewards=terms, combine=spec.combine),
        judge=judged,
        majority=intrinsic.get(MAJORITY),
        intrinsic=intrinsic,
        trained=tuple(name for name, key in intrinsic.items() if key in weighted),
    )
