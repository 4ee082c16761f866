"""Offload: what DeepSpeed is told, and which combinations are refused. That it runs is for a machine with a GPU."""

from pathlib import Path

import pytest
import torch
from test_trainer import make_recipe

from services import recipe
from services.recipe import RecipeError
from trainer import engine as engines
from trainer import policy as policies
from trainer.ranks import Ranks


def chosen(model: Path = Path("unused"), **trainer) -> recipe.Recipe:
    return recipe.parse(make_recipe(model, Path("unused"), **trainer))


def test_deepspeed_is_told_what_stays_at_home():
    settings = chosen(zero_stage=3, offload={"optimizer": True, "parameters": True})
    engines.check(settings)
    zero = engines.config(settings, 1000, cuda=True)["zero_optimization"]
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert not {"offload_optimizer", "offload_param"} & engines.config(chosen(), 1000, True)["zero_optimization"].keys()


@pytest.mark.parametrize(
    ("stage", "offload", "message"),
    [
        (0, {"optimizer": True}, "trainer.offload.optimizer: true needs trainer.zero_stage 1, 2 or 3"),
        (2, {"parameters": True}, r"trainer.offload.parameters: true needs trainer.zero_stage 3 \(it is 2\)"),
    ],
)
def test_stages_that_cannot_are_refused(stage, offload, message):
    with pytest.raises(RecipeError, match=message):
        engines.check(chosen(zero_stage=stage, offload=offload))


def test_ranks_on_the_cpu_are_refused(tiny_model):
    settings = chosen(tiny_model, offload={"optimizer": True})
    with pytest.raises(RecipeError, match="trainer.offload: the ranks are on the CPU"):
        engines.start(policies.load(settings.model), settings, Ranks(0, 1, torch.device("cpu")))
