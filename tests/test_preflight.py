"""The preflight: figures against slow oracles, the verdict on models whose runs are known, and real servers."""

import io
import json
import math
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fastapi import FastAPI, Response
from rich.console import Console
from served import served
from tiny import make_tiny_tokenizer

from services import prompts, recipe
from services.cli.preflight import EXIT_STOP
from services.clients import BlockingRewardClient
from services.contract import (
    Completion,
    CompletionScore,
    Message,
    Reference,
    Sampling,
    Score,
    ScoredGroup,
    Task,
    Version,
)
from services.demo.base_model import make_tokenizer
from services.intervals import Interval
from services.preflight import report, sweep, verdict
from services.preflight.figures import PromptFigures, RewardFigures, measure, read
from services.preflight.sample import with_spec
from services.preflight.tables import show
from services.preflight.terms import INTRINSIC, Terms, find_judge, measured
from services.preflight.verdict import COPIES, ENDLESS, FEW, QUIET, SETTLED, SILENT, decide
from services.spec import RewardSpec, RewardTerm
from services.startup import StartupError

ROWS = [{"id": str(n), "prompt": f"{n}+{n}", "answer": str(2 * n)} for n in range(1, 21)]


def recipe_of(model: str = "some/model", **sections) -> recipe.Recipe:
    return recipe.parse(
        {
            "run": {"name": "r", "dir": "runs/r"},
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"path": "rows.jsonl", "fields": {"id": "id", "prompt": "prompt", "answer": "answer"}},
            "rewards": [{"name": "self_certainty"}],
            "trainer": {"steps": 1, "groups_per_step": 2},
            **sections,
        }
    )


# ---- the verdict ---------------------------------------------------------------------------------------------------


def around(mean: float, half: float = 0.0) -> Interval:
    return Interval(mean=mean, low=mean - half, high=mean + half)


def reward_of(name: str = "recipe", gain: Interval | None = None, best: float = 0.5, **others) -> RewardFigures:
    known = {"groups": 64, "mixed": 64, "flat": 0.0, "length_correlation": None, "auc": around(0.9, 0.05)}
    known |= {"best": around(best, 0.1), "gain": gain or around(0.2, 0.1)}
    return RewardFigures(
        **{"name": name, "over_majority": None, "over_recipe": None, "beyond_length": None, **known, **others}
    )


def prompt_of(*rewards: RewardFigures, accuracy: float = 0.3, name: str = "own", **others) -> PromptFigures:
    shares = {"any_right": 0.9, "all_right": 0.0, "all_wrong": 0.1, "same_text": 0.0, "truncated": 0.0, "copies": 0.0}
    known = {"tasks": 64, "failed": 0, "majority": None, "length_auc": None, "length": 10.0, **shares}
    return PromptFigures(name=name, accuracy=around(accuracy, 0.05), rewards=list(rewards), **{**known, **others})


RUNS = [
    # design, mean accuracy, best of 8 and AUC by self-certainty, the verdict. What training on it alone did is in the
    # comment: sampled accuracy before and after. Of the base models of docs/preflight.md.
    ("styles2, seed 0", 0.30, 0.82, 0.945, "go"),  # 29.8 -> 61.8
    ("styles2, seed 1", 0.35, 0.86, 0.95, "go"),  # 34.9 -> 57.7
    ("styles2, seed 2", 0.27, 0.78, 0.93, "go"),  # 27.6 -> 50.0
    ("styles", 0.27, 0.445, 0.80, "go"),  # 25.8 -> 33.1
    ("adv", 0.45, 0.785, 0.895, "go"),  # 45.7 -> 67.0
    ("ramble, smoothed", 0.22, 0.61, 0.90, "go"),  # 22.2 -> 25.6, greedy 7.8 -> 78.4
    ("mixed, seed 0", 0.47, 0.86, 0.85, "go"),  # 45.9 -> 54.7
    ("mixed, seed 1", 0.38, 0.87, 0.95, "go"),  # 36.1 -> 56.5
    ("skill", 0.63, 0.26, 0.51, "stop"),  # 63.7 -> 2.8
    ("ramble", 0.28, 0.05, 0.15, "stop"),  # 28.1 -> 5.5
    ("clean", 0.99, 0.98, 0.50, "caution"),  # nothing to gain; not trained
    # What a go does not promise: these looked as good as the others and collapsed.
    ("styles2, smoothed, seed 0", 0.29, 0.82, 0.94, "go"),  # 28.6 -> 20.6
    ("styles2, smoothed, seed 2", 0.26, 0.81, 0.95, "go"),  # 26.2 -> 8.4
]


