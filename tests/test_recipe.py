"""Recipes: what is refused and in which words, overrides, and that a dumped recipe loads to the same settings."""

from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from services import recipe
from services.recipe import RecipeError
from services.spec import Combine, RewardSpec, RewardTerm

ROOT = Path(__file__).parent.parent
BASE = {
    "run": {"name": "r", "dir": "runs/r"},
    "model": {"path": "some/model"},
    "data": {"path": "data.jsonl", "fields": {"prompt": "question", "answer": "answer"}},
    "rewards": [{"name": "self_certainty"}],
    "trainer": {"steps": 4, "groups_per_step": 8},
}


def test_minimal_recipe_gets_defaults():
    made = recipe.parse(BASE)
    assert made.trainer.kl_beta == 0.005 and made.rollout.group_size == 8
    assert made.spec == RewardSpec(rewards=[RewardTerm(name="self_certainty")], combine=Combine())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.lr=1", ["trainer.lr: unknown key", "learning_rate"]),
        ("nonsense=1", ["nonsense: unknown key", "rollout"]),
        ("trainer.steps=many", ["trainer.steps", "'many'"]),
        ("trainer.steps=0", ["trainer.steps", "greater than or equal to 1", "0"]),
        ("trainer.learning_rate=.nan", ["trainer.learning_rate", "finite"]),
        ("rollout.sampling.temperature=0", ["rollout.sampling.temperature: 0"]),
        ("rollout.groups_per_request=3", ["rollout.groups_per_request: 3", "trainer.groups_per_step (8)"]),
        ("rollout.max_model_len=100", ["rollout.max_model_len: 100", "768"]),
        ("rollout.group_size=1", ["rollout.group_size: 1", "normalize: none"]),
        ("run.name=a b", ["run.name", "'a b'"]),
        ("data.fields={}", ["data", "exactly one of `prompt` and `messages`"]),
        ("rewards=[{name: a}, {name: a}]", ["rewards", "'a' occurs twice"]),
        ("rewards=[]", ["rewards: list at least one"]),
        ("rewards=[{name: a, weight: 0}]", ["rewards: none has a weight", "nothing to train on"]),
        ("rewards=[{name: a, sources: [math]}]", ["rewards: none has a weight", "data.source 'default'"]),
        ("data.answer_pattern=(", ["data: answer_pattern: '('", "not a regular expression"]),
        ("data.answer_pattern=a(b)(c)", ["data: answer_pattern", "exactly one group, it has 2"]),
        ("data={path: p, fields: {prompt: q}, answer_pattern: (a)}", ["data: answer_pattern", "without fields.answer"]),
        ("trainer.betas=[0.9, 1]", ["trainer.betas.1", "less than 1"]),
        ("rollout.urls=[localhost:8200]", ["rollout.urls.0", "http://", "'localhost:8200'"]),
        ("scorer.urls=['http://']", ["scorer.urls.0", "http://"]),
        ("queue.url=localhost:6379", ["queue.url", "redis:// or rediss:// or unix://"]),
        ("trainer.gpus=[0, 1]", ["trainer.gpus: [0, 1]", "1 different devices"]),
        ("rollout.gpus=[0, -1]", ["rollout.gpus"]),
        ("scorer={engine: vllm, follow: ema}", ["scorer: follow: ema needs engine: transformers"]),
        ("scorer={engine: vllm, max_model_len: 100}", ["scorer.max_model_len: 100", "768"]),
        ("scorer={engine: vllm, tensor_parallel_size: 2, gpus: [0]}", ["scorer.gpus: [0]", "2 different devices"]),
        ("scorer.tensor_parallel_size=2", ["scorer: tensor_parallel_size", "use engine: vllm"]),
        ("scorer.max_model_len=4096", ["scorer: max_model_len", "engine: vllm"]),
        ("scorer.engine=sglang", ["scorer.engine", "'transformers' or 'vllm'", "'sglang'"]),
        ("weights.keep=1", ["weights.keep", "greater than or equal to 2"]),
        ("trainer", ["key.sub=value"]),
        ("trainer.steps.deep=1", ["trainer.steps.deep=1", "not a section"]),
        ("trainer.steps=[", ["not YAML"]),
    ],
)
def test_refusals_name_key_value_and_what_is_valid(override, words):
    with pytest.raises(RecipeError) as caught:
        recipe.parse(BASE, [override])
    for word in words:
        assert word in str(caught.value)


