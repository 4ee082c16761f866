"""Prompts: published texts never change, templates are chosen by seed and problem alone, recipes name them."""

import hashlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services import prompts, recipe
from services.recipe import RecipeError

PUBLISHED = {
    "intuitor-1.5b@1": "710d6d1b08d8",
    "intuitor-3b@1": "d0af600fbca9",
    "intuitor-7b@1": "ca3ff8213151",
    "intuitor-code@1": "210ff3160292",
    "verl-1.5b@1": "77892ded399c",
    "verl-3b@1": "0ac0fcf1f931",
    "verl-7b@1": "f1fb75d0f850",
    "verl-boxed@1": "68fe19fbd41c",
    "code-contests@1": "d48fa96706aa",
}
BASE = {
    "run": {"name": "r", "dir": "runs/r"},
    "model": {"path": "some/model"},
    "data": {"path": "data.jsonl", "fields": {"prompt": "question"}, "prompt": "intuitor-3b@1"},
    "rewards": "intuitor",
    "trainer": {"steps": 4, "groups_per_step": 8},
}


def digest(prompt: prompts.Prompt) -> str:
    return hashlib.sha256("\x1f".join([prompt.system or "", *prompt.templates]).encode()).hexdigest()[:12]


def test_a_published_text_never_changes():
    assert {prompt.name: digest(prompt) for prompt in prompts.every()} == PUBLISHED


def test_the_papers_prompts_differ_as_it_says():
    small, middle, large = (prompts.named(f"intuitor-{size}@1").system for size in ("1.5b", "3b", "7b"))
    assert middle == f"{small} Please stop generation immediately after outputing the box."
    assert "box" in small and "box" not in large
    for size in ("1.5b", "3b", "7b"):
        ours, verls = prompts.named(f"intuitor-{size}@1"), prompts.named(f"verl-{size}@1")
        assert verls.system == ours.system.replace("provided", "provide", 1)


def test_every_template_holds_the_problem_once_and_asks_for_a_closed_block():
    for prompt in prompts.every():
        for template in prompt.templates:
            assert template.count(prompts.PLACE) == 1 and template.endswith("```python\n# Your code here\n```")


@given(problem=st.text(max_size=40), seed=st.integers(0, 2**31 - 1))
def test_a_problem_is_asked_the_same_way_whatever_it_holds(problem, seed):
    prompt = prompts.named("code-contests@1")
    said = prompt.user(problem, seed)
    assert said == prompt.user(problem, seed)
    assert said in [template.replace(prompts.PLACE, problem) for template in prompt.templates]
    assert prompts.named("intuitor-3b@1").user(problem, seed) == problem


def test_templates_are_chosen_evenly_and_anew_by_each_seed():
    prompt = prompts.named("code-contests@1")
    problems = [f"problem {number}" for number in range(2000)]

    def choices(seed):
        return [prompt.templates.index(prompt.user(text, seed).replace(text, prompts.PLACE)) for text in problems]

    first, second = choices(0), choices(1)
    assert all(420 <= count <= 580 for count in Counter(first).values()) and len(set(first)) == 4
    assert 0.2 < sum(a == b for a, b in zip(first, second, strict=True)) / len(problems) < 0.3


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.prompt=intuitor-3b@2", "data.prompt: there is no prompt 'intuitor-3b@2'; there are intuitor-1.5b@1"),
        ("data.prompt=intuitor-3b", "there is no prompt 'intuitor-3b'"),
        ("data.system_prompt=Think.", "system_prompt: prompt 'intuitor-3b@1' brings its own"),
        (
            "data={path: p, fields: {messages: m}, prompt: code-contests@1}",
            "prompt: 'code-contests@1' is put around the text of fields.prompt",
        ),
    ],
)
def test_refusals(override, says):
    with pytest.raises(RecipeError) as refused:
        recipe.parse(BASE, [override])
    assert says in str(refused.value)