@pytest.mark.parametrize(("design", "accuracy", "best", "auc", "level"), RUNS)
@pytest.mark.parametrize("tasks", [64, 500])
def test_the_verdict_on_models_whose_runs_are_known(design, accuracy, best, auc, level, tasks):
    error = 2 * math.sqrt((best * (1 - best) + accuracy * (1 - accuracy) / 8) / tasks)
    own = prompt_of(
        reward_of(gain=around(best - accuracy, error), best=best, auc=around(auc, 0.8 / math.sqrt(tasks))),
        accuracy=accuracy,
    )
    found = decide(own, 8, judged=True, trained=["self_certainty"])
    assert found.level == level, (design, found)
    assert any(f"{100 * best:.1f} %" in finding.text for finding in found.findings)
    assert ("WRONG" in " ".join(found.reasons)) == (level == "stop")


def test_an_order_no_better_than_chance_is_a_caution():
    """`skill` by its AUC alone."""
    found = decide(prompt_of(reward_of(auc=around(0.51, 0.05))), 8, True, [])
    assert found.level == "caution" and "AUC 0.51" in found.reasons[0]


def test_a_wrong_order_stops_also_where_the_best_says_nothing():
    """`ramble` by its AUC alone."""
    found = decide(prompt_of(reward_of(gain=around(0.0, 0.1), auc=around(0.15, 0.05))), 8, True, [])
    assert found.level == "stop" and "AUC 0.15" in found.reasons[0]


def test_length_that_explains_all_is_noted():
    found = decide(prompt_of(reward_of(auc=around(0.96, 0.02), beyond_length=around(0.53, 0.1))), 8, True, [])
    assert found.level == "go" and found.findings[0].sign == "note" and "0.53 without it" in found.findings[0].text
    clear = decide(prompt_of(reward_of(auc=around(0.96, 0.02), beyond_length=around(0.8, 0.1))), 8, True, [])
    assert all(finding.sign == "go" for finding in clear.findings)


@pytest.mark.parametrize(
    ("change", "reward", "level", "words"),
    [
        ({}, {"flat": QUIET}, "caution", "teach nothing"),
        ({}, {"flat": QUIET - 0.01}, "go", "points at right"),
        ({}, {"flat": SILENT}, "stop", "teach nothing"),
        ({"tasks": FEW - 1}, {"flat": 1.0}, "caution", "teach nothing"),
        ({"truncated": ENDLESS}, {}, "caution", "max_tokens"),
        ({"truncated": ENDLESS - 0.01}, {}, "go", "points at right"),
        ({"copies": COPIES}, {}, "caution", "temperature"),
        ({"copies": COPIES - 0.01}, {}, "go", "points at right"),
        ({"all_right": SETTLED / 2, "all_wrong": SETTLED / 2}, {}, "caution", "another difficulty"),
        ({"all_right": SETTLED / 2, "all_wrong": SETTLED / 2 - 0.01}, {}, "go", "points at right"),
        ({}, {"groups": FEW - 1, "gain": around(-0.5, 0.1)}, "caution", "--prompts"),
        ({}, {"groups": FEW, "gain": around(-0.5, 0.1)}, "stop", "WRONG"),
        ({}, {"auc": around(0.45, 0.1)}, "caution", "does not tell"),
        ({}, {"mixed": FEW - 1, "auc": around(0.1, 0.1)}, "caution", f"only {FEW - 1} groups"),
        ({}, {"mixed": FEW, "auc": around(0.1, 0.1)}, "stop", "inside groups"),
    ],
)
def test_thresholds(change, reward, level, words):
    found = decide(prompt_of(reward_of(**reward), **change), 8, True, [])
    assert found.level == level and any(words in text for text in found.reasons)


def test_a_harmful_part_of_a_reward_that_helps_as_a_whole():
    parts = [reward_of("self_certainty", gain=around(-0.3, 0.1)), reward_of("margin", gain=around(-0.3, 0.1))]
    found = decide(prompt_of(reward_of(), *parts), 8, True, ["self_certainty"])
    assert found.level == "caution"
    (reason,) = found.reasons
    assert "self_certainty points at WRONG" in reason and "-30.0 points (-40.0 to -20.0)" in reason


def test_without_answers_it_never_says_go_and_never_stops_for_disagreement():
    with_majority = decide(prompt_of(reward_of(gain=around(0.3, 0.1))), 8, False, [])
    against = decide(prompt_of(reward_of(gain=around(-0.3, 0.1), auc=around(0.1, 0.05))), 8, False, [])
    assert with_majority.level == against.level == "caution"
    assert "no answers to judge by" in with_majority.reasons[0]
    assert len(with_majority.reasons) == 1 and "a bad sign" in against.reasons[1]
    assert decide(prompt_of(reward_of(flat=1.0)), 8, False, []).level == "stop"


