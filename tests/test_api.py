"""HTTP bodies: what they refuse, and in which words."""

import pytest
from pydantic import ValidationError

from services.api import MOST_COMPLETIONS, RewardGroup, RewardsRequest, RolloutRequest, ScoreItem
from services.contract import Task


def make_group(number: int, completions: int) -> RewardGroup:
    task = Task(task_id=str(number), prompt="p")
    return RewardGroup(group_id=str(number), task=task, completions=[{"text": "c"}] * completions)


def test_one_call_carries_a_bounded_number_of_completions():
    full = [make_group(number, 1024) for number in range(MOST_COMPLETIONS // 1024)]
    assert RewardsRequest(groups=full).groups == full
    with pytest.raises(ValidationError, match=f"at most {MOST_COMPLETIONS} completions in one call"):
        RewardsRequest(groups=[*full, make_group(99, 1)])


@pytest.mark.parametrize("given", [{}, {"prompt": "a", "prompt_token_ids": [1]}])
def test_exactly_one_prompt(given):
    for model, rest in ((RolloutRequest, {"group_id": "g"}), (ScoreItem, {"completion": "c"})):
        with pytest.raises(ValidationError, match="exactly one of `messages`, `prompt`, `prompt_token_ids`"):
            model(**given, **rest)
        assert model(prompt="a", **rest).prompt == "a"


def test_exactly_one_completion():
    for given in ({}, {"completion": "c", "completion_token_ids": [1]}):
        with pytest.raises(ValidationError, match="exactly one of `completion` and `completion_token_ids`"):
            ScoreItem(prompt="a", **given)