def test_a_deterministic_run_scores_with_transformers():
    overrides = ["run.deterministic=true", "scorer.engine=vllm"]
    with pytest.raises(RecipeError, match="run.deterministic: .* scorer.engine vllm"):
        recipe.parse(BASE, overrides)
    assert recipe.parse(BASE, ["scorer={engine: vllm, tensor_parallel_size: 2, gpus: [0, 1]}"]).scorer.gpus == [0, 1]


@pytest.mark.parametrize("url", ["http://:hunter2@host", "redis://:hunter2℀@host"])
def test_a_refused_redis_url_does_not_show_its_password(url):
    with pytest.raises(RecipeError, match="queue.url: not a URL") as caught:
        recipe.parse(BASE, [f"queue.url={url}"])
    assert "hunter2" not in str(caught.value)


def test_every_fault_gets_a_line():
    with pytest.raises(RecipeError) as caught:
        recipe.parse(BASE, ["trainer.steps=0", "model.dtype=float16", "x=1"])
    assert len(str(caught.value).splitlines()) == 3


def test_missing_sections_and_non_mappings():
    with pytest.raises(RecipeError, match="trainer: is required"):
        recipe.parse({key: value for key, value in BASE.items() if key != "trainer"})
    with pytest.raises(RecipeError, match="mapping"):
        recipe.parse([1, 2])


def test_overrides_do_not_touch_the_tree_and_win_over_the_file(tmp_path):
    tree = deepcopy(BASE)
    assert recipe.parse(tree, ["trainer.steps=9", "rewards=grpo"]).trainer.steps == 9
    assert tree == BASE
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(BASE))
    assert recipe.load(path, ["rollout.sampling.temperature=0.7"]).rollout.sampling.temperature == 0.7


def test_unreadable_files(tmp_path):
    with pytest.raises(RecipeError, match="No such file"):
        recipe.load(tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(RecipeError, match="not YAML"):
        recipe.load(tmp_path / "bad.yaml")


@given(
    steps=st.integers(1, 10**6),
    rate=st.floats(1e-9, 0.5),
    staleness=st.integers(0, 100),
    preset=st.sampled_from(["intuitor", "grpo"]) | st.none(),
)
def test_dump_then_load_is_the_same_recipe(steps, rate, staleness, preset):
    tree = deepcopy(BASE)
    tree["trainer"] |= {"steps": steps, "learning_rate": rate}
    tree["pacing"] = {"max_staleness": staleness}
    if preset:
        tree["rewards"] = preset
    made = recipe.parse(tree)
    assert recipe.parse(yaml.safe_load(recipe.dump(made))) == made


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_are_valid(path):
    recipe.load(path)


def test_spec_ids_follow_content():
    one = RewardSpec(rewards=[RewardTerm(name="a", weight=1.0)])
    assert one.spec_id == RewardSpec(rewards=[RewardTerm(name="a")]).spec_id
    assert one.spec_id != RewardSpec(rewards=[RewardTerm(name="a", weight=2.0)]).spec_id


# ---- watching ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["guard.action=raise_beta", "trainer.kl_beta=0"], "guard.action: raise_beta needs trainer.kl_beta above 0"),
        (["guard.votes=6"], "guard: votes: 6 is more than window (5)"),
        (["guard.bands.length={}"], "guard.bands.length: give `low`, `high`, `at_least` or `at_most`"),
        (["guard.bands.lenth={low: 0.5}"], "guard.bands.lenth: unknown key; valid keys here: length, distinct"),
        (["guard.webhook=ftp://x"], "guard.webhook: String should match pattern"),
        (["pacing.dynamic_sampling=true", "run.deterministic=true"], "run.deterministic: what replaces the groups"),
        (
            ["evaluation={every: 5, rewards: grpo, data: {path: x, fields: {prompt: p}}}"],
            "evaluation.every: 5 is not a",
        ),
        (
            ["evaluation={every: 10, rewards: [], data: {path: x, fields: {prompt: p}}}"],
            "evaluation.rewards: list at least one judge",
        ),
    ],
)
def test_watching_that_cannot_work_is_refused(overrides, says):
    with pytest.raises(RecipeError) as refused:
        recipe.parse(BASE, overrides)
    assert says in str(refused.value)