def test_the_best_is_named_with_its_noise():
    own = prompt_of(reward_of(), accuracy=0.3)
    better = prompt_of(reward_of(), accuracy=0.5, name="p@1", over_own=around(0.2, 0.1))
    noise = prompt_of(reward_of(), accuracy=0.4, name="q@1", over_own=around(0.1, 0.2))
    assert report.best_prompt([own, better, noise], True, "") == (
        "p@1: 50.0 % (45 to 55), against the recipe's own (own) +20.0 points (+10.0 to +30.0)"
    )
    assert report.best_prompt([own, noise], True, "").endswith("which is within the noise")
    worse = prompt_of(reward_of(), accuracy=0.2, name="w@1", over_own=around(-0.1, 0.05))
    close = prompt_of(reward_of(), accuracy=0.29, name="c@1", over_own=around(-0.01, 0.05))
    text = report.best_prompt([own, worse, close], True, "")
    assert text.startswith("the recipe's own, own") and text.endswith("within the noise of it: c@1")
    assert "only the recipe's own" in report.best_prompt([own], True, "no system role")
    assert "without answers" in report.best_prompt([own, better], False, "")
    sure = reward_of("self_certainty", best=0.5, over_recipe=around(0.0, 0.1))
    margin = reward_of("margin", best=0.7, over_recipe=around(0.2, 0.1))
    assert report.best_reward(prompt_of(reward_of(), sure, margin), True).startswith("margin: its best")
    assert report.best_reward(prompt_of(reward_of(), sure), True).endswith("within the noise")
    assert "without answers" in report.best_reward(prompt_of(reward_of(), sure), False)


# ---- figures -------------------------------------------------------------------------------------------------------

TERMS = Terms(RewardSpec(rewards=[RewardTerm(name="x")]), "judge", "vote", {"sure": "sure-key"}, ("sure",))


def score_of(outcome: str) -> Score:
    return Score.failed("timeout", "") if outcome == "timeout" else Score.of(float(outcome == "correct"), outcome)


def group_of(number: int, rng: random.Random, size: int = 6) -> ScoredGroup:
    """Some completions without a verdict, a value or an advantage; few texts, so that some are the same."""
    completions, scores = [], []
    for _ in range(size):
        length = rng.randint(1, 9)
        outcome = rng.choice(["correct", "wrong", "no_answer", "timeout"])
        sure = Score.failed("error", "") if rng.random() < 0.2 else Score.of(float(rng.randint(0, 4)))
        valid = rng.random() < 0.9
        components = {"judge": score_of(outcome), "vote": Score.of(float(rng.random() < 0.5)), "sure-key": sure}
        completions.append(
            Completion(
                text=rng.choice("abcd"),
                token_ids=[1] * length,
                logprobs=[-1.0] * length,
                finish_reason=rng.choice(["stop", "length"]),
            )
        )
        advantage = rng.choice([-1.0, 0.5, 2.0]) if valid else 0.0
        scores.append(CompletionScore(components=components, reward=None, advantage=advantage, valid=valid))
    return ScoredGroup(
        group_id=str(number),
        task=Task(task_id=str(number), prompt="p"),
        prompt_token_ids=[1],
        completions=completions,
        sampling=Sampling(),
        scores=scores,
        spec_id="s",
    )


def rows_of(group: ScoredGroup, key: str) -> list[tuple[float, bool, int]]:
    """(value, is right, length) of what has a verdict and a value."""
    found = []
    for completion, score in zip(group.completions, group.scores, strict=True):
        judged = score.components["judge"]
        value = score.advantage if key == "recipe" and score.valid else None
        if key != "recipe":
            value = score.components[key].value
        if judged.value is not None and value is not None:
            found.append((value, judged.outcome == "correct", len(completion.token_ids)))
    return found


def chance_of_best(rows: list[tuple[float, bool, int]]) -> float:
    most = max(value for value, _, _ in rows)
    return statistics.fmean(right for value, right, _ in rows if value == most)


def area(rows: list[tuple[float, bool, int]], column: int = 0) -> float | None:
    pairs = [(a[column] > b[column]) + (a[column] == b[column]) / 2 for a in rows for b in rows if a[1] and not b[1]]
    return statistics.fmean(pairs) if pairs else None


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_what_the_slow_way_counts(seed):
    rng = random.Random(seed)
    groups = [group_of(number, rng) for number in range(30)]
    found = measure("p", [read(group, TERMS) for group in groups], 3, TERMS)
    judged = [
        [
            score.components["judge"].outcome == "correct"
            for score in group.scores
            if score.components["judge"].value is not None
        ]
        for group in groups
    ]
    accuracy = [statistics.fmean(rights) for rights in judged if rights]
    assert found.accuracy.mean == pytest.approx(statistics.fmean(accuracy))
    assert found.any_right == pytest.approx(statistics.fmean(map(any, filter(None, judged))))
    assert found.all_right == pytest.approx(statistics.fmean(map(all, filter(None, judged))))
    assert found.all_wrong == pytest.approx(1 - found.any_right)
    completions = [completion for group in groups for completion in group.completions]
    assert found.truncated == statistics.fmean(one.finish_reason == "length" for one in completions)
    assert found.length == statistics.fmean(len(one.token_ids) for one in completions)
    texts = [[one.text for one in group.completions] for group in groups]
    assert found.copies == pytest.approx(
        statistics.fmean(one in those[:n] for those in texts for n, one in enumerate(those))
    )
    voted = [[r for v, r, _ in rows_of(group, "vote") if v == 1] for group in groups]
    assert found.majority.mean == pytest.approx(statistics.fmean(statistics.fmean(v) for v in voted if v))
    lengths = [area([(float(n), r, n) for _, r, n in rows_of(group, "vote")]) for group in groups]
    assert found.length_auc.mean == pytest.approx(statistics.fmean(a for a in lengths if a is not None))
    assert (found.tasks, found.failed, found.over_own) == (30, 3, None)
    for reward, key in zip(found.rewards, ("recipe", "sure-key"), strict=True):
        rows = [rows_of(group, key) for group in groups]
        best = [chance_of_best(those) for those in rows if those]
        assert (reward.name, reward.groups) == (key.removesuffix("-key"), len(best))
        assert reward.best.mean == pytest.approx(statistics.fmean(best))
        gains = [
            chance_of_best(those) - statistics.fmean(right) for those, right in zip(rows, judged, strict=True) if those
        ]
        assert reward.gain.mean == pytest.approx(statistics.fmean(gains))
        areas = [a for a in map(area, rows) if a is not None]
        assert reward.mixed == len(areas) and reward.auc.mean == pytest.approx(statistics.fmean(areas))
        assert reward.gain.low <= reward.gain.mean <= reward.gain.high
    assert found.recipe.over_recipe is None and found.rewards[1].over_recipe is not None


def test_differences_are_of_the_same_tasks():
    rng = random.Random(0)
    own = [read(group_of(number, rng), TERMS) for number in range(20)]
    other = [read(group_of(number, rng), TERMS) for number in range(10, 30)]
    found = measure("q", other, 0, TERMS, own)
    pairs = [(b.accuracy(), a.accuracy()) for a, b in zip(own[10:], other[:10], strict=True)]
    expected = [b - a for b, a in pairs if a is not None and b is not None]
    assert found.over_own.mean == pytest.approx(statistics.fmean(expected))


def test_a_group_that_says_the_same_is_flat():
    rng = random.Random(0)
    groups = [group_of(number, rng) for number in range(4)]
    for group, advantages in zip(groups, ([0.0] * 6, [1e-7, 0.0] * 3, [1.0, -1.0] * 3, [1.0] * 6), strict=True):
        for score, advantage in zip(group.scores, advantages, strict=True):
            score.advantage, score.valid = advantage, True
    for score in groups[3].scores:
        score.valid = False
    assert measure("p", [read(group, TERMS) for group in groups], 0, TERMS).recipe.flat == 0.75


def test_without_a_judge_right_is_what_the_majority_says():
    terms = Terms(TERMS.spec, None, "vote", TERMS.intrinsic, ())
    groups = [group_of(number, random.Random(number)) for number in range(20)]
    found = measure("p", [read(group, terms) for group in groups], 0, terms)
    agree = statistics.fmean(statistics.fmean(s.components["vote"].value for s in group.scores) for group in groups)
    assert found.accuracy.mean == pytest.approx(agree)
    assert found.majority is None and found.any_right is None and found.recipe.over_majority is None
    blind = Terms(TERMS.spec, None, None, TERMS.intrinsic, ())
    nothing = measure("p", [read(group, blind) for group in groups], 0, blind)
    assert nothing.accuracy is None and nothing.recipe.gain is None and nothing.recipe.flat is not None
    assert decide(nothing, 8, False, []).level == "caution"


# ---- what is scored ------------------------------------------------------------------------------------------------

ANSWERED = [Task(task_id="1", prompt="1+1", reference=Reference(answer="2"))]
SPEC = RewardSpec(rewards=[RewardTerm(name="self_certainty", params={"temperature": 0.5}, label="sure")])


def test_the_judge_is_the_recipes_or_fits_the_references():
    def judge(spec: RewardSpec = SPEC, tasks=ANSWERED, **sections):
        found = find_judge(recipe_of(**sections), spec, tasks)
        return None if found is None else found.name

    assert judge() == "math_verify"
    assert judge(tasks=[Task(task_id="1", prompt="p")]) is None
    assert judge(RewardSpec(rewards=[*SPEC.rewards, RewardTerm(name="gsm8k", weight=0.0)])) == "gsm8k"
    assert judge(RewardSpec(rewards=[RewardTerm(name="gsm8k", sources=["elsewhere"])])) == "math_verify"
    tests = [Task(task_id="1", prompt="p", reference=Reference(tests=[{"input": "1", "output": "2"}]))]
    assert judge(tasks=tests) is None
    assert judge(tasks=tests, scorer={"sandbox": "bubblewrap"}) == "code_tests"
    evaluation = {"data": {"path": "e.jsonl", "fields": {"prompt": "p"}}, "every": 10, "rewards": "exact_match"}
    assert judge(evaluation=evaluation) == "exact_match"
    evaluation["rewards"] = [{"name": "length"}, {"name": "multiple_choice"}]
    assert judge(evaluation=evaluation) == "multiple_choice"


def test_the_recipes_own_terms_stay_and_the_others_are_only_measured():
    judge = RewardTerm(name="exact_match", params={"regex": "is (.)", "case": False})
    found = measured(SPEC, judge, {"default"})
    assert found.spec.rewards[0] == SPEC.rewards[0] and found.spec.combine == SPEC.combine
    assert all(term.weight == 0 for term in found.spec.rewards[1:])
    assert found.intrinsic["self_certainty"] == "sure" and found.trained == ("self_certainty",)
    assert set(INTRINSIC) <= set(found.intrinsic)
    by_key = {term.key: term for term in found.spec.rewards}
    assert by_key[found.majority].params == {"answer": "regex", "regex": "is (.)", "case": False}
    assert by_key[found.judge].params == judge.params


def test_keys_that_are_taken_and_answers_that_cannot_be_compared():
    taken = RewardSpec(rewards=[RewardTerm(name="length", label="margin"), RewardTerm(name="code_tests")])
    found = measured(taken, taken.rewards[1], {"default"})
    assert found.intrinsic["margin"] == "margin.preflight" and found.judge == "code_tests"
    assert found.majority is None and "majority_vote" not in found.intrinsic
    other = RewardTerm(name="code_tests", params={"timeout": 3})
    assert measured(taken, other, {"default"}).judge == "code_tests.preflight"


def test_terms_of_some_sources_alone():
    margin, judge = RewardTerm(name="margin", sources=["a"]), RewardTerm(name="gsm8k", sources=["a"])
    spec = RewardSpec(rewards=[margin, judge])
    assert measured(spec, None, {"a"}).intrinsic["margin"] == "margin"
    assert measured(spec, None, {"a", "b"}).intrinsic["margin"] == "margin.preflight"
    mixed = [Task(task_id=source, prompt="p", source=source) for source in "ab"]
    assert find_judge(recipe_of(), spec, mixed) == judge and find_judge(recipe_of(), spec, mixed[1:]) is None


def test_every_reward_it_measures_is_one():
    """By the reward server's own check, for every kind of judge."""
    from reward_server.specs import check_spec

    judges = [None, *(RewardTerm(name=name) for name in ("math_verify", "gsm8k", "multiple_choice", "code_tests"))]
    judges += [RewardTerm(name="exact_match"), RewardTerm(name="exact_match", params={"regex": "(.)"})]
    for judge in judges:
        check_spec(measured(SPEC, judge, {"default"}).spec)


def test_the_servers_recipe():
    long = recipe_of(run={"name": "n" * 64, "dir": "runs/r"})
    found = with_spec(long, measured(SPEC, None, {"default"}).spec)
    assert found.run.name == "n" * 54 + ".preflight" and found.run.seed == long.run.seed
    assert found.spec == measured(SPEC, None, {"default"}).spec


# ---- prompts -------------------------------------------------------------------------------------------------------

CHAT = [Task(task_id="1", messages=[Message(role="user", content="1+1")])]


def names(chosen: recipe.Recipe, tokenizer, tasks=CHAT, judge: str | None = None) -> list[str]:
    return [variant.name for variant in sweep.variants(chosen, tokenizer, tasks, judge)[0]]


def data_of(**keys) -> dict:
    return {"path": "rows.jsonl", "fields": {"prompt": "prompt"}, **keys}


def test_the_sweep_is_over_the_recipes_own_and_the_known_prompts():
    tokenizer = make_tiny_tokenizer()
    math_names = [prompt.name for prompt in prompts.every() if prompt.domain == "math"]
    assert names(recipe_of(data=data_of()), tokenizer) == ["none", *math_names]
    own = names(recipe_of(data=data_of(prompt="intuitor-3b@1")), tokenizer)
    assert own[:2] == ["intuitor-3b@1", "none"] and sorted(own) == sorted(["none", *math_names])
    text = prompts.named("verl-boxed@1").system
    assert names(recipe_of(data=data_of(system_prompt=text)), tokenizer)[0] == "verl-boxed@1"
    assert names(recipe_of(data=data_of(system_prompt="Be brief.")), tokenizer)[:2] == ["data.system_prompt", "none"]
    code = names(recipe_of(data=data_of()), tokenizer, judge="code_tests")
    assert code == ["none", *(prompt.name for prompt in prompts.every() if prompt.domain == "code")]


def test_where_no_system_message_goes_only_the_plain_prompt_is_tried():
    chosen, own = recipe_of(data=data_of()), recipe_of(data=data_of(system_prompt="Be brief."))
    assert sweep.variants(chosen, make_tokenizer(), CHAT, None) == (
        [sweep.Variant("none")],
        "the chat template has no system role",
    )
    with pytest.raises(
        StartupError, match=r"data\.system_prompt: the chat template of 'some/model' has no system role"
    ):
        sweep.variants(own, make_tokenizer(), CHAT, None)
    plain = make_tiny_tokenizer()
    plain.chat_template = None
    (variant,), why = sweep.variants(own, plain, CHAT, None)
    assert "no chat template" in why
    assert variant.arrange(Task(task_id="1", prompt="1+1"), 0).prompt == "Be brief.\n\n1+1"
    silent = make_tiny_tokenizer()
    silent.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    assert not sweep.has_system_role(silent) and sweep.has_system_role(make_tiny_tokenizer())
    brought = [Task(task_id="1", messages=[Message(role="system", content="s"), *CHAT[0].messages])]
    assert "bring system messages" in sweep.variants(chosen, make_tiny_tokenizer(), brought, None)[1]


def test_a_prompt_stands_around_the_problem_as_in_training(tmp_path):
    from services.orchestrator.data import load

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tokenizer = make_tiny_tokenizer()
    for key, value in (("prompt", "code-contests@1"), ("prompt", "intuitor-3b@1"), ("system_prompt", "Be brief.")):
        chosen = recipe_of(data=data_of(path=str(path), max_prompt_tokens=900, **{key: value}))
        bare = sweep.choose(chosen, tokenizer, 7)
        tried, _ = sweep.variants(chosen, tokenizer, bare, None)
        found = sweep.arranged(chosen, tokenizer, bare, tried)
        trained = {task.messages[-1].content: task.messages for task in load(chosen, tokenizer).tasks}
        own = next(iter(found.values()))
        assert len(own) == 7 and all(trained[task.messages[-1].content] == task.messages for task in own)
        assert [task.messages[-1].content for task in found["none"]] == [task.messages[-1].content for task in bare]
    short = recipe_of(data=data_of(path=str(path), max_prompt_tokens=20))
    with pytest.raises(
        StartupError, match=r"data\.max_prompt_tokens: with a prompt around it, no problem fits into 20"
    ):
        sweep.arranged(short, tokenizer, sweep.choose(short, tokenizer, 5), tried)


# ---- real servers --------------------------------------------------------------------------------------------------


def run(monkeypatch, capfd, *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command in this process."""
    from services.cli.main import main

    monkeypatch.setattr(sys, "argv", ["rlif", *map(str, arguments)])
    monkeypatch.setattr("services.logs.configure", lambda *_, **__: None)  # it would take over this process's logging
    monkeypatch.setenv("COLUMNS", "250")
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, *capfd.readouterr()


@pytest.fixture(scope="module")
def urls(tiny_model):
    from reward_server import app as reward_app
    from rollout_server import app as rollout_app

    rewards = reward_app.create(reward_app.Settings(model=str(tiny_model), threads=1, verifier_workers=1))
    rollouts = rollout_app.create(rollout_app.Settings(str(tiny_model), device="cpu", threads=1))
    with served(rollouts) as rollout_url, served(rewards) as reward_url:
        yield rollout_url, reward_url


@pytest.fixture
def recipe_file(tiny_model, tmp_path) -> Path:
    """A character is right when it is a lower-case letter: about one in ten of what the tiny model says."""
    data = tmp_path / "rows.jsonl"
    letters = [
        {"id": row["id"], "prompt": row["prompt"], "answers": list("abcdefghijklmnopqrstuvwxyz")} for row in ROWS
    ]
    data.write_text("".join(json.dumps({**row, "answer": "a"}) + "\n" for row in letters))
    fields = {"id": "id", "prompt": "prompt", "answer": "answer", "reference": {"answers": "answers"}}
    chosen = recipe_of(
        str(tiny_model),
        data={"path": str(data), "fields": fields, "max_prompt_tokens": 400},
        rollout={"groups_per_request": 2, "sampling": {"max_tokens": 3}, "device": "cpu", "threads": 1},
        rewards=[{"name": "self_certainty"}, {"name": "exact_match", "weight": 0, "params": {"regex": "^(.)"}}],
        scorer={"device": "cpu", "threads": 1, "verifier_workers": 1},
        trainer={"steps": 1, "groups_per_step": 2, "device": "cpu"},
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.dump(chosen))
    return path


def test_a_preflight_by_running_servers(urls, recipe_file, tmp_path, monkeypatch, capfd):
    rollout_url, reward_url = urls
    out = tmp_path / "report.json"
    arguments = ("--rollout-url", rollout_url, "--reward-url", reward_url, "--prompts", 2, "--samples", 3)
    code, shown, _ = run(monkeypatch, capfd, "preflight", recipe_file, *arguments, "--json", "--out", out)
    found = report.Report.model_validate_json(shown)
    assert code == 0 and found == report.Report.model_validate_json(out.read_text())
    assert (found.judge, found.run, found.samples, found.weight_version) == ("exact_match", "r", 3, str(Version()))
    assert [prompt.name for prompt in found.prompts][:2] == ["none", "intuitor-1.5b@1"] and len(
        found.prompts
    ) == 1 + sum(prompt.domain == "math" for prompt in prompts.every())
    assert all(prompt.tasks == 2 and prompt.failed == 0 for prompt in found.prompts)
    assert found.own.truncated > 0.5 and found.verdict.level == "caution"
    rewards = {reward.name: reward for reward in found.own.rewards}
    assert set(rewards) == {"recipe", *INTRINSIC, "majority_vote", "certainty_weighted_vote"}
    # Advantages are in the order of the only reward with a weight.
    assert rewards["recipe"].best == rewards["self_certainty"].best is not None
    assert found.prompts[1].over_own is not None and found.own.over_own is None
    again = json.loads(run(monkeypatch, capfd, "preflight", recipe_file, *arguments, "--json")[1])
    assert {**again, "seconds": 0} == {**json.loads(shown), "seconds": 0}
    with BlockingRewardClient(reward_url) as client:
        assert not any("preflight" in entry.name for entry in client.list_specs())


def test_the_recipes_own_prompt_alone_with_an_exit_code_for_stop(urls, recipe_file, monkeypatch, capfd):
    options = ("--rollout-url", urls[0], "--reward-url", urls[1], "--prompts", FEW, "--samples", 2, "--own-prompt")
    silent = ("rewards=[{name: constant}]", "combine={normalize: none}")
    code, shown, _ = run(monkeypatch, capfd, "preflight", recipe_file, *silent, *options, "--json")
    found = report.Report.model_validate_json(shown)
    assert (code, found.verdict.level) == (EXIT_STOP, "stop") and EXIT_STOP not in (0, 1, 2)
    assert [prompt.name for prompt in found.prompts] == ["none"] and found.sweep == ""


def test_data_that_is_here_is_looked_at_before_anything_is_asked_or_started(recipe_file, tmp_path, monkeypatch, capfd):
    def not_yet(*_, **__):
        pytest.fail("too early")

    for name in (
        "services.cli.preflight.check_available",
        "services.cli.child.starting",
        "services.cli.run.run_recipe",
    ):
        monkeypatch.setattr(name, not_yet)
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1"}\n')
    for command in ("preflight", "up"):
        code, _, said = run(monkeypatch, capfd, command, recipe_file, "model.path=some/model")
        assert code == 2 and "rows.jsonl line 1: no field 'prompt'; it has 'question'" in said.splitlines()[-1]


@pytest.mark.parametrize("model", ["my model", "org/name:tag"])
def test_a_name_that_no_hub_has_is_one_line_and_held_out_data_may_be_absent(recipe_file, monkeypatch, capfd, model):
    held_out = "evaluation={data: {path: held.jsonl}, every: 50, rewards: grpo}"
    code, _, said = run(monkeypatch, capfd, "preflight", recipe_file, f"model.path={model}", held_out)
    (line,) = said.strip().splitlines()
    assert code == 2 and line.startswith(f"rlif: model.path {model}: neither a folder here nor to be had")


def test_a_hub_that_does_not_answer_is_one_line(recipe_file):
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "services.cli.main", "preflight", str(recipe_file), "model.path=some/model"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2 and not done.stdout
    line = done.stderr.strip()
    assert line.startswith("rlif: model.path some/model: neither a folder here nor to be had") and "\n" not in line


def test_the_tables_read_well_in_80_columns():
    """Nothing is cut off, and no figure is broken in two lines."""
    reward = {"gain": Interval(mean=-0.213, low=-0.29, high=-0.12), "beyond_length": around(0.53, 0.1)}
    reward |= {"over_majority": Interval(mean=0.58, low=0.5, high=0.65), "length_correlation": -0.44}
    names = ("recipe", *INTRINSIC, "majority_vote", "certainty_weighted_vote")
    rewards = [reward_of(name, best=0.859, **reward) for name in names]
    measured_prompts = [
        prompt_of(*rewards, name=name, over_own=reward["gain"], majority=around(0.668, 0.1))
        for name in ("data.system_prompt", *(prompt.name for prompt in prompts.every()))
    ]
    own = measured_prompts[0]
    found = report.Report(
        run="r", model="m", data="d", seed=0, samples=8, judge="math_verify", sweep="", weight_version="0.0",
        seconds=1.0, verdict=decide(own, 8, True, ["self_certainty"]), limits=report.limits(True, Version()),
        best_prompt="b", best_reward="b", prompts=measured_prompts,
    )  # fmt: skip
    console = Console(width=80, record=True, file=io.StringIO())
    show(found, console)
    text = console.export_text()
    assert "…" not in text and text.count(" (-29 to -12)") == len(names) + len(measured_prompts)
    assert text.count("0.53 (0.43 to 0.63)") == len(names) == text.count("85.9 (76 to 96)")
    assert all(text.count(f"\n{name} ") == 2 for name in (*names, *(prompt.name for prompt in measured_prompts)))


def test_a_preflight_without_answers(urls, recipe_file, monkeypatch, capfd):
    options = ("--rollout-url", urls[0], "--reward-url", urls[1], "--prompts", 3, "--samples", 2)
    chosen = yaml.safe_load(recipe_file.read_text())
    chosen["data"]["fields"] = {"prompt": "prompt"}
    chosen["rewards"] = "intuitor"
    recipe_file.write_text(yaml.safe_dump({**chosen, "combine": None}))
    code, shown, _ = run(monkeypatch, capfd, "preflight", recipe_file, *options)
    assert code == 0
    assert "the majority, for want of answers" in shown and "caution: " in shown and "without answers" in shown


def test_a_preflight_of_a_scheduled_reward(urls, recipe_file, monkeypatch, capfd):
    options = ("--rollout-url", urls[0], "--reward-url", urls[1], "--prompts", 2, "--samples", 2, "--json")
    chosen = yaml.safe_load(recipe_file.read_text())
    chosen["rewards"][0]["schedule"] = {"kind": "switch", "at": 10}
    recipe_file.write_text(yaml.safe_dump(chosen))
    code, shown, said = run(monkeypatch, capfd, "preflight", recipe_file, *options)
    assert code == 0, said
    assert [(prompt.tasks, prompt.failed) for prompt in report.Report.model_validate_json(shown).prompts][0] == (2, 0)


def test_up_goes_on_after_a_caution(urls, recipe_file, monkeypatch, capfd):
    started = []
    monkeypatch.setattr("services.cli.run.run_recipe", lambda chosen, *_: started.append(chosen.run.name) or 0)
    servers = (f"rollout.urls=[{urls[0]}]", f"scorer.urls=[{urls[1]}]")
    code, shown, _ = run(monkeypatch, capfd, "up", recipe_file, *servers, "--preflight")
    assert code == 0 and started == ["r"] and "caution: " in shown
    code, _, said = run(monkeypatch, capfd, "up", recipe_file, *servers, "--preflight", "--resume")
    assert code == 2 and "--preflight" in said and started == ["r"]


def test_up_refuses_on_a_stop_sign_of_servers_that_it_starts(recipe_file, monkeypatch, capfd):
    """A reward that says the same of every completion teaches nothing."""
    monkeypatch.setattr("services.cli.run.run_recipe", lambda *_: pytest.fail("it must not start"))
    code, _, said = run(monkeypatch, capfd, "up", recipe_file, "rewards=[{name: constant}]", "--preflight")
    assert code == EXIT_STOP
    last = said.strip().splitlines()[-1]
    assert last.startswith("rlif: --preflight: do not train on this as it is: in 100.0 % of the groups")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rollout-url", "127.0.0.1:9"], "rollout.urls"),
        (["--out", "/"], "--out /: is a folder"),
        (["--out", "/nowhere/report.json"], "--out /nowhere/report.json: cannot be written"),
        (["data.path=absent.jsonl"], "data.path: there is no file 'absent.jsonl'"),
        (["model.path=absent/model/folder"], "model.path"),
        (["rewards=[{name: nonsense}]"], "nonsense"),
    ],
)
def test_refusals(arguments, words, recipe_file, monkeypatch, capfd):
    code, shown, said = run(monkeypatch, capfd, "preflight", recipe_file, *arguments)
    assert code == 2 and not shown
    assert words in said.strip().splitlines()[-1]


@pytest.mark.parametrize("kind", ["reward", "rollout"])
def test_what_follows_no_run_needs_no_telling(kind, monkeypatch, capfd):
    code, _, said = run(monkeypatch, capfd, "serve", kind, "--model", "m", "--no-follow")
    assert code == 2 and "--no-follow: is for the run of a --recipe" in said


def test_servers_that_went_with_their_run_are_refused_at_once(recipe_file, urls, monkeypatch, capfd):
    """A run's own recipe.yaml names them."""
    gone = ("rollout.urls=[http://:secret@127.0.0.1:9]", f"scorer.urls=[{urls[1]}]")
    code, _, said = run(monkeypatch, capfd, "preflight", recipe_file, *gone)
    assert code == 2 and "rollout.urls http://127.0.0.1:9: nobody answers there (ConnectError)" in said
    assert "rollout.urls=[] scorer.urls=[]" in said and "secret" not in said


def test_a_server_that_fails_is_a_failure(recipe_file, monkeypatch, capfd):
    app = FastAPI()
    app.get("/healthz")(lambda: {"status": "ok"})
    app.api_route("/{path:path}", methods=["GET", "POST", "PUT"])(lambda path: Response(status_code=503))
    options = ("rollout.deadline_seconds=0.3", "scorer.deadline_seconds=0.3", "--prompts", 2)
    with served(app) as url:
        code, _, said = run(
            monkeypatch, capfd, "preflight", recipe_file, "--rollout-url", url, "--reward-url", url, *options
        )
    assert code == 1 and f"rlif: {url}: no rollout server could be used" in " ".join(said.split())


def test_thresholds_are_explained():
    """docs/preflight.md names every one with its value."""
    page = (Path(__file__).parent.parent / "docs" / "preflight.md").read_text()
    for value in (FEW, f"{100 * SILENT:g} %", f"{100 * QUIET:g} %", f"{100 * SETTLED:g} %", f"{100 * ENDLESS:g} %"):
        assert str(value) in page
    for name in (*PromptFigures.model_fields, *RewardFigures.model_fields, *report.Report.model_fields):
        assert f"`{name}`" in page, name
    assert all(sign in page for sign in verdict.SIGNS)
